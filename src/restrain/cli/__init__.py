"""Command line: `restrain check`, `fit`, `predict`, `explain`, `report`, `path`, `demo`.

It needs `pip install 'restrain[cli]'`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from restrain.errors import MissingExtraError
from restrain.extras import needing


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command, and exit: 0 for success, 1 for a failure, 2 for an invalid command line."""
    try:
        with needing("cli", "the command line"):
            from restrain.cli.commands import restrain
    except MissingExtraError as error:
        sys.exit(f"Error: {error}")
    restrain(None if arguments is None else list(arguments), prog_name="restrain")
