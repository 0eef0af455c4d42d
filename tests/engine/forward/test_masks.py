"""Masks and lengths at places: padded positions add nothing to value and gradient."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import restrain as rs
from restrain.errors import CaptureError, NeverFiredError, PenaltyError, PlanError, SelectionError

LENGTHS = [5, 3, 1, 4]
MASK = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
STATISTICS = [rs.KLSparsity(0.2), rs.Decorrelation()]
OF_SAMPLES = [
    rs.L1() + 0.5 * rs.L2(),
    rs.Norm(2) + rs.Norm(3),
    rs.GroupLasso(1),
    rs.Hoyer(),
    rs.Entropy(),
    rs.Confidence(),
    rs.L0(0.3, 0.5),
    rs.StateChange(),
    rs.StateChange(per_unit=True),
    rs.NormChange(),
    rs.NormChange(squared=True),
]


class Net(nn.Module):
    """A recurrent layer, whose state may be computed in a checkpoint."""

    def __init__(self, reentrant=None, batch_first=True):
        super().__init__()
        self.reentrant, self.batch_first = reentrant, batch_first
        self.embed, self.tanh, self.head = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)

    def block(self, x):
        return self.tanh(self.embed(x))

    def forward(self, x, attention_mask=None, *, lengths=None):
        h = self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.head(h)


@pytest.fixture(autouse=True)
def _nothing_compiled():
    yield
    torch.compiler.reset()  # compiled code makes `attach` warn, in tests to come


def sequences(steps=5):
    return torch.randn(len(LENGTHS), steps, 3, dtype=torch.float64)


def by_hand(penalty, h):
    """The mean over samples without their padding; of a statistic, its value for all that isn't padding."""
    if isinstance(penalty, rs.KLSparsity | rs.Decorrelation):
        return penalty(torch.cat([sample[:n] for sample, n in zip(h, LENGTHS, strict=True)]))
    parts = [penalty.over_batch(sample[None, :n], 0) for sample, n in zip(h, LENGTHS, strict=True)]
    return torch.stack(parts).mean()


@pytest.mark.parametrize("penalty", [*STATISTICS, *OF_SAMPLES], ids=repr)
@pytest.mark.parametrize("dim", [0, 1])
def test_padding_does_not_count(penalty, dim):
    h = torch.rand(4, 5, 3, dtype=torch.float64)
    clean = h.clone().requires_grad_()
    expected = by_hand(penalty, clean)
    expected.backward()
    spoilt = torch.where(MASK[..., None], h, torch.nan).transpose(0, dim).contiguous().requires_grad_()
    if penalty == rs.GroupLasso(1):
        penalty = rs.GroupLasso(1 - dim)
    value = penalty.over_batch(spoilt, dim, MASK[..., None].transpose(0, dim))
    value.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(spoilt.grad.transpose(0, dim), clean.grad)
    assert spoilt.grad.transpose(0, dim)[~MASK].eq(0).all()


WAYS = {
    "position": ({"mask": 1}, lambda net, x: net(x, MASK)),
    "name, by position": ({"mask": "attention_mask"}, lambda net, x: net(x, MASK.long())),
    "name, by keyword": ({"mask": "attention_mask"}, lambda net, x: net(x, attention_mask=MASK.double())),
    "position, by keyword": ({"mask": 1}, lambda net, x: net(x, attention_mask=MASK)),
    "not": ({"mask": "~attention_mask"}, lambda net, x: net(x, ~MASK)),
    "function": ({"mask": lambda x, pad: pad == 0}, lambda net, x: net(x, (~MASK).float() * -1e9)),
    "three axes": ({"mask": "attention_mask"}, lambda net, x: net(x, MASK[..., None])),
    "lengths": ({"lengths": "lengths"}, lambda net, x: net(x, lengths=torch.tensor(LENGTHS))),
    "list of lengths": ({"lengths": "lengths"}, lambda net, x: net(x, lengths=LENGTHS)),
    "lengths of all": ({"lengths": lambda x, lengths: lengths}, lambda net, x: net(x, lengths=LENGTHS)),
}


def expected_gradients(net, x, penalty):
    twin = Net().double()
    twin.load_state_dict(net.state_dict())
    h = twin.block(x)
    value = twin.head(h).square().sum() + by_hand(penalty, h)
    value.backward()
    return value, [p.grad for p in twin.parameters()]


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_say_it(way):
    (options, call), net, x = WAYS[way], Net().double(), sequences()
    penalty = rs.L1() + 0.3 * rs.StateChange()
    expected, gradients = expected_gradients(net, x, penalty)
    with rs.attach(net, penalty.on(rs.outputs("tanh", **options))) as reg:
        for _ in range(2):
            net.zero_grad()
            loss = reg.loss(call(net, x).square().sum())
            loss.backward()
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close([p.grad for p in net.parameters()], gradients)
        net.eval()
        net(x)  # in evaluation nothing is asked for


@pytest.mark.parametrize("penalty", [rs.L1(), rs.NormChange(), rs.KLSparsity(0.2), rs.Entropy()], ids=repr)
def test_the_comparison_notices_padding_that_counts(penalty):
    h = torch.rand(4, 5, 3)
    for mask in (None, (MASK | MASK.flip(0))[..., None]):
        assert abs(float(penalty.over_batch(h, 0, mask) / by_hand(penalty, h)) - 1) > 1e-3


def test_the_models_own_input_and_output_and_a_forward_that_failed():
    net, x = Net().double(), sequences()
    plan = [rs.L2().on(rs.outputs(mask="attention_mask")), rs.L2().on(rs.inputs(mask="attention_mask"))]
    with rs.attach(net, plan) as reg:
        with pytest.raises(RuntimeError):
            net(x[..., :2], ~MASK)
        out = net(x=x, attention_mask=MASK)
        torch.testing.assert_close(reg.penalty(), (out[MASK].square().sum() + x[MASK].square().sum()) / 4)


def test_batches_along_the_second_axis():
    gru, x = nn.GRU(3, 4).double(), sequences().transpose(0, 1).contiguous()

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = gru

        def forward(self, x, mask):
            return self.gru(x)[0]

    model = Tagger()
    for options in ({"mask": "mask"}, {"mask": lambda x, mask: mask.T[..., None]}):
        with rs.attach(model, rs.NormChange().on(rs.outputs("gru", **options))) as reg:
            h = model(x, MASK)
            torch.testing.assert_close(reg.penalty(), by_hand(rs.NormChange(), h.transpose(0, 1)))


@pytest.mark.parametrize("penalty", [*OF_SAMPLES, *STATISTICS], ids=repr)
def test_packed_sequences_are_their_padded_ones_with_a_mask(penalty):
    lstm, x = nn.LSTM(3, 4, batch_first=True).double(), sequences()
    place = rs.outputs(via=torch.sigmoid)
    with rs.attach(lstm, penalty.on(place)) as reg:
        lstm(pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False))
        value = reg.penalty()
    h = lstm(x)[0].sigmoid()
    torch.testing.assert_close(value, by_hand(penalty, h))


def test_the_mean_is_over_entries_that_count():
    net, x = Net().double(), sequences()
    with rs.attach(net, rs.L2().on(rs.outputs("tanh", mask=1), reduce="mean")) as reg:
        net(x, MASK)
        value = reg.penalty()
    torch.testing.assert_close(value, net.block(x)[MASK].square().mean())


LONG, SHORT = {"mask": "attention_mask"}, {"lengths": lambda x, mask: mask.sum(1)}
ENTRIES, UNITS = rs.L1() + rs.NormChange(), rs.KLSparsity(0.3) + rs.Decorrelation()


@pytest.mark.parametrize(
    ("reentrant", "compiled", "penalty", "options"),
    [
        (None, False, UNITS, LONG),
        (False, False, ENTRIES, SHORT),
        (False, False, UNITS, LONG),
        (None, True, UNITS, SHORT),
        (False, True, ENTRIES, LONG),
    ],
    ids=["batch", "checkpointed", "checkpointed batch", "compiled batch", "compiled and checkpointed"],
)
def test_compiled_and_checkpointed(reentrant, compiled, penalty, options):
    net, x = Net(reentrant).double(), sequences().requires_grad_()
    reg = rs.attach(net, penalty.on(rs.outputs("tanh", via=torch.sigmoid, **options)))
    run = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
    for shift in (0, 1, 0):
        net.zero_grad()
        mask = MASK.roll(shift, 0)
        loss = reg.loss(run(x, mask).square().sum())
        loss.backward()
        twin = Net().double()
        twin.load_state_dict(net.state_dict())
        h = twin.block(x)
        order = torch.arange(4).roll(-shift)
        expected = twin.head(h).square().sum() + by_hand_of(penalty, h.sigmoid()[order])
        expected.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close([p.grad for p in net.parameters()], [p.grad for p in twin.parameters()])


def by_hand_of(penalty, h):
    return sum(by_hand(term, h) for term in penalty.terms)


def test_a_checkpoint_is_recomputed_with_the_mask_of_its_own_forward():
    net, x = Net(False).double(), sequences()
    reg = rs.attach(net, rs.L2().on(rs.outputs("tanh", mask=1, calls="sum")))
    other = MASK.flip(0)
    loss = reg.loss(net(x, MASK).square().sum() + net(2 * x, other).square().sum())
    loss.backward()
    twin = Net().double()
    twin.load_state_dict(net.state_dict())
    first, second = twin.block(x), twin.block(2 * x)
    penalty = first[MASK].square().sum() / 4 + second[other].square().sum() / 4
    expected = twin.head(first).square().sum() + twin.head(second).square().sum() + penalty
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close([p.grad for p in net.parameters()], [p.grad for p in twin.parameters()])


def test_a_model_that_is_checkpointed_as_a_whole():
    net, x = Net().double(), sequences()
    expected, gradients = expected_gradients(net, x, rs.L1())
    reg = rs.attach(net, rs.L1().on(rs.outputs("tanh", mask=1)))
    loss = reg.loss(checkpoint(net, x, MASK, use_reentrant=False).square().sum())
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close([p.grad for p in net.parameters()], gradients)


def caught(place, *args, net=None, penalty=None, **kwargs):
    net = Net() if net is None else net
    rs.attach(net, (penalty or rs.L1()).on(place))
    net(*args, **kwargs)


def test_what_does_not_fit_is_refused():
    x = sequences().float()
    with pytest.raises(CaptureError, match="without the argument 'attention_mask'"):
        caught(rs.outputs("tanh", mask="attention_mask"), x)
    with pytest.raises(CaptureError, match="without the argument 'lengths'"):
        caught(rs.outputs("tanh", lengths="lengths"), x, MASK)
    with pytest.raises(CaptureError, match=r"shape \(4, 6\) doesn't fit"):
        caught(rs.outputs("tanh", mask=1), x, torch.ones(4, 6))
    with pytest.raises(CaptureError, match="other numbers"):
        caught(rs.outputs("tanh", mask=1), x, torch.zeros(4, 5).masked_fill(~MASK, -torch.inf))
    with pytest.raises(CaptureError, match="has 5 steps"):
        caught(rs.outputs("tanh", lengths="lengths"), x, lengths=[5, 9, 1, 1])
    with pytest.raises(CaptureError, match="one a sample"):
        caught(rs.outputs("tanh", lengths="lengths"), x, lengths=[5, 9])
    with pytest.raises(CaptureError, match="zero or more, got one of -1"):
        caught(rs.outputs("tanh", lengths="lengths"), x, lengths=[5, -1, 1, 1])
    with pytest.raises(CaptureError, match="mask= gives numbers or booleans, got 'no'"):
        caught(rs.outputs("tanh", mask="attention_mask"), x, "no")
    with pytest.raises(CaptureError, match="use_reentrant=False"):
        caught(rs.outputs("tanh", mask=1), x.requires_grad_(), MASK, net=Net(True))


class Outer(nn.Module):
    """A checkpoint around one."""

    def __init__(self):
        super().__init__()
        self.net = Net(False).double()

    def forward(self, x, mask):
        return checkpoint(self.last, x, mask, use_reentrant=False)

    def last(self, x, mask):
        return self.net(x).sin()


@pytest.mark.parametrize("whole", [False, True])
def test_a_checkpoint_within_a_checkpoint(whole):
    outer, x = Outer(), sequences().requires_grad_()
    reg = rs.attach(outer, rs.L2().on(rs.outputs("net.tanh", mask=1)))
    total = 0
    for mask in (MASK, MASK.flip(0)):
        out = checkpoint(outer, x, mask, use_reentrant=False) if whole else outer(x, mask)
        total = total + reg.loss(out.square().sum())
    total.backward()
    twin = Net().double()
    twin.load_state_dict(outer.net.state_dict())
    h = twin.block(x)
    expected = 2 * twin.head(h).sin().square().sum() + (h[MASK].square().sum() + h[MASK.flip(0)].square().sum()) / 4
    expected.backward()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close([p.grad for p in outer.net.parameters()], [p.grad for p in twin.parameters()])


def test_a_layer_called_alone_does_not_count():
    net, x = Net(), sequences().float()
    reg = rs.attach(net, rs.L1().on(rs.outputs("tanh", mask=1)))
    h = net.block(x)
    with pytest.raises(NeverFiredError):
        reg.penalty()
    net(x, MASK)
    net.block(x)
    torch.testing.assert_close(reg.penalty(), h[MASK].abs().sum() / 4)


def test_what_cannot_be_is_refused_at_once():
    net = Net()
    with pytest.raises(SelectionError, match=r"no argument 'atention_mask'.*near it: 'attention_mask'"):
        rs.attach(net, rs.L1().on(rs.outputs("tanh", mask="atention_mask")))
    with pytest.raises(SelectionError, match="2 arguments, not 2"):
        rs.attach(net, rs.L1().on(rs.outputs("tanh", mask=2)))
    with pytest.raises(SelectionError, match="not both"):
        rs.outputs("tanh", mask=1, lengths="lengths")
    for wrong in (True, 1.5, MASK):
        with pytest.raises(SelectionError, match="name of an argument"):
            rs.inputs("tanh", mask=wrong)
    for what in (rs.Dropout(0.1), rs.GaussianNoise(0.1)):
        with pytest.raises(SelectionError, match="for penalties"):
            rs.attach(net, what.on(rs.outputs("tanh", mask=1)))


class Peak(rs.Penalty, register=False):
    """A user's own, of no known structure."""

    def __call__(self, w):
        return w.abs().max()


class Barrier(rs.Penalty, register=False):
    """Entrywise, but not zero at zero."""

    entrywise = True

    def __call__(self, w):
        return (1 - w).square().sum()


class Cube(rs.Penalty, register=False):
    """Entrywise, with an over_batch of its own that knows no mask."""

    entrywise = True

    def __call__(self, w):
        return w.abs().pow(3).sum()

    def over_batch(self, h, dim=0):
        return 2 * self(h) / h.shape[dim]


def test_users_penalties():
    h = sequences()
    for penalty in (Peak(), Barrier(), rs.L1() + 0.1 * Barrier()):
        with pytest.raises(PenaltyError, match="can't leave padding out"):
            penalty.over_batch(h, 0, MASK[..., None])
        with pytest.raises(PenaltyError, match="can't leave padding out"):
            rs.attach(Net(), penalty.on(rs.outputs("tanh", mask=1)))
    expected = 2 * h[MASK].abs().pow(3).sum() / 4
    torch.testing.assert_close(Cube().over_batch(h, 0, MASK[..., None]), expected)
    net = Net().double()
    with rs.attach(net, Peak().on(rs.outputs("tanh"))) as reg:
        net(h)
        torch.testing.assert_close(reg.penalty(), net.block(h).abs().max() / 4)


def test_plans():
    plan = rs.Plan.of([rs.L1().on(rs.outputs("lstm", mask="~pad")), rs.L2().on(rs.inputs("lstm", lengths=1))])
    data = plan.to_dict()
    assert data["rules"][0]["on"] == {"outputs": "lstm", "mask": "~pad"}
    assert data["rules"][1]["on"] == {"inputs": "lstm", "lengths": 1}
    assert rs.Plan.from_dict(data) == plan
    assert repr(plan.rules[0].where) == "rs.outputs('lstm', mask='~pad')"
    with pytest.raises(PlanError, match="name or position"):
        rs.Plan.of(rs.L1().on(rs.outputs("lstm", mask=lambda x: x))).to_dict()
    net = Net()
    reg = rs.attach(net, rs.L1().on(rs.outputs("tanh", mask=1)))
    assert reg.plan.rules[0].where.mask == 1
