"""Small networks for penalties on derivatives, and the Jacobian of each sample, taken one by one."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import restrain as rs

CODE, ESTIMATORS = rs.outputs("second"), ["exact", "vjp", "jvp", "difference"]


class Net(nn.Module):
    """With a block that may be checkpointed, or attend, or normalise, or drop.

    A sample's input and outputs are single numbers, so that random signs change nothing: all estimators are exact.
    """

    def __init__(self, reentrant=None, mixer=None):
        super().__init__()
        self.reentrant = reentrant
        self.first, self.mixer, self.second, self.head = nn.Linear(1, 6), mixer, nn.Linear(6, 1), nn.Linear(1, 1)

    def block(self, x):
        h = self.first(x).tanh()
        return self.second(h if self.mixer is None else self.mixer(h)).tanh()

    def forward(self, x):
        if self.reentrant is None:
            return self.head(self.block(x))
        return self.head(checkpoint(self.block, x, use_reentrant=self.reentrant))


class Attend(nn.Module):
    def forward(self, h):
        h = h.view(len(h), 1, 3, 2)
        return F.scaled_dot_product_attention(h, h, h).reshape(len(h), 6)


class Widened(nn.Module):
    """Normalises channels over space."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, h):
        return self.norm(torch.stack([h, h.sin(), h * 2], -1)).sum(-1)


def made(seed=0, **options):
    torch.manual_seed(seed)
    return Net(**options).double(), torch.randn(5, 1, dtype=torch.float64)


def each_jacobian(f, x):
    """∂f(x_i)/∂x_i for each sample i, alone in its batch; differentiable by what f holds."""
    return torch.stack([torch.func.jacrev(lambda one: f(one.unsqueeze(0)).squeeze(0))(one) for one in x])


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, materialize_grads=True)


def regularized(model, x, rule, run=None):
    """The regularised loss, its gradient, and the table."""
    with rs.attach(model, rule) as reg:
        loss = reg.loss((run or model)(x).square().mean())
        loss.backward()
        found = [p.grad for p in model.parameters()]
        model.zero_grad()
        return loss.detach(), found, reg.table()


def reference(x, f=lambda m: m, **options):
    """The same by the Jacobian of each sample, of a plain twin."""
    model, _ = made(**options)
    with sdpa_kernel(SDPBackend.MATH):
        loss = model(x).square().mean() + 0.5 * each_jacobian(f(model), x).square().sum() / len(x)
    return loss.detach(), list(gradients(model, loss))


def equal(found, expected):
    """To rounding, and to the width of a difference."""
    torch.testing.assert_close([found[0], *found[1]], [expected[0], *expected[1]], rtol=1e-6, atol=1e-8)
