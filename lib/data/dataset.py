"""An events file in pieces, for datasets that are larger than memory: what one reader holds of it at a time.

A piece is a run of rows of the file. Its events carry their place in the file, because whoever puts the events of a
user together again needs the order of those with equal times.
"""

# pyarrow.compute makes its functions as it is imported, so a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lib.data.events import EVENT_KINDS, EVENT_SCHEMA, HISTORY_FIELDS
from lib.data.formats.files import parquet_file
from lib.data.formats.items import with_plain_strings
from lib.data.tables import conform, order_events
from lib.errors import InputError

READ_ROWS = 1 << 17
MERGE_ROWS = 1 << 20  # of first uses that wait to be merged


@dataclass(frozen=True)
class Piece:
    """The rows [start, stop) of an events file."""

    start: int
    stop: int


@dataclass
class Survey:
    """What one piece or a whole file holds; times in milliseconds."""

    events: int
    values: int  # events that have one
    oldest: int
    newest: int
    first_uses: pa.Table  # item_id, user_id, timestamp, position: see `first_uses`
    objection: str | None = None  # why it cannot be trained on; all else has no meaning then


def pieces_of(path: Path, most: int) -> list[Piece]:
    """All rows of an events file in pieces of at most `most`, cut between row groups where these are small enough.

    Raises:
        InputError: it is no Parquet file, or empty.
    """
    with parquet_file(path) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    pieces: list[Piece] = []
    start = stop = 0  # of the piece that is being gathered
    for size in sizes:
        if stop + size - start > most and stop > start:
            pieces.append(Piece(start, stop))
            start = stop
        stop += size
        while stop - start > most:
            pieces.append(Piece(start, start + most))
            start += most
    if stop > start:
        pieces.append(Piece(start, stop))
    if not pieces:
        raise InputError(f"{path}: it has no events; ingest some")
    return pieces


def read_piece(path: Path, piece: Piece) -> pa.Table:
    """A piece's events in the file's order: HISTORY_FIELDS and `position` (int64), the row of the file.

    Raises:
        InputError: a column is missing, of the wrong type, null or of an unknown kind.
    """
    # without pre_buffer a row group larger than memory can be read in part
    with pq.ParquetFile(path, pre_buffer=False) as file:
        names = [name for name in file.schema_arrow.names if name in HISTORY_FIELDS]
        parts = [*_rows(file, names, piece)]
        table = pa.Table.from_batches(parts, pa.schema([file.schema_arrow.field(name) for name in names]))
    table = checked_events(table, path).select(HISTORY_FIELDS)
    return table.append_column("position", pa.array(np.arange(piece.start, piece.stop)))


def _rows(file: pq.ParquetFile, names: list[str], piece: Piece) -> Iterator[pa.RecordBatch]:
    begin = 0
    for group in range(file.metadata.num_row_groups):
        end = begin + file.metadata.row_group(group).num_rows
        if end > piece.start and begin < piece.stop:
            place = begin
            for batch in file.iter_batches(READ_ROWS, [group], names):
                low, high = max(piece.start - place, 0), min(piece.stop - place, batch.num_rows)
                if high > low:
                    yield batch.slice(low, high - low)
                place += batch.num_rows
                if place >= piece.stop:
                    return
        begin = end


def first_uses(events: pa.Table) -> pa.Table:
    """The first event of each item, by user, time and position: in this order read_events shows items first."""
    events = order_events(events.select(["item_id", "user_id", "timestamp", "position"]).sort_by("position"))
    items = pc.dictionary_encode(events["item_id"]).combine_chunks()
    _, first = np.unique(items.indices.to_numpy(), return_index=True)
    return events.take(pa.array(np.sort(first)))


def survey(path: Path, piece: Piece) -> Survey:
    """What a piece holds; bad input is told, not raised, so that of many pieces the first can be blamed."""
    try:
        events = read_piece(path, piece)
    except InputError as error:
        return Survey(0, 0, 0, 0, pa.table({}), str(error))
    times = pc.min_max(events["timestamp"]).as_py()
    values = len(events) - events["value"].null_count - int(pc.sum(pc.is_nan(events["value"])).as_py() or 0)
    return Survey(len(events), values, times["min"], times["max"], first_uses(events))


def merged(surveys: Iterable[Survey]) -> Survey:
    """What all pieces together hold.

    Raises:
        InputError: a piece cannot be trained on.
    """
    whole: Survey | None = None
    waiting: list[pa.Table] = []
    for part in surveys:
        if part.objection is not None:
            raise InputError(part.objection)
        waiting.append(part.first_uses)
        if whole is None:
            whole = part
            continue
        whole.events += part.events
        whole.values += part.values
        whole.oldest, whole.newest = min(whole.oldest, part.oldest), max(whole.newest, part.newest)
        # as many as are there already, so that each is sorted but a few times
        if sum(len(table) for table in waiting[1:]) > max(len(waiting[0]), MERGE_ROWS):
            waiting = [first_uses(pa.concat_tables(waiting))]
    assert whole is not None, "a file has at least one piece"
    whole.first_uses = first_uses(pa.concat_tables(waiting))
    return whole


EVENTS_FILE = "events.parquet"
ITEMS_FILE = "items.parquet"


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
