"""A report: what is in it, that it needs nothing else, and that names are text."""

import gc
import html
import json
import math
import re
from dataclasses import replace
from importlib import resources

import numpy as np
import pytest
import torch
from torch import nn

import restrain as rs
from report.pages import NAME, Net, Reader, lasso, names, trained
from restrain.errors import DetachedError, FileError, PlanError
from restrain.path_view import PathView, columns
from restrain.paths.result import _chain
from restrain.report import Content, RuleFacts, TensorFacts, page
from restrain.report.advice import advice
from restrain.report.charts import short, trainings
from test_plots import contrast

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(The model, its attachment, the path, the text) of a page with every section."""
    torch.manual_seed(0)
    model, reg = trained()
    path = lasso()
    file = tmp_path_factory.mktemp("report") / "report.html"
    images = {"<script>.weight": (8, 8)}
    written = reg.report(file, path=path, images=images, inputs=names(), facts={"accuracy": "97 %"})
    assert written == file
    return model, reg, path, file.read_text("utf-8")


def section(text, name):
    found = re.search(rf'<section id="{name}".*?</section>', text, re.S)
    return "" if found is None else found[0]


# The page


def test_it_has_all_sections_and_is_well_formed(whole):
    text = whole[3]
    found = Reader(text)
    assert found.faults == []
    assert len(set(found.ids)) == len(found.ids)
    assert re.findall(r"<h2[^>]*>([^<]*)<", text) == [
        "Warnings",
        "Path",
        "Who gets what",
        "Training",
        "Weights",
        "Learned features",
        "To do it again",
        "Environment",
    ]
    links = [link[1:] for link in found.links if re.fullmatch(r"#[a-z]+", link)]
    assert links == re.findall(r'<section id="(\w+)"', text)
    assert found.texts["h1"] == ["Report on Net"]
    assert "97 %" in found.texts["dd"]


def test_the_reader_notices():
    assert Reader("<p><b></p>").faults
    assert Reader("<p>").faults
    assert Reader('<a href="http://x">x</a>').links == ["http://x"]


def test_it_needs_nothing_else(whole):
    text = whole[3]
    found = Reader(text)
    assert {link.split(":")[0] for link in found.links if not link.startswith("#")} == {"data"}
    assert set(found.tags) & {"iframe", "object", "embed", "img", "audio", "video", "base", "form"} == set()
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttp|import\(", text)
    assert "default-src 'none'" in text
    assert len(text.encode()) < 600_000


def test_names_are_text(whole):
    text = whole[3]
    assert NAME not in text
    found = Reader(text)
    assert found.tags.count("script") == 2  # the numbers of the path, and the explorer
    assert any("<script>" in cell for cell in found.texts["td"])
    assert any("<script>" in label for label in found.texts["text"])
    data = json.loads(re.search(r'id="path-data">(.*?)</script>', text, re.S)[1])
    assert data["tensors"][0]["labels"][0] == NAME


def test_charts_are_of_text_and_take_the_pages_colors(whole):
    text = whole[3]
    charts = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(charts) >= 12
    for chart in charts:
        assert re.findall(r"#[0-9a-f]{6}\b", chart) == []
        assert "font-family" not in chart
        assert "var(--ink)" in chart or "<image" in chart
    labels = Reader(text).texts["text"]
    for label in ("l1 in the loss", "$decay_", "conv.weight", "data loss", "strength", "best"):
        assert label in labels
    assert not any("mathdefault" in label for label in labels)


@pytest.mark.parametrize("dark", [False, True])
def test_colors_have_contrast(dark):
    css = resources.files("restrain.report").joinpath("page.css").read_text("utf-8")
    light, night = re.findall(r":root \{(.*?)\}", css, re.S)[:2]
    colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", night if dark else light))
    assert set(colors) == set(re.findall(r"var\(--([\w-]+)\)", css)) | {f"c{number}" for number in range(7)}
    for text in ("ink", "soft", "link"):
        for ground in ("paper", "panel", "warn"):
            assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground)
    for number in range(7):
        assert contrast(colors[f"c{number}"], colors["paper"]) >= 3


# Numbers


def rows_of(text, which):
    """Cells of a table in a section, by row."""
    table = re.findall(r"<table>.*?</table>", section(text, which), re.S)[0]
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.S) for row in re.findall(r"<tr>.*?</tr>", table, re.S)]
    return [[cell.replace("&lt;", "<").replace("&gt;", ">") for cell in row] for row in cells]


def test_weights_are_counted(whole):
    model, text = whole[0], whole[3]
    head, *rows = rows_of(text, "weights")
    assert head == ["weight", "shape", "zeros", "%", "dead units", "zero groups", "norm", "rules"]
    assert [row[0] for row in rows] == ["conv.weight", "<script>.weight", "out.weight"]
    w = model.get_parameter("<script>.weight").detach().numpy()
    dead = int((np.abs(w).sum(1) == 0).sum())
    assert rows[1][1:7] == [
        "12 × 64",
        f"{int((w == 0).sum()):,}",
        f"{100 * (w == 0).mean():.1f}",
        f"{dead} of 12",
        f"{dead} of 12",
        f"{np.linalg.norm(w):.4g}",
    ]
    assert rows[0][7] == "l1 in the loss"


def test_measures_are_those_of_numpy(whole):
    reg = whole[1]
    facts = {one.name: one for one in reg.contents(images=(8, 8)).tensors}
    w = reg.model.get_parameter("<script>.weight").detach().double().numpy()
    one = facts["<script>.weight"]
    np.testing.assert_allclose(one.lengths, np.sort(np.linalg.norm(w, axis=1))[::-1], rtol=1e-6)
    edges, counts = one.histogram
    expected, _ = np.histogram(w[w != 0], bins=len(counts), range=(edges[0], edges[-1]))
    assert np.abs(np.array(counts) - expected).max() <= 1  # an entry at an edge, rounded
    assert sum(counts) == (w != 0).sum()
    order = np.argsort(-np.linalg.norm(w, axis=1))[: len(one.images)]
    np.testing.assert_allclose(one.images.reshape(-1, 64), w[order], rtol=1e-6)
    assert len(one.images) == (np.linalg.norm(w, axis=1) > 0).sum()
    assert facts["conv.weight"].images.shape == (4, 1, 3, 3)
    assert facts["out.weight"].images is None
    assert facts["out.weight"].groups is None


def test_features_may_be_columns():
    decoder = nn.Linear(3, 16)
    reg = rs.attach(decoder, rs.L2().on("weight"))
    (one,) = reg.contents(images={"weight": (4, 4)}).tensors[:1]
    sizes = decoder.weight.detach().norm(dim=0)
    assert one.images.shape == (3, 4, 4)
    torch.testing.assert_close(one.images.flatten(1), decoder.weight.detach().T[sizes.argsort(descending=True)])


def test_the_head_and_the_history(whole):
    reg = whole[1]
    found = reg.contents()
    assert found.facts["parameters"] == f"{sum(p.numel() for p in reg.model.parameters()):,}"
    assert found.facts["steps"] == "30"
    assert found.facts["data loss"] == f"{reg.history['data_loss'][-1]:.4g}"
    assert [row["data_loss"] for row in found.rows] == reg.history["data_loss"]
    assert [rule.strength for rule in found.rules] == [0.05, 1e-3, 1e-3]
    assert [rule.makes_zeros for rule in found.rules] == [True, True, False]
    assert rs.Plan.from_dict(json.loads(found.data)) == reg.plan
    assert found.environment["torch"] == torch.__version__


def test_long_histories_are_thinned():
    rows = [{"step": step, "data_loss": 1.0 / step, "penalties/a": step % 2} for step in range(1, 5001)]
    (chart,) = trainings(rows)
    vertices = [line.count("L ") for line in re.findall(r'<path d="([^"]*)"', chart.svg)]
    assert 30 < max(vertices) <= 300  # matplotlib leaves out those on a straight line
    many = [{"step": 1, **{f"penalties/{number}": 1.0 for number in range(20)}}]
    assert "13 more" in trainings(many)[0].told


def test_histograms_that_are_left_out_are_told():
    model = nn.ModuleList([nn.Linear(2, 2) for _ in range(15)])
    found = rs.attach(model, rs.L2().on("0.weight")).contents()
    assert "3 more tensors aren't drawn" in page(found).replace("&#x27;", "'")
    assert "aren't drawn" not in page(replace(found, tensors=found.tensors[:12])).replace("&#x27;", "'")


def test_names_of_charts_keep_their_ends():
    assert short("transformer.h.11.attn.c_attn.weight", 24) == "transfor…n.c_attn.weight"
    assert len(short("x" * 99, 24)) == 24
    assert short("fc", 24) == "fc"


# The path


def data_of(text):
    return json.loads(re.search(r'id="path-data">(.*?)</script>', text, re.S)[1])


def test_the_slider_has_the_numbers_of_the_path(whole):
    path, data = whole[2], data_of(whole[3])
    order = np.argsort(path.strengths_)
    np.testing.assert_allclose(data["strengths"], path.strengths_[order], rtol=1e-3)
    np.testing.assert_allclose(data["scores"], path.scores_.mean(1)[order], rtol=1e-3)
    weights = path.weights_["out.weight"][order, 0]
    assert data["selected"] == (weights != 0).sum(1).tolist()
    assert data["total"] == 9
    greatest = np.argsort(-np.abs(weights).max(0))
    assert [bar["name"] for bar in data["bars"]] == [names()[number] for number in greatest]
    for bar, number in zip(data["bars"], greatest, strict=True):
        np.testing.assert_allclose(bar["values"], weights[:, number], rtol=1e-3)
    shades = np.array([[int(digit) for digit in row] for row in data["tensors"][0]["shades"]])
    np.testing.assert_array_equal(shades > 0, weights != 0)
    assert shades.max() == 9
    assert data["best"] == int(np.argmax(path.scores_.mean(1)[order]))


def test_marks_stand_at_the_strengths(whole):
    lines = re.findall(r'<line class="marker" x1="([\d.]+)".*?data-x="([^"]*)"', whole[3])
    data = data_of(whole[3])
    for x, places in lines:
        at = np.array([float(one) for one in places.split()])
        logs = np.log(data["strengths"])
        np.testing.assert_allclose((at - at[0]) / (at[-1] - at[0]), (logs - logs[0]) / (logs[-1] - logs[0]), atol=2e-3)
        assert float(x) == at[data["best"]]
        uprights = [float(one) for one in re.findall(r'd="M ([\d.]+) [\d.]+\s+L \1 ', whole[3])]
        assert min(abs(one - float(x)) for one in uprights) < 0.01  # the line that is drawn there
    assert len(lines) == 2


def test_two_ways_come_one_after_the_other():
    lines = {"w": torch.tensor([[1.0], [0.0], [0.5], [2.0]])}
    ways = ["up", "up", "down", "down"]
    view = PathView([1, 2, 2, 1], [0.0] * 4, [0.0] * 4, [1, 0, 1, 1], lines, {"w": ["0"]}, 3, None, ways)
    data = data_of(page(Content("x", path=view)))
    assert data["strengths"] == [1, 2, 1, 2]
    assert data["ways"] == ["up", "up", "down", "down"]
    assert data["bars"][0]["values"] == [1, 0, 2, 0.5]
    assert (data["best"], data["sparse"]) == (2, -1)


def test_a_path_of_any_model():
    model = nn.Sequential(nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(40, 16)
    y = x[:, :1] - x[:, 1:2]

    def fit(model, reg):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        reg.use(optimizer)
        for _ in range(5):
            optimizer.zero_grad()
            reg.loss((model(x) - y).square().mean()).backward()
            optimizer.step()

    path = rs.path(
        model,
        rs.GroupLasso(per="in").on("0.weight", how="proximal"),
        fit,
        loss=lambda m: (m(x) - y).square().mean(),
        score=lambda m: -(m(x) - y).square().mean(1),
        points=3,
        certificate=False,
        random_state=0,
        progress=False,
    )
    with rs.attach(model, rs.L2().on("0.weight")) as reg:
        text = page(reg.contents(path=path, images={"0.weight": (4, 4)}))
    data = data_of(text)
    assert data["tensors"][0]["columns"] == 4
    assert data["selected"] == [point.selected for point in path.points]
    assert [row.count("0") for row in data["tensors"][0]["shades"]] == [16 - point.selected for point in path.points]
    assert [column["name"] for column in data["network"]] == ["inputs", "0.weight", "2.weight"]
    assert data["network"][0]["wide"] == 4
    for at in range(len(path.points)):
        found = remains(weights_of(path.model(at)))
        assert [column["left"][at] for column in data["network"]] == [
            "".join(map(str, one.astype(int))) for one in found
        ]
    assert "weight" not in rs.plots.path(path).get_ylabel()  # lengths of groups


# The network's drawing


def remains(weights):
    """[units that remain] of the inputs and of each layer, by NumPy: read and reading."""
    into = [np.abs(w).reshape(*w.shape[:2], -1).sum(2) > 0 for w in weights]
    found = [into[0].any(0)]
    for number, mask in enumerate(into):
        incoming = mask.any(1)
        outgoing = True
        if number + 1 < len(into):
            outgoing = into[number + 1].reshape(len(into[number + 1]), len(mask), -1).any((0, 2))
        found.append(incoming & outgoing)
    return found


def chain():
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.BatchNorm2d(3), nn.AvgPool2d(2), nn.Flatten()]
    model = nn.Sequential(*convolutions, nn.Sequential(nn.Linear(12, 5), nn.Tanh()), nn.Dropout(0.1), nn.Linear(5, 2))
    with torch.no_grad():
        model[0].weight[0] = 0  # a filter without weights
        model[5][0].weight[:, 4:8] = 0  # nothing reads the filter after it
        model[5][0].weight[2] = 0  # a unit without weights
        model[7].weight[:, 3] = 0  # a unit that nothing reads
    return model


def weights_of(model):
    return [p.detach().double().numpy() for p in model.parameters() if p.dim() > 1]


def test_units_that_remain_are_those_of_numpy():
    model = chain()
    names = [name for name, p in model.named_parameters() if p.dim() > 1]
    assert _chain(model) == names == ["0.weight", "5.0.weight", "7.weight"]
    found = columns({name: model.get_parameter(name).detach().unsqueeze(0) for name in names})
    assert [one.name for one in found] == ["inputs", *names]
    expected = remains(weights_of(model))
    assert [one.left[0].tolist() for one in found] == [one.tolist() for one in expected]
    assert [int(one.left.sum()) for one in found] == [1, 1, 3, 2]
    assert found[3].reads[0].equal(model[7].weight != 0)
    torch.nn.init.ones_(model[7].weight)
    assert int(remains(weights_of(model))[2].sum()) == 4  # the reference sees what it should


@pytest.mark.parametrize(
    "model",
    [
        Net(),
        None,
        nn.Linear(3, 2),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.ChannelShuffle(2), nn.Conv2d(4, 2, 1)),
        nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 2, 1)),
        nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 2)),
        nn.Sequential(nn.MultiheadAttention(4, 2)),
        nn.Sequential(*[nn.Linear(4, 4)] * 2),
    ],
)
def test_other_models_have_no_drawing(model):
    assert _chain(model) == []


def test_sizes_that_are_no_chain_have_no_drawing():
    assert columns({"a": torch.ones(1, 3, 4), "b": torch.ones(1, 2, 5)}) == []
    assert columns({"a": torch.ones(1, 8, 4), "b": torch.ones(1, 2, 4)}) == []
    assert columns({}) == []
    lines = {"w": torch.ones(2, 1)}
    view = PathView([0.1, 1.0], [1.0, 0.0], [0.0] * 2, [1, 1], lines, {"w": ["0"]}, 0, None, ["up"] * 2)
    text = page(Content("x", path=view))
    assert 'id="network"' not in text
    assert data_of(text)["network"] == []


def test_the_drawing_has_the_networks_of_the_path(whole):
    path, data = whole[2], data_of(whole[3])
    inputs, outputs = data["network"]
    order = np.argsort(path.strengths_)
    weights = path.weights_["out.weight"][order, 0] != 0
    assert inputs["left"] == ["".join(map(str, row.astype(int))) for row in weights]
    assert inputs["labels"] == names()
    assert inputs["numbers"] == data["selected"]
    assert outputs["reads"] == inputs["left"]
    assert outputs["left"] == [str(int(row.any())) for row in weights]
    assert 'id="network-drawing"' in whole[3]


# Warnings in plain words

FACTS = TensorFacts("w", (4, 4), 0, 1.0, ("a",), dead=(0, 4))
RULE = RuleFacts("a", "proximal", "rs.L1()", 0.01, ("w",), True)


@pytest.mark.parametrize(
    ("change", "said", "line"),
    [
        ({"rules": [replace(RULE, how="loss")]}, "none is exactly zero", "0.01 * rs.L1().on('w', how='proximal')"),
        ({"tensors": [replace(FACTS, zeros=16)]}, "All of 'w' is zero", "0.003 * rs.L1().on('w', how='proximal')"),
        ({"tensors": [replace(FACTS, zeros=8, dead=(2, 4))]}, "2 of 4 in 'w'", "rs.compact(model"),
        ({"rows": [{"step": 1, "data_loss": math.nan}]}, "No tracked step has a data loss", "reg.loss("),
        ({"rows": [{"step": 3, "data_loss": math.inf}]}, "infinite at step 3", "clip_grad_norm_"),
        ({"rows": [{"step": 1, "shares/a": 0.95}]}, "outweighs the data", "0.001 * rs.L1()"),
        ({"rows": [{"step": 1, "shares/a": 1e-5}]}, "hardly acts", "0.1 * rs.L1()"),
        ({"rows": [{"valid_loss": loss} for loss in (2, 1, 1, 1, 1, 1, 1.2)]}, "after epoch 2 of 7", "patience=5"),
    ],
)
def test_advice(change, said, line):
    fine = Content("x", rules=[RULE], tensors=[FACTS], rows=[{"step": 1, "data_loss": 1.0, "shares/a": 0.3}])
    assert advice(fine) == []
    (one,) = advice(replace(fine, **change))
    assert said in one.text
    assert line in one.line


def test_advice_on_a_path():
    lines = {"w": torch.ones(2, 1)}
    view = PathView([0.1, 1.0], [1.0, 0.0], [0.0] * 2, [1, 0], lines, {"w": ["0"]}, 0, None, ["up"] * 2)
    assert "weakest strength" in advice(Content("x", path=view))[0].text
    assert "uses nothing" in advice(Content("x", path=replace(view, best=1)))[0].text
    assert advice(Content("x", path=replace(view, selected=[1, 1], best=1))) == []


def test_warnings_of_a_training(whole):
    text = section(whole[3], "warnings")
    assert "shrinks 36 weights, but none is exactly zero" in text
    assert "0.001 * rs.L1().on('conv.weight', how='proximal', name='l1 in the loss')" in html.unescape(text)
    assert "rs.compact(model, example, optimizer)" in text


# Other models, and what is refused


def test_without_a_history_it_says_how_to_get_one(tmp_path):
    model = nn.Linear(3, 2)
    reg = rs.attach(model, rs.L1().on("weight"))
    text = reg.report(tmp_path / "a.html").read_text("utf-8")
    assert "Nothing was tracked" in text
    assert "track=10" in text
    assert "<svg" in text  # the histogram
    assert 'id="path"' not in text
    rows = [{"epoch": 1, "data_loss": 1.0}, {"epoch": 2, "data_loss": 0.5}]
    assert "Nothing was tracked" not in reg.report(tmp_path / "b.html", history=rows).read_text("utf-8")


def test_another_models_weights():
    model, reg = trained(1)
    other = Net()
    with torch.no_grad():
        other.out.weight.zero_()
    facts = {one.name: one for one in reg.contents(model=other).tensors}
    assert facts["out.weight"].zeros == 36
    assert reg.model is model
    with pytest.raises(PlanError, match=r"'conv\.weight' is missing there"):
        reg.contents(model=nn.Linear(3, 2))


def test_nothing_is_left_behind(tmp_path):
    model, reg = trained(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    state = torch.get_rng_state()
    reg.report(tmp_path / "a.html")
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad.equal(grad) for p, grad in zip(model.parameters(), grads, strict=True))
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert torch.get_rng_state().equal(state)
    assert model.training


def test_strange_models():
    model = nn.Sequential(nn.Linear(3, 2, dtype=torch.complex64), nn.Linear(2, 2, dtype=torch.bfloat16))
    model.register_parameter("empty", nn.Parameter(torch.zeros(0, 2)))
    model.register_parameter("nan", nn.Parameter(torch.full((2, 2), torch.nan)))
    model.append(nn.LazyLinear(3))
    reg = rs.attach(model, rs.L2().on("0.weight"))
    text = page(reg.contents())
    assert Reader(text).faults == []
    assert "0 × 2" in text


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"path": [1]}, "the result of rs.path"),
        ({"images": 8}, r"\(height, width\)"),
        ({"images": (9, 9)}, "a weight's number of inputs or outputs"),
        ({"images": {"conv": (8, 8)}}, "'conv', which is no parameter"),
        ({"images": {"out.weight": (8, 8)}}, r"'out\.weight' has the shape \(3, 12\)"),
        ({"history": [1.0]}, "a row of numbers by name"),
        ({"history": 3}, "a row of numbers by name"),
        ({"history": [{"loss": "low"}]}, "got 'low'"),
        ({"facts": ["97 %"]}, "texts by what they tell"),
    ],
)
def test_wrong_arguments_are_told(given, said):
    _model, reg = trained(1)
    with pytest.raises(PlanError, match=said):
        reg.contents(**given)


def test_wrong_names_and_files_are_told(tmp_path, whole):
    _model, reg = trained(1)
    with pytest.raises(PlanError, match="2 names for groups, and the path has 9"):
        reg.contents(path=whole[2], inputs=["a", "b"])
    with pytest.raises(FileError, match=r"ends in \.html; got 'a\.pdf'"):
        reg.report(tmp_path / "a.pdf")
    del _model
    gc.collect()
    with pytest.raises(DetachedError, match="doesn't exist any more"):
        reg.report(tmp_path / "a.html")
    assert list(tmp_path.iterdir()) == []
