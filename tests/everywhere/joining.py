"""Several attachments on one model, and rules declared at its layers."""

import torch

import restrain as rs
from everywhere.column import column
from everywhere.kinds import HIDDEN, W
from everywhere.training import Run, adam, fresh

GROUP = "Several attachments, declared rules"
MORE = [0.2 * rs.L1().on(HIDDEN), 0.1 * rs.L2().on(W), 0.1 * rs.Huber().on("*", how="gradient")]


class Both:
    """Attachments as one: each adds its own to the loss."""

    def __init__(self, *regs):
        self.regs = regs

    def loss(self, loss):
        for reg in self.regs:
            loss = reg.loss(loss)
        return loss

    def values(self):
        return {(number, key): value for number, reg in enumerate(self.regs) for key, value in reg.values().items()}

    def detach(self):
        for reg in self.regs:
            reg.detach()


def both(first, second):
    model = fresh()
    optimizer = adam(model.parameters())
    torch.manual_seed(5)
    regs = [rs.attach(model, plan, optimizer) for plan in (first, second)]
    return Run(model, optimizer, Both(*regs)).steps().result()


def one(plan):
    model = fresh()
    optimizer = adam(model.parameters())
    torch.manual_seed(5)
    return Run(model, optimizer, rs.attach(model, plan, optimizer)).steps().result()


PARAMETRISED = {"parametrisation": "parametrised.*(Parametrise first|Use how='loss')"}


@column("two attachments that overlap, against one with all rules", GROUP, fast=True, refuses=PARAMETRISED)
def two(kind):
    return both(MORE, kind.make()), one([*MORE, *kind.make()])


NOISE = dict.fromkeys(("noise", "dropout"), "another attachment has noise at 'act'.* put both into one plan")
ORDER = dict.fromkeys(("decoupled-decay", "norms-held"), "another attachment acts on .* Put them into one plan")


@column("the same in the other order", GROUP, fast=True, refuses=ORDER | PARAMETRISED | NOISE)
def two_the_other_way(kind):
    return both(kind.make(), MORE), one([*kind.make(), *MORE])


CLASH = dict.fromkeys(
    (
        "decoupled-decay",
        "cautious-decay",
        "proximal-penalty",
        "proximal-group-penalty",
        "units-across-tensors",
        "target",
        "norms-held",
    ),
    ORDER["decoupled-decay"],
) | {
    "parametrisation": "is parametrised",
    "weight-noise": "another attachment has noise on the weights of 'first'.* put both into one plan",
    "sharpness": "another attachment has noise on the weights of 'first'.* put both into one plan",
}


AGAIN = "another attachment has the same .* so it would (act|be drawn) twice"


@column(
    "the same rules attached twice, against one plan with both",
    GROUP,
    fast=True,
    refuses=CLASH | dict.fromkeys(("parameter-penalty-as-gradient", "noise", "dropout"), AGAIN),
)
def twice(kind):
    found, expected = both(kind.make(), kind.make()), one([*kind.make(), *kind.make()])
    return found, expected


@column("rules declared at layers, and attached twice: they count once", GROUP, fast=True)
def declared(kind):
    """The rules of the kind as a plan, L2 and L1 declared at a layer; a second attachment doesn't see these."""
    model = fresh()
    rs.regularized(model.first, weight=0.3 * rs.L2(), output=0.1 * rs.L1())
    optimizer = adam(model.parameters())
    torch.manual_seed(5)
    first = rs.attach(model, kind.make(), optimizer)
    second = rs.attach(model, 0.1 * rs.L2().on("head.bias"), optimizer)
    found = Run(model, optimizer, Both(first, second)).steps().result()
    own = [0.3 * rs.L2().on("first.weight"), 0.1 * rs.L1().on(rs.outputs("first"))]
    return found, one([*kind.make(), *own, 0.1 * rs.L2().on("head.bias")])
