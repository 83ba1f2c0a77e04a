"""Whether all processes of the cluster run on one machine, so that they may share memory (lib/log/board.py)."""

import os

ONE_MACHINE = "AFTERCLICK_ONE_MACHINE"  # set where no process of the cluster can ever be on another machine


def on_one_machine() -> bool:
    """Return whether the environment promises it."""
    return bool(os.environ.get(ONE_MACHINE))
