"""Data of a model: what X, y and weights may be, and how they become `Samples`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_array
from sklearn.utils.validation import _check_sample_weight, check_consistent_length, check_is_fitted, validate_data

from restrain.errors import PlanError
from restrain.models import defaults, shapes, specs, streams, tabular
from restrain.models.data import Samples, Scale, as_numbers, joined
from restrain.models.layers import Network
from restrain.models.losses import Loss
from restrain.models.signature import KeywordEstimator
from restrain.models.specs import LayerData, as_list, forms
from restrain.transforms.normalization import Standardize


class Inputs(KeywordEstimator):
    """Model that reads data; the network's inputs and their names."""

    module_: Network
    layers_: list[LayerData]
    input_scale_: Standardize | None
    target_scale_: Standardize | None

    _labels = False
    _has_targets = True

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = self._has_targets
        return tags

    # ---------------------------------------------------------------- overridden by subclasses

    def loss_function(self) -> Loss:
        """Return the data loss."""
        raise NotImplementedError

    def _targets(self, x: Any, y: Any, reset: bool) -> Any:
        """Return the targets as the loss takes them; with `reset`, learn classes or shape first."""
        raise NotImplementedError

    def _class_weights(self, targets: Any, weight: Any, reset: bool) -> Any:
        """Return the weights of samples times those of their classes; None: all are 1."""
        return weight

    # ---------------------------------------------------------------- data

    def _unpacked(self, data: Any) -> tuple[Any, Any, Any]:
        if streams.is_stream(data):
            return streams.read(data, self._has_targets)
        arrays = isinstance(data, list) and 0 < len(data) < 4 and all(hasattr(member, "shape") for member in data)
        members = list(data) if isinstance(data, tuple) or arrays else [data]
        if not 1 <= len(members) <= 3 or (self._has_targets and len(members) == 1):
            wanted = "(X, y) or (X, y, sample_weight)" if self._has_targets else "X, or (X, None, sample_weight)"
            raise PlanError(f"data are {wanted}; got {type(data).__name__} of {len(members)}")
        x, y, weight = [*members, None, None][:3]
        return x, y, weight

    def _samples(self, x: Any, y: Any, weight: Any, *, reset: bool, offset: Any = None) -> Samples:
        if y is None and weight is None and streams.is_stream(x):
            x, y, weight = streams.read(x, self._has_targets)
        x = self._inputs(x, reset)
        if self._has_targets and y is None:
            raise PlanError(f"requires y to be passed, but the target y is None: {type(self).__name__}.fit(X, y)")
        rows = None
        if weight is not None:
            weight = _check_sample_weight(weight, x, dtype=np.float64, ensure_non_negative=True)
            rows = np.flatnonzero(weight) if not weight.all() else None
        if rows is not None and len(rows) < x.shape[0] and (y is None or x.shape[0] == len(np.asarray(y))):
            x, weight = x[rows], weight[rows]
            y = None if y is None else np.asarray(y)[rows]
            offset = None if offset is None else offset[rows]
        targets = self._targets(x, y, reset) if self._has_targets else None
        if targets is not None:
            check_consistent_length(x, targets, offset)
            weight = self._class_weights(targets, weight, reset)
        if offset is not None:
            targets = _shifted(targets, offset, self.loss_function().scaled)
        return Samples(x, targets, weight, labels=self._labels)

    def _inputs(self, x: Any, reset: bool) -> Any:
        """Return X as a checked array; an array of numbers isn't copied. Images come as rows."""
        x = tabular.encoded(self, self._rows_of(x, reset), reset)
        if tabular.known(self) is not None:
            return check_array(x)
        if getattr(x, "ndim", 2) != 3:
            kinds = {"dtype": "numeric", "accept_sparse": "csr" if self._has_targets else False}
            x = as_numbers(x, lambda: validate_data(self, x, reset=reset, **kinds), "X")
            if self._reads_steps if reset else specs.steps(self.layers_):
                raise PlanError(f"recurrent layers take X of shape (batch, time, features), got {x.shape}")
            return x
        x = as_numbers(x, lambda: check_array(x, dtype="numeric", allow_nd=True), "X")
        if reset:
            if not self._reads_steps and "module" not in forms(self._given):
                raise PlanError(
                    "Found array with dim 3, while dim <= 2 is required without recurrent layers; for sequences "
                    "(batch, time, features) write layers such as (20, 'lstm')"
                )
            self.n_features_in_ = x.shape[-1]
        stated = self.layers_[0].get("shape") if not reset else None
        if reset and self.layers is not None:
            stated = specs.sample_shape(self.layers)
        if stated is not None and stated[0] not in (None, x.shape[1]):
            raise PlanError(f"X has sequences of {x.shape[1]} steps, and the first layer reads {stated[0]} steps")
        if x.shape[-1] != self.n_features_in_:
            raise PlanError(
                f"X has {x.shape[-1]} features, but {type(self).__name__} is expecting {self.n_features_in_} features "
                "as input"
            )
        return x

    @property
    def _width(self) -> int:
        """The number of the network's inputs."""
        encoder = tabular.known(self)
        return int(self.n_features_in_) if encoder is None else len(encoder.get_feature_names_out())

    @property
    def input_names_(self) -> Any:
        """Names of the network's inputs, in the order of `coef_` and `selected_features_`.

        They are the columns of X, but of a category color=red for each value, and of a date also
        its places in cycles, as day.week.sin; x0, x1, ... of columns without names.
        """
        check_is_fitted(self, "module_")
        encoder = tabular.known(self)
        if encoder is not None:
            return encoder.get_feature_names_out()
        own = vars(self).get("feature_names_in_")
        return np.array([f"x{k}" for k in range(self._width)], object) if own is None else own

    @property
    def _given(self) -> Any:
        return self._hidden if self.layers is None else self.layers

    @property
    def _hidden(self) -> list[Any]:
        """The hidden layers."""
        return [defaults.UNITS] if isinstance(self.hidden, str) and self.hidden == "auto" else as_list(self.hidden)

    @property
    def _reads_steps(self) -> bool:
        """True if the layers read sequences, by their specifications."""
        stated = None if self.layers is None else specs.sample_shape(self.layers)
        return len(stated) == 2 if stated else bool(set(forms(self._given)) & set(shapes.SEQUENCES))

    def _rows_of(self, x: Any, reset: bool) -> Any:
        """Return images as rows, and a dict of several inputs as columns side by side.

        Raises:
            PlanError: the images have another shape than the first layer says.
        """
        if isinstance(x, Mapping) and not hasattr(x, "shape"):  # a sparse matrix may be a dict of keys, too
            first = self.layers if reset else self.layers_
            return joined(x, specs.names_of_inputs(first))
        shape = tuple(getattr(x, "shape", ())[1:])
        if len(shape) < 3:
            return x
        stated: Any = specs.image(self.layers_) if not reset else None
        if reset and self.layers is not None:
            stated = specs.sample_shape(self.layers)
        elif reset and set(forms(self._given)) & {*specs.IMAGES, "module"}:
            stated = shape
        if stated is None or len(stated) < 3:
            return x  # scikit-learn's check says that it has too many axes
        if shape != stated:
            raise PlanError(f"X has samples of shape {shape}, and the first layer says {stated}")
        return x.reshape(len(x), -1)

    @property
    def _scale(self) -> Scale | None:
        if self.input_scale_ is None:
            return None
        return Scale(self.input_scale_, self.target_scale_ if self._has_targets else self.input_scale_)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.module_.parameters()).dtype


def _shifted(targets: Any, offset: Any, scaled: bool) -> Any:
    """Return the targets less the offset, or with it as a last column (see `losses.Shifted`)."""
    column = offset.reshape(-1, *[1] * (targets.ndim - 1))
    if scaled:
        return targets - column
    return np.concatenate([targets, np.broadcast_to(column, (*targets.shape[:-1], 1))], -1)
