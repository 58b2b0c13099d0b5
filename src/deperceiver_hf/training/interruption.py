# SPDX-License-Identifier: Apache-2.0
"""Stopping a run from outside at a step boundary."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

GRACE_SECONDS = 5.0  # a launcher passes on the Ctrl-C that its children have had from the terminal already


class StopRequest:
    """While entered, SIGINT and SIGTERM set `requested` instead of ending the process.

    A SIGINT that comes `GRACE_SECONDS` after the first raises `KeyboardInterrupt` after all. Outside the main thread,
    where Python allows no signal handlers, nothing is changed.
    """

    def __init__(self) -> None:
        self.requested = False
        self._first = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested and number == signal.SIGINT and now - self._first > GRACE_SECONDS:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._first = True, now
