"""What `fit` decides where a model's keywords say "auto", and whether a training converged."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from sklearn.base import is_classifier
from sklearn.exceptions import ConvergenceWarning

from restrain.errors import PlanError
from restrain.fields import brief, check_flags, is_number, is_whole, level_of_caller
from restrain.models import bins, checkpoints, defaults, keywords, settings
from restrain.models.data import Samples, dense
from restrain.models.inputs import Inputs
from restrain.models.losses import Ordinal
from restrain.models.settings import Settings
from restrain.models.signature import BEFORE, DEFAULTS, RESERVED
from restrain.models.specs import as_list
from restrain.models.training import Training

_OF_NETWORKS = (
    "algo",
    "learning_rate",
    "momentum",
    "batch_size",
    "max_gradient_norm",
    "checkpoint",
    "device",
    "how",
    "patience",
)
_OF_SEVERAL = {  # of fits that train several networks
    name: DEFAULTS[name] for name in ("layers", "hidden", "activation", "loss", "save_every", "checkpoint")
}
_MOST = 2**27  # numbers in the inputs of linear models that are fitted at once


class Decisions(Inputs):
    """Model that settles the keywords of a training; see `restrain.models.defaults`."""

    def split_keywords(self, given: Mapping[str, Any]) -> tuple[Settings, dict[str, Any], Any]:
        """Return (settings of training, keywords of rules, `how`).

        Values in `given` replace the estimator's own.

        Raises:
            PlanError: a keyword doesn't exist, or a setting of training isn't allowed.
        """
        check_flags(PlanError, warm_start=self.warm_start)
        of_rules = keywords.names(RESERVED)
        known = (*settings.NAMES, "how", *of_rules)
        wrong = [name for name in given if name not in known]
        if wrong:
            raise keywords.unknown(wrong, known, type(self).__name__)
        own = {name: getattr(self, name) for name in known}
        for name in set(of_rules) & {name for name, value in given.items() if value is not None} - {"regularizers"}:
            own.update(dict.fromkeys(keywords.aliases(name, of_rules)))
        values = {**own, **given}
        usual = {name: BEFORE[name] for name in ("epochs", "patience") if values[name] == "auto"}
        values.update(usual)
        chosen = Settings(**{name: values[name] for name in settings.NAMES})
        return chosen, {name: values[name] for name in of_rules}, values["how"]

    def _members(self, samples: Samples, given: dict[str, Any], *, fit: bool) -> int:
        """Return how many networks are trained side by side.

        Raises:
            PlanError: `ensemble` isn't a number of them, or the model can't be an ensemble.
        """
        wanted = self.ensemble if self._has_targets else None
        if wanted is None or (is_whole(wanted) and wanted == 1):
            return 1
        values, rules = {**vars(self), **given}, self._rules_given(given)
        if isinstance(wanted, str) and wanted == "auto":
            usual = all(
                type(values[name]) is type(value) and values[name] == value for name, value in _OF_SEVERAL.items()
            )
            left = fit and usual and not rules and _is_left_to_us(values) and samples.x.ndim == 2
            return defaults.members(len(samples)) if left else 1
        if not is_whole(wanted, 1):
            raise PlanError(f'ensemble= is a number of networks, "auto" or None for one; got {brief(wanted)}')
        layers = [*self._hidden, 1] if self.layers is None else as_list(self.layers)[1:]
        fits = len(layers) == 2 and all(is_whole(one, 1) for one in layers) and "norm" not in str(self.activation)
        loss = self.loss_function()
        if not fit or not fits or rules or loss.joint or isinstance(loss, Ordinal):
            raise PlanError(
                f"ensemble={wanted} is of fit, for one hidden layer given by its size, as in hidden=(100,), without "
                "rules, and not of joint or ordinal losses; write ensemble=None, or average models of your own"
            )
        return int(wanted)

    def _edges(self, samples: Samples, members: int) -> bins.Edges | None:
        """Return the edges of the bins of several networks where all is left to us, or None."""
        if members == 1 or not isinstance(self.ensemble, str) or samples.x.shape[1] > defaults.WIDEST:
            return None
        found = bins.edges(dense(samples.x), defaults.BINS)
        return found if bins.size(found) > len(found) else None

    def _rules_given(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the keywords of rules that say something."""
        of_rules = self.split_keywords(given)[1]
        return {name: value for name, value in of_rules.items() if value is not None and value is not False}

    def _decided(self, samples: Samples, given: dict[str, Any], valid: Any, members: int) -> tuple[dict[str, Any], Any]:
        """Return (keywords, validation data) for what is left "auto" in this call."""
        values, automatic = {**vars(self), **given}, isinstance(valid, str) and valid == "auto"
        if not _is_left_to_us(values):
            return {}, None if automatic else valid
        rules = self._rules_given(given)
        if self._is_linear:
            valid = None if automatic else valid
            ridge = all(name in ("weight_l2", "weight_decay") and is_number(value) for name, value in rules.items())
            plain = valid is None and ridge and all(values[name] == DEFAULTS[name] for name in _OF_NETWORKS)
            if plain and math.prod(samples.x.shape) < _MOST:
                return defaults.linear(len(samples), values["precision"], smooth=self.loss_function().smooth), None
            rules.setdefault("none by default", True)
        elif automatic:
            labels = samples.y if samples.labels and samples.y.ndim == 1 else None
            valid = defaults.part(labels, len(samples))
        share = valid if isinstance(valid, float) and 0 < valid < 1 and not (automatic and members > 1) else 0.0
        sizes = (max(1, round(len(samples) * (1 - share))), values["batch_size"])
        every = (valid is not None, values["patience"], values["validate_every"])
        of = {"rules": bool(rules), "members": members, "classes": is_classifier(self)}
        return defaults.network(*sizes, *every, **of), valid

    def _normalizes(self, auto: bool) -> bool:
        """Return whether to standardise; "auto": in `fit`, unless the output has an activation.

        Raises:
            PlanError: `normalize` is something else.
        """
        if self.normalize not in (True, False, "auto", None):
            raise PlanError(f'normalize= is True, False or "auto", got {brief(self.normalize)}')
        if self.normalize == "auto":
            return auto and self.layers_[-1].get("activation", "linear") == "linear"
        return bool(self.normalize)

    def held_part(self, count: int, labels: Any = None) -> float | None:
        """Return the part of so many samples that `fit` holds back by itself to validate, or None.

        Args:
            count: number of samples.
            labels: their classes, of a classifier.
        """
        automatic = isinstance(self.valid, str) and self.valid == "auto"
        automatic = automatic and _is_left_to_us(vars(self)) and not self._is_linear
        return defaults.part(labels, count) if automatic and not checkpoints.is_of_0_1(self.checkpoint) else None

    @property
    def _is_linear(self) -> bool:
        """True if there are no hidden layers."""
        if self.layers is not None:
            return len(self.layers) == 2 and all(isinstance(layer, int) for layer in self.layers)
        return not self._hidden

    def _warn_unless_converged(self, training: Training, losses: list[float]) -> None:
        """Warn as scikit-learn does if the loss was still falling when a training of ours ended."""
        chosen = training.settings
        if chosen.algo is defaults.EXACT:
            ended, hint = defaults.converged(losses), "normalize=True or a small weight_l2= would help"
        else:
            stopped = chosen.patience is None or training.best.worse >= chosen.patience
            ended = not training.decided or stopped or not defaults.still_falling(training.history)
            hint = "take a greater learning_rate=, or epochs= for a longer training"
        if not ended:
            warnings.warn(
                f"{type(self).__name__} didn't converge in {training.done} epochs, the loss was still falling: {hint}",
                ConvergenceWarning,
                stacklevel=level_of_caller(),
            )


def _is_left_to_us(values: Mapping[str, Any]) -> bool:
    """Return True if `fit` decides how long it trains, by the values of all keywords."""
    return bool(values["epochs"] == "auto") and "lbfgs" not in str(values["algo"]).lower()
