"""Checksums of the weights, kept up to date row by row, by which replicas are compared with the learner."""

import math
import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lib.model.delta import NO_ROWS, ROW_TENSORS, state_of, with_new_rows
from lib.model.encoder import BehaviourEncoder
from lib.model.item_counts import COUNT_TENSORS

WORDS_AT_ONCE = 1 << 13  # what is widened to 64 bits stays in the cache, and its memory in the process


class Fingerprint:
    """A 64-bit checksum of a state that follows a delta at the cost of its changed rows.

    Every line of a row tensor, and every other tensor, is hashed by a multilinear function of its 32-bit words
    (Carter & Wegman 1979) and mixed with its name and place; the checksum is their sum modulo 2^64.
    """

    def __init__(self, encoder: BehaviourEncoder):
        self._parts: dict[str, np.ndarray] = {}  # of the row tensors, the hash of each line
        self._totals: dict[str, int] = {}  # of every tensor
        state = state_of(encoder)
        self.update(state, NO_ROWS)

    def update(
        self,
        state: Mapping[str, Tensor],
        rows: np.ndarray,
        names: set[str] | None = None,
        count_rows: np.ndarray = NO_ROWS,
    ) -> str:
        """Hash given rows of weights and counts anew, and the named other tensors (None: all); return the checksum.

        The rows are distinct, and ascending.
        """
        for name, tensor in state.items():
            if name in ROW_TENSORS or name in COUNT_TENSORS:
                parts = self._parts.get(name, np.zeros(0, dtype=np.uint64))
                changed = rows if name in ROW_TENSORS else count_rows
                lines = with_new_rows(changed, len(parts), len(tensor))
                if len(tensor) > len(parts):
                    parts = np.concatenate([parts, np.zeros(len(tensor) - len(parts), dtype=np.uint64)])
                before = int(parts[lines].sum(dtype=np.uint64))
                parts[lines] = _hash_lines(name, tensor[torch.from_numpy(lines)], lines)
                self._parts[name] = parts
                self._totals[name] = self._totals.get(name, 0) - before + int(parts[lines].sum(dtype=np.uint64))
            elif names is None or name in names:
                self._totals[name] = int(_hash_lines(name, tensor.reshape(1, -1), np.zeros(1, dtype=np.int64))[0])
        return self.checksum

    def forget(self, name: str) -> None:
        """Have every line of a row tensor hashed anew by the next update."""
        self._parts.pop(name, None)
        self._totals.pop(name, None)

    @property
    def checksum(self) -> str:
        """16 hexadecimal digits."""
        return f"{sum(self._totals.values()) & 0xFFFFFFFFFFFFFFFF:016x}"


def fingerprint(encoder: BehaviourEncoder) -> str:
    """Return the checksum of an encoder's whole state."""
    return Fingerprint(encoder).checksum


def _hash_lines(name: str, lines: Tensor, places: np.ndarray) -> np.ndarray:
    """Return (L,) uint64 hash of each line of a tensor, bound to the tensor's name and the line's place."""
    words = lines.reshape(len(places), math.prod(lines.shape[1:])).cpu().contiguous().numpy().view(np.uint32)
    seed = zlib.crc32(name.encode())
    coefficients = np.random.Generator(np.random.PCG64(seed)).integers(
        0, 2**64, size=words.shape[1], dtype=np.uint64, endpoint=False
    )
    hashes = np.empty(len(places), dtype=np.uint64)
    coefficients |= np.uint64(1)
    step = max(WORDS_AT_ONCE // max(words.shape[1], 1), 1)
    for start in range(0, len(places), step):
        part = slice(start, start + step)
        hashes[part] = words[part].astype(np.uint64) @ coefficients
    hashes += (places.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64's finaliser
        hashes = (hashes ^ (hashes >> np.uint64(shift))) * np.uint64(factor)
    return hashes ^ (hashes >> np.uint64(31))
