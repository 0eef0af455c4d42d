"""Models that are fitted by keyword: scikit-learn estimators, for which scikit-learn is needed."""

from restrain.extras import needing

with needing("models", __name__):
    from restrain.models.data import held_back, warn_of_unheld
    from restrain.models.estimators import Autoencoder, Classifier, Regressor
    from restrain.models.loading import load

__all__ = ["Autoencoder", "Classifier", "Regressor", "held_back", "load", "warn_of_unheld"]
