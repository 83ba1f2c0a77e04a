"""The record of what learning failed at, beside the versions: it outlives the process that failed.

An error ends the learner's process, and the next one tries the same again: a micro-batch, changed items, or an offered
model. What ends a process without an error (no memory, a kill) leaves no time to write anything, so the first try of
each process is written down before it is made.
"""

from collections.abc import Sequence

from pydantic import BaseModel, ValidationError

from lib.versions.store import Store

ATTEMPT_FILE = "attempt.json"  # of a micro-batch
ITEM_ATTEMPT_FILE = "item_attempt.json"
MOST_TRIES = 3
MOST_KILLED = 10  # tries of which none said why it ended: kills from outside are no fault of the events
LONGEST_TRACEBACK = 4_000  # characters, of its end
NO_TRACEBACK = "the process ended while it learned these events"


class Attempt(BaseModel):
    """How often something was tried that no version has learned: events, or changed items by their revisions."""

    after_offset: int  # of the log; the events are those beyond it,
    last_offset: int  # up to this one
    tries: int
    traceback: str = NO_TRACEBACK  # of the last error

    @property
    def is_last(self) -> bool:
        """Whether it is not to be tried again."""
        return self.tries >= self.most_tries

    @property
    def most_tries(self) -> int:
        """How often it is tried."""
        return MOST_KILLED if self.traceback == NO_TRACEBACK else MOST_TRIES


class Attempts:
    """One record in one registry; for its one learner. Every method that writes raises OSError where it cannot."""

    def __init__(self, store: Store, file: str = ATTEMPT_FILE):
        self.store = store
        self.file = file
        self.proven = False  # whether a try of this process has succeeded
        self.newest = self._read()

    def beyond(self, offset: int) -> Attempt | None:
        """Return what is recorded of the events beyond a log offset, None where nothing is."""
        return self.newest if self.newest is not None and self.newest.after_offset == offset else None

    def begin(self, after_offset: int, last_offset: int) -> None:
        """Count a try, before it is made."""
        before = self.beyond(after_offset)
        tries, traceback = (0, NO_TRACEBACK) if before is None else (before.tries, before.traceback)
        self._write(Attempt(after_offset=after_offset, last_offset=last_offset, tries=tries + 1, traceback=traceback))

    def take_back(self) -> None:
        """Count the try that began as none, as something else failed."""
        if self.newest is None or self.newest.tries == 1:
            self.succeed()
        else:
            self._write(self.newest.model_copy(update={"tries": self.newest.tries - 1}))

    def fail(self, after_offset: int, last_offset: int, traceback: str) -> None:
        """Record why a try failed; count it where it was not written down before."""
        before = self.beyond(after_offset)
        tries = 1 if before is None else before.tries
        self._write(
            Attempt(
                after_offset=after_offset,
                last_offset=last_offset,
                tries=tries,
                traceback=traceback[-LONGEST_TRACEBACK:],
            )
        )

    def killed(self, after_offset: int, last_offset: int) -> None:
        """Record that another worker was killed; count it where the try was not written down before."""
        if self.beyond(after_offset) is None:
            self._write(Attempt(after_offset=after_offset, last_offset=last_offset, tries=1))

    def narrow(self, revisions: Sequence[int], whole: Attempt) -> None:
        """Suspect a part of the changed items at which learning failed: one more failure, and it is halved.

        A single change has all of its tries before it, as others may have been to blame.
        """
        tries = 0 if len(revisions) == 1 else whole.most_tries - 1
        span = {"after_offset": revisions[0] - 1, "last_offset": revisions[-1], "tries": tries}
        self._write(whole.model_copy(update=span))

    def succeed(self) -> None:
        """Forget the record: what it names was learned, or set aside."""
        if self.newest is not None:
            self.store.delete(self.file)
            self.newest = None

    def _write(self, attempt: Attempt) -> None:
        self.store.write(self.file, attempt.model_dump_json().encode(), replace=True)
        self.newest = attempt

    def _read(self) -> Attempt | None:
        """Return what is recorded; a record that cannot be read is none: all is tried again."""
        if not self.store.is_file(self.file):
            return None
        try:
            return Attempt.model_validate_json(self.store.read(self.file))
        except ValidationError:
            return None
