"""Rules inside trainers: callbacks for Lightning, Hugging Face's Trainer and skorch.

Each is imported on its own, as `from restrain.integrations.lightning import RestrainCallback`, and needs its trainer.
Accelerate, torchrun and loops of your own need none: `reg.loss` before the backward is all, and `logs` for the logger.
"""

from restrain.integrations.logged import logs

__all__ = ["logs"]
