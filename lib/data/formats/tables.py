"""Source files as streams of tables of a few megabytes, so that no file is too large.

A line that cannot be read is counted as malformed_line, and the rest of the file is kept.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import orjson
import pyarrow as pa

from lib.data.formats.delimited import DelimitedText
from lib.data.formats.files import COMPRESSED, Layout, SourceBytes, parquet_file
from lib.errors import InputError

BLOCK_BYTES = 8 << 20
LONGEST_LINE = 64 << 20
PARQUET_ROWS = 1 << 17
SEQUENCE_START = 946_684_800_000  # 2000-01-01, milliseconds
SEQUENCE_STEP = 60_000  # milliseconds

Advance = Callable[[int], None]  # hears how many bytes (rows of Parquet) were read since the last call


def read_tables(
    path: Path, layout: Layout, columns: Mapping[str, str], rejected: Counter[str], advance: Advance
) -> Iterator[pa.Table]:
    """Yield the rows of a file as tables of strings (Parquet: of its own types), a column for each key of `columns`.

    Lines that cannot be read are counted in `rejected`. A sequence has no times, so every user's first event is given
    the beginning of 2000, and each later one a minute more.

    Raises:
        InputError: the file is damaged.
    """
    if layout.kind == "parquet":
        yield from _parquet_tables(path, columns, advance)
        return
    try:
        if layout.kind == "delimited":
            yield from _delimited_tables(path, layout, columns, rejected, advance)
        elif layout.kind == "jsonl":
            for lines in read_lines(path, layout.encoding, rejected, advance):
                yield _json_table(lines, columns, rejected)
        else:
            yield from _sequence_tables(path, layout, rejected, advance)
    except (OSError, EOFError) as error:
        raise InputError(f"{path} cannot be read to its end: {error}") from error


def size_of(path: Path, layout: Layout) -> int:
    """Return how far `read_tables` will advance: bytes, or rows of Parquet."""
    if layout.kind == "parquet":
        with parquet_file(path) as file:
            return file.metadata.num_rows
    return path.stat().st_size


def memory_of(path: Path, layout: Layout) -> int:
    """Estimate the bytes that the events of a file take in memory."""
    if layout.kind == "parquet":
        return size_of(path, layout) * 100
    growth = 10 if layout.kind == "sequences" else 3
    return path.stat().st_size * growth * (6 if path.suffix in COMPRESSED else 1)


def _blocks(path: Path, encoding: str, rejected: Counter[str], advance: Advance) -> Iterator[bytes]:
    """Yield whole lines of valid UTF-8, about BLOCK_BYTES at a time; the last line ends in a newline, too."""
    with SourceBytes(path) as stream:
        rest, position, first = b"", 0, True
        while data := stream.read(BLOCK_BYTES):
            advance(stream.read_so_far - position)
            position = stream.read_so_far
            end = data.rfind(b"\n") + 1
            if not end:
                rest += data
                if len(rest) > LONGEST_LINE:
                    raise InputError(f"{path} has a line of over {LONGEST_LINE >> 20} MiB; it is no text of events")
                continue
            block, rest = rest + data[:end], data[end:]
            yield _decoded(block.removeprefix(b"\xef\xbb\xbf") if first else block, encoding, rejected)
            first = False
        if rest:
            yield _decoded((rest.removeprefix(b"\xef\xbb\xbf") if first else rest) + b"\n", encoding, rejected)


def _decoded(block: bytes, encoding: str, rejected: Counter[str]) -> bytes:
    if encoding != "utf-8":
        return block.decode(encoding).encode()
    try:
        block.decode()
    except UnicodeDecodeError:
        lines = block.splitlines(keepends=True)
        valid = [line for line in lines if _is_text(line)]
        rejected["malformed_line"] += len(lines) - len(valid)
        return b"".join(valid)
    return block


def _is_text(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def read_lines(path: Path, encoding: str, rejected: Counter[str], advance: Advance) -> Iterator[list[bytes]]:
    """Yield the lines of a text file that are not blank, a block at a time, as valid UTF-8."""
    for block in _blocks(path, encoding, rejected, advance):
        yield [line for line in block.split(b"\n") if line and not line.isspace()]


def _parquet_tables(path: Path, columns: Mapping[str, str], advance: Advance) -> Iterator[pa.Table]:
    with parquet_file(path) as file:
        for batch in file.iter_batches(PARQUET_ROWS, columns=list(dict.fromkeys(columns.values()))):
            advance(batch.num_rows)
            yield pa.table({field: batch.column(name) for field, name in columns.items()})


def _json_table(lines: Sequence[bytes], columns: Mapping[str, str], rejected: Counter[str]) -> pa.Table:
    rows: list[tuple[str | None, ...]] = []
    for line in lines:
        try:
            fields = orjson.loads(line)
        except orjson.JSONDecodeError:
            rejected["malformed_line"] += 1
            continue
        if not isinstance(fields, dict):
            rejected["malformed_line"] += 1
            continue
        row = [fields.get(name) for name in columns.values()]
        if any(isinstance(value, bool | list | dict) for value in row):
            rejected["wrong_type"] += 1
            continue
        rows.append(tuple(value if value is None or isinstance(value, str) else _json_number(value) for value in row))
    values = zip(*rows, strict=True) if rows else [[] for _ in columns]
    return pa.table({field: pa.array(list(column), pa.string()) for field, column in zip(columns, values, strict=True)})


def _json_number(value: int | float) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else str(value)


def _sequence_tables(path: Path, layout: Layout, rejected: Counter[str], advance: Advance) -> Iterator[pa.Table]:
    lengths: dict[str, int] = {}  # a user may go on in a later line
    for lines in read_lines(path, layout.encoding, rejected, advance):
        users: list[str] = []
        items: list[str] = []
        times: list[int] = []
        for line in lines:
            user, *sequence = [word.strip() for word in line.decode().strip().split(layout.delimiter)]
            if not sequence:
                rejected["malformed_line"] += 1
                continue
            begin = lengths.get(user, 0)
            lengths[user] = begin + len(sequence)
            users += [user] * len(sequence)
            items += sequence
            times += [SEQUENCE_START + place * SEQUENCE_STEP for place in range(begin, begin + len(sequence))]
        columns = [pa.array(users, pa.string()), pa.array(items, pa.string()), pa.array(times, pa.int64())]
        yield pa.table(columns, names=["user_id", "item_id", "timestamp"])


def _delimited_tables(
    path: Path, layout: Layout, columns: Mapping[str, str], rejected: Counter[str], advance: Advance
) -> Iterator[pa.Table]:
    delimiter = layout.delimiter or ","
    parser = DelimitedText(delimiter, len(layout.names), layout.quoted, rejected)
    places = {field: layout.names.index(name) for field, name in columns.items()}
    header = layout.header
    for block in _blocks(path, layout.encoding, rejected, advance):
        if header:
            block = block.lstrip(b"\r\n").partition(b"\n")[2]
            header = False
        table = parser.parse(block)
        yield pa.table({field: table.column(place) for field, place in places.items()})
    table = parser.finish()
    yield pa.table({field: table.column(place) for field, place in places.items()})
