"""Axes named by meaning where nothing tells what axes mean (A5), and settings that are ignored or not shown (A22)."""

import re

import pytest
import torch
from torch import nn

import restrain as rs
from faults.helpers import right_or_refused, sgd
from restrain.errors import RestrainError


class Experts(nn.Module):
    """Matrices (out, in) of four experts in one parameter, applied to all inputs."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x):
        return torch.einsum("eoi,bi->beo", self.experts, x)


class Decoder(nn.Module):
    """A raw decoder of a sparse autoencoder: a row for each feature."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Parameter(torch.randn(12, 5))

    def forward(self, x):
        return x @ self.decoder


# A5: meanings of axes

BY_MEANING = {
    "NM": rs.NM(2, 4),
    "MaxNorm": rs.MaxNorm(1.0, "out"),
    "UnitNorm": rs.UnitNorm("in"),
    "SpectralBall": rs.SpectralBall(0.5),
    "LowRank": rs.LowRank(1),
}
PENALTIES = {
    "GroupLasso": rs.GroupLasso("out"),
    "NuclearNorm": rs.NuclearNorm(),
    "SpectralNorm": rs.SpectralNorm(),
}


@pytest.mark.parametrize("kind", BY_MEANING)
def test_a_constraint_by_meaning_on_a_parameter_of_three_axes_that_nothing_explains_is_refused(kind):
    model = Experts()
    with pytest.raises(RestrainError, match=r"(?s)experts.*dim"):
        rs.attach(model, BY_MEANING[kind].on("experts"), sgd(model))


@pytest.mark.parametrize("kind", PENALTIES)
def test_a_penalty_by_meaning_on_a_parameter_of_three_axes_that_nothing_explains_is_refused(kind):
    model = Experts()
    with pytest.raises(RestrainError, match=r"(?s)experts.*dim"):
        rs.attach(model, PENALTIES[kind].on("experts")).penalty()


@pytest.mark.parametrize("per", ["in", "out"])
def test_a_constraint_by_meaning_on_a_raw_matrix_is_refused(per):
    model = Decoder()
    with pytest.raises(RestrainError, match=r"(?s)decoder.*dim"):
        rs.attach(model, rs.UnitNorm(per).on("decoder"), sgd(model))


def test_weights_by_role_do_not_take_a_parameter_of_three_axes_by_meaning():
    model = nn.Sequential(nn.Linear(8, 8), Experts())
    with pytest.raises(RestrainError, match=r"(?s)experts.*dim"):
        rs.attach(model, rs.MaxNorm(1.0, "out").on(rs.weights), sgd(model))


def test_dims_serve_where_nothing_explains_axes():
    model = Experts()
    rs.attach(model, rs.NM(2, 4, dim=2).on("experts"), sgd(model))
    assert ((model.experts != 0).view(4, 8, 2, 4).sum(-1) == 2).all()
    decoder = Decoder()
    rs.attach(decoder, rs.UnitNorm(0).on("decoder"), sgd(decoder))
    torch.testing.assert_close(decoder.decoder.detach().norm(dim=1), torch.ones(12))


def test_layers_explain_their_own_axes():
    model = nn.Sequential(nn.Linear(8, 4), nn.Conv1d(4, 6, 3))
    rs.attach(model, [rs.UnitNorm("in").on("0.weight"), rs.MaxNorm(0.1, "out").on("1.weight")], sgd(model))
    torch.testing.assert_close(model[0].weight.detach().norm(dim=0), torch.ones(8))
    torch.testing.assert_close(model[1].weight.detach().flatten(1).norm(dim=1), torch.full((6,), 0.1))


# A22: settings that are ignored, or left out of texts


def test_n_of_m_goes_by_its_lists_of_indices():
    w = torch.tensor([[4.0, 3.0, 1.0, 2.0]])  # of columns 0 and 2 the first is larger, of 1 and 3 the first, too
    right = torch.tensor([[4.0, 3.0, 0.0, 0.0]])
    constraint = lambda: rs.NM(1, 2, dim={"in": [[0, 2], [1, 3]]})  # noqa: E731
    right_or_refused(lambda: constraint().project(w), right)
    layer = nn.Linear(4, 1)
    with torch.no_grad():
        layer.weight.copy_(w)

    def held():
        rs.attach(layer, constraint().on("weight"), sgd(layer))
        return layer.weight.detach()

    right_or_refused(held, right)


DIFFERENT = {
    "index": (rs.outputs(index=0), rs.outputs(index=1)),
    "batch_dim": (rs.outputs("fc", batch_dim=0), rs.outputs("fc", batch_dim=1)),
    "calls": (rs.outputs("fc"), rs.outputs("fc", calls="sum")),
    "flags": (rs.L1().on(re.compile("w")), rs.L1().on(re.compile("w", re.IGNORECASE))),
    "regular expression over layers": (rs.outputs(re.compile("w")), rs.outputs(re.compile("w", re.IGNORECASE))),
}


@pytest.mark.parametrize("setting", DIFFERENT)
def test_places_and_rules_with_other_settings_have_other_texts(setting):
    one, other = DIFFERENT[setting]
    assert repr(one) != repr(other)


def test_a_rule_on_the_network_shows_its_outputs():
    class Gap(rs.NetworkPenalty):
        def __call__(self, model, outputs=None):
            return sum(p.square().sum() for p in model.parameters())

    texts = {repr(Gap().on("*", outputs=rs.outputs(name))) for name in ("0", "1")}
    assert len(texts) == 2


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(x), -3 * self.fc(x)


def test_rules_on_two_members_of_an_output_have_names_of_their_own_that_say_which():
    model = Pair()
    reg = rs.attach(model, [rs.L1().on(rs.outputs(index=i)) for i in (0, 1)])
    a, b = model(torch.ones(4, 3))
    reg.loss(a.sum() + b.sum())
    assert len({rule.label for rule in reg.plan}) == 2
    assert sorted(reg.values().values()) == pytest.approx([a.abs().sum().item() / 4, 3 * a.abs().sum().item() / 4])
    assert all(f"index={i}" in name for i, name in enumerate(reg.values()))


@pytest.mark.parametrize(
    "make",
    [
        lambda: rs.NM(1, 2, dim={"in": [[0, 1], [2, 3]]}),
        lambda: rs.GroupLasso({"in": [[0, 1], [2, 3]]}),
        lambda: rs.GroupLasso([[0, 1], [2, 3]]),
        lambda: rs.MaxNorm(1.0, {"in": [[0, 1], [2, 3]]}),
        lambda: rs.TopK(1, [[0, 1], [2, 3]]),
        lambda: rs.Weighted(rs.L1(), [1.0, 2.0]),
    ],
    ids=["NM", "GroupLasso", "GroupLasso of lists", "MaxNorm", "TopK", "Weighted"],
)
def test_what_has_lists_in_it_can_be_hashed(make):
    one, other = right_or_none(make), right_or_none(make)
    assert hash(one) == hash(other)
    assert one == other


def right_or_none(make):
    """Return what is made; None where it is refused, as lists along an axis of n of m may be."""
    try:
        return make()
    except RestrainError:
        return None
