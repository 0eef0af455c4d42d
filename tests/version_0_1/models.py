"""Keyword models that are saved, and fits that are killed and go on from their checkpoint."""

import numpy as np
import torch

import restrain as rs
from version_0_1.common import digest, digests, numbers

X = numbers(40, 4, seed=1).numpy()
X = X * [1, 10, 0.1, 1] + 3
NUMBERS = X[:, 0] - X[:, 1] / 4 + X[:, 2] * 2 + X[:, 3] / 2
LABELS = np.array(["low", "mid", "high"])[np.digitize(X[:, 0] + X[:, 3], [5, 7])]
STEPS = X[:39].astype("f4").reshape(13, 3, 4)
QUICK = {"epochs": 3, "random_state": 0, "learning_rate": 0.02, "batch_size": 20}


def rules():
    return rs.Regressor(
        hidden=(5,),
        how="proximal",
        weight_l1={"strength": 1e-3, "on": "hid*"},
        weight_decay={"strength": rs.schedules.Linear(0, 1e-3, steps=5), "how": "loss"},
        noise={"hid*": 0.1},
        dropout={"in": rs.Dropout(0.1, same_over=(0,))},
        hidden_dropout=0.1,
        gradientnoise=1e-3,
        max_norm=2.0,
        grouplasso={"strength": rs.Target(norm=1.0), "per": "in", "how": "loss", "on": "out.weight"},
        contractive=1e-4,
        regularizers=[
            1e-3 * rs.GroupLasso(per="in").on("hid1.weight", how="proximal"),
            "l2:1e-4",
            1e-4 * rs.L2().on(rs.outputs("hid1") | rs.inputs("out")),
        ],
        algo=torch.optim.Adam,
        precision="32",
        **QUICK,
    )


def layers():
    first = {"size": 6, "name": "first", "activation": "gelu"}
    hidden = [first, "layernorm", (5, "leaky_relu"), (4, "elu"), (3, "silu")]
    return rs.Classifier([4, *hidden, 3], activation="softplus", algo="nag", momentum=0.8, **QUICK)


MODELS = {
    "classifier": lambda: rs.Classifier(hidden=(5, (3, "tanh")), weight_l2=1e-3, **QUICK).fit(X, LABELS),
    "class indices": lambda: rs.Classifier([4, 5, 3], **QUICK).fit(X, np.digitize(X[:, 0], [2, 4])),
    "truths": lambda: rs.Classifier(hidden=(3,), nonnegative=True, **QUICK).fit(X, X[:, 0] > 3),
    "normalized": lambda: rs.Classifier(hidden=(5,), normalize=True, valid=0.2, patience=1, **QUICK).fit(X, LABELS),
    "layers": lambda: layers().fit(X, LABELS),
    "regressor": lambda: rs.Regressor(hidden=(5,), normalize=True, **QUICK).fit(X, NUMBERS),
    "regressor of two": lambda: rs.Regressor(hidden=5, normalize=True, **QUICK).fit(X, np.stack([NUMBERS, X[:, 1]], 1)),
    "float32": lambda: rs.Regressor(hidden=(5,), input_noise=0.1, **QUICK).fit(X.astype("f4"), NUMBERS),
    "rules": lambda: rules().fit(X, NUMBERS),
    "autoencoder": lambda: rs.Autoencoder([4, (8, "relu"), (4, "tied")], hidden_l1=1e-3, **QUICK).fit(X),
    "batch norm": lambda: rs.Autoencoder([4, 6, "batchnorm", 4], normalize=True, weight_l1=1e-3, **QUICK).fit(X),
    "sequences": lambda: rs.Classifier(hidden=((5, "gru"),), **QUICK).fit(STEPS, LABELS[:13]),
    "labels of steps": lambda: rs.Classifier(hidden=((5, "rnn"), (4, "lstm")), recurrent_norm=1e-3, **QUICK).fit(
        STEPS, LABELS[:39].reshape(13, 3)
    ),
    "partial": lambda: rs.Classifier(hidden=(3,), **QUICK).partial_fit(X[:9], LABELS[:9], classes=np.unique(LABELS)),
}
TARGETS = {
    "class indices": np.digitize(X[:, 0], [2, 4]),
    "truths": X[:, 0] > 3,
    "regressor of two": np.stack([NUMBERS, X[:, 1]], 1),
    "sequences": LABELS[:13],
    "labels of steps": LABELS[:39].reshape(13, 3),
}


def data_for(name, model):
    x = STEPS if name in ("sequences", "labels of steps") else X.astype("f4") if name == "float32" else X
    if isinstance(model, rs.Autoencoder):
        return (x,)
    return x, TARGETS.get(name, NUMBERS if isinstance(model, rs.Regressor) else LABELS)


def known(name, model):
    """What a loaded model knows."""
    x = data_for(name, model)[0]
    found = {
        "class": type(model).__name__,
        "predict": np.asarray(model.predict(x[:6])).tolist(),
        "activations": {key: digest(torch.tensor(value)) for key, value in model.activations(x).items()},
        "history": model.history_,
        "n_iter_": model.n_iter_,
        "n_features_in_": model.n_features_in_,
        "seed_": model.seed_,
        "layers_": [dict(layer) for layer in model.layers_],
    }
    if isinstance(model, rs.Classifier):
        found |= {"predict_proba": model.predict_proba(x[:6]).tolist(), "classes_": np.asarray(model.classes_).tolist()}
    if isinstance(model, rs.Autoencoder):
        found |= {"transform": model.transform(x[:6]).tolist()}
    return {**found, "on": trained_on(name, model)}


def trained_on(name, model):
    """Two epochs more, without chance: the weights and losses."""
    quiet = dict.fromkeys(("input_noise", "hidden_dropout", "noise", "dropout", "gradientnoise"))
    data = data_for(name, model)
    model.set_params(valid=None, patience=None, shuffle=False, algo="sgd", momentum=0.0)
    model.train(data if len(data) > 1 else data[0], epochs=2, **quiet)
    return {"history": model.history_[-2:], "weights": digests(model.module_)}


# ---------------------------------------------------------------- checkpoints


def plain(path):
    """Nothing that is drawn."""
    settings = {"hidden": (6,), "epochs": 6, "batch_size": 10, "shuffle": False, "algo": "sgd", "momentum": 0.9}
    return rs.Classifier(
        **settings, weight_l1=1e-3, how="proximal", random_state=3, learning_rate=0.02, checkpoint=path
    )


def moving(path):
    """Strengths that move, a validation, normalised; the order of samples is drawn."""
    return rs.Regressor(
        hidden=(6, "layernorm", 4),
        normalize=True,
        valid=0.2,
        patience=5,
        epochs=6,
        batch_size=10,
        weight_l1={"strength": rs.Target(zeros=0.3, every=2), "how": "proximal"},
        hidden_l1=1e-3 * rs.schedules.WarmUp(4, unit="epoch"),
        regularizers=[1e-2 * rs.Distance(decay=0.9).on("out.weight", name="near")],
        max_norm=2.0,
        random_state=3,
        checkpoint=path,
    )


def drawn(path):
    """Noise, dropout, and a random seed that only the checkpoint knows."""
    return rs.Autoencoder(
        [4, (6, "sigmoid"), (4, "tied")],
        input_noise=0.1,
        hidden_dropout=0.2,
        epochs=6,
        batch_size=10,
        klsparsity={"strength": 1e-2, "rate": 0.1, "momentum": 0.9},
        checkpoint=path,
    )


def recorded(path):
    """Long enough that its updates are recorded; one more epoch is to do."""
    settings = {"hidden": (4,), "epochs": 260, "batch_size": 10, "learning_rate": 1e-3, "hidden_dropout": 0.1}
    return rs.Regressor(**settings, weight_l2=1e-3, random_state=3, checkpoint=path)


def compiled(path):
    """Compiled code, from the second update on."""
    settings = {"hidden": (4,), "epochs": 6, "batch_size": 10, "learning_rate": 1e-2, "compile": True}
    return rs.Regressor(**settings, weight_l2=1e-3, random_state=3, checkpoint=path)


FITS = {make.__name__: make for make in (plain, moving, drawn, recorded, compiled)}
KILLED = {"recorded": 259}  # after that many epochs; the others after three


def targets(name):
    """What comes behind X."""
    return () if name == "drawn" else (LABELS if name == "plain" else NUMBERS,)


def fitted(name, path):
    """What a fit comes to that goes on from where its checkpoint is."""
    model = FITS[name](path)
    count = sum(1 for _ in model.itertrain((X, *targets(name))))
    return {"epochs": count, "history": model.history_[-3:], "weights": digests(model.module_)}
