"""Comparisons for people: tables for the terminal, and figures as PNG files, drawn without a display."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.tables import print_table
from lib.errors import InputError
from lib.evaluation.comparison import WHOLE, Breakdown, Comparison, Estimate
from lib.evaluation.metrics import LEVEL, RESAMPLES
from lib.live.prequential_comparison import BASE, METRICS, ReplayComparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = f"second lines: {LEVEL:.0%} intervals, {RESAMPLES:,} resamples of the users"
HEADINGS = {
    "activity": "events of the user before the target",
    "item_popularity": "popularity of the target in training",
}


def print_comparison(comparison: Comparison, title: str) -> None:
    """Print the contenders' metrics, their differences from the first, and ndcg of each bucket of cases."""
    names = list(comparison.results[0].metrics)
    rows = [[result.name, *(metric_cell(result.metrics[name]) for name in names)] for result in comparison.results]
    print_table(["", *names], rows, title)
    print(f"{CAPTION}\n")
    if len(comparison.results) > 1:
        names = list(comparison.results[1].differences)
        rows = [
            [result.name, *(metric_cell(result.differences[name], signed=True) for name in names)]
            for result in comparison.results[1:]
        ]
        print_table(["", *names], rows, f"difference from {comparison.results[0].name}, paired")
    for place, breakdown in enumerate(comparison.breakdowns):
        metric = ndcg_name(comparison)
        rows = [
            [result.name, *(metric_cell(bucket[metric]) for bucket in result.breakdowns[place])]
            for result in comparison.results
        ]
        print_table(["", *bucket_names(breakdown)], rows, f"{metric} by {HEADINGS[breakdown.by]}")


def ndcg_name(comparison: Comparison) -> str:
    """Name ndcg@k."""
    return next(name for name in comparison.results[0].metrics if name.startswith("ndcg@"))


def bucket_names(breakdown: Breakdown) -> list[str]:
    """Label, items where it is of items, and number of cases, a line each."""
    sizes = (
        [f"\n{items:,} items" for items in breakdown.items]
        if breakdown.items is not None
        else [""] * len(breakdown.labels)
    )
    return [
        f"{label}{size}\n{cases:,} cases"
        for label, size, cases in zip(breakdown.labels, sizes, breakdown.cases, strict=True)
    ]


def metric_cell(estimate: Estimate, signed: bool = False) -> str:
    """Write the value, and in a second line its interval."""
    if math.isnan(estimate.value):
        return "-"
    value = f"{estimate.value:{'+' if signed else ''}.4f}"
    if math.isnan(estimate.low):
        return value
    separator = ".." if signed else "-"
    return f"{value}\n{_bound(estimate.low, signed)}{separator}{_bound(estimate.high, signed)}"


def _bound(value: float, signed: bool) -> str:
    """Write three digits, without the 0 before the point: six columns with intervals have to fit into 80 characters."""
    sign = "+" if signed else ""
    return f"{value:{sign}.2f}" if abs(value) >= 1 else f"{value:{sign}.3f}".replace("0.", ".", 1)


def plot_comparison(comparison: Comparison, title: str, path: Path) -> None:
    """Draw recall and ndcg of each contender, and ndcg by activity and by item popularity, with their intervals.

    Raises:
        InputError: it cannot be written there.
    """
    figure = new_figure(16, 5.5)
    figure.suptitle(f"{title}; lines: {LEVEL:.0%} intervals")
    panels = figure.subplots(1, 1 + len(comparison.breakdowns))
    metrics = [name for name in comparison.results[0].metrics if name.startswith(("recall@", "ndcg@"))]
    _bars(panels[0], metrics, [(r.name, [r.metrics[name] for name in metrics]) for r in comparison.results])
    panels[0].set_title("all cases")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    metric = ndcg_name(comparison)
    for place, breakdown in enumerate(comparison.breakdowns):
        series = [(r.name, [bucket[metric] for bucket in r.breakdowns[place]]) for r in comparison.results]
        _bars(panels[place + 1], bucket_names(breakdown), series)
        panels[place + 1].set_title(f"{metric} by {HEADINGS[breakdown.by]}")
    save_figure(figure, path)


def _bars(axes: "Axes", groups: Sequence[str], series: Sequence[tuple[str, list[Estimate]]]) -> None:
    """Draw groups of bars, one of each contender, with error bars."""
    width = 0.8 / len(series)
    for place, (name, estimates) in enumerate(series):
        centres = [group + (place - (len(series) - 1) / 2) * width for group in range(len(groups))]
        values = [0.0 if math.isnan(e.value) else e.value for e in estimates]
        down = [0.0 if math.isnan(e.low) else max(e.value - e.low, 0.0) for e in estimates]
        up = [0.0 if math.isnan(e.high) else max(e.high - e.value, 0.0) for e in estimates]
        axes.bar(
            centres,
            values,
            width * 0.92,
            label=name,
            yerr=[down, up],
            error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#333333"},
        )
    axes.set_xticks(range(len(groups)), groups, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def print_replay(comparison: ReplayComparison, title: str) -> None:
    """Print each arm's metrics, its lift, the groups, and what learning cost."""
    rows = []
    for arm in comparison.arms:
        lift = _percent(arm.lift[METRICS[1]]) if arm.lift else "-"
        cost = (f"{arm.facts[name]:,.0f}" if name in arm.facts else "-" for name in ("learn_seconds", "events_read"))
        rows.append([arm.name, *(metric_cell(arm.metrics["all"][name]) for name in METRICS), lift, *cost])
    print_table(["", *METRICS, f"{METRICS[1]}\nover {BASE}", "CPU s", "events read"], rows, title)
    print(f"{CAPTION}\n")
    groups = [f"{name}\n{events:,} events" for name, events in comparison.groups.items()]
    rows = [
        [arm.name, *(metric_cell(arm.metrics[group][METRICS[1]]) for group in comparison.groups)]
        for arm in comparison.arms
    ]
    print_table(["", *groups], rows, f"{METRICS[1]} of groups")
    arms = [arm for arm in comparison.arms if arm.sources]
    if arms:
        names = ["", *(arm.name for arm in arms)]
        rows = [[WHOLE, *(metric_cell(arm.metrics["all"][METRICS[1]]) for arm in arms)]]
        differences = []
        for name in arms[0].sources:
            own = [arm.sources[name] for arm in arms]
            rows.append([name, *(metric_cell(source.metrics[METRICS[1]]) for source in own)])
            differences.append([name, *(metric_cell(source.difference[METRICS[1]], signed=True) for source in own)])
        print_table(names, rows, f"{METRICS[1]} of each source of candidates alone")
        print_table(names, differences, f"difference from the {WHOLE}, paired")


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


def check_plot(path: Path | None) -> None:
    """Refuse a name that is no PNG file's, before anything is computed.

    Raises:
        InputError: it does not end in .png.
    """
    if path is not None and path.suffix.lower() != ".png":
        raise InputError(f"plot: {path} is no PNG file; give a name that ends in .png")


def new_figure(width: float, height: float) -> "Figure":
    """Make an empty figure, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes a second to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a PNG file; folders on the way are made.

    Raises:
        InputError: it cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise InputError(f"plot: {path} cannot be written ({error.strerror}); name another file") from error
