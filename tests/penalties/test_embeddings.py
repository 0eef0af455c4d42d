"""Distribution of embeddings: directions of SIGReg, masks, and what is refused."""

import numpy as np
import pytest
import torch
from torch import nn

import references as ref
import restrain as rs
from restrain.errors import OptimizerError, PenaltyError
from restrain.penalties.embeddings import directions
from restrain.penalties.statistics import Samples


def test_directions_are_uniform_on_the_sphere_and_new_at_each_step():
    made = torch.stack([directions(3, 4000, 0, torch.tensor(step), torch.float64) for step in range(5)])
    torch.testing.assert_close(made.norm(dim=1), torch.ones(5, 4000, dtype=torch.float64))
    for a in made:
        # means of coordinates have a standard deviation of 1 / √(3 n), second moments of √(4/45 / n)
        assert a.mean(1).abs().max() < 4.5 / (3 * 4000) ** 0.5
        assert (a.square().mean(1) - 1 / 3).abs().max() < 4.5 * (4 / 45 / 4000) ** 0.5
    between = (made[:, None] * made).sum(2).mean(-1)  # of step with step: 1 on the diagonal
    assert (between - torch.eye(5)).abs().max() < 4.5 / (3 * 4000) ** 0.5
    other = directions(3, 4000, 1, torch.tensor(0), torch.float64)
    assert (other * made[1]).sum(0).mean().abs() < 4.5 / (3 * 4000) ** 0.5
    np.testing.assert_allclose(made[2], ref.random_directions(3, 4000, 0, 2), rtol=1e-12, atol=1e-15)


def test_sigreg_knows_a_gaussian():
    xs = torch.randn(100, 256, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = torch.stack([rs.SIGReg()(x) for x in xs])
    # of a normal sample the expectation is ∫ (1 - exp(-t²)) exp(-t²/2) dt = √(2π) (1 - 1/√3)
    expected = (2 * np.pi) ** 0.5 * (1 - 3**-0.5)
    assert (values.mean() - expected).abs() < 4.5 * values.std() / 10
    for wrong in (2 * xs[0], xs[0] + 1, xs[0][:, :1].expand(-1, 6)):
        assert rs.SIGReg()(wrong) > values.mean() + 9 * values.std()


def test_directions_follow_the_steps_and_the_state():
    torch.manual_seed(0)
    net, x = nn.Linear(4, 3).double(), torch.randn(9, 4, dtype=torch.float64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    reg = rs.attach(net, rs.SIGReg(8, seed=5).on(rs.outputs()), optimizer)
    for step in range(3):
        for _ in range(2):  # micro-batches of one step
            loss = reg.loss(0 * net(x).sum())
            wanted = rs.SIGReg(8, seed=5).along(Samples.of(net(x), None, 0, None), torch.tensor(step))
            torch.testing.assert_close(loss, wanted)
            np.testing.assert_allclose(loss.item(), ref.sigreg(8, 5, step)(net(x).detach().numpy()), rtol=1e-11)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    again = rs.attach(nn.Linear(4, 3).double(), rs.SIGReg(8, seed=5).on(rs.outputs()))
    again.load_state_dict(reg.state_dict())
    torch.testing.assert_close(again.state_dict()["kept"], reg.state_dict()["kept"])


@pytest.mark.parametrize(
    "penalty", [rs.SIGReg(), rs.LoadBalance(1, "batch"), rs.KLSparsity(0.1, momentum=0.9)], ids=repr
)
def test_steps_that_nobody_would_count_are_refused(penalty):
    net = nn.Linear(4, 3)
    optimizer = torch.optim.SGD([net.weight.detach().clone().requires_grad_()], lr=0.1)
    with pytest.raises(OptimizerError, match="none would be counted"):
        rs.attach(net, penalty.on(rs.outputs()), optimizer)
    rs.attach(net, rs.LoadBalance(1).on(rs.outputs()), optimizer)


@pytest.mark.parametrize("penalty", [rs.Variance(9.0), rs.Covariance(), rs.SIGReg(16)], ids=repr)
def test_masks_and_axes(penalty):
    h = torch.randn(3, 5, 4, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 2, 0])[:, None]
    torch.testing.assert_close(penalty.over_batch(h, 0), penalty(h.flatten(0, 1)))
    torch.testing.assert_close(
        penalty.over_batch(torch.where(mask[:, :, None], h, torch.nan), 0, mask[:, :, None]), penalty(h[mask])
    )
    assert penalty.over_batch(h, 0, torch.zeros(3, 5, 1, dtype=torch.bool)) == 0
    if not isinstance(penalty, rs.SIGReg):  # a single sample has no variance
        single = torch.zeros(3, 5, 1, dtype=torch.bool)
        single[1, 2] = True
        assert penalty.over_batch(h, 0, single) == 0
    with pytest.raises(PenaltyError, match="all units of a sample together"):
        penalty.over_batch(h, 0, torch.ones(3, 5, 4, dtype=torch.bool))
    images = h.reshape(3, 1, 5, 4).movedim(-1, 1)
    made = type(penalty)(**{**vars(penalty), "per": 1})
    torch.testing.assert_close(made.over_batch(images, 0), penalty(h.flatten(0, 1)))
    with pytest.raises(PenaltyError, match="Write per=1"):
        penalty.over_batch(images, 0)


def test_refusals():
    for penalty in (rs.Variance(), rs.Covariance()):
        with pytest.raises(PenaltyError, match="got a single sample"):
            penalty(torch.ones(1, 3))
    with pytest.raises(PenaltyError, match="real Gaussian"):
        rs.SIGReg()(torch.ones(3, 3, dtype=torch.complex64))
    for make in (
        lambda: rs.Variance(0.0),
        lambda: rs.Variance(eps=0.0),
        lambda: rs.Variance(sync=1),
        lambda: rs.Covariance(per="out"),
        lambda: rs.SIGReg(0),
        lambda: rs.SIGReg(directions=2.0),
        lambda: rs.SIGReg(seed=-1),
        lambda: rs.SIGReg(seed=2**31),
    ):
        with pytest.raises(PenaltyError):
            make()
