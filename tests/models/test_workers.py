"""Penalties of one's own as keywords in worker processes and threads: the formula is the class's own everywhere."""

import gc
import pickle
import types
import weakref

import cloudpickle
import joblib
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_iris

import restrain as rs
from restrain import registry
from restrain.errors import PlanError

X, Y = load_iris(return_X_y=True)


def trained(model):
    """The last row of the history of a copy that is fitted."""
    return clone(model).fit(X, Y).history_[-1]


def own_classes():
    """Classes that cloudpickle sends by value, as it does those of a script or a notebook."""

    class Strong(rs.L2):
        keywords = ("very_strong",)

        def __call__(self, w):
            return 1000 * w.square().sum()

    class Direct(rs.Penalty):
        def __call__(self, w):
            return 1000 * w.square().sum()

    class L2(rs.L2, register=False):
        def __call__(self, w):
            return 1000 * w.square().sum()

    return Strong, Direct, L2


def model(**given):
    return rs.Classifier(hidden=(8,), epochs=2, batch_size=50, random_state=0, **given)


@pytest.mark.slow
def test_worker_processes_train_with_the_formula_of_the_class():
    _, _, unregistered = own_classes()
    models = [model(strong=1e-3), model(very_strong=1e-3), model(direct=1e-3)]
    models.append(model(regularizers=[1e-3 * unregistered().on(name="own")]))
    expected = [trained(one)["loss"] for one in models]
    assert expected == pytest.approx([expected[0]] * 4)
    assert expected[0] != pytest.approx(trained(model(weight_l2=1e-3))["loss"])
    tasks = [joblib.delayed(trained)(one) for one in models * 3]
    for backend in ("loky", "threading"):
        found = [row["loss"] for row in joblib.Parallel(n_jobs=2, backend=backend)(tasks)]
        assert found == pytest.approx(expected * 3)


def test_a_copy_takes_no_name_from_a_class_of_this_process():
    strong, direct, _ = own_classes()
    blob = cloudpickle.dumps([model(strong=1e-3), model(direct=1e-3), own_classes])
    for _ in range(3):
        cloudpickle.loads(blob)
        assert registry.lookup("strong") is registry.lookup("very_strong") is strong
        assert registry.lookup("direct") is direct
        assert registry.name_of(strong) == "strong"

    class Strong(rs.L2):
        """The cell of a notebook, run again: what a worker sends back is of the class before."""

    assert registry.lookup("strong") is Strong
    twin, _, _ = cloudpickle.loads(blob)
    assert registry.lookup("strong") is Strong
    assert twin.fit(X, Y).history_[-1]["strong"] == trained(model(weight_l2=1e-3))["weight_l2"]


def copy_of(cls):
    """The class as another process has it, which doesn't know the original."""
    blob = cloudpickle.dumps(cls)
    by_class = cloudpickle.cloudpickle._DYNAMIC_CLASS_TRACKER_BY_CLASS
    by_id = cloudpickle.cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID
    by_id.pop(by_class.pop(cls))
    return cloudpickle.loads(blob)


def test_a_copy_has_the_names_of_its_original(monkeypatch):
    strong, direct, unregistered = own_classes()
    kept = dict(registry._classes)
    for name in ("strong", "very_strong", "direct"):
        del kept[name]
    monkeypatch.setattr(registry, "_classes", kept)
    copies = [copy_of(cls) for cls in (strong, direct, unregistered)]
    assert registry.lookup("strong") is registry.lookup("very_strong") is copies[0]
    assert registry.lookup("direct") is copies[1]
    assert registry.lookup("l2") is rs.L2
    assert registry.name_of(copies[0]) == "strong"
    with pytest.raises(PlanError, match="register=False"):
        registry.name_of(copies[2])
    assert copies[1]()(torch.ones(2)) == 2000

    later = copy_of(strong)  # the model that was loaded last says what its keywords mean
    assert registry.lookup("strong") is later
    registry.adopt(copies[0])
    assert registry.lookup("strong") is copies[0]


def test_classes_that_cloudpickle_drops_are_not_kept():
    strong, _, _ = own_classes()
    gc.collect()
    before = len(registry._copies)
    blob = cloudpickle.dumps(strong)
    for _ in range(5):
        assert cloudpickle.loads(blob) is strong
    gc.collect()
    assert len(registry._copies) == before
    assert weakref.ref(strong)() is strong


def test_a_class_made_by_a_function_is_registered():
    body = {"__call__": lambda self, w: w.sum()}
    made = types.new_class("MadeByFunction", (rs.L2,), {}, lambda namespace: namespace.update(body))
    assert registry.lookup("madebyfunction") is made


@pytest.mark.parametrize("given", [{"hidden_dropout": 0.5}, {"input_noise": 0.5, "weight_l1": 1e-3}], ids=str)
def test_threads_draw_apart(given):
    """Each training has the numbers of its seed, and the user's generator stays where it was."""
    tasks = [joblib.delayed(trained)(model(**given).set_params(random_state=seed)) for seed in (0, 1, 0, 1, 0, 1)]
    expected = [trained(model(**given).set_params(random_state=seed)) for seed in (0, 1)]
    before = torch.get_rng_state()
    found = joblib.Parallel(n_jobs=3, backend="threading")(tasks)
    assert torch.equal(before, torch.get_rng_state())
    assert found == expected * 3
    assert expected[0] != expected[1]
    assert np.isfinite(expected[0]["loss"])


def test_models_are_pickled_beside_a_class_that_pickle_cannot_find():
    made = types.new_class("MadeBeside", (rs.L2,), {}, lambda body: body.update({"__call__": lambda self, w: w.sum()}))
    assert registry.lookup("madebeside") is made
    twin = pickle.loads(pickle.dumps(model()))
    assert type(twin) is type(model())
    with pytest.raises(pickle.PicklingError, match="MadeBeside"):  # where it is used, it has to come along
        pickle.dumps(model(madebeside=1e-3))
