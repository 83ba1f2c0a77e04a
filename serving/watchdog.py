"""The watchdog: ends a process whose work makes no progress, so that Ray starts it again.

One that cannot even run this thread is ended from outside (serving/supervision.py).
"""

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from math import inf

logger = logging.getLogger(__name__)
LAST_WORDS_SECONDS = 5.0  # to write down what stalled


class Watchdog:
    """Watches the one thread that made it report progress last."""

    def __init__(self, seconds: float, stalled: Callable[[str], None] = lambda stack: None):
        """Begin to watch once there is work.

        Args:
            seconds: that a piece of work may take.
            stalled: hears of the stack of the thread that stalled, before the process ends.
        """
        self.seconds = seconds
        self.stalled = stalled
        self.due = inf  # in seconds of a monotonic clock
        self.thread = 0  # that is watched
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def progress(self, seconds: float | None = None) -> None:
        """Say that a piece of work begins, in this thread; it may take so long, by default the usual time."""
        self.thread = threading.get_ident()
        self.due = time.monotonic() + (self.seconds if seconds is None else seconds)

    def rest(self) -> None:
        """Say that there is no work, or that others are waited for."""
        self.due = inf

    def _watch(self) -> None:
        while time.monotonic() < self.due:
            time.sleep(min(1.0, self.seconds / 4))
        frame = sys._current_frames().get(self.thread)
        self.end("".join(traceback.format_stack(frame)))

    def end(self, stack: str) -> None:
        """End the process, after the last words."""
        logger.error("no progress for %g s; the process ends, and is started again:\n%s", self.seconds, stack)
        last_words = threading.Thread(target=self.stalled, args=(stack,), daemon=True)  # they may stall as well
        last_words.start()
        last_words.join(LAST_WORDS_SECONDS)
        os._exit(1)
