"""The format of a file or folder of events, and the layout by which each file is read.

- The format is told by content where content is clear, otherwise by names; it is never guessed.
- MovieLens and RecBole are delimited text, the one with known columns, the other with typed names.
- Any text file may be compressed (.gz, .bz2, .zst, .lz4).
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from lib.data.formats.columns import ALIASES, find_column
from lib.errors import InputError

FORMATS = ("csv", "jsonl", "parquet", "movielens", "recbole", "sequences")

_SUFFIXES = {
    "csv": (".csv", ".tsv"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet", ".pq"),
    "recbole": (".inter",),
    "sequences": (".txt",),
}
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}
_EVENT_STEMS = ("events", "interactions", "ratings", "clicks", "transactions")
_NO_DATA_STEMS = ("readme", "license", "licence", "changelog", "requirements")
_ITEM_STEMS = ("items", "movies", "products", "catalog")
_MOVIELENS_NAMES = ("user_id", "item_id", "rating", "timestamp")


@dataclass(frozen=True)
class Source:
    """Where the events and, if they are described, the items are."""

    format: str
    files: tuple[Path, ...]
    items: Path | None = None


@dataclass(frozen=True)
class Layout:
    """How to read one file."""

    kind: str  # delimited, jsonl, parquet or sequences
    names: tuple[str, ...]  # of the columns
    delimiter: str | None = None
    header: bool = False  # whether the first line holds the names
    quoted: bool = False
    encoding: str = "utf-8"


# ---------------------------------------------------------------------------------------------------------------------
# Format


def find_source(path: str | Path, format: str = "auto") -> Source:
    """Find the event files, and the item file, of a file or folder.

    Raises:
        InputError: it does not exist, or its event files or their format cannot be told.
    """
    path = Path(path)
    if format != "auto" and format not in FORMATS:
        raise InputError(f"--format {format}: it must be auto or one of {', '.join(FORMATS)}")
    if not path.exists():
        raise InputError(f"source {str(path)!r} does not exist; give an existing file or folder with --source")
    if path.is_file():
        return Source(_file_format(path) if format == "auto" else format, (path,))
    files = [file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith(".")]
    found = {name: _event_files(files, name) for name in (FORMATS if format == "auto" else (format,))}
    found = {name: events for name, events in found.items() if events}
    names = ", ".join(file.name for file in files[:20]) or "nothing"
    if not found:
        raise InputError(f"source {str(path)!r}: no event file recognised among {names}; give the file with --source")
    chosen = next((name for name in ("movielens", "recbole") if name in found), None)
    # text files count as sequences only where there is nothing else: a README is a text file, too
    if chosen is None and len(found) > 1:
        found.pop("sequences", None)
    if chosen is None and len(found) > 1:
        named = {name: events for name, events in found.items() if _stem(events[0]) in _EVENT_STEMS}
        found = named or found
    if chosen is None and len(found) > 1:
        kinds = " and ".join(found)
        raise InputError(f"source {str(path)!r} holds {kinds} files; choose with --format, or give one file")
    chosen = chosen or next(iter(found))
    return Source(chosen, tuple(found[chosen]), _item_file(files, chosen))


def _event_files(files: Sequence[Path], format: str) -> list[Path]:
    by_name = {file.name: file for file in files}
    if format == "movielens":
        if "ratings.csv" in by_name and "movies.csv" in by_name:
            return [by_name["ratings.csv"]]
        return [by_name[name] for name in ("u.data", "ratings.dat") if name in by_name][:1]
    suited = [
        file
        for file in files
        if _suffix(file) in _SUFFIXES[format] and _stem(file) not in (*_ITEM_STEMS, *_NO_DATA_STEMS)
    ]
    if format == "jsonl":
        suited = [file for file in suited if _suffix(file) != ".json" or _file_format(file, certain=False) == "jsonl"]
    if format == "sequences":
        suited = [file for file in suited if _file_format(file, certain=False) == "sequences"]
    named = [file for file in suited if _stem(file) in _EVENT_STEMS]
    return named or suited


def _item_file(files: Sequence[Path], format: str) -> Path | None:
    if format == "movielens":
        return next((file for file in files if file.name in ("u.item", "movies.dat", "movies.csv")), None)
    if format == "recbole":
        return next((file for file in files if file.suffix == ".item"), None)
    suffixes = [*_SUFFIXES["parquet"], *_SUFFIXES["csv"], *_SUFFIXES["jsonl"]]
    return next((file for file in files if _stem(file) in _ITEM_STEMS and _suffix(file) in suffixes), None)


def _plain_name(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in COMPRESSED else path


def _suffix(path: Path) -> str:
    return _plain_name(path).suffix.lower()


def _stem(path: Path) -> str:
    return _plain_name(path).stem.lower()


def _file_format(path: Path, certain: bool = True) -> str:
    """Tell a file's format; where it cannot be told raise InputError, or return "" if it need not be certain."""
    name = _plain_name(path).name
    start = _start_of(path)
    if start.startswith(b"PAR1"):
        return "parquet"
    if name in ("u.data", "ratings.dat"):
        return "movielens"
    lines = [line for line in start.decode("utf-8-sig", "replace").splitlines() if line.strip()]
    if lines and "\x00" not in lines[0]:
        if lines[0].lstrip().startswith("{") and "}" in lines[0]:
            return "jsonl"
        if ":token" in lines[0]:
            return "recbole"
        if _suffix(path) in _SUFFIXES["csv"] or _known_header(lines[0]):
            return "csv"
        widths = [len(line.split()) for line in lines]
        named = _suffix(path) in _SUFFIXES["sequences"] or len(set(widths)) > 1
        mostly = sum(width > 1 for width in widths) > len(widths) / 2
        if named and mostly and max(widths) > 2 and not any(mark in start for mark in b",;|"):
            return "sequences"
    if not certain:
        return ""
    if not lines:
        raise InputError(f"source {str(path)!r} is empty; give a file with events")
    raise InputError(
        f"source {str(path)!r}: cannot tell its format from {lines[0][:60]!r}; choose with --format {'|'.join(FORMATS)}"
    )


def _known_header(line: str) -> bool:
    for delimiter in (",", "\t", ";", "|"):
        names = [name.strip(' "') for name in line.split(delimiter)]
        if find_column(names, ALIASES["user_id"]) and find_column(names, ALIASES["item_id"]):
            return True
    return False


def _start_of(path: Path) -> bytes:
    with SourceBytes(path) as stream:
        start = stream.read(1 << 16)
    complete = start.rfind(b"\n")
    return start[: complete + 1] if len(start) == 1 << 16 and complete > 0 else start


# ---------------------------------------------------------------------------------------------------------------------
# Layout


def layout_of(
    path: Path, format: str, delimiter: str | None = None, columns: Mapping[str, str] | None = None
) -> Layout:
    """Tell how to read one file of the source.

    A delimited file whose `columns` are all numbers (0 is the first) has no header.

    Raises:
        InputError: the file is empty or damaged, or its delimiter cannot be told.
    """
    if format == "parquet":
        with parquet_file(path) as file:
            return Layout("parquet", tuple(file.schema_arrow.names))
    if format == "jsonl":
        return Layout("jsonl", _json_names(path))
    if format == "sequences":
        return Layout("sequences", ("user_id", "item_id", "timestamp"), delimiter)
    name = _plain_name(path).name
    if name == "u.data":
        return Layout("delimited", _MOVIELENS_NAMES, delimiter or "\t", encoding="latin-1")
    if name == "ratings.dat":
        return Layout("delimited", _MOVIELENS_NAMES, delimiter or "::", encoding="latin-1")
    lines = [line for line in _start_of(path).decode("utf-8-sig", "replace").splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{path} is empty; give a file with a header and events")
    if format == "recbole":
        names = tuple(name.split(":")[0] for name in lines[0].split(delimiter or "\t"))
        return Layout("delimited", names, delimiter or "\t", header=True)
    delimiter = delimiter or _delimiter_of(lines[:50], path)
    rows = [lines[0].split(delimiter)] if len(delimiter) > 1 else list(csv.reader(lines[:1], delimiter=delimiter))
    names = tuple(name.strip() for name in rows[0])
    numbered = tuple(str(place) for place in range(len(names)))
    if columns and names != numbered and set(columns.values()) <= set(numbered):
        return Layout("delimited", numbered, delimiter, quoted=True)
    return Layout("delimited", names, delimiter, header=True, quoted=True)


def _delimiter_of(lines: Sequence[str], path: Path) -> str:
    """Choose the delimiter by which most lines have as many columns as the first; among equals, most columns."""
    best, delimiter = (0.0, 1), None
    for candidate in ("::", ",", "\t", ";", "|"):
        if len(candidate) > 1:
            widths = [len(line.split(candidate)) for line in lines]
        else:
            widths = [len(row) for row in csv.reader(lines, delimiter=candidate)] or [1]
        score = (sum(width == widths[0] for width in widths) / len(widths), widths[0])
        if widths[0] > 1 and score > best:
            best, delimiter = score, candidate
    if delimiter is None:
        raise InputError(f"{path}: cannot tell the delimiter of {lines[0][:60]!r}; give it with --delimiter")
    return delimiter


def _json_names(path: Path) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for line in _start_of(path).splitlines():
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue  # counted when the line is read
        if isinstance(row, dict):
            names.update(dict.fromkeys(row))
    if not names:
        raise InputError(f"{path}: no JSON object in its first lines; it must hold one object a line, not an array")
    return tuple(names)


# ---------------------------------------------------------------------------------------------------------------------
# Opening


def parquet_file(path: Path) -> pq.ParquetFile:
    """Open a Parquet file.

    Raises:
        InputError: it is no Parquet file.
    """
    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}") from None


class SourceBytes:
    """The bytes of a file, decompressed as its suffix says."""

    def __init__(self, path: Path) -> None:
        self._file = pa.OSFile(str(path))
        codec = COMPRESSED.get(path.suffix)
        self._stream = pa.CompressedInputStream(self._file, codec) if codec else self._file

    def __enter__(self) -> "SourceBytes":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()
        self._file.close()

    def read(self, size: int) -> bytes:
        """Return the next bytes, at most `size`; none at the end."""
        return self._stream.read(size)

    @property
    def read_so_far(self) -> int:
        """The number of bytes read from the disk."""
        return self._file.tell()
