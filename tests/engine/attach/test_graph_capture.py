"""CUDA graphs captured by hand are refused; here CUDA's answer is a stand-in, test_cuda.py captures on a GPU."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import nn

import restrain as rs
from restrain.errors import CaptureError


@contextmanager
def capture():
    with (
        mock.patch("torch.cuda.is_initialized", return_value=True),
        mock.patch("torch.cuda.is_current_stream_capturing", return_value=True),
    ):
        yield


@pytest.fixture
def capturing():
    with capture():
        yield


RULES = {"loss": 0.1 * rs.L1().on(rs.outputs("1")), "step": (0.1 * rs.L1()).on("0.weight", how="proximal")}


def attached(rule):
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, rs.attach(model, RULES[rule], optimizer)


X = torch.ones(4, 3)


def test_forwards_that_are_recorded_are_refused(capturing):
    model, _, _ = attached("loss")
    with pytest.raises(CaptureError, match=r"a forward of a model with rules while a CUDA .*reduce-overhead"):
        model(X)
    model.eval()
    model(X)


def test_losses_are_refused(capturing):
    _, _, reg = attached("loss")
    with pytest.raises(CaptureError, match="a loss with rules"):
        reg.loss(X.sum())


@pytest.mark.parametrize("rule", RULES)
def test_steps_are_refused(rule, capturing):
    model, optimizer, _reg = attached(rule)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(CaptureError, match="a step of an optimizer with rules"):
        optimizer.step()


def test_other_models_are_captured(capturing):
    model, optimizer, reg = attached("loss")
    other = nn.Linear(3, 2)
    other.weight.grad = torch.ones_like(other.weight)
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    reg.detach()
    model(X).sum().backward()
    optimizer.step()


def test_training_goes_on_after_a_refused_capture():
    model, optimizer, _reg = attached("step")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = model[0].weight.detach().clone()
    with capture(), pytest.raises(CaptureError):
        optimizer.step()
    assert model[0].weight.equal(before)
    optimizer.step()
    moved = before - 0.1
    torch.testing.assert_close(model[0].weight.detach(), moved.sign() * (moved.abs() - 0.01).clamp_min(0))
