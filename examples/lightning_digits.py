"""Lightning: a network on the digits whose first layer loses pixels that it can do without.

    pip install 'restrain[lightning]' scikit-learn
    python examples/lightning_digits.py

The plan names the layers as the LightningModule does; `training_step` has no word about penalties.
"""

import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import restrain as rs
from restrain.integrations.lightning import RestrainCallback

PLAN = [
    3e-3 * rs.GroupLasso("in").on("net.0.weight", how="proximal", name="pixels"),  # a pixel's weights go together
    1e-3 * rs.L1().on("net.2.weight", how="proximal", name="head"),
    1e-3 * rs.L1().on(rs.outputs("net.1"), name="code"),  # this one is in the loss
]


class Digits(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))

    def training_step(self, batch, index):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def main():
    torch.manual_seed(0)
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    data = TensorDataset(x.float() / 16, y)
    train, test = torch.utils.data.random_split(data, [1000, 797])
    model = Digits()
    trainer = Trainer(
        max_epochs=15, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[RestrainCallback(PLAN)]
    )
    trainer.fit(model, DataLoader(train, batch_size=50, shuffle=True), DataLoader(test, batch_size=797))
    pixels = int((model.net[0].weight == 0).all(0).sum())
    print(f"test accuracy: {trainer.callback_metrics['accuracy']:.4f}")
    print(f"data loss: {trainer.callback_metrics['data_loss']:.4f}, penalty: {trainer.callback_metrics['penalty']:.4f}")
    print(f"pixels that nothing reads: {pixels} of 64")
    print(f"exact zeros in the head: {int((model.net[2].weight == 0).sum())} of 1000")


if __name__ == "__main__":
    main()
