"""Penalties with tensors of their own: weights, references, and pairs of parameters."""

import copy
import pickle

import pytest
import torch
from torch import nn

import restrain as rs
from restrain.errors import FileError, PenaltyError, PlanError, SelectionError


def line(size=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(size, 3), nn.Tanh(), nn.Linear(3, size))


def steps(model, plan, count=5, optimizer=None, **options):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, plan, optimizer)
    for _ in range(count):
        optimizer.zero_grad()
        reg.loss(model(torch.ones(2, 4)).square().mean()).backward()
        optimizer.step()
    return reg


# Weighted


def test_adaptive_lasso_takes_its_weights_at_attach():
    model = line()
    start = model[0].weight.detach().clone()
    reg = rs.attach(model, 0.5 * rs.Weighted(rs.L1(), lambda w: 1 / w.abs()).on("0.weight"))
    assert sum(reg.values().values()) == pytest.approx(0.5 * start.numel())
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert sum(reg.values().values()) == pytest.approx(start.numel())


@pytest.mark.parametrize("penalty", [rs.L1(), rs.L2(), rs.Huber(0.3), rs.MCP(1.0)], ids=repr)
def test_each_entry_has_its_strength(penalty):
    w, weights = torch.randn(3, 4, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    whole = rs.Weighted(penalty, weights)
    single = [weight.item() * penalty for weight in weights.flatten()]
    entries = list(w.flatten())
    assert float(whole(w)) == pytest.approx(sum(float(p(x)) for p, x in zip(single, entries, strict=True)))
    for found, of in ((whole.gradient(w), "gradient"), (whole.prox(w, 0.4), "prox")):
        given = () if of == "gradient" else (0.4,)
        expected = torch.stack([getattr(p, of)(x, *given) for p, x in zip(single, entries, strict=True)])
        torch.testing.assert_close(found, expected.view(3, 4))


def test_large_tensors_are_not_cut_between_weights():
    model = nn.Linear(1000, 600, bias=False)
    weights = torch.rand(600, 1000)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    rs.attach(model, rs.Weighted(rs.L1(), weights).on("weight", how="proximal"), optimizer)
    twin = copy.deepcopy(model)
    other = torch.optim.Adam(twin.parameters(), lr=0.1)
    for net, opt in ((model, optimizer), (twin, other)):
        net.weight.grad = torch.ones_like(net.weight)
        opt.step()
    expected = rs.Weighted(rs.L1(), weights).prox(twin.weight, torch.full_like(weights, 0.1 / (1 + 1e-8)))
    torch.testing.assert_close(model.weight, expected)


@pytest.mark.parametrize(
    ("weights", "what"),
    [
        ([1.0, -1.0], "zero or more"),
        (float("inf"), "zero or more"),
        ([1.0, 2.0, 3.0, 4.0, 5.0], "can't be for"),
        ("?", "no file"),
    ],
)
def test_weights_that_are_none(weights, what):
    with pytest.raises((PenaltyError, FileNotFoundError), match=what):
        rs.attach(nn.Linear(2, 1), rs.Weighted(rs.L1(), weights).on("weight"))


def test_weighted_is_for_entrywise_penalties():
    with pytest.raises(PenaltyError, match="entrywise"):
        rs.Weighted(rs.GroupLasso(), 1.0)
    with pytest.raises(PenaltyError, match="scale the whole"):
        rs.Weighted(2 * rs.L1(), 1.0)


# Distance


def test_distance_is_from_the_values_at_attach():
    model = line()
    start = model[2].weight.detach().clone()
    reg = steps(model, 0.3 * rs.Distance().on("2.weight"))
    moved = model[2].weight.detach() - start
    assert moved.abs().sum() > 0
    assert sum(reg.values().values()) == pytest.approx(0.3 * moved.square().sum().item(), rel=1e-5)


def test_a_strong_one_by_prox_keeps_entries_exactly():
    model = line()
    start = model[2].weight.detach().clone()
    steps(model, 10 * rs.Distance(rs.L1()).on("2.weight", how="proximal"))
    assert torch.equal(model[2].weight, start)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_checkpoint_is_a_reference(tmp_path, suffix):
    model, path = line(), tmp_path / f"pretrained{suffix}"
    tensors = {f"module.{name}": p + 1.0 for name, p in model.state_dict().items()}
    if suffix == ".pt":
        torch.save(tensors, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(tensors, path)
    reg = rs.attach(model, rs.Distance(to=str(path)).on("*.weight"))
    assert sum(reg.values().values()) == pytest.approx(24, rel=1e-5)
    again = rs.Plan.from_dict(reg.plan.to_dict())
    assert again.rules[0].what == rs.Distance(to=str(path))
    with pytest.raises(PenaltyError, match="nothing is given for 'weight'"):
        rs.attach(nn.Linear(1, 1), rs.Distance(to=str(path)).on("weight"))


def test_files_that_are_no_references(tmp_path):
    path = tmp_path / "x.pt"
    for content, said in (
        (torch.ones(2), "holds tensor.*expected a state_dict"),
        ({1: torch.ones(1, 1)}, "expected a state_dict"),
        ({"weight": torch.eye(2).to_sparse()}, "dense tensor for 'weight'"),
        ({"weight": torch.ones(1, 2, device="meta")}, "dense tensor for 'weight'"),
        ({"weight": torch.ones(1, 2) * 1j}, "real numbers for 'weight'"),
        ({"weight": "text"}, "needs a tensor for 'weight'"),
        ({"state": {"weight": torch.ones(1, 2)}}, "nothing is given for 'weight'"),
    ):
        torch.save(content, path)
        with pytest.raises((PenaltyError, FileError), match=said):
            rs.attach(nn.Linear(2, 1), rs.Distance(to=path).on("weight"))


def test_a_file_that_was_written_anew_is_read_anew(tmp_path):
    model, path = line(), tmp_path / "pretrained.pt"
    for shift in (1.0, 2.0):
        torch.save({name: p + shift for name, p in model.state_dict().items()}, path)
        with rs.attach(model, rs.Distance(to=str(path)).on("*.weight")) as reg:
            assert sum(reg.values().values()) == pytest.approx(24 * shift**2, rel=1e-5)


def test_elastic_weight_consolidation_is_made_of_both():
    model = line()
    fisher = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    old = {name: p.detach() + 0.5 for name, p in model.named_parameters()}
    reg = rs.attach(model, 0.5 * rs.Distance(rs.Weighted(rs.L2(), fisher), to=old).on("*"))
    expected = 0.5 * sum(float((fisher[n] * 0.25).sum()) for n in fisher)
    assert sum(reg.values().values()) == pytest.approx(expected, rel=1e-5)


def test_a_moving_reference_follows_the_parameter():
    model, decay = line(), 0.9
    reference = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, 1.0 * rs.Distance(decay=decay).on("0.weight"), optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        reg.loss(model(torch.ones(2, 4)).square().mean()).backward()
        optimizer.step()
        reference = decay * reference + (1 - decay) * model[0].weight.detach()
    (kept,) = reg.state_dict()["kept"].values()
    torch.testing.assert_close(kept["kept"], reference)


def test_a_resumed_run_has_the_old_reference():
    model = line()
    reg = steps(model, rs.Distance().on("0.weight"))
    state, value = copy.deepcopy(reg.state_dict()), reg.values()
    reg.detach()
    other = rs.attach(model, rs.Distance().on("0.weight"))
    assert sum(other.values().values()) == 0
    other.load_state_dict({**state, "optimizer_steps": []})
    assert other.values() == value


def test_what_distance_refuses():
    with pytest.raises(PenaltyError, match="at attach"):
        rs.Distance()(torch.ones(2))
    with pytest.raises(PenaltyError, match="decay="):
        rs.Distance(decay=1.5)
    with pytest.raises(PenaltyError, match="penalty of the difference"):
        rs.Distance(torch.ones(2))
    with pytest.raises(PenaltyError, match="can't be for"):
        rs.Distance(to=torch.ones(3))(torch.ones(2))
    with pytest.raises(SelectionError, match="of parameters"):
        rs.Distance().on(rs.outputs("0"))
    with pytest.raises(PenaltyError, match="needs a tensor"):
        rs.Distance(to=lambda w: None)(torch.ones(2))
    with pytest.raises(PlanError, match="can't be written"):
        rs.Plan.of(rs.Distance(to=torch.ones(2)).on("*")).to_dict()


def test_groups_of_the_difference():
    model = line()
    reg = rs.attach(model, rs.Distance(rs.GroupLasso("out"), to=0.0).on("0.weight"))
    plain = rs.attach(model, rs.GroupLasso("out").on("0.weight"))
    assert list(reg.values().values()) == pytest.approx(list(plain.values().values()))
    plan = rs.Plan.from_dict(
        rs.Plan.of(0.1 * rs.Distance(0.5 * rs.L1() + rs.L2()).on("*.weight", how="proximal")).to_dict()
    )
    assert plan.rules[0].what == 0.1 * rs.Distance(0.5 * rs.L1() + rs.L2())


def test_equality_copies_and_pickles_with_tensors():
    one, same, other = (rs.Weighted(rs.L1(), torch.tensor(t)) for t in ([1.0, 2.0], [1.0, 2.0], [1.0, 3.0]))
    assert one == same
    assert one != other
    assert one != rs.Weighted(rs.L1(), 1.0)
    assert hash(one) == hash(same)
    for twin in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert twin == one
    maps = [
        rs.Distance(to={"a": torch.ones(1)}),
        rs.Distance(to={"a": torch.ones(1)}),
        rs.Distance(to={"b": torch.ones(1)}),
    ]
    assert maps[0] == maps[1] != maps[2]


# Pairs


class Twins(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 3), nn.Linear(3, 4)

    def forward(self, x):
        return self.decoder(self.encoder(x))


def test_tie_pulls_both_together():
    model = Twins()
    reg = steps(model, 1.0 * rs.Tie("encoder", "decoder", transposed=True).on("*.weight"), count=40)
    assert sum(reg.values().values()) < 1e-3
    expected = (model.encoder.weight - model.decoder.weight.T).square().sum()
    assert sum(reg.values().values()) == pytest.approx(expected.item(), rel=1e-4)


def test_a_frozen_partner_is_a_fixed_aim():
    model = Twins()
    model.decoder.requires_grad_(False)
    aim = model.decoder.weight.detach().clone()
    steps(
        model,
        20.0 * rs.Tie("encoder", "decoder", transposed=True).on("*.weight"),
        count=60,
        optimizer=torch.optim.SGD(model.encoder.parameters(), lr=0.02),
    )
    assert torch.equal(model.decoder.weight, aim)
    torch.testing.assert_close(model.encoder.weight, aim.T, atol=0.05, rtol=0)


def test_product_norm_is_that_of_the_product():
    for dtype in (torch.float64, torch.complex128):
        b = torch.randn(6, 2, dtype=dtype, requires_grad=True)
        a = torch.randn(2, 5, dtype=dtype, requires_grad=True)
        found = rs.ProductNorm()({"q.lora_B": b, "q.lora_A": a}, {})
        expected = (b @ a).abs().square().sum()
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, (a, b)), torch.autograd.grad(expected, (a, b)))


@pytest.mark.parametrize(
    ("make", "error", "what"),
    [
        (lambda: rs.Tie("encoder", "coder").on("decoder.weight"), SelectionError, "'encoder' in its name"),
        (lambda: rs.Tie("encoder", "other").on("*.weight"), SelectionError, "no partner"),
        (lambda: rs.Tie("encoder", "decoder").on("*.weight"), PenaltyError, "transposed=True"),
        (lambda: rs.ProductNorm("encoder", "decoder").on("*.bias"), PenaltyError, "no product"),
        (lambda: rs.Tie("", "decoder"), PenaltyError, "left= and right="),
    ],
)
def test_pairs_that_are_none(make, error, what):
    model = Twins()
    with pytest.raises(error, match=what):
        rs.attach(model, make()).penalty()


def test_pairs_in_a_file():
    plan = rs.Plan.of(0.1 * rs.Tie("encoder", "decoder", rs.L1(), transposed=True).on("*.weight"))
    assert rs.Plan.from_dict(plan.to_dict()).rules[0] == plan.rules[0]


def test_a_state_that_is_not_whole_is_refused_and_changes_nothing():
    model = line()
    plan = [rs.Distance(decay=0.5).on("*", name="near"), rs.schedules.WarmUp(5) * rs.L1().on("*", name="warm")]
    reg = rs.attach(model, plan)
    good = copy.deepcopy(reg.state_dict())
    for part, lost in (("strengths", "strengths"), ("kept", "kept"), ("steps", "steps")):
        with pytest.raises(PlanError, match=f"isn't whole, it lacks {lost}: save what"):
            reg.load_state_dict({key: good[key] for key in good if key != part})
    with pytest.raises(PlanError, match=r"it lacks strengths\['warm'\]: save"):
        reg.load_state_dict({**good, "steps": 3, "strengths": {}})
    assert str(reg.state_dict()) == str(good)


def test_pairs_that_cannot_be_are_refused_at_attach_not_at_their_turn():
    model = nn.ModuleDict({"encoder": nn.Linear(3, 2), "decoder": nn.Linear(2, 3)})
    for what in (0.0 * rs.Tie("encoder", "decoder"), 0.5 * (rs.Tie("encoder", "decoder") + rs.ProductNorm("a", "b"))):
        with pytest.raises(PenaltyError, match="transposed=True"):
            rs.attach(model, what.on("*.weight", start=1000))
    with pytest.raises(SelectionError, match="no partner"):
        rs.attach(model, rs.schedules.WarmUp(9) * rs.Tie("encoder", "other").on("*.weight", every=7))


def test_a_strength_within_a_pair_moves():
    model = line()
    pair = rs.Tie("0", "2", penalty=rs.schedules.Linear(0, 0.5, 5) * rs.L2(), transposed=True)
    reg = steps(model, pair.on("*.weight", name="tie"), count=2)
    difference = (model[0].weight - model[2].weight.T).square().sum().item()
    assert reg.values()["tie"] == pytest.approx(0.2 * difference, rel=1e-5)
