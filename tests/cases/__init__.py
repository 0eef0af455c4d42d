"""One module a family of the catalogue, with PENALTIES, CONSTRAINTS, NOISES, REPARAMETRIZATIONS: {name: [Case, ...]}.

A new module here is found by itself.
"""

import importlib
import pkgutil

from cases.case import Case as Case


def gathered(kind):
    """The cases of a kind in all modules of this package."""
    modules = [importlib.import_module(f"cases.{info.name}") for info in pkgutil.iter_modules(__path__)]
    return {name: cases for module in modules for name, cases in getattr(module, kind, {}).items()}


PENALTIES, CONSTRAINTS, NOISES = map(gathered, ("PENALTIES", "CONSTRAINTS", "NOISES"))
REPARAMETRIZATIONS = gathered("REPARAMETRIZATIONS")
TRANSFORMS = CONSTRAINTS | NOISES | REPARAMETRIZATIONS
