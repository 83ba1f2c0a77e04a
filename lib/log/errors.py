"""What can go wrong with the feedback log."""

from lib.errors import InputError
from lib.sqlite import Unsynced


class LogWriteError(RuntimeError):
    """The log could not write; nothing of the request was acknowledged. The message names the path and the cause."""


class LogFull(LogWriteError):
    """The log could not write because its disk is full."""


class LogUnsure(LogWriteError):
    """It is not known whether the log was written: its disk did not confirm it, and takes nothing to undo it."""


class PartlyWritten(LogWriteError):
    """The log of one shard could not be written, and another one was."""


class LogCorrupt(InputError):
    """The file is damaged or is not a feedback log of this schema; the message names the path."""


class LogUnavailable(InputError):
    """The log cannot be opened now; the message says why. Opening it is tried again."""


class LogLocked(InputError):
    """Another live process writes to this log; the message names the path and the process."""


def write_error(log: str, error: Exception) -> LogWriteError:
    """Return what those who wait for a write of a log are told of its failure."""
    if isinstance(error, Unsynced):
        return LogUnsure(f"{log} may have been written, or not: {cause_of(error)}")
    full = getattr(error, "sqlite_errorname", None) == "SQLITE_FULL"
    return (LogFull if full else LogWriteError)(f"{log} could not be written: {cause_of(error)}")


def cause_of(error: Exception) -> str:
    """Return an error's message with SQLite's name for it, or its class."""
    return f"{error} ({getattr(error, 'sqlite_errorname', type(error).__name__)})"
