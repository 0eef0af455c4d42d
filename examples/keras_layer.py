"""Keras 3 on its torch backend: our penalties as regularisers of its layers, beside its own.

    pip install restrain keras scikit-learn
    python examples/keras_layer.py

The environment variable KERAS_BACKEND must say "torch" before keras is imported.
"""

import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
from sklearn.datasets import load_digits

import restrain as rs


def model(first, second):
    keras.utils.set_random_seed(0)
    layers = [keras.Input((64,)), keras.layers.Dense(32, "relu", kernel_regularizer=first)]
    net = keras.Sequential([*layers, keras.layers.Dense(10, kernel_regularizer=second)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    net.compile(keras.optimizers.Adam(5e-3), loss, metrics=["accuracy"], jit_compile=False)
    return net


def main():
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32")
    pairs = {
        "Keras' own": (keras.regularizers.L1(1e-4), keras.regularizers.L2(1e-3)),
        "ours, the same": (1e-4 * rs.L1(), 1e-3 * rs.L2()),
        "ours, by group": (1e-3 * rs.GroupLasso(0), 1e-3 * rs.Huber(0.1)),  # a kernel is (inputs, units)
    }
    for name, pair in pairs.items():
        net = model(*pair)
        net.fit(x[:1000], y[:1000], epochs=5, batch_size=50, shuffle=False, verbose=0)
        loss, accuracy = net.evaluate(x[1000:], y[1000:], verbose=0)
        print(f"{name}: loss with penalties {loss:.4f}, of these {float(sum(net.losses)):.4f}, accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
