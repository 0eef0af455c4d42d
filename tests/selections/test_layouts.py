"""Layouts of parameters, declared or known: named axes against the same rules on each matrix alone, by NumPy."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import restrain as rs
from restrain import layouts
from restrain.errors import PenaltyError, PlanError

ORDERS = {
    "expert out in": (0, 1, 2),
    "expert in out": (0, 2, 1),
    "in expert out": (1, 2, 0),
    "out in expert": (2, 0, 1),
}
SHAPE = 3, 4, 8  # experts, outputs, inputs


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setattr(layouts, "_names", {})
    monkeypatch.setattr(layouts, "_types", {})


class Experts(nn.Module):
    """Matrices of several experts in one parameter, whose axes lie in any order."""

    def __init__(self, order=(0, 1, 2), shape=SHAPE):
        super().__init__()
        w = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        self.w = nn.Parameter(w.permute([order.index(axis) for axis in range(3)]).contiguous())


class Model(nn.Module):
    def __init__(self, *arguments):
        super().__init__()
        self.experts = Experts(*arguments)


def by_expert(model, order):
    """Return the weights as NumPy's (expert, out, in)."""
    return model.experts.w.detach().permute(order).numpy()


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def lengths(w, per):
    return np.sqrt(np.square(w).sum(1 if per == "out" else 0, keepdims=True))


def spectrum(change):
    def act(w):
        u, s, vh = np.linalg.svd(w, full_matrices=False)
        return (u * change(s)) @ vh

    return act


def two_of_four(w):
    kept = np.argsort(-np.abs(w.reshape(-1, 4)), 1, kind="stable")[:, :2]
    mask = np.zeros_like(w.reshape(-1, 4))
    np.put_along_axis(mask, kept, 1, 1)
    return w * mask.reshape(w.shape)


CONSTRAINTS = {
    "MaxNorm out": (rs.MaxNorm(1.0, "out"), lambda w: w / np.maximum(lengths(w, "out"), 1)),
    "MaxNorm channel": (rs.MaxNorm(1.0, "channel"), lambda w: w / np.maximum(lengths(w, "in"), 1)),
    "UnitNorm in": (rs.UnitNorm("in"), lambda w: w / lengths(w, "in")),
    "NM": (rs.NM(2, 4), two_of_four),
    "SpectralBall": (rs.SpectralBall(1.5), spectrum(lambda s: np.minimum(s, 1.5))),
    "LowRank": (rs.LowRank(1), spectrum(lambda s: s * (np.arange(len(s)) < 1))),
    "Orthogonal": (rs.Orthogonal(), spectrum(np.ones_like)),
    "UnitNorm expert": (rs.UnitNorm("expert"), lambda w: w / np.linalg.norm(w)),
}


@pytest.mark.parametrize("words", ORDERS)
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_a_constraint_acts_on_each_matrix(name, words):
    constraint, reference = CONSTRAINTS[name]
    model = Model(ORDERS[words])
    before = by_expert(model, ORDERS[words]).copy()
    rs.layout("experts.w", words)
    optimizer = sgd(model)
    rs.attach(model, constraint.on("*.w"), optimizer)
    right = np.stack([reference(w) for w in before])
    np.testing.assert_allclose(by_expert(model, ORDERS[words]), right, atol=1e-12)
    model.experts.w.grad = torch.ones_like(model.experts.w)
    optimizer.step()
    if name not in ("UnitNorm in", "UnitNorm expert", "Orthogonal", "LowRank"):  # of convex sets, and masks
        after = np.stack([reference(w) for w in by_expert(model, ORDERS[words])])
        np.testing.assert_allclose(by_expert(model, ORDERS[words]), after, atol=1e-12)


@pytest.mark.parametrize("words", ORDERS)
@pytest.mark.parametrize("name", ["SpectralBall", "LowRank", "Orthogonal", "MaxNorm out"])
def test_a_parametrisation_of_each_matrix(name, words):
    constraint, reference = CONSTRAINTS[name]
    model = Model(ORDERS[words])
    right = np.stack([reference(w) for w in by_expert(model, ORDERS[words])])
    rs.layout(Experts, w=words)
    with rs.attach(model, constraint.on("*.w", how="parametrize")):
        np.testing.assert_allclose(by_expert(model, ORDERS[words]), right, atol=1e-12)
        model.experts.w.square().sum().backward()


def soft(x, t):
    return np.sign(x) * np.maximum(np.abs(x) - t, 0)


def groups_of(per, t):
    def act(w):
        size = lengths(w, per)
        threshold = t * np.sqrt(w.shape[1] if per == "out" else w.shape[0])
        return w * np.maximum(1 - threshold / size, 0)

    return act


PENALTIES = {
    "GroupLasso out": (rs.GroupLasso("out"), lambda w: np.sqrt(8) * lengths(w, "out").sum(), groups_of("out", 0.3)),
    "GroupLasso in": (rs.GroupLasso("in"), lambda w: 2 * lengths(w, "in").sum(), groups_of("in", 0.3)),
    "NuclearNorm": (
        rs.NuclearNorm(),
        lambda w: np.linalg.svd(w, compute_uv=False).sum(),
        spectrum(lambda s: soft(s, 0.3)),
    ),
    "SpectralNorm": (rs.SpectralNorm(), lambda w: np.linalg.svd(w, compute_uv=False)[0], None),
    "Orthogonality": (rs.Orthogonality(), lambda w: np.square(w @ w.T - np.eye(4)).sum(), None),
    "TotalVariation": (rs.TotalVariation("in"), lambda w: np.abs(np.diff(w, axis=1)).sum(), None),
    "lists": (
        rs.GroupLasso({"in": [[0, 1], [2, 3, 5]]}),
        lambda w: 8**0.5 * np.linalg.norm(w[:, :2]) + 12**0.5 * np.linalg.norm(w[:, [2, 3, 5]]),
        None,
    ),
    "expert": (rs.GroupLasso("expert"), lambda w: 32**0.5 * np.linalg.norm(w), None),
}


@pytest.mark.parametrize("words", ORDERS)
@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_is_the_sum_over_matrices(name, words):
    penalty, value, prox = PENALTIES[name]
    model = Model(ORDERS[words])
    before = by_expert(model, ORDERS[words]).copy()
    plan = rs.Plan.from_dict({"rules": [], "layouts": {"experts.*": words}})
    reg = rs.attach(model, [plan, 0.5 * penalty.on("*.w")])
    total = reg.penalty()
    assert total.item() == pytest.approx(0.5 * sum(value(w) for w in before), rel=1e-10)
    total.backward()
    step = 1e-6 * torch.randn(model.experts.w.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            model.experts.w.add_(sign * step)
        values.append(0.5 * sum(value(w) for w in by_expert(model, ORDERS[words])))
        with torch.no_grad():
            model.experts.w.sub_(sign * step)
    assert (model.experts.w.grad * step).sum().item() == pytest.approx((values[0] - values[1]) / 2, rel=1e-4)
    reg.detach()
    if prox is not None:
        optimizer = sgd(model, 0.6)
        rs.attach(model, [plan, 0.5 * penalty.on("*.w", how="proximal")], optimizer)
        model.experts.w.grad = torch.zeros_like(model.experts.w)
        optimizer.step()
        np.testing.assert_allclose(by_expert(model, ORDERS[words]), np.stack([prox(w) for w in before]), atol=1e-12)


# Where a layout is declared


def axes(model, name="experts.w"):
    slot = next(slot for slot in rs.named_tensors.parameters(model) if name in slot.names)
    return slot.location().axes


def test_a_plan_comes_before_a_module_a_name_and_a_type():
    class Special(Experts):
        pass

    model = Model()
    model.experts = Special()
    assert axes(model) is None
    rs.layout(Experts, w="relation out in")
    assert axes(model) == ("relation", "out", "in")
    rs.layout(Special, w="type out in")
    assert axes(model) == ("type", "out", "in")
    rs.layout("*.w", "expert in out")
    rs.layout("experts.*", "filter channel kernel")
    assert axes(model) == ("out", "in", "kernel")
    rs.layout("*.w", "expert in out")
    assert axes(model) == ("expert", "in", "out")
    rs.layout(model.experts, w="head out in")
    assert axes(model) == ("head", "out", "in")
    for copied in (copy.deepcopy(model), torch.nn.Sequential(model.experts)):
        assert axes(copied, "experts.w" if copied is not model and hasattr(copied, "experts") else "0.w")[0] == "head"
    plan = rs.Plan.of([{"rules": ["l2"], "layouts": {"experts.w": "in out kernel"}}])
    with rs.attach(model, plan):
        assert axes(model) == ("in", "out", "kernel")
    rs.layout("*.w", "out in")  # of two axes: not for this one
    assert axes(Model()) == ("out", "in", "kernel")


@pytest.mark.parametrize("ending", ["json", "yaml", "toml"])
def test_a_plan_keeps_its_layouts(ending, tmp_path):
    rule = rs.Plan.of(rs.GroupLasso("expert").on("*.w")).to_dict()["rules"][0]
    data = {"rules": [rule], "layouts": {"*.w": "expert in out"}}
    plan = rs.Plan.of(data)
    plan.save(tmp_path / f"plan.{ending}")
    again = rs.Plan.load(tmp_path / f"plan.{ending}")
    assert again == plan
    assert again.to_dict()["layouts"] == data["layouts"]
    assert pickle.loads(pickle.dumps(plan)) == plan
    both = plan + rs.Plan.of({"rules": [], "layouts": {"v": "out in"}})
    assert json.loads(json.dumps(both.to_dict()))["layouts"] == {"*.w": "expert in out", "v": "out in"}
    reg = rs.attach(Model(), plan)
    assert reg.plan.layouts == plan.layouts


@pytest.mark.parametrize("words", ["", "out out", "expert expert in", "out 1in", 3, ["out", "in"], "out,in"])
def test_words_that_are_no_layout_are_refused(words):
    for declare in (
        lambda: rs.layout("w", words),
        lambda: rs.layout(Experts, w=words),
        lambda: rs.Plan.of({"rules": ["l2"], "layouts": {"w": words}}),
    ):
        with pytest.raises(PlanError, match="'w' is a word for each axis"):
            declare()


def test_what_cannot_be_declared_is_refused():
    for given in ((3, "out in"), (Experts, "out in"), (Experts,), (nn.Linear(2, 2), "out in"), (int,)):
        with pytest.raises(PlanError, match=r"rs\.layout takes"):
            rs.layout(*given)
    with pytest.raises(PlanError, match="of names"):
        rs.layout("w")
    with pytest.raises(PlanError, match="layouts are"):
        rs.Plan.of({"rules": ["l2"], "layouts": ["out in"]})
    rs.layout(Experts, w="out in")
    with pytest.raises(PlanError, match=r"'out in' has 2 axes, and 'experts\.w' has 3"):
        rs.attach(Model(), rs.L2().on("*.w"))
    rs.layout(Experts, w="relation out in")
    with pytest.raises(PenaltyError, match="'expert' is no axis of 'relation out in'"):
        rs.attach(Model(), rs.GroupLasso("expert").on("*.w"))
    with pytest.raises(PenaltyError, match="per= is one of"):
        rs.GroupLasso("exprt")
    with pytest.raises(PenaltyError, match="holds several"):
        rs.attach(Model(), rs.SpectralNormalization().on("*.w"))


def test_an_unknown_layout_names_the_way_out():
    model = Model()
    with pytest.raises(PenaltyError) as told:
        rs.attach(model, rs.MaxNorm(1.0, "out").on("experts.w"), sgd(model))
    assert "rs.layout('experts.w', 'expert out in') or rs.layout(Experts, w='expert out in')" in str(told.value)
    exec(str(told.value).partition("as in ")[2].partition(" or ")[0], {"rs": rs})
    rs.attach(model, rs.MaxNorm(1.0, "out").on("experts.w"), sgd(model))


def test_a_matrix_of_unknown_layout_has_a_spectrum():
    model = nn.ParameterDict({"w": torch.randn(3, 5)})
    rs.attach(model, [rs.NuclearNorm().on("w"), rs.SpectralBall(0.5).on("w")], sgd(model))
    assert torch.linalg.matrix_norm(model["w"], 2) <= 0.5 + 1e-6
    with pytest.raises(PenaltyError, match="no known axis"):
        rs.attach(model, rs.Orthogonality().on("w"))


# Known layouts


def test_hugging_faces_experts_and_routers():
    """The axis that is called out is as long as the outputs, the axis called in as the inputs."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

    sizes = {"hidden_size": 6, "intermediate_size": 10, "num_local_experts": 3}
    made = {
        MixtralExperts: transformers.MixtralConfig(**sizes),
        GptOssExperts: transformers.GptOssConfig(**sizes),
        Llama4TextExperts: transformers.Llama4TextConfig(**sizes),
        Qwen2MoeExperts: transformers.Qwen2MoeConfig(hidden_size=6, moe_intermediate_size=10, num_experts=3),
    }
    for kind, config in made.items():
        model = nn.Sequential(kind(config))
        for name, out, into in (("down_proj", 6, 10), ("gate_up_proj", 20, 6)):
            found = axes(model, f"0.{name}")
            lengths = dict(zip(found, getattr(model[0], name).shape, strict=True))
            assert lengths == {"expert": 3, "out": out, "in": into}, kind
    router = nn.Sequential(MixtralTopKRouter(transformers.MixtralConfig(**sizes, num_experts_per_tok=2)))
    assert axes(router, "0.weight") == ("out", "in")


def test_relations_of_graph_layers():
    def made(name, **shapes):
        kind = type(name, (nn.Module,), {"__module__": "torch_geometric.nn.conv.some"})
        layer = kind()
        for key, shape in shapes.items():
            layer.register_parameter(key, nn.Parameter(torch.randn(shape)))
        return nn.Sequential(layer)

    assert axes(made("RGCNConv", weight=(3, 4, 5), root=(4, 5)), "0.weight") == ("relation", "in", "out")
    assert axes(made("FastRGCNConv", weight=(3, 4, 5), root=(4, 5)), "0.root") == ("in", "out")
    assert axes(made("RGCNConv", weight=(3, 2, 2, 2)), "0.weight") is None
    assert axes(made("HeteroLinear", weight=(3, 4, 5)), "0.weight") == ("type", "in", "out")
    model = made("RGCNConv", weight=(3, 4, 5))
    rs.attach(model, rs.UnitNorm("out").on("0.weight"), sgd(model))
    torch.testing.assert_close(model[0].weight.detach().norm(dim=1), torch.ones(3, 5))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(3, 4, 2), nn.Linear(3, 4)], ids=str)
def test_the_old_weight_norm_keeps_the_layout_of_the_layer(layer):
    dim = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    model = torch.nn.utils.weight_norm(layer, dim=dim)
    rs.attach(model, rs.UnitNorm("out").on("weight_v"), sgd(model))
    rows = model.weight_v.detach().movedim(dim, 0).flatten(1)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(4))
