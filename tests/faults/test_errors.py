"""What raised from inside or led astray (C), docs that led to another number (D), what took long (E7)."""

import dataclasses
import re
import time
import typing
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import restrain as rs
from faults.helpers import SOURCE, alone, right_or_refused, sgd
from restrain.errors import RestrainError, RestrainWarning

DOCS = SOURCE.parents[1] / "docs"


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


# C: arrays and text where a word, a number or a model belongs


@pytest.mark.parametrize(
    "make",
    [
        lambda: rs.Orthogonality(power=np.array([1, 2])),
        lambda: rs.Orthogonality(power=torch.tensor([1, 2])),
        lambda: rs.Orthogonality(of=np.array(["rows", "x"])),
        lambda: rs.TopK(torch.tensor([1.0, 2.0])),
        lambda: rs.TopK(2, budget=np.array([1, 2])),
        lambda: rs.L0(np.array([0.1, 0.2]), 0.1),
        lambda: rs.SLOPE(weights=torch.tensor(-1.0)),
        lambda: rs.attach(net(), torch.tensor(1.0)),
        lambda: rs.attach(net(), rs.L1().on("*"), torch.tensor(1.0)),
        lambda: rs.compact("model", torch.ones(2)),
        lambda: rs.compact(net(), torch.ones(1, 4), "adam"),
        lambda: rs.compact(net(), torch.ones(1, 4), mode=np.array([1, 2])),
    ],
)
def test_settings_of_another_type_are_told(make):
    with pytest.raises(RestrainError, match=r"got (array|[Tt]ensor|str)"):
        make()


# C: penalties of a user's that hold a tensor


@dataclasses.dataclass(frozen=True)
class Towards(rs.Penalty, register=False):
    """Σ(x - aim)², as a user writes it."""

    aim: torch.Tensor

    def __call__(self, w):
        return (w - self.aim).square().sum()


def towards(number):
    return Towards(torch.full((4,), float(number)))


def test_a_penalty_with_a_tensor_can_be_compared():
    assert towards(1) == towards(1)
    assert towards(1) != towards(2)
    assert towards(1) != rs.L2()


def test_penalties_with_tensors_can_be_summed():
    x = torch.arange(4.0)
    total = 0.5 * towards(1) + 0.25 * towards(2) + towards(1) + rs.L2()
    right = 1.5 * (x - 1).square().sum() + 0.25 * (x - 2).square().sum() + x.square().sum()
    torch.testing.assert_close(total(x), right)


def test_penalties_with_tensors_can_be_declared_and_put_into_plans():
    first, second = (rs.regularized(nn.Linear(3, 4), bias=0.5 * towards(1)) for _ in range(2))
    model = nn.Sequential(first, nn.Linear(4, 3), second)
    reg = rs.attach(model, [towards(2).on("0.bias"), towards(2).on("0.bias", name="again")])
    right = sum(0.5 * (layer.bias - 1).square().sum() for layer in (first, second))
    torch.testing.assert_close(reg.penalty(), right + 2 * (first.bias - 2).square().sum())
    one, other, third = (rs.Plan.of([towards(number).on("0.bias")]) for number in (2, 2, 3))
    assert one == other
    assert one != third


# C: settings of places and selections


@pytest.mark.parametrize("given", [(0, 1), "x", 1.5, [0], True], ids=repr)
@pytest.mark.parametrize("place", [rs.outputs, rs.inputs], ids=lambda place: place.__name__)
def test_a_batch_axis_that_is_none_is_refused_where_it_is_written(place, given):
    with pytest.raises(RestrainError, match="batch_dim"):
        place("0", batch_dim=given)


def test_a_union_of_types_selects_both():
    model = nn.Sequential(nn.Conv1d(4, 3, 1), nn.Flatten(), nn.Linear(6, 2), nn.LayerNorm(2))
    union = typing.Union[nn.Linear, nn.Conv1d]  # noqa: UP007
    right = sum(p.square().sum() for layer in (model[0], model[2]) for p in layer.parameters()).detach()
    right_or_refused(lambda: rs.attach(model, rs.L2().on(union)).penalty().detach(), right, names="Union")


def test_a_file_of_one_tensor_is_taken_or_refused_by_name(tmp_path):
    path, model = tmp_path / "aim.pt", net()
    torch.save(torch.ones(8, 4), path)
    right = (model[0].weight - 1).square().sum().detach()
    rule = rs.Distance(to=str(path)).on("0.weight")
    right_or_refused(lambda: rs.attach(model, rule).penalty().detach(), right, names="aim.pt")


# C: attaching under modes, and what changes the model's modules


def test_rules_that_are_attached_in_inference_mode_work_or_are_refused():
    plan = [
        0.1 * rs.Distance(decay=0.5).on("*.weight"),
        rs.schedules.WarmUp(5) * rs.L1().on("0.weight", how="proximal"),
        0.1 * rs.KLSparsity(0.1, momentum=0.9).on(rs.outputs("0", via=torch.sigmoid)),
    ]

    def trained(mode):
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        with torch.inference_mode(mode):
            reg = rs.attach(model, plan, optimizer)
        for x in torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0)):
            optimizer.zero_grad()
            reg.loss(model(x).square().mean()).backward()
            optimizer.step()
        return nn.utils.parameters_to_vector(model.parameters()).detach()

    right_or_refused(lambda: trained(True), trained(False), names="inference_mode")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("inplace", [True, False])
def test_a_model_that_is_prepared_for_quantisation_after_attach_keeps_its_rules_or_says_so(inplace):
    model = net().train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    reg = rs.attach(model, [0.1 * rs.L2().on("0.weight"), 0.1 * rs.L1().on(rs.outputs("0"))])

    def penalty():
        prepared = torch.ao.quantization.prepare_qat(model, inplace=inplace)
        loss = prepared(torch.zeros(5, 4)).square().mean()
        return (reg.loss(loss) - loss).detach()

    right = (0.1 * model[0].weight.square().sum() + 0.1 * model[0].bias.abs().sum()).detach()
    right_or_refused(penalty, right, rtol=0.02, atol=0.0)  # quantised to eight bits


KERAS = """
import sys, numpy as np, keras, restrain as rs
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, kernel_regularizer=0.5 * rs.L2())])
right = 0.5 * float(np.square(keras.ops.convert_to_numpy(model.layers[0].kernel)).sum())
model.save(sys.argv[1])
for twin in (keras.models.load_model(sys.argv[1]), keras.models.clone_model(model)):
    twin.set_weights(model.get_weights())
    assert abs(float(sum(twin.losses)) - right) < 1e-5 * right
"""


@pytest.mark.slow
def test_a_keras_model_with_a_penalty_can_be_saved_and_cloned(tmp_path):
    done = alone(KERAS, tmp_path / "model.keras", seconds=240, environment={"KERAS_BACKEND": "torch"})
    assert done.returncode == 0, done.stderr[-2000:]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):  # torch.compile passes by the forward of an nn.Sequential
        return torch.tanh(self.layer(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_blocks_that_are_compiled_one_by_one_share_their_graphs():
    """Twelve equal blocks take a graph for training and one more at most."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model = nn.Sequential(*(Block() for _ in range(12)))
    rs.attach(model, rs.DropConnect(0.2).on("*.weight"), sgd(model))
    for block in model:
        block.compile(backend=counting)
    for _ in range(2):
        model(torch.randn(3, 6)).sum().backward()
    assert len(graphs) <= 2
    torch.compiler.reset()


# C: roles and axes


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_are_not_the_parts_of_the_old_weight_norm():
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(4, 8)), nn.Linear(8, 2))
    try:
        selected = str(rs.attach(model, rs.L2().on(rs.weights)).plan.to_dict())
    except RestrainError as error:
        selected = "1.weight"
        told = str(error)
    else:
        told = "weight_norm"
    assert "1.weight" in selected
    assert "weight_g" not in selected
    assert "weight_v" not in selected
    assert "weight_norm" in told


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.middle = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight


def test_weights_are_not_a_tied_embedding():
    model = Language()
    torch.testing.assert_close(rs.attach(model, rs.L1().on(rs.weights)).penalty(), model.middle.weight.abs().sum())


@pytest.mark.parametrize("rule", [rs.GroupLasso(per="head"), rs.MaxNorm(1.0, per="head")], ids=repr)
def test_heads_of_an_attention_of_ones_own_get_lists_as_the_way_out(rule):
    model = Language()
    with pytest.raises(RestrainError, match=r"\{[\"']out[\"']: \[") as caught:
        rs.attach(model, rule.on("middle.weight"), sgd(model))
    assert "view" not in str(caught.value)  # no rule can act on a view


def test_the_lists_that_stand_for_heads_are_taken():
    model = Language()
    rule = rs.GroupLasso(per={"out": [[0, 1], [2, 3]]}).on("middle.weight")
    w = model.middle.weight
    right = 8**0.5 * (w[:2].norm() + w[2:].norm())
    torch.testing.assert_close(rs.attach(model, rule).penalty(), right)


# C: names and texts of bounded length

LONG = {
    "Weighted by a tensor": lambda: rs.Weighted(rs.L1(), torch.rand(32, 40)),
    "Weighted by lists": lambda: rs.Weighted(rs.L1(), torch.rand(32, 40).tolist()),
    "Weighted by name": lambda: rs.Weighted(rs.L1(), {"weight": torch.rand(32, 40)}),
    "Distance": lambda: rs.Distance(to=torch.rand(32, 40)),
    "Distance to lists": lambda: rs.Distance(to=torch.rand(32, 40).tolist()),
    "SLOPE": lambda: rs.SLOPE([float(number) for number in range(1280, 0, -1)]),
    "groups": lambda: rs.GroupLasso({"in": [[number] for number in range(40)]}),
    "rows": lambda: rs.GroupLasso([[number, number + 16] for number in range(16)]),
    "a user's": lambda: Towards(torch.rand(32, 40)),
    "a sum": lambda: rs.L2() + 0.5 * rs.Weighted(rs.L1(), torch.rand(32, 40).tolist()),
    "steps": lambda: rs.schedules.Steps([1.0] * 300, milestones=list(range(1, 300))) * rs.L1(),
}


@pytest.mark.parametrize("kind", LONG)
def test_names_of_rules_are_short(kind):
    model = nn.Linear(40, 32)
    reg = rs.attach(model, LONG[kind]().on("weight"))
    assert all(len(name) < 300 for name in reg.values())
    assert len(repr(LONG[kind]())) < 300


def test_names_of_rules_on_many_names_are_short():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(200)))
    reg = rs.attach(model, rs.L1().on([f"{number}.weight" for number in range(200)]))
    assert all(len(name) < 300 for name in reg.values())


# C: compilers that nobody asked for, and warnings

COMPILER = """
import pathlib, torch, warnings, restrain as rs
from torch import nn
model = nn.Sequential(*(nn.Linear(40, 40) for _ in range(300)))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
reg = rs.attach(model, [1e-4 * rs.L2().on("*"), 1e-4 * rs.L1().on("*.weight")], optimizer, compile=False)
for _ in range(60):
    optimizer.zero_grad()
    reg.loss(0 * model[0](torch.ones(1, 40)).sum()).backward()
    optimizer.step()
"""


def test_no_compiler_is_started_where_compile_is_false(tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\ntouch {tmp_path}/started\nexec gcc "$@"\n')
    compiler.chmod(0o755)
    done = alone(COMPILER, seconds=120, environment={"CC": str(compiler)})
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (tmp_path / "started").exists()


def test_warnings_in_a_step_point_to_the_users_line():
    model = net()
    optimizer = sgd(model)
    rs.attach(model, 100.0 * rs.L1().on("2.weight", how="proximal"), optimizer)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(400):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
    assert {one.filename for one in told if issubclass(one.category, RestrainWarning)} == {__file__}


def test_warnings_of_a_target_point_to_the_users_line():
    model = net()
    optimizer = sgd(model)
    rs.attach(model, rs.Target(norm=50.0, every=1, high=1e-3) * rs.L2().on("2.weight", how="gradient"), optimizer)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(400):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).sum().mul(0).backward()
            optimizer.step()
    found = {one.filename for one in told if issubclass(one.category, RestrainWarning)}
    assert found == {__file__}


# C: what the models say

X = np.random.default_rng(0).normal(size=(30, 4)).astype("float32")
Y = np.arange(30) % 2


@pytest.mark.parametrize("algo", ["muon", "sparseadam"])
def test_an_algorithm_that_is_listed_works_or_is_refused(algo):
    try:
        fitted = rs.Classifier(hidden=(4,), algo=algo, epochs=1, random_state=0).fit(X, Y)
    except RestrainError as error:
        said = str(error)
    else:
        said = algo
        assert np.isfinite(fitted.history_[-1]["loss"])
    assert algo in said.lower()


COLUMNS = {
    "colour": (pd.Categorical(["red", "green", "blue"] * 10), [3.0, 2.0]),
    "day": (pd.date_range("2024-01-01", periods=30), "Monday"),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_that_are_no_numbers_are_read_or_refused_by_name(name):
    column, other = COLUMNS[name]
    table = pd.DataFrame({"a": X[:, 0], name: column})
    model = rs.Classifier(hidden=(4,), epochs=1).fit(table, Y)
    assert any(one.startswith(name) for one in model.input_names_)
    for wrong in (table.drop(columns=name), table.assign(**{name: [other] * 30})):
        with pytest.raises((RestrainError, ValueError), match=name):
            model.predict(wrong)


def test_a_form_that_does_not_exist_is_named_whatever_the_data_are():
    for data in (X, np.zeros((30, 5, 4), "float32")):
        with pytest.raises(RestrainError, match="clockwork"):
            rs.Classifier(hidden=((16, "clockwork"),), epochs=1).fit(data, Y)


def test_labels_of_another_kind_are_told_in_our_words():
    model = rs.Classifier(hidden=(4,), epochs=1).fit(X, Y)
    right_or_refused(lambda: model.score(X, np.array(["u", "v"] * 15)), 0.0, names="label")


# C: types

TYPED = """
import torch
import restrain as rs
X = torch.zeros(3, 4)
clf = rs.Classifier(hidden=(100,), weight_l2=1e-3, epochs=3, random_state=0)
net = rs.Classifier([64, 100, 10])
reg = rs.Regressor(hidden=(32,), normalize=True)
ae = rs.Autoencoder([64, (100, "relu"), (64, "tied")], hidden_l1=1e-3, epochs=2)
loaded = rs.load("model")
rule = (rs.Target(zeros=0.8) * rs.L1()).on("0.weight", how="proximal")
other = rs.Target(zeros=0.8) * rs.L1().on("0.weight", how="proximal")
warm = 1e-2 * rs.schedules.WarmUp(100) * rs.KLSparsity(0.05).on(rs.outputs("0", via=torch.sigmoid))
"""


@pytest.mark.slow
def test_lines_of_the_readme_have_types(tmp_path):
    (tmp_path / "lines.py").write_text(TYPED)
    code = "import sys; from mypy.main import main; main(args=sys.argv[1:], clean_exit=True)"
    done = alone(code, "--follow-imports=silent", "--cache-dir", tmp_path / "cache", "lines.py",
                 seconds=500, folder=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


# D: docs that led to another number


def said_in(name):
    return " ".join((DOCS / name).read_text("utf-8").split())


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 6)
        self.other = nn.Linear(4, 6)

    def forward(self, x):
        return torch.relu(self.fc(x) + self.other(x))  # a sum comes between the layer and the function


def test_a_function_that_the_model_calls_is_caught_or_docs_say_what_via_does():
    model, x = Residual(), torch.randn(5, 4)
    with rs.attach(model, rs.L1().on(rs.outputs("fc", via=torch.relu))) as reg:
        penalty = reg.loss(0 * model(x).sum()).item()
    texts = [(SOURCE.parents[1] / page).read_text("utf-8") for page in ("README.md", "docs/tour.md")]
    pages = " ".join(" ".join(texts).split())
    misleading = "names a function that the model calls" in pages or "also of `F.relu` calls" in pages
    misleading |= "that the model itself calls on this output" in " ".join(rs.outputs.__doc__.split())
    called = penalty == pytest.approx(model(x).abs().sum().item() / 5, rel=1e-5)
    applied = penalty == pytest.approx(torch.relu(model.fc(x)).sum().item() / 5, rel=1e-5)
    assert called or (applied and not misleading)


def test_a_unit_norm_decoder_without_parallel_gradient_is_what_the_docs_say_it_is():
    """What SAE libraries do: take out the part of the gradient along each column, step by Adam, normalise."""
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))

    def decoder():
        torch.manual_seed(0)
        layer = nn.Linear(8, 6, bias=False)
        with torch.no_grad():
            layer.weight.div_(layer.weight.norm(dim=0))
        return layer, torch.optim.Adam(layer.parameters(), lr=0.02), torch.randn(64, 8)

    layer, optimizer, code = decoder()
    rows = [line for line in (DOCS / "coming-from.md").read_text("utf-8").splitlines() if "parallel part" in line]
    if not rows or re.search(r"differ|isn't|not the same", rows[0]):
        return
    row = rows[0]
    rule = eval(re.search(r"`(rs\.UnitNorm.*?)`", row)[1].replace("decoder.weight", "weight"), {"rs": rs})
    rs.attach(layer, rule, optimizer)
    by_hand, other, _ = decoder()
    for _ in range(30):
        for one, how in ((layer, optimizer), (by_hand, other)):
            how.zero_grad()
            F.mse_loss(one(code), x).backward()
            if one is by_hand:
                w = by_hand.weight
                w.grad -= (w.grad * w).sum(0) * w.detach() / w.detach().square().sum(0)
            how.step()
        with torch.no_grad():
            by_hand.weight.div_(by_hand.weight.norm(dim=0))
    torch.testing.assert_close(layer.weight, by_hand.weight, rtol=0, atol=1e-4)


def test_docs_say_where_the_activation_regularisation_of_fastai_acts():
    rows = [line for line in (DOCS / "coming-from.md").read_text("utf-8").splitlines() if "RNNRegularizer" in line]
    assert rows
    assert all("rs.inputs(" in line for line in rows)


def test_fastais_regularisation_of_dropped_outputs_is_that_of_the_next_layers_inputs():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.drop, self.dec = nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 2)

        def forward(self, x):
            self.dropped = self.drop(self.rnn(x))
            return self.dec(self.dropped)

    model = Dropped()
    reg = rs.attach(model, rs.L2().on(rs.inputs("dec")))
    loss = 0 * model(torch.randn(5, 4)).sum()
    torch.testing.assert_close(reg.loss(loss), model.dropped.square().sum() / 5)


def test_docs_say_that_the_mean_over_calls_goes_over_forwards_too():
    for text in (" ".join(rs.outputs.__doc__.split()), said_in("activations.md")):
        sentences = [one for one in re.split(r"(?<=[.;:]) ", text) if re.search(r"calls|called several times", one)]
        assert any(re.search(r"forwards|several losses|separate", one) for one in sentences)


@pytest.mark.parametrize("penalty", [rs.DecoderL1("2.weight"), rs.Hoyer()], ids=repr)
def test_docs_say_how_to_average_over_tokens(penalty):
    """SAE libraries average over tokens; on (batch, time, features) a plain rule sums or mixes over time."""
    text = said_in("activations.md").lower()
    assert re.search(r"(mean|average)[^.]{0,60}over (the )?(tokens|positions|time)|per token|each token", text)
    assert type(penalty).__name__.lower() in text


# E7: what took long


def quickest(plan, model, x, count=3):
    optimizer = sgd(model, lr=1e-4)
    taken = []
    with rs.attach(model, plan, optimizer) as reg:
        for _ in range(count):
            start = time.perf_counter()
            optimizer.zero_grad()
            reg.loss(model(x).square().mean()).backward()
            optimizer.step()
            taken.append(time.perf_counter() - start)
    return min(taken)


@pytest.mark.slow
def test_many_rules_in_the_loss_are_summed_as_at_the_step():
    model, x = nn.Sequential(*(nn.Linear(4, 4) for _ in range(100))), torch.randn(4, 4)
    plans = {
        how: [1e-4 * rs.L2().on("*.weight", how=how, name=str(number)) for number in range(100)]
        for how in ("loss", "gradient")
    }
    assert quickest(plans["loss"], model, x) < 6 * quickest(plans["gradient"], model, x)


@pytest.mark.slow
def test_many_rules_on_the_same_activations_are_summed():
    model, x = nn.Sequential(*(nn.Linear(4, 4) for _ in range(30))), torch.randn(4, 4)
    few, many = (
        quickest([1e-4 * rs.L2().on(rs.outputs("*"), name=str(n)) for n in range(count)], model, x) for count in (2, 60)
    )
    assert many < 10 * few
