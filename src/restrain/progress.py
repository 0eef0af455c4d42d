"""The progress bar of a training or a path."""

from __future__ import annotations

import sys
from typing import Any

from restrain.extras import needing


def bar(total: int, wanted: bool | None, unit: str = "epochs") -> Any:
    """Return a progress bar over `total` units; `wanted=None` shows it if stderr is a terminal."""
    show = sys.stderr is not None and sys.stderr.isatty() if wanted is None else wanted
    if not show:
        return _NoBar()
    with needing("models", "the progress bar"):
        from tqdm import tqdm

    return tqdm(total=total, unit=f" {unit}", file=sys.stderr)


class _NoBar:
    n = 0

    def update(self, steps: int) -> None:
        """Show nothing."""

    def set_postfix(self, **values: Any) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Show nothing."""
