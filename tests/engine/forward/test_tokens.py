"""Averages over tokens: every token that a mask leaves counts once, whatever the lengths of the sequences."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import restrain as rs
from restrain.errors import CaptureError, PenaltyError, SelectionError

LENGTHS = [5, 3, 1, 4]
MASK = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
OF_TOKENS = {
    "L1": (rs.L1(), lambda h: h.abs().sum(-1)),
    "L2": (rs.L2() + 0.5 * rs.L1(), lambda h: h.square().sum(-1) + 0.5 * h.abs().sum(-1)),
    "Hoyer": (rs.Hoyer(), lambda h: h.abs().sum(-1).square() / h.square().sum(-1)),
    "Entropy": (rs.Entropy(), lambda h: torch.distributions.Categorical(logits=h).entropy()),
    "L0": (rs.L0(0.3, 0.5), lambda h: (h > 0.3).double().sum(-1)),
    "Norm": (rs.Norm(2), lambda h: h.norm(dim=-1)),
    "ZLoss": (rs.ZLoss(), lambda h: h.logsumexp(-1).square()),
    "scheduled": (rs.schedules.Linear(0.5, 0.5, 9) * rs.L1(), lambda h: 0.5 * h.abs().sum(-1)),
}


class Net(nn.Module):
    def __init__(self, reentrant=None):
        super().__init__()
        self.layer, self.reentrant = nn.Linear(4, 6), reentrant

    def forward(self, x, mask=None):
        return self.layer(x) if self.reentrant is None else checkpoint(self.layer, x, use_reentrant=self.reentrant)


def fresh(reentrant=None):
    torch.manual_seed(0)
    return Net(reentrant).double(), torch.randn(4, 5, 4, dtype=torch.float64).requires_grad_()


WAYS = [(None, None), (None, False), (None, True), ("aot_eager", None)]


@pytest.mark.parametrize("name", OF_TOKENS)
@pytest.mark.parametrize(("backend", "reentrant"), WAYS)
@pytest.mark.parametrize("masked", [False, True])
def test_each_token_counts_once(name, backend, reentrant, masked):
    if masked and reentrant:
        pytest.skip("masks are refused in reentrant checkpoints")
    (penalty, of_token), (net, x) = OF_TOKENS[name], fresh(reentrant)
    reg = rs.attach(net, penalty.on(rs.outputs("layer", average="tokens", mask="mask" if masked else None)))
    run = torch.compile(net, backend=backend, fullgraph=True) if backend else net
    loss = reg.loss(0 * run(x, MASK).sum())
    loss.backward()
    torch.compiler.reset()
    twin, x = fresh()
    tokens = twin(x)[MASK] if masked else twin(x).flatten(0, 1)
    wanted = of_token(tokens).mean()
    torch.testing.assert_close(loss.detach(), wanted.detach())
    if name != "L0":  # whose gradient is a ramp's
        wanted.backward()
        torch.testing.assert_close([p.grad for p in net.parameters()], [p.grad for p in twin.parameters()])


def test_it_is_not_the_average_over_sequences():
    net, x = fresh()
    with rs.attach(net, rs.L1().on(rs.outputs("layer", mask="mask"))) as reg:
        of_samples = reg.loss(0 * net(x, MASK).sum())
    with rs.attach(net, rs.L1().on(rs.outputs("layer", mask="mask", average="tokens"))) as reg:
        of_tokens = reg.loss(0 * net(x, MASK).sum())
    torch.testing.assert_close(of_samples * 4 / MASK.sum(), of_tokens)


def test_axes_of_the_batch_do_not_matter_and_packed_sequences_count_their_tokens():
    lstm, x = nn.LSTM(4, 3).double(), torch.randn(5, 4, 4, dtype=torch.float64)
    h = lstm(x)[0]
    with rs.attach(lstm, rs.Hoyer().on(rs.outputs(average="tokens"))) as reg:
        torch.testing.assert_close(reg.loss(0 * lstm(x)[0].sum()), OF_TOKENS["Hoyer"][1](h).mean())
        packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
        out = lstm(packed)[0]
        torch.testing.assert_close(reg.loss(0 * out.data.sum()), OF_TOKENS["Hoyer"][1](out.data).mean())
    lengths = lambda x: torch.tensor(LENGTHS)  # noqa: E731
    with rs.attach(lstm, rs.Hoyer().on(rs.outputs(average="tokens", lengths=lengths))) as reg:
        torch.testing.assert_close(reg.loss(0 * lstm(x)[0].sum()), OF_TOKENS["Hoyer"][1](h[MASK.T]).mean())


def test_no_token_is_zero():
    net, x = fresh()
    with rs.attach(net, (rs.L1() + rs.ZLoss()).on(rs.outputs("layer", mask="mask", average="tokens"))) as reg:
        assert reg.loss(0 * net(x, MASK & False).sum()) == 0


@pytest.mark.parametrize(
    "penalty", [rs.KLSparsity(0.1), rs.StateChange(), rs.Variance(), rs.GroupLasso(1), rs.LoadBalance(1)], ids=repr
)
def test_what_is_no_sum_over_tokens_is_refused(penalty):
    net, _ = fresh()
    with pytest.raises(PenaltyError, match="isn't a sum over tokens"):
        rs.attach(net, (rs.L1() + penalty).on(rs.outputs("layer", average="tokens")))


def test_other_refusals():
    net, x = fresh()
    with pytest.raises(SelectionError, match="'samples' or 'tokens'"):
        rs.outputs("layer", average="token")
    with pytest.raises(PenaltyError, match="reduce='mean' divides"):
        rs.attach(net, rs.L1().on(rs.outputs("layer", average="tokens"), reduce="mean"))
    with (
        rs.attach(net, rs.L1().on(rs.outputs("layer", average="tokens"))),
        pytest.raises(CaptureError, match=r"got an activation of shape \(4, 5, 1, 6\)"),
    ):
        net(x.unsqueeze(2))
    rule = rs.L1().on(rs.outputs("layer", average="tokens"))
    assert repr(rs.Plan.from_dict(rs.Plan.of([rule]).to_dict()).rules[0]) == repr(rule)
