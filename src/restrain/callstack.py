"""Running calls, recognised by their frames on the call stack.

Ctrl-C can raise between any two lines, so a later line can't be relied on to restore state. State
that belongs to a call is stored with a `Call` instead, and is void when the call left the stack.
"""

from __future__ import annotations

import sys
import threading
import weakref
from types import FrameType
from typing import Any


class Call:
    """Reference to a running call, which keeps neither its frame nor its locals alive.

    Args:
        frame: the frame of the call.
        of: the `self` of the call. A later call of the same function may get a frame at the same
            address; the object tells the two apart.
    """

    __slots__ = ("_address", "_code", "_of", "_thread")

    def __init__(self, frame: FrameType, of: Any = None) -> None:
        self._address, self._code, self._thread = id(frame), frame.f_code, threading.get_ident()
        self._of = None if of is None else weakref.ref(of)

    @property
    def is_here(self) -> bool:
        """True if the call belongs to the current thread."""
        return self._thread == threading.get_ident()

    def is_at(self, frame: FrameType) -> bool:
        """True if `frame` is the frame of the call."""
        return (
            id(frame) == self._address
            and frame.f_code is self._code
            and (self._of is None or frame.f_locals.get("self") is self._of())
        )

    def runs(self, below: FrameType | None = None) -> bool:
        """True if the call is still on the stack of its thread.

        `below` is the frame at which to start on the current thread's stack.
        """
        frame = (below or sys._getframe(1)) if self.is_here else sys._current_frames().get(self._thread)
        while frame is not None:
            if id(frame) == self._address and self.is_at(frame):
                return True
            frame = frame.f_back
        return False


class Block(threading.local):
    """Thread-local context manager: `block.on` is true while the thread is inside its `with`.

    The block belongs to the call that contains the `with` statement, so it can't be entered by an
    `ExitStack`.
    """

    def __init__(self) -> None:
        self._calls: list[Call] = []

    def __enter__(self) -> None:
        self._calls.append(Call(sys._getframe(1)))

    def __exit__(self, *exception: object) -> None:
        self._calls.pop()

    @property
    def on(self) -> bool:
        """True if the current thread is inside the block."""
        while self._calls and not self._calls[-1].runs():  # an exception may have interrupted `__exit__`
            self._calls.pop()
        return bool(self._calls)
