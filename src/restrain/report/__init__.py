"""Reports: one HTML file with rules, curves, weights, warnings and a path to explore."""

from restrain.report.charts import best_epoch
from restrain.report.content import (
    Content,
    Part,
    RuleFacts,
    TensorFacts,
    as_code,
    checked_facts,
    checked_images,
    checked_path,
    checked_rows,
    environment,
)
from restrain.report.page import page, write

__all__ = [
    "Content",
    "Part",
    "RuleFacts",
    "TensorFacts",
    "as_code",
    "best_epoch",
    "checked_facts",
    "checked_images",
    "checked_path",
    "checked_rows",
    "environment",
    "page",
    "write",
]
