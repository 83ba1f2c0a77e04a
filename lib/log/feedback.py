"""The durable log of feedback: what people did, in the order in which it was acknowledged.

Notable features:

- SQLite in WAL mode with synchronous=FULL: a future resolves only after its events are committed and fsynced.
- Group commit: one writer thread takes everything that waits and writes it in one transaction, so that many callers
  share one fsync.
- Duplicates are recognised exactly, within a batch and across the whole log, by a digest under a unique index that
  also finds a user's events.
- Offsets start at 1, are given without gaps, and are never given twice, not even after an erasure.
- One process writes (an advisory lock on the file beside the log, released by the kernel when its holder dies); any
  number of processes read.
- A damaged file, or one of another schema, is refused; it is never replaced by a new log. A last commit that was torn
  when the machine stopped is dropped: nobody was told that it is durable.
"""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

from lib.data.events import Event
from lib.errors import InputError
from lib.log.errors import LogWriteError, write_error
from lib.log.log_file import Row, row_of
from lib.log.reader import FeedbackLogReader
from lib.log.store import AppendResult, PassedOver, SqliteStore, Store


class Append(NamedTuple):
    """A batch that waits to be written, and who waits for it."""

    rows: list[Row]
    future: Future[AppendResult]


class Erase(NamedTuple):
    """A user who waits to be erased, and who waits for it."""

    user_id: str
    future: Future[int]


class FeedbackLog(FeedbackLogReader):
    """The log with its one writer thread, which alone uses the store that it is given, and closes it."""

    def __init__(self, store: Store) -> None:
        self.store = store
        try:
            super().__init__(store.path)
        except BaseException:
            store.close()
            raise
        self._waiting: list[Append | Erase] = []
        self._waiting_changed = threading.Condition()
        self._closed = False
        self._writer = threading.Thread(target=self._write_until_closed, name=f"feedback log {store.name}", daemon=True)
        self._writer.start()

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, wait_for_lock: float = 0.0, check: bool = True) -> "FeedbackLog":
        """Open the log in a SQLite file, see SqliteStore; it is made where there is none.

        Raises:
            InputError: it cannot be opened; LogLocked or LogCorrupt.
        """
        return cls(SqliteStore(Path(path), wait_for_lock=wait_for_lock, check=check))

    @property
    def torn(self) -> bool:
        """Whether a last commit that was not whole was dropped; what it held was never acknowledged."""
        return self.store.torn

    @property
    def commits(self) -> int:
        """Number of writes that changed something, each with its fsync."""
        return self.store.commits

    @property
    def passed_over(self) -> PassedOver:
        """What another program has put into the log."""
        return self.store.passed_over

    def append(self, events: Sequence[Event]) -> Future[AppendResult]:
        """Write events; the future resolves once they are committed and fsynced. Does not block; thread-safe.

        An event is a duplicate when its user has an event with the same event_id, or, without an event_id, the same
        item, event and timestamp. The events of one call are written together or not at all, with consecutive
        offsets. A future that is cancelled while it still waits is not written.

        Raises:
            InputError: an event cannot be stored as it is; nothing is written.
            LogWriteError: raised by the future when the write failed (disk full, I/O error); the log stays usable.
        """
        rows = [row_of(index, event) for index, event in enumerate(events)]
        future: Future[AppendResult] = Future()
        if not rows:
            future.set_result(AppendResult([]))
            return future
        self._submit(Append(rows, future))
        return future

    def erase(self, user_id: str) -> int:
        """Delete all events of a user, in order with the appends; block, and return how many there were.

        Their bytes are overwritten with zeros and the WAL is emptied, so that no copy stays behind in a file.

        Raises:
            InputError: the log is in a store that cannot forget.
            LogWriteError: it could not be written; erasing again is harmless.
        """
        future: Future[int] = Future()
        self._submit(Erase(user_id, future))
        return future.result()

    def close(self) -> None:
        """Write what still waits, then close the files and let go of the lock; a second close does nothing."""
        with self._waiting_changed:
            if self._closed:
                return
            self._closed = True
            self._waiting_changed.notify()
        self._writer.join()
        super().close()  # before the store: the last to close a file empties and removes its WAL
        self.store.close()

    def _submit(self, request: Append | Erase) -> None:
        with self._waiting_changed:
            if self._closed:
                raise LogWriteError(f"feedback log {self.store.name} is closed")
            self._waiting.append(request)
            self._waiting_changed.notify()

    def _take(self) -> list[Append | Erase]:
        """Return everything that waits, as soon as something does; nothing when the log is closed and drained."""
        with self._waiting_changed:
            while not self._waiting and not self._closed:
                self._waiting_changed.wait()
            requests, self._waiting = self._waiting, []
            return requests

    def _write_until_closed(self) -> None:
        while requests := self._take():
            together: list[Append] = []  # neighbours, so that the order is kept
            for request in requests:
                if not request.future.set_running_or_notify_cancel():
                    continue
                if isinstance(request, Append):
                    together.append(request)
                    continue
                self._append(together)
                together = []
                self._erase(request)
            self._append(together)

    def _append(self, group: list[Append]) -> None:
        """Write waiting batches together, and resolve the future of each."""
        if not group:
            return
        try:
            results = self.store.append([append.rows for append in group])
        except Exception as error:  # whatever it was, those who wait must hear of it, and the thread must go on
            for append in group:
                append.future.set_exception(self._failure(error))
            return
        for append, result in zip(group, results, strict=True):
            if isinstance(result, Exception):
                append.future.set_exception(result)
            else:
                append.future.set_result(result)

    def _erase(self, erase: Erase) -> None:
        try:
            erase.future.set_result(self.store.erase(erase.user_id))
        except InputError as error:
            erase.future.set_exception(error)
        except Exception as error:
            erase.future.set_exception(self._failure(error))

    def _failure(self, error: Exception) -> LogWriteError:
        failure = write_error(f"feedback log {self.store.name}", error)
        failure.__cause__ = error
        return failure
