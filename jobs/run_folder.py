"""The folder of a training run: what the run is made of, its checkpoints, its stream of events, and its result.

An interrupted run goes on where its folder was made of the same.
"""

import hashlib
import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lib.data.dataset import EVENTS_FILE, ITEMS_FILE
from lib.errors import InputError

RUN_FILE = "run.json"
CHECKPOINTS = "run"  # as Ray Train names it
STREAM = "stream"  # of jobs/event_stream.py
RESULT = "result"  # the model folder


def resume_or_restart(storage: Path, run: dict[str, Any]) -> None:
    """Keep the folder of an interrupted run with this description; else make it anew.

    Raises:
        InputError: the folder cannot be written.
    """
    run = run | {"ray": version("ray")}  # another version may not read its checkpoints
    if storage.exists():
        reason = _why_not_resumable(storage, run)
        if reason is None:
            print(f"going on with the interrupted run in {storage}", file=sys.stderr)
            return
        print(f"starting afresh: the interrupted run in {storage} {reason}", file=sys.stderr)
        shutil.rmtree(storage)
    try:
        storage.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"out: {storage.parent} cannot be written ({error.strerror}); choose another folder"
        ) from error
    (storage / RUN_FILE).write_text(json.dumps(run, indent=2) + "\n")


def _why_not_resumable(storage: Path, run: dict[str, Any]) -> str | None:
    """Say why an interrupted run cannot be resumed; None if it can."""
    try:
        before = json.loads((storage / RUN_FILE).read_text())
        snapshot = storage / CHECKPOINTS / "checkpoint_manager_snapshot.json"
        if snapshot.exists():  # Ray Train's list of checkpoints, which it does not write atomically
            json.loads(snapshot.read_text())
    except (OSError, ValueError):
        return "is damaged"
    differing = [name for name in run if before.get(name) != run[name]]
    return f"had other {' and '.join(differing)}" if differing else None


def checksums(data: Path) -> dict[str, str]:
    """Return the sha256 of each file of a dataset."""
    files = [data] if data.is_file() else [data / name for name in (EVENTS_FILE, ITEMS_FILE)]
    found = {}
    for path in files:
        if path.exists():
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
