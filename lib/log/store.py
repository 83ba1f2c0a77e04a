"""Where the writer of a feedback log puts events: a `Store`, and the one in a SQLite file of this machine."""

import fcntl
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from lib.errors import InputError
from lib.log.errors import LogLocked
from lib.log.log_file import LoggedEvent, Row, check_pages, create_log_file, insert_rows, keys_of_user, open_log_file
from lib.log.write_ahead_log import last_commit_is_torn

# At SQLite's default of 1,000 pages a busy log pays for a checkpoint every few dozen commits, which puts it into the
# p99; at 4,000 (16 MB of WAL) it is out of it. A WAL much larger than that is slower again: growing a file costs more
# to fsync than overwriting it in place.
SETTINGS = ("secure_delete = ON", "wal_autocheckpoint = 4000", "cache_size = -64000")


@dataclass(frozen=True, slots=True)
class AppendResult:
    """What became of a batch: one entry per event, its offset, or None where it was a duplicate.

    `others` came into the log unseen since the append before, in order: where a log is not written by one process
    alone, or a write can succeed without being known to (lib/log/kafka.py).
    """

    offsets: list[int | None]
    others: list[LoggedEvent] = field(default_factory=list, compare=False)

    @property
    def accepted(self) -> int:
        """Number of events that were new."""
        return len(self.offsets) - self.duplicates

    @property
    def duplicates(self) -> int:
        """Number of events that the log held already, or that came earlier in the same batch."""
        return self.offsets.count(None)


@dataclass(frozen=True)
class PassedOver:
    """What another program has put into the log: how many messages, and of the newest why they are no feedback."""

    count: int = 0
    newest: tuple[str, ...] = ()


class Store(Protocol):
    """What a feedback log writes to, with one thread."""

    name: str  # in messages
    path: Path  # of the SQLite file that the log is read from
    torn: bool  # whether a last commit that was not whole was dropped; what it held was never acknowledged
    commits: int  # writes that changed something, each with its fsync
    passed_over: PassedOver

    def append(self, batches: Sequence[list[Row]]) -> Sequence[AppendResult | Exception]:
        """Write batches of rows, each of them whole or not at all; return the outcome of each.

        Raises:
            Exception: nothing could be written.
        """
        ...

    def erase(self, user_id: str) -> int:
        """Delete all events of a user; return how many there were.

        Raises:
            InputError: this store cannot forget.
            Exception: it could not be written.
        """
        ...

    def close(self) -> None:
        """Close the files, and let go of the lock."""
        ...


class SqliteStore:
    """A SQLite file with its one writer; made, with its folder, where there is none at `path`.

    Args:
        path: the file.
        wait_for_lock: seconds to wait while another process holds the log (a restarted actor may overlap for a moment
            with its dying predecessor).
        check: read the whole file for damage first: 0.4 s for a million events.
        synchronous: NORMAL where the newest commits may be lost in a power loss.

    Raises:
        LogLocked: another process writes to it.
        LogCorrupt: the file is damaged or of another schema.
        InputError: it cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        *,
        wait_for_lock: float = 0.0,
        check: bool = True,
        synchronous: Literal["FULL", "NORMAL"] = "FULL",
    ) -> None:
        self.path = path
        self.name = str(path)
        self.commits = 0
        self.passed_over = PassedOver()
        self._lock = _lock(path, wait_for_lock)
        try:
            self.torn = last_commit_is_torn(path)
            if not path.exists():
                create_log_file(path)
            self.database = open_log_file(path, "rw", synchronous)
            with self.database.opening():
                for setting in SETTINGS:
                    self.database.connection.execute(f"PRAGMA {setting}")
                if check:
                    check_pages(self.database)
        except BaseException:
            os.close(self._lock)
            raise

    def append(self, batches: Sequence[list[Row]]) -> list[AppendResult]:
        """Write batches of rows in one transaction."""
        received_at = time.time_ns() // 1_000_000
        with self.database.transaction() as connection:
            offsets = insert_rows(connection, [(rows, received_at) for rows in batches])
        results = [AppendResult(given) for given in offsets]
        self.commits += any(result.accepted for result in results)
        return results

    def erase(self, user_id: str) -> int:
        """Delete all events of a user, overwrite their bytes with zeros, and empty the write-ahead log."""
        with self.database.transaction() as connection:
            erased = connection.execute("DELETE FROM events WHERE key BETWEEN ? AND ?", keys_of_user(user_id)).rowcount
        self.commits += erased > 0
        # Also when nothing was deleted: an earlier erasure may have been kept from emptying the WAL.
        busy, _, _ = self.database.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise TimeoutError(
                f"the events are deleted, but a reader keeps a copy in {self.path}-wal; end it and erase again"
            )
        return erased

    def close(self) -> None:
        """Close the file, and let go of the lock."""
        self.database.close()
        os.close(self._lock)


def _lock(path: Path, wait_seconds: float) -> int:
    """Take the lock that belongs to the log at `path`; return its descriptor, whose closing lets go of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The lock file stays when the log is closed: removing it would let two processes lock two files of one name.
        descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise InputError(f"feedback log {path} cannot be opened for writing: {error.strerror}") from error
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.02)
                continue
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            message = f"feedback log {path} is held by process {holder}; stop it first, or open the log for reading"
            raise LogLocked(message) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor
