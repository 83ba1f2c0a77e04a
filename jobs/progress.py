"""Training progress: a bar on a terminal, one plain line an epoch otherwise.

Rank 0 puts its reports on a queue that any node of the cluster reaches; a thread here shows them.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from ray.exceptions import RayError
from ray.util.queue import Queue
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class Report(NamedTuple):
    """How far training is; with the loss and the seconds of training so far at the end of an epoch."""

    epoch: int  # from 1
    epochs: int
    share: float  # of the whole training
    loss: float | None = None
    seconds: float = 0.0


class TrainingProgress:
    """The bar, or the lines, of the reports that rank 0 sends."""

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

    def show(self, report: Report) -> None:
        """Move the bar; without a terminal, print a line at the end of each epoch."""
        text = f"epoch {report.epoch}/{report.epochs}"
        if report.loss is not None:
            text += f"  loss {report.loss:.3f}"
            if not self.console.is_terminal:
                print(f"{text}  {report.seconds:.0f} s", file=sys.stderr, flush=True)
        self.bar.update(self.task, completed=report.share, text=text)


@contextmanager
def shown_progress() -> Iterator[Queue]:
    """Provide a queue whose reports are shown during the block; neither thread nor actor is left after it."""
    queue = Queue(actor_options={"num_cpus": 0})
    progress = TrainingProgress()
    thread = threading.Thread(target=_show_reports, args=(queue, progress), name="progress")
    with progress.bar:
        thread.start()
        try:
            yield queue
        finally:
            with suppress(RayError):  # Ray has ended, so the thread ends, too
                queue.put(None)
            thread.join()
            queue.shutdown(force=True)


def _show_reports(queue: Queue, progress: TrainingProgress) -> None:
    """Show reports until None comes, or Ray or the queue has ended."""
    while True:
        try:
            report = queue.get()
        except RayError:
            return
        if report is None:
            return
        progress.show(report)
