"""Delimited text to tables, with quotes that are unpaired or span lines.

pyarrow parses blocks without such quotes, the csv module parses the others line by line.
"""

import csv
import io
from collections import Counter

import pyarrow as pa
from pyarrow import csv as arrow_csv

LONGEST_VALUE = 8 << 20  # bytes; a quote that is not closed within so many is a stray one
_INNER_DELIMITER = "\x1f"  # in place of a delimiter of two characters, which pyarrow does not know


class DelimitedText:
    """A parser of blocks of whole lines; a quoted value may go on in the next block."""

    def __init__(self, delimiter: str, width: int, quoted: bool, rejected: Counter[str]) -> None:
        self.inner = delimiter if len(delimiter) == 1 else _INNER_DELIMITER
        self.delimiter = delimiter.encode()
        self.names = [str(place) for place in range(width)]
        self.quoted = quoted
        self.rejected = rejected
        self._open = b""  # lines from the quote on that the last block did not close

    def parse(self, block: bytes) -> pa.Table:
        """Return the block's rows as strings, columns named by their places; count malformed lines."""
        block = self._open + block
        self._open = b""
        if len(self.delimiter) > 1:
            block = block.replace(self.delimiter, self.inner.encode())
        if not self.quoted or b'"' not in block:
            return self._counted(*self._parse_plain(block, quote=False))
        lines = block.split(b"\n")
        odd = _odd(lines)
        if not odd:
            table, malformed = self._parse_plain(block, quote='"')
            filled = sum(bool(line.strip(b"\r")) for line in lines)
            if table.num_rows + malformed == filled:  # else an unpaired quote made one value of several lines
                return self._counted(table, malformed)
        return self._parse_quoted(lines, odd)

    def finish(self) -> pa.Table:
        """Return the rows that still waited for a closing quote."""
        lines = self._open.split(b"\n")
        self._open = b""
        return self._parse_quoted(lines, _odd(lines), last=True)

    def _counted(self, table: pa.Table, malformed: int) -> pa.Table:
        if malformed:
            self.rejected["malformed_line"] += malformed
        return table

    def _parse_plain(self, block: bytes, quote: str | bool) -> tuple[pa.Table, int]:
        """Parse a block with pyarrow; return its rows and the number of malformed lines."""
        malformed = 0

        def skip(row: arrow_csv.InvalidRow) -> str:
            nonlocal malformed
            malformed += 1
            return "skip"

        if not block.strip(b"\r\n"):
            return pa.table([pa.array([], pa.string())] * len(self.names), names=self.names), 0
        table = arrow_csv.read_csv(
            pa.BufferReader(block),
            arrow_csv.ReadOptions(column_names=self.names, block_size=len(block) + 1, use_threads=False),
            arrow_csv.ParseOptions(delimiter=self.inner, quote_char=quote, invalid_row_handler=skip),
            arrow_csv.ConvertOptions(column_types=dict.fromkeys(self.names, pa.string()), strings_can_be_null=False),
        )
        return table, malformed

    def _parse_quoted(self, lines: list[bytes], odd: list[int], last: bool = False) -> pa.Table:
        """Parse lines with the csv module; `odd` are the places of those with an odd number of quotes.

        Such a line begins a value of several lines, up to the next such line, if together they make a row; otherwise
        its quote is a stray one and only that line is lost.
        """
        rows: list[list[str]] = []
        place, next_odd = 0, 0
        while place < len(lines):
            if not lines[place].strip(b"\r"):
                place += 1
                continue
            if next_odd == len(odd) or place < odd[next_odd]:
                row, used = self._row(lines[place]), 1
            elif next_odd + 1 < len(odd):
                end = odd[next_odd + 1] + 1
                row = self._row(b"\n".join(lines[place:end]))
                used = end - place if row else 1
                next_odd += 2 if row else 1
            else:
                rest = b"\n".join(lines[place:])
                if not last and len(rest) < LONGEST_VALUE:
                    self._open = rest
                    break
                row, used, next_odd = None, 1, len(odd)
            place += used
            if row is None:
                self.rejected["malformed_line"] += 1
            else:
                rows.append(row)
        columns = zip(*rows, strict=True) if rows else [[] for _ in self.names]
        return pa.table([pa.array(list(column), pa.string()) for column in columns], names=self.names)

    def _row(self, text: bytes) -> list[str] | None:
        try:
            reader = csv.reader(io.StringIO(text.decode(), newline=""), delimiter=self.inner, strict=True)
            rows = [row for row in reader if row]
        except csv.Error:
            return None
        return rows[0] if len(rows) == 1 and len(rows[0]) == len(self.names) else None


def _odd(lines: list[bytes]) -> list[int]:
    """Return the places of the lines with an odd number of quotes."""
    return [place for place, line in enumerate(lines) if line.count(b'"') % 2]
