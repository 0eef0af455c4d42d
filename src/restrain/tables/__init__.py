"""Tables with named columns, and their encoding as numbers. Needs NumPy and scikit-learn."""

from restrain.extras import needing

with needing("models", __name__):
    from restrain.tables import spelling
    from restrain.tables.encoder import TableEncoder
    from restrain.tables.encoding import Encoding, Feature
    from restrain.tables.frames import is_frame, odd_columns, table_of, to_pandas
    from restrain.tables.spelling import canonical
    from restrain.tables.table import (
        Marks,
        Table,
        as_texts,
        columns_of,
        counted,
        joined,
        parsed,
        plain,
        shown,
    )

__all__ = [
    "Encoding",
    "Feature",
    "Marks",
    "Table",
    "TableEncoder",
    "as_texts",
    "canonical",
    "columns_of",
    "counted",
    "is_frame",
    "joined",
    "odd_columns",
    "parsed",
    "plain",
    "shown",
    "spelling",
    "table_of",
    "to_pandas",
]
