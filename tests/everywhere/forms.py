"""The forms that models come in: outputs that aren't tensors, recurrent layers, embeddings, parametrised layers."""

import json
from collections import namedtuple
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import restrain as rs
from everywhere.column import column
from everywhere.training import Net, Run, Several, attached, batch, fresh, plain

GROUP = "Forms of models"


def renamed(kind, **names):
    """The kind for a model with other names: {name: new} of parameters and layers, with _ for the dot."""

    def make():
        text = json.dumps(rs.Plan.of(kind.make()).to_dict())
        for name, new in names.items():
            text = text.replace(f'"{name.replace("_", ".")}"', json.dumps(new))
        return list(rs.Plan.from_dict(json.loads(text)))

    return replace(kind, make=make)


# Structures: each layer takes and gives one


@dataclass
class Given:
    h: torch.Tensor
    count: int = 1


Pair = namedtuple("Pair", ["count", "h"])
FORMS = {
    "a tuple": (lambda h: (1, (h, None)), lambda made: made[1][0]),
    "a named tuple": (lambda h: Pair(1, h), lambda made: made.h),
    "a dict": (lambda h: {"count": 1, "h": h}, lambda made: made["h"]),
    "a dataclass": (Given, lambda made: made.h),
}


def structured(form):
    wrap, unwrap = FORMS[form]

    class Linear(nn.Linear):
        def forward(self, given):
            return wrap(super().forward(given if isinstance(given, torch.Tensor) else unwrap(given)))

    class Tanh(nn.Tanh):
        def forward(self, given):
            return wrap(super().forward(unwrap(given)))

    class Structured(Net):
        def __init__(self):
            nn.Module.__init__(self)
            self.first, self.act, self.head = Linear(4, 6), Tanh(), Linear(6, 3)

    def run(kind):
        model = fresh(Structured)
        assert isinstance(model(batch(0)[0]), type(wrap(torch.zeros(1))))
        return attached(kind, model, call=lambda x: unwrap(model(x))).steps().result(), plain(kind)

    run.__name__ = form.replace(" ", "_")
    column(f"each layer gives {form}, and takes one", GROUP, fast=True)(run)


for form in FORMS:
    structured(form)


# Packed sequences


class Recurrent(nn.Module):
    """An LSTM, and two layers on its packed outputs; the last step of each sequence counts."""

    packed = True

    def __init__(self):
        super().__init__()
        self.first, self.act, self.head = nn.LSTM(4, 6), OfPacked(nn.Tanh()), OfPacked(nn.Linear(6, 3))

    def forward(self, x):
        steps = torch.stack([x, 2 * x, -x])
        if self.packed:
            steps = pack_padded_sequence(steps, [3] * len(x))
        out = self.head(self.act(self.first(steps)[0]))
        assert isinstance(out, PackedSequence) == self.packed
        return out.data[-len(x) :] if self.packed else out[-1]


class Dense(Recurrent):
    packed = False


class OfPacked(nn.Module):
    """A layer of each row of a packed sequence, or of a tensor."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    @property
    def weight(self):
        return self.layer.weight

    batch_first = False

    def forward(self, given):
        return given._replace(data=self.layer(given.data)) if isinstance(given, PackedSequence) else self.layer(given)


ALIKE = {
    "Jacobian-penalty": "packed sequence can't be told apart, .* use estimator='vjp'",
    "units-across-tensors": "different numbers of units: 'first.weight_ih_l0' 24, 'head.layer.weight' 6",
}


@column("packed sequences: an LSTM as `first`", GROUP, fast=True, refuses=ALIKE)
def packed(kind):
    """Compared with the dense tensors of sequences of equal lengths; unequal ones are in `test_padding`."""
    kind = renamed(kind, first_weight="first.weight_ih_l0", head_weight="head.layer.weight")
    return attached(kind, fresh(Recurrent)).steps().result(), plain(kind, Dense)


# Embeddings with sparse gradients


class Tokens(nn.Module):
    """Means of embeddings; token ids are made of the samples."""

    sparse = True

    def __init__(self):
        super().__init__()
        self.first, self.act = nn.Embedding(10, 6, sparse=self.sparse), nn.Tanh()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        ids = (x.abs() * 4).long().clamp(max=9)
        return self.head(self.act(self.first(ids)).mean(1))


class DenseTokens(Tokens):
    sparse = False


@dataclass
class Sparse(Run):
    """Sees that the gradient is sparse, where no rule makes it dense."""

    dense: bool = False

    def backward(self, step):
        super().backward(step)
        assert self.model.first.weight.grad.is_sparse == (not self.dense)


SGD = partial(torch.optim.SGD, lr=0.3)
DENSE = "'first.weight' has sparse gradients .* needs dense ones: use how='loss'"
AT_STEP = (
    "parameter-penalty-as-gradient",
    "decoupled-decay",
    "cautious-decay",
    "proximal-penalty",
    "proximal-group-penalty",
    "units-across-tensors",
    "target",
)
NEED_DENSE = dict.fromkeys(AT_STEP, DENSE) | {
    "norms-held": "has got a sparse gradient.* make the layer with sparse=False",
    "sharpness": "'first.weight' has sparse gradients .* make the layer with sparse=False",
    "weight-noise": "'first.weight' has sparse gradients .* make the layer with sparse=False",
    "Jacobian-penalty": "doesn't depend on the place of wrt=",  # no derivative by token ids
}


@column("an embedding with sparse gradients as `first`, SGD", GROUP, fast=True, refuses=NEED_DENSE)
def sparse_sgd(kind):
    dense = kind.name in ("parameter-penalty-in-the-loss", "group-penalty-in-the-loss")
    run = Sparse(**vars(attached(kind, fresh(Tokens), SGD)), dense=dense)
    return run.steps().result(), plain(kind, DenseTokens, SGD)


def both(parameters, first):
    """One optimizer for the embedding, Adam for the rest."""
    one, *rest = parameters
    return Several([first([one], lr=0.05), torch.optim.Adam(rest, lr=0.05)])


class LazilyMoved(torch.optim.Optimizer):
    """SparseAdam written out, for a dense gradient: entries of rows without a gradient stay."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            m, v, t = self.state[p].setdefault("all", [torch.zeros_like(p), torch.zeros_like(p), 0])
            t += 1
            used = p.grad.abs().sum(1) > 0
            m[used] = 0.9 * m[used] + 0.1 * p.grad[used]
            v[used] = 0.999 * v[used] + 0.001 * p.grad[used] ** 2
            length = 0.05 * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
            p[used] -= length * m[used] / (v[used].sqrt() + 1e-8)
            self.state[p]["all"][2] = t


LOSS_IS_DENSE = "SparseAdam takes sparse gradients; how='loss' makes them dense: use Adam"
NO_DENSE = dict.fromkeys(("parameter-penalty-in-the-loss", "group-penalty-in-the-loss"), LOSS_IS_DENSE)


NO_DENSE["norms-held"] = "SparseAdam has no direction of its own"


@column("the same with SparseAdam", GROUP, fast=True, refuses=NEED_DENSE | NO_DENSE)
def sparse_adam_alone(kind):
    run = Sparse(**vars(attached(kind, fresh(Tokens), partial(both, first=torch.optim.SparseAdam))))
    rules = [replace(rule, metric="euclidean") if rule.how == "project" else rule for rule in kind.make()]
    return run.steps().result(), plain(replace(kind, make=lambda: rules), DenseTokens, partial(both, first=LazilyMoved))


# Parametrised, lazy, in containers


class ByHand(nn.Linear):
    """A layer whose weight is computed in its forward, from parameters in torch's order."""

    def __init__(self, like):
        super().__init__(like.in_features, like.out_features)
        del self.weight
        stored = like.parametrizations.weight
        self.bias = nn.Parameter(like.bias.detach().clone())
        for name in ("original", "original0", "original1"):
            if hasattr(stored, name):
                self.register_parameter(name, nn.Parameter(getattr(stored, name).detach().clone()))
        self.base = getattr(stored[0], "base", None)

    @property
    def effective(self):
        if hasattr(self, "original0"):
            return torch._weight_norm(self.original1, self.original0, 0)
        return self.base @ torch.linalg.matrix_exp(self.original.tril(-1) - self.original.tril(-1).T)

    def forward(self, x):
        return F.linear(x, self.effective, self.bias)


class Written(Run):
    """The penalties on the effective weight are added by hand."""

    def loss(self, x, y):
        w, added = self.model.first.effective, 0.0
        if self.name == "parameter-penalty-in-the-loss":
            added = 0.1 * w.abs().sum() + 0.05 * w.square().sum() + 0.1 * w.abs().log1p().sum()
        if self.name == "group-penalty-in-the-loss":
            added = 0.1 * rs.GroupLasso(per="out")(w)
        return super().loss(x, y) + added


def parametrised(kind, parametrise, size=4):
    class Parametrised(Net):
        def __init__(self):
            super().__init__()
            if size == 6:
                self.first = nn.Linear(6, 6)
            parametrise(self.first)

        def block(self, x):
            return super().block(x if size == 4 else torch.cat([x, x[:, :2]], 1))

    found = attached(kind, fresh(Parametrised)).steps().result()
    model = fresh(Parametrised)
    model.first = ByHand(model.first).double()
    run = Written(**vars(attached(renamed(kind, **{"first.*": "first.bias"}), model)))
    run.name = kind.name
    expected = run.steps().result()
    weights = sorted(found["weights"], key=torch.Tensor.numel), sorted(expected["weights"], key=torch.Tensor.numel)
    return [weights[0], found["losses"]], [weights[1], expected["losses"]]


COMPUTED = "'first.weight' is parametrised: it is computed anew at each use"
ON_STORED = (*AT_STEP, "projection", "norms-held", "weight-noise", "sharpness")
AT_FIRST = dict.fromkeys(ON_STORED, COMPUTED)


@column("`weight_norm` on `first`, before attach", GROUP, fast=True, refuses=AT_FIRST)
def weight_normalised(kind):
    return parametrised(kind, parametrizations.weight_norm)


@column("`orthogonal` on `first`, before attach", GROUP, fast=True, refuses=AT_FIRST)
def orthogonal(kind):
    def parametrise(layer):
        parametrizations.orthogonal(layer, orthogonal_map="matrix_exp")

    return parametrised(kind, parametrise, size=6)


class Lazy(Net):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.LazyLinear(6), nn.LazyLinear(3)


def lazy(kind, before):
    model = fresh(Lazy)
    run = attached(kind, model) if before else None
    assert isinstance(model.first, nn.LazyLinear)
    with torch.no_grad():
        model(batch(0)[0])
    model.load_state_dict(fresh().state_dict())
    return (run or attached(kind, model)).steps().result(), plain(kind)


@column("lazy layers, attached after the first forward", GROUP, fast=True)
def lazy_after(kind):
    return lazy(kind, before=False)


NO_SHAPE = "has no shape yet .*run one forward before attaching"
SHAPELESS = dict.fromkeys((*ON_STORED, "group-penalty-in-the-loss", "parametrisation"), NO_SHAPE)


@column("lazy layers, attached before the first forward", GROUP, fast=True, refuses=SHAPELESS)
def lazy_before(kind):
    return lazy(kind, before=True)


class Listed(nn.Module):
    """The layers are members of containers."""

    def __init__(self):
        super().__init__()
        net = Net()
        self.parts = nn.ModuleDict({"body": nn.ModuleList([net.first, net.act]), "head": net.head})

    def forward(self, x):
        for part in self.parts["body"]:
            x = part(x)
        return self.parts["head"](x)


@column("layers in a `ModuleList` in a `ModuleDict`", GROUP, fast=True)
def containers(kind):
    names = {"first": "parts.body.0", "act": "parts.body.1", "head": "parts.head"}
    names |= {f"{name}.weight": f"{names[name]}.weight" for name in ("first", "head")}
    return attached(renamed(kind, **names, **{"first.*": "parts.body.0.*"}), fresh(Listed)).steps().result(), plain(
        kind
    )
