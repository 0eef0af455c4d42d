"""Keywords of the models, converted to rules.

    keyword                                    rule, and its default layers (changed by on=)
    weight_l1, weight_l2 (= weight_decay)      s Σ|w|, s Σw² over weights; on= is a glob over
                                               parameters
    hidden_l1                                  s Σ|h| over units and hidden layers, mean over batch
    contractive                                s ‖∂h/∂x‖_F² of hidden layers, mean over batch
    recurrent_norm, recurrent_state            s (‖hₜ₊₁‖² - ‖hₜ‖²)², s ‖hₜ₊₁ - hₜ‖², mean over
                                               transitions and batch
    input_noise, hidden_noise, output_noise    Gaussian noise of deviation s, in training only
    input_dropout, hidden_dropout, output_...  dropout at rate s, in training only
    noise, dropout                             {glob over layers: deviation or rate}
    nonnegative, max_norm                      constraints on weights
    any registered name                        penalty of strength s, on weights or, for penalties
                                               on activations such as klsparsity, hidden layers
    regularizers                               a list of rules

The value is the strength s (a number, a schedule or a target), or a dict of strength, the options
on, how, reduce, name, every and optional of `.on(...)`, and the settings of the penalty. Keywords
of noise also take a noise, as in hidden_dropout=rs.Dropout(0.2, same_over="time").

`reduce="mean"` gives the value of theanets: the mean over the entries of each tensor, then over
tensors. A strength of theanets is therefore ours × entries of a row (for weights: of the matrix) ×
number of layers. theanets' contractive and recurrent_norm are other quantities in its code and have
no equivalent here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

from restrain import registry
from restrain.activation_points import Places, inputs, outputs
from restrain.errors import PlanError, RestrainError
from restrain.fields import by_new_names, near_names
from restrain.models.specs import RECURRENT, LayerData, hidden
from restrain.named_tensors import near
from restrain.penalties import L1, L2, Contractive, NetworkPenalty, NormChange, Penalty, StateChange, Weighted
from restrain.penalties.derivative import OnDerivatives
from restrain.plandata import read_strength
from restrain.plans import Plan
from restrain.rules import Rule, What
from restrain.selections import as_where, weights
from restrain.transforms import (
    Dropout,
    GaussianNoise,
    MaxNorm,
    Noise,
    NonNegative,
    Reparametrization,
    TopK,
    Transform,
    UniformNoise,
)
from restrain.transforms.activation import Activation

OPTIONS = ("strength", "on", "how", "reduce", "name", "every", "optional")
WEIGHTS: dict[str, type[What]] = {"weight_l1": L1, "weight_l2": L2, "weight_decay": L2}
ACTIVATIONS: dict[str, type[What]] = {
    "hidden_l1": L1,
    "contractive": Contractive,
    "recurrent_norm": NormChange,
    "recurrent_state": StateChange,
}
NOISES: dict[str, type[What]] = {
    f"{place}_{kind}": what
    for kind, what in (("noise", GaussianNoise), ("dropout", Dropout))
    for place in ("input", "hidden", "output")
}
PATTERNS: dict[str, type[What]] = {"noise": GaussianNoise, "dropout": Dropout}
CONSTRAINTS: dict[str, type[What]] = {"nonnegative": NonNegative, "max_norm": MaxNorm}
_ADDED = (GaussianNoise, UniformNoise)
OWN: dict[str, type[What]] = {**WEIGHTS, **ACTIVATIONS, **NOISES, **PATTERNS, **CONSTRAINTS}


def names(reserved: Sequence[str] = ()) -> tuple[str, ...]:
    """Return all current keywords: the built-in ones, then the registered names."""
    return (*OWN, "regularizers", *registered(reserved))


def registered(reserved: Sequence[str]) -> tuple[str, ...]:
    """Return the registered names that are neither built-in keywords nor in `reserved`."""
    return tuple(name for name in registry.names() if name not in (*OWN, "regularizers", *reserved))


_THEANETS = {"w": "weight", "b": "bias", "xh": "weight_ih_l0", "hh": "weight_hh_l0"}


def hint_of_name(name: Any) -> str:
    """Return our name for theanets' of a parameter or an output (hid1.w, hid1:out), else ""."""
    layer, colon, _ = str(name).partition(":")
    if colon and layer:
        return f": theanets' {name!r} is {layer!r} here"
    layer, _, parameter = str(name).rpartition(".")
    if layer and parameter in _THEANETS:
        return f": theanets' {name!r} is {layer + '.' + _THEANETS[parameter]!r} here"
    return ""


_SIZES, _EPOCHS, _VALID = (
    "hidden=, the sizes of hidden layers",
    "epochs=",
    "valid=, a part of the data or data of their own",
)
_STRENGTH = "weight_l1= or weight_l2="
WORDS = {
    **dict.fromkeys(
        ("hidden_layer_sizes", "hidden_sizes", "hidden_units", "hidden_layers", "n_hidden", "units"), _SIZES
    ),
    **dict.fromkeys(("layer_sizes", "sizes"), "layers=, the input first"),
    "alpha": "weight_l2=; alpha of scikit-learn's MLPClassifier is weight_l2 · 2 · batch_size, of its MLPRegressor "
    "weight_l2 · batch_size",
    **dict.fromkeys(("max_iter", "n_iter", "n_epochs", "num_epochs", "max_epochs", "nb_epoch", "iterations"), _EPOCHS),
    **dict.fromkeys(("early_stopping", "n_iter_no_change"), "patience=, validations without improvement, with valid="),
    **dict.fromkeys(("validation_fraction", "validation_split", "validation_data", "eval_set"), _VALID),
    "tol": "min_improvement=, a part of the loss",
    **dict.fromkeys(("verbose", "verbosity"), "progress="),
    **dict.fromkeys(("solver", "optimizer", "optim", "algorithm"), "algo="),
    **dict.fromkeys(("learning_rate_init", "lr", "eta"), "learning_rate="),
    "nesterovs_momentum": "algo= nag",
    **dict.fromkeys(("seed", "random_seed"), "random_state="),
    **dict.fromkeys(("dropout_rate", "dropout_prob"), "hidden_dropout="),
    **dict.fromkeys(("C", "lam", "lambda_", "penalty", "l1_ratio", "kernel_regularizer"), _STRENGTH),
    "activity_regularizer": "hidden_l1=",
    **dict.fromkeys(("clipnorm", "grad_clip", "max_grad_norm", "gradient_clip_val"), "max_gradient_norm="),
    **dict.fromkeys(("standardize", "scale"), "normalize="),
    "nesterov": "algo='nag'",
    "rng": "random_state=",
    "max_gradient_elem": "max_gradient_norm=, of the whole gradient",
    "save_progress": "save_as=, with save_every=",
    "subalgo": "algo=",
    **dict.fromkeys(("weight_sparsity", "weightl1"), "weight_l1="),
    **dict.fromkeys(("weightl2", "weightdecay"), "weight_l2="),
    **dict.fromkeys(("hidden_sparsity", "hiddenl1"), "hidden_l1="),
    **dict.fromkeys(("recurrentnorm",), "recurrent_norm="),
    **dict.fromkeys(("recurrentstate",), "recurrent_state="),
    "bernoullidropout": "dropout={'*': rate}",
    "input_dropouts": "input_dropout=",
    "hidden_dropouts": "hidden_dropout=",
    "hidden_l2": "regularizers=[s * rs.L2().on(rs.outputs('hid*'))]",
    **dict.fromkeys(("callbacks", "callback"), "monitors=, or itertrain(...), which hands over after each epoch"),
    **dict.fromkeys(("metrics", "scoring"), "monitors=, or score(X, y)"),
    **dict.fromkeys(("kernel_initializer", "bias_initializer"), "hidden=, a list whose layers may be dicts with a std"),
    **dict.fromkeys(("kernel_constraint",), "max_norm= or nonnegative="),
    **dict.fromkeys(("steps_per_epoch",), "train_batches="),
    **dict.fromkeys(("validation_steps",), "valid_batches="),
    "validation_freq": "validate_every=",
    "max_fun": "max_updates=",
    "power_t": "learning_rate=, a function of the epoch",
    **dict.fromkeys(
        ("beta_1", "beta_2", "epsilon"), "algo=, a functools.partial of torch.optim.Adam with betas and eps"
    ),
}
"""Keywords of other libraries, each with the keyword to write instead."""


def unknown(given: Sequence[str], known: Sequence[str], where: str) -> PlanError:
    """Return the error for unknown keywords, with our word for another library's, or near names."""
    ours = [f"{name!r}: write {WORDS[name]}" for name in given if name in WORDS]
    others = [name for name in given if name not in WORDS]
    wrong = f"{', '.join(map(repr, others))}{near_names(others, known)}"
    return PlanError(f"{where} has no keyword {'; '.join([*ours, *([wrong] if others else [])])}")


@dataclass(frozen=True)
class Context:
    """Layers that keywords refer to, and the default moment `how` of penalties on parameters."""

    layers: list[LayerData]
    how: Any = None

    def places(self, pattern: Any) -> Places:
        """Return the outputs of the layers that match a glob or a list of globs.

        For the input layer, it is the input of the model. Other selections (`Places`, types,
        predicates) pass through.

        Raises:
            PlanError: a glob matches no layer; the message lists near names.
        """
        if isinstance(pattern, Places):
            return pattern
        if not _are_globs(pattern):
            return outputs(pattern)
        taken = self.match(pattern)
        inside = [name for name in taken if name != self.layers[0]["name"]]
        if not inside:
            return inputs()
        return outputs(inside) if len(inside) == len(taken) else inputs() | outputs(inside)

    def match(self, pattern: Any) -> list[str]:
        """Return the names of the layers that match a glob or a list of globs, in layer order.

        Raises:
            PlanError: a glob matches no layer.
        """
        globs, every = [pattern] if isinstance(pattern, str) else pattern, [layer["name"] for layer in self.layers]
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in every):
                raise PlanError(f"{glob!r} matches no layer{near(glob, every)}{hint_of_name(glob)}")
        return [name for name in every if any(fnmatchcase(name, glob) for glob in globs)]

    def default(self, keyword: str) -> Any:
        """Return the names of the layers where a keyword acts without on=.

        Raises:
            PlanError: the network has no such layer.
        """
        every = [layer["name"] for layer in self.layers]
        if keyword.startswith("recurrent"):
            found = [layer["name"] for layer in self.layers if layer["form"] in RECURRENT]
            kind = f"a recurrent layer (form={' or '.join(RECURRENT)})"
        elif keyword.startswith(("input", "output")):
            return every[:1] if keyword.startswith("input") else every[-1:]
        else:
            found, kind = hidden(self.layers), "a layer between input and output"
        if not found:
            raise PlanError(f"it needs {kind}; there are: {', '.join(every)}")
        return found


def rules(settings: Mapping[str, Any], context: Context) -> list[Rule]:
    """Return the rules of all keywords; None, False and a strength of zero give no rule.

    Raises:
        RestrainError: a value isn't allowed, or two keywords mean the same rule; the message names
            the keyword. Usually a PlanError.
    """
    if isinstance(settings.get("regularizers"), Mapping):
        raise PlanError(
            "regularizers= is a list of rules; write the entries of theanets' dict as keywords, as in **{...}"
        )
    made: list[Rule] = list(Plan.of(settings.get("regularizers")))
    acting = {keyword: value for keyword, value in settings.items() if _acts(keyword, value)}
    _refuse_aliases(acting)
    for keyword, value in acting.items():
        try:
            made += _of_keyword(keyword, value, context)
        except (RestrainError, TypeError) as error:
            kind = type(error) if isinstance(error, RestrainError) else PlanError
            raise kind(f"{keyword}={value!r}: {error}") from error
    for rule in made:
        if rule.at_places and isinstance(rule.what, Activation | TopK):
            raise PlanError(
                f"{rule.label}: the fitted model wouldn't have this activation function, which is a rule's; build the "
                "network in torch and attach the rule to it"
            )
    return made


def _acts(keyword: str, value: Any) -> bool:
    """True if the value gives a rule; 0 does for a constraint."""
    if keyword == "regularizers" or value is None or value is False:
        return False
    return keyword in CONSTRAINTS or not (isinstance(value, Real) and value == 0)


def _meaning(keyword: str) -> tuple[type, str]:
    """Return the class of a keyword and a word for its default layers."""
    cls: type[What] = OWN.get(keyword) or registry.lookup(keyword)
    if keyword in PATTERNS:
        return cls, "layers by their names"
    if keyword in NOISES:
        return cls, keyword.partition("_")[0]
    if keyword in ACTIVATIONS or (issubclass(cls, Noise) and cls.on_places) or getattr(cls, "at_outputs", False):
        return cls, "recurrent" if issubclass(cls, NormChange | StateChange) else "hidden"
    return cls, "output" if issubclass(cls, OnDerivatives) else "weights"


def aliases(keyword: str, names: Sequence[str]) -> list[str]:
    """Return the names with the same class and default layers as a keyword, itself included."""
    meaning = _meaning(keyword)
    return [name for name in names if name != "regularizers" and _meaning(name) == meaning]


def _refuse_aliases(keywords: Collection[str]) -> None:
    """Check that no two keywords mean the same rule, which would act twice.

    Raises:
        PlanError: two keywords do.
    """
    for keyword in keywords:
        same = aliases(keyword, list(keywords))
        if len(same) > 1:
            cls, where = _meaning(keyword)
            where = where if where == "weights" else f"{where} layers"
            raise PlanError(
                f"{' and '.join(same)} are names of one thing, {cls.__name__} on {where}: write one of them. A second "
                f"one, elsewhere, is a rule: regularizers=[... rs.{cls.__name__}(...).on(...)]"
            )


def _are_globs(on: Any) -> bool:
    return isinstance(on, str) or (isinstance(on, (list, tuple)) and all(isinstance(glob, str) for glob in on))


def _of_keyword(keyword: str, value: Any, context: Context) -> list[Rule]:
    if keyword in PATTERNS:
        if not isinstance(value, Mapping):
            raise PlanError(
                f"it is a dict of globs over layers, as in {keyword}={{'hid*': 0.1}}; for all hidden layers write "
                f"hidden_{keyword}"
            )
        noises = {glob: n if isinstance(n, Noise) else PATTERNS[keyword](n) for glob, n in value.items()}  # type: ignore[call-arg]
        return [noise.on(context.places(glob), name=f"{keyword} {glob}") for glob, noise in noises.items()]
    if keyword in NOISES and isinstance(value, Noise):
        return [value.on(context.places(context.default(keyword)), name=keyword)]
    cls: type[What] = OWN.get(keyword) or registry.lookup(keyword)
    given = dict(value) if isinstance(value, Mapping) else _plain(cls, value)
    _refuse_theanets(given)
    settings = {key: given[key] for key in given if key not in OPTIONS}
    options = {key: given[key] for key in OPTIONS if key in given and key not in ("strength", "on")}
    options.setdefault("name", keyword)
    on = given.get("on")
    if keyword == "recurrent_norm":
        settings.setdefault("squared", True)
    if keyword == "recurrent_state" and options.get("reduce") == "mean":
        options["reduce"], settings["per_unit"] = "sum", True
        on = context.default(keyword) if on is None else on
        if not _are_globs(on):
            raise PlanError("reduce='mean' here goes with on= a glob over layers, or a list of them")
        given["strength"] = given.get("strength", 1.0) / len(context.match(on))
    strength = given.get("strength")
    what = _what(cls, read_strength(strength) if isinstance(strength, Mapping) else strength, settings)
    return [_rule(keyword, what, on, options, context)]


def _refuse_theanets(given: Mapping[str, Any]) -> None:
    """Check that a keyword's dict has our words, not theanets'.

    Raises:
        PlanError: it has theanets'; the message has ours.
    """
    if "pattern" in given or ("weight" in given and "strength" not in given):
        theirs = [name for name in ("weight", "pattern") if name in given]
        ours = ", ".join({"weight": "strength=", "pattern": "on="}[name] for name in theirs)
        raise PlanError(f"{', '.join(f'{name}=' for name in theirs)} is theanets' word: write {ours}")
    on: Any = given.get("on")
    some = [on] if isinstance(on, str) else list(on) if _are_globs(on) else []
    for name in some:
        if hint_of_name(name):
            raise PlanError(f"on={name!r} matches nothing{hint_of_name(name)}")


def _plain(cls: type[What], value: Any) -> dict[str, Any]:
    """Return a plain value as a dict: the strength, or for a reparametrisation True or on=."""
    if issubclass(cls, Reparametrization) and (value is True or isinstance(value, (str, list))):
        return {} if value is True else {"on": value}
    if value is True and cls is Weighted:
        raise PlanError("theanets' weighted=True is nothing here: data (X, y, sample_weight) are weighted")
    if isinstance(value, (bool, str)):
        raise PlanError(f"expected a number, or a dict({', '.join(k + '=' for k in OPTIONS)})")
    return {"strength": value}


def _what(cls: type[What], strength: Any, settings: dict[str, Any]) -> What:
    """Return strength × penalty, or a transform whose first setting is the strength.

    Raises:
        PlanError: a setting doesn't exist or is missing, or a penalty has no strength.
    """
    fields = [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else None
    settings = by_new_names(cls, settings)
    if fields is not None and set(settings) - set(fields):
        raise PlanError(
            f"{cls.__name__} has no {', '.join(sorted(set(settings) - set(fields)))}; a dict has "
            f"{', '.join((*OPTIONS, *fields))}"
        )
    if strength is not None and issubclass(cls, Transform) and fields and fields[0] in settings:
        raise PlanError(f"strength= is the {fields[0]}= of {cls.__name__}: write one of them")
    if cls is Contractive:
        settings.setdefault("estimator", "exact")
    try:
        if issubclass(cls, Transform):
            return cls(*([] if strength is None else [strength]), **settings)
        what = cls(**settings)
    except TypeError as error:
        raise PlanError(_how_to_write(cls, settings) or f"{error}; write its settings into a dict") from error
    if strength is None and cls not in OWN.values():
        return what
    if strength is None:
        raise PlanError("a dict needs a strength, as in dict(strength=1e-4)")
    return strength * what  # type: ignore[no-any-return]


def _how_to_write(cls: type[What], settings: Mapping[str, Any]) -> str:
    """Return the hint on missing settings of a class, or "" if none is missing."""
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    needed = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    missing = [name for name in needed if name not in settings]
    if issubclass(cls, Transform) and not fields:
        return f"{cls.__name__} has no amount: write True, or a dict of where, as in dict(on='*.weight')"
    first = [] if issubclass(cls, Transform) else ["strength"]
    form = ", ".join(f"{name}=..." for name in (*first, *needed))
    return f"{cls.__name__} needs {', '.join(missing)}: write dict({form})" if missing else ""


def _rule(keyword: str, what: What, on: Any, options: dict[str, Any], context: Context) -> Rule:
    if isinstance(what, NetworkPenalty):
        names = [layer["name"] for layer in context.layers[1:]]
        return what.on(weights, outputs=context.places(on or names), **options)
    if isinstance(what, OnDerivatives):
        if any(layer["form"] == "batchnorm" for layer in context.layers):
            raise PlanError("behind a batchnorm layer, a sample's outputs depend on the other samples: use layernorm")
        on = context.default(keyword) if on is None and keyword in ACTIVATIONS else on
        return what.on(None if on is None else context.places(on), **options)
    if keyword in ACTIVATIONS or (isinstance(what, Noise) and what.on_places):
        return what.on(context.places(context.default(keyword) if on is None else on), **options)
    leaves = [leaf for _, leaf in what.leaves()] if isinstance(what, Penalty) else []
    if any(leaf.at_outputs for leaf in leaves):
        layers = "recurrent" if all(isinstance(leaf, NormChange | StateChange) for leaf in leaves) else "hidden"
        return what.on(context.places(context.default(layers) if on is None else on), **options)
    if isinstance(on, Places):
        return what.on(on, **options)
    if isinstance(what, Transform):
        return what.on(weights if on is None else on, **options)
    if keyword in WEIGHTS:
        on = weights if on is None else weights & as_where(on)
    if context.how is not None:
        options.setdefault("how", context.how)
    return what.on(on, **options)
