"""The attachment: what a person holds while training, and what it tells."""

from restrain.engine.attach.attachment import Attachment, attach, attached_to, continued
from restrain.engine.attach.certificate import Certificate
from restrain.engine.attach.evaluation import Evaluation
from restrain.engine.attach.facts import contents_of
from restrain.engine.attach.groups import Penalised
from restrain.engine.attach.history import History
from restrain.engine.attach.stationarity import Repeatable
from restrain.engine.attach.tracking import checked_track

__all__ = [
    "Attachment",
    "Certificate",
    "Evaluation",
    "History",
    "Penalised",
    "Repeatable",
    "attach",
    "attached_to",
    "checked_track",
    "contents_of",
    "continued",
]
