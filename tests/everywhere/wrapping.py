"""Optimizers around optimizers, and those whose weights aren't what they evaluate; Lightning's manual optimization."""

import logging
import tempfile
import warnings

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

import restrain as rs
from everywhere.by_hand import WITH_PROX, Hand
from everywhere.column import column
from everywhere.optimizing import GROUP, compared
from everywhere.training import PROGRESS, STEPS, Net, adam, batch, fresh, plain, seed
from stand_ins import SAM, SGDScheduleFree

RHO = 0.05


def sharpness_by_hand(kind, strengths):
    """Two gradients a step: the second where the first leads uphill; the optimizer acts at the weights themselves."""
    model = fresh()
    trained = Hand(kind, model, [adam(model.parameters())], strengths)

    def gradient(step):
        x, y = batch(step)
        model.zero_grad()
        seed(step)
        out, penalty = trained.out(x)
        (F.cross_entropy(out, y) + penalty).backward()

    for step in range(STEPS):
        gradient(step)
        before = [p.detach().clone() for p in model.parameters()]
        with torch.no_grad():
            for p in model.parameters():
                p.add_(RHO * p.grad)
        gradient(step)
        with torch.no_grad():
            for p, old in zip(model.parameters(), before, strict=True):
                p.copy_(old)
        if kind.name == "parameter-penalty-as-gradient":
            trained.elastic().backward()
        trained.step()
    return trained.weights()


@column("sharpness-aware minimisation (SAM) around Adam, with a closure", GROUP, fast=True, rounding=1e-9)
def sharpness(kind):
    model = fresh()
    optimizer = SAM(model.parameters(), torch.optim.Adam, rho=RHO, lr=0.05)
    torch.manual_seed(5)
    reg, strengths = rs.attach(model, kind.make(), optimizer), []
    for step in range(STEPS):
        strengths.append(list(reg.strengths().values()))

        def closure(step=step):
            x, y = batch(step)
            optimizer.zero_grad()
            seed(step)
            loss = reg.loss(F.cross_entropy(model(x), y))
            loss.backward()
            return loss

        closure()
        optimizer.step(closure)
        PROGRESS.append(step)
    reg.detach()
    return [p.detach() for p in model.parameters()], sharpness_by_hand(kind, strengths)


AVERAGED = "SGDScheduleFree (holds|evaluates) .* can't be right: (use|for)"


@column(
    "a schedule-free optimizer, whose weights are averages",
    GROUP,
    fast=True,
    rounding=1e-9,
    refuses=dict.fromkeys(("decoupled-decay", "cautious-decay", "projection", "norms-held", *WITH_PROX), AVERAGED)
    | {"sharpness": "SGDScheduleFree keeps none as it is set"},
)
def schedule_free(kind):
    return compared(kind, lambda model: [SGDScheduleFree(model.parameters(), lr=0.1)])


def module_of_lightning(base):
    """A class with the layers of `Net` that trains itself."""

    class Module(base):
        def __init__(self):
            super().__init__()
            net = Net()
            self.first, self.act, self.head = net.first, net.act, net.head
            self.automatic_optimization = False

        def forward(self, x):
            return self.head(self.act(self.first(x)))

        def training_step(self, step, index):
            x, y = batch(int(step))
            seed(int(step))
            self.optimizers().zero_grad()
            self.manual_backward(F.cross_entropy(self(x), y))
            self.optimizers().step()
            PROGRESS.append(step)

        def configure_optimizers(self):
            return adam(self.parameters())

    return Module


def fitted_by_lightning(rules):
    """The weights after manual optimization with the callback."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # Lightning's own, at import and of data without workers
        from lightning.pytorch import LightningModule, Trainer

        from restrain.integrations.lightning import RestrainCallback

        model, data = fresh(module_of_lightning(LightningModule)), DataLoader(range(STEPS), batch_size=None)
        callbacks = [RestrainCallback(rules)]
        trainer = Trainer(max_epochs=1, accelerator="cpu", default_root_dir=folder, callbacks=callbacks, **quiet)
        trainer.fit(model, data)
    return [p.detach() for p in model.parameters()]


@column("Lightning's manual optimization, with the callback", GROUP, fast=True)
def lightning_manual(kind):
    return fitted_by_lightning(kind.make()), plain(kind)["weights"]
