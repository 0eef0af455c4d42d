"""Plans that can't be: what has no text form, and text that is no plan, say what to write instead."""

import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import restrain as rs
from restrain.errors import HowError, PenaltyError, PlanError, SelectionError

Plan = rs.Plan


class ErrorsSet(rs.Penalty):
    """A user's penalty that keeps a setting where a plan can't see it."""

    def __init__(self, p):
        self.p = p

    def __call__(self, w):
        return w.abs().pow(self.p).sum()


class ErrorsEnergy(rs.NetworkPenalty):
    """A user's penalty on the whole network."""

    def __call__(self, parameters, outputs):
        return sum(h.square().mean() for h in outputs.values())


# What can't be written


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rs.L1().on(lambda name, p: True), "predicate.*attach the plan"),
        (lambda: rs.L1().on(nn.Linear(2, 2)), "this Linear.*attach the plan"),
        (lambda: rs.L1().on(nn.Parameter(torch.ones(2))), r"Parameter of shape \(2,\)"),
        (lambda: rs.L1().on(rs.weights - (lambda name, p: True)), "predicate"),
        (lambda: rs.L1().on(rs.outputs(lambda name, module: True)), "predicate"),
        (lambda: rs.L1().on(re.compile("A", re.IGNORECASE)), "re.compile"),
        (lambda: rs.L1().on(rs.outputs("a", via=lambda h: h)), "via=.*torch.nn.functional"),
        (lambda: rs.L1().on(rs.outputs("a", via=nn.ReLU())), "via="),
        (lambda: rs.L1().on(rs.outputs("a", via=partial(F.relu, inplace=False))), "via="),
        (lambda: rs.L1().on(rs.outputs("a", via=torch.ones(1).add)), "via="),
        (lambda: ErrorsSet(3).on("a"), "dataclass"),
        (lambda: type("Nameless", (rs.L1,), {}, register=False)().on("a"), "register=False"),
    ],
)
def test_what_has_no_text_form_says_so(make, message):
    with pytest.raises(PlanError, match=message):
        Plan.of(make()).to_dict()


BAD = [
    ("grouplaso", PlanError, r"'grouplaso' \(near it: grouplasso"),
    ("l1:much", PlanError, "strength is a number.*'much'"),
    ("l1:", PlanError, "strength"),
    ("l1:-1", PenaltyError, "zero or more"),
    ("l1:nan", PenaltyError, "finite"),
    ({"strength": 1}, PlanError, "key 'what'"),
    ({"what": "l1", "strenght": 1}, PlanError, "no strenght; it has what, strength, on"),
    ({"what": "l1", "strength": True}, PlanError, "strength is a number"),
    ({"what": "l1", "strength": None}, PlanError, "strength is a number"),
    ({"what": {"name": "dropout", "rate": 0.1}, "strength": 2, "on": {"inputs": ""}}, PlanError, "penalties"),
    ({"what": {"per": "in"}}, PlanError, "needs a 'name'"),
    ({"what": None}, PlanError, "registered name"),
    ({"what": {"name": "l1", "p": 1}}, PlanError, "l1: .*'p'"),
    ({"what": {"name": "norm"}}, PlanError, "norm: .*'p'"),
    ({"what": {"name": "grouplasso", "per": "sideways"}}, PenaltyError, "'out', 'in'"),
    ({"what": {"name": "grouplasso", "per": 1.5}}, PenaltyError, "'out', 'in'"),
    ({"what": {"sum": []}}, PlanError, "sum"),
    ({"what": {"sum": "l1"}}, PlanError, "sum"),
    ({"what": {"sum": ["l1", "l2"], "strength": 0.1}}, PlanError, "strength"),
    ({"what": {"sum": [{"what": "l1", "strenght": 0.1}, "l2"]}}, PlanError, "strenght"),
    ({"what": {"sum": ["l1", {"name": "dropout", "rate": 0.1}]}}, PlanError, "[dD]ropout"),
    ({"what": "l1", "how": "projected"}, HowError, "'loss' or 'gradient' or 'decoupled' or 'proximal'"),
    ({"what": "l1", "every": "2"}, PlanError, "whole number"),
    ({"what": "l1", "optional": "no"}, PlanError, "optional"),
    ({"what": "l1", "on": 3}, PlanError, "write a glob"),
    ({"what": "l1", "on": None}, PlanError, "write a glob"),
    ({"what": "l1", "on": []}, (PlanError, SelectionError), "write a glob|empty"),
    ({"what": "l1", "on": {"role": "scales"}}, PlanError, r"can't read.*'scales'"),
    ({"what": "l1", "on": {"type": 3}}, PlanError, "3"),
    ({"what": "l1", "on": {"regex": "("}}, PlanError, r"\("),
    ({"what": "l1", "on": {"regexp": "a"}}, PlanError, "regexp"),
    ({"what": "l1", "on": {"and": ["a"]}}, PlanError, "two or more"),
    ({"what": "l1", "on": {"and": "fc"}}, PlanError, "two or more|list"),
    ({"what": "l1", "on": {"or": 3}}, PlanError, "3"),
    ({"what": "l1", "on": {"or": ["a", {"outputs": "b"}]}}, PlanError, "all of places"),
    ({"what": "l1", "on": {"outputs": "a", "inputs": "b"}}, PlanError, "can't read"),
    ({"what": "l1", "on": {"outputs": "a", "vai": "relu"}}, PlanError, "no vai; it has via"),
    ({"what": "l1", "on": {"outputs": "a", "via": "os.system"}}, PlanError, "torch.nn.functional.*'os.system'"),
    ({"what": "l1", "on": {"outputs": "a", "via": "_C"}}, PlanError, "'_C'"),
    ({"what": "l1", "on": {"outputs": "a", "via": "hub"}}, PlanError, "'hub'"),
    ({"what": "l1", "on": {"outputs": "a", "via": 3}}, PlanError, "3"),
    ({"what": "l1", "on": {"outputs": "a", "calls": "last"}}, (PlanError, SelectionError), "'mean' or 'sum'"),
    ({"what": "l1", "on": {"outputs": []}}, (PlanError, SelectionError), "outputs|empty"),
    ({"what": "l1", "on": "a", "outputs": {"outputs": "b"}}, PlanError, "NetworkPenalty"),
    ({"what": "errorsenergy", "on": "a", "outputs": "b"}, PlanError, "rs.outputs"),
    ({"rules": [], "version": 2}, PlanError, "of version 2, and this library reads up to version 1: pip install"),
    ({"rules": [], "version": "1"}, PlanError, "version of a plan is a whole number"),
    ({"version": 7, "what": "l1"}, PlanError, "of version 7"),
    ({"rules": "l1"}, PlanError, "'rules': "),
    ({"rules": None}, PlanError, "'rules': "),
    (3, PlanError, "expected rules"),
    ([3], PlanError, "expected rules"),
]


@pytest.mark.parametrize(("given", "error", "message"), BAD, ids=lambda case: str(case)[:60])
def test_what_is_no_plan_says_what_to_write(given, error, message):
    with pytest.raises(error, match=message):
        Plan.of(given)


@pytest.mark.parametrize(
    ("name", "text"), [("a.yaml", ""), ("a.yaml", "- what: l1"), ("a.json", "[]"), ("a.json", "null")]
)
def test_files_that_hold_no_plan(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(PlanError, match="'rules'"):
        Plan.load(tmp_path / name)


def test_files_of_other_kinds(tmp_path):
    (tmp_path / "plan.ini").write_text("")
    with pytest.raises(PlanError, match=r"\.toml.*'plan.ini'"):
        Plan.load(tmp_path / "plan.ini")
    with pytest.raises(PlanError, match=r"\.toml.*'plan.txt'"):
        Plan().save(tmp_path / "plan.txt")
    assert not (tmp_path / "plan.txt").exists()


def test_a_rule_that_cant_be_written_leaves_the_file_alone(tmp_path):
    path = tmp_path / "plan.json"
    Plan.of("l1").save(path)
    with pytest.raises(PlanError):
        Plan.of(rs.L1().on(lambda name, p: True)).save(path)
    assert len(Plan.load(path)) == 1


def test_types_are_matched_by_name_and_never_imported():
    code = """if True:
        import sys, torch, restrain as rs
        before = set(sys.modules)
        for name in ("antigravity", "this.Linear", "tabnanny"):
            plan = rs.Plan.of({"what": "l1", "on": {"type": name}})
            try:
                rs.attach(torch.nn.Linear(2, 2), plan)
            except rs.errors.SelectionError as error:
                assert name in str(error) and "'weight'" in str(error), error
            else:
                raise AssertionError(name)
        new = {m.split(".")[0] for m in set(sys.modules) - before}
        print(sorted(new & {"antigravity", "this", "tabnanny"}))
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_users_type_is_matched_by_its_name():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

    net = nn.Sequential(Linear(), nn.Linear(2, 2))
    with rs.attach(net, {"what": "l1", "on": {"type": "Linear"}}) as reg:
        assert reg.plan.to_dict()["rules"][0]["on"] == ["0.scale", "1.weight", "1.bias"]
    with rs.attach(net, rs.L1().on(nn.Linear)) as reg:
        assert reg.plan.to_dict()["rules"][0]["on"] == ["1.weight", "1.bias"]
