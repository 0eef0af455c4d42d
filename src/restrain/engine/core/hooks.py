"""What hangs on a model: base of all hooks, and what becomes of them in a copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from restrain.errors import ExportError
from restrain.torch_private import never_compiled

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


@never_compiled
def eagerly(call: Any, *args: Any, **kwargs: Any) -> Any:
    """Call it outside of compiled code, which the function would be traced into.

    What joins the loss depends on what the forwards have left behind, what is done at a step on what stands in it.
    """
    return call(*args, **kwargs)


class DeadHook(Hook):
    """What a hook becomes in a copy or a pickle of its model."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None
