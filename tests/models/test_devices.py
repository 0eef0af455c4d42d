"""Mixed precision, other devices and several processes, by Lightning Fabric, which is loaded only then."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import restrain as rs
from restrain.errors import PlanError

RNG = np.random.default_rng(0)
X, Y = RNG.random((64, 10)), RNG.integers(0, 3, 64)

SCRIPT = """
import os, sys
import numpy as np, torch
import restrain as rs

torch.set_num_threads(1)
rng = np.random.default_rng(0)
x, y = rng.random((64, 10)), rng.integers(0, 3, 64)
model = rs.Classifier(
    hidden=(12, (7, "tanh")), epochs=2, batch_size=16, random_state=0, valid=0.25, learning_rate=0.01,
    weight_l2=1e-3, hidden_l1=1e-2, contractive=1e-2, weight_l1={"strength": 1e-3, "how": "proximal"},
    max_gradient_norm=1.0, max_norm=2.0,
)
model.fit(x, y).train((x, y, 1.0 + y))
if os.environ.get("RANK", "0") == "0":
    torch.save([model.module_.state_dict(), model.history_], sys.argv[1])
"""


def test_fabric_and_torchs_compiler_are_loaded_only_when_they_are_asked_for():
    given = "epochs=1, weight_l2=1e-3, hidden_l1=1e-3, weight_l1=dict(strength=1e-3, how='proximal'), input_noise=0.1"
    code = f"import sys, restrain as rs; rs.Classifier({given}).fit([[0.0], [1.0]], [0, 1]); print(*sys.modules)"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "sklearn" in seen
    assert not [name for name in seen if name.startswith(("lightning", "accelerate", "torch._dynamo", "sympy"))]


def test_what_fabric_is_needed_for_without_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    rs.Classifier(epochs=1).fit(X, Y)
    with pytest.raises(PlanError, match=r"restrain\[devices\]"):
        rs.Classifier(precision="bf16-mixed").fit(X, Y)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Fabric's own
def test_mixed_precision():
    pytest.importorskip("lightning_fabric")
    rules = {"hidden_l1": 1e-3, "contractive": 1e-3, "input_noise": 0.1, "hidden_dropout": 0.1, "weight_l2": 1e-3}
    given = {"hidden": ((12, "tanh"),), "epochs": 5, "random_state": 0, "max_gradient_norm": 1.0, "valid": 0.2}
    mixed = rs.Classifier(**given, precision="bf16-mixed").fit(X.astype("f4"), Y, **rules)
    exact = rs.Classifier(**given).fit(X.astype("f4"), Y, **rules)
    assert mixed.module_.out.weight.dtype == torch.float32
    for one, other in zip(mixed.history_, exact.history_, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02)
        assert one["contractive"] == pytest.approx(other["contractive"], rel=0.05)
    assert not torch.equal(mixed.module_.out.weight, exact.module_.out.weight)


@pytest.mark.filterwarnings("default")
def test_devices_and_precisions_that_there_are_not():
    pytest.importorskip("lightning_fabric")
    with pytest.raises(PlanError, match=r"device='quantum'.*invalid accelerator"):
        rs.Classifier(device="quantum").fit(X, Y)
    with pytest.raises(PlanError, match="precision= is '32', '64', '16-mixed', 'bf16-mixed' or None; got 'half'"):
        rs.Classifier(precision="half").fit(X, Y)
    if not torch.cuda.is_available():
        with pytest.raises(PlanError, match=r"device='cuda'.*not available"):
            rs.Classifier(device="cuda").fit(X, Y)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("default")
def test_on_a_gpu():
    rules = {"hidden_l1": 1e-3, "weight_l2": 1e-3, "weight_l1": {"strength": 1e-4, "how": "proximal"}}
    given = {"hidden": (12,), "epochs": 5, "random_state": 0, "valid": 0.2, **rules}
    here, there = (rs.Classifier(**given, device=device).fit(X.astype("f4"), Y) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(there.predict_proba(X), here.predict_proba(X), atol=1e-4)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    pytest.importorskip("lightning_fabric")
    (tmp_path / "script.py").write_text(SCRIPT)
    found = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]):
        path: Path = tmp_path / f"result{len(found)}"
        command = [sys.executable, *launcher, str(tmp_path / "script.py"), str(path)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr[-3000:]
        found.append(torch.load(path))
    (one, rows), (two, others) = found
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-9, atol=1e-11)
    for row, other in zip(rows, others, strict=True):
        assert row == pytest.approx(other, rel=1e-9)
