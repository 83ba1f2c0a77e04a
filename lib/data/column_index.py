"""Indexes of one column of the items' table: word -> lines, and number -> lines.

Each has a part for the lines that were loaded, made once and never changed, and a part for the lines that were put
since, which each change updates. A list matches by one of its members. A text matches as a whole, by one of its parts
between | , ; or by one of its words.
"""

# pyarrow.compute makes its functions as it is imported, so a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lib.data.text_splits import SEPARATED, SEPARATORS, parts_of

WORDS = r"[ \t\n\r\f|,;]"  # what is between the words of a text
BETWEEN_WORDS = re.compile(WORDS)
PARTS = SEPARATORS.pattern
LONGEST_INDEXED = 128  # bytes of a text that is found as a whole by the index; for longer ones the column is read
MOST_FOUND = 20_000  # texts that were looked up, which are not searched for again
NO_LINES = np.zeros(0, dtype=np.int32)


def words_of(text: str) -> list[str]:
    """Return the words of a text."""
    return [word for word in BETWEEN_WORDS.split(text) if word]


class WordIndex:
    """The lines of a column by text: its cells as texts, or the members of its lists."""

    def __init__(self, column: pa.ChunkedArray):
        """Index a column as it was loaded.

        Raises:
            pa.ArrowNotImplementedError: its values cannot be written as text.
        """
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        self._texts: pa.ChunkedArray | None = None
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            texts, lines = _members(column)
            self._sort([_as_text(texts)], [lines])
        else:
            self._texts = _as_text(column)
            self._sort(*_tokens(self._texts))
        self._put: defaultdict[str, set[int]] = defaultdict(set)
        self._found: dict[str, tuple[int, int]] = {}  # where the lines of texts that were asked for lately are

    def _sort(self, texts: list[pa.ChunkedArray], lines: list[np.ndarray]) -> None:
        chunks = [chunk for text in texts for chunk in text.chunks]
        encoded = pa.chunked_array(chunks, texts[0].type).dictionary_encode().unify_dictionaries()
        if not encoded.num_chunks:
            self._words, self._starts, self._lines = pa.array([], pa.string()), np.zeros(1, np.int64), NO_LINES
            return
        codes = np.concatenate([chunk.indices.fill_null(-1).to_numpy() for chunk in encoded.chunks])
        words = encoded.chunk(0).dictionary
        order = pc.sort_indices(words).to_numpy()
        ranks = np.empty(len(order) + 1, dtype=np.int64)
        ranks[order] = np.arange(len(order))
        ranks[-1] = -1  # of null
        keys = ranks[codes] << 32 | np.concatenate(lines)
        keys.sort()  # by word, then by line; np.unique hashes, which takes five times as long
        keys = keys[(keys >= 0) & (np.diff(keys, prepend=-1) != 0)]  # each pair once
        self._words = words.take(pa.array(order))
        self._starts = np.searchsorted(keys, np.arange(len(order) + 1) << 32)
        self._lines = (keys & 0xFFFFFFFF).astype(np.int32)

    def put(self, line: int, value: Any) -> None:
        """Add a line with its value."""
        for token in _tokens_of(value):
            self._put[token].add(line)

    def take_out(self, line: int, value: Any) -> None:
        """Remove a line that was put with this value."""
        for token in _tokens_of(value):
            self._put[token].discard(line)
            if not self._put[token]:
                del self._put[token]

    def _loaded(self, text: str) -> np.ndarray:
        if (found := self._found.get(text)) is None:
            place = bisect_left(range(len(self._words)), text, key=lambda place: self._words[place].as_py())
            there = place < len(self._words) and self._words[place].as_py() == text
            found = (self._starts[place], self._starts[place + 1]) if there else (0, 0)
            if len(self._found) >= MOST_FOUND:
                self._found.clear()
            if len(text) <= LONGEST_INDEXED:
                self._found[text] = found
        return self._lines[found[0] : found[1]]

    def count(self, text: str) -> int:
        """Return about how many lines hold a text: those of items that were changed since are counted, too."""
        return len(self._loaded(text)) + len(self._put.get(text, ()))

    def holds(self, text: str, lines: np.ndarray) -> np.ndarray:
        """Return for each of these lines whether it holds a text."""
        loaded, put = self._loaded(text), self._put.get(text, ())
        places = np.searchsorted(loaded, lines)
        found = places < len(loaded)
        found[found] = loaded[places[found]] == lines[found]
        return found | np.array([line in put for line in lines.tolist()], dtype=bool)

    def lines(self, texts: Iterable[str]) -> np.ndarray:
        """Return the lines that hold one of these texts, some of them more than once."""
        found, long = [NO_LINES], []
        for text in texts:
            found.append(self._loaded(text))
            if text in self._put:
                found.append(np.fromiter(self._put[text], dtype=np.int32, count=len(self._put[text])))
            if len(text.encode()) > LONGEST_INDEXED:
                long.append(text)
        if long and self._texts is not None:
            equal = pc.is_in(self._texts, value_set=pa.array(long, self._texts.type))
            found.append(np.flatnonzero(equal.to_numpy(zero_copy_only=False)).astype(np.int32))
        return np.concatenate(found)


class NumberIndex:
    """The lines of a column by number; null and what is no number are of no line."""

    def __init__(self, column: pa.ChunkedArray):
        """Index a column as it was loaded.

        Raises:
            pa.ArrowInvalid, pa.ArrowNotImplementedError: its values are no numbers.
        """
        numbers = as_numbers(column).to_numpy(zero_copy_only=False)
        lines = np.argsort(numbers, kind="stable")  # NaN comes last
        self._lines = lines[: len(numbers) - np.isnan(numbers).sum()].astype(np.int32)
        self._numbers = numbers[self._lines]
        self._loaded = len(numbers)
        self._put = np.full(64, np.nan)  # of the lines that were put

    def put(self, line: int, value: Any) -> None:
        """Add a line with its value."""
        place = line - self._loaded
        if place >= len(self._put):
            self._put = np.concatenate([self._put, np.full(place + 1, np.nan)])
        self._put[place] = _number(value)

    def take_out(self, line: int, value: Any) -> None:
        """Remove a line that was put with this value."""
        self.put(line, None)

    def lines(self, numbers: Iterable[float]) -> np.ndarray:
        """Return the lines that hold one of these numbers."""
        wanted = np.unique(np.array([*numbers], dtype=np.float64))
        starts = np.searchsorted(self._numbers, wanted, side="left")
        ends = np.searchsorted(self._numbers, wanted, side="right")
        found = [self._lines[start:end] for start, end in zip(starts, ends, strict=True)]
        return np.concatenate([*found, self._put_lines(np.isin(self._put, wanted))])

    def between(self, low: float, high: float) -> np.ndarray:
        """Return the lines whose number is at least `low` and at most `high`."""
        start = np.searchsorted(self._numbers, low, side="left")
        end = np.searchsorted(self._numbers, high, side="right")
        return np.concatenate([self._lines[start:end], self._put_lines((self._put >= low) & (self._put <= high))])

    def _put_lines(self, chosen: np.ndarray) -> np.ndarray:
        return (np.flatnonzero(chosen) + self._loaded).astype(np.int32)


def as_numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column as float64; a float32 as the decimal fraction that it was written as, 19.99 for 19.989999771.

    Raises:
        pa.ArrowInvalid, pa.ArrowNotImplementedError: its values are no numbers.
    """
    if column.type in (pa.float16(), pa.float32()):
        column = column.cast(pa.float32()).cast(pa.string())
    return pc.cast(column, pa.float64(), safe=False)


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column if pa.types.is_large_string(column.type) else pc.cast(column, pa.string())


def _members(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, np.ndarray]:
    """Return the members of all lists, and the line of each."""
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    return pc.list_flatten(column), np.repeat(np.arange(len(lengths)), lengths)


def _tokens(texts: pa.ChunkedArray) -> tuple[list[pa.ChunkedArray], list[np.ndarray]]:
    """Return what texts are found by, and the lines: short ones and single words as a whole, the parts, the words."""
    with_words, with_parts = (pc.match_substring_regex(texts, pattern) for pattern in (WORDS, PARTS))
    whole = pc.or_(pc.less_equal(pc.binary_length(texts), LONGEST_INDEXED), pc.invert(with_words))
    columns, lines = [], []
    for chosen, pattern in ((whole, None), (with_parts, PARTS), (with_words, WORDS)):
        found, places = texts.filter(chosen), np.flatnonzero(_bools(chosen))
        if pattern is not None:
            found, own = _members(pc.split_pattern_regex(found, pattern=pattern))
            found = pc.utf8_trim_whitespace(found) if pattern == PARTS else found
            filled = pc.not_equal(found, "")
            found, places = found.filter(filled), places[own[_bools(filled)]]
        columns.append(found)
        lines.append(places)
    return columns, lines


def _bools(column: pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(column, False).to_numpy(zero_copy_only=False).astype(bool)


def _tokens_of(value: Any) -> set[str]:
    """Return what a value of JSON is found by."""
    if isinstance(value, list):
        return set(value)
    if isinstance(value, bool):
        return {str(value).lower()}
    if not isinstance(value, str):
        return set() if value is None else {str(value)}
    return {value, *filter(None, parts_of(value, SEPARATED)), *words_of(value)}


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return np.nan
