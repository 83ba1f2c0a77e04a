"""Ids of answers: random, with a checksum, so that one that no answer ever had is known without a record of them."""

import secrets
from hashlib import blake2b

RANDOM_BYTES, CHECKSUM_BYTES = 12, 4
LENGTH = 2 * (RANDOM_BYTES + CHECKSUM_BYTES)  # in hexadecimal


def new_request_id() -> str:
    """Return the id of an answer."""
    name = secrets.token_hex(RANDOM_BYTES)
    return name + _checksum(name)


def names_answer(request_id: str) -> bool:
    """Return whether an answer may have had this id, or this one and the arm of an experiment after a point."""
    own, _, _ = request_id.partition(".")
    name = own[: 2 * RANDOM_BYTES]
    return len(own) == LENGTH and own == name + _checksum(name)


def _checksum(name: str) -> str:
    return blake2b(name.encode(), digest_size=CHECKSUM_BYTES).hexdigest()
