"""The quantile universal threshold: a strength from the null model alone, without validation.

Under the null model the targets depend on no penalised input, so that the right model is the
origin. The origin is a stationary point at every strength from the dual norm of its gradient on
(`restrain.paths.greatest`); over targets of the null model this is a random number Λ. Its quantile
of 1 - level is the strength at which nothing is selected with probability 1 - level if there is
nothing to select, the least strength with this property.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from restrain.engine import Penalised, attach, restored
from restrain.errors import PlanError
from restrain.fields import brief, is_number, is_whole
from restrain.named_tensors import checked_module, unwrap
from restrain.paths.greatest import at_origin, check_rules, in_loss, least_strength
from restrain.plans import Plan


def universal_threshold(
    model: nn.Module,
    rules: Any,
    loss: Callable[[nn.Module, Any], Tensor],
    null: Callable[[torch.Generator], Any],
    *,
    level: float = 0.05,
    draws: int = 1000,
    random_state: int | None = None,
) -> float:
    """Return the quantile universal threshold of a path's rules, a strength for `rs.path`.

    λ = the quantile 1 - level of Λ(y) over targets y of the null model, Λ(y) the least strength at
    which the penalised groups stay zero: the dual norm of the gradient of `loss(model, y)` at the
    origin. The other parameters have the values that the model has. So let its output be zero (or
    the logarithms of the classes' shares) at the origin, and take the mean off targets: this stands
    for a fitted intercept. In a network Λ grows with the layers behind: the papers keep their norms
    at one, as `rs.UnitNorm` does; where they are free to grow, groups come back at any strength.

    The square root of the mean squared error makes λ independent of the noise's scale (pivotal),
    as in the square-root lasso: draw standard normal noise.

    Args:
        model: the model.
        rules: penalties on parameters whose strengths move together, as for `rs.path`.
        loss: `loss(model, y)`, the data loss for targets y.
        null: `null(generator)` draws targets under the null model, by the torch generator: for
            regression `torch.randn(n, 1, generator=generator)`, its mean taken off; for
            classification labels of all classes with their shares.
        level: the probability of selecting something where nothing is to be selected.
        draws: the number of targets drawn; the error of the quantile is about that of as many.
        random_state: the seed; None draws one from torch's generator.

    Raises:
        PlanError: rules that make no zeros, invalid settings, or a gradient that is zero at the
            origin whatever the targets, a saddle.

    Source: Giacobino, Sardy, Diaz-Rodriguez and Hengartner (2017), arXiv 1511.05433, for linear
    models; Sardy, van Cutsem and Ma (2024), arXiv 2411.17180, for networks.

    >>> x, model = torch.eye(50).repeat(4, 1), nn.Linear(50, 1, bias=False)
    >>> loss = lambda model, y: (model(x) - y).square().mean().sqrt()
    >>> null = lambda draw: torch.randn(200, 1, generator=draw)
    >>> rule = rs.L1().on("weight", how="proximal")
    >>> 0.01 < universal_threshold(model, rule, loss, null, draws=50) < 0.05
    True
    """
    check_level(level, draws)
    if random_state is not None and not is_whole(random_state, 0):
        raise PlanError(f"random_state= is a whole number or None; got {brief(random_state)}")
    root = unwrap(checked_module(model))
    seed = int(torch.randint(2**31, (), device="cpu")) if random_state is None else random_state
    draw = torch.Generator(device="cpu").manual_seed(seed)
    plan = list(Plan.of(rules))
    tensors = check_rules(root, plan)
    with restored([tensor for one in tensors for tensor in one.tensors.values()]):
        at_origin(tensors)
        with attach(root, in_loss(plan, 0.0)) as reg:
            found = [_least(tensors, reg.gradients(partial(loss, root, null(draw)))) for _ in range(draws)]
    threshold = quantile(torch.tensor(found, dtype=torch.float64, device="cpu"), level)
    if not threshold > 0:
        raise PlanError(
            "the gradient vanishes at the origin for most targets, so no threshold is known: penalise one layer, whose "
            "layers behind aren't zero, and give loss(model, y) that depends on y"
        )
    return threshold


def _least(tensors: Sequence[Penalised], gradients: dict[str, Tensor]) -> float:
    return max(least_strength(one.penalty, one.gathered(gradients)) for one in tensors)


def quantile(statistics: Tensor, level: float) -> float:
    """Return the quantile 1 - level, linear between order statistics."""
    return float(torch.quantile(statistics, 1 - level))


def check_level(level: Any, draws: Any = 1) -> None:
    """Check the settings of a threshold.

    Raises:
        PlanError: they aren't valid.
    """
    if not is_number(level) or not 0 < level < 1:
        raise PlanError(f"level= is a probability, between 0 and 1; got {brief(level)}")
    if not is_whole(draws, 1):
        raise PlanError(f"draws= is a whole number, at least 1; got {brief(draws)}")
