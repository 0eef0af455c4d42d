"""Data losses of the models by name: formula, link and score, each with its source.

    name                    loss of a sample, with the network's output o     prediction
    "squared" (mse)         (y - o)²                                          o
    "absolute" (mae)        |y - o|                                           o
    "huber"                 ½r² up to |r| = delta, then delta(|r| - ½delta)   o
    "quantile"              q(y - o)⁺ + (1 - q)(o - y)⁺, mean over quantiles  o, sorted
    "gaussian" (gll)        ½((y - μ)/σ)² + log σ + ½log 2π; o = (μ, log σ)   μ
    "poisson", "gamma",     half the unit deviance of y and exp o             exp o
    "tweedie"
    "binomial"              half the deviance of successes and failures       1 / (1 + exp -o)
    "kl"                    Σ t log(t / softmax(o)) of proportions t          softmax(o)
    "mmd"                   the squared distance of kernel means, in a batch  o
    "cox"                   log Σ exp o over the risk set - o, at an event    o, the log hazard
    "cross_entropy" (xe)    -log softmax(o) of the class                      the likeliest class
    "ordinal"               the same of cumulative logits (an output layer)   the likeliest class
    "hinge"                 (1 + the greatest o of another class - o)⁺        the greatest o

Losses are averaged over samples and, where each output has its own target, over outputs.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from restrain.errors import PlanError
from restrain.fields import brief, is_number, near_names


class Loss(ABC):
    """Data loss of each sample, its link from outputs to predictions, and its score."""

    link: ClassVar[str] = "identity"
    scaled: ClassVar[bool] = False
    """True: a loss of differences, for which targets may be standardised."""
    joint: ClassVar[bool] = False
    """True: all columns of y are one target."""
    smooth: ClassVar[bool] = True
    """False: it has kinks, at which second-order methods stop."""
    by_r2: ClassVar[bool] = False
    """True: the score is R² of the predictions."""

    @abstractmethod
    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the data loss of each sample, shape (batch,)."""

    def scores(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return further monitors of each sample by name, each of shape (batch,)."""
        return {}

    def mean(self, output: Tensor) -> Tensor:
        """Return the predictions that belong to outputs of the network: the inverse link."""
        return output

    def outputs(self, targets: int) -> int:
        """Return the number of outputs of the network for a number of columns of y."""
        return 1 if self.joint else targets

    def check(self, y: Any) -> None:  # noqa: B027
        """Check targets, an array (samples, ..., columns).

        Raises:
            PlanError: the loss isn't defined for a target.
        """

    def constant(self, y: Any, weight: Any, offset: Any) -> Any:
        """Return the constant output with the least loss, shape (outputs,), or None: not known.

        Args:
            y: targets (samples, ..., columns), in float64 as the others.
            weight: of the samples, with the axes of y.
            offset: of the samples, with the axes of y, or a zero.
        """
        return None

    def score(self, output: Tensor, target: Tensor, weight: Tensor, null: Tensor | None) -> float:
        """Return 1 - loss / loss of the best constant (D², the part of the deviance explained).

        Args:
            output, target: all samples.
            weight: of each sample.
            null: the outputs of the best constant; None: the score is minus the mean loss.
        """
        own = _average(self.losses(output, target), weight)
        if null is None:
            return -own
        other = _average(self.losses(null, target), weight)
        return 1 - own / other if other else float(own == 0)


def _average(values: Tensor, weight: Tensor) -> float:
    return float((values * weight).sum() / weight.sum())


def per_sample(values: Tensor) -> Tensor:
    """Return the mean of each sample over steps and outputs."""
    return values.flatten(1).mean(1) if values.dim() > 1 else values


# ---------------------------------------------------------------- numbers


@dataclass(frozen=True)
class Squared(Loss):
    """(y - o)², whose score is R²: the squared error is the deviance of normal distributions."""

    scaled = by_r2 = True

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        return per_sample((output - target).square())


@dataclass(frozen=True)
class Absolute(Loss):
    """|y - o|, which the median minimises; the score is D² of the absolute error."""

    scaled, smooth = True, False

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        return per_sample((output - target).abs())

    def constant(self, y: Any, weight: Any, offset: Any) -> Any:
        return _quantile(y, 0.5, weight)


@dataclass(frozen=True)
class Huber(Loss):
    """½r² for |r| ≤ delta, beyond delta (|r| - ½ delta); with standardised targets r is so too.

    Source: Huber (1964), "Robust estimation of a location parameter".
    """

    delta: float = 1.35

    scaled = by_r2 = True

    def __post_init__(self) -> None:
        _above_zero("delta", self.delta)

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        return per_sample(F.huber_loss(output, target, reduction="none", delta=self.delta))


@dataclass(frozen=True)
class Quantile(Loss):
    """Pinball loss q (y - o)⁺ + (1 - q) (o - y)⁺, an output for each quantile q; their mean.

    Predictions are sorted, so that they don't cross.

    Sources: Koenker and Bassett (1978); for sorting Chernozhukov, Fernández-Val and Galichon
    (2010).
    """

    quantiles: tuple[float, ...] = (0.1, 0.5, 0.9)

    scaled, smooth = True, False

    def __post_init__(self) -> None:
        q: Any = [self.quantiles] if is_number(self.quantiles) else self.quantiles
        if isinstance(q, str | Mapping) or not all(is_number(one) and 0 < one < 1 for one in q) or not len(q):
            raise PlanError(f"quantiles= are numbers between 0 and 1, as in [.1, .5, .9]; got {brief(self.quantiles)}")
        found = tuple(float(one) for one in q)
        if sorted(set(found)) != list(found):
            raise PlanError(f"quantiles= rise, each written once; got {brief(self.quantiles)}")
        object.__setattr__(self, "quantiles", found)

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        q = torch.tensor(self.quantiles, dtype=output.dtype, device=output.device)
        error = target - output
        return per_sample(torch.maximum(q * error, (q - 1) * error))

    def mean(self, output: Tensor) -> Tensor:
        return output.sort(-1).values

    def outputs(self, targets: int) -> int:
        if targets != 1:
            raise PlanError(f'loss="quantile" is for one target, got {targets}: write a model for each')
        return len(self.quantiles)

    def constant(self, y: Any, weight: Any, offset: Any) -> Any:
        return np.concatenate([_quantile(y, q, weight) for q in self.quantiles])


@dataclass(frozen=True)
class Gaussian(Loss):
    """-log density of N(μ, σ²) with outputs μ and log σ: the spread is learned too.

    Source: Nix and Weigend (1994), "Estimating the mean and variance of the target distribution".
    """

    scaled = by_r2 = True

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        mean, log_std = output.chunk(2, -1)
        return per_sample(0.5 * ((target - mean) * (-log_std).exp()).square() + log_std + 0.5 * math.log(2 * math.pi))

    def mean(self, output: Tensor) -> Tensor:
        return output.chunk(2, -1)[0]

    def outputs(self, targets: int) -> int:
        return 2 * targets


@dataclass(frozen=True)
class MeanDiscrepancy(Loss):
    """Squared distance of the means of outputs and targets of a batch under a Gaussian kernel.

    Of a sample: mean over the batch of k(o, o') + k(y, y') - 2 k(o, y'), k(a, b) = exp(-‖a - b‖² /
    width). It compares distributions, not pairs.

    Source: Gretton et al. (2012), "A kernel two-sample test", eq. 5.
    """

    width: float = 1.0

    scaled = True

    def __post_init__(self) -> None:
        _above_zero("width", self.width)

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        o, y = output.flatten(1), target.flatten(1)
        return (self._kernel(o, o) + self._kernel(y, y) - 2 * self._kernel(o, y)).mean(1)

    def _kernel(self, a: Tensor, b: Tensor) -> Tensor:
        return (-(a[:, None] - b[None]).square().sum(-1) / self.width).exp()


# ---------------------------------------------------------------- counts, amounts, proportions


class _Log(Loss):
    """Base of the losses of means exp o."""

    link = "log"
    power: float

    def mean(self, output: Tensor) -> Tensor:
        return output.exp()

    def constant(self, y: Any, weight: Any, offset: Any) -> Any:
        scale = np.exp(offset)  # the score equation Σ w (y - c e^offset) (c e^offset)^(1 - power) = 0
        up, down = weight * y * scale ** (1 - self.power), weight * scale ** (2 - self.power)
        return np.log(np.maximum(up.sum(0) / down.sum(0), 1e-300))


@dataclass(frozen=True)
class Poisson(_Log):
    """y log(y / μ) - y + μ of counts y ≥ 0, μ = exp o: half the unit deviance.

    Source: McCullagh and Nelder (1989), "Generalized linear models", table 2.1, as `Gamma`.
    """

    power = 1.0

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        return per_sample(output.exp() - target * output + torch.xlogy(target, target) - target)

    def check(self, y: Any) -> None:
        _in_range(y, y >= 0, "poisson", "zero or more")


@dataclass(frozen=True)
class Gamma(_Log):
    """y / μ - 1 - log(y / μ) of amounts y > 0, μ = exp o: half the unit deviance."""

    power = 2.0

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        log_ratio = target.log() - output
        return per_sample(log_ratio.exp() - 1 - log_ratio)

    def check(self, y: Any) -> None:
        _in_range(y, y > 0, "gamma", "above zero")


@dataclass(frozen=True)
class Tweedie(_Log):
    """Half the unit deviance of variance μ^power, 1 < power < 2: zeros and amounts, μ = exp o.

    y^(2 - p) / ((1 - p)(2 - p)) - y μ^(1 - p) / (1 - p) + μ^(2 - p) / (2 - p).

    Source: Jørgensen (1987), "Exponential dispersion models".
    """

    power: float = 1.5

    def __post_init__(self) -> None:
        if not (is_number(self.power) and 1 < self.power < 2):
            raise PlanError(
                f"power= of tweedie is a number between 1 and 2, got {self.power!r}; 1 is poisson, 2 is gamma, "
                "0 is squared"
            )

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        p = self.power
        own = target.pow(2 - p) / ((1 - p) * (2 - p))
        return per_sample(own - target * ((1 - p) * output).exp() / (1 - p) + ((2 - p) * output).exp() / (2 - p))

    def check(self, y: Any) -> None:
        _in_range(y, y >= 0, "tweedie", "zero or more")


@dataclass(frozen=True)
class Binomial(Loss):
    """Half the deviance of s successes and f failures: Σ observed log(observed / expected).

    y has two columns (s, f), or one of proportions of one trial, whose number `sample_weight` may
    say.

    Source: McCullagh and Nelder (1989), section 4.4.
    """

    link = "logit"
    joint = True

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        o = output[..., 0]
        s, f = (target[..., 0], target[..., 1]) if target.shape[-1] > 1 else (target[..., 0], 1 - target[..., 0])
        total = s + f
        own = torch.xlogy(s, s) + torch.xlogy(f, f) - torch.xlogy(total, total)
        return per_sample(own - s * F.logsigmoid(o) - f * F.logsigmoid(-o))

    def mean(self, output: Tensor) -> Tensor:
        return output.sigmoid()

    def check(self, y: Any) -> None:
        if y.shape[-1] > 2:
            raise PlanError(f"y of binomial is (successes, failures) or a proportion; got {y.shape[-1]} columns")
        _in_range(y, (y >= 0) & (y <= (1 if y.shape[-1] == 1 else np.inf)), "binomial", "counts, or from 0 to 1")

    def constant(self, y: Any, weight: Any, offset: Any) -> Any:
        s, f = (y[..., :1], y[..., 1:]) if y.shape[-1] > 1 else (y, 1 - y)
        s, f, w = s.ravel(), f.ravel(), np.broadcast_to(weight, s.shape).ravel()
        shift, o = np.broadcast_to(offset, y[..., :1].shape).ravel(), 0.0
        for _ in range(100):  # Newton's; the score falls in o
            p = 1 / (1 + np.exp(-(o + shift)))
            slope = (w * (s + f) * p * (1 - p)).sum()
            step = np.clip((w * (s - (s + f) * p)).sum() / max(slope, 1e-300), -2, 2)
            o += step
            if abs(step) < 1e-12:
                break
        return np.array([o])


@dataclass(frozen=True)
class KL(Loss):
    """Divergence Σ t log(t / p) of proportions t, which sum to 1, from p = softmax(o).

    Source: Kullback and Leibler (1951). theanets' "kl" sums the absolute values of the terms.
    """

    link = "softmax"

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        return per_sample((torch.xlogy(target, target) - target * output.log_softmax(-1)).sum(-1, keepdim=True))

    def mean(self, output: Tensor) -> Tensor:
        return output.softmax(-1)

    def check(self, y: Any) -> None:
        _in_range(y, (y >= 0) & (np.abs(y.sum(-1, keepdims=True) - 1) < 1e-4), "kl", "proportions that sum to 1")

    def constant(self, y: Any, weight: Any, offset: Any) -> Any:
        total = (weight * y).reshape(-1, y.shape[-1]).sum(0)
        return np.log(np.maximum(total / total.sum(), 1e-300))


# ---------------------------------------------------------------- survival


@dataclass(frozen=True)
class Cox(Loss):
    """Minus the log partial likelihood: log Σ exp o over the risk set - o, of each event.

    y has the columns time, event (1, or 0 where censored) and, if there are strata, stratum. The
    risk set of an event has the samples of its batch and stratum whose time is no less, so batches
    are best whole (`batch_size=len(X)`). The l-th of d events at one time has, by Efron's formula,
    Σ exp o over the risk set less l/d of that over the d events. The score is the concordance.

    Sources: Cox (1972); ties by Efron (1977), or Breslow (1974).
    """

    ties: str = "efron"
    strata: int = 1

    joint = True

    def __post_init__(self) -> None:
        if self.ties not in ("efron", "breslow"):
            raise PlanError(f'ties= of cox is "efron" or "breslow", got {self.ties!r}')

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        stratum = target[:, 2] if target.shape[1] > 2 else torch.zeros_like(target[:, 0])
        order = target[:, 0].argsort(descending=True, stable=True)
        order = order[stratum[order].argsort(stable=True)]
        o, stratum = output[order, 0], stratum[order]
        time, event = target[order, 0], target[order, 1]
        first = torch.ones_like(time, dtype=torch.bool)
        first[1:] = (time[1:] != time[:-1]) | (stratum[1:] != stratum[:-1])
        group = first.cumsum(0) - 1  # of equal stratum and time
        number = torch.arange(len(o), device=o.device)
        last = torch.zeros_like(group).scatter_reduce(0, group, number, "amax")[group]
        at_risk = self._at_risk(o, stratum)[last]
        if self.ties == "efron":
            at_risk = at_risk + self._less_ties(o, event, group, at_risk)
        found = event * (at_risk - o)
        return torch.zeros_like(found).scatter(0, order, found)

    def _at_risk(self, o: Tensor, stratum: Tensor) -> Tensor:
        """Return log Σ exp o over a stratum up to each sample, in the order of falling times."""
        nothing = torch.finfo(o.dtype).min / 4
        found = torch.zeros_like(o)
        for number in range(self.strata):
            mine = stratum == number
            found = torch.where(mine, torch.where(mine, o, nothing).logcumsumexp(0), found)
        return found

    def _less_ties(self, o: Tensor, event: Tensor, group: Tensor, at_risk: Tensor) -> Tensor:
        """Return log(1 - l/d Σ exp o of the tied events / Σ exp o of the risk set)."""
        tied = torch.zeros_like(o).scatter_add(0, group, event * (o - at_risk).exp())[group]
        count = torch.zeros_like(o).scatter_add(0, group, event)[group]
        before = event.cumsum(0) - event
        before = before - torch.zeros_like(o).scatter_reduce(0, group, before, "amin", include_self=False)[group]
        return torch.log1p(-(before / count.clamp_min(1)) * tied * event)

    def constant(self, y: Any, weight: Any, offset: Any) -> Any:
        return np.zeros(1)  # any: the partial likelihood knows no constant

    def check(self, y: Any) -> None:
        if y.ndim != 2 or y.shape[1] not in (2, 3):
            raise PlanError(f"y of cox has the columns time, event and perhaps stratum; got the shape {y.shape}")
        _in_range(y[:, 1], (y[:, 1] == 0) | (y[:, 1] == 1), "cox", "1 (an event) or 0 (censored) in its second column")

    def score(self, output: Tensor, target: Tensor, weight: Tensor, null: Tensor | None) -> float:
        """Return the concordance (Harrell 1982): the part of comparable pairs in the right order.

        A pair is comparable if one has its event while the other is at risk, in one stratum. Equal
        predictions count half. Weights of a pair are multiplied.
        """
        o, w, y = output[:, 0].double().numpy(), weight.double().numpy(), target.double().numpy()
        right = total = 0.0
        for i in np.flatnonzero(y[:, 1]):
            later = (y[:, 0] > y[i, 0]) | ((y[:, 0] == y[i, 0]) & (y[:, 1] == 0))
            later &= y[:, 2] == y[i, 2] if y.shape[1] > 2 else True
            pair = w[i] * w[later]
            right += float((pair * ((o[i] > o[later]) + 0.5 * (o[i] == o[later]))).sum())
            total += float(pair.sum())
        return right / total if total else 0.5


# ---------------------------------------------------------------- classes


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """-log softmax(o) of the class, averaged over the steps of a sequence; "acc": accuracy."""

    link = "softmax"

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        return per_sample(F.cross_entropy(output.movedim(-1, 1), target, reduction="none"))

    def scores(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"acc": per_sample((output.argmax(-1) == target).to(output.dtype))}

    def mean(self, output: Tensor) -> Tensor:
        return output.softmax(-1)


@dataclass(frozen=True)
class Ordinal(CrossEntropy):
    """Cross-entropy of classes in order, P(class ≤ k) = 1 / (1 + exp(o - θₖ)) with rising θ.

    The output layer of the form "ordinal" has the weights of o and the θ, and gives log P(class).

    Source: McCullagh (1980), "Regression models for ordinal data".
    """


@dataclass(frozen=True)
class Hinge(CrossEntropy):
    """(1 + greatest output of another class - output of the class)⁺; it gives no probabilities.

    Source: Crammer and Singer (2001). theanets' "hinge" lacks the 1: it is 0 for equal outputs.
    """

    link, smooth = "identity", False

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        own = output.gather(-1, target[..., None])
        others = output.scatter(-1, target[..., None], torch.finfo(output.dtype).min)
        return per_sample((1 + others.amax(-1) - own[..., 0]).clamp_min(0))

    def mean(self, output: Tensor) -> Tensor:
        raise PlanError('loss="hinge" gives no probabilities: read decision_function, or fit with the default loss')


@dataclass(frozen=True)
class Labels(Loss):
    """Several labels of a sample: the mean of -log P(label) over labels, each of its own logit."""

    link = "logit"

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        found = F.binary_cross_entropy_with_logits(output, target.to(output.dtype), reduction="none")
        return per_sample(found)

    def scores(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"acc": ((output > 0) == (target > 0)).all(-1).to(output.dtype)}

    def mean(self, output: Tensor) -> Tensor:
        return output.sigmoid()


# ---------------------------------------------------------------- functions, offsets


@dataclass(frozen=True)
class Own(Loss):
    """A function (output, target) → loss of each sample, shape (batch,); predicts its outputs."""

    function: Callable[[Tensor, Tensor], Tensor]

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        found = self.function(output, target)
        if not isinstance(found, Tensor) or found.shape != output.shape[:1]:
            came = tuple(found.shape) if isinstance(found, Tensor) else brief(found)
            raise PlanError(
                f"a function as loss= returns the loss of each sample, a tensor of shape ({len(output)},); got {came}"
            )
        return found

    def scores(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        if target.is_floating_point():
            return {}
        return {"acc": per_sample((output.argmax(-1) == target).to(output.dtype))}


@dataclass(frozen=True)
class Shifted(Loss):
    """A loss of outputs plus known offsets, which are the last column of the targets."""

    loss: Loss

    def losses(self, output: Tensor, target: Tensor) -> Tensor:
        return self.loss.losses(output + target[..., -1:], target[..., :-1])

    def mean(self, output: Tensor) -> Tensor:
        return self.loss.mean(output)


# ---------------------------------------------------------------- by name

NUMBERS: dict[str, type[Loss]] = {
    "squared": Squared,
    "absolute": Absolute,
    "huber": Huber,
    "quantile": Quantile,
    "gaussian": Gaussian,
    "poisson": Poisson,
    "gamma": Gamma,
    "tweedie": Tweedie,
    "binomial": Binomial,
    "kl": KL,
    "mmd": MeanDiscrepancy,
    "cox": Cox,
}
CLASSES: dict[str, type[Loss]] = {"cross_entropy": CrossEntropy, "ordinal": Ordinal, "hinge": Hinge}
RECONSTRUCTIONS: dict[str, type[Loss]] = {name: NUMBERS[name] for name in ("squared", "absolute", "huber", "mmd")}
_ALIASES = {
    **dict.fromkeys(("mse", "squared_error", "mean_squared_error"), "squared"),
    **dict.fromkeys(("mae", "absolute_error", "mean_absolute_error"), "absolute"),
    **dict.fromkeys(("xe", "log_loss", "categorical_crossentropy", "sparse_categorical_crossentropy"), "cross_entropy"),
    **{"gll": "gaussian", "kld": "kl", "kl_divergence": "kl", "pinball": "quantile"},
}
_SETTINGS = {"huber": "delta", "quantile": "quantiles", "tweedie": "power", "mmd": "width", "cox": "ties"}


def read(given: Any, known: Mapping[str, type[Loss]], where: str) -> Loss:
    """Return the loss of a name, of {name: setting}, or of a function.

    Args:
        given: such as "poisson" or {"cox": "breslow"}; None is the first of `known`.
        known: the losses of the model by name.
        where: name of the model, for errors.

    Raises:
        PlanError: no loss of the model has this name, or its setting isn't allowed.
    """
    if given is None:
        return next(iter(known.values()))()
    if callable(given) and not isinstance(given, type):
        return Own(given)
    pair: tuple[Any, ...] = tuple(given.items()) if isinstance(given, Mapping) else ((given, None),)
    if len(pair) != 1 or not isinstance(pair[0][0], str):
        raise PlanError(
            'loss= is a name, as in "huber", a name with its setting, as in {"huber": 1.5}, or a function of output '
            f"and target; got {brief(given)}"
        )
    ((text, setting),) = pair
    name = str(_ALIASES.get(text, text))
    if name not in known:
        other = [kind for kind, names in (("Regressor", NUMBERS), ("Classifier", CLASSES)) if name in names]
        said = f"it is one of {other[0]}" if other else f"there are: {', '.join(known)}"
        raise PlanError(f"{where} has no loss= {text!r}{'' if other else near_names([name], list(known))}; {said}")
    if setting is None:
        return known[name]()
    if name not in _SETTINGS:
        raise PlanError(f'loss= "{name}" has no setting, got {brief(setting)}; these have one: {", ".join(_SETTINGS)}')
    return known[name](**{_SETTINGS[name]: setting})


def survival(y: Any) -> Any:
    """Return (time, event) columns of a structured array of an event (a truth) and a time."""
    names = getattr(getattr(y, "dtype", None), "names", None)
    if not names:
        return y
    events = [name for name in names if y.dtype[name].kind == "b"]
    if len(names) != 2 or len(events) != 1:
        raise PlanError(f"y of cox as a structured array has an event (a truth) and a time; got {y.dtype}")
    time = next(name for name in names if name not in events)
    return np.column_stack([y[time].astype(float), y[events[0]].astype(float)])


def with_strata(loss: Cox, strata: int) -> Cox:
    """Return the loss for a number of strata."""
    return dataclasses.replace(loss, strata=strata)


def _quantile(y: Any, q: float, weight: Any) -> Any:
    """Return the q-quantile of each column; weighted ones invert the distribution function."""
    rows = y.reshape(-1, y.shape[-1])
    if (weight == weight.flat[0]).all():
        return np.quantile(rows, q, axis=0)
    w = np.broadcast_to(weight, y.shape).reshape(rows.shape)
    return np.quantile(rows, q, axis=0, weights=w, method="inverted_cdf")


def _above_zero(name: str, value: Any) -> None:
    if not (is_number(value) and value > 0):
        raise PlanError(f"{name}= is a number above zero, got {value!r}")


def _in_range(y: Any, right: Any, name: str, wanted: str) -> None:
    if not np.all(right):
        wrong = y[~np.broadcast_to(right, y.shape)].flat[0]
        raise PlanError(f'the target y of loss="{name}" is {wanted}; got {wrong:g}')
