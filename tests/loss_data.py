"""The data on which losses are compared with other libraries; `python tests/loss_data.py` prints their numbers.

pip install --target DIR statsmodels patsy lifelines autograd autograd-gamma formulaic interface-meta
PYTHONPATH=DIR python tests/loss_data.py > tests/data/losses.json
"""

import numpy as np

DRAW = np.random.default_rng(0)
X = DRAW.standard_normal((60, 3))
ETA = 0.3 + X @ [0.5, -0.4, 0.0]
EXPOSURE = DRAW.uniform(0.5, 4.0, 60)
COUNTS = DRAW.poisson(EXPOSURE * np.exp(ETA)).astype(float)
AMOUNTS = DRAW.gamma(2.0, np.exp(ETA) / 2)
MIXED = AMOUNTS * (DRAW.uniform(size=60) < 0.7)
TRIALS = DRAW.integers(1, 9, 60)
SUCCESSES = DRAW.binomial(TRIALS, 1 / (1 + np.exp(-ETA)))
ORDERED = np.digitize(ETA + DRAW.logistic(size=60), [-0.5, 0.6, 1.6])
TIMES = np.ceil(5 * DRAW.exponential(np.exp(-ETA)))  # with ties
EVENTS = (DRAW.uniform(size=60) < 0.7).astype(float)
STRATA = DRAW.integers(0, 3, 60)


def main():
    """Print what statsmodels and lifelines find, as JSON."""
    import json

    import pandas as pd
    import statsmodels.api as sm
    from lifelines import CoxPHFitter
    from statsmodels.miscmodels.ordinal_model import OrderedModel

    with_one = sm.add_constant(X)
    families = sm.families
    log = families.links.Log()

    def glm(y, family, **given):
        found = sm.GLM(y, with_one, family=family, **given).fit(tol=1e-14, maxiter=200)
        explained = 1 - found.deviance / found.null_deviance
        return {"coef": found.params.tolist(), "deviance": found.deviance, "explained": explained}

    table = pd.DataFrame(X, columns=list("abc")).assign(t=TIMES, e=EVENTS, s=STRATA)
    cox = {}
    for name, given in (("cox", {}), ("cox strata", {"strata": ["s"]})):
        columns = table if given else table.drop(columns="s")
        found = CoxPHFitter().fit(columns, "t", "e", fit_options={"precision": 1e-12}, **given)
        cox[name] = {"coef": found.params_.tolist(), "concordance": found.concordance_index_}
    breslow = sm.PHReg(TIMES, X, status=EVENTS, ties="breslow").fit(disp=0, maxiter=100)
    ordered = OrderedModel(ORDERED, X, distr="logit").fit(method="newton", disp=0, maxiter=100)
    found = {
        "poisson": glm(COUNTS, families.Poisson(), exposure=EXPOSURE),
        "gamma": glm(AMOUNTS, families.Gamma(log)),
        "tweedie": glm(MIXED, families.Tweedie(log, 1.3)),
        "binomial": glm(np.stack([SUCCESSES, TRIALS - SUCCESSES], 1), families.Binomial()),
        **cox,
        "cox breslow": {"coef": breslow.params.tolist()},
        "ordinal": {"coef": ordered.params[:3].tolist(), "probabilities": ordered.predict()[:3].tolist()},
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
