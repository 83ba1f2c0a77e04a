"""A hash of a user's id, by which users are divided: the same in every process, on every machine, and for good.

Logs and experiments on disk were divided by it: with another one they would look for users where they are not.
"""

from hashlib import blake2b


def user_hash(user_id: str, salt: str = "") -> bytes:
    """Return 8 evenly distributed bytes; with another salt, of which 64 bytes count, they are independent."""
    return blake2b(user_id.encode(), digest_size=8, key=salt.encode()[:64]).digest()


def part_of(user_id: str, count: int) -> int:
    """Return which of `count` parts of equal size a user is in, from 0."""
    return int.from_bytes(user_hash(user_id), "big") % count
