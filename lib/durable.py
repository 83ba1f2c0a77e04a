"""The one way to make a file durable: it is written beside its name, synced, renamed, and its folder is synced."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path


def write_durably(path: Path, data: bytes, replace: bool = True) -> None:
    """Write a file that is there whole or not at all, also after a power loss; folders on the way are made.

    Raises:
        FileExistsError: there is one already, and `replace` is False; of two writers at once, one alone succeeds.
        OSError: it could not be written; nothing is left behind.
    """

    def write(unfinished: Path) -> None:
        unfinished.write_bytes(data)

    make_durably(path, write, replace)


def make_durably(path: Path, make: Callable[[Path], object], replace: bool = True) -> None:
    """Have `make` write a file under another name, and give it its own once its bytes are on disk.

    Raises:
        FileExistsError: there is one already, and `replace` is False; of two writers at once, one alone succeeds.
        OSError: it could not be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        make(unfinished)
        rename_durably(unfinished, path, replace)
    finally:
        unfinished.unlink(missing_ok=True)


def rename_durably(unfinished: Path, path: Path, replace: bool = True) -> None:
    """Give a file, or a folder with all that is in it, its name once it is on disk, and have the name there, too.

    Raises:
        FileExistsError: there is one already, and `replace` is False (for a file alone).
        OSError: it could not be renamed.
    """
    for path_inside in unfinished.rglob("*"):
        sync(path_inside)
    sync(unfinished)
    if replace:
        unfinished.rename(path)
    else:
        os.link(unfinished, path)  # a rename would replace what another writer made; the old name stays
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush to disk what a file holds, or which files a folder has."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
