"""How the feedback log of a state folder is kept: where, and in how many shards.

Neither can change after the first event: the folder remembers both.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lib.durable import write_durably
from lib.errors import InputError
from lib.log.backend import LOG_FILE, SQLITE, LogBackend, backend_of
from lib.log.feedback import FeedbackLog
from lib.log.order import LogOrder
from lib.log.reader import FeedbackLogReader, LogReader, ShardedLogReader
from lib.log.shard import Shard

ORDER_FILE = "order.sqlite"  # of the events of several shards
RECORD = "log.json"  # in the state folder, where the log is not one SQLite file


@dataclass(frozen=True)
class LogLayout:
    """Where the feedback log is, and in how many shards."""

    aggregators: int = 1
    log: str = SQLITE  # or kafka://host:port[,host:port]/topic[?setting=value&...]

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
        others = {"aggregators": made.aggregators != self.aggregators, "log": moved}
        for name in (name for name, other in others.items() if other):
            then, now = getattr(made, name), getattr(self._public, name)
            raise InputError(
                f"{name}: the feedback log in {state} was made with {then}, not {now}; "
                f"start with --{name} {then}, or begin another folder with --state"
            )
        self.backend.check(self.aggregators)

    def record(self, state: str | Path) -> None:
        """Have the state folder remember this layout, durably, before the first event comes."""
        path = Path(state, RECORD)
        if self == LogLayout() or path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.aggregators > 1:
            LogOrder.create(path.with_name(ORDER_FILE))
        write_durably(path, json.dumps(asdict(self._public)).encode())

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
