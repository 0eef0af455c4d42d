"""Balance of the experts in a mixture of experts."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from restrain.errors import PenaltyError, RestrainWarning
from restrain.fields import brief, check_flags, is_whole, level_of_caller, shown_number
from restrain.penalties.all_reduce import over_processes
from restrain.penalties.base import Penalty, Tensors, batch_size, in_float32
from restrain.penalties.functorch import as_plain
from restrain.penalties.statistics import Statistic, resting
from restrain.torch_private import in_backward

Statistics = Literal["micro-batch", "batch", "sequence"]
Scores = Literal["softmax", "sigmoid"]
_CHOICES = {"statistics": ("micro-batch", "batch", "sequence"), "scores": ("softmax", "sigmoid")}


@dataclass(frozen=True)
class LoadBalance(Penalty):
    """E Σ_e f_e P_e of E experts: 1 if all are chosen alike, E / top_k if always the same.

    f_e is expert e's part of all assignments (Σ f_e = 1), a count without a gradient; P_e is the
    mean over tokens of its probability, all experts' (Σ P_e = 1), through which the gradient flows.
    The outputs are the router's logits, (tokens, experts) or (batch, time, experts); the top_k
    greatest are assigned. Of several layers, each has its own balance, and the rule is their sum.
    Switch and Mixtral's own losses are top_k times this.

    Args:
        top_k: the number of experts that a token is sent to.
        statistics: over which tokens f and P are taken. "micro-batch": those of one forward, on all
            processes. "sequence": of each sequence, then the mean over sequences. "batch": f counts
            the update's tokens so far, of accumulated micro-batches, on all processes; P is of the
            present micro-batch. So early micro-batches see fewer counts than late ones, and their
            mean isn't the value of the whole batch; the last one's f is. Each training forward
            since the last step counts, also one whose loss was thrown away.
        scores: "softmax", or "sigmoid" for routers whose probabilities are s_e / Σ s, s the
            sigmoid of the logits. It is computed as the softmax of log s, which needs no epsilon.
        sync: count over all processes; set False if they train different models.

    Raises:
        PenaltyError: not more experts than top_k, for which the value is constant; probabilities in
            place of logits; "sequence" for logits without an axis of sequences.

    Source: Fedus, Zoph and Shazeer (2022), Switch transformers, eq. 4 to 6; DeepSeek-AI (2024),
    DeepSeek-V3, eq. 17 to 20, per sequence; Qiu and others (2025), arXiv 2501.11873, per batch.

    >>> rs.LoadBalance(1)(torch.tensor([[9.0, -9.0], [-9.0, 9.0]]))
    tensor(1.)
    >>> rs.LoadBalance(1)(torch.tensor([[9.0, -9.0], [9.0, -9.0]]))
    tensor(2.)
    """

    top_k: int
    statistics: Statistics = "micro-batch"
    scores: Scores = "softmax"
    sync: bool = True

    keywords = ("load_balance",)
    takes_mask = True
    at_outputs = True

    def __post_init__(self) -> None:
        check_flags(PenaltyError, sync=self.sync)
        if not is_whole(self.top_k, 1):
            raise PenaltyError(f"top_k= is a whole number of experts, at least 1; got {shown_number(self.top_k)}")
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if not (isinstance(value, str) and value in known):
                raise PenaltyError(f"{name}= is {', '.join(map(repr, known))}; got {brief(value)}")

    @property
    def by_steps(self) -> bool:  # type: ignore[override]
        return self.statistics == "batch"

    def __call__(self, w: Tensors) -> Tensor:
        """Return the value for a batch along dim 0, of this tensor alone."""
        return self.over_batch(w, 0 if w.dim() else None)

    def over_batch(self, h: Tensor, dim: int | None = 0, mask: Tensor | None = None) -> Tensor:
        return in_float32(lambda x: self.of(x, dim, mask, None), h)

    def of(self, z: Tensor, dim: int | None, mask: Tensor | None, counts: _Counts | None) -> Tensor:
        """Return the value of logits; `counts` of a place sums over processes and micro-batches."""
        self._check(z, mask)
        if not z.numel():
            return z.sum()
        rows = sequences(z, dim) if self.statistics == "sequence" else z.reshape(1, -1, z.shape[-1])
        kept = None
        if mask is not None:
            mask = mask.expand(*z.shape[:-1], 1)
            kept = sequences(mask, dim) if self.statistics == "sequence" else mask.reshape(1, -1, 1)
            rows = torch.where(kept, rows, 0)
        assigned, probable, tokens = self._sums(rows, kept)
        if counts is not None and self.statistics != "sequence":
            assigned, probable, tokens = counts.of(assigned, probable, tokens, self)
        f = assigned / assigned.sum(1, keepdim=True).clamp_min(1)
        balance = z.shape[-1] * (f * probable).sum(1) / tokens.clamp_min(1)
        return balance.sum() / (tokens > 0).sum().clamp_min(1)

    def _sums(self, z: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return for each sequence: assignments, sums of probabilities by expert, and tokens."""
        p = (logsigmoid(z) if self.scores == "sigmoid" else z).softmax(-1)
        chosen = torch.zeros_like(p).scatter(-1, z.detach().topk(self.top_k, -1).indices, 1.0)
        tokens = p.new_full((z.shape[0],), z.shape[1])
        if kept is not None:
            p, chosen = torch.where(kept, p, 0), torch.where(kept, chosen, 0)
            tokens = kept.sum((1, 2)).to(p.dtype)
        return chosen.sum(1), p.sum(1), tokens

    def _check(self, z: Tensor, mask: Tensor | None) -> None:
        if z.is_complex() or z.dim() not in (2, 3):
            raise PenaltyError(
                f"{self!r} takes a router's real logits, (tokens, experts) or (batch, time, experts); got {z.dtype} of "
                f"shape {tuple(z.shape)}"
            )
        if z.shape[-1] <= self.top_k and z.numel():
            raise PenaltyError(
                f"{self!r}: of {z.shape[-1]} experts all are chosen by top_k={self.top_k}, so the value would be "
                "constant. Are the router's logits, one for each expert, at this place?"
            )
        if mask is not None and mask.shape[-1] != 1:
            raise PenaltyError(f"a mask for {self!r} takes or leaves all experts of a token together")

    def check_logits(self, z: Tensor) -> None:
        """Check that the tensor doesn't hold probabilities.

        Raises:
            PenaltyError: every row is a distribution.
        """
        if torch.compiler.is_compiling() or z.device.type == "meta" or z.dim() < 2 or not z.numel():
            return
        with as_plain(z) as plain:
            sums = plain.double().sum(-1) if plain.device.type != "mps" else plain.sum(-1)
            if bool((plain >= 0).all() & ((sums - 1).abs() < 0.02).all()):
                raise PenaltyError(
                    f"{self!r} takes a router's logits, got probabilities, whose softmax would be nearly flat: say "
                    "rs.outputs(..., via=torch.log), or another index= of the router's output"
                )

    def bound_in(self, model: nn.Module) -> Penalty:
        """Return the penalty; warn if a Hugging Face model adds a balance loss of its own."""
        config = getattr(model, "config", None)
        weight = getattr(config, "router_aux_loss_coef", None)
        if getattr(config, "output_router_logits", False) is True and weight:
            warnings.warn(
                f"{self!r}: the model's config has output_router_logits=True, so its own loss includes a balance loss "
                f"(router_aux_loss_coef={weight:g}), and routers would be balanced twice: set one of them to zero or "
                "False",
                RestrainWarning,
                stacklevel=level_of_caller(),
            )
        return self

    def bound_at_place(self) -> Penalty:
        return _LoadBalanceAtPlace(self, _Counts(self.statistics == "batch"))


def sequences(z: Tensor, dim: int | None) -> Tensor:
    """Return (batch, time, entries) of a tensor with these axes.

    Raises:
        PenaltyError: it has no axis of sequences.
    """
    if z.dim() != 3 or dim is None or dim % 3 == 2:
        raise PenaltyError(
            f"statistics='sequence' needs logits of (batch, time, experts), got the shape {tuple(z.shape)} with the "
            f"batch axis {dim}. Where the router has joined both: via=lambda z: z.unflatten(0, (-1, time))"
        )
    batch_size(z, dim)
    return z.movedim(dim, 0)


class _Counts:
    """Assignments by expert of an update so far: sums over processes and micro-batches."""

    def __init__(self, accumulates: bool) -> None:
        self.accumulates = accumulates
        self.pending = torch.zeros(0, device="cpu")  # by expert, since the last step
        self.last = torch.zeros(0, device="cpu")  # of the last forward alone
        self.looked = False  # the first outputs were seen to be logits

    def of(
        self, assigned: Tensor, probable: Tensor, tokens: Tensor, penalty: LoadBalance
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return assignments, sums of probabilities and tokens, summed as the penalty says."""
        if penalty.sync:
            both = over_processes(torch.cat([assigned, probable, tokens.expand(1, 1)], 1))
            assigned, probable, tokens = both.split([assigned.shape[1], probable.shape[1], 1], 1)
            assigned, tokens = assigned.detach(), tokens[0].detach()
        return (self._so_far(assigned, penalty) if self.accumulates else assigned), probable, tokens

    def _so_far(self, assigned: Tensor, penalty: LoadBalance) -> Tensor:
        if not torch.compiler.is_compiling():
            if resting().on:
                return assigned
            with as_plain(assigned) as plain:
                if plain.shape != assigned.shape:
                    raise PenaltyError(
                        f"{penalty!r}: under torch.func.vmap each sample would have counts of its own: use "
                        "statistics='micro-batch', or call the model on the batch"
                    )
                assigned = plain
            if in_backward():  # a checkpoint's recomputation: counted already
                if not torch.equal(assigned, self.last):
                    raise PenaltyError(
                        f"{penalty!r}: a checkpoint recomputes a forward that isn't the last one, whose counts aren't "
                        "known any more: call backward() after each micro-batch's forward, or use "
                        "statistics='micro-batch'"
                    )
                return self.pending.clone().unsqueeze(0)
        if self.pending.shape != assigned.shape[1:] or self.pending.device != assigned.device:
            self.pending = torch.zeros_like(assigned[0])
        if not torch.compiler.is_compiling():
            self.last = assigned
        self.pending.add_(assigned[0])
        return self.pending.clone().unsqueeze(0)

    def step(self) -> None:
        """Begin the next update."""
        self.pending.zero_()


@dataclass(frozen=True, eq=False, repr=False)
class _LoadBalanceAtPlace(Statistic, register=False):
    """`LoadBalance` of one router: over all processes, with the counts of the update so far."""

    penalty: LoadBalance
    counts: _Counts

    def over_batch(self, h: Tensor, dim: int | None = 0, mask: Tensor | None = None) -> Tensor:
        if not (torch.compiler.is_compiling() or self.counts.looked):
            self.penalty.check_logits(h)
            self.counts.looked = True
        return in_float32(lambda x: self.penalty.of(x, dim, mask, self.counts), h)

    def state(self) -> dict[str, Tensor]:
        return {"counts": self.counts.pending} if self.counts.accumulates else {}

    def stepped(self, w: Tensor | None) -> None:
        self.counts.step()
