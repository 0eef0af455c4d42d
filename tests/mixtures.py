"""Random plans that mix all families, on small models, and their training; for `test_mixtures.py`."""

import copy
import functools
import warnings
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import restrain as rs
from cases import CONSTRAINTS, PENALTIES, REPARAMETRIZATIONS
from restrain.errors import RestrainError, RestrainWarning


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.act, self.head = nn.LSTM(3, 4, batch_first=True), nn.Tanh(), nn.Linear(4, 3)

    def forward(self, x, lengths=None):
        return self.head(self.act(self.lstm(x)[0]))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.act, self.decoder = nn.Linear(5, 5), nn.Sigmoid(), nn.Linear(5, 5)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(self.act(self.encoder(x)))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.head = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), nn.Linear(8, 3)

    def forward(self, x, lengths=None):
        return self.head(self.block(x))


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))


def convolutional():
    layers = nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    return nn.Sequential(*layers)


@dataclass
class Kind:
    """A model, the shape of a batch for it, and names in it."""

    make: object
    shape: tuple
    layers: tuple
    weights: tuple
    pair: tuple
    lengths: bool = False


KINDS = {
    "mlp": Kind(mlp, (8, 4), ("0", "1", "2", "3", "4"), ("0.weight", "2.weight", "4.weight"), ("0.", "2.")),
    "conv": Kind(convolutional, (6, 2, 6, 6), ("0", "1", "2", "4"), ("0.weight", "4.weight"), ("0.", "4.")),
    "lstm": Kind(
        Recurrent,
        (5, 6, 3),
        ("lstm", "act", "head"),
        ("lstm.weight_ih_l0", "lstm.weight_hh_l0", "head.weight"),
        ("weight_ih", "weight_hh"),
        True,
    ),
    "tied": Kind(Tied, (8, 5), ("encoder", "act", "decoder"), ("encoder.weight",), ("encoder", "decoder")),
    "transformer": Kind(
        Transformer,
        (4, 5, 8),
        ("block.self_attn", "block.linear1", "block", "head"),
        ("block.linear1.weight", "block.self_attn.in_proj_weight", "head.weight"),
        ("block.linear1", "head"),
        True,
    ),
}
OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.03, momentum=0.5),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01),
}


# Random rules

members = [case.member for cases in PENALTIES.values() for case in cases]
members += [rs.Distance(), rs.Distance(rs.L1()), rs.Distance(decay=0.5), rs.Weighted(rs.L2(), 0.5)]
constraints = [case.member for cases in CONSTRAINTS.values() for case in cases]
reparametrizations = [case.member for cases in REPARAMETRIZATIONS.values() for case in cases]
noises = [
    rs.GaussianNoise(0.1),
    rs.GaussianNoise(0.1, True),
    rs.UniformNoise(0.2),
    rs.Dropout(0.3),
    rs.Dropout(0.3, "time"),
    rs.Dropout(0.3, "space"),
    rs.GaussianDropout(0.2),
    rs.AlphaDropout(0.2),
    rs.DropPath(0.2),
    rs.BlockDropout(0.2, 2),
]
derivatives = [
    rs.Contractive(),
    rs.Contractive(estimator="exact"),
    rs.Contractive(estimator="vjp"),
    rs.Contractive(estimator="jvp", projections=2),
    rs.Contractive(estimator="difference"),
    rs.GradientPenalty(of="loss"),
    rs.GradientPenalty(target=1.0),
    rs.GradientPenalty(of="loss", estimator="exact"),
    rs.JacobianNorm(),
]
numbers = st.sampled_from([0.0, 1e-3, 1e-2, 0.1])
schedules = st.sampled_from(
    [
        rs.schedules.Linear(0, 0.1, steps=3),
        rs.schedules.Cosine(0.1, 0, steps=3, begin=1),
        rs.schedules.Exponential(1e-3, 0.1, steps=4),
        0.1 * rs.schedules.WarmUp(2),
        rs.schedules.Steps([0.1, 0.0, 0.2], milestones=[1, 3]),
        rs.Target(norm=0.5, start=0.01, every=1),
        rs.Target(gradient_share=0.3, start=0.01, every=2),
    ]
)
zeros = st.sampled_from([rs.Target(zeros=0.5, start=0.01, every=1)])
active = st.sampled_from([rs.Target(active=0.3, start=0.01, every=1, above=0.1)])
timing = st.fixed_dictionaries({}, optional={"every": st.sampled_from([1, 2, 3]), "start": st.sampled_from([0, 1, 2])})


def of_parameters(kind):
    """Places among the parameters."""
    some = st.sampled_from([*kind.weights, "*", rs.weights, rs.biases, nn.Linear, rs.weights - kind.weights[0]])
    return st.one_of(st.sampled_from(kind.weights), some)


def places(kind, padded=False):
    """Places among the activations; with lengths where the model has them."""
    extra = {"lengths": st.sampled_from([None, "lengths"])} if padded and kind.lengths else {}
    options = st.fixed_dictionaries(
        extra, optional={"via": st.sampled_from([torch.sigmoid, torch.relu])} if padded else {}
    )
    return st.builds(
        lambda make, name, more: make(name, **more) if name else make(**more),
        st.sampled_from([rs.outputs, rs.outputs, rs.inputs]),
        st.sampled_from([*kind.layers, None]),
        options,
    )


# of entries in [0, 1], of several rows
OF_OUTPUTS = rs.KLSparsity | rs.LoadBalance | rs.Variance | rs.Covariance


@st.composite
def penalty_rule(draw, kind):
    strength, how = (
        draw(st.one_of(numbers, schedules)),
        draw(st.sampled_from(["loss", "gradient", "decoupled", "proximal"])),
    )
    if how == "proximal":
        strength = draw(st.one_of(numbers, schedules, zeros))
    what = draw(st.sampled_from([m for m in members if not isinstance(m, OF_OUTPUTS)]))
    return (strength * what).on(draw(of_parameters(kind)), how=how, **draw(timing))


@st.composite
def output_rule(draw, kind):
    strength = draw(st.one_of(numbers, schedules, active))
    return (strength * draw(st.sampled_from(members))).on(draw(places(kind, padded=True)), **draw(timing))


@st.composite
def derivative_rule(draw, kind):
    what = draw(numbers) * draw(st.sampled_from(derivatives))
    of_loss = what.leaf.of_loss or isinstance(what.leaf, rs.JacobianNorm)
    return what.on(*[] if of_loss else [draw(places(kind))], **draw(timing))


@st.composite
def network_rule(draw, kind):
    what = draw(st.sampled_from([rs.Tie(*kind.pair), rs.ProductNorm(*kind.pair)]))
    return (draw(st.one_of(numbers, schedules)) * what).on("*weight*", **draw(timing))


@st.composite
def constraint_rule(draw, kind):
    how = draw(st.sampled_from(["project", "project", "parametrize"]))
    options = draw(timing) if how == "project" else {}
    return draw(st.sampled_from(constraints)).on(draw(of_parameters(kind)), how=how, **options)


@st.composite
def weight_rule(draw, kind):
    noise = st.sampled_from(
        [rs.DropConnect(0.2), rs.GaussianNoise(0.05), rs.GradientNoise(0.1), rs.GradientNoise(0.1, 0)]
    )
    what = draw(st.one_of(noise, st.sampled_from(reparametrizations)))
    return what.on(draw(st.sampled_from([*kind.weights, rs.weights])))


@st.composite
def noise_rule(draw, kind):
    return draw(st.sampled_from(noises)).on(draw(places(kind)))


FAMILIES = [
    penalty_rule,
    penalty_rule,
    output_rule,
    derivative_rule,
    network_rule,
    constraint_rule,
    weight_rule,
    noise_rule,
]


@st.composite
def rules_of(draw, kind):
    """A rule of any family, or None where ours refuses it."""
    try:
        return draw(draw(st.sampled_from(FAMILIES))(kind))
    except RestrainError:
        return None


@st.composite
def problems(draw):
    """A name of a model, one of an optimizer, and a plan of at most six rules that can be attached to them."""
    name, optimizer = draw(st.sampled_from(sorted(KINDS))), draw(st.sampled_from(sorted(OPTIMIZERS)))
    drawn = draw(st.lists(rules_of(KINDS[name]), min_size=3, max_size=6))
    return name, optimizer, [rule for rule in drawn if rule is not None]


# Training


@dataclass
class Run:
    """A model in training, with what is attached to it."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    regs: list = field(default_factory=list)
    call: object = None
    losses: list = field(default_factory=list)
    parts: int = 1  # micro-batches
    clip: object = None  # called with the parameters before the optimizer's step

    def step(self, number):
        torch.manual_seed(100 + number)
        self.optimizer.zero_grad()
        self.losses.append(0.0)
        x, y = batch(self.name, number)
        lengths = torch.arange(len(x)) % x.shape[1] + 1
        for part in zip(*(tensor.chunk(self.parts) for tensor in (x, y, lengths)), strict=True):
            self.backward(*part)
        if self.clip is not None:
            self.clip([p for p in self.model.parameters() if p.grad is not None])
        self.optimizer.step()

    def backward(self, x, y, lengths):
        given = {"lengths": lengths} if KINDS[self.name].lengths else {}
        loss = F.mse_loss((self.model if self.call is None else self.call)(x, **given), y)
        for reg in self.regs:
            loss = reg.loss(loss)
        loss = loss / self.parts
        loss.backward()
        self.losses[-1] += loss.item()

    def weights(self):
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def detach(self):
        for reg in reversed(self.regs):
            reg.detach()


def batch(name, number=0):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(KINDS[name].shape, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        shape = fresh(name)(x).shape
    return x, torch.randn(shape, dtype=torch.float64, generator=generator)


@functools.cache
def _made(name):
    torch.manual_seed(7)
    return KINDS[name].make().double()


def fresh(name):
    """A new model, always with the same weights."""
    return copy.deepcopy(_made(name))


def begin(name, optimizer, *plans, prepare=None):
    """A fresh model with these plans attached; `prepare` is called with it before."""
    model = fresh(name)
    if prepare is not None:
        prepare(model)
    run = Run(name, model, OPTIMIZERS[optimizer](model.parameters()))
    torch.manual_seed(5)
    for plan in plans:
        reg = rs.attach(model, plan, run.optimizer)
        run.regs.append(reg)
        if learned := list(reg.parameters()):
            run.optimizer.add_param_group({"params": learned})
    return run


def trained(name, optimizer, *plans, steps=4):
    """A run after some steps."""
    run = begin(name, optimizer, *plans)
    for number in range(steps):
        run.step(number)
    return run


def traces(model, optimizer):
    """All that could stay behind at a model and its optimizer."""
    hooks = [
        (name, key, len(value))
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if "hooks" in key and value is not None and "with_kwargs" not in key and "always" not in key
    ]
    of_optimizer = [(key, len(value)) for key, value in vars(optimizer).items() if "hooks" in key]
    kept = [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]
    return hooks, of_optimizer, kept, list(model.state_dict()), [id(p) for p in model.parameters()]


def quiet(function):
    """Without our warnings: a plan drawn by chance has much that is likely not meant."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RestrainWarning)
            return function(*args, **kwargs)

    return run
