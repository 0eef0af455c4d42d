"""What TensorBoard, Weights & Biases and MLflow receive through the trainers' own loggers, read back from their files.

Nothing here needs a network: W&B is offline, MLflow writes into a folder. They are imported late, as they take
seconds.
"""

import importlib.util
import json
import struct
import sys

import numpy as np
import pytest
import torch
from torch import nn

import restrain as rs
from restrain.integrations import logs

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::RuntimeWarning"),
]
STEPS = 4
X = torch.randn(4 * STEPS, 4, generator=torch.Generator().manual_seed(0))
# Rules without names of their own, whose labels are full of what MLflow refuses.
PLAN = [0.1 * rs.L2().on("*.weight"), rs.schedules.WarmUp(8) * rs.L1().on("*0.weight", how="proximal")]
NAMES = ["data_loss", "penalty", "penalties/0.1_L2_on_.weight", "penalties/schedules.WarmUp_steps_8_L1_on_0.weight"]
NAMES += ["strengths/schedules.WarmUp_steps_8_L1_on_0.weight"]


def needs(*packages):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def kinds(*fast):
    """Every logger, those that are not named as fast as slow tests."""
    given = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
    marks = {kind: [needs(package), *[pytest.mark.slow] * (kind not in fast)] for kind, package in given.items()}
    return pytest.mark.parametrize("kind", [pytest.param(kind, marks=mark) for kind, mark in marks.items()])


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch, request):
    settings = {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_CONFIG_DIR": str(tmp_path / "config"),
        "WANDB_CACHE_DIR": str(tmp_path / "cache"),
        "WANDB_DATA_DIR": str(tmp_path / "data"),
        "WANDB_LOG_MODEL": "false",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "TENSORBOARD_LOGGING_DIR": str(tmp_path),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    if "mlflow" in request.node.name:
        import mlflow

        mlflow.set_tracking_uri(f"file:{tmp_path}/mlruns")
    yield
    if "mlflow" in sys.modules:
        sys.modules["mlflow"].end_run()


def from_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(folder.rglob("events.out*")).parent))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def wandb_records(path):
    """The records of a .wandb file: LevelDB's log format after seven bytes (W&B 0.31 has no reader in Python)."""
    data, at, record = path.read_bytes(), 7, b""
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:  # too small for a header: filled up with zeros
            at += left
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)  # after a checksum
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def from_wandb(folder):
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.finish()
    wandb.teardown()  # its process writes the file, which is whole when that has ended
    found = {}
    for data in wandb_records(next(folder.rglob("*.wandb"))):
        for item in Record.FromString(data).history.item:
            name = item.key or "/".join(item.nested_key)
            found.setdefault(name, []).append(json.loads(item.value_json))
    return found


def from_mlflow(folder):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"file:{folder}/mlruns")
    experiments = [one.experiment_id for one in client.search_experiments()]
    (run,) = client.search_runs(experiments)
    return {name: [m.value for m in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics}


READERS = {"tensorboard": from_tensorboard, "wandb": from_wandb, "mlflow": from_mlflow}


def assert_logged(folder, kind, count, under=""):
    """Every name, with as many values as there were logs; these add up, and the strength moves."""
    found = READERS[kind](folder)
    found = {name.removeprefix(under): values for name, values in found.items()}
    assert {name: len(found.get(name, ())) for name in NAMES} == dict.fromkeys(NAMES, count)
    np.testing.assert_allclose(found["penalty"], np.sum([found[name] for name in NAMES[2:4]], 0), rtol=1e-5)
    assert min(found["data_loss"]) > 0
    assert len(set(found[NAMES[4]])) == count


def test_the_names_fit_every_logger():
    model = nn.Linear(3, 2)
    with rs.attach(model, [rs.L2().on("weight", name=name) for name in ("a/b", "a?b", "..", "é * 2", "x.y-z")]) as reg:
        found = logs(reg)
    assert list(found)[1:] == [f"penalties/{name}" for name in ("a_b", "a_b_2", "rule", "2", "x.y-z")]


class Net(nn.Module):
    """A model as each of the trainers wants it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))

    def forward(self, x, labels=None):
        y = self.layers(x)
        return y if labels is None else {"loss": (y - labels).square().mean(), "logits": y}


def data():
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), batch_size=4)


@needs("lightning")
@kinds()  # with its CSVLogger in test_lightning
def test_lightning(tmp_path, kind):
    import lightning.pytorch as pl
    from lightning.pytorch import loggers

    from restrain.integrations.lightning import RestrainCallback

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, batch, index):
            return (self.net(batch[0]) - 1).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    makers = {
        "tensorboard": lambda: loggers.TensorBoardLogger(tmp_path),
        "wandb": lambda: loggers.WandbLogger(save_dir=tmp_path, offline=True),
        "mlflow": lambda: loggers.MLFlowLogger(tracking_uri=f"file:{tmp_path}/mlruns"),
    }
    options = {"accelerator": "cpu", "enable_model_summary": False, "enable_progress_bar": False}
    options |= {"max_epochs": 1, "log_every_n_steps": 1, "enable_checkpointing": False}
    run = pl.Trainer(logger=makers[kind](), callbacks=[RestrainCallback(PLAN)], **options)
    run.fit(Module(), data())
    assert_logged(tmp_path, kind, STEPS)


@needs("transformers", "accelerate")
@kinds()  # TensorBoard's is in test_huggingface
def test_huggingface(tmp_path, kind):
    import transformers

    from restrain.integrations.huggingface import RestrainCallback

    options = {"max_steps": STEPS, "logging_steps": 1, "learning_rate": 0.01, "per_device_train_batch_size": 4}
    options |= {"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "report_to": [kind]}
    args = transformers.TrainingArguments(output_dir=str(tmp_path / "out"), **options)
    rows = [{"x": x, "labels": x.new_ones(1)} for x in X]
    run = transformers.Trainer(Net(), args, train_dataset=rows)
    RestrainCallback(PLAN).add_to(run)
    run.train()
    assert_logged(tmp_path, kind, STEPS, under="train/")


@needs("skorch")
@kinds("tensorboard", "mlflow")
def test_skorch(tmp_path, kind):
    import skorch
    from skorch import callbacks

    from restrain.integrations.skorch import RestrainCallback

    def make():
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            return callbacks.TensorBoard(SummaryWriter(str(tmp_path)))
        if kind == "wandb":
            import wandb

            return callbacks.WandbLogger(wandb.init(), save_model=False)
        sys.modules["mlflow"].start_run()
        return callbacks.MlflowLogger()

    options = {"max_epochs": 3, "lr": 0.01, "verbose": 0, "train_split": None}
    net = skorch.NeuralNetRegressor(Net, callbacks=[RestrainCallback(PLAN), make()], **options)
    net.fit(X.numpy(), X.sum(1, keepdim=True).numpy())
    assert_logged(tmp_path, kind, 3)


@needs("accelerate")
@kinds("tensorboard")
def test_accelerate(tmp_path, kind):
    import accelerate

    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, log_with=kind, project_dir=tmp_path)
    accelerator.init_trackers("rules")
    model, optimizer = accelerator.prepare(model := Net(), torch.optim.SGD(model.parameters(), lr=0.01))
    reg = rs.attach(model, PLAN, optimizer)
    for step, (x,) in enumerate(data()):
        loss = (model(x) - 1).square().mean()
        accelerator.backward(reg.loss(loss))
        optimizer.step()
        optimizer.zero_grad()
        accelerator.log(logs(reg, loss), step=step)
    accelerator.end_training()
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert_logged(tmp_path, kind, STEPS)


def test_tracked_steps_are_among_the_logged_values():
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = rs.attach(model, 0.1 * rs.GroupLasso(per="out").on("weight", name="rows"), optimizer, track=2)
    for _ in range(2):
        assert list(logs(reg)) == ["penalty", "penalties/rows"]
        reg.loss(model(X).sum()).backward()
        optimizer.step()
    found = logs(reg)
    assert list(found)[2:] == ["zeros/weight", "zero_groups/weight", "dead/weight", "norms/weight"]
    assert found["norms/weight"] == pytest.approx(model.weight.norm().item())
