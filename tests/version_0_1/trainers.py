"""Trainers' own checkpoints, with what the callbacks put into them. Each function needs the trainer's package."""

import torch
from torch import nn
from torch.nn import functional as F

import restrain as rs
from version_0_1.common import digests, numbers, settled

X = numbers(32, 4, seed=1).float()
Y = X.sum(1, keepdim=True) / 2


def network():
    return settled(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)))


def plan(prefix=""):
    return [
        rs.schedules.WarmUp(12) * 1e-1 * rs.L2().on(f"{prefix}*.weight", name="decay"),
        1e-1 * rs.Distance(decay=0.5).on(f"{prefix}0.weight", name="near"),
        rs.Target(zeros=0.3, start=1e-2, every=2) * rs.L1().on(f"{prefix}2.weight", how="proximal", name="zeros"),
        1e-2 * rs.L1().on(rs.outputs(f"{prefix}1"), name="code"),
    ]


def lightning():
    """A module and a trainer for so many epochs: `fit(checkpoint)` trains and `save(path)` saves."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, index):
            return F.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.02)

    from restrain.integrations.lightning import RestrainCallback

    off = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}

    def fit(epochs, checkpoint=None, save=None):
        trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[RestrainCallback(plan("net."))], **off)
        module = Module()
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=8)
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        if save is not None:
            trainer.save_checkpoint(save)
        return digests(module.net)

    return fit


class Predictor(nn.Module):
    """A model as Hugging Face's Trainer wants it: it returns its loss."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x, labels=None):
        out = self.net(x)
        return {"loss": F.mse_loss(out, labels), "logits": out}


def huggingface():
    """`fit(steps)` trains a model, `callback.load(folder)` before it if there is one; `save(folder)` behind it."""
    from transformers import Trainer, TrainingArguments

    from restrain.integrations.huggingface import RestrainCallback

    class InOrder(Trainer):
        def _get_train_sampler(self, *args):
            return None

    given = {"per_device_train_batch_size": 8, "learning_rate": 0.02, "optim": "sgd", "max_grad_norm": 0}
    given |= {"report_to": [], "use_cpu": True, "lr_scheduler_type": "constant", "disable_tqdm": True, "save_steps": 4}

    def fit(steps, folder, state=None):
        model = Predictor()
        rows = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
        trainer = InOrder(model, TrainingArguments(str(folder), max_steps=steps, **given), train_dataset=rows)
        callback = RestrainCallback(plan("net.")).add_to(trainer)
        if state is not None:
            model.load_state_dict(torch.load(state / "model.pt", weights_only=True))
            callback.load(state)
        trainer.train()
        return model

    return fit


def skorch():
    """A net for so many epochs, which takes up and leaves what is in a folder."""
    from skorch import NeuralNetRegressor
    from skorch.callbacks import LoadInitState, TrainEndCheckpoint

    from restrain.integrations.skorch import RestrainCallback

    def net(epochs, folder=None):
        callbacks = [("rules", RestrainCallback(plan()))]
        if folder is not None:
            end = TrainEndCheckpoint(dirname=folder, f_rules="rules.pt")
            callbacks += [("load", LoadInitState(end)), ("save", end)]
        off = {"iterator_train__shuffle": False, "verbose": 0, "train_split": None}
        return NeuralNetRegressor(
            network(), callbacks=callbacks, max_epochs=epochs, lr=0.02, batch_size=8, optimizer__momentum=0.5, **off
        )

    return net
