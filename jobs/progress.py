"""Training progress: a bar on a terminal, one plain line an epoch otherwise.

The first worker puts its news on a queue that any node of the cluster reaches; a thread here shows them.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from ray.util.queue import Queue


class TrainingProgress:
    """Shows the news that the first worker sends."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=1.0, text="starting the workers")

    def show(self, news: dict[str, Any]) -> None:
        """One piece of news: the epoch (from 1) and the share that is done, and at the end of an epoch its loss."""
        text = f"epoch {news['epoch']}/{news['epochs']}"
        if "loss" in news:
            text += f"  loss {news['loss']:.3f}"
            if not self.console.is_terminal:
                print(f"{text}  {news['seconds']:.0f} s", file=sys.stderr, flush=True)
        self.bar.update(self.task, completed=news["share"], text=text)


@contextmanager
def shown_progress() -> "Iterator[Queue]":
    """The queue whose news are shown during the block; neither thread nor actor is left after it."""
    from ray.exceptions import RayError
    from ray.util.queue import Queue

    board = Queue(actor_options={"num_cpus": 0})
    progress = TrainingProgress()
    thread = threading.Thread(target=_show, args=(board, progress), name="progress")
    with progress.bar:
        thread.start()
        try:
            yield board
        finally:
            with suppress(RayError):  # Ray is gone then, and with it whatever the thread waited for
                board.put(None)
            thread.join()
            board.shutdown(force=True)


def _show(board: "Queue", progress: TrainingProgress) -> None:
    """Show news until None comes, or until nothing more can come because Ray or the queue has ended."""
    from ray.exceptions import RayError

    while True:
        try:
            news = board.get()
        except RayError:
            return
        if news is None:
            return
        progress.show(news)
