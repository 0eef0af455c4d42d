"""Every kind of rule in every way that people run PyTorch: the rows and columns of `test_everywhere.py`.

`kinds` has the rows, `training` the plain run that all are compared with; each other module has some columns. A new
module here is found by itself.
"""

import importlib
import pkgutil

from everywhere.column import COLUMNS as COLUMNS
from everywhere.kinds import KINDS as KINDS

for info in pkgutil.iter_modules(__path__):
    importlib.import_module(f"everywhere.{info.name}")
