"""Recorded operations that are made fewer: the same numbers, and what may not be left out."""

import pytest
import torch

from restrain.models.recording import record
from restrain.models.simplify import simplify

G = torch.Generator().manual_seed(0)
X, W = (torch.randn(4, 3, generator=G, dtype=torch.float64) for _ in range(2))


def both(run, *given):
    """(operations before, after), once the results and the changed arguments are found to be equal."""
    graph = record(run, [t.clone() for t in given])
    before = sum(node.op == "call_function" for node in graph.graph.nodes)
    print(graph.code)
    simplify(graph)
    graph.recompile()
    print(graph.code)
    mine, theirs = [t.clone() for t in given], [t.clone() for t in given]
    torch.testing.assert_close(graph(*mine), run(*theirs), rtol=1e-12, atol=0)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)
    return before, sum(node.op == "call_function" for node in graph.graph.nodes)


def penalised(x, w):
    w = w.detach().requires_grad_()
    penalty = 0.1 * w.square().sum()
    (gradient,) = torch.autograd.grad((x * w).sum(1).square().mean() + penalty, w)
    return [gradient, (0.1 * w.square().sum()).detach()]


def test_a_square_in_the_loss_is_one_operation_in_the_backward():
    before, after = both(penalised, X, W)
    plain, least = both(lambda x, w: penalised(x, w * 1.0)[:1], X, W)
    assert after < before - 6
    assert least < plain


@pytest.mark.parametrize(
    ("run", "less"),
    [
        (lambda x, w: [x.exp() + w, x.exp() * w], 1),  # once
        (lambda x, w: [x.pow(1.0) + w, x.permute(0, 1) * w], 2),  # nothing
        (lambda x, w: [torch.ones_like(x) * 3 * w, w], 3),  # a number
        (lambda x, w: [x + (w * 2.0) * torch.ones_like(w)], 4),  # one sum
        (lambda x, w: [x.exp(), x.add_(1.0).clone(), x.exp()], 0),  # changed in between
        (lambda x, w: [x.exp().add_(w), x.exp()], 0),  # the one of two that is changed
        (lambda x, w: [x.exp().view(-1).add_(1.0), x.exp()], 0),  # through a view
        (lambda x, w: [torch.empty_like(x).copy_(w), torch.empty_like(x).copy_(x)], 2),  # detached, no more
        (lambda x, w: [torch.ones_like(x).add_(w), torch.ones_like(x)], 3),  # the other is kept
    ],
)
def test_what_is_left_out(run, less):
    before, after = both(run, X, W)
    assert before - after == less
