"""Where a user falls when users are divided by share: the same for good, on any machine, and evenly spread."""

from hashlib import blake2b


def place_of(user_id: str, salt: str) -> float:
    """A number from 0 to below 1; with another salt an independent one."""
    digest = blake2b(user_id.encode(), digest_size=8, key=salt.encode()[:64]).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53
