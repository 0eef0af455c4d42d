"""Session of the callbacks: an attachment during a training, its state, and its logs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from restrain.engine import Attachment, History, attach, checked_track
from restrain.errors import PlanError
from restrain.integrations.logged import logs


class Around:
    """Replace `owner.name(...)` by `wrap(owner, method, ...)` until `remove`.

    Trainers have no event for the loss before the backward, nor for an exception. The attribute is
    set on the trainer's instance, never on a model or an optimizer; a copy or pickle contains the
    method itself.
    """

    def __init__(self, owner: Any, name: str, wrap: Callable[..., Any]) -> None:
        self._owner, self._name = weakref.ref(owner), name
        self._wrap: Callable[..., Any] | None = wrap
        self._before = vars(owner).get(name)
        vars(owner)[name] = self

    def _method(self) -> Callable[..., Any]:
        owner = self._owner()
        return self._before or getattr(type(owner), self._name).__get__(owner)  # type: ignore[no-any-return]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method, owner = self._method(), self._owner()
        return method(*args, **kwargs) if self._wrap is None else self._wrap(owner, method, *args, **kwargs)

    def remove(self) -> None:
        """Restore the owner's method; further calls do nothing."""
        owner, self._wrap = self._owner(), None
        if owner is not None and vars(owner).get(self._name) is self:
            del vars(owner)[self._name]
            if self._before is not None:
                vars(owner)[self._name] = self._before

    def __reduce__(self) -> Any:
        return (_itself, (self._method(),))


def _itself(method: Any) -> Any:
    return method


class Session:
    """An attachment during a fit, in the epochs of the trainer.

    A fit continues from a state that was loaded before it, or from the last fit if that had the
    same model; with another model it begins anew. So do the epochs of schedules, whichever number
    the trainer's epochs begin with.

    Args:
        plan: the rules.
        track: track each k-th step, as in `rs.attach`; None: no history.

    Raises:
        PlanError: an invalid `track`.
    """

    track: int | None = None  # here for pickles of version 0.1, as the next
    _history: History | None = None  # of the last fit

    def __init__(self, plan: Any, track: int | None = None) -> None:
        if track is not None:
            checked_track(track)
        self.plan, self.track = plan, track
        self.reg: Attachment | None = None
        self._state: dict[str, Any] = {}  # loaded, or of the last fit
        # model of the state; None for a loaded state
        self._fitted: weakref.ref[nn.Module] | None = None
        self._first: int | None = None  # number of the trainer's epoch zero in schedules
        self._epoch: int | None = None  # the trainer's current epoch
        # the epoch has ended, which schedules count only when the next begins: logs show this epoch
        self._ended = False
        self._losses: Tensor | None = None
        self._weights = 0.0

    def begin(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> Attachment:
        """Attach the plan and load the state for this model, if there is one.

        Raises:
            PlanError: the state doesn't fit.
        """
        self.end()
        self.data_loss()  # drop the losses of an interrupted fit
        reg = attach(model, self.plan, list(optimizers), track=self.track)
        self._first, self._epoch, self._ended, state = None, None, False, self._state
        try:
            if state and (self._fitted is None or self._fitted() is reg.model):
                self._load(reg, state)
        except BaseException:
            reg.detach()
            raise
        self.reg, self._state, self._fitted = reg, {}, None
        return reg

    def _load(self, reg: Attachment, state: dict[str, Any]) -> None:
        rest = dict(state)
        first = rest.pop("first_epoch", None)
        try:
            reg.load_state_dict(rest)
        except (PlanError, RuntimeError) as error:
            source = "the state that was loaded" if self._fitted is None else "the last fit of this model"
            raise PlanError(
                f"the rules can't go on from {source}: {error}. If the plan or the model was changed since, make a "
                "new RestrainCallback, whose rules begin anew"
            ) from error
        self._first = first

    def end(self) -> None:
        """Detach and keep the state; does nothing without a fit."""
        if self.reg is not None:
            reg = self.reg
            try:
                self._state, self._fitted = self.state_dict(), weakref.ref(reg.model)
                self._history = reg.history if reg.tracks else None
            finally:
                self.reg = None
                reg.detach()

    @property
    def history(self) -> History:
        """The history of the fit that runs, else of the last one.

        Raises:
            PlanError: nothing is tracked, or there was no fit.
        """
        found = self._history if self.reg is None else self.reg.history
        if found is None:
            raise PlanError("there is no history: write RestrainCallback(plan, track=10), then fit")
        return found

    def epoch_begins(self, number: int) -> None:
        """Begin the trainer's epoch `number`; schedules follow, also over skipped epochs."""
        if self.reg is None or number == self._epoch:
            return
        self._epoch = number
        if self._ended:
            self.reg.next_epoch()
            self._ended = False
        epochs = self.reg.state_dict()["epochs"]
        self._first = max(epochs - number, epochs - number if self._first is None else self._first)
        for _ in range(self._first + number - epochs):
            self.reg.next_epoch()

    def epoch_ends(self) -> None:
        """End the trainer's epoch."""
        self._ended = self.reg is not None

    def loss(self, data_loss: Tensor, share: float = 1.0, weight: float = 1.0) -> Tensor:
        """Return the data loss with `share` of the penalties; `weight` is for the logged mean."""
        assert self.reg is not None
        joined = self.reg.loss(data_loss, share=share)
        part = data_loss.detach() / share * weight
        self._losses = part if self._losses is None else self._losses + part
        self._weights += weight
        return joined

    def data_loss(self) -> float | None:
        """Return the mean of the data losses since the last call; None if there were none."""
        mean = None if self._losses is None else float(self._losses) / self._weights
        self._losses, self._weights = None, 0.0
        return mean

    def state_dict(self) -> dict[str, Any]:
        """Return the state for the trainer's checkpoint."""
        if self.reg is None:
            return self._state
        state = self.reg.state_dict()
        return {**state, "epochs": state["epochs"] + self._ended, "first_epoch": self._first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state: at once, or when the fit begins."""
        if self.reg is not None and state:
            self._load(self.reg, state)
        else:
            self._state, self._fitted = state, None

    def logs(self, mean: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Return the mean data loss since the last call, and the rules' current values.

        `mean` averages them over processes.
        """
        if self.reg is None:
            return {}
        found = logs(self.reg, self.data_loss())
        if mean is None:
            return found
        return dict(zip(found, mean(torch.tensor(list(found.values()), device="cpu")).tolist(), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        fresh = vars(Session(self.plan, self.track))
        # a copied model is another object, but the same model
        history = self._history if self.reg is None or not self.reg.tracks else self.reg.history
        return {**fresh, "_history": history, "_state": self.state_dict()}
