"""Zeros that prox and projections give are positive, and gradients pass through them."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from restrain.penalties.shrink import unsign_zeros_, unsigned_zeros


def traced(function):
    def run(x):
        return make_fx(function, tracing_mode="symbolic")(x)(x)

    return run


@pytest.mark.parametrize("way", [lambda f: f, traced], ids=["eager", "traced"])
@pytest.mark.parametrize("change", [unsigned_zeros, lambda x: unsign_zeros_(x.clone())], ids=["new", "in place"])
def test_zeros_are_positive(way, change):
    x = torch.tensor([-0.0, 0.0, -1.0, float("inf"), -float("inf"), float("nan")])
    found = way(change)(x)
    torch.testing.assert_close(found, x, rtol=0, atol=0, equal_nan=True)
    assert not found[:2].signbit().any()


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_pass_at_zeros(compiled):
    function = torch.compile(unsigned_zeros, backend="aot_eager") if compiled else unsigned_zeros
    x = torch.tensor([-0.0, 0.0, 2.0], requires_grad=True)
    function(x).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 1.0]
