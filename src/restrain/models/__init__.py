"""scikit-learn estimators regularised by keyword. Needs scikit-learn."""

from restrain.extras import needing

with needing("models", __name__):
    from restrain.models.cross_validation import ClassifierCV, RegressorCV
    from restrain.models.data import held_back, warn_of_unheld
    from restrain.models.estimators import Autoencoder, Classifier, Regressor
    from restrain.models.loading import load
    from restrain.models.tabular import adopt, give_up

__all__ = [
    "Autoencoder",
    "Classifier",
    "ClassifierCV",
    "Regressor",
    "RegressorCV",
    "adopt",
    "give_up",
    "held_back",
    "load",
    "warn_of_unheld",
]
