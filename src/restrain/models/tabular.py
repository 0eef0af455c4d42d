"""Data frames as inputs of the models: encoded where they aren't plain numbers.

A data frame of numbers and booleans is read as scikit-learn reads it. Any other, and any beside
`encoder=`, goes through a `TableEncoder`, which the model keeps as `encoder_`.
"""

from __future__ import annotations

from typing import Any

from sklearn.base import clone

from restrain.errors import DataError, PlanError
from restrain.fields import brief, listed
from restrain.tables import TableEncoder, is_frame, odd_columns, to_pandas


def encoded(model: Any, x: Any, reset: bool) -> Any:
    """Return X for scikit-learn's checks: encoded, or as it is.

    With `reset`, learn the encoding first; it becomes `model.encoder_`, None where none is needed.

    Raises:
        DataError: a value or column can't be encoded, or the columns are others than in training.
        PlanError: `encoder` isn't a TableEncoder.
    """
    if reset:
        model.encoder_ = _learned(model, x)
    encoder = known(model)
    if encoder is not None:
        if not reset and not is_frame(x):
            raise DataError(
                f"X is a table with the columns of the training, {listed(encoder.feature_names_in_.tolist())}; got "
                f"{type(x).__name__}"
            )
        return encoder.encoded(x)
    return to_pandas(x) if is_frame(x) and not _is_polars(x) else x


def known(model: Any) -> TableEncoder | None:
    """Return the encoder that a fitted model uses, or None."""
    found: TableEncoder | None = vars(model).get("encoder_")
    return found


def _learned(model: Any, x: Any) -> TableEncoder | None:
    given = getattr(model, "encoder", None)  # estimators in pickles of 0.1 have none
    if given is not None and not isinstance(given, TableEncoder):
        raise PlanError(f"encoder= is a rs.TableEncoder(...) or None; got {brief(given)}")
    if not is_frame(x) or (given is None and not odd_columns(x)):
        return None
    encoder: TableEncoder = (TableEncoder() if given is None else clone(given)).fit(x)
    model.feature_names_in_, model.n_features_in_ = encoder.feature_names_in_, encoder.n_features_in_
    return encoder


def _is_polars(x: Any) -> bool:
    """Return True for a frame of numbers that scikit-learn reads itself, without pandas."""
    return type(x).__module__.startswith("polars") and type(x).__name__ == "DataFrame"


def adopt(model: Any, encoder: TableEncoder) -> None:
    """Make a model that was fitted on encoded inputs one that takes the tables themselves."""
    model.encoder, model.encoder_ = clone(encoder), encoder
    model.feature_names_in_, model.n_features_in_ = encoder.feature_names_in_, encoder.n_features_in_


def give_up(model: Any) -> TableEncoder | None:
    """Make a model that takes tables one that takes their encoded inputs; return its encoder."""
    encoder, model.encoder_ = known(model), None
    if encoder is not None:
        del model.feature_names_in_
        model.n_features_in_ = len(encoder.get_feature_names_out())
    return encoder
