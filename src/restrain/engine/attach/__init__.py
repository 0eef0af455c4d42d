"""The attachment: what a person holds while training, and what it tells."""

from restrain.engine.attach.attachment import Attachment, attach
from restrain.engine.attach.certificate import Certificate
from restrain.engine.attach.evaluation import Evaluation
from restrain.engine.attach.groups import PenalisedTensor

__all__ = ["Attachment", "Certificate", "Evaluation", "PenalisedTensor", "attach"]
