"""An ingested dataset: a folder with events.parquet, and items.parquet where the items are described."""

# pyarrow.compute makes its functions as it is imported, so a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lib.data.events import EVENT_KINDS, EVENT_SCHEMA
from lib.data.formats.files import parquet_file
from lib.data.formats.items import with_plain_strings
from lib.data.ratings import STARS, RatingScale
from lib.data.tables import conform, order_events
from lib.errors import InputError

EVENTS_FILE = "events.parquet"
ITEMS_FILE = "items.parquet"
RATING_SCALE = b"rating_scale"  # among the metadata of the events file


def read_events(data: str | Path) -> pa.Table:
    """Return the events of a dataset folder, or of one events file, of EVENT_SCHEMA.

    Users are contiguous and each user's events in time order, events of equal time in the order of the file.

    Raises:
        InputError: there is no such dataset, or a column is missing, of the wrong type, null or of an unknown kind.
    """
    path = events_file(data)
    with parquet_file(path) as file:
        # Further columns are of no use here; ingested data has none.
        table = file.read([name for name in file.schema_arrow.names if name in EVENT_SCHEMA.names])
    return order_events(checked_events(table, path))


def read_rating_scale(data: str | Path) -> RatingScale:
    """Return the scale of a dataset's ratings; 1 to 5 where the dataset does not say.

    Raises:
        InputError: there is no such dataset, or its scale is none.
    """
    with parquet_file(events_file(data)) as file:
        text = (file.metadata.metadata or {}).get(RATING_SCALE)
    return STARS if text is None else RatingScale.parse(text.decode())


def check_rating_scale(data: str | Path, of_model: RatingScale) -> None:
    """Refuse a dataset whose ratings have another scale than a model's: likes would be taken for dislikes.

    Raises:
        InputError: they have, or there is no such dataset.
    """
    scale = read_rating_scale(data)
    if scale == of_model:
        return
    with parquet_file(events_file(data)) as file:
        kinds = (batch.column("event") for batch in file.iter_batches(columns=["event"]))
        if not any("rating" in kind.unique().to_pylist() for kind in kinds):
            return
    raise InputError(
        f"data: the ratings of {data} are on the scale {scale}, and those of the model on {of_model}; ingest the data "
        f"with --rating-scale {of_model} if that is theirs, or pretrain a model on them"
    )


def events_file(data: str | Path) -> Path:
    """Return the events file of a dataset folder, or that file itself.

    Raises:
        InputError: there is none.
    """
    path = _file_in(data, EVENTS_FILE)
    if path is None:
        found = "does not exist" if not Path(data).exists() else f"holds no {EVENTS_FILE}"
        raise InputError(f"data {str(data)!r} {found}; make it with 'afterclick ingest --source PATH --out {data}'")
    return path


def read_items(data: str | Path) -> pa.Table | None:
    """Return the item table of a dataset folder: item_id (string, unique) and any other columns.

    Returns:
        The table; None where the folder has none.

    Raises:
        InputError: the file is not a table of items with an id each.
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


def checked_events(table: pa.Table, path: Path) -> pa.Table:
    """Return events that were read from a file as a table of EVENT_SCHEMA, in their order.

    Raises:
        InputError: a column is missing, of the wrong type, null or of an unknown kind.
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


def write_dataset(folder: Path, events: pa.Table, items: pa.Table | None, ratings: RatingScale = STARS) -> None:
    """Write tables as an ingested dataset; make the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(events.replace_schema_metadata({RATING_SCALE: str(ratings)}), folder / EVENTS_FILE)
    if items is not None:
        pq.write_table(items, folder / ITEMS_FILE)


def _file_in(data: str | Path, name: str) -> Path | None:
    path = Path(data)
    path = path / name if path.is_dir() else path
    return path if path.is_file() else None
