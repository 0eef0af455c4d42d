"""The progress bar of a training or a path."""

from __future__ import annotations

import sys
from typing import Any

from restrain.extras import needing


def bar(total: int, wanted: bool | None, unit: str = "epochs") -> Any:
    """Return a progress bar over `total` units; `wanted=None` shows it where it is seen."""
    if not (_is_watched() if wanted is None else wanted):
        return _NoBar()
    with needing("models", "the progress bar"):
        from tqdm.auto import tqdm

    return tqdm(total=total, unit=f" {unit}", file=sys.stderr)


def _is_watched() -> bool:
    """Return True if stderr is a terminal, or the output of a notebook's cell."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None or (sys.stderr is not None and sys.stderr.isatty())


class _NoBar:
    n = 0

    def update(self, steps: int) -> None:
        """Show nothing."""

    def set_postfix(self, **values: Any) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Show nothing."""
