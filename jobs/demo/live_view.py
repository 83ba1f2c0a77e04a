"""The demo on the terminal: versions, pushes, delays, traffic, and what learning live gains.

- Drawn from two values only: the visitors' `Tally` and the JSON of GET /v1/status, of which any part may be missing.
- On a terminal a layout that stays in place; anywhere else one plain line every five seconds.
"""

import math
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from jobs.demo.tally import WINDOW, Tally

LINE_EVERY_SECONDS = 5.0
RATE_OVER_SECONDS = 5.0
ROWS_ABOVE_LATEST = 22
BARS = "▁▂▃▄▅▆▇█"
UNKNOWN = "–"

Status = Mapping[str, Any] | None


class LiveView:
    """A run while it goes on; use it as a context manager and call `update` a few times a second.

    Args:
        titles: item id -> title, for the latest events; an item without one is shown by its id.
        console: where to write; standard output by default.
    """

    def __init__(self, titles: Mapping[str, str] | None = None, console: Console | None = None):
        self.titles = titles or {}
        self.console = console or Console()
        self._live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self._last_line = -math.inf
        self._samples: deque[tuple[float, int, int]] = deque()  # (seconds, events acknowledged, answers)

    def __enter__(self) -> "LiveView":
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def update(self, tally: Tally, status: Status) -> None:
        """Show the newest numbers; `status` is the JSON of GET /v1/status, or None while there is none."""
        now = time.monotonic()
        self._sample(now, tally)
        if self._live:
            self._live.update(self.render(tally, status), refresh=True)
        elif now - self._last_line >= LINE_EVERY_SECONDS:
            self._last_line = now
            self.console.print(self.line(tally, status), markup=False, highlight=False, soft_wrap=True)

    def render(self, tally: Tally, status: Status) -> RenderableType:
        """Return the whole view, for a terminal of any width from 80 columns."""
        top = Table.grid(expand=True, padding=(0, 2))
        top.add_column(ratio=1)
        top.add_column(ratio=1)
        top.add_row(self._model(tally, status), self._traffic(tally, status))
        title = f"[b]Afterclick[/b]  model version {_number(_version(tally, status))}"
        points = 30 if self.console.width >= 100 else 9
        body = Group(top, Text(), _hit_rates(tally, points), Text(), self._latest(tally))
        return Panel(body, title=title, border_style="cyan", padding=(1, 2))

    def line(self, tally: Tally, status: Status) -> str:
        """Return the most important numbers in one line of plain text."""
        events, answers = self._rates()
        live, frozen, count = tally.window_rates()
        return (
            f"version {_number(_version(tally, status))}"
            f" | pushes {_number(_part(status, 'learner', 'pushes'))}"
            f" | event to weights p50 {_duration(_part(status, 'freshness', 'p50_ms'))}"
            f" p99 {_duration(_part(status, 'freshness', 'p99_ms'))}"
            f" | {_replica_versions(status)}"
            f" | {events:.0f} events/s, {answers:.0f} answers/s | failed {tally.failed_requests}"
            f" | hit rate@{tally.k} of the last {count}: live {_rate(live)}, frozen {_rate(frozen)}"
        )

    def _sample(self, now: float, tally: Tally) -> None:
        self._samples.append((now, tally.events_acknowledged, tally.answers))
        while len(self._samples) > 2 and now - self._samples[0][0] > RATE_OVER_SECONDS:
            self._samples.popleft()

    def _rates(self) -> tuple[float, float]:
        if len(self._samples) < 2:
            return 0.0, 0.0
        (begin, events_before, answers_before), (end, events, answers) = self._samples[0], self._samples[-1]
        seconds = max(end - begin, 1e-9)
        return (events - events_before) / seconds, (answers - answers_before) / seconds

    def _model(self, tally: Tally, status: Status) -> Table:
        table = _two_columns("Model")
        learner = _part(status, "learner", "state") or UNKNOWN
        table.add_row("learner", escape(str(learner)))
        table.add_row("pushes", _number(_part(status, "learner", "pushes")))
        table.add_row("rejected updates", _number(_part(status, "learner", "rejected_updates")))
        table.add_row("events trained", _number(_part(status, "learner", "events_trained")))
        last, p50, p99 = (_duration(_part(status, "freshness", name)) for name in ("last_ms", "p50_ms", "p99_ms"))
        table.add_row("event to weights", f"{last} (p50 {p50}, p99 {p99})")
        replicas = _part(status, "replicas") or []
        for replica in replicas:
            name, checksum = str(replica.get("replica_id") or UNKNOWN), str(replica.get("checksum") or UNKNOWN)
            table.add_row(f"replica {escape(name[-8:])}", f"{_number(replica.get('version'))}  {escape(checksum[:8])}")
        if not replicas:
            table.add_row("replicas", UNKNOWN)
        return table

    def _traffic(self, tally: Tally, status: Status) -> Table:
        events, answers = self._rates()
        table = _two_columns("Traffic")
        table.add_row("events/s", f"{events:.1f}")
        table.add_row("answers/s", f"{answers:.1f}")
        table.add_row("answer time", f"p50 {_duration(tally.latency_ms(50))}, p99 {_duration(tally.latency_ms(99))}")
        table.add_row("events acknowledged", _number(tally.events_acknowledged))
        table.add_row("events waiting", _number(_part(status, "aggregator", "pending")))
        colour = "red" if tally.failed_requests else "green"
        table.add_row("failed requests", f"[{colour}]{tally.failed_requests:,}[/] of {tally.requests:,}")
        if tally.last_error:
            table.add_row("last error", f"[red]{escape(tally.last_error)}[/]")
        if tally.events_refused:
            table.add_row("events refused", f"{tally.events_refused:,}: {escape(tally.last_refusal or UNKNOWN)}")
        return table

    def _latest(self, tally: Tally) -> Table:
        table = Table.grid(padding=(0, 2))
        table.title, table.title_justify, table.title_style = "Latest events", "left", "bold"
        rows = max(3, self.console.height - ROWS_ABOVE_LATEST)  # a view taller than the terminal would be cut off
        for event, live_hit in list(reversed(tally.latest))[:rows]:
            mark = "[green]was recommended[/]" if live_hit else ""
            title = self.titles.get(event.item_id, event.item_id)
            table.add_row(f"[dim]{escape(event.user_id)}[/]", escape(event.event), escape(title), mark)
        return table


def summary(tally: Tally, status: Status) -> RenderableType:
    """Return the end of a run: hit rates with their number of trials, the paired difference, delays and failures."""
    table = _two_columns("Summary")
    live, frozen = tally.rates()
    table.add_row(f"hit rate@{tally.k}, live", f"{_rate(live)}  ({tally.hits_live:,} of {tally.trials:,} trials)")
    table.add_row(f"hit rate@{tally.k}, frozen", f"{_rate(frozen)}  ({tally.hits_frozen:,} of {tally.trials:,} trials)")
    table.add_row("difference", f"{_interval(tally)}, 95% interval, paired")
    window_live, window_frozen, count = tally.window_rates()
    table.add_row(f"last {count:,} trials", f"live {_rate(window_live)}, frozen {_rate(window_frozen)}")
    if tally.users_unsure:
        table.add_row("left out", f"users whose history a failed request left open: {tally.users_unsure:,}")
    pushes, rejected = _part(status, "learner", "pushes"), _part(status, "learner", "rejected_updates")
    version = _number(_version(tally, status))
    table.add_row("model version", f"{version} ({_number(pushes)} pushes, {_number(rejected)} updates rejected)")
    p50, p99 = (_duration(_part(status, "freshness", name)) for name in ("p50_ms", "p99_ms"))
    table.add_row("event to weights", f"p50 {p50}, p99 {p99}")
    table.add_row(
        "answers", f"{tally.answers:,}, p50 {_duration(tally.latency_ms(50))}, p99 {_duration(tally.latency_ms(99))}"
    )
    refused = f", {tally.events_refused:,} refused" if tally.events_refused else ""
    table.add_row("events", f"{tally.events_acknowledged:,} of {tally.events_sent:,} acknowledged{refused}")
    failed = f"{tally.failed_requests:,} of {tally.requests:,}"
    table.add_row("failed requests", failed + (f"; the last: {escape(tally.last_error)}" if tally.last_error else ""))
    return table


def sparkline(numbers: list[float]) -> str:
    """Return one bar a number, scaled so that the range holds all numbers and zero; empty for no numbers."""
    if not numbers:
        return ""
    low, high = min(0.0, *numbers), max(0.0, *numbers)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((number - low) * scale)] for number in numbers)


def _hit_rates(tally: Tally, points: int) -> Table:
    table = Table(
        box=None, padding=(0, 1), title=f"Hit rate@{tally.k}: was the visitor's next choice among the {tally.k} shown?"
    )
    table.title_justify, table.title_style = "left", "bold"
    table.add_column(no_wrap=True)
    for name in ("live", "frozen", "difference", "trials"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("over time", no_wrap=True)
    live, frozen = tally.rates()
    window_live, window_frozen, count = tally.window_rates()
    table.add_row("all", _rate(live), _rate(frozen), _interval(tally), _number(tally.trials), "")
    gain = _signed(window_live - window_frozen)
    spark = sparkline(list(tally.differences)[-points:])
    table.add_row(f"last {WINDOW:,}", _rate(window_live), _rate(window_frozen), gain, _number(count), spark)
    return table


def _two_columns(title: str) -> Table:
    table = Table.grid(padding=(0, 2))
    table.title, table.title_justify, table.title_style = title, "left", "bold"
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _part(status: Status, *names: str) -> Any:
    """Return what lies under the names, or None where a part is missing, as while it restarts."""
    value: Any = status
    for name in names:
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return value


def _version(tally: Tally, status: Status) -> int | None:
    version = _part(status, "model_version")
    return tally.version if version is None else version


def _replica_versions(status: Status) -> str:
    replicas = _part(status, "replicas") or []
    versions = ", ".join(_number(replica.get("version")) for replica in replicas)
    return f"{len(replicas)} replicas ({versions})" if replicas else f"{UNKNOWN} replicas"


def _number(number: int | None) -> str:
    return UNKNOWN if number is None else f"{number:,}"


def _duration(milliseconds: float | None) -> str:
    if milliseconds is None or math.isnan(milliseconds):
        return UNKNOWN
    return f"{milliseconds / 1000:.1f} s" if milliseconds >= 1000 else f"{milliseconds:.3g} ms"


def _rate(rate: float) -> str:
    return UNKNOWN if math.isnan(rate) else f"{rate:.3f}"


def _signed(difference: float) -> str:
    return UNKNOWN if math.isnan(difference) else f"{difference:+.3f}"


def _interval(tally: Tally) -> str:
    mean, low, high = tally.difference()
    return UNKNOWN if math.isnan(mean) else f"{_signed(mean)} ({_signed(low)} to {_signed(high)})"
