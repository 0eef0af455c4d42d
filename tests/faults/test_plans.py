"""Plans as data: names that match nothing (A17), and values that only fail later or from inside (E7)."""

import pytest
import torch
from torch import nn

import restrain as rs
from faults.helpers import right_or_refused, sgd
from restrain.errors import PlanError, RestrainError


def model():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


# A17: names that match nothing beside names that match

PARTLY = {
    "2.wieght": {"what": "l2", "on": ["0.weight", "2.wieght"]},
    "Conv2dd": {"what": "l2", "on": {"type": ["Linear", "Conv2dd"]}},
    "typo": {"what": "l1", "on": {"outputs": ["1", "typo"]}},
    "ReLUU": {"what": "l1", "on": {"outputs": {"type": ["ReLU", "ReLUU"]}}},
    "0.nothing": {"what": "nonnegative", "on": ["2.weight", "0.nothing"]},
    "noname": {"what": {"name": "gaussiannoise", "std": 0.1}, "on": {"inputs": ["0", "noname"]}},
}


@pytest.mark.parametrize("name", PARTLY)
def test_a_name_in_plan_data_that_matches_nothing_is_an_error(name):
    net = model()
    with pytest.raises(RestrainError, match=name):
        rs.attach(net, rs.Plan.from_dict({"rules": [PARTLY[name]]}), sgd(net))


@pytest.mark.parametrize("name", PARTLY)
def test_optional_plan_data_may_match_less(name):
    net = model()
    rule = {**PARTLY[name], "optional": True}
    assert len(rs.attach(net, rs.Plan.from_dict({"rules": [rule]}), sgd(net)).plan) == 1


def test_a_list_of_names_in_python_that_match_nothing_is_an_error():
    with pytest.raises(RestrainError, match=r"2\.wieght"):
        rs.attach(model(), rs.L2().on(["0.weight", "2.wieght"]))


# E7: values that a plan can't have


def load(text, folder, suffix="yaml"):
    path = folder / f"plan.{suffix}"
    path.write_text(text)
    return rs.Plan.load(path)


@pytest.mark.parametrize("name", ["2", "1.5", "true", "[a]", "2024-01-01"])
def test_a_name_that_is_no_text_is_refused_or_can_be_shown(tmp_path, name):
    text = f"rules:\n- what: l2\n  'on': '*.weight'\n  name: {name}\n"
    net = model()
    try:
        reg = rs.attach(net, load(text, tmp_path))
    except RestrainError as error:
        said = str(error)
    else:
        said = str(reg)
        assert list(reg.values()) == [name]
    assert "name" in said or name in said


HUGE = "1" + "0" * 400


@pytest.mark.parametrize(
    "make",
    [
        lambda: int(HUGE) * rs.L2(),
        lambda: rs.Huber(int(HUGE)),
        lambda: rs.MaxNorm(int(HUGE)),
        lambda: rs.Box(0, int(HUGE)),
        lambda: rs.schedules.Linear(0, int(HUGE), steps=3),
        lambda: rs.Target(norm=int(HUGE)),
        lambda: rs.GaussianNoise(int(HUGE)),
        lambda: rs.Plan.of({"what": "l2", "strength": int(HUGE)}),
        lambda: rs.Plan.of({"what": {"name": "maxnorm", "max_norm": int(HUGE)}}),
        lambda: rs.ElasticNet(int(HUGE), 1.0),
    ],
)
def test_a_number_beyond_floats_is_refused_as_a_setting(make):
    with pytest.raises(RestrainError):
        make()


FOREIGN = {
    "activations of a number": (lambda: rs.activations(3, torch.ones(2, 4)), "3|int|Module"),
    "activations without an input": (lambda: rs.activations(3), "3|int|Module"),
    "regularized number": (lambda: rs.regularized(3, weight=rs.L2()), "3|int|Module"),
    "plan of a tensor": (lambda: rs.attach(model(), [torch.tensor(1.0)]), "tensor"),
    "plan of nested tensors": (lambda: rs.attach(model(), [[torch.ones(2, 2)]]), "tensor"),
    "prox by None": (lambda: rs.L1().prox(torch.ones(3), None), "step"),
    "prox by text": (lambda: rs.L1().prox(torch.ones(3), "1"), "step"),
    "prox of a sparse tensor": (lambda: rs.L1().prox(torch.eye(3).to_sparse(), 0.5), "sparse"),
    "group of a sparse tensor": (lambda: rs.GroupLasso("row")(torch.eye(3).to_sparse()), "sparse"),
    "projection of a sparse tensor": (lambda: rs.MaxNorm(1.0).project(torch.eye(3).to_sparse()), "sparse"),
    "recording of a number": (lambda: rs.recording(3, "*").__enter__(), "3|int|Module"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_can_not_be_given_is_refused_by_name(case):
    make, named = FOREIGN[case]
    with pytest.raises(RestrainError, match=rf"(?i){named}"):
        make()


@pytest.mark.parametrize(
    "penalty",
    [rs.L1(), rs.L2(), rs.GroupLasso(), rs.Huber(1.0), rs.Norm(2)],
    ids=repr,
)
def test_the_value_of_a_sparse_tensor_is_right_or_refused(penalty):
    x = torch.diag(torch.tensor([1.0, -2.0, 3.0]))
    right_or_refused(lambda: penalty(x.to_sparse()), penalty(x), names="sparse")


def test_the_base_of_transforms_is_refused_as_a_rule():
    with pytest.raises(RestrainError, match="Transform"):
        rs.Transform().on("*")


def test_an_empty_plan_is_said_to_be_empty():
    with pytest.raises(PlanError, match="nothing to attach"):
        rs.attach(model(), [])
