"""Everything that version 0.1 saved is read, and goes on as it did there; `tests/data/v0_1/make.py` says what there is.

The numbers are those of one machine. Others round otherwise, which weights of a few steps hardly show.
"""

import inspect
import json
import pickle
import shutil

import pytest
import torch

import restrain as rs
from version_0_1 import commands, models, pickles, plans, states, trainers
from version_0_1.common import DATA, assert_near, digests, unpack

EXPECTED = json.loads((DATA / "expected.json").read_text())
PINNED = json.loads((DATA / "pickles" / "pinned.json").read_text())
# 0.2 reads old names of settings, and says what they are called now
pytestmark = pytest.mark.filterwarnings("ignore::restrain.errors.RestrainDeprecationWarning")
quiet = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


def each(names):
    return pytest.mark.parametrize("name", names)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The files as version 0.1 wrote them, in a folder that it has never seen."""
    return unpack(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def own(saved, tmp_path):
    """A copy of a file that will be written to."""

    def copied(name):
        return shutil.copy(saved / name, tmp_path)

    return copied


# Plans


@each(sorted(path.name for path in (DATA / "plans").glob("*.*") if path.stem in plans.FAMILIES))
def test_plans_in_files(saved, monkeypatch, name):
    monkeypatch.chdir(saved / "plans")  # where some of them name a file of tensors
    family = name.partition(".")[0]
    plan = rs.Plan.load(name)
    assert plan.to_dict() == rs.Plan.of(plans.FAMILIES[family]()).to_dict()
    if family == plans.DRAWN:
        assert_near(plans.spread(plan), EXPECTED[f"plans/{family}"], rtol=0.1)
    else:
        assert_near(plans.outcome(family, plan), EXPECTED[f"plans/{family}"])


def test_each_family_is_in_each_kind_of_file():
    found = {path.name for path in (DATA / "plans").glob("*.*")}
    wanted = {f"{family}.{kind}" for family in plans.FAMILIES for kind in ("yaml", "toml", "json")}
    assert wanted - found == {"nulls.toml"}  # version 0.1 can't write it


@each(plans.BY_HAND)
def test_plans_as_texts_and_dicts(name):
    assert_near(plans.outcome("selections", plans.BY_HAND[name]), EXPECTED["plans/by hand"][name])


def test_a_plan_that_a_person_wrote(saved, monkeypatch):
    monkeypatch.chdir(saved / "plans")
    assert_near(plans.outcome("entrywise", rs.Plan.load("by_hand.yaml")), EXPECTED["plans/by hand"]["file"])


# Trainings in loops of one's own


@each(states.CASES)
def test_states_of_attachments(saved, name):
    state = torch.load(saved / "states" / f"{name}.pt", weights_only=True)
    training, anew = states.Training.of(name), states.Training.of(name)
    with training.reg, anew.reg:
        assert_near(training.load(state).resumed(), EXPECTED[f"states/{name}"])
        with pytest.raises(AssertionError, match="instead of"):  # the rules' part is needed
            assert_near(anew.load(state, rules=False).resumed(), EXPECTED[f"states/{name}"])


# Keyword models


@each(models.MODELS)
def test_saved_models(saved, name):
    model = rs.load(saved / "models" / f"{name.replace(' ', '_')}.safetensors")
    assert_near(models.known(name, model), EXPECTED[f"models/{name}"], rtol=1e-4, atol=1e-6)


@each([pytest.param(name, marks=[pytest.mark.slow] * (name == "compiled")) for name in models.FITS])
def test_fits_go_on_from_their_checkpoint(own, name):
    found = models.fitted(name, own(f"checkpoints/{name}.pt"))
    assert found["epochs"] == (1 if name == "recorded" else 3)  # which those before didn't have to be
    assert_near(found, EXPECTED[f"checkpoints/{name}"], rtol=1e-4, atol=1e-6)


# Other people's trainers


@quiet
def test_a_checkpoint_of_lightning(saved):
    pytest.importorskip("lightning.pytorch")
    assert_near(
        trainers.lightning()(4, saved / "trainers" / "lightning.ckpt"), EXPECTED["trainers/lightning"], rtol=1e-4
    )


@quiet
def test_a_checkpoint_of_hugging_faces_trainer(saved, tmp_path):
    pytest.importorskip("transformers")
    model = trainers.huggingface()(4, tmp_path, saved / "trainers" / "huggingface")
    assert_near(digests(model), EXPECTED["trainers/huggingface"], rtol=1e-4)


@quiet
@each(["a checkpoint", "a pickle"])
def test_skorch(saved, tmp_path, name):
    pytest.importorskip("skorch")
    x, y = trainers.X.numpy(), trainers.Y.numpy()
    if name == "a pickle":
        net = pickle.loads((saved / "pickles" / "skorch.pkl").read_bytes()).partial_fit(x, y)
    else:
        folder = shutil.copytree(saved / "trainers" / "skorch", tmp_path / "skorch")
        net = trainers.skorch()(2, folder).fit(x, y)
    assert_near(digests(net.module_), EXPECTED["trainers/skorch"], rtol=1e-4)


# Pickles


def unpickled(saved, name):
    return pickle.loads((saved / "pickles" / f"{name}.pkl").read_bytes())


def test_pickles_of_every_penalty_transform_strength_and_selection(saved):
    found, wanted = unpickled(saved, "catalogue"), pickles.catalogue()
    assert {kind: [*map(repr, members)] for kind, members in found.items()} == {
        kind: [*map(repr, members)] for kind, members in wanted.items()
    }
    assert all(type(a) is type(b) for kind in wanted for a, b in zip(found[kind], wanted[kind], strict=True))
    assert found["penalties"] == wanted["penalties"]
    w = torch.tensor([[0.5, -2.0]])
    assert [p(w) for p in found["algebra"][:3]] == [p(w) for p in wanted["algebra"][:3]]


def test_the_catalogue_is_whole():
    bases = (rs.Penalty, rs.NetworkPenalty, rs.Constraint, rs.Noise, rs.Reparametrization, rs.Transform)
    there = {type(member) for kind in ("penalties", "transforms") for member in pickles.catalogue()[kind]}
    public = {getattr(rs, name) for name in rs.__all__}
    acting = {kind for kind in public if inspect.isclass(kind) and callable(getattr(kind, "on", None))}
    since = acting - there - set(bases)  # what later versions have added
    assert len(there) == 65
    assert not since or rs.__version__ != "0.1.0", since


@each(plans.FAMILIES)
def test_pickles_of_plans(saved, monkeypatch, name):
    monkeypatch.chdir(saved / "plans")
    plan = unpickled(saved, "plans")[name]
    assert plan.to_dict() == rs.Plan.of(plans.FAMILIES[name]()).to_dict()
    if name != plans.DRAWN:
        assert_near(plans.outcome(name, plan), EXPECTED[f"plans/{name}"])


def test_pickles_of_an_attachment_and_of_its_plan(saved):
    model, reg = pickles.attached()
    with reg:
        assert reg.model is model
        bound, attachment = unpickled(saved, "bound"), unpickled(saved, "attachment")
        assert list(map(repr, bound)) == list(map(repr, attachment.plan)) == list(map(repr, reg.plan))
        with pytest.raises(rs.errors.DetachedError):
            attachment.values()
    other, twin = pickles.attached()
    twin.detach()
    with rs.attach(other, bound, torch.optim.SGD(other.parameters(), lr=0.1)) as again:
        assert list(again.strengths().values()) == pytest.approx([1e-4])


@each(["pickle", "torch.save"])
def test_a_model_that_was_pickled_under_rules_is_plain(saved, name):
    path = saved / "pickles" / "model"
    loaded = torch.load(f"{path}.pt", weights_only=False) if name == "torch.save" else unpickled(saved, "model")
    assert_near(pickles.trained(loaded, "l2:1e-2"), EXPECTED["pickles/model"])


def test_layers_that_declare_rules(saved):
    loaded, made = unpickled(saved, "declaring"), pickles.declaring()
    assert_near(digests(loaded), EXPECTED["pickles/declaring"])
    plan = {}
    for name, model in (("loaded", loaded), ("made", made)):
        with rs.attach(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)) as reg:
            plan[name] = reg.plan.to_dict()
    assert plan["loaded"] == plan["made"]
    assert len(plan["made"]["rules"]) == 5


@each(["layers", "rules", "autoencoder", "batch norm", "sequences", "labels of steps"])
def test_pickles_of_estimators(saved, name):
    model = unpickled(saved, "estimators")[name]
    assert_near(models.known(name, model), EXPECTED[f"models/{name}"], rtol=1e-4, atol=1e-6)


@each(["a pickle", "a state"])
def test_scales(saved, name):
    found = unpickled(saved, "scales")
    if name == "a state":
        states = torch.load(saved / "pickles" / "scales.pt", weights_only=True)
        found = {"standardize": rs.Standardize(), "robust": rs.RobustScale()}
        for key, scale in found.items():
            scale.load_state_dict(states[key])
    assert_near(pickles.scaled(found), EXPECTED["pickles/scales"])


@each(PINNED)
def test_the_names_that_pickles_refer_to(saved, name):
    if name == "skorch":
        pytest.importorskip("skorch")
    _, asked = pickles.read((saved / "pickles" / f"{name}.pkl").read_bytes())
    assert asked == PINNED[name]


# The command line


@each(commands.PREDICTS)
def test_models_of_the_command_line(saved, monkeypatch, capsys, name):
    monkeypatch.chdir(saved / "cli")
    commands.run("predict", f"{name}/", "new.csv", *commands.PREDICTS[name])
    assert_near(commands.table(capsys.readouterr().out), EXPECTED[f"cli/{name}"], rtol=1e-4, atol=1e-6)
    commands.run("explain", f"{name}/")
    assert "hid1" in capsys.readouterr().out


def test_a_killed_command_goes_on(saved, tmp_path, monkeypatch, capsys):
    shutil.copytree(saved / "cli", tmp_path / "cli")
    monkeypatch.chdir(tmp_path / "cli")
    (tmp_path / "cli" / "resumed").mkdir()
    shutil.move("checkpoint.pt", "resumed")
    commands.fit("resumed")
    capsys.readouterr()
    commands.run("predict", "resumed/", "new.csv")
    assert_near(commands.table(capsys.readouterr().out), EXPECTED["cli/resumed"], rtol=1e-4, atol=1e-6)
