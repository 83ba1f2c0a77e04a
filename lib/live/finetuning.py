"""What a fine-tuning run is made of: where it starts, what it learns from, and what it is judged by.

It starts from a stored version and learns from the events that the log has had since, each in its user's history, with
a share of older behaviour beside them at a lower weight, so that this is not forgotten. The newest events are held out.
The log offset of the result is that of the last event before them: whoever takes it over learns from the held-out
events next, and from all that came meanwhile, so that the new weights see each event once.
"""

# pyarrow.compute makes its functions as it is imported, so a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from lib.data.catalog import Catalog
from lib.data.dataset import checked_events, events_file
from lib.data.events import EVENT_SCHEMA, HISTORY_FIELDS
from lib.data.formats.files import parquet_file
from lib.data.histories import Histories, histories_of
from lib.data.popularity import event_counts, start_weights
from lib.data.tables import order_events
from lib.data.user_hash import part_of
from lib.errors import InputError
from lib.evaluation.comparison import Comparison, compare
from lib.evaluation.protocols import Cases, rank
from lib.experiments.split import place_of
from lib.log.log_file import LoggedEvent
from lib.log.reader import LogReader
from lib.model.batches import SequenceBatches
from lib.model.buckets import histories_in, table_of
from lib.model.encoder import BehaviourEncoder, BehaviourEncoderConfig
from lib.model.item_counts import NEVER, ItemCounts
from lib.ranking.contender import answer_contender
from lib.ranking.fit import likes
from lib.versions.accounts import Accounts
from lib.versions.folder import LoadedVersion
from lib.versions.registry import Registry, VersionInfo
from lib.versions.rejections import Rejections

CHUNK = 10_000  # events that are read at once
EVENTS_AT_ONCE = 4_000_000  # of a log, that are counted anew at once: a gigabyte
LEAST_HELD_OUT = 20  # events; fewer say nothing
SCHEMA = pa.schema([EVENT_SCHEMA.field(name) for name in HISTORY_FIELDS])


class TooFewEvents(InputError):
    """There is too little feedback to fine-tune with."""


@dataclass(frozen=True)
class Cut:
    """Where the feedback is cut: trained on up to one log offset, held out from there to another."""

    since: int  # the version that training starts from
    after: int  # its log offset
    until: int  # the log offset of the result
    last: int  # the newest event that is held out
    rival: int  # the version that the result is compared with: what was live at the cut, or is


@dataclass(frozen=True)
class MarkedHistories:
    """Histories of which some events are marked."""

    histories: Histories
    marked: np.ndarray  # (E,) bool

    @property
    def targets(self) -> np.ndarray:
        """(E,) bool: the marked events that follow another one of their user."""
        places = np.arange(len(self.histories.rows)) - np.repeat(self.histories.offsets[:-1], self.histories.lengths)
        return self.marked & (places > 0)

    def save(self, path: Path) -> None:
        """Write a Parquet file, one line a user."""
        offsets = pa.array(self.histories.offsets.astype(np.int32))
        marked = pa.ListArray.from_arrays(offsets, pa.array(self.marked))
        pq.write_table(table_of(self.histories).append_column("marked", marked), path)

    @classmethod
    def load(cls, path: Path) -> "MarkedHistories":
        """Read what `save` has written."""
        table = pq.read_table(path)
        marked = table["marked"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return cls(histories_in(table.drop_columns(["marked"])), marked)


def cut_feedback(
    registry: Registry, offsets: np.ndarray, live: LoadedVersion, since: int, after: int, held_out: float, most: int
) -> Cut:
    """Hold out the newest share of the events since a version and its log offset, at most so many.

    Both sides of the comparison are to have learned from the same events. So the cut is moved to where a version of the
    live weights was stored, and that one is the rival: the live weights have learned the held-out events since.

    Args:
        registry: where the versions are.
        offsets: (E,) of all events that came after that log offset, ascending.
        live: the newest version.
        since: the version that training starts from.
        after: its log offset.
        held_out: the share.
        most: events that are held out at most.

    Raises:
        TooFewEvents: too few would be left on one side.
    """
    count = max(min(round(len(offsets) * held_out), most), LEAST_HELD_OUT)
    if len(offsets) < 2 * count:
        raise TooFewEvents(
            f"since: {len(offsets)} events came after version {since}, and it takes at least "
            f"{2 * LEAST_HELD_OUT} to train and to judge; wait for more feedback, or name an older version"
        )
    until, latest = int(offsets[-count - 1]), int(offsets[-LEAST_HELD_OUT - 1])
    first = int(offsets[LEAST_HELD_OUT - 1])
    stored = [info for info in _lineage(registry, live) if first <= info.log_offset <= latest]
    rival = min(stored, key=lambda info: abs(info.log_offset - until), default=None)
    if rival is None:
        return Cut(since, after, until, int(offsets[-1]), live.version)
    return Cut(since, after, rival.log_offset, int(offsets[-1]), rival.version)


def _lineage(registry: Registry, live: LoadedVersion) -> Iterator[VersionInfo]:
    """Yield the stored versions that led to the live weights, newest first; none from before a rollback."""
    base = registry.base_of(live)
    lineage = {account.version for account in Accounts(registry).newest_lineage()}
    for info in reversed(registry.versions()):
        if info.version not in lineage:  # it was given up because of damage
            continue
        if info.version == base or (info.facts.base or base) != base or info.facts.kind == "rollback":
            return
        yield info


def feedback(log: LogReader, after: int, last: int) -> pa.Table:
    """Return the events between two log offsets, with a column `offset`, in its order."""
    tables = [_table(chunk) for chunk in _chunks(log, after, last)]
    return pa.concat_tables([_table([]), *tables])


def _chunks(log: LogReader, after: int, last: int) -> Iterator[list[LoggedEvent]]:
    while after < last:
        chunk = [logged for logged in log.read(after, CHUNK) if logged.offset <= last]
        if not chunk:
            return
        yield chunk
        after = chunk[-1].offset


def _table(logged: Sequence[LoggedEvent]) -> pa.Table:
    columns = [pa.array([getattr(entry.event, field.name) for entry in logged], field.type) for field in SCHEMA]
    offsets = pa.array([entry.offset for entry in logged], pa.int64())
    return pa.Table.from_arrays(columns, schema=SCHEMA).append_column("offset", offsets)


def dataset_events(data: str | Path) -> Iterator[pa.Table]:
    """Yield the events of a dataset, piece by piece, with an `offset` of 0.

    Raises:
        InputError: it is missing, or breaks a rule of lib/data/ingest.py.
    """
    path = events_file(data)
    with parquet_file(path) as file:
        for batch in file.iter_batches(1 << 17, columns=HISTORY_FIELDS):
            events = checked_events(pa.Table.from_batches([batch]), path).select(HISTORY_FIELDS)
            yield events.append_column("offset", pa.array(np.zeros(len(events), dtype=np.int64)))


def dataset_size(data: str | Path) -> int:
    """Return the number of events of a dataset."""
    with parquet_file(events_file(data)) as file:
        return file.metadata.num_rows


def older_events(
    log: LogReader, data: str | Path | None, cut: Cut, users: pa.Array, wanted: int, seed: int
) -> pa.Table:
    """Read what came before the version: all of the given users, about `wanted` events of others, drawn by user."""
    there = cut.after + (dataset_size(data) if data is not None else 0)
    share = min(wanted / max(there, 1), 1.0)
    kept = [_of_users(events, users, share, seed) for events in (dataset_events(data) if data is not None else ())]
    kept += [_of_users(_table(chunk), users, share, seed) for chunk in _chunks(log, 0, cut.after)]
    return pa.concat_tables([_table([]), *kept])


def _of_users(events: pa.Table, users: pa.Array, share: float, seed: int) -> pa.Table:
    """Keep the events of the given users, and of that share of all others; a user is drawn wherever the events are."""
    codes = events["user_id"].combine_chunks().dictionary_encode()
    drawn = np.array([place_of(user, f"older {seed}") < share for user in codes.dictionary.to_pylist()], bool)
    kept = drawn | pc.is_in(codes.dictionary, users).to_numpy(zero_copy_only=False)
    return events.filter(pa.array(kept[codes.indices.to_numpy()]))


def histories_around(
    events: pa.Table, after: int, catalog: Catalog, event_kinds: Sequence[str], context: int | None = None
) -> MarkedHistories:
    """Make histories of events by time, of equal times in the order in which they came; mark those that are new.

    Args:
        events: with their log offsets.
        after: the log offset beyond which an event is new.
        catalog: has all their items.
        event_kinds: others are left out.
        context: of a user who has new events, at most so many before the first of them are kept.
    """
    histories, offsets = _in_order(events, catalog, event_kinds)
    marked = offsets > after
    if context is None:
        return MarkedHistories(histories, marked)
    new = np.append(np.flatnonzero(marked), len(marked))
    first = new[np.searchsorted(new, histories.offsets[:-1])]  # (U,) of each user, or of a later one
    begin = np.where(first < histories.offsets[1:], first - context, 0)
    kept = np.arange(len(marked)) >= np.repeat(begin, histories.lengths)
    return MarkedHistories(histories.select(kept), marked[kept])


def _in_order(events: pa.Table, catalog: Catalog, event_kinds: Sequence[str]) -> tuple[Histories, np.ndarray]:
    """Return the histories of events of these kinds, and (E,) the log offset of each event."""
    events = order_events(events.filter(pc.is_in(events["event"], pa.array(event_kinds, pa.string()))))
    return histories_of(events, catalog.row_of, event_kinds), events["offset"].to_numpy()


class WeightedBatches(SequenceBatches):
    """Training batches in which each event counts by a weight of its own, too; weights is (E,)."""

    def __init__(self, histories: Histories, config: BehaviourEncoderConfig, weights: np.ndarray):
        super().__init__(histories, config)
        self.weights = (self.weights * weights).astype(np.float32)


def of_users(events: pa.Table, users: pa.Array) -> pa.Table:
    """Return the events of some users."""
    return events.filter(pc.is_in(events["user_id"], users))


def of_known_items(events: pa.Table, catalog: Catalog, users: int | None = None) -> pa.Table:
    """Return the events of items that the catalog has, or that so many users have met."""
    known = pc.is_in(events["item_id"], pa.array(catalog.item_ids[1:], pa.string()))
    if users is None:
        return events.filter(known)
    met = events.select(["item_id", "user_id"]).group_by("item_id").aggregate([("user_id", "count_distinct")])
    enough = met.filter(pc.greater_equal(met["user_id_count_distinct"], users))["item_id"].combine_chunks()
    return events.filter(pc.or_(known, pc.is_in(events["item_id"], enough)))


def count_popularity(encoder: BehaviourEncoder, catalog: Catalog, events: pa.Table, cut: Cut, half_life: float) -> None:
    """Count the events that are learned, a user's of one item once; half_life in events.

    From there on the counts are relative to the log offset of the result, from which a learner counts on.
    """
    encoder.item_popularity *= float(np.exp2((int(encoder.popularity_reference) - cut.until) / half_life))
    encoder.popularity_reference.fill_(cut.until)
    events = events.combine_chunks()
    users = events["user_id"].combine_chunks().dictionary_encode()
    items = events["item_id"].combine_chunks().dictionary_encode()
    rows = np.array([catalog.row_of[item_id] for item_id in items.dictionary.to_pylist()], dtype=np.int64)
    rows, offsets = rows[items.indices.to_numpy()], events["offset"].to_numpy()
    pairs = users.indices.to_numpy().astype(np.int64) * len(catalog.item_ids) + rows
    counted = _first_of(pairs) & (offsets > cut.after) & (offsets <= cut.until)
    weights = start_weights(_first_of(users.indices.to_numpy()))[counted]
    counts = torch.from_numpy(event_counts(offsets[counted], cut.until, half_life) * weights).float()
    encoder.item_popularity.index_add_(0, torch.from_numpy(rows[counted]), counts)


def recount(
    encoder: BehaviourEncoder,
    catalog: Catalog,
    origin: LoadedVersion,
    log: LogReader,
    data: str | Path | None,
    until: int,
    rejections: Rejections,
) -> None:
    """Count anew what goes together, follows and trends: what the log holds now, on top of an origin's counts.

    So what was erased from the log is in no count any more.

    Args:
        encoder: whose counts they are.
        catalog: its items, of which the origin has the first.
        origin: the version with which its lineage began, as pretraining has counted it.
        log: all of it, as events are counted with what came before them.
        data: what came before the log.
        until: the log offset of the newest event that is counted.
        rejections: events that are not counted.
    """
    counts, first = encoder.counts, origin.encoder.counts
    if counts is None or first is None:
        return
    since = _begin_anew(counts, first)
    parts = max(-(-until // EVENTS_AT_ONCE), 1)
    for number in range(parts):
        own = [_of_part(_table(chunk), number, parts) for chunk in _chunks(log, 0, until)]
        events = pa.concat_tables([_table([]), *own])
        users = events["user_id"].unique()
        before = [of_users(piece, users) for piece in (dataset_events(data) if data is not None else ())]
        events = of_known_items(pa.concat_tables([*before, events]), catalog)
        histories, offsets = _in_order(events, catalog, encoder.config.event_kinds or [])
        liked = likes(histories, encoder.config) > 0
        histories, offsets = histories.select(liked), offsets[liked]
        places = np.flatnonzero((offsets > origin.log_offset) & ~rejections.cover(offsets))
        places = places[np.argsort(offsets[places], kind="stable")]
        times = int(first.clock) + offsets[places] - origin.log_offset
        for start in range(0, len(places), CHUNK):
            part = slice(start, start + CHUNK)
            counts.count_events(histories, places[part], np.ones(len(places[part])), times[part])
    unmet = (counts.first_at == NEVER) & (since != NEVER)  # put into the catalog, and nobody has met them since
    counts.first_at[unmet] = since[unmet]


def keep_ranker(encoder: BehaviourEncoder, rival: BehaviourEncoder) -> None:
    """Take over what the ranker of the live weights has learned up to the cut: a fine-tune moves the encoder alone."""
    own, learned = encoder.ranker, rival.ranker
    if own is not None and learned is not None and own.parts == learned.parts:
        own.load_state_dict(learned.state_dict())


def _begin_anew(counts: ItemCounts, first: ItemCounts) -> torch.Tensor:
    """Put counts back to those of an earlier version; return since when there were the items that it did not have."""
    since = counts.first_at.clone()
    since[: len(first.events)] = NEVER
    counts.clear()
    for name, values in first.named_buffers():
        getattr(counts, name)[: len(values)] = values
    return since


def _of_part(events: pa.Table, number: int, parts: int) -> pa.Table:
    """Return the events of the users of one of several parts."""
    if parts == 1:
        return events
    codes = events["user_id"].combine_chunks().dictionary_encode()
    own = np.array([part_of(user, parts) == number for user in codes.dictionary.to_pylist()], bool)
    return events.filter(pa.array(own[codes.indices.to_numpy()]))


def _first_of(values: np.ndarray) -> np.ndarray:
    """Return (E,) bool, where each value stands for the first time."""
    first = np.zeros(len(values), dtype=bool)
    first[np.unique(values, return_index=True)[1]] = True
    return first


def judge(
    result: tuple[BehaviourEncoder, Catalog], rival: tuple[BehaviourEncoder, Catalog], held_out: MarkedHistories
) -> Comparison:
    """Compare a result with its rival (the first) on the marked events that a user aimed at.

    Raises:
        TooFewEvents: there are none that follow another event of their user.
    """
    encoder, catalog = result
    histories = held_out.histories
    aimed_at = likes(histories, encoder.config) > 0
    tested = np.flatnonzero(held_out.targets & aimed_at)
    if len(tested) == 0:
        raise TooFewEvents("since: no held-out event follows another one of its user; wait for more feedback")
    users = histories.owners(tested)
    cases = Cases(histories, users, tested - histories.offsets[users])
    contenders = [answer_contender("live", *rival, catalog), answer_contender("base", *result, catalog)]
    rankings = [(contender.name, rank(contender, cases)) for contender in contenders]
    return compare(rankings, cases, [], np.bincount(histories.rows, minlength=len(catalog) + 1))
