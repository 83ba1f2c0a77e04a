"""What SQLite's write-ahead log holds after its last whole commit: nothing, a torn commit, or lost ones.

SQLite reads such a file up to the first frame whose checksum is wrong, and drops all that follows. That is right for a
commit that was torn when the machine stopped, and a silent loss where the disk damaged what it had confirmed. The two
differ: a commit is synced before the next one is written, so only the last one can be torn.

The format: https://sqlite.org/fileformat2.html, section 4. A checksum is a linear recurrence over 32-bit words, modulo
2^32, that goes on from frame to frame; so a frame's part of it is a product with constants, of all frames at once.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.log.errors import LogCorrupt

HEADER_BYTES, FRAME_HEADER_BYTES = 32, 24
MAGIC, BIG_ENDIAN = 0x377F0682, 1  # the lowest bit of the first word says in which order the words are summed


@dataclass(frozen=True)
class Tail:
    """What follows the last whole commit."""

    commits: int  # whole ones
    torn: bool  # the last commit is there, but not whole
    damaged: bool  # a commit is not whole that another one follows


WHOLE = Tail(0, torn=False, damaged=False)


def read_tail(path: Path) -> Tail:
    """Read the end of the file at `path`, which nobody writes; one that is absent or empty is whole."""
    data = path.read_bytes() if path.exists() else b""
    magic = int.from_bytes(data[:4], "big")
    page_bytes = int.from_bytes(data[8:12], "big")
    if len(data) < HEADER_BYTES or magic & ~BIG_ENDIAN != MAGIC or page_bytes < 512:
        return WHOLE  # no commit ever reached it
    frame_bytes = FRAME_HEADER_BYTES + page_bytes
    count = (len(data) - HEADER_BYTES) // frame_bytes
    frames = np.frombuffer(data, np.uint8, count * frame_bytes, HEADER_BYTES).reshape(count, frame_bytes)
    current = (frames[:, 8:16] == np.frombuffer(data[16:24], np.uint8)).all(axis=1)  # others are of an earlier round
    commits = current & frames[:, 4:8].any(axis=1)
    whole = _whole_frames(data, frames, ">u4" if magic & BIG_ENDIAN else "<u4")
    committed = np.flatnonzero(commits[:whole])
    end = int(committed[-1]) + 1 if len(committed) else 0
    lost = np.flatnonzero(commits[end:])
    followed = len(lost) > 0 and bool(current[end + int(lost[0]) + 1 :].any())
    return Tail(len(committed), torn=len(lost) > 0 and not followed, damaged=followed)


def last_commit_is_torn(path: Path) -> bool:
    """Return whether the newest commit of the SQLite file at `path` is not whole, so that opening the file drops it.

    Raises:
        LogCorrupt: commits that were durable would be dropped too.
    """
    tail = read_tail(Path(f"{path}-wal"))
    if tail.damaged:
        raise LogCorrupt(
            f"{path}-wal is damaged: behind its first {tail.commits} commits are some that were durable and cannot be"
            f" read; restore both files from a copy, or give these up with"
            f" `sqlite3 {path} 'PRAGMA wal_checkpoint(TRUNCATE)'`"
        )
    return tail.torn


def _whole_frames(data: bytes, frames: np.ndarray, order: str) -> int:
    """Count the frames up to the first whose salt or checksum is wrong."""
    first, second = _checksums(np.frombuffer(data[:24], order)[None, :])
    state = int(first[0]), int(second[0])
    summed = np.concatenate([frames[:, :8], frames[:, FRAME_HEADER_BYTES:]], axis=1).view(order)
    parts = _checksums(summed)
    powers = _powers(summed.shape[1] // 2)[-1]
    stored = np.ascontiguousarray(frames[:, 16:24]).view(">u4")
    for number in range(len(frames)):
        state = (
            (int(powers[0]) * state[0] + int(powers[1]) * state[1] + int(parts[0][number])) % 2**32,
            (int(powers[1]) * state[0] + int(powers[2]) * state[1] + int(parts[1][number])) % 2**32,
        )
        if (int(stored[number, 0]), int(stored[number, 1])) != state or frames[number, 8:16].tobytes() != data[16:24]:
            return number
    return len(frames)


def _checksums(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both sums of each line of words (F, 2 N), from a state of zeros."""
    powers = _powers(words.shape[1] // 2)[:-1][::-1].astype(np.uint32)
    even, odd = words[:, 0::2].astype(np.uint32), words[:, 1::2].astype(np.uint32)
    first = (even * (powers[:, 0] + powers[:, 1]) + odd * powers[:, 1]).sum(axis=1, dtype=np.uint32)
    second = (even * (powers[:, 1] + powers[:, 2]) + odd * powers[:, 2]).sum(axis=1, dtype=np.uint32)
    return first, second


def _powers(count: int) -> np.ndarray:
    """Return the powers 0 to count of the step's matrix [[1, 1], [1, 2]].

    Returns:
        (count + 1, 3), each power as its entries a, b = c, d.
    """
    powers = np.empty((count + 1, 3), dtype=np.uint64)
    a, b, d = 1, 0, 1
    for number in range(count + 1):
        powers[number] = a, b, d
        a, b, d = (a + b) % 2**32, (b + d) % 2**32, (b + 2 * d) % 2**32
    return powers
