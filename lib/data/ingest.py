"""An ingested dataset: a folder with events.parquet, and items.parquet where the items are described.

Ingesting streams, so that a source may be larger than memory: events are spread by user over spill files, each small
enough to be cleaned in memory, because duplicates and floods need all events of a user together. A source that fits
is never spilled.
"""

# pyarrow.compute makes its functions as it is imported, so a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false

import json
import os
import shutil
import tempfile
import time
import zlib
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

from lib.data.events import EVENT_KINDS, EVENT_SCHEMA, CleaningRules, InputError, clean, conform, order_events
from lib.data.formats.columns import Converter, match_columns
from lib.data.formats.files import find_source, layout_of, parquet_file
from lib.data.formats.items import read_item_file, with_plain_strings
from lib.data.formats.tables import memory_of, read_tables, size_of

EVENTS_FILE = "events.parquet"
ITEMS_FILE = "items.parquet"
REPORT_FILE = "ingest.json"

PARTITION_BYTES = 256 << 20  # of events in memory; cleaning takes about four times as much
MOST_PARTITIONS = 512  # each is an open file
_WORK_PREFIX = ".ingest-"
# Not yet cleaned: anything may be null, and a value is narrowed to float32 only once it is known to fit.
_SPILL_SCHEMA = pa.schema([(f.name, pa.float64() if f.name == "value" else f.type) for f in EVENT_SCHEMA])

Progress = Callable[[str, int, int], None]  # stage (reading or cleaning), how much is done, of how much


@dataclass
class IngestReport:
    """What an ingest read, kept and rejected; read = kept + the sum of rejected. Times in milliseconds since 1970."""

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
    rules: CleaningRules | None = None,
    overwrite: bool = False,
    progress: Progress = lambda stage, done, total: None,
    partition_bytes: int = PARTITION_BYTES,
    now: int | None = None,
) -> IngestReport:
    """Make `out` a dataset of the events in `source`, users contiguous and each user's in time order.

    `columns` maps fields to the source's columns, `kinds` its words for events to ours; `default_kind` is for rows
    without (rating where there is a value, otherwise click). `now` is in milliseconds. What breaks a rule is counted in
    the report, which is written to ingest.json, too. Files appear under their names only when they are complete.
    Raises InputError for input that cannot be understood, a missing column, an `out` that holds files (without
    `overwrite`), or when no event is left.
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
        _clean_partitions(partitions, work / EVENTS_FILE, rules or CleaningRules(), now, report, progress)
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


def read_events(data: str | Path) -> pa.Table:
    """The events of a dataset folder (or of one events file), of EVENT_SCHEMA.

    Users are contiguous and each user's events in time order, events of equal time in the order of the file. Raises
    InputError when there is no such dataset, or a column is missing, of the wrong type, null or of an unknown kind.
    """
    path = events_file(data)
    with parquet_file(path) as file:
        # Further columns are of no use here; ingested data has none.
        table = file.read([name for name in file.schema_arrow.names if name in EVENT_SCHEMA.names])
    return order_events(checked_events(table, path))


def events_file(data: str | Path) -> Path:
    """The events file of a dataset folder, or that file itself; InputError when there is none."""
    path = _file_in(data, EVENTS_FILE)
    if path is None:
        found = "does not exist" if not Path(data).exists() else f"holds no {EVENTS_FILE}"
        raise InputError(f"data {str(data)!r} {found}; make it with 'afterclick ingest --source PATH --out {data}'")
    return path


def checked_events(table: pa.Table, path: Path) -> pa.Table:
    """Events read from a file, of EVENT_SCHEMA, in their order.

    Raises InputError when a column is missing, of the wrong type, null or of an unknown kind.
    """
    try:
        table = conform(table)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    for column in EVENT_SCHEMA:
        if not column.nullable and table[column.name].null_count:
            count = table[column.name].null_count
            raise InputError(f"{path}: column {column.name!r} is null in {count} rows; ingest the data to clean it")
    unknown = sorted(set(pc.unique(table["event"]).to_pylist()) - set(EVENT_KINDS))
    if unknown:
        raise InputError(f"{path}: unknown event {unknown[0]!r}; ingest the data with --event-kind {unknown[0]}=KIND")
    return table.cast(EVENT_SCHEMA)


def write_dataset(folder: Path, events: pa.Table, items: pa.Table | None) -> None:
    """Write tables as an ingested dataset; the folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(events, folder / EVENTS_FILE)
    if items is not None:
        pq.write_table(items, folder / ITEMS_FILE)


def read_items(data: str | Path) -> pa.Table | None:
    """The item table of a dataset folder, or None where it has none: item_id (string, unique) and any other columns.

    Raises InputError when the file is not a table of items with an id each.
    """
    path = _file_in(data, ITEMS_FILE) if Path(data).is_dir() else None
    if path is None:
        return None
    with parquet_file(path) as file:
        table = with_plain_strings(file.read())
    if "item_id" not in table.column_names or table["item_id"].type != pa.string():
        raise InputError(f"{path}: it needs a column 'item_id' of strings; found {', '.join(table.column_names)}")
    if table["item_id"].null_count:
        raise InputError(f"{path}: column 'item_id' is null in {table['item_id'].null_count} rows; remove them")
    counts = pc.value_counts(table["item_id"])
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        raise InputError(
            f"{path}: item_id {repeated[0]['values'].as_py()!r} is there more than once; ids must be unique"
        )
    return table


def _file_in(data: str | Path, name: str) -> Path | None:
    path = Path(data)
    path = path / name if path.is_dir() else path
    return path if path.is_file() else None


# ---------------------------------------------------------------------------------------------------------------------
# Ingesting, from source to folder


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
    columns = [
        table[name].cast(kind) if name in table.column_names else pa.nulls(table.num_rows, kind)
        for name, kind in zip(_SPILL_SCHEMA.names, _SPILL_SCHEMA.types, strict=True)
    ]
    return pa.table(columns, schema=_SPILL_SCHEMA)


def _make_folder(out: Path, overwrite: bool) -> bool:
    # Whether it had to be made. What a killed ingest left behind is removed.
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
    # Each loads all events of some users.
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
    # Few large tables instead of many small ones, each of which costs every spill file a write.
    gathered: list[pa.Table] = []
    for table in tables:
        gathered.append(table)
        if sum(part.nbytes for part in gathered) >= size:
            yield pa.concat_tables(gathered)
            gathered = []
    if gathered:
        yield pa.concat_tables(gathered)


def partition_of(users: pa.ChunkedArray, count: int) -> np.ndarray:
    """(E,) which of `count` partitions each event is in: all of a user's in one, the same in every process."""
    encoded = pc.dictionary_encode(pc.fill_null(users, "")).combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):  # what combine_chunks makes of no chunks
        return np.zeros(0, dtype=np.int64)
    partition = np.array([zlib.crc32(user.encode()) % count for user in encoded.dictionary.to_pylist()], dtype=np.int64)
    return partition[encoded.indices.to_numpy()]


def _unspilled(path: Path) -> pa.Table:
    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as stream:
        table = stream.read_all()
    path.unlink()
    return table


def _clean_partitions(
    partitions: list[Callable[[], pa.Table]],
    path: Path,
    rules: CleaningRules,
    now: int,
    report: IngestReport,
    progress: Progress,
) -> None:
    rejected: Counter[str] = Counter()
    items: set[str] = set()
    first: list[int] = []
    last: list[int] = []
    with pq.ParquetWriter(path, EVENT_SCHEMA, compression="zstd") as writer:
        for place, load in enumerate(partitions):
            kept, broken = clean(load(), now, rules)
            rejected += broken
            if kept.num_rows:
                writer.write_table(kept)
                report.kept += kept.num_rows
                report.users += pc.count_distinct(kept["user_id"]).as_py()
                items.update(pc.unique(kept["item_id"]).to_pylist())
                times = pc.min_max(kept["timestamp"]).as_py()
                first.append(times["min"])
                last.append(times["max"])
            progress("cleaning", place + 1, len(partitions))
    report.rejected = dict(rejected)
    report.items = len(items)
    report.first_timestamp, report.last_timestamp = min(first, default=None), max(last, default=None)


def _complete(report: IngestReport, reader: _Reader, converter: Converter) -> None:
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
    # The report comes last: where it is, the events belong to it.
    if not (work / ITEMS_FILE).exists():
        (out / ITEMS_FILE).unlink(missing_ok=True)
    for name in (ITEMS_FILE, EVENTS_FILE, REPORT_FILE):
        if (work / name).exists():
            os.replace(work / name, out / name)
