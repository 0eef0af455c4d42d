"""Rules inside trainers: callbacks for Lightning, Hugging Face's Trainer and skorch.

Each is imported on its own, as in `from restrain.integrations.lightning import RestrainCallback`,
and needs its trainer. Accelerate, torchrun and your own loops need none: write `reg.loss` before
the backward, and `logs` for the logger.
"""

from restrain.integrations.logged import logs

__all__ = ["logs"]
