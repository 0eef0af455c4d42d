"""skorch: a scikit-learn classifier in PyTorch with rules; skorch prints the data loss apart.

    pip install 'restrain[skorch]' scikit-learn
    python examples/skorch_digits.py

The penalties are in train_loss, not in valid_loss.
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from skorch import NeuralNetClassifier
from torch import nn

import restrain as rs
from restrain.integrations.skorch import RestrainCallback

PLAN = [
    1e-3 * rs.L1().on("*.weight", how="proximal", name="zeros"),
    1e-4 * rs.L2().on("*.weight", name="decay"),
    rs.Dropout(0.2).on(rs.outputs("1")),
]


def main():
    torch.manual_seed(0)
    X, y = load_digits(return_X_y=True)
    X = (X / 16).astype(np.float32)
    net = NeuralNetClassifier(
        nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10)),
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        lr=5e-3,
        batch_size=50,
        max_epochs=15,
        callbacks=[("rules", RestrainCallback(PLAN))],
    )
    net.fit(X[:1000], y[:1000])
    weights = [p for name, p in net.module_.named_parameters() if name.endswith("weight")]
    print(f"test accuracy: {np.mean(net.predict(X[1000:]) == y[1000:]):.4f}")
    print(f"exact zeros: {sum(int((w == 0).sum()) for w in weights)} of {sum(w.numel() for w in weights)}")


if __name__ == "__main__":
    main()
