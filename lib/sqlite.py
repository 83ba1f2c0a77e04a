"""How SQLite files are made, opened, synced, read and written.

All of them have write-ahead logging: `create` makes them so, and so does opening one that may be new ("rwc").
"""

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal

from lib.durable import rename_durably

BUSY_SECONDS = 5.0  # to wait while another process writes
SYNC_FAILED = "SQLITE_IOERR_FSYNC"


class Unsynced(sqlite3.OperationalError):
    """A commit is in the file, and it is not known whether it stays there if the machine or the process stops."""


class Database:
    """One SQLite file, with one connection that threads use in turn.

    Args:
        path: the file.
        mode: SQLite's: read ("ro") or read and write ("rw") a file that exists, or create it if need be ("rwc").
        error: turns an error of SQLite into the one to raise, which names the file and the remedy.
        synchronous: FULL has a commit on disk when it returns; NORMAL may lose the newest ones in a power loss.

    Raises:
        Exception: what `error` returns, for a file that is missing, damaged or no database.
    """

    def __init__(
        self,
        path: Path,
        mode: Literal["ro", "rw", "rwc"],
        error: Callable[[sqlite3.Error], Exception],
        synchronous: Literal["FULL", "NORMAL"] = "FULL",
    ):
        self.path = path
        self._error = error
        self._lock = threading.Lock()
        with self.errors():
            self.connection = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode={mode}",
                uri=True,
                timeout=BUSY_SECONDS,
                isolation_level=None,
                check_same_thread=False,
            )
        with self.opening():
            if mode == "rwc":
                self.connection.execute("PRAGMA journal_mode = WAL")
            if mode != "ro":
                self.connection.execute(f"PRAGMA synchronous = {synchronous}")
                # on macOS an fsync alone does not reach the disk; elsewhere this changes nothing
                self.connection.execute("PRAGMA fullfsync = ON")

    def rows(self, statement: str, *parameters: object) -> list[tuple]:
        """Return what a statement finds."""
        with self._lock, self.errors():
            return self.connection.execute(statement, parameters).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Write all that the block writes, or nothing.

        Raises:
            sqlite3.Error: it could not be written; Unsynced where it is not known whether it was.
        """
        with self._lock:
            connection = self.connection
            if connection.in_transaction:  # the rollback of an earlier failure failed as well
                connection.execute("ROLLBACK")
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException as error:
                if connection.in_transaction:  # SQLite rolls back by itself after some failures
                    connection.execute("ROLLBACK")
                if getattr(error, "sqlite_errorname", None) == SYNC_FAILED:
                    self._take_out()
                raise

    def _take_out(self) -> None:
        """Write another commit, which changes nothing, over one whose sync failed.

        That one was given up, but the write-ahead log has it whole: who opens the file after a crash would find it.

        Raises:
            Unsynced: this failed, too.
        """
        try:
            [version] = self.connection.execute("PRAGMA user_version").fetchone()
            self.connection.execute(f"PRAGMA user_version = {version}")
        except sqlite3.Error as error:
            raise Unsynced(f"{error}, twice") from error

    def damage(self) -> str | None:
        """Read all pages, and return the first damage among them: 0.4 s for a log of a million events."""
        [(found,)] = self.rows("PRAGMA quick_check(1)")
        return None if found == "ok" else " ".join(found.split())

    def close(self) -> None:
        """Close the file; the last to close it empties and removes the write-ahead log."""
        with self._lock:
            self.connection.close()

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Raise errors of SQLite as those of the file's owner."""
        try:
            yield
        except sqlite3.Error as error:
            raise self._error(error) from error

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Close the file when the block, which checks or prepares it, fails."""
        try:
            with self.errors():
                yield
        except BaseException:
            self.close()
            raise


def create(path: Path, schema: str) -> None:
    """Make a file that gets its name only when it is whole, so that an empty or partial one is always damage.

    One process at a time may make it; what an interrupted one left behind is removed.

    Raises:
        sqlite3.Error: it could not be made.
    """
    unfinished = path.with_name(f"{path.name}.new")
    unfinished.unlink(missing_ok=True)
    with closing(sqlite3.connect(unfinished, isolation_level=None)) as connection:
        connection.executescript(f"BEGIN; {schema} COMMIT; PRAGMA journal_mode = WAL;")
    rename_durably(unfinished, path)
