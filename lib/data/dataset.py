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

from lib.data.events import InputError, order_events
from lib.data.formats.files import parquet_file
from lib.data.ingest import checked_events

COLUMNS = ["user_id", "item_id", "event", "value", "timestamp"]  # what training reads
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
    """A piece's events in the file's order: COLUMNS and `position` (int64), the row of the file.

    Raises:
        InputError: a column is missing, of the wrong type, null or of an unknown kind.
    """
    # without pre_buffer a row group larger than memory can be read in part
    with pq.ParquetFile(path, pre_buffer=False) as file:
        names = [name for name in file.schema_arrow.names if name in COLUMNS]
        parts = [*_rows(file, names, piece)]
        table = pa.Table.from_batches(parts, pa.schema([file.schema_arrow.field(name) for name in names]))
    table = checked_events(table, path).select(COLUMNS)
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
