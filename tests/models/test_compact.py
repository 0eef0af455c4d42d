"""`estimator.compact()`: smaller networks that predict, train on, and are saved as before."""

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError

import restrain as rs

X = np.random.default_rng(0).standard_normal((40, 6))
Y = (X[:, 0] > 0).astype(int)


def trained(cls, layers, **more):
    target = () if cls is rs.Autoencoder else ((Y,) if cls is rs.Classifier else (X[:, :2],))
    net = cls(layers, epochs=2, batch_size=10, random_state=0, progress=False, **more)
    net.train((X, *target) if target else X, **more)
    return net


def kill(net, name, units):
    with torch.no_grad():
        layer = net.module_.get_submodule(name)
        layer.weight[units] = 0


def sizes(net):
    return [layer["size"] for layer in net.layers_]


@pytest.mark.parametrize(
    ("cls", "layers", "after"),
    [
        (rs.Classifier, [6, 9, 8, 2], [6, 6, 8, 2]),
        (rs.Classifier, [6, (9, "tanh"), "batchnorm", 8, 2], [6, 6, 6, 8, 2]),
        (rs.Regressor, [6, (9, "sigmoid"), 2], [6, 6, 2]),
        (rs.Autoencoder, [6, 9, 6], [6, 6, 6]),
    ],
)
def test_units_go_and_outputs_stay(cls, layers, after, tmp_path):
    net = trained(cls, layers)
    kill(net, "hid1", [1, 4, 5])
    before = net.predict(X) if cls is not rs.Classifier else net.predict_proba(X)
    report = net.compact()
    assert sizes(net) == after
    assert report.after.parameters < report.before.parameters
    now = net.predict(X) if cls is not rs.Classifier else net.predict_proba(X)
    np.testing.assert_allclose(now, before, atol=1e-6)
    again = rs.load(net.save(tmp_path / "net"))
    assert sizes(again) == after
    np.testing.assert_array_equal(again.predict(X), net.predict(X))


def test_training_goes_on_with_the_optimizers_state():
    """As the large network with the dead units held at zero: their constant is zero."""
    nets = [trained(rs.Regressor, [6, (9, "tanh"), 2], algo="adam", precision="64") for _ in range(2)]
    for net in nets:
        with torch.no_grad():
            net.module_.hid1.weight[[1, 4, 5]], net.module_.hid1.bias[[1, 4, 5]] = 0, 0
            net.module_.out.weight[:, [1, 4, 5]] = 0
        for own in net._optimizer[1]["state"].values():  # nothing moves the dead units
            for key in ("exp_avg", "exp_avg_sq"):
                if own[key].shape[0] == 9:
                    own[key][[1, 4, 5]] = 0
                elif own[key].shape[-1] == 9:
                    own[key][:, [1, 4, 5]] = 0
    nets[1].compact()
    live = [0, 2, 3, 6, 7, 8]
    for net in nets:
        net.train((X, X[:, :2]), epochs=3)
    assert nets[1].module_.hid1.weight.shape == (6, 6)
    np.testing.assert_allclose(
        nets[1].module_.hid1.weight.detach(), nets[0].module_.hid1.weight.detach()[live], atol=1e-9
    )
    fresh = trained(rs.Regressor, [6, (9, "tanh"), 2], algo="adam", precision="64")
    fresh._optimizer = None
    assert nets[1]._optimizer[1]["state"]


def test_the_models_rules_leave_units_to_take_out():
    net = rs.Classifier([6, 30, 2], epochs=60, batch_size=40, random_state=0, progress=False, learning_rate=0.02)
    net.train(
        (X, Y),
        regularizers=(0.02 * rs.GroupLasso(per="out")).on("hid1.weight", how="proximal"),
    )
    dead = int((net.module_.hid1.weight == 0).all(1).sum())
    assert 0 < dead < 30
    before = net.predict_proba(X)
    net.compact()
    assert sizes(net)[1] == 30 - dead
    np.testing.assert_allclose(net.predict_proba(X), before, atol=1e-6)


def test_a_model_that_isnt_fitted_is_told():
    with pytest.raises(NotFittedError):
        rs.Classifier([6, 9, 2]).compact()
