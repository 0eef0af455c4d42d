"""Models on file: what comes back, what a reader sees while one is written, and what is refused."""

import json
import math
import os
import re
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import restrain as rs
from restrain.errors import FileError
from restrain.models import files
from restrain.models.layers import Network
from restrain.models.specs import resolve


class Model:
    """What files know of an estimator: settings, and attributes that end in _."""

    def __init__(self, **settings):
        names = ("hidden", "algo", "regularizers", "weight_l2", "l1", "dtype", "device", "noise", "checkpoint")
        self.__dict__.update({name: settings.get(name) for name in names})

    def get_params(self, deep=True):
        return {key: value for key, value in vars(self).items() if not key.endswith("_")}

    def set_params(self, **settings):
        self.__dict__.update(settings)


CLASSES = {"Model": Model}


def fitted(layers=(4, (8, "linear"), (4, "tied")), **settings):
    model = Model(**settings)
    model.layers_ = resolve(list(layers))
    model.module_ = Network(model.layers_)
    model.input_scale_ = rs.Standardize(missing="ignore").fit(torch.randn(9, 4))
    model.target_scale_ = None
    model.classes_ = np.array(["a", "bc"])
    model.feature_names_in_ = np.array(["x", "ü"], dtype=object)
    model.history_ = [{"epoch": 0, "loss": 0.1, "valid": float("nan")}]
    model.n_features_in_ = 4
    return model


def reload(model, path):
    files.save(model, path)
    return files.load(path, CLASSES)


# What comes back


@pytest.mark.parametrize(
    "layers",
    [
        (4, (8, "linear"), (4, "tied")),
        (4, {"size": 6, "name": "a", "activation": "tanh"}, "batchnorm", 3),
        (4, (5, "lstm"), (5, "rnn"), "layernorm", 2),
    ],
)
def test_networks_come_back(layers, tmp_path):
    model = fitted(layers)
    x = torch.randn(7, 4) if "lstm" not in str(layers) else torch.randn(7, 3, 4)
    model.module_(x)
    model.module_.eval()
    twin = reload(model, tmp_path / "m")
    assert torch.equal(twin.module_(x), model.module_(x))
    assert list(twin.module_.state_dict()) == list(model.module_.state_dict())
    assert not twin.module_.training
    assert twin.layers_ == model.layers_
    assert torch.equal(twin.input_scale_(x), model.input_scale_(x))
    assert twin.input_scale_.missing == "ignore"


def test_tied_weights_stay_tied(tmp_path):
    twin = reload(fitted(), tmp_path / "m")
    assert twin.module_.out.weight is twin.module_.hid1.weight


def test_attributes_come_back(tmp_path):
    model, twin = fitted(), reload(fitted(), tmp_path / "m")
    assert twin.target_scale_ is None
    for name in ("classes_", "feature_names_in_"):
        found, expected = getattr(twin, name), getattr(model, name)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    assert twin.history_[0].pop("valid") != 0
    assert twin.history_ == [{"epoch": 0, "loss": 0.1}]
    assert twin.n_features_in_ == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_stay(dtype, tmp_path):
    model = fitted()
    model.module_.to(dtype)
    twin = reload(model, tmp_path / "m")
    for name, tensor in model.module_.state_dict().items():
        assert twin.module_.state_dict()[name].dtype == dtype
        assert torch.equal(twin.module_.state_dict()[name], tensor)


SETTINGS = [
    {"hidden": (100, (50, "tanh"), {"size": 3, "name": "a"})},
    {"hidden": [1, [2], ("tied",)], "weight_l2": {"strength": 1e-4, "on": "hid*"}},
    {"weight_l2": np.float32(0.1)},
    {"algo": torch.optim.AdamW},
    {"dtype": torch.float64, "device": torch.device("cpu")},
    {"noise": {"hid*": 0.1, "$odd": 1, 1: 2.0, None: math.inf}},
    {"weight_l2": {"strength": 1.0, "on": rs.weights & rs.glob("fc*")}},
    {"weight_l2": {"strength": 1.0, "on": rs.outputs("hid*") | rs.inputs()}},
    {"weight_l2": {"strength": 1.0, "on": re.compile("hid[12]")}},
    {"regularizers": [0.1 * rs.L1().on("a*", how="proximal"), "l2:0.1", rs.Dropout(0.3).on(rs.outputs("b"))]},
    {"regularizers": rs.Plan.of(["l2:0.1"])},
    {"checkpoint": Path("a/b")},
    {"regularizers": rs.MaxNorm(3.0, per="out").on("a")},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
def test_settings_come_back(settings, tmp_path):
    twin = reload(fitted(**settings), tmp_path / "m")
    wanted = Model(**settings).get_params()
    found = twin.get_params()
    same = {key: found[key] for key in wanted} == wanted
    assert same or repr(found).replace("Regex('hid[12]')", "re.compile('hid[12]')") == repr(wanted)


def test_notes_come_back(tmp_path):
    path = files.save(fitted(), tmp_path / "m", notes={"columns": ["a"], 3: (1, math.inf)})
    assert files.read_notes(path) == {"columns": ["a"], 3: (1, math.inf)}


def test_a_folder_holds_one_file(tmp_path):
    path = files.save(fitted(), f"{tmp_path}/new/run/")
    assert path == tmp_path / "new" / "run" / "model.safetensors"
    assert [entry.name for entry in path.parent.iterdir()] == ["model.safetensors"]
    assert files.load(tmp_path / "new" / "run", CLASSES).n_features_in_ == 4
    with pytest.raises(FileError, match="doesn't exist; create it"):
        files.save(fitted(), tmp_path / "other" / "m")


def test_any_reader_of_safetensors_reads_it(tmp_path):
    from safetensors import safe_open

    with safe_open(files.save(fitted(), tmp_path / "m"), "pt") as file:
        assert file.metadata()["version"] == "1"
        assert "module_.hid1.weight" in list(file.keys())
        assert json.loads(file.metadata()["data"])["class"] == "Model"


# Written whole


def test_a_reader_never_sees_half_a_model(tmp_path):
    """Written over and over in one thread and read in another."""
    path, models = tmp_path / "m", [fitted() for _ in range(2)]
    for number, model in enumerate(models):
        nn.init.constant_(model.module_.hid1.weight, number)
        model.n_features_in_ = number
    files.save(models[0], path)
    done = threading.Event()

    def write():
        for turn in range(60):
            files.save(models[turn % 2], path)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    while not done.is_set() or not reads:
        twin = files.load(path, CLASSES)
        assert twin.module_.hid1.weight.eq(twin.n_features_in_).all()
        reads += 1
    writer.join()
    assert reads > 1
    assert os.listdir(tmp_path) == ["m"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = files.save(fitted(), tmp_path / "m")
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        files.save(fitted(hidden=(9,)), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m"]


def test_killed_at_any_moment(tmp_path):
    """A process that writes all the time and is killed (SIGKILL): the file is there, and whole."""
    code = "import sys\nimport torch\nfrom restrain.models import files\nn = 0\nwhile True:\n"
    code += "    n += 1\n    files.write(sys.argv[1], 'test', {'n': n}, {'x': torch.full((200_000,), float(n))})\n"
    code += "    if n == 1:\n        print('ready', flush=True)\n"
    for moment in range(3):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "m")], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        threading.Event().wait(0.002 * 7**moment)
        process.kill()
        process.wait()
        process.stdout.close()
        data, tensors = files.read(tmp_path / "m", "test")
        assert tensors["x"].eq(data["n"]).all()
        assert tensors["x"].shape == (200_000,)


def test_links_are_followed(tmp_path):
    files.save(fitted(), tmp_path / "m")
    (tmp_path / "link").symlink_to("m")
    files.save(fitted(hidden=(1, 2)), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert files.load(tmp_path / "m", CLASSES).hidden == (1, 2)


# What is refused


def rewritten(path, **changes):
    """The same file with another header."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    changes["checksum"] = None  # as in files of version 0.1
    header["__metadata__"] = {k: v for k, v in {**header["__metadata__"], **changes}.items() if v is not None}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return path


def with_data(path, change):
    data = files.read(path, "model")[0]
    change(data)
    return rewritten(path, data=json.dumps(data))


@pytest.fixture
def saved(tmp_path):
    return files.save(fitted(), tmp_path / "m")


def test_every_length_that_is_cut_off(saved):
    content = saved.read_bytes()
    for size in [*range(12), 100, 1000, len(content) // 2, len(content) - 1]:
        saved.write_bytes(content[:size])
        with pytest.raises(FileError, match=f"m is cut off: it has {size:,} bytes of .* copy or download it again"):
            files.load(saved, CLASSES)


@pytest.mark.parametrize("place", [8, 9, 20, 60])
def test_a_damaged_header(saved, place):
    content = bytearray(saved.read_bytes())
    content[place] = 0x01
    saved.write_bytes(content)
    with pytest.raises(FileError, match=r"damaged|isn't a file of restrain"):
        files.load(saved, CLASSES)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PK\x03\x04 and more bytes", "a zip archive, as torch.save writes"),
        (b"\x80\x04cos\nsystem\n", "a pickle"),
        (b"a,b,c\n1,2,3\n", "no safetensors file"),
        (b"\x00" * 200, "no safetensors file"),
    ],
)
def test_foreign_files(tmp_path, content, said):
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(FileError, match=f"isn't a file of restrain but {said}"):
        files.load(tmp_path / "m", CLASSES)


def test_other_safetensors(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "m")
    with pytest.raises(FileError, match=r"a safetensors file of something else \(with w\)"):
        files.load(tmp_path / "m", CLASSES)
    files.write(tmp_path / "m", "plan", {}, {})
    with pytest.raises(FileError, match="holds a plan, where a model was expected"):
        files.load(tmp_path / "m", CLASSES)


def test_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=r"expected one that a model's save\(path\) wrote"):
            files.load(path, CLASSES)


def test_newer_files(saved):
    with pytest.raises(FileError, match=r"restrain 7\.1 wrote it in format 2, .* up to format 1: pip install --up"):
        files.load(rewritten(saved, version="2", restrain="7.1"), CLASSES)
    with pytest.raises(FileError, match="no version"):
        files.load(rewritten(saved, version=None), CLASSES)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update({"class": "os.system"}), "a model is one of Model; the file has 'os.system'"),
        (lambda d: d.pop("class"), "don't fit together"),
        (lambda d: d.pop("settings"), "don't fit together"),
        (lambda d: d["settings"].update(later=1), "no keyword 'later'.*import the module"),
        (lambda d: d["settings"].update(regularizers=[{"$rule": {"what": "none"}}]), "no penalty or transform"),
        (lambda d: d["settings"].update(algo={"$optimizer": "os"}), "optimizer can't be 'os'"),
        (lambda d: d["settings"].update(algo={"$code": "1"}), r"expected one of \$float"),
        (lambda d: d["settings"].update(algo={"$tuple": [], "$dict": []}), r"expected one of \$float"),
        (lambda d: d["learned"].update(classes_={"$array": {"dtype": "V8", "shape": [1], "data": [1]}}), "array can't"),
        (lambda d: d["learned"].update(__class__=1), "isn't the name of something learned"),
        (lambda d: d["learned"].update(get_params=1), "isn't the name of something learned"),
        (
            lambda d: d["learned"]["layers_"][1].update(size=9),
            r"don't fit together: by its layers 'hid1.bias' has the shape \(9,\), and by its tensors \(8,\)",
        ),
        (lambda d: d["learned"]["layers_"][1].update(form="code"), "a layer has a form, and a size"),
        (lambda d: d["learned"]["layers_"].pop(), "don't fit together"),
    ],
)
def test_content_that_is_not_ours(saved, change, said):
    with pytest.raises(FileError, match=said) as caught:
        files.load(with_data(saved, change), CLASSES)
    assert str(saved) in str(caught.value)


def test_deeply_nested_content(saved):
    with pytest.raises(FileError, match="damaged"):
        files.load(rewritten(saved, data="[" * 200_000), CLASSES)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"algo": lambda p: p}, "algo=<function.* it is code.*set_params"),
        ({"hidden": [1, {"a": print}]}, r"hidden\[1\]\['a'\]=<built-in.* it is code"),
        ({"algo": nn.Linear(1, 1)}, "it is code"),
        ({"algo": object()}, "it is of type object"),
        ({"hidden": np.zeros(2, "M8[s]")}, "an array of datetime64"),
        ({"regularizers": [rs.L1().on(lambda name, p: True)]}, r"regularizers\[0\] can't be written"),
    ],
)
def test_what_cannot_be_written(settings, said, tmp_path):
    with pytest.raises(FileError, match=said):
        files.save(fitted(**settings), tmp_path / "m")
    assert not os.listdir(tmp_path)


def test_not_fitted(tmp_path):
    with pytest.raises(FileError, match="call fit or train, then save"):
        files.save(Model(), tmp_path / "m")


def test_unused_registered_penalties_are_not_needed_to_read(tmp_path):
    path = files.save(fitted(l1=None), tmp_path / "m")
    assert "l1" not in files.read(path, "model")[0]["settings"]
    path = files.save(fitted(l1=0.1), tmp_path / "m")
    assert files.load(path, CLASSES).l1 == 0.1


def test_reading_never_unpickles_or_imports(saved):
    code = f"""
import builtins, pickle
import torch
from restrain.models import files
import safetensors.torch
import torch.fx.experimental.symbolic_shapes  # as torch 2.10 does on the meta device
with torch.device("meta"):  # imports what it needs
    pass
from tests.plans.test_files import CLASSES
def forbidden(*args, **keywords):
    raise AssertionError("code from a file")
pickle.load = pickle.loads = pickle.Unpickler = builtins.eval = builtins.exec = torch.load = forbidden
model = files.load({str(saved)!r}, CLASSES)
assert model.n_features_in_ == 4
"""
    folder = str(Path(__file__).parents[2])
    search = os.pathsep.join([folder, *filter(None, sys.path)])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": search})
