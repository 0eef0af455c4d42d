"""A plan of each family of rules, the model that it is for, and what it does to that in five steps."""

import re

import torch
from torch import nn

import restrain as rs
from version_0_1.common import Dense, Parallel, Tagger, digests, numbers

s = rs.schedules


def entrywise():
    return [
        1e-2 * rs.L1().on("0.weight"),
        1e-2 * rs.L2().on("*.bias", how="gradient", reduce="mean"),
        3e-2 * rs.L1().on("0.weight", how="proximal", name="zeros"),
        1e-2 * rs.L2().on("2.weight", how="decoupled", every=2, start=1),
        (0.1 * rs.L1() + 1e-2 * rs.L2()).on("4.weight", name="a sum"),
        2.0 * (0.1 * rs.Huber(0.3) + 0.2 * rs.LogSum(0.4)).on("2.weight"),
        rs.ElasticNet(1e-3, 1e-2).on("2.weight", how="proximal"),
        0.1 * rs.MCP(2.5).on("2.bias"),
        0.1 * rs.SCAD(0.7, 1.6).on("0.bias"),
        0.1 * rs.Lp(0.5).on("4.weight"),
        0.1 * rs.SoftBox(-0.3, 0.4).on(rs.weights),
        rs.L1().on("missing*", optional=True),
    ]


def groups():
    return [
        0.3 * rs.GroupLasso("in").on("0.weight", how="proximal"),
        0.1 * rs.GroupLasso(per="row").on("2.weight"),
        0.1 * rs.GroupLInf(per=1).on("2.weight", how="gradient"),
        0.1 * rs.ExclusiveLasso("column").on("4.weight"),
        0.1 * rs.Norm(2).on("0.bias"),
        0.1 * rs.Norm(float("inf")).on("2.bias"),
        0.1 * rs.SparseGroupLasso(0.5, 0.3, per="in").on("4.weight", how="proximal"),
        0.1 * rs.SLOPE(q=0.2).on("0.weight"),
        0.1 * rs.SLOPE(weights=(3.0, 2.0, 1.0)).on("4.bias"),
        0.1 * rs.TotalVariation(0).on("2.weight"),
    ]


def matrices():
    return [
        0.2 * rs.NuclearNorm().on("0.weight", how="proximal"),
        0.1 * rs.SpectralNorm(rows="in").on("2.weight"),
        0.1 * rs.Orthogonality(of="columns", off_diagonal=True).on("2.weight"),
        0.1 * rs.Orthogonality(normalized=True, power=1).on("4.weight"),
        0.1 * rs.FusedLasso(0.5, 0.2, dim=-1).on("4.weight", how="proximal"),
    ]


def relations():
    return [
        0.1 * rs.Tie("layers.0", "layers.1", transposed=True).on(["layers.0.weight", "layers.1.weight"]),
        0.1 * rs.Tie("layers.2", "layers.3", rs.Huber(0.2)).on("layers.[23].*"),
        0.1 * rs.ProductNorm().on("lora_*"),
        0.5 * rs.Distance(rs.L1()).on("layers.4.*", how="proximal"),
        0.1 * rs.Distance(rs.GroupLasso("in"), decay=0.9).on("layers.5.weight"),
        0.1 * rs.Distance(to=[0.1, 0.2, 0.3, 0.4]).on("layers.6.bias"),
        0.1 * rs.Distance(rs.L2(), to="reference.pt").on("layers.7.*"),
        0.1 * rs.Weighted(rs.L1(), [[1.0, 0.0, 2.0, 0.5]]).on("layers.8.weight", how="proximal"),
        0.1 * rs.Weighted(rs.Huber(0.1), "reference.safetensors").on("layers.7.weight"),
        0.1 * rs.Distance(rs.Weighted(rs.L2(), [2.0, 1.0, 0.0, 0.0])).on("layers.9.bias"),
    ]


def activations():
    return [
        1e-2 * rs.L1().on(rs.outputs(nn.ReLU), name="code"),
        0.1 * rs.KLSparsity(0.05, momentum=0.9).on(rs.outputs("1")),
        0.1 * rs.KLSparsity(0.3, per=-1).on(rs.outputs("1")),
        0.1 * rs.Decorrelation(sync=False).on(rs.outputs("1")),
        0.1 * rs.Hoyer().on(rs.outputs("2")),
        0.1 * rs.Confidence().on(rs.outputs()),
        0.1 * rs.L0(0.1, 0.8).on(rs.outputs("3")),
        0.1 * rs.DecoderL1("4.weight").on(rs.outputs("3")),
        0.1 * rs.L2().on(rs.inputs("4") | rs.outputs("2"), reduce="mean"),
        0.1 * rs.GroupLasso(per=1).on(rs.outputs("0", calls="sum")),
    ]


def sequences():
    return [
        0.1 * rs.StateChange().on(rs.outputs("gru", index=0, mask="mask")),
        0.1 * rs.StateChange(per_unit=True, time=1).on(rs.outputs("norm", lengths="lengths")),
        0.1 * rs.NormChange(squared=True).on(rs.outputs("gru", mask="mask")),
        0.1 * rs.L2().on(rs.outputs("gru", index=0, batch_dim=0, mask=1)),
        0.1 * rs.L1().on(rs.outputs("conv")),
        0.1 * rs.L1().on(rs.outputs("conv", via=torch.relu)),
        0.1 * rs.Confidence(per=-1).on(rs.outputs("head", mask="mask")),
        0.1 * rs.L1().on(rs.embeddings),
        0.1 * rs.L2().on(rs.norms | rs.glob("gru*") | rs.biases),
    ]


def derivatives():
    return [
        1e-2 * rs.Contractive(estimator="exact").on(rs.outputs("1"), name="code"),
        1e-2 * rs.JacobianNorm(wrt=rs.outputs("1"), estimator="exact").on(rs.outputs("2")),
        1e-2 * rs.JacobianNorm(of=rs.outputs("4"), wrt=rs.inputs("2") | rs.outputs("0"), estimator="exact").on(),
        1e-2 * rs.GradientPenalty(target=1.0).on(every=2),
        1e-2 * rs.GradientPenalty(of="loss").on(),
    ]


def noise():
    return [
        rs.GaussianNoise(0.1).on(rs.outputs("embedding")),
        rs.GaussianNoise(0.2, relative=True).on(rs.outputs("conv")),
        rs.UniformNoise(0.6).on(rs.inputs("norm")),
        rs.Dropout(0.2, same_over="time").on(rs.outputs("norm")),
        rs.Dropout(0.2, same_over=(1,)).on(rs.outputs("gru", index=0)),
        rs.GaussianDropout(0.1).on(rs.inputs("head")),
        rs.AlphaDropout(0.1).on(rs.outputs("head")),
        rs.DropPath(0.1).on(rs.inputs("gru")),
        rs.BlockDropout(0.1, size=2).on(rs.inputs("conv")),
        rs.EmbeddingDropout(0.1).on(rs.outputs("embedding")),
        rs.GradientNoise(1e-3, decay=0.55).on(rs.weights),
        rs.GaussianNoise(0.01).on("head.weight"),
        rs.DropConnect(0.1).on("conv.weight"),
    ]


def constraints():
    made = [rs.NonNegative(), rs.Box(-0.2, 0.3), rs.Box(high=0.1), rs.Signs(-1), rs.Signs([[1.0, -1.0, 0.0, 1.0]])]
    made += [rs.Fixed(True, 0.25), rs.Fixed([True, False, False, True]), rs.MaxNorm(0.4), rs.UnitNorm("column")]
    made += [rs.MinMaxNorm(0.3, 0.6, per="in"), rs.Simplex(per="out"), rs.Simplex(2.5), rs.L1Ball(3.0), rs.Orthogonal()]
    made += [rs.SpectralBall(0.5), rs.NuclearBall(1.0), rs.LowRank(2), rs.Symmetric(), rs.TopK(0.5, per="row")]
    made += [rs.NM(1, 2)]
    rules = [constraint.on(f"layers.{index}.weight") for index, constraint in enumerate(made)]
    return [*rules, rs.MaxNorm(0.3).on("lora_A.weight", momentum="tangent", every=2, start=1)]


def parametrize():
    made = [rs.UnitNorm("out"), rs.NonNegative(), rs.WeightNormalization(), rs.WeightNormalization("column")]
    made += [rs.WeightStandardization(eps=0.1), rs.WeightStandardization("in", gain=True), rs.Symmetric()]
    made += [rs.SpectralNormalization(3, rows="in")]
    how = {rs.UnitNorm: "parametrize", rs.NonNegative: "parametrize", rs.Symmetric: "parametrize"}
    rules = [one.on(f"layers.{index}.weight", how=how.get(type(one))) for index, one in enumerate(made)]
    return [*rules, 1e-2 * rs.L2().on("layers.2.weight")]


def nulls():
    """Settings of None where the default is another: TOML has no null, so version 0.1 can't write these there."""
    return [rs.SpectralNormalization(None).on("layers.0.weight"), rs.MaxNorm(0.7, per=None).on("layers.1.weight")]


def schedules():
    strengths = [
        s.Linear(0, 1e-1, steps=4, begin=1),
        s.Cosine(1e-1, 1e-2, steps=4),
        s.Exponential(1e-3, 1e-1, steps=4),
        1e-1 * s.WarmUp(3),
        s.Steps([1e-1, 1e-2, 1e-3], milestones=[2, 4]),
        1e-1 * s.WarmUp(2) * s.Cosine(1, 0, steps=4, begin=2),
        s.Linear(0, 1e-1, steps=2, unit="epoch"),
    ]
    rules = [strength * rs.L2().on("0.weight", name=f"{index}") for index, strength in enumerate(strengths)]
    return [*rules, (s.WarmUp(5) * rs.L1() + 1e-2 * rs.L2()).on("4.weight", how="proximal")]


def targets():
    share = rs.Target(gradient_share=0.2, start=1e-3, every=2, low=1e-6, high=10.0, smoothing=0.4, gain=0.2)
    return [
        rs.Target(zeros=0.5, start=1e-2, every=2) * rs.L1().on("0.weight", how="proximal"),
        rs.Target(norm=2.0, start=1e-2, every=1, damping=0.5) * rs.L2().on("2.weight"),
        1e-1 * s.WarmUp(2) * rs.Target(active=0.1, above=0.2, every=2) * rs.L1().on(rs.outputs("3")),
        share * rs.L2().on("4.weight"),
    ]


def selections():
    where = [
        ["2.weight", "4.bias"],
        rs.weights,
        rs.biases,
        nn.Linear | nn.Conv1d,
        re.compile(r"[02]\.w"),
        rs.weights & nn.Linear,
        rs.weights - "0.*" - re.compile("4"),
        (rs.weights | rs.biases) & (rs.glob("[024]*") - "2.bias"),
    ]
    places = [
        rs.outputs(["0", "2"]),
        rs.outputs(re.compile("^[02]$")),
        rs.outputs(rs.glob("?") - "4"),
        rs.outputs("0") | rs.inputs("2") | rs.outputs("2", via=torch.tanh, calls="sum"),
        rs.outputs("[0-3]") & rs.outputs("[12]"),
        rs.outputs(nn.Linear) - rs.outputs("4"),
        rs.inputs(),
    ]
    rules = [1e-3 * rs.L2().on(on, optional=True) for on in where[:3]]
    return [*rules, *[1e-3 * rs.L2().on(on) for on in (*where[3:], *places)]]


OF_NUMBERS = [entrywise, groups, matrices, activations, derivatives, schedules, targets, selections]
OF_WEIGHTS = [relations, constraints, parametrize, nulls]
OF_TOKENS = [sequences, noise]
FAMILIES = {make.__name__: make for make in (*OF_NUMBERS, *OF_WEIGHTS, *OF_TOKENS)}
DRAWN = "noise"  # its numbers are chance


def model_for(family):
    make = FAMILIES[family]
    return Tagger() if make in OF_TOKENS else Parallel() if make in OF_WEIGHTS else Dense()


def batch_for(model, seed):
    """The arguments of a forward."""
    if not isinstance(model, Tagger):
        return {
            "input" if isinstance(model, Dense) else "x": numbers(
                16, 4 if isinstance(model, Parallel) else 6, seed=seed
            )
        }
    lengths = torch.tensor([5, 3, 4, 2])
    tokens = (numbers(4, 5, seed=seed) * 1000).long() % 11
    return {"tokens": tokens, "mask": torch.arange(5) < lengths[:, None], "lengths": lengths}


def optimizer_for(family, model):
    if family in ("entrywise", "groups", "targets"):
        return torch.optim.Adam(model.parameters(), lr=0.02)
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.5 if FAMILIES[family] in OF_WEIGHTS else 0.0)


def outcome(family, plan):
    """What the plan does: values and strengths in order, as their names may change, and the weights behind it."""
    model = model_for(family)
    optimizer = optimizer_for(family, model)
    with rs.attach(model, plan, optimizer) as reg:
        if list(reg.parameters()):
            optimizer.add_param_group({"params": list(reg.parameters())})
        for step in range(5):
            out = model(**batch_for(model, step))
            loss = reg.loss((out - numbers(*out.shape, seed=7)).square().mean())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 2:
                reg.next_epoch()
        found = {"loss": loss.item(), "values": [*reg.values().values()], "strengths": [*reg.strengths().values()]}
    return {**found, "weights": digests(model)}


def spread(plan):
    """How far noise moves the model's outputs: root mean squares over 500 draws."""
    model = model_for(DRAWN)
    batch = batch_for(model, 0)
    with torch.no_grad():
        plain = model(**batch)
        with rs.attach(model, plan, optimizer_for(DRAWN, model)):
            moved = torch.stack([model(**batch) - plain for _ in range(500)])
    return {"spread": moved.square().mean().sqrt().item(), "bias": moved.mean(0).square().mean().sqrt().item()}


BY_HAND = {  # as the documentation writes them, which is not always what a plan writes; YAML's are in by_hand.yaml
    "texts": ["l2:1e-4", "l1", "GroupLasso:0.01"],
    "dicts": [
        {"what": "l1", "strength": "1e-3", "on": "0.weight", "how": "proximal"},
        {"what": {"name": "elasticnet", "l1": "1e-3", "l2": 1}},
        {"what": {"sum": ["l1", {"what": "l2", "strength": 0.1}, {"name": "norm", "p": 2}]}, "on": {"role": "biases"}},
        {"what": "l1", "strength": {"times": [1e-3, {"warmup": {"steps": 3}}]}, "on": {"type": "Linear"}},
        {"what": "max_norm", "on": ["4.weight"]} | {"what": {"name": "max_norm", "max_norm": 3}},
        {"what": "l2", "on": {"outputs": "[12]", "via": "relu"}, "optional": True},
        {"what": "l2", "on": {"minus": [{"outputs": {"type": "Linear"}}, {"outputs": "4"}]}},
    ],
}
