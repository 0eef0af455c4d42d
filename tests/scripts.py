"""Scripts of the project that aren't in the package, as modules."""

import importlib.util
import sys


def loaded(file):
    """A script as a new module."""
    spec = importlib.util.spec_from_file_location(f"restrain_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
