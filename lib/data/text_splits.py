"""How the texts of a column are split into parts: at separators, at blanks, or not at all.

It is decided once for each column, on the catalog that a model is trained with, and stored with it (catalog.parquet):
the parts of an item's text do not depend on which other items are looked at with it.
"""

import re
from collections.abc import Iterable

SEPARATED, WORDS, WHOLE, PROSE = "at | , ;", "at blanks", "not at all", "prose"
LONGEST_TEXT = 100  # characters on average; longer texts are prose
SEPARATORS = re.compile(r"[|,;]")


def split_of(texts: Iterable[str | None]) -> str:
    """Decide how a column's texts are split: at | , or ;, or else at blanks where that makes far fewer distinct values.

    "Comedy Drama" and "Drama War" share "Drama", though no two films have the same text; "Tools & Home" stays whole
    where no other value has any of its words.
    """
    present = [text for text in texts if text]
    if sum(map(len, present)) > LONGEST_TEXT * len(present):
        return PROSE
    whole = set(present)
    if any(SEPARATORS.search(text) for text in whole):
        return SEPARATED
    words = {word for text in whole for word in text.split()}
    return WORDS if len(words) * 2 <= len(whole) else WHOLE


def parts_of(text: str, split: str) -> list[str]:
    """Split a text."""
    if split == SEPARATED:
        return [part.strip() for part in SEPARATORS.split(text)]
    return text.split() if split == WORDS else [text]
