"""Where a user falls when users are divided by share: the same for good, on any machine, and evenly spread."""

from lib.data.user_hash import user_hash


def place_of(user_id: str, salt: str) -> float:
    """Return a number from 0 to below 1; with another salt an independent one."""
    return (int.from_bytes(user_hash(user_id, salt), "little") >> 11) / 2**53
