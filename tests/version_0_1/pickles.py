"""Objects that are pickled: what a process pool, joblib, `torch.save(model)` and users' own files hold."""

import io
import pickle
import re

import torch
from torch import nn

import restrain as rs
from version_0_1 import models, plans
from version_0_1.common import digests, numbers, settled

s = rs.schedules


class Recorder(pickle.Unpickler):
    """Reads a pickle, and notes which names of restrain it asks for."""

    def __init__(self, file):
        super().__init__(file)
        self.names = set()

    def find_class(self, module, name):
        self.names.add(f"{module}.{name}")
        return super().find_class(module, name)


def read(content):
    """What is in a pickle, and the names in restrain that it is pinned to."""
    recorder = Recorder(io.BytesIO(content))
    return recorder.load(), sorted(name for name in recorder.names if name.startswith("restrain"))


PENALTIES = [
    rs.L0(0.5, 0.8),
    rs.L1(),
    rs.L2(),
    rs.MCP(2.0),
    rs.SCAD(0.7, 1.6),
    rs.SLOPE(q=0.2),
    rs.Confidence(),
    rs.Contractive(),
    rs.DecoderL1(),
    rs.Decorrelation(),
    rs.Distance(rs.L1(), to=torch.ones(2)),
    rs.ElasticNet(0.3, 0.2),
    rs.Entropy(),
    rs.ExclusiveLasso("in"),
    rs.FusedLasso(0.5, 0.2),
    rs.GradientPenalty(target=1.0),
    rs.GroupLasso(per="column"),
    rs.GroupLInf(per=1),
    rs.Hoyer(),
    rs.Huber(0.5),
    rs.JacobianNorm(wrt=rs.outputs("0")),
    rs.KLSparsity(0.05, 0.9),
    rs.LogSum(0.4),
    rs.Lp(0.5),
    rs.Norm(float("inf")),
    rs.NormChange(squared=True),
    rs.NuclearNorm(),
    rs.Orthogonality(of="columns"),
    rs.ProductNorm(),
    rs.SoftBox(-0.3, 0.8),
    rs.SparseGroupLasso(0.5, 0.3),
    rs.SpectralNorm(),
    rs.StateChange(per_unit=True),
    rs.Tie("left", "right", rs.Huber(0.2)),
    rs.TotalVariation(0),
    rs.Weighted(rs.Huber(0.1), {"weight": torch.ones(2)}),
]
ALGEBRA = [
    1e-3 * rs.L1(),
    1e-3 * rs.L1() + 1e-4 * rs.L2(),
    2.0 * (0.1 * rs.L1() + rs.GroupLasso()),
    0.5 * rs.Tie("left", "right") + 0.1 * rs.ProductNorm(),
    1e-3 * rs.Contractive(),
    rs.Target(zeros=0.5) * rs.L1(),
    s.WarmUp(5) * rs.L1() + rs.L2(),
]
STRENGTHS = [
    s.Linear(0, 1, steps=5),
    s.Cosine(0, 1, steps=5, begin=2),
    s.Exponential(0.1, 1, steps=5),
    s.WarmUp(5, unit="epoch"),
    s.Steps([1, 2], milestones=[3]),
    s.Function(torch.sqrt),
    1e-3 * s.WarmUp(5) * s.Cosine(1, 0, steps=9),
    rs.Target(norm=2.0),
    rs.Target(active=0.1, above=0.2),
]
TRANSFORMS = [
    rs.AlphaDropout(0.1),
    rs.BlockDropout(0.1, 2),
    rs.Box(-1, 1),
    rs.DropConnect(0.1),
    rs.DropPath(0.1),
    rs.Dropout(0.1, same_over="time"),
    rs.EmbeddingDropout(0.1),
    rs.Fixed([True, False], 0.5),
    rs.GaussianDropout(0.1),
    rs.GaussianNoise(0.1, relative=True),
    rs.GradientNoise(0.1),
    rs.L1Ball(2.0),
    rs.LowRank(2),
    rs.MaxNorm(3.0, per="in"),
    rs.MinMaxNorm(1, 2),
    rs.NM(2, 4),
    rs.NonNegative(),
    rs.NuclearBall(2.0),
    rs.Orthogonal(),
    rs.Signs([1.0, -1.0]),
    rs.Simplex(),
    rs.SpectralBall(1.5),
    rs.SpectralNormalization(3),
    rs.Symmetric(),
    rs.TopK(0.5),
    rs.UniformNoise(0.6),
    rs.UnitNorm("column"),
    rs.WeightNormalization(),
    rs.WeightStandardization(),
]
SELECTIONS = [
    rs.weights,
    rs.biases,
    rs.norms,
    rs.embeddings,
    rs.glob("fc*.weight"),
    (rs.weights | rs.biases) & nn.Linear - rs.glob("2*"),
    rs.L1().on(["0.weight"]).where,
    rs.L1().on(re.compile("^0")).where,
    rs.L1().on(torch.is_tensor).where,
    rs.outputs(),
    rs.inputs("0", index=1, batch_dim=1, calls="sum"),
    rs.outputs(nn.ReLU, via=torch.relu),
    rs.outputs("0", mask="mask") | rs.outputs("1", lengths=1) - rs.inputs("0"),
]


def catalogue():
    return {"penalties": PENALTIES, "algebra": ALGEBRA, "strengths": STRENGTHS, "transforms": TRANSFORMS} | {
        "selections": SELECTIONS
    }


def all_plans():
    return {name: rs.Plan.of(make()) for name, make in plans.FAMILIES.items()}


def declaring():
    """A plain network whose layers declare rules."""
    model = nn.Sequential(
        rs.regularized(nn.Linear(6, 8), weight=1e-2 * rs.L2(), output=1e-2 * rs.L1()),
        rs.regularized(nn.Linear(8, 3), weight=[1e-3 * rs.L1(), rs.MaxNorm(1.0)], input=rs.GaussianNoise(0.1)),
    )
    settled(model)
    return model


def attached():
    """A network as it is while rules of every kind hang on it, and the attachment."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    settled(model)
    plan = [
        1e-2 * rs.L1().on(rs.outputs("3", via=torch.relu), optional=True),
        1e-2 * rs.L2().on(rs.outputs("1") | rs.inputs("2")),
        1e-2 * rs.KLSparsity(0.1, momentum=0.5).on(rs.outputs("1", via=torch.sigmoid), optional=True),
        1e-2 * rs.Contractive().on(rs.outputs("1")),
        rs.WeightNormalization().on("0.weight"),
        rs.DropConnect(0.1).on("2.weight"),
        rs.Dropout(0.1).on(rs.outputs("2")),
        1e-2 * rs.L1().on("4.weight", how="proximal"),
        rs.Target(norm=1.0) * rs.L2().on("4.weight"),
        1e-2 * rs.Distance().on("4.bias"),
    ]
    reg = rs.attach(model, plan, torch.optim.SGD(model.parameters(), lr=0.1))
    return model, reg


def scales():
    x = numbers(30, 4, seed=4)
    return {"standardize": rs.Standardize().fit(x), "robust": rs.RobustScale().fit(x)}


def scaled(found):
    """What they make of some numbers, and of these back."""
    x = numbers(3, 4, seed=5)
    return {name: [one(x).tolist(), one.inverse(x).tolist()] for name, one in found.items()}


def estimators():
    names = ("layers", "rules", "autoencoder", "batch norm", "sequences", "labels of steps")
    return {name: models.MODELS[name]() for name in names}


def trained(model, plan=None):
    """A few steps of a model under the rules that its layers declare, or a plan; nothing that is drawn."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    plan = rs.Plan.of(plan)
    with rs.attach(model, plan, optimizer) as reg:
        model.train()
        for step in range(3):
            x = numbers(8, 6, seed=step).float()
            reg.loss((model(x) - 1).square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
        return {"values": [*reg.values().values()], "weights": digests(model)}
