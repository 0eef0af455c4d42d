"""Paths of any model: points against scikit-learn, warm starts, choice, files, refusals."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso
from torch import nn
from torch.nn import functional as F

import restrain as rs
from restrain.errors import FileError, MissingFileError, OptimizerError, PenaltyError, PlanError
from restrain.paths import Path, within_one_error

RNG = np.random.default_rng(0)
x = RNG.standard_normal((90, 12))
y = x[:, :4].sum(1) + RNG.standard_normal(90)
X, Y, V, U = (torch.from_numpy(a) for a in (x[:60], y[:60, None], x[60:], y[60:, None]))
RULE = rs.L1().on("weight", how="proximal")


def loss(model):
    return (model(X) - Y).square().mean() / 2


def score(model):
    return -(model(V) - U).square()[:, 0]


def fit(model, reg, steps=150):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    reg.use(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        reg.loss(loss(model)).backward()
        optimizer.step()


def linear():
    torch.manual_seed(0)
    return nn.Linear(12, 1).double()


def path(model=None, rules=RULE, fit=fit, **given):
    given = {"loss": loss, "score": score, "points": 6, "ratio": 1e-2, "random_state": 0, **given}
    return rs.path(linear() if model is None else model, rules, fit, **given)


def rows_of(found):
    """Numbers of all points as text, in which NaN is NaN."""
    return [repr(point.row) for point in found.points]


@pytest.mark.parametrize("direction", ["up", "down", "both"])
def test_every_point_is_the_lasso_of_scikit_learn(direction):
    found = path(direction=direction, fit=lambda model, reg: fit(model, reg, 400), certificate=True)
    ways = [point.direction for point in found.points]
    assert ways == {"up": ["up"] * 6, "down": ["down"] * 6, "both": ["up"] * 6 + ["down"] * 6}[direction]
    strengths = [point.strength for point in found.points[:6]]
    assert strengths == sorted(strengths, reverse=direction == "down")
    assert max(strengths) / min(strengths) == pytest.approx(100)
    for point in found.points:
        best = Lasso(alpha=point.strength, tol=1e-12, max_iter=100_000).fit(x[:60], y[:60])
        w = found.model(point).weight.detach().numpy()[0]
        np.testing.assert_allclose(w, best.coef_, atol=1e-6)
        assert point.selected == np.count_nonzero(best.coef_)
        assert found.selected(point)["weight"][:, 1].tolist() == np.flatnonzero(best.coef_).tolist()
        assert point.residual < 1e-6
        assert point.score == pytest.approx(-np.square(best.predict(x[60:]) - y[60:]).mean(), rel=1e-6)
    point = found[2]
    wrong = Lasso(alpha=1.001 * point.strength, tol=1e-12).fit(x[:60], y[:60]).coef_
    assert np.abs(found.model(point).weight.detach().numpy()[0] - wrong).max() > 1e-6


def test_the_model_is_as_it_was():
    model = linear()
    model.eval()
    before, seed = [p.clone() for p in model.parameters()], torch.get_rng_state()
    path(model, points=3)
    assert all(map(torch.equal, before, model.parameters()))
    assert not model.training
    assert not model._forward_hooks
    assert torch.equal(torch.get_rng_state(), seed)

    def broken(model, reg):
        fit(model, reg, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        path(model, fit=broken)
    assert all(map(torch.equal, before, model.parameters()))


def test_warm_starts_begin_where_the_point_before_ended():
    begun, ended = [], []

    def watched(model, reg):
        begun.append(model.weight.detach().clone())
        fit(model, reg, 5)
        ended.append(model.weight.detach().clone())

    path(fit=watched, points=4, polish=False)
    assert len(begun) >= 4
    assert all(map(torch.equal, begun[1:], ended))
    begun.clear()
    path(fit=watched, points=3, direction="down")
    assert begun[0].count_nonzero() == 0


def test_seeds_of_points_do_not_depend_on_what_came_before():
    drawn = []

    def noisy(model, reg):
        drawn.append(torch.rand(1).item())
        fit(model, reg, 2)

    path(fit=noisy, points=3)
    first = drawn.copy()
    drawn.clear()
    torch.rand(7)
    path(fit=noisy, points=3)
    assert drawn == first
    assert len(set(first)) == len(first)


def test_running_statistics_are_carried_on():
    model = nn.Sequential(nn.Linear(12, 1), nn.BatchNorm1d(1)).double()
    found = path(model, rs.L1().on("0.weight", how="proximal"), lambda m, reg: fit(m, reg, 3), points=3)
    counts = [int(found.model(point)[1].num_batches_tracked) for point in found.points]
    assert counts == [3 * (k + 2) for k in range(len(counts))]
    assert int(model[1].num_batches_tracked) == 0


def test_the_way_up_goes_on_until_all_is_zero():
    """Too few steps leave groups at the greatest strength."""
    found = path(fit=lambda m, reg: fit(m, reg, 1), points=4)
    assert len(found) > 4
    assert found.points[-1].selected == 0
    assert all(point.selected for point in found.points[:-1])
    assert found.points[4].strength > found.greatest.strength


def test_given_strengths_and_rules_without_zeros():
    found = path(rules=rs.L2().on("weight"), strengths=[0.1, 1.0, 0.01])
    assert [point.strength for point in found.points] == [0.01, 0.1, 1.0]
    w = found.model(2).weight.detach().numpy()[0]
    xc, yc = x[:60] - x[:60].mean(0), y[:60] - y[:60].mean()
    np.testing.assert_allclose(w, np.linalg.solve(xc.T @ xc / 60 + 2 * np.eye(12), xc.T @ yc / 60), atol=1e-8)
    assert found.greatest.found == "given"


def test_optimizer_and_patience():
    seen = []

    def given(model, reg, optimizer):
        seen.append(optimizer)
        reg.use(optimizer)
        for _ in range(50):
            optimizer.zero_grad()
            reg.loss(loss(model)).backward()
            optimizer.step()

    found = path(fit=given, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.2), patience=2, points=8)
    best = found.best().index
    assert len(found) == best + 3
    assert len({id(one) for one in seen}) == len(seen)


# ---------------------------------------------------------------- refit and choice


def test_refits_are_least_squares_on_the_support():
    found = path(refit=True, points=4, fit=lambda m, reg: fit(m, reg, 400))
    for point in found.points:
        where = found.selected(point)["weight"][:, 1].numpy()
        w = found.model(point).weight.detach().numpy()[0]
        xc, yc = x[:60][:, where] - x[:60][:, where].mean(0), y[:60] - y[:60].mean()
        np.testing.assert_allclose(w[where], np.linalg.lstsq(xc, yc, rcond=None)[0], atol=1e-6)
        assert np.count_nonzero(w) == len(where)
    again = path(points=4, fit=lambda m, reg: fit(m, reg, 400))
    model, value = again.refit(1)
    np.testing.assert_allclose(model.weight.detach(), found.model(1).weight.detach(), atol=1e-8)
    assert value == pytest.approx(found[1].score)
    assert again[1].score == found[1].shrunk_score


def test_one_standard_error_by_paired_differences():
    found = path(points=8)
    scores = np.stack([point.scores.numpy() for point in found.points])
    best = scores.mean(1).argmax()
    assert found.best().index == best
    differences = scores[best] - scores
    near = differences.mean(1) <= differences.std(1, ddof=1) / 30**0.5
    fewest = min(np.flatnonzero(near), key=lambda k: (found[k].selected, -found[k].strength))
    assert found.one_se().index == fewest
    with pytest.raises(PlanError, match="one a sample"):
        path(score=lambda m: float(score(m).mean())).one_se()
    with pytest.raises(PlanError, match="two scores or more"):
        path(points=2, score=lambda m: score(m)[:1]).one_se()
    calls = []
    with pytest.raises(PlanError, match="got 28 and 29 of them"):
        path(points=2, direction="down", score=lambda m: calls.append(1) or score(m)[len(calls) :]).one_se()


def within_one_error_in_loops(scores):
    """Points whose mean difference from one of the best is at most its standard error."""
    near = set()
    for best in (row for row in scores if sum(row) == max(map(sum, scores))):
        for k, row in enumerate(scores):
            d = [a - b for a, b in zip(best, row, strict=True)]
            mean = sum(d) / len(d)
            error = (sum((one - mean) ** 2 for one in d) / (len(d) - 1) / len(d)) ** 0.5
            near |= {k} if mean <= error else set()
    return near


@pytest.mark.parametrize("seed", range(5))
def test_the_rule_of_one_standard_error_in_loops(seed):
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(8)  # what samples have in common doesn't count in pairs
    scores = 5 * common + 0.3 * rng.standard_normal((12, 8)) - 0.1 * np.arange(12)[:, None]
    scores[rng.integers(12)] = scores[rng.integers(12)]  # some equals
    found = set(within_one_error(torch.from_numpy(scores)).nonzero()[:, 0].tolist())
    assert found == within_one_error_in_loops(scores.tolist())
    assert 0 < len(found) < 12
    unpaired = scores.mean(1) >= scores.mean(1).max() - scores[scores.mean(1).argmax()].std(ddof=1) / 8**0.5
    assert found != set(np.flatnonzero(unpaired).tolist())


def test_ridge_paths_have_a_sparsest_point_too():
    """All points have as many groups: the greatest strength is the simplest."""
    found = path(rules=rs.L2().on("weight"), strengths=np.geomspace(1e-4, 1e-2, 5).tolist())
    near = within_one_error(torch.stack([point.scores for point in found.points]))
    assert near.sum() > 1
    assert found.one_se().strength == max(found[k].strength for k in near.nonzero()[:, 0].tolist())


# ---------------------------------------------------------------- gradual removal


def least_squares(where):
    """Weights of least squares on some columns, and zeros."""
    w = np.zeros(12)
    xc, yc = x[:60][:, where] - x[:60][:, where].mean(0), y[:60] - y[:60].mean()
    w[where] = np.linalg.lstsq(xc, yc, rcond=None)[0]
    return w


def removed_in_loops(counts):
    """Weights after each removal: least squares on the largest entries of the ones before."""
    where, found = np.arange(12), []
    for count in counts:
        w = least_squares(where)
        where = np.sort(np.argsort(-np.abs(w), kind="stable")[:count])
        found.append(least_squares(where))
    return found


def test_gradual_removal_by_hand():
    found = path(direction="removal", points=6, ratio=0.1, fit=lambda m, reg: fit(m, reg, 400), certificate=True)
    parts = [0.1 + 0.9 * (1 - k / 5) ** 3 for k in range(6)]
    counts = sorted({max(1, round(12 * part)) for part in parts}, reverse=True)
    assert [point.selected for point in found.points] == counts == [12, 7, 4, 2, 1]
    assert [point.strength for point in found.points] == [1 - count / 12 for count in counts]
    for point, w in zip(found.points, removed_in_loops(counts), strict=True):
        np.testing.assert_allclose(found.model(point).weight.detach().numpy()[0], w, atol=1e-8)
        assert point.residual < 1e-6
    other = removed_in_loops([12, 1])[-1]
    assert np.abs(other - removed_in_loops(counts)[1]).max() > 0.1  # the oracle at other counts
    assert found.greatest.found == "removal"
    assert "gradual removal" in str(found)
    assert {point.direction for point in found.points} == {"removal"}


def test_counts_of_gradual_removal():
    found = path(direction="removal", strengths=[0.5, 2, 1.0, 1, 100])
    assert [point.selected for point in found.points] == [12, 6, 2, 1]
    for wrong in ([], [0], [1.5], ["a"], 3, [True]):
        with pytest.raises(PlanError, match="how many groups are kept"):
            path(direction="removal", strengths=wrong)
    with pytest.raises(PlanError, match="leave refit= out"):
        path(direction="removal", refit=True)


@pytest.mark.parametrize("name", ["refit", "polish", "progress"])
def test_flags_are_true_or_false(name):
    with pytest.raises(PlanError, match=f"{name}= is True or False, got 'no'"):
        path(**{name: "no"})
    for wrong in ("all", 1, None):
        with pytest.raises(PlanError, match="certificate= is 'chosen', True"):
            path(certificate=wrong)


# ---------------------------------------------------------------- certificates


def with_certificate(found):
    """Numbers of the points with a loss and a residual."""
    assert all(np.isnan(point.loss) == np.isnan(point.residual) for point in found.points)
    return {point.index for point in found.points if not np.isnan(point.residual)}


WAYS = {
    "up": {},
    "both": {"direction": "both", "refit": True},
    "removal": {"direction": "removal", "fixed": 0.01 * rs.L1().on("weight", how="proximal")},
}


@pytest.mark.parametrize("way", WAYS)
def test_certificates_of_chosen_points_and_on_demand(way, tmp_path):
    few = lambda m, reg: fit(m, reg, 5)  # noqa: E731
    all_of_them = path(fit=few, certificate=True, **WAYS[way])
    found = path(fit=few, folder=tmp_path / "path", **WAYS[way])
    assert with_certificate(all_of_them) == set(range(len(found)))
    assert with_certificate(found) == {0, found.best().index, found.one_se().index} < with_certificate(all_of_them)
    assert with_certificate(path(fit=few, certificate=False, **WAYS[way])) == set()
    for own, other in zip(found.points, all_of_them.points, strict=True):
        cert = found.certificate(own)
        assert (cert.loss, cert.residual) == pytest.approx((other.loss, other.residual), rel=1e-12)
        assert np.isnan(own.residual) or (own.loss, own.residual) == (cert.loss, cert.residual)
        assert own.score == other.score
        if not WAYS[way].get("refit"):
            assert cert.loss == pytest.approx(loss(found.model(own)).item(), rel=1e-12)
    assert len({round(found.certificate(k).residual, 9) for k in range(len(found))}) > 2
    loaded = Path.load(tmp_path / "path", linear())
    assert rows_of(loaded) == rows_of(found)
    with pytest.raises(PlanError, match="doesn't know loss"):
        loaded.certificate()


def test_tables_leave_out_what_was_not_taken():
    found = path(points=5)
    rows = {k: str(found).splitlines()[2 + k].split() for k in range(1, len(found))}
    assert {len(row) for k, row in rows.items() if k not in with_certificate(found)} == {6}
    assert {len(row) for k, row in rows.items() if k in with_certificate(found)} == {8}
    assert found.to_frame()["residual"].notna().sum() == len(with_certificate(found)) < len(found)


def test_the_loss_is_called_as_often_for_more_points():
    """But for the certificates of the chosen points: two calls of the first, then one of each."""
    for given, each in (({}, 0), ({"certificate": True}, 1)):
        counts = []
        for points in (4, 9):
            calls = []
            counting = lambda m, calls=calls: calls.append(1) or loss(m)  # noqa: E731
            found = path(
                loss=counting, fit=lambda m, reg: fit(m, reg, 2), strengths=np.geomspace(0.01, 0.5, points), **given
            )
            counts.append(len(calls) - (0 if each else len(with_certificate(found))))
        assert counts[1] - counts[0] == 5 * each


def test_certificates_count_what_the_optimizer_trains():
    def partly(model, reg):
        optimizer = torch.optim.SGD([model.weight], lr=0.25)
        reg.use(optimizer)
        for _ in range(400):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()

    found = path(fit=partly, strengths=[0.01, 0.1, 0.2])
    for k in range(3):
        cert = found.certificate(k)
        assert cert.residual < 1e-6
        model = found.model(k)
        loss(model).backward()
        assert model.bias.grad.abs().max() > 1e-3


def test_rules_that_change_in_a_fit_have_certificates_at_its_end():
    moving = (rs.schedules.Linear(0.0, 1.0, steps=20) * rs.L2()).on("bias")
    found = path(points=4, fixed=moving)
    assert with_certificate(found) == set(range(len(found)))
    with pytest.raises(PlanError, match="change during a fit"):
        found.certificate(2)


def test_the_loss_is_called_in_eval_and_gradients_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    given = [torch.randn_like(p) for p in model.parameters()]
    for p, gradient in zip(model.parameters(), given, strict=True):
        p.grad = gradient
    seen = []

    def watched(m):
        seen.append(m.training)
        return loss(m)

    def first_only(m, reg):
        reg.use(torch.optim.SGD(m.parameters(), lr=0.1))

    found = path(model, rs.GroupLasso(per="in").on("0.weight", how="proximal"), first_only, loss=watched, points=3)
    assert found.greatest.found == "dual norm"
    assert seen
    assert not any(seen)
    assert model.training
    for p, gradient in zip(model.parameters(), given, strict=True):
        assert p.grad is gradient


def test_only_files_that_last_wait_for_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda *given: synced.append(given))
    path(points=3, certificate=False)
    assert not synced
    path(points=3, certificate=False, folder=tmp_path / "path")
    assert len(synced) >= 2 * 4


def test_a_random_loss_is_refused_at_the_first_point():
    with pytest.raises(PenaltyError, match="stays the same"):
        path(loss=lambda m: loss(m) * torch.rand(()), strengths=[0.1, 0.2])


def test_removal_goes_over_the_groups_of_all_tensors(tmp_path):
    """Any how, a prox isn't needed; the shortest groups of both layers together go, as TopGroups has it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    rule = rs.GroupLasso(per="in").on("*.weight")
    given = {"direction": "removal", "strengths": [17, 9, 4], "folder": tmp_path / "a", "fixed": rs.L2().on("0.bias")}
    found = path(model, rule, lambda m, reg: fit(m, reg, 20), **given)
    lengths = [
        torch.cat([w.norm(dim=0) for w in (found.model(k)[0].weight, found.model(k)[2].weight)]) for k in range(3)
    ]
    for before, after, count in ((0, 1, 9), (1, 2, 4)):
        kept = lengths[before].argsort(descending=True)[:count].sort().values
        assert lengths[after].nonzero()[:, 0].tolist() == kept.tolist()
    again = path(model, rule, lambda m, reg: pytest.fail("fitted again"), **given)
    assert again[2].score == found[2].score
    assert found.plot(tmp_path / "removal.png").stat().st_size > 10_000


def test_table_frame_and_picture(tmp_path):
    found = path(points=4, direction="both")
    assert "by dual norm" in str(found)
    frame = found.to_frame()
    assert frame.index.tolist() == list(range(len(found)))
    assert frame["selected"].tolist() == [point.selected for point in found.points]
    assert found.plot(tmp_path / "path.png").stat().st_size > 10_000
    assert "<table" in found._repr_html_()
    assert found._repr_html_().count("<tr>") == len(found) + 1


def test_groups_of_a_network_are_counted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    rule = rs.GroupLasso(per="in").on("0.weight", how="proximal")
    found = path(model, rule, lambda m, reg: fit(m, reg, 20), points=4)
    for point in found.points:
        alive = found.model(point)[0].weight.detach().abs().sum(0) > 0
        assert point.groups == 12
        assert point.selected == int(alive.sum())
        assert found.selected(point)["0.weight"].tolist() == alive.nonzero()[:, 0].tolist()


def test_refit_of_groups_holds_them_at_zero():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    per = {"in": [[0, 1, 2], [3, 4], [5, 6, 7, 8]]}  # the last three inputs are in no group
    rule = 5.0 * rs.GroupLasso(per=per).on("0.weight", how="proximal")
    found = path(model, rule, lambda m, reg: fit(m, reg, 20), points=4, refit=True)
    for point in found.points:
        alive = found.model(point)[0].weight.detach().abs().sum(0) > 0
        groups = [bool(alive[list(members)].all()) for members in per["in"]]
        assert [bool(alive[list(members)].any()) for members in per["in"]] == groups
        assert sum(groups) == point.selected
        assert alive[9:].all()
    assert found.points[-1].selected == 0


# ---------------------------------------------------------------- files


def test_a_path_goes_on_from_its_files(tmp_path):
    whole = path(folder=tmp_path / "whole")
    count = []

    def counted(model, reg):
        if len(count) == 4:
            raise RuntimeError("broken off")
        count.append(1)
        fit(model, reg)

    with pytest.raises(RuntimeError, match="broken off"):
        path(fit=counted, folder=tmp_path / "part")
    assert len(Path.load(tmp_path / "part")) == 3
    count.clear()

    def rest(model, reg):
        count.append(1)
        fit(model, reg)

    found = path(fit=rest, folder=tmp_path / "part")
    assert len(count) == len(whole) - 3
    for a, b in zip(whole.points, found.points, strict=True):
        assert torch.equal(whole.model(a).weight, found.model(b).weight)
        assert a.score == b.score
    count.clear()
    path(fit=rest, folder=tmp_path / "part")
    assert count == []


def test_save_and_load(tmp_path):
    found = path(points=3)
    found.save(tmp_path / "copy")
    loaded = Path.load(tmp_path / "copy", linear())
    assert rows_of(loaded) == rows_of(found)
    assert loaded.greatest == found.greatest
    assert torch.equal(loaded.model().weight, found.model().weight)
    assert loaded.one_se().index == found.one_se().index
    with pytest.raises(PlanError, match="without its model"):
        Path.load(tmp_path / "copy").model()
    with pytest.raises(PlanError, match="'weight' has the shape"):
        Path.load(tmp_path / "copy", torch.nn.Linear(2, 2)).model()
    with pytest.raises(PlanError, match="doesn't know fit"):
        loaded.refit()
    with pytest.raises(MissingFileError, match="no path"):
        Path.load(tmp_path / "nothing")


def test_damaged_and_other_files_are_refused(tmp_path):
    path(points=3, folder=tmp_path)
    with pytest.raises(PlanError, match="another one: grid"):
        path(points=4, folder=tmp_path)
    with pytest.raises(PlanError, match="another one: rules"):
        path(rules=2 * RULE, points=3, folder=tmp_path)
    content = (tmp_path / "point-0001.pt").read_bytes()
    (tmp_path / "point-0001.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(FileError, match="point-0001"):
        path(points=3, folder=tmp_path)


SCRIPT = """
import sys, torch, restrain as rs
from torch import nn
torch.manual_seed(0)
x = torch.randn(40, 6).double(); y = x[:, :2].sum(1, keepdim=True)
model = nn.Linear(6, 1).double()
loss = lambda m: (m(x) - y).square().mean()
def fit(m, reg):
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    reg.use(optimizer)
    for _ in range(300):
        optimizer.zero_grad(); reg.loss(loss(m)).backward(); optimizer.step()
    print("fitted", flush=True)
rs.path(model, rs.L1().on("weight", how="proximal"), fit, loss=loss, score=lambda m: 0.0, points=200,
        folder=sys.argv[1], random_state=0)
"""


def test_a_killed_path_goes_on(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ}) as run:
        for _ in range(4):
            run.stdout.readline()
        time.sleep(0.05)
        run.send_signal(signal.SIGKILL)
    found = Path.load(tmp_path)
    assert len(found) >= 3
    assert all(point.strength > 0 for point in found.points)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"points": 1}, "points="),
        ({"ratio": 1.0}, "ratio="),
        ({"direction": "sideways"}, "'both' or 'removal'"),
        ({"patience": 0}, "patience="),
        ({"strengths": [1.0, 1.0]}, "strengths="),
        ({"strengths": "12"}, "strengths="),
        ({"rules": []}, "got none"),
        ({"rules": rs.L1().on("weight")}, "how='proximal'"),
        ({"rules": rs.NonNegative().on("weight")}, "fixed="),
        ({"rules": rs.schedules.Linear(0, 1, steps=9) * rs.L1().on("weight", how="proximal")}, "a strength that moves"),
        ({"rules": rs.L1().on(rs.outputs())}, "fixed="),
        ({"rules": rs.Weighted(rs.L1(), lambda w: w.abs()).on("weight", how="proximal")}, "function"),
        ({"score": lambda m: float("nan")}, "score"),
        ({"score": lambda m: "good"}, "score"),
        ({"fit": lambda m, reg: None}, "never used reg"),
    ],
)
def test_wrong_settings_are_refused(given, match):
    with pytest.raises(PlanError, match=match):
        path(**{"points": 3, **given})


def test_random_losses_and_forgotten_optimizers_are_refused():
    with pytest.raises(PenaltyError, match="and then"):
        path(loss=lambda m: F.dropout(m(X), 0.5).square().mean())
    with pytest.raises(OptimizerError, match=r"calls reg\.use"):
        path(fit=lambda m, reg: reg.loss(loss(m)))

    def twice(model, reg):
        fit(model, reg)
        reg.use(torch.optim.SGD(model.parameters(), lr=0.1))

    with pytest.raises(PlanError, match="once"):
        path(fit=twice)
