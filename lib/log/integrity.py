"""Whether the feedback log is whole, and reaches as far as the versions have learned of it."""

from collections.abc import Sequence
from pathlib import Path

from lib.errors import InputError
from lib.log.errors import LogCorrupt
from lib.log.layout import ORDER_FILE, RECORD, LogLayout
from lib.log.order import LogOrder
from lib.log.reader import FeedbackLogReader
from lib.log.shard import Shard
from lib.log.write_ahead_log import last_commit_is_torn


def check_log(state: str | Path, learned: int, pages: bool = False) -> None:
    """Refuse a log that is damaged, or that ends before what versions have learned of it.

    A copy of a log on Kafka may be behind until an aggregator opens it; `check_ends` then checks its end.

    Args:
        state: the state folder.
        learned: the newest offset that a version has learned.
        pages: read the whole log for damage.

    Raises:
        InputError: it names the log, and the remedy.
    """
    layout = LogLayout.of(state)
    if Path(state, RECORD).exists():
        for shard in layout.shards():
            layout.require(state, shard)
    order = Path(state, ORDER_FILE)
    if layout.aggregators > 1 and order.exists():
        last_commit_is_torn(order)
    try:
        ends = [_end_of(path, pages) for path in layout.files(state)]
    except LogCorrupt as error:
        raise LogCorrupt(f"{error}{layout.backend.remedy}") from error
    if not layout.backend.is_copy:
        check_ends(state, learned, ends)


def check_ends(state: str | Path, learned: int, ends: Sequence[int]) -> None:
    """Refuse logs of shards that end, at these offsets of their own, before what versions have learned of them.

    Such a log would give new events offsets that were learned already, so that the events were never learned.

    Raises:
        InputError: it names the log, and the remedy.
    """
    layout = LogLayout.of(state)
    for shard, end in zip(layout.shards(), ends, strict=True):
        check_end(state, learned, shard, end)
    if layout.aggregators > 1:
        path = Path(state, ORDER_FILE)
        with LogOrder(path) as order:
            _require(path, order.end(), learned, state)


def check_end(state: str | Path, learned: int, shard: Shard, end: int) -> None:
    """Refuse the log of one shard that ends, at this offset of its own, before what versions have learned of it.

    Raises:
        InputError: it names the log, and the remedy.
    """
    layout = LogLayout.of(state)
    log = layout.files(state)[shard.number]
    if layout.aggregators == 1:
        _require(log, end, learned, state)
        return
    path = Path(state, ORDER_FILE)
    with LogOrder(path) as order:
        place = order.place(shard.number)
    if end < place:
        raise InputError(
            f"state: the feedback log {log} ends at offset {end}, but {path} has put {place} of its events in "
            "order; restore its newest copy"
        )


def _require(log: Path, end: int, learned: int, state: str | Path) -> None:
    if end < learned:
        raise InputError(
            f"state: the feedback log {log} ends at offset {end}, but versions in {state} have learned up to {learned};"
            f" restore its newest copy, or take away the versions beyond {end} (`afterclick versions` lists them)"
        )


def _end_of(log: Path, pages: bool) -> int:
    if not log.exists():
        return 0
    last_commit_is_torn(log)  # before opening it drops anything
    with FeedbackLogReader(log) as reader:
        if pages:
            reader.check()
        return reader.last_offset()
