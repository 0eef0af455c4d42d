"""What hangs on a model: base of all hooks, and what becomes of them in a copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from restrain.errors import ExportError

F = TypeVar("F", bound=Callable[..., Any])


class Hook:
    """Base of the hooks on a model's layers. A copy or a pickle of one is dead: a copied model is free of the rules."""

    hands_on = False  # whether it hands what it sees to somebody who may compute a loss from it

    def __reduce__(self) -> tuple[type[DeadHook], tuple[()]]:
        return (DeadHook, ())

    @property
    def __name__(self) -> str:
        """What torch.jit.script asks for first, before it would compile a hook.

        Raises:
            ExportError: always.
        """
        raise ExportError(
            "torch.jit.script compiles a model's hooks, which these can't be: reg.detach() before it (or before the "
            "copy that is scripted), and attach reg.plan again; or use torch.export or torch.jit.trace"
        )


@torch._disable_dynamo  # type: ignore[attr-defined]
def eagerly(call: Any, *args: Any, **kwargs: Any) -> Any:
    """Call it outside of compiled code, which the function would be traced into.

    What joins the loss depends on what the forwards have left behind, what is done at a step on what stands in it.
    """
    return call(*args, **kwargs)


def not_alone(function: F) -> F:
    """Have a function traced where compiled code calls it, but never compiled by itself, nor what it calls then.

    torch.compile calls the hooks of the model that it is given outside of the compiled forward, and compiles each one.
    """
    frames: Any = torch._C._dynamo.eval_frame
    skip = frames._FrameAction.SKIP
    frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    return function


class DeadHook(Hook):
    """What a hook becomes in a copy or a pickle of its model."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None
