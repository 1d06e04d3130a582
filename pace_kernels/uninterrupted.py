"""A Ctrl-C waits."""

from __future__ import annotations

import signal
import threading
from typing import Any


class uninterrupted:
    """Within this context a Ctrl-C waits. Python raises KeyboardInterrupt between any two of its instructions, so also
    between a kernel and what belongs to it: weights and states would then be of different steps."""

    def __enter__(self) -> None:
        self._handler, self._came, self._frame = None, False, None
        if threading.current_thread() is threading.main_thread():  # no other one gets it
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):
                self._handler = handler
                signal.signal(signal.SIGINT, self._later)

    def _later(self, number: int, frame: Any) -> None:
        self._came, self._frame = True, frame

    def __exit__(self, *_: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            if self._came:
                self._handler(signal.SIGINT, self._frame)
