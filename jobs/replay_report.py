"""A replay for people: tables for the terminal, and a PNG of quality over the stream's time."""

from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from jobs.evaluation_report import CAPTION, metric_cell, metric_table
from jobs.plots import new_figure, save_figure
from lib.evaluation.comparison import Estimate
from lib.live.prequential_comparison import BASE, METRICS, ReplayComparison


def print_replay(comparison: ReplayComparison, title: str) -> None:
    """Print each arm's metrics, its lift, the groups, and what learning cost."""
    console = Console()
    table = metric_table(title, [*METRICS, f"{METRICS[1]}\nover {BASE}", "CPU s", "events read"])
    for arm in comparison.arms:
        lift = _percent(arm.lift[METRICS[1]]) if arm.lift else "-"
        cost = (f"{arm.facts[name]:,.0f}" if name in arm.facts else "-" for name in ("learn_seconds", "events_read"))
        table.add_row(arm.name, *(metric_cell(arm.metrics["all"][name]) for name in METRICS), lift, *cost)
    table.caption = CAPTION
    console.print(table)
    groups = [f"{name}\n{events:,} events" for name, events in comparison.groups.items()]
    table = metric_table(f"{METRICS[1]} of groups", groups)
    for arm in comparison.arms:
        table.add_row(arm.name, *(metric_cell(arm.metrics[group][METRICS[1]]) for group in comparison.groups))
    console.print(table)


def _percent(estimate: Estimate) -> str:
    return f"{estimate.value:+.1%}\n{100 * estimate.low:+.1f}..{100 * estimate.high:+.1f}"


def plot_replay(comparison: ReplayComparison, title: str, path: Path) -> None:
    """Draw each arm's metrics over the stream's time, a panel each.

    Raises:
        InputError: it cannot be written there.
    """
    figure = new_figure(10, 12)
    times = [datetime.fromtimestamp(time / 1000, UTC) for time in comparison.times]
    figure.suptitle(f"{title}\n{comparison.events // max(len(times), 1):,} events a point")
    for axes, metric in zip(figure.subplots(len(METRICS), sharex=True), METRICS, strict=True):
        for arm in comparison.arms:
            points = arm.over_time[metric]
            axes.plot(times, points, marker="o", markersize=3, label=arm.name)  # pyright: ignore[reportArgumentType]
        axes.set_ylabel(metric)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.autofmt_xdate()
    save_figure(figure, path)
