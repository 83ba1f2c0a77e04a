"""Training progress: a bar on a terminal, one plain line an epoch otherwise."""

import sys
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class TrainingProgress:
    """Shows the news that the first worker sends."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("pretraining"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=1.0, text="starting the workers")

    def __enter__(self) -> "TrainingProgress":
        self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def show(self, news: dict[str, Any]) -> None:
        """One piece of news: how far training is, and at the end of an epoch its loss."""
        text = f"epoch {news['epoch'] + 1}/{news['epochs']}"
        if "loss" in news:
            text += f"  loss {news['loss']:.3f}"
            if not self.console.is_terminal:
                print(f"{text}  {news['seconds']:.0f} s", file=sys.stderr, flush=True)
        self.bar.update(self.task, completed=news["share"], text=text)
