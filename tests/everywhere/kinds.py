"""The kinds of rules: the rows. Each is a plan for a model that has layers `first`, `act` and `head`."""

from dataclasses import dataclass
from functools import partial

import torch

import restrain as rs

W = "*.weight"


@dataclass(frozen=True)
class Kind:
    """A plan, and what decides how it may be compared."""

    title: str
    make: object  # () -> the rules
    random: bool = False  # draws numbers in the forward: the same only from the same state of the generator
    of_batch: bool = False  # of all samples together: no sum over samples
    at_steps: bool = False  # acts at the optimizer's step
    on_outputs: bool = False  # reads or changes activations

    @property
    def name(self):
        """Short, as it stands in a test's name."""
        return self.title.replace(" ", "-")


def rules(*made):
    return partial(list, made)


PENALTY = 0.1 * rs.L1() + 0.05 * rs.L2()
GROUPS = 0.1 * rs.GroupLasso(per="out")
UNITS = rs.units({"first.weight": "out", "head.weight": "in"})
HIDDEN = rs.outputs("act")
VIEWS = rs.outputs("first") | rs.outputs("act")

KINDS = {
    kind.name: kind
    for kind in (
        Kind("parameter penalty in the loss", rules(PENALTY.on(W), 0.1 * rs.LogSum().on("first.*"))),
        Kind("parameter penalty as gradient", rules(PENALTY.on(W, how="gradient")), at_steps=True),
        Kind("decoupled decay", rules(PENALTY.on(W, how="decoupled")), at_steps=True),
        Kind("cautious decay", rules(PENALTY.on(W, how="decoupled", cautious=True)), at_steps=True),
        Kind("proximal penalty", rules(PENALTY.on(W, how="proximal")), at_steps=True),
        Kind("group penalty in the loss", rules(GROUPS.on(W), 0.1 * rs.GroupLasso(per="in").on("head.weight"))),
        Kind("proximal group penalty", rules(GROUPS.on(W, how="proximal")), at_steps=True),
        Kind("output penalty", rules(0.3 * rs.L1().on(HIDDEN), 0.1 * rs.L2().on(rs.outputs("head"))), on_outputs=True),
        Kind("input penalty", rules(0.3 * rs.L1().on(rs.inputs("head"))), on_outputs=True),
        Kind(
            "statistic of the batch",
            rules(
                0.3 * rs.KLSparsity(0.2).on(rs.outputs("first", via=torch.sigmoid)),
                0.1 * rs.Decorrelation().on(HIDDEN),
                0.3 * rs.LoadBalance(1).on(rs.outputs("head")),
                0.1 * rs.ZLoss().on(rs.outputs("head")),
            ),
            of_batch=True,
            on_outputs=True,
        ),
        Kind("Jacobian penalty", rules(0.3 * rs.Contractive(estimator="exact").on(HIDDEN)), on_outputs=True),
        Kind("noise", rules(rs.GaussianNoise(0.3).on(HIDDEN)), random=True, on_outputs=True),
        Kind("dropout", rules(rs.Dropout(0.4).on(HIDDEN)), random=True, on_outputs=True),
        Kind(
            "projection", rules(rs.MaxNorm(0.5).on("first.weight"), rs.NonNegative().on("head.weight")), at_steps=True
        ),
        Kind(
            "units across tensors",
            rules((0.1 * rs.GroupLasso(per=UNITS)).on(how="proximal"), rs.TopGroups(4, per=UNITS).on()),
            at_steps=True,
        ),
        Kind("norms held", rules(rs.Hyperball().on(W)), at_steps=True),
        Kind("sharpness", rules(rs.MomentumSharpness(0.2).on(W))),
        Kind(
            "embeddings and views",
            rules(
                0.3 * rs.Variance().on(HIDDEN),
                0.1 * rs.Covariance().on(HIDDEN),
                0.1 * rs.SIGReg(directions=16).on(HIDDEN),
                0.3 * rs.Invariance().on(VIEWS),
                0.1 * rs.CrossCorrelation(0.1).on(VIEWS),
            ),
            of_batch=True,
            on_outputs=True,
        ),
        Kind("parametrisation", rules(rs.NonNegative().on("head.weight", how="parametrize"))),
        Kind("weight noise", rules(rs.DropConnect(0.3).on("first.weight")), random=True),
        Kind(
            "target",
            rules(
                rs.Target(zeros=0.3, every=1, start=0.05) * rs.L1().on("first.weight", how="proximal"),
                rs.Target(active=0.3, every=1, start=0.05, above=0.1) * rs.L1().on(HIDDEN),
            ),
            at_steps=True,
            on_outputs=True,
        ),
    )
}

# No rows of the tables, sampled by tests/test_codes_everywhere.py
CODES = {
    kind.name: kind
    for kind in (
        Kind("TopK", rules(rs.TopK(2).on(HIDDEN)), on_outputs=True),
        Kind("BatchTopK", rules(rs.BatchTopK(2, momentum=0.5).on(HIDDEN)), of_batch=True, on_outputs=True),
        Kind(
            "JumpReLU",
            rules(
                rs.JumpReLU(0.3, 0.8).on(rs.outputs("first")),
                0.1 * rs.L0("learned").on(rs.outputs("first"), name="l0"),
            ),
            on_outputs=True,
        ),
    )
}

# What several processes don't do as one does: the oracle's wrong members
APART = {
    kind.name: kind
    for kind in (
        Kind("BatchTopK of each process", rules(rs.BatchTopK(2, momentum=0.5, sync=False).on(HIDDEN)), on_outputs=True),
        Kind(
            "JumpReLU of each process",
            rules(
                rs.JumpReLU(0.3, 0.8, sync=False).on(rs.outputs("first")),
                0.1 * rs.L0("learned").on(rs.outputs("first"), name="l0"),
            ),
            on_outputs=True,
        ),
    )
}

# No row of the tables: what takes the place of a kind that is refused somewhere
PROJECTED = Kind(
    "Jacobian penalty by random projections", rules(0.3 * rs.Contractive(estimator="jvp").on(HIDDEN)), random=True
)
