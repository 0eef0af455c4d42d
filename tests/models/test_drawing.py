"""The random numbers of a compiled update: their formula, and their distributions.

Bounds are four standard errors of the stated number of draws, by a fixed seed.
"""

import numpy as np
import torch

from restrain.models import drawing


def mixed(positions, key):
    """The same in NumPy, one number after the other."""
    found = []
    for position in positions:
        h = int(position) + int(key[0])
        for then in (int(key[1]), 0):
            h &= 0xFFFFFFFF
            h = ((h ^ (h >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
            h = ((h ^ (h >> 15)) * 0x735A2D97) & 0xFFFFFFFF
            h = (h ^ (h >> 15)) ^ then
        found.append(h & 0xFFFFFFFF)
    return np.array(found, np.uint32)


def test_bits_are_those_of_the_formula():
    torch.manual_seed(0)
    for key in drawing.keys(3)[:, 0]:
        drawn = drawing.bits(5, 37, key).numpy().view(np.uint32)
        np.testing.assert_array_equal(drawn, mixed(range(5, 42), key))


def keyed(draw, shape, count, seed=0):
    torch.manual_seed(seed)
    like = torch.zeros(shape)
    return torch.stack([draw(like, key[0]) for key in drawing.keys(count)])


def test_uniform_numbers():
    drawn = keyed(drawing.uniform, (1000,), 500).numpy()
    assert 0 <= drawn.min() < 1e-5
    assert 1 - 1e-5 < drawn.max() < 1
    counts = np.histogram(drawn, 256, (0, 1))[0]
    assert abs(((counts - 500_000 / 256) ** 2 / (500_000 / 256)).sum() - 255) < 4 * (2 * 255) ** 0.5
    bits = (drawn.ravel()[:, None] * 2**24).astype("i8") >> np.arange(24) & 1
    assert np.abs(bits.mean(0) - 0.5).max() < 4 * 0.5 / 500_000**0.5
    pairs = np.abs(np.corrcoef(bits[:20_000].T) - np.eye(24)).max()
    assert pairs < 5 / 20_000**0.5


def test_normal_numbers():
    drawn = keyed(drawing.normal, (25, 39), 500).numpy().reshape(500, -1)  # an odd number of them
    n = drawn.size
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((drawn.astype("f8") ** power).mean() - expected) < 4 * (variance / n) ** 0.5
    ordered = torch.special.ndtr(torch.from_numpy(np.sort(drawn, None)).double()).numpy()
    assert np.abs(ordered - (np.arange(n) + 0.5) / n).max() < 1.95 / n**0.5  # Kolmogorov and Smirnov, one in a thousand
    for apart in (1, 39, 487):  # neighbours, rows, the two of a pair
        assert abs((drawn[:, apart:] * drawn[:, :-apart]).mean()) < 4 / n**0.5
    assert abs((drawn[1:] * drawn[:-1]).mean()) < 4 / n**0.5  # from update to update
    assert len(np.unique(drawn)) > 0.9 * n


def test_dropout_by_keys():
    for rate_ in (0.0, 0.1, 0.5, 0.9):
        drawn = keyed(lambda like, key: drawing.dropped(like + 1, rate_, key), (1000,), 300)  # noqa: B023
        assert set(drawn.unique().tolist()) <= {0.0, torch.tensor(1 / (1 - rate_)).item()}
        assert abs((drawn == 0).double().mean().item() - rate_) <= 4 * (rate_ * (1 - rate_) / 300_000) ** 0.5
