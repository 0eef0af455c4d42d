"""The command line: `restrain fit`, `predict`, `explain` and `demo`. Needs `pip install 'restrain[cli]'`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from restrain.errors import MissingExtraError
from restrain.extras import needing


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command, and end the process: 0 is fine, 1 is failed, 2 is a command line that can't be."""
    try:
        with needing("cli", "the command line"):
            from restrain.cli.commands import restrain
    except MissingExtraError as error:
        sys.exit(f"Error: {error}")
    restrain(None if arguments is None else list(arguments), prog_name="restrain")
