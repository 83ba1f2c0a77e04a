"""Ingesting: from files of many formats to a clean dataset.

It streams, so that a source may be larger than memory: events are spread by user over spill files, each small enough to
be cleaned in memory, because duplicates and floods need all events of a user together. A source that fits into memory
is never spilled.
"""

# pyarrow.compute makes its functions as it is imported, so a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false

import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lib.data.dataset import EVENTS_FILE, ITEMS_FILE, RATING_SCALE
from lib.data.events import EVENT_SCHEMA
from lib.data.formats.columns import Converter, match_columns
from lib.data.formats.files import find_source, layout_of
from lib.data.formats.items import read_item_file
from lib.data.formats.tables import memory_of, read_tables, size_of
from lib.data.guard import CleaningRules
from lib.data.ratings import RatingScale, recognised_scale, rounded_counts
from lib.data.tables import clean, partition_of
from lib.durable import rename_durably
from lib.errors import InputError

REPORT_FILE = "ingest.json"

PARTITION_BYTES = 256 << 20  # of events in memory; cleaning takes about four times as much
MOST_PARTITIONS = 512  # spill files, all open at once
_WORK_PREFIX = ".ingest-"
# Not yet cleaned: anything may be null, and a value is narrowed to float32 only once it is known to fit.
_SPILL_SCHEMA = pa.schema([(f.name, pa.float64() if f.name == "value" else f.type) for f in EVENT_SCHEMA])

Progress = Callable[[str, int, int], None]  # stage (reading or cleaning), how much is done, of how much


@dataclass
class IngestReport:
    """What an ingest read, kept and rejected: read = kept + the sum of rejected. Times are milliseconds since 1970."""

    source: str
    format: str
    read: int = 0
    kept: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    users: int = 0
    items: int = 0
    first_timestamp: int | None = None
    last_timestamp: int | None = None
    columns: dict[str, str] = field(default_factory=dict)  # the source's column for each field
    time_unit: str | None = None  # of numeric times: s, ms, us or ns
    unknown_kinds: dict[str, int] = field(default_factory=dict)  # the ten most frequent
    ratings: int = 0  # that have a value
    rating_scale: str | None = None  # given or recognised; None where there is no rating
    dislikes: int = 0  # of the ratings
    ratings_off_scale: int = 0  # beyond a given scale: they are kept without their value
    described_items: int = 0
    rejected_items: dict[str, int] = field(default_factory=dict)

    @property
    def period(self) -> str:
        """First and last time in words."""
        if self.first_timestamp is None or self.last_timestamp is None:
            return "no time"
        first, last = (datetime.fromtimestamp(t / 1000, UTC) for t in (self.first_timestamp, self.last_timestamp))
        return f"{first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC"


def ingest(
    source: str | Path,
    out: str | Path,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    kinds: Mapping[str, str] | None = None,
    default_kind: str | None = None,
    delimiter: str | None = None,
    items: str | Path | None = None,
    rating_scale: RatingScale | None = None,
    rules: CleaningRules | None = None,
    overwrite: bool = False,
    progress: Progress = lambda stage, done, total: None,
    partition_bytes: int = PARTITION_BYTES,
    now: int | None = None,
) -> IngestReport:
    """Make `out` a dataset of the events in `source`, users contiguous and each user's in time order.

    What breaks a rule is counted in the report, which is also written to ingest.json. Files get their names only when
    they are complete.

    Args:
        source: a file, or a folder of files.
        out: the dataset's folder.
        format: of the source, or auto.
        columns: field -> the source's column.
        kinds: the source's word for an event -> ours.
        default_kind: for rows without an event; else rating where there is a value, otherwise click.
        delimiter: of CSV files; else it is found.
        items: a file that describes the items; else one beside the source.
        rating_scale: of the ratings; else it is recognised.
        rules: the limits of what is clean.
        overwrite: replace what `out` holds.
        progress: is told how far it is.
        partition_bytes: of events that are cleaned in memory at once.
        now: milliseconds since 1970, else the clock's.

    Raises:
        InputError: input that cannot be understood, a missing column, an `out` that holds files, or no event is left.
    """
    found = find_source(source, format)
    converter = Converter(kinds, default_kind)
    reader = _Reader(found.files, found.format, columns or {}, converter, delimiter, progress)
    report = IngestReport(source=str(source), format=found.format, columns=reader.columns)
    now = int(time.time() * 1000) if now is None else now
    item_file = found.items if items is None else Path(items)
    described = None
    if item_file is not None:
        described, rejected_items = read_item_file(item_file, columns)
        report.described_items, report.rejected_items = described.num_rows, dict(rejected_items)

    out = Path(out)
    created = _make_folder(out, overwrite)
    work = Path(tempfile.mkdtemp(prefix=_WORK_PREFIX, dir=out))
    try:
        partitions = _partitions(reader, work, partition_bytes)
        _clean_partitions(partitions, work / EVENTS_FILE, rules or CleaningRules(), rating_scale, now, report, progress)
        _complete(report, reader, converter)
        if described is not None:
            pq.write_table(described, work / ITEMS_FILE, compression="zstd")
        (work / REPORT_FILE).write_text(json.dumps(asdict(report), indent=2) + "\n")
        _publish(work, out)
    finally:
        shutil.rmtree(work)
        if created:
            with suppress(OSError):  # it holds the dataset
                out.rmdir()
    return report


class _Reader:
    """The source's events, converted but not cleaned, as a stream of tables of _SPILL_SCHEMA."""

    def __init__(
        self,
        files: tuple[Path, ...],
        format: str,
        columns: Mapping[str, str],
        converter: Converter,
        delimiter: str | None,
        progress: Progress,
    ) -> None:
        self.converter = converter
        self.progress = progress
        self.files = [(path, layout_of(path, format, delimiter, columns)) for path in files]
        self.matched = [match_columns(layout.names, columns, str(path)) for path, layout in self.files]
        self.columns = self.matched[0]
        self.memory = sum(memory_of(path, layout) for path, layout in self.files)
        self.size = sum(size_of(path, layout) for path, layout in self.files)
        self.position = 0
        self.read = 0
        self.rejected: Counter[str] = Counter()

    def tables(self) -> Iterator[pa.Table]:
        for (path, layout), columns in zip(self.files, self.matched, strict=True):
            malformed: Counter[str] = Counter()
            for table in read_tables(path, layout, columns, malformed, self._advance):
                try:
                    converted, rejected = self.converter.convert(table)
                except InputError as error:
                    raise InputError(f"{path}: {error}") from None
                self.read += table.num_rows
                self.rejected += rejected
                yield _spillable(converted)
            self.read += malformed.total()
            self.rejected += malformed

    def _advance(self, amount: int) -> None:
        self.position += amount
        self.progress("reading", self.position, self.size)


def _spillable(table: pa.Table) -> pa.Table:
    """Return the table with exactly the columns of _SPILL_SCHEMA, absent ones as nulls."""
    columns = [
        table[name].cast(kind) if name in table.column_names else pa.nulls(table.num_rows, kind)
        for name, kind in zip(_SPILL_SCHEMA.names, _SPILL_SCHEMA.types, strict=True)
    ]
    return pa.table(columns, schema=_SPILL_SCHEMA)


def _make_folder(out: Path, overwrite: bool) -> bool:
    """Make the folder, remove what a killed ingest left in it, and return whether it is new."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {str(out)!r} is a file; give a folder")
    created = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    for left in out.glob(f"{_WORK_PREFIX}*"):
        shutil.rmtree(left)
    if any(out.iterdir()) and not overwrite:
        raise InputError(
            f"--out {str(out)!r} is not empty; give another folder, or replace its dataset with --overwrite"
        )
    return created


def _partitions(reader: _Reader, work: Path, partition_bytes: int) -> list[Callable[[], pa.Table]]:
    """Return functions of which each loads all events of some users."""
    count = min(MOST_PARTITIONS, -(-reader.memory // partition_bytes))
    if count <= 1:
        whole = pa.concat_tables([_SPILL_SCHEMA.empty_table(), *reader.tables()])
        return [lambda: whole]
    paths = [work / f"{place:04d}.arrow" for place in range(count)]
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    writers = [pa.ipc.new_stream(str(path), _SPILL_SCHEMA, options=options) for path in paths]
    try:
        for table in _gathered(reader.tables(), partition_bytes // 8):
            partition = partition_of(table["user_id"], count)
            order = np.argsort(partition, kind="stable")  # the events of a user keep their order
            ends = np.cumsum(np.bincount(partition, minlength=count))
            table = table.take(pa.array(order))
            for writer, begin, end in zip(writers, [0, *ends[:-1]], ends, strict=True):
                if end > begin:
                    writer.write_table(table.slice(begin, end - begin).combine_chunks())
    finally:
        for writer in writers:
            writer.close()
    return [lambda path=path: _unspilled(path) for path in paths]


def _gathered(tables: Iterator[pa.Table], size: int) -> Iterator[pa.Table]:
    """Yield few large tables instead of many small ones, each of which costs every spill file a write."""
    gathered: list[pa.Table] = []
    for table in tables:
        gathered.append(table)
        if sum(part.nbytes for part in gathered) >= size:
            yield pa.concat_tables(gathered)
            gathered = []
    if gathered:
        yield pa.concat_tables(gathered)


def _unspilled(path: Path) -> pa.Table:
    """Read a spill file, and remove it."""
    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as stream:
        table = stream.read_all()
    path.unlink()
    return table


def _clean_partitions(
    partitions: list[Callable[[], pa.Table]],
    path: Path,
    rules: CleaningRules,
    scale: RatingScale | None,
    now: int,
    report: IngestReport,
    progress: Progress,
) -> None:
    """Write the clean events of all partitions to a file, and count them in the report."""
    rejected: Counter[str] = Counter()
    items: set[str] = set()
    ratings: Counter[float] = Counter()  # values
    first: list[int] = []
    last: list[int] = []
    with pq.ParquetWriter(path, EVENT_SCHEMA, compression="zstd") as writer:
        for place, load in enumerate(partitions):
            kept, broken = clean(load(), now, rules)
            rejected += broken
            if kept.num_rows:
                kept = _on_scale(kept, scale, report)
                ratings += _rating_values(kept)
                writer.write_table(kept)
                report.kept += kept.num_rows
                report.users += pc.count_distinct(kept["user_id"]).as_py()
                items.update(pc.unique(kept["item_id"]).to_pylist())
                times = pc.min_max(kept["timestamp"]).as_py()
                first.append(times["min"])
                last.append(times["max"])
            progress("cleaning", place + 1, len(partitions))
        if ratings:
            scale = scale or recognised_scale(ratings)
            report.ratings, report.rating_scale = ratings.total(), str(scale)
            report.dislikes = sum(count for value, count in ratings.items() if value < scale.dislikes_below)
        if scale is not None:
            writer.add_key_value_metadata({RATING_SCALE.decode(): str(scale)})
    report.rejected = dict(rejected)
    report.items = len(items)
    report.first_timestamp, report.last_timestamp = min(first, default=None), max(last, default=None)


def _rating_values(events: pa.Table) -> Counter[float]:
    """Count the values of ratings."""
    values = events["value"].filter(pc.and_(pc.equal(events["event"], "rating"), pc.is_valid(events["value"])))
    return rounded_counts(values.to_numpy())


def _on_scale(events: pa.Table, scale: RatingScale | None, report: IngestReport) -> pa.Table:
    """Take the values of ratings that lie beyond a given scale away, and count them in the report."""
    if scale is None or scale.worst == scale.best:
        return events
    values = events["value"]
    beyond = pc.or_(pc.less(values, scale.worst), pc.greater(values, scale.best))
    beyond = pc.fill_null(pc.and_(beyond, pc.equal(events["event"], "rating")), False)
    report.ratings_off_scale += pc.sum(beyond).as_py() or 0
    place = events.column_names.index("value")
    return events.set_column(place, events.field(place), pc.if_else(beyond, pa.scalar(None, values.type), values))


def _complete(report: IngestReport, reader: _Reader, converter: Converter) -> None:
    """Add what was read to the report.

    Raises:
        InputError: no event is left.
    """
    report.read = reader.read
    report.rejected = dict((Counter(report.rejected) + reader.rejected).most_common())
    report.time_unit = converter.time_unit
    report.unknown_kinds = dict(converter.unknown_kinds.most_common(10))
    if report.kept:
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in report.rejected.items()) or "there are none"
    columns = ", ".join(f"{field}={name}" for field, name in report.columns.items())
    hint = (
        f"; unknown kinds: {', '.join(report.unknown_kinds)}, map them with --event-kind"
        if report.unknown_kinds
        else ""
    )
    raise InputError(
        f"source {report.source!r}: none of {report.read} events could be kept ({reasons}){hint}; "
        f"read as {report.format} with {columns}: set --format or --column if that is wrong"
    )


def _publish(work: Path, out: Path) -> None:
    """Move the finished files to their names, the report last: where it is, the events are its."""
    if not (work / ITEMS_FILE).exists():
        (out / ITEMS_FILE).unlink(missing_ok=True)
    for name in (ITEMS_FILE, EVENTS_FILE, REPORT_FILE):
        if (work / name).exists():
            rename_durably(work / name, out / name)
