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

from lib.data.dataset import checked_events
from lib.data.events import HISTORY_FIELDS
from lib.data.formats.files import parquet_file
from lib.data.tables import order_events
from lib.errors import InputError

READ_ROWS = 1 << 17  # of a row group that are in memory at once
MERGE_ROWS = 1 << 20  # of first uses that wait to be merged


@dataclass(frozen=True)
class Piece:
    """The rows [start, stop) of an events file."""

    start: int
    stop: int


@dataclass
class Survey:
    """What one piece or a whole file holds."""

    events: int
    values: int  # events that have one
    oldest: int  # time in milliseconds
    newest: int
    first_uses: pa.Table  # item_id, user_id, timestamp, position: see `first_uses`
    objection: str | None = None  # why it cannot be trained on; the other fields mean nothing then


def pieces_of(path: Path, most: int) -> list[Piece]:
    """Cut an events file into pieces of at most `most` rows, between row groups where these are small enough.

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
    """Return a piece's events in the file's order: HISTORY_FIELDS and `position` (int64), the row of the file.

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


def first_uses(events: pa.Table) -> pa.Table:
    """Return the first event of each item, by user, time and position: the order of items in read_events."""
    events = order_events(events.select(["item_id", "user_id", "timestamp", "position"]).sort_by("position"))
    items = pc.dictionary_encode(events["item_id"]).combine_chunks()
    _, first = np.unique(items.indices.to_numpy(), return_index=True)
    return events.take(pa.array(np.sort(first)))


def survey(path: Path, piece: Piece) -> Survey:
    """Return what a piece holds; bad input is its objection, not raised, so that the first of many pieces is blamed."""
    try:
        events = read_piece(path, piece)
    except InputError as error:
        return Survey(0, 0, 0, 0, pa.table({}), str(error))
    times = pc.min_max(events["timestamp"]).as_py()
    values = len(events) - events["value"].null_count - int(pc.sum(pc.is_nan(events["value"])).as_py() or 0)
    return Survey(len(events), values, times["min"], times["max"], first_uses(events))


def merged(surveys: Iterable[Survey]) -> Survey:
    """Return what all pieces together hold.

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


def _rows(file: pq.ParquetFile, names: list[str], piece: Piece) -> Iterator[pa.RecordBatch]:
    """Yield a piece's rows, a batch in memory at a time."""
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
