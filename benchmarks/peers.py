"""The jobs of fit.py by restrain and by its peers: each trains epoch by epoch and asks after each whether to go on.

A peer is a function (job, algo) → object with `train(tick)`, which ends when tick() is false, and `predict(x)`, which
gives probabilities or reconstructions. The same network, batch size, optimizer and settings for all; a bar or log of
their own is off, ours is on.
"""

import inspect

import numpy as np

BATCH, MANY = 64, 10_000
RATES = {"sgd": 0.05, "adam": 1e-3}


class Ours:
    """restrain's estimators; `compile` is left out where the installed version doesn't have it."""

    def __init__(self, job, algo, epochs=100, **keywords):
        import restrain as rs

        kind = rs.Classifier if job.y is not None else rs.Autoencoder
        if "compile" in keywords and "compile" not in inspect.signature(kind).parameters:
            raise ImportError("compile= isn't a keyword of this version")
        known = {"learning_rate": RATES[algo], "momentum": 0.9 if algo == "sgd" else None, "batch_size": BATCH}
        self.job = job
        self.model = kind(list(job.sizes), algo=algo, epochs=epochs, progress=True, random_state=0, **known, **keywords)

    def epochs(self):
        """One epoch a `next`."""
        data = self.job.x if self.job.y is None else (self.job.x, self.job.y)
        return self.model.itertrain(data)

    def train(self, tick):
        for _ in self.epochs():
            if not tick():
                break

    def predict(self, x):
        return self.model.predict_proba(x) if self.job.y is not None else self.model.predict(x)


def network(job):
    from torch import nn

    ins, hidden, outs = job.sizes
    return nn.Sequential(nn.Linear(ins, hidden), nn.ReLU(), nn.Linear(hidden, outs))


def torch_loss(job):
    from torch.nn import functional as F

    return F.cross_entropy if job.y is not None else F.mse_loss


def torch_optimizer(algo, ps):
    import torch

    if algo == "sgd":
        return torch.optim.SGD(ps, lr=RATES["sgd"], momentum=0.9)
    return torch.optim.Adam(ps, lr=RATES["adam"], fused=True)


def torch_data(job):
    import torch

    x = torch.from_numpy(job.x)
    return x, x if job.y is None else torch.from_numpy(job.y)


class ByHand:
    """The loop that one writes: shuffled rows of preloaded tensors, no synchronisation an update."""

    def __init__(self, job, algo):
        self.job, self.net, self.loss = job, network(job), torch_loss(job)
        self.optimizer = torch_optimizer(algo, self.net.parameters())

    def update(self, x, y):
        self.optimizer.zero_grad()
        loss = self.loss(self.net(x), y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def train(self, tick):
        import torch

        x, y = torch_data(self.job)
        going = True
        while going:
            total = torch.zeros(())
            for rows in torch.randperm(len(x)).split(BATCH):
                total += self.update(x[rows], y[rows]) * len(rows)
            (total / len(x)).item()
            going = tick()

    def predict(self, x):
        import torch

        with torch.no_grad():
            found = self.net(torch.from_numpy(x))
        return (found.softmax(1) if self.job.y is not None else found).numpy()


class Compiled(ByHand):
    """The same with the whole step compiled: forward, backward, and the optimizer written out."""

    def __init__(self, job, algo):
        import torch

        super().__init__(job, algo)
        ps = dict(self.net.named_parameters())
        slow, fast = ({name: torch.zeros_like(p) for name, p in ps.items()} for _ in range(2))
        self.count = torch.zeros(())

        def value(ps, x, y):
            return self.loss(torch.func.functional_call(self.net, ps, (x,)), y)

        def step(x, y, count):
            grads, loss = torch.func.grad_and_value(value)({name: p.detach() for name, p in ps.items()}, x, y)
            with torch.no_grad():
                for name, p in ps.items():
                    if algo == "sgd":
                        p.sub_(slow[name].mul_(0.9).add_(grads[name]), alpha=RATES["sgd"])
                        continue
                    slow[name].lerp_(grads[name], 0.1)
                    fast[name].lerp_(grads[name].square(), 0.001)
                    scale = (fast[name] / (1 - 0.999**count)).sqrt_().add_(1e-8)
                    p.sub_(RATES["adam"] * slow[name] / (1 - 0.9**count) / scale)
            return loss

        self.step = torch.compile(step, dynamic=False)

    def update(self, x, y):
        self.count += 1
        return self.step(x, y, self.count)


class Jax:
    """JAX and optax: a compiled step for each batch, or a whole epoch as one scan."""

    def __init__(self, job, algo, scan=False):
        import jax
        import optax
        from jax import numpy as jnp

        self.job, self.scan, self.key = job, scan, jax.random.key(0)
        ins, hidden, outs = job.sizes
        rng, shapes = np.random.default_rng(0), ((ins, hidden), (hidden, outs))
        self.ps = [(jnp.asarray(rng.uniform(-1, 1, s).astype("f4") / s[0] ** 0.5), jnp.zeros(s[1])) for s in shapes]
        rate = RATES[algo]
        self.optimizer = optax.sgd(rate, momentum=0.9) if algo == "sgd" else optax.adam(rate)
        self.state = self.optimizer.init(self.ps)
        self.x, self.y = jnp.asarray(job.x), jnp.asarray(job.x if job.y is None else job.y)
        self.update = jax.jit(self._update, donate_argnums=0)
        self.epoch = jax.jit(
            lambda carried, x, y, batches: jax.lax.scan(
                lambda carried, rows: self._update(carried, x, y, rows), carried, batches
            ),
            donate_argnums=0,
        )

    @staticmethod
    def forward(ps, x):
        import jax

        (w1, b1), (w2, b2) = ps
        return jax.nn.relu(x @ w1 + b1) @ w2 + b2

    def _value(self, ps, x, y):
        import optax

        found = self.forward(ps, x)
        if self.job.y is None:
            return ((found - y) ** 2).mean()
        return optax.softmax_cross_entropy_with_integer_labels(found, y).mean()

    def _update(self, carried, x, y, rows):
        import jax
        import optax

        ps, state = carried
        loss, grads = jax.value_and_grad(self._value)(ps, x[rows], y[rows])
        updates, state = self.optimizer.update(grads, state, ps)
        return (optax.apply_updates(ps, updates), state), loss

    def train(self, tick):
        import jax

        carried, size, going = (self.ps, self.state), len(self.x), True
        whole = size // BATCH * BATCH
        while going:
            self.key, key = jax.random.split(self.key)
            order, total = jax.random.permutation(key, size), 0.0
            if self.scan and whole:
                batches = order[:whole].reshape(-1, BATCH)
                carried, losses = self.epoch(carried, self.x, self.y, batches)
                total += losses.sum() * BATCH
            for start in range(whole if self.scan else 0, size, BATCH):
                rows = order[start : start + BATCH]
                carried, loss = self.update(carried, self.x, self.y, rows)
                total += loss * len(rows)
            float(total / size)
            self.ps, self.state = carried
            going = tick()

    def predict(self, x):
        import jax

        found = self.forward(self.ps, x)
        return np.asarray(jax.nn.softmax(found) if self.job.y is not None else found)


def keras(job, algo):
    """Keras 3 on the backend of KERAS_BACKEND; `fit`, with accuracy where there are labels."""
    import keras as k

    class Tick(k.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = not self.tick()

    class Peer:
        def __init__(self):
            ins, hidden, outs = job.sizes
            self.net = k.Sequential([k.Input((ins,)), k.layers.Dense(hidden, "relu"), k.layers.Dense(outs)])
            made = k.optimizers.SGD(RATES[algo], 0.9) if algo == "sgd" else k.optimizers.Adam(RATES[algo])
            labels = job.y is not None
            loss = k.losses.SparseCategoricalCrossentropy(from_logits=True) if labels else "mse"
            self.net.compile(made, loss, metrics=["accuracy"] if labels else None)

        def train(self, tick):
            callback = Tick()
            callback.tick = tick
            y = job.x if job.y is None else job.y
            self.net.fit(job.x, y, batch_size=BATCH, epochs=MANY, verbose=0, callbacks=[callback])

        def predict(self, x):
            found = k.ops.convert_to_numpy(self.net.predict(x, verbose=0))
            if job.y is None:
                return found
            found = np.exp(found - found.max(1, keepdims=True))
            return found / found.sum(1, keepdims=True)

    return Peer()


class Sklearn:
    """MLPClassifier and MLPRegressor, an epoch a call of partial_fit."""

    def __init__(self, job, algo):
        from sklearn.neural_network import MLPClassifier, MLPRegressor

        kind = MLPRegressor if job.y is None else MLPClassifier
        given = {"nesterovs_momentum": False, "momentum": 0.9, "alpha": 0.0, "random_state": 0}
        self.job = job
        self.model = kind(
            hidden_layer_sizes=(job.sizes[1],), solver=algo, learning_rate_init=RATES[algo], batch_size=BATCH, **given
        )

    def train(self, tick):
        more = {} if self.job.y is None else {"classes": np.arange(10)}
        going = True
        while going:
            self.model.partial_fit(self.job.x, self.job.x if self.job.y is None else self.job.y, **more)
            going = tick()

    def predict(self, x):
        return self.model.predict(x) if self.job.y is None else self.model.predict_proba(x)


class StopError(Exception):
    """Ends a peer that has no word for it."""


def skorch(job, algo):
    import torch
    from skorch import NeuralNetClassifier, NeuralNetRegressor
    from skorch.callbacks import Callback

    class Tick(Callback):
        def on_epoch_end(self, net, **given):
            if not self.tick():
                raise StopError

    class Peer(ByHand):
        def train(self, tick):
            callback = Tick()
            callback.tick = tick
            kind = NeuralNetRegressor if job.y is None else NeuralNetClassifier
            given = {"optimizer__momentum": 0.9} if algo == "sgd" else {"optimizer__fused": True}
            net = kind(
                self.net,
                criterion=torch.nn.MSELoss if job.y is None else torch.nn.CrossEntropyLoss,
                optimizer=torch.optim.SGD if algo == "sgd" else torch.optim.Adam,
                lr=RATES[algo],
                batch_size=BATCH,
                max_epochs=MANY,
                iterator_train__shuffle=True,
                train_split=None,
                verbose=0,
                callbacks=[("tick", callback)],
                **given,
            )
            net.set_params(callbacks__print_log=None)
            try:
                net.fit(job.x, job.x if job.y is None else job.y)
            except StopError:
                self.net = net.module_

    return Peer(job, algo)


def lightning(job, algo):
    import logging
    import warnings

    import lightning as L
    from torch.utils.data import DataLoader, TensorDataset

    warnings.simplefilter("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)

    class Module(L.LightningModule):
        def __init__(self, net):
            super().__init__()
            self.net, self.loss = net, torch_loss(job)

        def training_step(self, batch, number):
            return self.loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch_optimizer(algo, self.parameters())

    class Tick(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.should_stop = not self.tick()

    class Peer(ByHand):
        def train(self, tick):
            callback = Tick()
            callback.tick = tick
            off = dict.fromkeys(
                ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
            )
            trainer = L.Trainer(max_epochs=MANY, accelerator="cpu", devices=1, callbacks=[callback], **off)
            data = TensorDataset(*torch_data(job))
            trainer.fit(Module(self.net), DataLoader(data, batch_size=BATCH, shuffle=True))

    return Peer(job, algo)


# {peer: (how it is made, variables of its process)}
PEERS = {
    "restrain": (Ours, {}),
    "restrain, compile=True": (lambda job, algo: Ours(job, algo, compile=True), {}),
    "restrain, compile=False": (lambda job, algo: Ours(job, algo, compile=False), {}),
    "PyTorch by hand": (ByHand, {}),
    "PyTorch by hand, compiled step": (Compiled, {}),
    "JAX and optax": (Jax, {}),
    "JAX and optax, an epoch a scan": (lambda job, algo: Jax(job, algo, scan=True), {}),
    "Keras on JAX": (keras, {"KERAS_BACKEND": "jax"}),
    "Keras on torch": (keras, {"KERAS_BACKEND": "torch"}),
    "scikit-learn": (Sklearn, {}),
    "skorch": (skorch, {}),
    "Lightning": (lightning, {}),
}
