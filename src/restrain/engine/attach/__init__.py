"""The attachment: what a person holds while training, and what it tells."""

from restrain.engine.attach.attachment import Attachment, attach
from restrain.engine.attach.evaluation import Evaluation

__all__ = ["Attachment", "Evaluation", "attach"]
