"""Item files of any format to one table: item_id, unique, and any other columns.

MovieLens puts the year into the title and bars between genres; both become columns of plain words (title, release_year,
genres), as in RecBole's edition of the same data.
"""

# pyarrow.compute makes its functions as it is imported, so a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from lib.data.formats.columns import ALIASES, find_column
from lib.data.formats.files import COMPRESSED, Layout, SourceBytes, layout_of, parquet_file
from lib.data.formats.tables import read_lines, read_tables
from lib.data.tables import broken_ids
from lib.errors import InputError

_MOVIELENS_GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
_RECBOLE_NAMES = {"movie_title": "title", "class": "genres", "genre": "genres"}
_TITLE = r"^(?P<title>.*?)\s*\((?P<year>\d{4})\)\s*$"


def read_item_file(path: str | Path, columns: Mapping[str, str] | None = None) -> tuple[pa.Table, Counter[str]]:
    """Read the items of a file in any format but sequences; return them and the number of rejected rows by reason.

    `columns` may map item_id to the column that holds it. The first row of an item stays, later ones are duplicates.

    Raises:
        InputError: the file is missing, or no column holds the ids.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"items {str(path)!r} is no file; give a CSV, JSON lines or Parquet file with --items")
    rejected: Counter[str] = Counter()
    name = path.with_suffix("").name if path.suffix in COMPRESSED else path.name
    if name == "u.item":
        return _unique(_movielens_100k(path, rejected), rejected)
    if name == "movies.dat":
        layout = Layout("delimited", ("item_id", "title", "genres"), "::", encoding="latin-1")
        return _unique(_with_years(_read(path, layout, rejected)), rejected)
    if name.endswith(".item"):
        return _unique(_recbole(path, rejected), rejected)
    if name.lower().endswith((".parquet", ".pq")) or _is_parquet(path):
        with parquet_file(path) as file:
            table = _named(with_plain_strings(file.read()), path, columns)
        return _unique(table, rejected)
    if name.lower().endswith((".jsonl", ".ndjson", ".json")):
        return _unique(_named(_json_items(path, rejected), path, columns), rejected)
    table = _named(_with_numbers(_read(path, layout_of(path, "csv"), rejected)), path, columns)
    return _unique(_with_years(table) if name == "movies.csv" else table, rejected)


def with_plain_strings(table: pa.Table) -> pa.Table:
    """Cast columns of large_string, string_view and dictionaries of strings to plain strings."""
    for place, field in enumerate(table.schema):
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
            table = table.set_column(place, field.name, table[field.name].cast(pa.string()))
    return table.replace_schema_metadata(None)


def _is_parquet(path: Path) -> bool:
    with SourceBytes(path) as stream:
        return stream.read(4) == b"PAR1"


def _read(path: Path, layout: Layout, rejected: Counter[str]) -> pa.Table:
    if len(set(layout.names)) < len(layout.names):
        repeated = next(name for name in layout.names if layout.names.count(name) > 1)
        raise InputError(f"{path}: column {repeated!r} is there more than once; name the columns differently")
    columns = {name: name for name in layout.names}
    return pa.concat_tables(read_tables(path, layout, columns, rejected, lambda _: None)).combine_chunks()


def _json_items(path: Path, rejected: Counter[str]) -> pa.Table:
    """Read JSON lines; values keep their types, lists included, but a column of several types becomes text."""
    rows: list[dict[str, object]] = []
    for lines in read_lines(path, "utf-8", rejected, lambda _: None):
        for line in lines:
            try:
                fields = orjson.loads(line)
            except orjson.JSONDecodeError:
                fields = None
            if isinstance(fields, dict):
                rows.append(fields)
            else:
                rejected["malformed_line"] += 1
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: _json_column([row.get(name) for row in rows]) for name in names})


def _json_column(values: list[object]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        texts = [value if value is None or isinstance(value, str) else orjson.dumps(value).decode() for value in values]
        return pa.array(texts, pa.string())


def _named(table: pa.Table, path: Path, columns: Mapping[str, str] | None) -> pa.Table:
    """Make the column of ids the first one, item_id, of strings."""
    explicit = (columns or {}).get("item_id")
    name = explicit if explicit in table.column_names else None
    name = name or find_column(table.column_names, (*ALIASES["item_id"], "id"))
    if name is None:
        found = ", ".join(table.column_names) or "none"
        raise InputError(f"{path}: no column for 'item_id' found among {found}; name it with --column item_id=NAME")
    kind = table[name].type
    if not (pa.types.is_string(kind) or pa.types.is_integer(kind)):
        raise InputError(f"{path}: column {name!r} has type {kind}; item ids must be text or whole numbers")
    others = [other for other in table.column_names if other not in (name, "item_id")]
    named = {"item_id": table[name].cast(pa.string()), **{other: table[other] for other in others}}
    return pa.table(named)


def _unique(table: pa.Table, rejected: Counter[str]) -> tuple[pa.Table, Counter[str]]:
    """Keep the first row of each item; count the others, and rows without a valid id."""
    ids = table["item_id"]
    kept = np.ones(table.num_rows, dtype=bool)
    for reason, mask in (("missing_field", pc.is_null(ids)), *broken_ids(ids)):
        rows = pc.fill_null(mask, False).to_numpy(zero_copy_only=False).astype(bool) & kept
        if rows.any():
            rejected[reason] += int(rows.sum())
            kept &= ~rows
    table = table.filter(pa.array(kept))
    codes = pc.dictionary_encode(table["item_id"]).combine_chunks()
    first = np.unique(codes.indices.to_numpy(), return_index=True)[1] if table.num_rows else np.zeros(0, dtype=np.int64)
    if len(first) < table.num_rows:
        rejected["duplicate"] += table.num_rows - len(first)
        table = table.take(pa.array(np.sort(first)))
    return table, rejected


def _movielens_100k(path: Path, rejected: Counter[str]) -> pa.Table:
    names = ("item_id", "title", "released", "video_released", "address", *_MOVIELENS_GENRES)
    table = _read(path, Layout("delimited", names, "|", encoding="latin-1"), rejected)
    flags = [table[genre].to_pylist() for genre in _MOVIELENS_GENRES]
    genres = [
        " ".join(genre for genre, flag in zip(_MOVIELENS_GENRES, row, strict=True) if flag == "1")
        for row in zip(*flags, strict=True)
    ]
    return _with_years(table.select(["item_id", "title"]).append_column("genres", pa.array(genres, pa.string())))


def _with_years(table: pa.Table) -> pa.Table:
    """Split "Toy Story (1995)" into title and release_year, and make "Comedy|Drama" "Comedy Drama"."""
    parts = pc.extract_regex(table["title"], _TITLE).combine_chunks()
    parts = parts.chunk(0) if isinstance(parts, pa.ChunkedArray) and parts.num_chunks else parts
    if not table.num_rows:
        return table
    years = pc.struct_field(parts, "year")
    titles = pc.coalesce(pc.struct_field(parts, "title"), table["title"])
    genres = pc.replace_substring(table["genres"], "|", " ")
    others = {name: table[name] for name in table.column_names if name not in ("item_id", "title", "genres")}
    return pa.table({"item_id": table["item_id"], "title": titles, "release_year": years, "genres": genres, **others})


def _recbole(path: Path, rejected: Counter[str]) -> pa.Table:
    layout = layout_of(path, "recbole")
    with SourceBytes(path) as stream:
        header = stream.read(1 << 16).decode("utf-8-sig", "replace").splitlines()[0]
    types = [name.partition(":")[2] for name in header.split("\t")]
    table = _read(path, layout, rejected)
    for place, (name, kind) in enumerate(zip(layout.names, types, strict=True)):
        if kind == "float":
            table = table.set_column(place, name, _as_numbers(table[name]))
    renamed = [
        _RECBOLE_NAMES[name] if name in _RECBOLE_NAMES and _RECBOLE_NAMES[name] not in layout.names else name
        for name in layout.names
    ]
    return _named(table.rename_columns(renamed), path, None)


def _with_numbers(table: pa.Table) -> pa.Table:
    """Convert columns of which every value is a number; ids, and codes that begin with a zero, stay text."""
    for place, name in enumerate(table.column_names):
        column = table[name]
        if (
            find_column([name], (*ALIASES["item_id"], "id"))
            or pc.any(pc.match_substring_regex(column, r"^0\d")).as_py()
        ):
            continue
        table = table.set_column(place, name, _as_numbers(column))
    return table


def _as_numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    present = pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)
    if present.null_count == len(present):
        return present
    for kind in (pa.int64(), pa.float64()):
        try:
            return present.cast(kind)
        except pa.ArrowInvalid:
            continue
    return present
