"""Indexes of one column of the items' table: word -> lines, and number -> lines.

Each has a part for the lines that were loaded, made once and never changed, and a part for the lines that were put
since, which each change updates. A list matches by one of its members. A text matches as a whole, by one of its parts
between | , ; or by one of its words. Taking the words out of megabytes of text takes seconds, so that an index of words
may be late: it catches up apart from the change.
"""

# pyarrow.compute makes its functions as it is imported, so a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false

import re
import threading
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lib.data.text_splits import SEPARATED, SEPARATORS, parts_of

WORDS = r"[ \t\n\r\f|,;]"  # what is between the words of a text
BETWEEN_WORDS = re.compile(WORDS)
PARTS = SEPARATORS.pattern
LONGEST_INDEXED = 128  # bytes of a text that is found as a whole by the index; for longer ones the column is read
SOON = 65_536  # characters whose words are taken out with the change itself, in some ten milliseconds
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
        self._parts = (_Part.of_cells(column, np.arange(len(column))),)  # of what was loaded, then of much put at once
        self._put: defaultdict[str, set[int]] = defaultdict(set)  # the lines of what was put little by little
        self._late: deque[tuple[int, Any, Any]] = deque()  # lines with the value that they had, and the one they have
        self._catching_up = threading.Lock()

    @property
    def late(self) -> int:
        """How many characters have changed that are not found yet."""
        return sum(_length(before) + _length(after) for _, before, after in tuple(self._late))

    def change(self, line: int, before: Any, after: Any) -> None:
        """Give a line another value, None for none; nothing finds the line until `catch_up`, which takes the time."""
        self._late.append((line, before, after))

    def catch_up(self) -> None:
        """Have lines found by the values that they have now: on any thread, also while others look up or change."""
        if not self._late:
            return
        with self._catching_up:
            changes = tuple(self._late)
            before: dict[int, Any] = {}
            for line, value, _ in changes:
                before.setdefault(line, value)
            after = {line: value for line, _, value in changes if value is not None}
            for line, value in before.items():
                self._take_out(line, value)
            if sum(map(_length, after.values())) > SOON:
                self._add_part(after)
            else:
                for line, value in after.items():
                    for token in _tokens_of(value):
                        self._put[token].add(line)
            for _ in changes:
                self._late.popleft()

    def _take_out(self, line: int, value: Any) -> None:
        if value is None:
            return
        for part in self._parts[1:]:
            if line in part.own and line not in part.gone:
                part.gone.add(line)
                return
        for token in _tokens_of(value):
            self._put[token].discard(line)
            if not self._put[token]:
                del self._put[token]

    def _add_part(self, values: Mapping[int, Any]) -> None:
        """Index many values at once; parts of like size become one, so that there are few."""
        texts = [value if isinstance(value, str | list) else str(value).lower() for value in values.values()]
        kind = pa.large_list(pa.large_string()) if isinstance(texts[0], list) else pa.large_string()
        column = pa.chunked_array([pa.array(texts, kind)])
        part = _Part.of_cells(column, np.fromiter(values, dtype=np.int64, count=len(values)))
        parts = self._parts
        while len(parts) > 1 and len(parts[-1]) <= 2 * len(part):
            part, parts = _Part.joined(parts[-1], part), parts[:-1]
        self._parts = (*parts, part)

    def count(self, text: str) -> int:
        """Return about how many lines hold a text: those of items that were changed since are counted, too."""
        return sum(len(part.find(text)) for part in self._parts) + len(self._put.get(text, ()))

    def holds(self, text: str, lines: np.ndarray) -> np.ndarray:
        """Return for each of these lines whether it holds a text."""
        put = self._put.get(text, ())
        held = np.array([line in put for line in lines.tolist()], dtype=bool)
        for part in self._parts:
            found = part.find(text)
            places = np.searchsorted(found, lines)
            inside = places < len(found)
            held[inside] |= found[places[inside]] == lines[inside]
        return held

    def lines(self, texts: Iterable[str]) -> np.ndarray:
        """Return the lines that hold one of these texts, some of them more than once."""
        late = {line for line, _, _ in tuple(self._late)}  # before anything is looked up: it may catch up meanwhile
        found, long = [NO_LINES], []
        for text in texts:
            found.extend(part.find(text) for part in self._parts)
            if own := tuple(self._put.get(text, ())):
                found.append(np.array(own, dtype=np.int32))
            if len(text.encode()) > LONGEST_INDEXED:
                long.append(text)
        if long:
            found.extend(part.find_whole(long) for part in self._parts)
        return _without(np.concatenate(found), late)


class _Part:
    """Texts and the lines that hold each: sorted, and made at once by Arrow, which lets other threads run meanwhile."""

    def __init__(
        self, texts: Sequence[pa.ChunkedArray], lines: Sequence[np.ndarray], cells: pa.ChunkedArray, own: np.ndarray
    ):
        """Sort texts of lines.

        Args:
            texts: what the lines are found by.
            lines: the line of each text.
            cells: (M,) the whole texts, of which long ones are found by a look at each; empty if they are lists.
            own: (M,) the line of each cell.
        """
        self._cells, self._line_of_cell = cells, own
        self.own = frozenset(own.tolist())
        self.gone: set[int] = set()  # lines that have other values since
        self._found: dict[str, tuple[int, int]] = {}  # where the lines of texts that were asked for lately are
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

    @classmethod
    def of_cells(cls, column: pa.ChunkedArray, own: np.ndarray) -> Self:
        """Index the values (M,) of lines (M,).

        Raises:
            pa.ArrowNotImplementedError: the values cannot be written as text.
        """
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            texts, places = _members(column)
            return cls([_as_text(texts)], [own[places]], pa.chunked_array([], pa.string()), own)
        cells = _as_text(column)
        texts, places = _tokens(cells)
        return cls(texts, [own[place] for place in places], cells, own)

    @classmethod
    def joined(cls, *parts: Self) -> Self:
        """Join parts of one column, without the lines that are gone."""
        texts, lines, cells, own = [], [], [], []
        for part in parts:
            words = part._words.take(pa.array(np.repeat(np.arange(len(part._words)), np.diff(part._starts))))
            kept, kept_cells = _kept(part._lines, part.gone), _kept(part._line_of_cell, part.gone)
            texts.append(pa.chunked_array([words.filter(pa.array(kept))]))
            lines.append(part._lines[kept].astype(np.int64))
            cells.extend(part._cells.filter(pa.array(kept_cells)).chunks if len(part._cells) else [])
            own.append(part._line_of_cell[kept_cells])
        return cls(texts, lines, pa.chunked_array(cells, parts[0]._cells.type), np.concatenate(own))

    def __len__(self) -> int:
        """Return the number of pairs of a text and a line."""
        return len(self._lines)

    def find(self, text: str) -> np.ndarray:
        """Return the lines that hold a text."""
        if (found := self._found.get(text)) is None:
            place = bisect_left(range(len(self._words)), text, key=lambda place: self._words[place].as_py())
            there = place < len(self._words) and self._words[place].as_py() == text
            found = (self._starts[place], self._starts[place + 1]) if there else (0, 0)
            if len(self._found) >= MOST_FOUND:
                self._found.clear()
            if len(text) <= LONGEST_INDEXED:
                self._found[text] = found
        return _without(self._lines[found[0] : found[1]], self.gone)

    def find_whole(self, texts: Sequence[str]) -> np.ndarray:
        """Return the lines whose value is one of these long texts."""
        if not len(self._cells):
            return NO_LINES
        equal = pc.is_in(self._cells, value_set=pa.array(texts, self._cells.type)).to_numpy(zero_copy_only=False)
        return _without(self._line_of_cell[equal].astype(np.int32), self.gone)


def _kept(lines: np.ndarray, gone: Collection[int]) -> np.ndarray:
    """Return for each line whether it is not among those that are gone."""
    return ~np.isin(lines, np.array(tuple(gone), dtype=np.int64)) if gone else np.ones(len(lines), dtype=bool)


def _without(lines: np.ndarray, gone: Collection[int]) -> np.ndarray:
    return lines[_kept(lines, gone)] if gone else lines


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

    def change(self, line: int, before: Any, after: Any) -> None:
        """Give a line that was put another value, None for none."""
        place = line - self._loaded
        if place >= len(self._put):
            self._put = np.concatenate([self._put, np.full(place + 1, np.nan)])
        self._put[place] = _number(after)

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


def _length(value: Any) -> int:
    """Return the characters of a value that is a text or a list of texts, 1 of any other."""
    return len(value) if isinstance(value, str) else sum(map(len, value)) if isinstance(value, list) else 1


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
