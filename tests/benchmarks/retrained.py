"""Live learning beside retraining: a model trained from scratch on all events up to the moment.

    python -m tests.benchmarks.retrained --data DATA [--at 0.7 --at 0.8 --at 0.9] [--events 4000] [--json FILE]

The replay (lib/live/prequential.py) pretrains on the oldest 60% of the events and learns the rest live. At each cut a
rival is pretrained on all events before it, as in a shop that has just trained from scratch. Then the events that
follow are answered with growing histories: by the live weights as they learn, and by those of the rival and of the
first pretraining as they are.
"""

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from cluster.local import running_ray
from jobs.command_line import run_command
from jobs.configuration import write_json
from jobs.pretrain import pretrain
from jobs.pretrain_settings import PretrainSettings
from lib.data.dataset import read_events, read_items, read_rating_scale, write_dataset
from lib.live.prequential import Frozen, Live, Outcome, Stream, replay, split_by_time
from lib.live.prequential_comparison import compare_arms
from lib.live.settings import LearnerConfig
from lib.model.trainer import keep_freed_memory
from tests.benchmarks.machine import describe_machine

SHARE = 0.6  # of the events, the oldest, on which the first weights are pretrained


def pretrained(data: Path, stream: Stream, folder: Path) -> tuple[Path, float]:
    """Pretrain on a stream's oldest events with the defaults; return the model's folder and the seconds it took."""
    write_dataset(folder / "data", stream.oldest, read_items(data), read_rating_scale(data))
    begin = time.perf_counter()
    pretrain(folder / "data", folder / "model", PretrainSettings(holdout="none"))
    return folder / "model", time.perf_counter() - begin


def part_of(outcome: Outcome, first: int, count: int) -> Outcome:
    """Return the outcome of some consecutive events."""
    return Outcome(outcome.ranks[first : first + count])


def retrained_command(
    data: Annotated[Path, typer.Option(help="Ingested dataset.")],
    at: Annotated[list[float] | None, typer.Option(help="Shares of the events where a rival is trained.")] = None,
    events: Annotated[int, typer.Option(min=100, help="Answered after each cut.")] = 4000,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the results there.")] = None,
) -> None:
    """Measure NDCG@10 of frozen, live and retrained weights on the events after each cut."""
    machine = describe_machine()
    torch.set_num_threads(1)
    keep_freed_memory()
    every = read_events(data)
    stream = split_by_time(every, SHARE)
    exclude_seen = not stream.repeats
    table = Table("cut", "events", "weights", "NDCG@10", "over frozen", "seconds")
    results: list[dict[str, Any]] = []
    with running_ray(), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, _ = pretrained(data, stream, folder / "first")
        frozen = replay(stream, Frozen(model, exclude_seen))
        live = replay(stream, Live(model, folder / "state", LearnerConfig(), exclude_seen))
        for cut in at or [0.7, 0.8, 0.9]:
            after = split_by_time(every, cut)
            window = Stream(after.oldest, after.newest.slice(0, events))
            rival, seconds = pretrained(data, after, folder / f"{cut}")
            first, count = len(after.oldest) - len(stream.oldest), len(window.newest)
            outcomes = {
                "history": part_of(frozen, first, count),
                "live": part_of(live, first, count),
                "retrained": replay(window, Frozen(rival, exclude_seen)),
            }
            comparison = compare_arms(window, outcomes)
            results.append({"cut": cut, "retraining_seconds": seconds} | comparison.as_json())
            for arm in comparison.arms:
                found, lift = arm.metrics["all"]["ndcg@10"], arm.lift.get("ndcg@10")
                table.add_row(
                    f"{cut:.0%}",
                    f"{count:,}",
                    arm.name,
                    f"{found.value:.4f} ({found.low:.4f}-{found.high:.4f})",
                    "" if lift is None else f"{lift.value:+.1%} ({lift.low:+.1%} to {lift.high:+.1%})",
                    f"{seconds:.0f}" if arm.name == "retrained" else "",
                )
    Console().print(table)
    if json_ is not None:
        facts = {"machine": machine, "data": str(data), "live": live.facts}
        write_json(json_, facts | {"cuts": results})


if __name__ == "__main__":
    run_command(retrained_command)
