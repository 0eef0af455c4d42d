"""Base of all hooks on a model. In a copy of the model they do nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from restrain.errors import CaptureError, ExportError
from restrain.torch_private import never_compiled

F = TypeVar("F", bound=Callable[..., Any])


class Hook:
    """Base of the hooks on a model's layers; a copy or pickle is a DeadHook, without rules."""

    hands_on = False  # True if it passes tensors to the user, who may compute a loss from them

    def __reduce__(self) -> tuple[type[DeadHook], tuple[()]]:
        return (DeadHook, ())

    @property
    def __name__(self) -> str:
        """Refuse torch.jit.script, which reads this name before it compiles a hook.

        Raises:
            ExportError: always.
        """
        raise ExportError(
            "torch.jit.script compiles a model's hooks, which these can't be: reg.detach() before it (or before the "
            "copy that is scripted), and attach reg.plan again; or use torch.export or torch.jit.trace"
        )


@never_compiled
def eagerly(call: Any, *args: Any, **kwargs: Any) -> Any:
    """Return call(*args, **kwargs), run outside of compiled code and never traced into it.

    What a call adds to the loss or does at a step depends on the state left by earlier forwards.
    """
    return call(*args, **kwargs)


def refuse_capture(what: str) -> None:
    """Refuse `what` while a CUDA graph is captured by hand: its replays would run no rule's Python.

    Strengths would stay, steps be uncounted and penalties on activations be those of the capture.
    Graphs that torch.compile makes hold compiled code alone, and never come here.

    Raises:
        CaptureError: a CUDA graph is being captured.
    """
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise CaptureError(
            f"{what} while a CUDA graph is captured, whose replays don't run the rules again: use "
            "torch.compile(model, mode='reduce-overhead'), which makes graphs of the kernels and leaves the rules "
            "outside, or capture a model without rules (reg.detach())"
        )


class DeadHook(Hook):
    """Hook without effect, in place of a hook in a copy or pickle of its model."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None
