"""An ingested dataset: a folder with events.parquet, and items.parquet where the items are described."""

# pyarrow.compute makes its functions as it is imported, so a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lib.events import EVENT_KINDS, EVENT_SCHEMA, InputError, conform, order_events

EVENTS_FILE = "events.parquet"
ITEMS_FILE = "items.parquet"


def read_events(data: str | Path) -> pa.Table:
    """The events of a dataset folder (or of one events file), of EVENT_SCHEMA.

    Users are contiguous and each user's events in time order, events of equal time in the order of the file. Raises
    InputError when there is no such dataset, or a column is missing, of the wrong type, null or of an unknown kind.
    """
    path = _file_in(data, EVENTS_FILE)
    if path is None:
        found = "does not exist" if not Path(data).exists() else f"holds no {EVENTS_FILE}"
        raise InputError(f"data {str(data)!r} {found}; make it with 'afterclick ingest --source PATH --out {data}'")
    table = _read_parquet(path)
    try:
        # Further columns are of no use here; ingested data has none.
        table = conform(table.select([name for name in table.column_names if name in EVENT_SCHEMA.names]))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    for field in EVENT_SCHEMA:
        if not field.nullable and table[field.name].null_count:
            count = table[field.name].null_count
            raise InputError(f"{path}: column {field.name!r} is null in {count} rows; ingest the data to clean it")
    unknown = sorted(set(pc.unique(table["event"]).to_pylist()) - set(EVENT_KINDS))
    if unknown:
        raise InputError(f"{path}: unknown event {unknown[0]!r}; ingest the data with --event-kind {unknown[0]}=KIND")
    return order_events(table.cast(EVENT_SCHEMA))


def read_items(data: str | Path) -> pa.Table | None:
    """The item table of a dataset folder, or None where it has none: item_id (string, unique) and any other columns.

    Raises InputError when the file is not a table of items with an id each.
    """
    path = _file_in(data, ITEMS_FILE) if Path(data).is_dir() else None
    if path is None:
        return None
    table = with_plain_strings(_read_parquet(path))
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


def with_plain_strings(table: pa.Table) -> pa.Table:
    """The table with large_string, string_view and dictionary-of-string columns as plain strings."""
    for place, field in enumerate(table.schema):
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if field.type != pa.string() and (
            pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        ):
            table = table.set_column(place, field.name, table[field.name].cast(pa.string()))
    return table.replace_schema_metadata(None)


def _file_in(data: str | Path, name: str) -> Path | None:
    path = Path(data)
    path = path / name if path.is_dir() else path
    return path if path.is_file() else None


def _read_parquet(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, partitioning=None)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}") from None
