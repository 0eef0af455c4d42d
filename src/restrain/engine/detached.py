"""What an attachment becomes in a copy or a pickle."""

from __future__ import annotations

from typing import Any

from restrain.errors import DetachedError
from restrain.plans import Plan


class DetachedAttachment:
    """What an attachment becomes in a copy or a pickle: it knows its plan, and that it is attached to nothing."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise DetachedError(
            f"this is a copy of an attachment, attached to nothing: write rs.attach(model, copy.plan) before .{name}"
        )
