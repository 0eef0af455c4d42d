"""The two jobs of fit.py and their data."""

from dataclasses import dataclass, replace

import numpy as np
from measure import HERE

DIGITS = HERE.parent.parent / "shared" / "data" / "mnist10k.npz"


@dataclass(frozen=True)
class Job:
    """A network and its data."""

    name: str
    sizes: tuple
    x: np.ndarray
    y: np.ndarray | None  # None: the inputs are the targets

    def of(self, rows):
        return replace(self, x=self.x[rows], y=None if self.y is None else self.y[rows])

    def loss(self, found):
        """Cross-entropy of probabilities, or the squared error of an entry, in the mean."""
        if self.y is None:
            return float(np.square(found - self.x).mean())
        return float(-np.log(np.clip(found[np.arange(len(self.y)), self.y], 1e-12, 1)).mean())


def jobs(quick=False):
    """{name: job} on 10,000 digits, and where they are from."""
    if DIGITS.exists():
        with np.load(DIGITS) as file:
            x, y = file["X"].astype("float32") / 255, file["y"].astype("int64")
        source = "10,000 MNIST digits"
    else:
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        x = np.tile(x.astype("float32") / 16, (6, 13))[:10_000, :784]
        y, source = np.tile(y, 6)[:10_000], "scikit-learn's digits, tiled to 10,000 × 784, as ../shared holds no MNIST"
    order = np.random.default_rng(0).permutation(len(x))[: 256 if quick else None]
    x, y = np.ascontiguousarray(x[order]), y[order]
    made = [Job("classifier", (784, 100, 10), x, y), Job("autoencoder", (784, 20 if quick else 1000, 784), x, None)]
    return {job.name: job for job in made}, source
