"""A penalty as the regulariser of a Keras 3 layer, in a process whose Keras runs on torch."""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="keras isn't installed")

SCRIPT = """
import keras, numpy as np, torch
import restrain as rs

keras.utils.set_random_seed(0)
ours = keras.layers.Dense(3, kernel_regularizer=0.1 * rs.L1() + 0.2 * rs.L2(), bias_regularizer=0.3 * rs.L2())
both, bias = keras.regularizers.L1L2(0.1, 0.2), keras.regularizers.L2(0.3)
peers = keras.layers.Dense(3, kernel_regularizer=both, bias_regularizer=bias)
models = [keras.Sequential([keras.Input((4,)), layer]) for layer in (ours, peers)]
models[1].set_weights(models[0].get_weights())
x = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
for model in models:
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse", jit_compile=False)
    model.fit(x, x[:, :3], epochs=2, batch_size=8, shuffle=False, verbose=0)
    print(model.evaluate(x, x[:, :3], verbose=0))
for a, b in zip(models[0].get_weights(), models[1].get_weights()):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
np.testing.assert_allclose([float(l) for l in models[0].losses], [float(l) for l in models[1].losses], rtol=1e-5)
"""


@pytest.mark.slow
def test_a_penalty_is_a_keras_regularizer():
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        capture_output=True,
        text=True,
        env={**os.environ, "KERAS_BACKEND": "torch"},
    )
    assert run.returncode == 0, run.stderr
    ours, peers = map(float, run.stdout.split())
    assert ours == pytest.approx(peers, rel=1e-5)
