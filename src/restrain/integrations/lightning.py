"""Rules in Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from restrain.engine import History
from restrain.errors import PlanError
from restrain.extras import needing
from restrain.integrations.session import Around, Session

with needing("lightning", __name__):
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import Strategy


class RestrainCallback(Callback):
    """Attach a plan while the Trainer fits: `Trainer(callbacks=[RestrainCallback(plan)])`.

    Penalties with how="loss" are added to the loss that `training_step` returns or
    `manual_backward` gets, before the backward, also with accumulation and loss scaling; the loss
    that Lightning shows and you log stays the data loss. Logged every `log_every_n_steps`:
    "penalty" (also in the progress bar), "data_loss" (the mean since the last log),
    "penalties/<rule>", and "strengths/<rule>" for moving strengths. The state of the rules is in
    the Trainer's checkpoints. A second fit of the same module continues from the first; with
    another module the rules begin anew.

    Args:
        plan: as in `rs.attach`.
        share: in manual optimization, the part of the penalties for each `manual_backward`: 1/4 if
            each loss is divided by four that are accumulated, 1 if they are summed. By default all
            of them, and a second backward before the optimizer's step is an error.
        track: keep a history with a row for each k-th step, in `callback.history`; see `reg.track`.

    >>> from restrain.integrations.lightning import RestrainCallback
    >>> callback = RestrainCallback([1e-4 * rs.L2().on("*.weight")])
    """

    def __init__(self, plan: Any, share: float | None = None, *, track: int | None = None) -> None:
        self._session = Session(plan, track)
        self._share = share
        self._joins: Around | None = None
        self._passes: _Passes | None = None

    @property
    def reg(self) -> Any:
        """The attachment; None outside of a fit."""
        return self._session.reg

    @property
    def history(self) -> History:
        """The history of the fit that runs, else of the last one; see `reg.track`."""
        return self._session.history

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.automatic_optimization and self._share is not None:
            raise PlanError(
                "share= is for manual optimization; of Trainer(accumulate_grad_batches=) the callback knows: write "
                "RestrainCallback(plan)"
            )
        self._session.begin(pl_module, trainer.optimizers)
        self._passes = None if pl_module.automatic_optimization else _Passes(trainer.optimizers)
        self._joins = Around(trainer.strategy, "backward", self._backward)

    def _backward(self, strategy: Strategy, backward: Any, loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the strategy's `backward` on the loss with penalties."""
        if self._passes is None:
            trainer = strategy.lightning_module.trainer  # type: ignore[union-attr]
            return backward(self._session.loss(loss, 1 / trainer.accumulate_grad_batches), *args, **kwargs)
        with _frozen(self._passes.others(loss)):
            joined = self._session.loss(loss, 1.0 if self._share is None else self._share)
        if self._share is None:
            self._passes.count(loss, joined)
        return backward(joined, *args, **kwargs)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        # a resumed epoch has no on_train_epoch_start
        self._session.epoch_begins(trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._session.epoch_ends()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate():

            def mean(values: Tensor) -> Tensor:
                return trainer.strategy.reduce(values.to(pl_module.device), reduce_op="mean")

            logs = self._session.logs(mean if trainer.world_size > 1 else None)
            total = logs.pop("penalty", 0.0)
            pl_module.log("penalty", total, prog_bar=True, batch_size=1)
            pl_module.log_dict(logs, batch_size=1)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    def _end(self) -> None:
        for one in (self._joins, self._passes):
            if one is not None:
                one.remove()
        self._joins = self._passes = None
        self._session.end()

    def state_dict(self) -> dict[str, Any]:
        return self._session.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._session.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_joins": None, "_passes": None}


class _Passes:
    """Backward passes in manual optimization: which optimizers they concern, which await a step."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers
        self._waiting: set[int] = set()  # indices of optimizers whose gradients contain penalties
        self._handles = [one.register_step_post_hook(self._stepped) for one in optimizers]

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._waiting -= {i for i, one in enumerate(self._optimizers) if one is optimizer}

    def others(self, loss: Tensor) -> list[Tensor]:
        """Return parameters of optimizers that the loss doesn't train, as a GAN's discriminator."""
        if len(self._optimizers) < 2:
            return []
        trained = self._holding(_leaves(loss))
        own = {id(p) for i in trained for p in _parameters(self._optimizers[i])}
        rest = [p for one in self._optimizers for p in _parameters(one) if id(p) not in own]
        return rest if trained else []  # reentrant checkpoints hide the graph

    def count(self, loss: Tensor, joined: Tensor) -> None:
        """Note a backward pass.

        Raises:
            PlanError: gradients that it penalises contain penalties of another pass.
        """
        if joined is loss:
            return
        several = len(self._optimizers) > 1
        penalised = self._holding(_leaves(joined, loss)) if several else set(range(len(self._optimizers)))
        for i in penalised & self._waiting:
            if any(p.grad is not None and bool(p.grad.any()) for p in _parameters(self._optimizers[i])):
                which = f"optimizer {i}, {type(self._optimizers[i]).__name__}," if several else "the optimizer"
                raise PlanError(
                    f"a second manual_backward before {which} took its step or cleared its gradients: the penalties "
                    "would be added again, whole. Say which part belongs to each: RestrainCallback(plan, share=1 / 4) "
                    "where each loss is divided by four that are accumulated, share=1 where they are summed"
                )
        self._waiting |= penalised

    def _holding(self, leaves: set[int]) -> set[int]:
        return {i for i, one in enumerate(self._optimizers) if any(id(p) in leaves for p in _parameters(one))}

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])


def _leaves(tensor: Tensor, beyond: Tensor | None = None) -> set[int]:
    """Return ids of the parameters in the graph of a tensor, but not in the graph of `beyond`."""
    found, seen = set[int](), {None, None if beyond is None else beyond.grad_fn}
    waiting = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            found.add(id(getattr(node, "variable", None)))
            waiting += [following for following, _ in node.next_functions]  # type: ignore[union-attr]
    return found


@contextmanager
def _frozen(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Return a context in which the rules treat these parameters as frozen."""
    trained = [p for p in parameters if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
