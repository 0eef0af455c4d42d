"""Calls that run, told by their frames on the call stack.

An exception may come between any two lines (Ctrl-C), so that a later line can't be relied on to put something back.
State that belongs to a call is kept together with a `Call`, and is void once that call has left the stack.
"""

from __future__ import annotations

import sys
import threading
import weakref
from types import FrameType
from typing import Any


class Call:
    """A call of a function that runs now. Neither its frame nor its locals are kept alive.

    Args:
        frame: the frame of the call.
        of: the `self` of the call. A frame that has ended may leave its address to another call of the same function;
            the object tells the two apart.
    """

    __slots__ = ("_address", "_code", "_of", "_thread")

    def __init__(self, frame: FrameType, of: Any = None) -> None:
        self._address, self._code, self._thread = id(frame), frame.f_code, threading.get_ident()
        self._of = None if of is None else weakref.ref(of)

    @property
    def is_here(self) -> bool:
        """Whether it is one of this thread."""
        return self._thread == threading.get_ident()

    def is_at(self, frame: FrameType) -> bool:
        """Whether this is its frame."""
        return (
            id(frame) == self._address
            and frame.f_code is self._code
            and (self._of is None or frame.f_locals.get("self") is self._of())
        )

    def runs(self, below: FrameType | None = None) -> bool:
        """Whether the call is on the stack of its thread; on this thread's from `below` on, if that is given."""
        frame = (below or sys._getframe(1)) if self.is_here else sys._current_frames().get(self._thread)
        while frame is not None:
            if id(frame) == self._address and self.is_at(frame):
                return True
            frame = frame.f_back
        return False


class Block(threading.local):
    """A `with` statement that other code of the thread may ask about: `block.on` is true inside of it.

    It belongs to the call in which the `with` stands, not to one that hands it to an `ExitStack`.
    """

    def __init__(self) -> None:
        self._calls: list[Call] = []

    def __enter__(self) -> None:
        self._calls.append(Call(sys._getframe(1)))

    def __exit__(self, *exception: object) -> None:
        self._calls.pop()

    @property
    def on(self) -> bool:
        """Whether this thread is inside."""
        while self._calls and not self._calls[-1].runs():  # left by an exception that hit `__exit__` itself
            self._calls.pop()
        return bool(self._calls)
