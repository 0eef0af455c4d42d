"""Tracked steps: numbers against NumPy, which steps have a row, bounded memory, states, and what isn't disturbed."""

import copy
import math
import pickle
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import restrain as rs
from restrain.engine.attach import tracking
from restrain.errors import DetachedError, PlanError
from saving import saved

RULES = [
    0.02 * rs.L1().on("0.weight", how="proximal", name="l1"),
    0.5 * rs.GroupLasso(per="in").on("2.weight", how="proximal", name="groups"),
    rs.schedules.Linear(1e-2, 1e-3, steps=20) * rs.L1().on(rs.outputs("1"), name="act"),
    0.1 * rs.L2().on("0.bias", how="gradient", name="l2"),
]


def make(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)


def attached(track=None, rules=RULES, lr=0.05, seed=0):
    model = make(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return model, optimizer, rs.attach(model, rules, optimizer, track=track)


def step(model, optimizer, reg):
    x, y = data()
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    reg.loss(loss).backward()
    optimizer.step()
    return loss.item()


def numpy(tensor):
    return tensor.detach().double().numpy()


# ---------------------------------------------------------------- the numbers


def dead(w, axis):
    """The fraction of indices of an axis whose entries are all zero."""
    return np.mean([not np.take(w, i, axis).any() for i in range(w.shape[axis])])


def test_a_row_has_what_numpy_finds():
    model, optimizer, reg = attached(track=1)
    axes_differ = False
    for number in range(12):
        strength = reg.strengths()["act"]
        loss = step(model, optimizer, reg)
        row = reg.history[-1]
        first, bias, second = numpy(model[0].weight), numpy(model[0].bias), numpy(model[2].weight)
        expected = {
            "step": number + 1,
            "data_loss": loss,
            "penalties/l1": 0.02 * abs(first).sum(),
            "penalties/groups": 0.5 * math.sqrt(3) * np.sqrt((second**2).sum(0)).sum(),
            "penalties/l2": 0.1 * (bias**2).sum(),
            "strengths/l1": 0.02,
            "strengths/groups": 0.5,
            "strengths/act": strength,
            "strengths/l2": 0.1,
            "norms/0.weight": np.linalg.norm(first),
            "norms/2.weight": np.linalg.norm(second),
            "norms/0.bias": np.linalg.norm(bias),
            "zeros/0.weight": (first == 0).mean(),
            "zeros/2.weight": (second == 0).mean(),
            "zeros/0.bias": (bias == 0).mean(),
            "zero_groups/2.weight": dead(second, 1),
            "dead/0.weight": dead(first, 0),
            "dead/2.weight": dead(second, 0),
        }
        assert row.pop("penalties/act") == pytest.approx(reg.values()["act"], rel=1e-6)
        assert row == pytest.approx(expected, rel=1e-5)
        axes_differ = axes_differ or dead(second, 0) != dead(second, 1)
    assert axes_differ
    assert 0 < row["zeros/0.weight"] < 1


LAYERS = {
    "Linear": (nn.Linear(4, 6), 0),
    "Conv2d": (nn.Conv2d(4, 6, 3), 0),
    "ConvTranspose2d": (nn.ConvTranspose2d(4, 6, 3), 1),
    "Embedding": (nn.Embedding(4, 6), 1),
    "complex": (nn.Linear(4, 6, dtype=torch.complex64), 0),
    "half": (nn.Linear(4, 6, dtype=torch.bfloat16), 0),
}


@pytest.mark.parametrize("block", [2**18, 4], ids=["whole", "in blocks"])
@pytest.mark.parametrize("kind", LAYERS)
def test_dead_units_are_counted_along_the_layers_own_axis(kind, block, monkeypatch):
    monkeypatch.setattr(tracking, "_BLOCK", block)
    layer, axis = copy.deepcopy(LAYERS[kind][0]), LAYERS[kind][1]
    model = nn.Sequential(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0 if kind == "half" else 1e-30)
    reg = rs.attach(model, rs.L2().on("0.weight"), optimizer, track=1)
    with torch.no_grad():
        layer.weight.index_fill_(axis, torch.tensor([1, 3, 4]), 0)
        layer.weight.index_fill_(1 - axis, torch.tensor([0]), 0)
        layer.weight.select(axis, 2).mul_(1e-30)  # small, which isn't zero: squares would vanish
    optimizer.param_groups[0]["lr"] = 1e-30
    reg.loss(layer.weight.abs().sum() * 0).backward()
    optimizer.step()
    w = layer.weight.detach()
    found = (w != 0).movedim(axis, 0).flatten(1).any(1)
    assert reg.history[-1]["dead/0.weight"] == pytest.approx(float((~found).double().mean())) == pytest.approx(0.5)
    assert reg.history[-1]["zeros/0.weight"] == pytest.approx(float((w == 0).double().mean()))
    assert reg.history[-1]["norms/0.weight"] == pytest.approx(float(w.to(torch.complex128).abs().square().sum() ** 0.5))


GROUPS = {
    "lists": ([[0, 1], [2, 4]], lambda w: [w[[0, 1]], w[[2, 4]]]),
    "blocks": ((3, 2), lambda w: [w[i : i + 3, j : j + 2] for i in (0, 3) for j in (0, 2)]),
    "in": ("in", lambda w: list(w.T)),
}


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("what", ["penalty", "constraint"])
def test_zero_groups_are_those_of_the_rule(kind, what):
    per, parts = GROUPS[kind]
    model = nn.Sequential(nn.Linear(4, 6))
    rule = 1e-9 * rs.GroupLasso(per=per) if what == "penalty" else rs.MaxNorm(100.0, per=per)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
    reg = rs.attach(model, rule.on("0.weight"), optimizer, track=1)
    with torch.no_grad():
        model[0].weight[:3, :2] = 0
        model[0].weight[:, 0] = 0
    reg.loss(model(torch.zeros(1, 4)).sum()).backward()
    optimizer.step()
    groups = parts(numpy(model[0].weight))
    expected = np.mean([not part.any() for part in groups])
    assert expected > 0 or kind == "lists"
    assert reg.history[-1]["zero_groups/0.weight"] == pytest.approx(expected)


def test_shares_are_of_the_gradients_that_a_step_leaves():
    model, optimizer, reg = attached()
    reg.track(1, shares=True)
    x, y = data()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    bias, rest = numpy(model[0].bias), numpy(model[0].bias.grad)
    optimizer.zero_grad()
    step(model, optimizer, reg)
    after = numpy(model[0].bias)
    assert not np.allclose(bias, after)
    own = np.linalg.norm(0.2 * after)  # at the weights after the step, as for targets
    rest = np.linalg.norm(rest + 0.2 * bias - 0.2 * after + _act_gradient())
    assert reg.history[-1]["shares/l2"] == pytest.approx(own / (own + rest), rel=1e-4)
    assert "shares/act" not in reg.history.columns


def _act_gradient():
    model, _optimizer, reg = attached()
    x, _ = data()
    reg.loss(model(x).sum() * 0).backward()
    return numpy(model[0].bias.grad)


# ---------------------------------------------------------------- which steps have a row


def test_one_row_for_each_kth_step_and_the_mean_loss_of_its_micro_batches():
    model, optimizer, reg = attached(track=2)
    x, y = data()
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        halves = [F.cross_entropy(model(part), target) for part, target in zip(x.split(4), y.split(4), strict=True)]
        for half in halves:
            (reg.loss(half) / 2).backward()
        optimizer.step()
        losses.append(np.mean([half.item() for half in halves]))
    assert reg.history["step"] == [2, 4]
    assert reg.history["data_loss"] == pytest.approx(losses[1::2], rel=1e-6)
    optimizer.zero_grad()
    for part, target in zip(x.split(4), y.split(4), strict=True):  # the same, divided before
        reg.loss(F.cross_entropy(model(part), target) / 2, share=0.5).backward()
    expected = F.cross_entropy(model(x), y).item()
    optimizer.step()
    assert reg.history[-1]["data_loss"] == pytest.approx(expected, rel=1e-6)


def test_steps_that_move_nothing_and_other_models_steps_have_none():
    model, optimizer, reg = attached(track=1)
    other = make(1)
    others = torch.optim.SGD(other.parameters(), lr=0.1)
    step(model, optimizer, reg)
    other(data()[0]).sum().backward()
    others.step()
    optimizer.param_groups[0]["lr"] = 0.0
    step(model, optimizer, reg)
    assert reg.history["step"] == [1]
    optimizer.param_groups[0]["lr"] = 0.1
    with torch.no_grad():
        reg.loss(F.cross_entropy(model(data()[0]), data()[1]) + 100)  # a validation loss
    with pytest.raises(ZeroDivisionError):
        step(model, optimizer, None if 1 / 0 else reg)
    expected = step(model, optimizer, reg)
    assert reg.history["step"] == [1, 2]
    assert reg.history[-1]["data_loss"] != pytest.approx(expected + 50)


def test_without_a_loss_the_loss_is_nan():
    model, optimizer, reg = attached(track=1, rules=RULES[3])
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    optimizer.step()
    assert math.isnan(reg.history[-1]["data_loss"])
    assert reg.history[-1]["penalties/l2"] > 0


def test_two_optimizers_have_one_row_for_a_step_of_both():
    model = make()
    optimizers = [torch.optim.SGD(model[i].parameters(), lr=0.05) for i in (0, 2)]
    reg = rs.attach(model, RULES, optimizers, track=1)
    for _ in range(3):
        loss = reg.loss(F.cross_entropy(model(data()[0]), data()[1]))
        loss.backward()
        for one in optimizers:
            one.step()
            one.zero_grad()
    assert reg.history["step"] == [1, 2, 3]


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(("every", "points", "steps"), [(1, 2, 50), (2, 4, 33), (3, 5, 100), (1, 1000, 20)])
def test_the_memory_is_bounded_and_the_rows_evenly_spaced(every, points, steps):
    model, optimizer, reg = attached(rules=RULES[0])
    history = reg.track(every, points=points)
    for taken in range(1, steps + 1):
        step(model, optimizer, reg)
        spacing = every
        while taken // spacing > points:
            spacing *= 2
        if taken % 7 == 0 or taken == steps:
            assert history["step"] == list(range(spacing, taken + 1, spacing))
            assert history.every == spacing


def test_a_change_of_settings_keeps_the_rows():
    model, optimizer, reg = attached(track=1)
    for _ in range(6):
        step(model, optimizer, reg)
    history = reg.track(4, points=3)
    assert history is reg.history
    assert history["step"] == [2, 4, 6]
    for _ in range(40):
        step(model, optimizer, reg)
        assert 1 <= len(history) <= 3
    assert history["step"][-1] >= 32


# ---------------------------------------------------------------- states


def equal(one, other):
    """Equal tables; nan equals nan."""
    assert one.columns == other.columns
    assert len(one) == len(other)
    for row, same in zip(one, other, strict=True):
        assert row == pytest.approx(same, rel=0, abs=0, nan_ok=True)


@pytest.mark.parametrize("way", ["json", "torch"])
@pytest.mark.parametrize("track", [None, 1])
def test_training_goes_on_from_a_checkpoint_with_its_history(way, track):
    rules = [RULES[0], RULES[3]]  # of which all is JSON
    model, optimizer, reg = attached(2, rules)
    reg.track(2, points=4)
    for _ in range(5):
        step(model, optimizer, reg)
    other, other_optimizer, again = attached(track, rules)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(saved(way, reg.state_dict()))
    equal(again.history, reg.history)
    for _ in range(14):
        step(model, optimizer, reg)
        step(other, other_optimizer, again)
    equal(again.history, reg.history)
    assert reg.history["step"] == [4, 8, 12, 16]


def test_states_without_a_history_load():
    model, optimizer, reg = attached(track=1)
    assert "history" not in attached()[2].state_dict()
    for _ in range(2):
        step(model, optimizer, reg)
    old = {key: value for key, value in reg.state_dict().items() if key != "history"}
    for _ in range(3):
        step(model, optimizer, reg)
    reg.load_state_dict(old)
    assert reg.history["step"] == [1, 2], "rows of steps that are taken again go"
    step(model, optimizer, reg)
    assert reg.history["step"] == [1, 2, 3]


def test_wrong_histories_are_refused_whole():
    model, optimizer, reg = attached(track=1)
    for _ in range(3):
        step(model, optimizer, reg)
    good = reg.state_dict()
    parts = dict(good["history"])
    rows = parts["rows"]
    wrong = [
        (None, None),  # as if there were none
        ({"rows": rows}, "has the parts every, points, columns, rows"),
        ({**parts, "every": 0}, "every=1 or more"),
        ({**parts, "points": True}, "points=2 or more"),
        ({**parts, "columns": ["data_loss", "step"]}, "step and data_loss first"),
        ({**parts, "columns": 3}, "step and data_loss first"),
        ({**parts, "rows": rows[::-1]}, "the step first"),
        ({**parts, "rows": [rows[0], rows[0]]}, "the step first"),
        ({**parts, "rows": [[1.5, *rows[0][1:]]]}, "the step first"),
        ({**parts, "rows": [[math.nan, *rows[0][1:]]]}, "the step first"),
        ({**parts, "rows": [["1", *rows[0][1:]]]}, "the step first"),
        ({**parts, "rows": [[*rows[0], *rows[0]]]}, "the step first"),
        ({**parts, "points": 2}, "a list of up to 2"),
        ({**parts, "rows": [*rows, [4, *rows[0][1:]]]}, "up to step 4, but has taken 3 steps"),
    ]
    for part, said in wrong[1:]:
        history = tuple(part.items())
        with pytest.raises(PlanError, match=said):
            reg.load_state_dict({**good, "steps": 3, "history": history})
        assert reg.history["step"] == [1, 2, 3]
    with pytest.raises(PlanError, match="has the parts"):
        reg.load_state_dict({**good, "history": 7})
    reg.load_state_dict(good)


def test_only_a_new_attachment_begins_anew():
    model, optimizer, reg = attached(track=1)
    step(model, optimizer, reg)
    reg.forget()
    reg.next_epoch()
    history = reg.history
    reg.detach()
    step(model, optimizer, rs.attach(model, RULES, optimizer))
    assert reg.history is history
    assert len(history) == 1
    with pytest.raises(DetachedError, match="no step is seen any more"):
        reg.track(1)
    for copied in (pickle.loads(pickle.dumps(history)), copy.deepcopy(history)):
        equal(copied, history)
        assert copied.every == 1
        assert copied is not history


# ---------------------------------------------------------------- what isn't disturbed


@pytest.mark.parametrize("rules", [RULES, [*RULES, rs.SpectralNormalization().on("2.weight", how="parametrize")][3:]])
def test_training_is_the_same_to_the_bit(rules):
    found = []
    for track in (None, 1):
        model, optimizer, reg = attached(track, rules)
        with reg:
            for _ in range(5):
                step(model, optimizer, reg)
        found.append([*model.state_dict().values(), torch.get_rng_state()])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


class Syncs(TorchDispatchMode):
    """Counts reads of single numbers, for which a GPU would be waited for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


def test_steps_read_no_number_from_the_device():
    counts = {}
    for track in (None, 1):
        model, optimizer, reg = attached(track, [RULES[0], RULES[1], RULES[3]])
        step(model, optimizer, reg)
        with Syncs() as syncs:
            for _ in range(5):
                loss = reg.loss(model(data()[0]).square().mean())
                loss.backward()
                optimizer.step()
        counts[track] = syncs.count
    assert counts[1] == counts[None]
    with Syncs() as syncs:
        assert loss.item() >= 0
    assert syncs.count == 1  # the count counts


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_models_have_the_same_history(whole):
    tables = []
    x, y = data()
    for compiled in (False, True):
        model, optimizer, reg = attached(2)
        run = torch.compile(model, backend="eager") if compiled and not whole else model

        def update(run=run, optimizer=optimizer, reg=reg):
            optimizer.zero_grad()
            reg.loss(F.cross_entropy(run(x), y)).backward()
            optimizer.step()

        update = torch.compile(update, backend="eager") if compiled and whole else update
        for _ in range(6):
            update()
        tables.append(reg.history)
    equal(*tables)
    assert tables[0]["step"] == [2, 4, 6]


def test_another_thread_reads_while_training():
    model, optimizer, reg = attached(track=1, rules=RULES[0])
    reg.track(1, points=16)
    stop, faults = threading.Event(), []

    def read():
        while not stop.is_set():
            try:
                steps = [row["step"] for row in reg.history]
                assert steps == sorted(set(steps))
            except Exception as error:
                faults.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(100):
        step(model, optimizer, reg)
    stop.set()
    thread.join()
    assert not faults
    assert reg.history["step"] == list(range(8, 101, 8))


def test_replaced_layers_are_tracked_on():
    model, optimizer, reg = attached(track=1, rules=1e-3 * rs.L2().on("*.weight"))
    step(model, optimizer, reg)
    model[2] = nn.Linear(5, 3)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    with torch.no_grad():
        model[2].weight[1] = 0
    optimizer.param_groups[1]["lr"] = 0.0
    step(model, optimizer, reg)
    assert reg.history["dead/2.weight"] == pytest.approx([0, 1 / 3])


# ---------------------------------------------------------------- as a table, and refusals


def test_a_history_is_a_table():
    model, optimizer, reg = attached(track=1)
    assert str(reg.history) == "0 tracked steps, one every 1\nstep  data_loss"
    for _ in range(50):
        step(model, optimizer, reg)
    history = reg.history
    assert len(history) == 50
    assert history[-1] == list(history)[49]
    assert history[0]["step"] == 1
    assert set(history[0]) == set(history.columns)
    assert history.columns[:2] == ("step", "data_loss")
    first, head, *lines = str(history).splitlines()
    assert first.startswith("50 tracked steps, one every 1; ")
    assert first.endswith("are in history.columns")
    assert head.split()[:3] == ["step", "data_loss", "penalties/l1"]
    assert len(lines) == 17
    assert lines[-1].split()[0] == "50"
    assert max(map(len, lines)) <= 110
    with pytest.raises(KeyError, match="no column 'loss'"):
        history["loss"]


def test_a_history_is_a_frame():
    pytest.importorskip("pandas")
    model, optimizer, reg = attached(track=2)
    for _ in range(4):
        step(model, optimizer, reg)
    frame = reg.history.to_frame()
    assert frame.index.tolist() == [2, 4]
    assert frame.index.name == "step"
    assert frame["zeros/0.weight"].tolist() == reg.history["zeros/0.weight"]


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "10", float("nan")])
def test_wrong_settings_are_refused(every):
    model = make()
    with pytest.raises(PlanError, match="track every k-th step"):
        rs.attach(model, RULES[0], torch.optim.SGD(model.parameters(), lr=0.1), track=every)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    reg = rs.attach(model, RULES[2])
    with pytest.raises(PlanError, match="track every k-th step"):
        reg.track(every)
    with pytest.raises(PlanError, match="shares= is True or False, got 'no'"):
        reg.track(shares="no")
    with pytest.raises(PlanError, match="values= is True or False, got 'no'"):
        reg.table(values="no")
    with pytest.raises(PlanError, match="polish= is True or False, got 1"):
        reg.certificate(lambda: torch.zeros(()), polish=1)
    with pytest.raises(PlanError, match="points= is the greatest number of rows"):
        reg.track(1, points=1)
    with pytest.raises(PlanError, match=r"no step is tracked: write rs\.attach"):
        _ = reg.history
