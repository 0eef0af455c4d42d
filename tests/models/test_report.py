"""Reports of estimators, and their diagrams in notebooks."""

import html
import re

import numpy as np
import pytest
from sklearn.exceptions import NotFittedError

import restrain as rs
from report.pages import Reader

pytest.importorskip("matplotlib")

X = np.random.default_rng(0).standard_normal((60, 4))
Y = X[:, 0] + 0.1 * X[:, 1]


def titles(text):
    return re.findall(r"<h2[^>]*>([^<]*)<", text)


def test_a_report_of_a_classifier(tmp_path):
    given = {"weight_l1": {"strength": 1e-3, "how": "proximal"}, "max_norm": 2.0}
    model = rs.Classifier(hidden=(8,), epochs=4, random_state=0, progress=False, **given).fit(X, Y > 0, valid=0.3)
    before = {name: tensor.clone() for name, tensor in model.module_.state_dict().items()}
    text = model.report(tmp_path / "a.html", images=(2, 2)).read_text("utf-8")
    assert Reader(text).faults == []
    assert titles(text) == [
        "Warnings",
        "Who gets what",
        "Training",
        "Weights",
        "Learned features",
        "To do it again",
        "Environment",
    ]
    found = Reader(text)
    for caption in ("Loss", "Rules", "Accuracy"):
        assert f"{caption} in training and validation" in found.texts["figcaption"]
    assert "best epoch, " in text
    assert "Classifier(" in text
    assert "track=10" not in text
    assert all(tensor.equal(before[name]) for name, tensor in model.module_.state_dict().items())
    assert not model.module_.training


def test_a_report_without_rules(tmp_path):
    model = rs.Regressor(hidden=(3,), epochs=2, progress=False).fit(X, Y)
    text = model.report(tmp_path / "a.html", title="Mine & yours").read_text("utf-8")
    assert "<h1>Mine &amp; yours</h1>" in text
    assert "No rules: the network was trained without any." in text
    usual = rs.Regressor(hidden=(3,), progress=False, random_state=0).fit(X, Y)
    text = usual.report(tmp_path / "b.html").read_text("utf-8")
    assert "No rules, but for fit&#x27;s own: a small weight_l2" in text
    assert "trained without any" not in text
    with model.attached() as reg:
        assert reg is None


def test_rules_of_a_model_are_attached_for_a_look():
    model = rs.Regressor(hidden=(3,), epochs=1, progress=False, weight_l2=0.5).fit(X, Y)
    with model.attached() as reg:
        (value,) = reg.values().values()
    expected = 0.5 * sum(float(p.detach().square().sum()) for p in model.module_.parameters() if p.dim() > 1)
    assert value == pytest.approx(expected)
    with pytest.raises(NotFittedError), rs.Regressor().attached():
        pass


@pytest.mark.parametrize("hidden", [(), (3,)])
def test_a_report_of_a_path_has_the_inputs_names(tmp_path, hidden):
    pandas = pytest.importorskip("pandas")
    given = {} if not hidden else {"epochs": 2, "progress": False, "strengths": [0.01, 0.1]}
    model = rs.RegressorCV(hidden=hidden, points=5, cv=2, **given).fit(pandas.DataFrame(X, columns=list("abcd")), Y)
    text = model.report(tmp_path / "a.html").read_text("utf-8")
    assert titles(text)[1] == "Path"
    assert ("Training" in titles(text)) == bool(hidden)  # linear models are solved, not trained
    assert '"labels":["a","b","c","d"]' in text
    view = model.view()
    name = next(iter(view.lines))
    assert view.lines[name].shape == (len(model.path_), 4)
    assert view.strengths[view.best] == model.strength_
    assert [int(one) for one in (view.lines[name] != 0).sum(1)] == view.selected


def test_unfitted_models_have_no_report(tmp_path):
    for model in (rs.Classifier(), rs.RegressorCV()):
        with pytest.raises(NotFittedError):
            model.report(tmp_path / "a.html")


@pytest.mark.parametrize("make", [rs.Classifier, rs.Regressor, rs.Autoencoder, rs.ClassifierCV, rs.RegressorCV])
def test_scikit_learns_diagram_is_kept(make):
    text = make()._repr_html_()
    assert "sk-" in text
    assert make.__name__ in text


@pytest.mark.parametrize("make", [rs.Classifier, rs.Regressor, rs.Autoencoder, rs.RegressorCV])
def test_names_in_the_diagram_are_text(make):
    name = "<script>alert(1)</script>"
    text = make(regularizers=[rs.L1().on("*.weight", name=name)])._repr_html_()
    assert name not in text
    assert html.escape(name) in text
