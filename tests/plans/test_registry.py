"""Names of penalties and transforms."""

import pytest
import torch

import restrain as rs
from restrain import registry
from restrain.errors import PenaltyError, PlanError
from restrain.penalties import Scaled


def test_registry():
    class Mine(rs.Penalty):
        keywords = ("my_own",)

        def __call__(self, w):
            return w.sum()

    first = Mine

    class Mine(rs.Penalty):  # a notebook cell that runs again
        def __call__(self, w):
            return w.sum()

    class Heir(first):
        pass

    assert registry.lookup("MINE") is Mine
    assert registry.lookup("my_own") is first
    assert registry.lookup("heir") is Heir
    assert registry.lookup("group_lasso") is registry.lookup("grouplasso") is rs.GroupLasso
    assert registry.name_of(rs.GroupLasso) == "grouplasso"
    assert registry.name_of(Mine) == "mine"
    assert {"l1", "dropout", "noise", "max_norm"} <= set(registry.names())
    assert not {"penalty", "scaled", "sum", "networkpenalty", "transform", "constraint"} & set(registry.names())
    for stranger in (first, Scaled, int):
        with pytest.raises(PlanError, match="name of its own"):
            registry.name_of(stranger)
    with pytest.raises(PlanError, match=r"'gruplasso' \(near it: grouplasso, group_lasso, sparsegrouplasso\)$"):
        registry.lookup("gruplasso")
    with pytest.raises(PlanError, match=r"'zzz'; there are: alpha_dropout, .* and \d+ more$"):
        registry.lookup("zzz")


def test_names_of_ours_cannot_be_taken():
    for name, keywords in (("L2", ()), ("Other", ("noise",)), ("Dropout", ())):
        with pytest.raises(PenaltyError, match="another name"):
            type(name, (rs.Penalty,), {"__call__": lambda self, w: w.sum(), "keywords": keywords})
    assert registry.lookup("l2") is rs.L2
    assert "other" not in registry.names()

    class L2(rs.L2, register=False):
        pass

    assert registry.lookup("l2") is rs.L2
    assert L2()(torch.ones(2)) == 2


def test_no_two_of_ours_have_the_same_name():
    classes = {cls for cls in map(registry.lookup, registry.names()) if cls.__module__.startswith("restrain.")}
    assert len(classes) > 60
    for cls in classes:
        assert {registry.lookup(name) for name in (cls.__name__, *vars(cls).get("keywords", ()))} == {cls}
    assert registry.lookup("spectral_norm") is rs.SpectralNorm


def test_keywords_of_the_models_are_no_names_of_penalties():
    keywords = {name for model in (rs.Classifier, rs.Regressor, rs.Autoencoder) for name in model().get_params()}
    assert keywords - set(registry.names()) == registry.RESERVED
    with pytest.raises(PenaltyError, match="'hidden' belongs to a keyword of the models"):

        class Hidden(rs.Penalty):
            def __call__(self, w):
                return w.sum()


def own_classes():
    """The library's own classes among the registered ones."""
    return {cls for cls in map(registry.lookup, registry.names()) if cls.__module__.startswith("restrain.")}


def test_no_two_classes_of_ours_claim_one_name():
    classes = own_classes()
    assert rs.SpectralNorm in classes
    for cls in classes:
        for name in (cls.__name__, *vars(cls).get("keywords", ())):
            assert registry.lookup(name) is cls, name
