"""How the state of a service is kept: where its feedback log is, in how many shards, and where its versions are.

None of it can change after the first event: the state folder has a record of it. The record is written when the logs
have been made, so a folder without the record, or without a log that it names, is not the service's (a disk that is
not mounted): a new log in place of one that is away would acknowledge events at offsets that were learned already.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lib.durable import write_durably
from lib.errors import InputError
from lib.log.backend import LOG_FILE, SQLITE, LogBackend, backend_of
from lib.log.errors import LogCorrupt
from lib.log.feedback import FeedbackLog
from lib.log.items import ItemLog
from lib.log.log_file import create_log_file
from lib.log.order import LogOrder
from lib.log.reader import FeedbackLogReader, LogReader, ShardedLogReader
from lib.log.shard import Shard

ORDER_FILE = "order.sqlite"  # of the events of several shards
ITEM_LOG_FILE = "items.sqlite"
RECORD = "log.json"  # in the state folder


@dataclass(frozen=True)
class LogLayout:
    """Where the feedback log is, in how many shards, and where the versions are."""

    aggregators: int = 1
    log: str = SQLITE  # or kafka://host:port[,host:port]/topic[?setting=value&...]
    versions: str | None = None  # a folder or a URI; None: the state folder

    @property
    def backend(self) -> LogBackend:
        """What keeps the log."""
        return backend_of(self.log)

    def shards(self) -> list[Shard]:
        """Return all shards."""
        return [Shard(number, self.aggregators) for number in range(self.aggregators)]

    def files(self, state: str | Path) -> list[Path]:
        """Return the files that the logs of the shards are read from."""
        return [Path(state, shard.named(self.backend.file)) for shard in self.shards()]

    def open(self, state: str | Path, shard: Shard) -> FeedbackLog:
        """Open the log of a shard, to write; wait for a dying writer's lock, and for brokers that are away.

        Raises:
            InputError: it cannot be opened.
        """
        return self.backend.open(self.files(state)[shard.number], shard)

    @classmethod
    def of(cls, state: str | Path) -> "LogLayout":
        """Return the layout that a state folder was made with; the default where it holds no record.

        Args:
            state: a folder; a URI, at which there are versions alone, holds no record.

        Raises:
            InputError: the record is damaged.
        """
        path = Path(state, RECORD)
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            return cls()
        except (ValueError, TypeError) as error:
            raise InputError(f"state: {path} is damaged ({error}); restore it from a copy") from error

    def check(self, state: str | Path) -> None:
        """Refuse another layout than the state folder's, and a topic that cannot be used.

        Raises:
            InputError: it names the argument and how to go on.
        """
        made = self.of(state)
        if made == LogLayout() and not Path(state, LOG_FILE).exists():
            made = self  # no event has come yet
        moved = made.backend.identity != self.backend.identity
        others = {
            "aggregators": made.aggregators != self.aggregators,
            "log": moved,
            "versions": made.versions != self.versions,
        }
        for name in (name for name, other in others.items() if other):
            then, now = getattr(made, name), getattr(self._public, name)
            how = f"without --{name}" if then is None else f"with --{name} {then}"
            raise InputError(
                f"{name}: {state} was made with {then}, not {now}; start {how}, or begin another folder with --state"
            )
        self.backend.check(self.aggregators)

    def begin(self, state: str | Path) -> None:
        """Make the logs of a state folder, then its record, before the first event comes; done once for good.

        Raises:
            LogCorrupt: it was done, and a log is not there.
        """
        path = Path(state, RECORD)
        if path.exists():
            for shard in self.shards():
                self.require(state, shard)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        for file in [] if self.backend.is_copy else self.files(state):
            if not file.exists():
                create_log_file(file)
        ItemLog(path.with_name(ITEM_LOG_FILE)).close()
        if self.aggregators > 1:
            LogOrder.create(path.with_name(ORDER_FILE))
        write_durably(path, json.dumps(asdict(self._public)).encode())

    def require(self, state: str | Path, shard: Shard) -> None:
        """Refuse a state folder that was not begun, or in which a log of the shard is not there.

        Raises:
            LogCorrupt: it names the file, and the remedy.
        """
        needed = [Path(state, RECORD)]
        if not self.backend.is_copy:
            needed.append(self.files(state)[shard.number])
        if shard.number == 0:
            needed.append(Path(state, ITEM_LOG_FILE))
        for path in needed:
            if not path.exists():
                raise LogCorrupt(
                    f"state: {path} is missing, and nothing is begun in its place; mount the disk of {state}, or"
                    " restore the file from a copy"
                )

    @property
    def _public(self) -> "LogLayout":
        """The same without settings of the log's client."""
        return replace(self, log=self.backend.location)


def read_log(state: str | Path) -> LogReader:
    """Open the feedback log of a state folder, to read beside whoever writes it.

    Raises:
        InputError: there is none, or it is damaged.
    """
    layout = LogLayout.of(state)
    logs = [FeedbackLogReader(path) for path in layout.files(state)]
    return logs[0] if layout.aggregators == 1 else ShardedLogReader(logs, LogOrder(Path(state, ORDER_FILE)))
