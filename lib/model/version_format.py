"""The format of what is stored and pushed of a version: a number in every delta and every manifest.

The number, the digest that covers it and the place of both stay where they are for good, so that any release can tell
what it cannot read from what is damaged.
"""

from typing import Any

from lib.errors import InputError

FORMAT = 4  # raise it with every change that an earlier release would read wrongly, or not at all
ORDERED_LISTS = 4  # since when lists of neighbours stand in order of strength (lib/model/item_counts.py)
OLDEST_FORMAT = 1  # that this release reads; what says no number is of this one


class OtherFormat(InputError):
    """A version that another release wrote, in a format that this one does not read; nothing of it is damaged."""


def check_format(name: str, said: Any) -> None:
    """Refuse what says that it is of a format that this release does not read.

    Args:
        name: of the file.
        said: what its JSON says, `format` among it.

    Raises:
        OtherFormat: the message names the file and the remedy.
    """
    number = said.get("format", OLDEST_FORMAT) if isinstance(said, dict) else OLDEST_FORMAT
    if number not in range(OLDEST_FORMAT, FORMAT + 1):
        raise OtherFormat(
            f"version: {name} has format {number!r}, and this release reads {OLDEST_FORMAT} to {FORMAT}; "
            f"install the release that wrote it, or begin another folder with --state"
        )
