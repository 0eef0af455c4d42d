"""Settings by the names that they had in version 0.1: taken with a warning that names the new one."""

import copy
import dataclasses
import inspect
import json
import pickle
import warnings

import pytest
import torch
from torch import nn

import restrain as rs
from restrain.errors import PenaltyError, PlanError, RestrainDeprecationWarning, TransformError
from restrain.fields import by_new_names, renamed, text_by_new_names

RENAMED = {
    "NM": (rs.NM, {"n": 1, "m": 2}, "along", "dim", 0),
    "StateChange": (rs.StateChange, {"per_unit": True}, "time", "dim", 1),
    "NormChange": (rs.NormChange, {"squared": True}, "time", "dim", 1),
    "Entropy": (rs.Entropy, {}, "per", "dim", 1),
    "Confidence": (rs.Confidence, {}, "per", "dim", -1),
}
each = pytest.mark.parametrize("name", RENAMED)


def new(name):
    cls, others, _, word, value = RENAMED[name]
    return cls(**others, **{word: value})


def says(name):
    cls, _, old, word, _ = RENAMED[name]
    message = rf"^{old}= of {cls.__name__} is called {word}= since .*write {word}=$"
    return pytest.warns(RestrainDeprecationWarning, match=message)


def where(name):
    return "*" if name == "NM" else rs.outputs("*")


@each
def test_in_calls(name):
    cls, others, old, _, value = RENAMED[name]
    with says(name) as said:
        line = inspect.currentframe().f_lineno + 1
        made = cls(**others, **{old: value})
    assert made == new(name)
    assert [(w.filename, w.lineno) for w in said] == [(__file__, line)]  # one warning, at the user's own line
    assert old not in inspect.signature(cls).parameters
    with says(name):
        assert getattr(made, old) == value
    assert not hasattr(made, "no_such_setting")


@each
def test_new_names_are_silent(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = new(name)
        copied = copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made)), dataclasses.replace(made)
        for again in copied:
            assert again == made
            assert repr(again) == repr(made)
            assert hash(again) == hash(made)


@each
def test_both_names_are_an_error(name):
    cls, others, old, word, value = RENAMED[name]
    with pytest.raises(PlanError, match=f"takes {word}=, whose old name is {old}=: write it once"):
        cls(**others, **{old: value, word: value})
    with pytest.raises(PlanError, match="write it once"):
        dataclasses.replace(new(name), **{old: value})
    with pytest.raises(TypeError, match="no_such"):
        cls(**others, no_such=1)


@each
@pytest.mark.parametrize("suffix", ["yaml", "toml", "json"])
def test_in_plan_files(name, suffix, tmp_path):
    _, _, old, word, value = RENAMED[name]
    path = tmp_path / f"plan.{suffix}"
    plan = rs.Plan([new(name).on(where(name))])
    plan.save(path)
    text = path.read_text()
    assert text.count(word) == 1
    path.write_text(text.replace(word, old))
    with says(name) as said:
        assert rs.Plan.load(path).rules == tuple(plan.rules)
    assert len(said) == 1
    assert plan.to_dict()["rules"][0]["what"][word] == value


@each
def test_in_pickles(name):
    """A pickle of version 0.1 holds the fields by their old names."""
    cls, _, old, word, _ = RENAMED[name]
    made = new(name)
    reduced = list(made.__reduce_ex__(2))
    reduced[2] = {old if key == word else key: value for key, value in vars(made).items()}
    found = cls.__new__(cls)
    found.__setstate__(reduced[2])
    assert found == made
    assert vars(found) == vars(made)


def test_in_saved_states():
    """Rules without a name are told apart by their text, which has the settings' names in it."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    plan = [
        rs.schedules.Linear(0, 1, steps=9) * rs.StateChange(dim=-1).on(rs.outputs("1")),
        rs.NM(1, 2, dim=0).on("0.weight"),
        rs.Distance(2 * rs.L2()).on("0.weight"),
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, plan, optimizer)
    reg.loss(model(torch.randn(5, 3)).sum()).backward()
    optimizer.step()
    saved = reg.state_dict()
    text = json.dumps(saved["rules"])
    assert "dim=-1" in text
    old = dict(
        saved,
        rules=[key.replace("dim=-1", "time=-1").replace("dim=0", "along=0") for key in saved["rules"]],
        strengths={key.replace("dim=-1", "time=-1"): value for key, value in saved["strengths"].items()},
    )
    assert old["rules"] != saved["rules"]
    reg.load_state_dict(old)
    assert reg.state_dict()["strengths"] == saved["strengths"]
    with pytest.raises(PlanError, match="other rules"):
        reg.load_state_dict(dict(saved, rules=[key.replace("dim=-1", "dim=1") for key in saved["rules"]]))


def test_in_texts():
    for old, now in [
        ("StateChange(per_unit=True, time=1)", "StateChange(per_unit=True, dim=1)"),
        ("0.1 * (Entropy(per=1) + L1())", "0.1 * (Entropy(dim=1) + L1())"),
        ("NM(n=1, m=2, along='in') on 'x'", "NM(n=1, m=2, dim='in') on 'x'"),
        ("GroupLasso(per=1)", "GroupLasso(per=1)"),
        ("KLSparsity(rate=0.1, per=1)", "KLSparsity(rate=0.1, per=1)"),
        ("MyEntropy(per=1)", "MyEntropy(per=1)"),
        ("L1() on 'time=1'", "L1() on 'time=1'"),
    ]:
        assert text_by_new_names(old) == now


def test_in_keywords_of_models():
    pytest.importorskip("sklearn")
    x, y = torch.randn(20, 4), torch.tensor([0, 1] * 10)
    with says("NM"):
        old = rs.Classifier(hidden=(4,), epochs=1, random_state=0, nm={"n": 1, "m": 2, "along": "in"}).fit(x, y)
    now = rs.Classifier(hidden=(4,), epochs=1, random_state=0, nm={"n": 1, "m": 2, "dim": "in"}).fit(x, y)
    for a, b in zip(old.module_.parameters(), now.module_.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(PlanError, match="NM has no across"):
        rs.Classifier(hidden=(4,), nm={"n": 1, "m": 2, "across": "in"}).fit(x, y)


def test_of_subclasses_and_strangers():
    class Mine(rs.Entropy, register=False):
        pass

    class Entropy:  # of the same name only
        pass

    with pytest.warns(RestrainDeprecationWarning, match="per= of Entropy"):
        assert Mine(per=2).dim == 2
    with pytest.warns(RestrainDeprecationWarning):
        assert by_new_names(Mine, {"per": 1}) == {"dim": 1}
    assert by_new_names(Entropy, {"per": 1}) == {"per": 1}

    @renamed(size="length")
    class Plain:
        def __init__(self, length=3):
            self.length = length

    with pytest.warns(RestrainDeprecationWarning, match="size= of Plain"):
        assert Plain(size=2).length == 2
    assert Plain().length == Plain(3).length == 3


def test_an_axis_is_one_dim():
    """Lists and blocks were taken by NM, and not heeded."""
    for wrong in ({"in": [[0, 2], [1, 3]]}, (2, 2), [[0, 1]], None, 1.5, True, "inward"):
        with pytest.raises(PenaltyError, match="dim= is a dim such as 0, or an axis by name such as 'in'"):
            rs.NM(1, 2, dim=wrong)
        with pytest.raises(PenaltyError, match="dim= is a dim such as 0, or an axis by name such as 'in'"):
            rs.TotalVariation(dim=wrong)
    assert isinstance(hash(rs.NM(1, 2, dim="in")), int)


# No bound is None


def test_a_box_without_a_bound():
    inf = float("inf")
    assert rs.Box(-1) == rs.Box(-1, None) == rs.Box(-1, inf) == rs.Box(low=-1, high=inf)
    assert rs.Box(high=2) == rs.Box(None, 2) == rs.Box(-inf, 2)
    assert repr(rs.Box(-inf, 2)) == "Box(high=2)"
    w = torch.tensor([-3.0, 0.5, 3.0])
    assert rs.Box(-1).project(w).tolist() == [-1, 0.5, 3]
    assert rs.Box(None, 2).project(w).tolist() == [-3, 0.5, 2]
    assert rs.Box(-3, None).tangent(w, -torch.ones(3)).tolist() == [0, -1, -1]
    for nothing in (lambda: rs.Box(), lambda: rs.Box(None, None), lambda: rs.Box(-inf, inf)):
        with pytest.raises(TransformError, match="Box needs a bound: write low="):
            nothing()
    data = {"rules": [{"what": {"name": "box", "low": -1, "high": inf}, "on": "*"}]}
    plan = rs.Plan.from_dict(data)  # as version 0.1 wrote it
    assert plan.rules[0].what == rs.Box(-1)
    assert plan.to_dict()["rules"][0]["what"] == {"name": "box", "low": -1}
    old = rs.Box.__new__(rs.Box)
    old.__setstate__({"low": -inf, "high": 2})
    assert old == rs.Box(high=2)


@pytest.mark.parametrize("box", [rs.Box(-0.1), rs.Box(high=0.1), rs.Box(-0.1, 0.1)], ids=repr)
@pytest.mark.parametrize("compile", [True, False])
def test_a_one_sided_box_at_the_step(box, compile):
    layer = nn.Linear(30, 20)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    reg = rs.attach(layer, box.on("weight"), optimizer, compile=compile)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(8, 30)).square().sum().backward()
        optimizer.step()
        assert torch.equal(layer.weight, box.project(layer.weight))
        assert (box.low is None) == bool((layer.weight < -0.1).any())
        assert (box.high is None) == bool((layer.weight > 0.1).any())
    reg.detach()
