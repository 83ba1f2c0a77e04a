"""What poisoned feedback does to the recommendations of honest people, with and without the gate and the limits.

    python -m tests.benchmarks.attacks --data DATA [--live 20000] [--epochs 20] [--json FILE]

A model is pretrained on the oldest 60% of the events, in this process; the rest streams in (tests/helpers/streams.py),
honest or attacked: one user clicks 5,000 times, a thousand users push one item, 200 users send 5,000 random events, or
the learning rate is a hundred times too high for a tenth of the updates. Each honest event is ranked among all items
before anything learns from it. The honest stream also shows how many updates are rejected without a cause, and what the
limits cost.
"""

import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from jobs.command_line import run_command
from jobs.configuration import write_json
from lib.data.dataset import read_events, read_items
from lib.data.guard import CleaningRules
from lib.data.tables import events_of
from lib.live.gate import GateConfig
from lib.live.influence import InfluenceLimits
from lib.live.prequential import split_by_time
from lib.live.settings import LearnerConfig
from lib.versions.registry import Registry
from tests.benchmarks.machine import describe_machine
from tests.helpers.streams import ATTACKS, LiveStream, Outcome, World, pretrained

OPEN = float("1e9")
UNGUARDED = LearnerConfig(
    gate=GateConfig(held_out_users=0, reference_users=0, loss_tolerance=OPEN, movement_tolerance=OPEN),
    influence=InfluenceLimits(user_limit=OPEN, newcomer_share=OPEN, item_limit=OPEN),
)
UNCLEANED = CleaningRules(flood_events=1_000_000, rate_events=0, repeat_events=0, opinion_changes=0, crowd_users=0)


def run(world: World, base: Path, attack: str | None, guarded: bool) -> tuple[Outcome, float]:
    """Run one stream on a copy of the base version; return its outcome and the seconds of CPU that it took."""
    config, rules = (LearnerConfig(), CleaningRules()) if guarded else (UNGUARDED, UNCLEANED)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(base, folder, dirs_exist_ok=True)
        stream = LiveStream(world, Registry(folder), config, rules)
        begin = time.process_time()
        return stream.run(world, attack), time.process_time() - begin


def attacks_command(
    data: Annotated[Path, typer.Option(help="Ingested dataset.")],
    live: Annotated[int, typer.Option(min=1000, help="Honest events of the stream.")] = 20_000,
    epochs: Annotated[int, typer.Option(min=1, help="Of pretraining.")] = 20,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the results there.")] = None,
) -> None:
    """Measure what each attack does, unguarded and guarded."""
    torch.set_num_threads(1)
    machine = describe_machine()
    stream = split_by_time(read_events(data), 0.6)
    world = World(events_of(stream.oldest), events_of(stream.newest)[:live], read_items(data))
    table = Table("stream", "guarded", "NDCG@10", "of the honest", "after it", "cleaned away", "rejected", "seconds")
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        pretrained(world, base, epochs, hidden_size=64, max_length=50)
        for guarded in (False, True):
            honest: Outcome | None = None
            for attack in (None, *ATTACKS):
                outcome, seconds = run(world, base, attack, guarded)
                honest = honest or outcome
                result = {
                    "attack": attack,
                    "guarded": guarded,
                    "ndcg@10": outcome.quality,
                    "of_honest": outcome.relative_to(honest),
                    "of_honest_after": outcome.relative_to(honest, last=0.5),
                    "refused": dict(outcome.refused),
                    "updates": outcome.updates,
                    "rejections": [asdict(rejection) | {"delta": None} for _, rejection in outcome.rejections],
                    "cpu_seconds": seconds,
                }
                results.append(result)
                table.add_row(
                    attack or "honest",
                    "yes" if guarded else "no",
                    f"{outcome.quality:.4f}",
                    f"{result['of_honest'] - 1:+.1%}",
                    f"{result['of_honest_after'] - 1:+.1%}",
                    str(outcome.refused.total()),
                    f"{len(outcome.rejections)} of {outcome.updates}",
                    f"{seconds:.0f}",
                )
                Console().print(f"{attack or 'honest'}: {outcome.quality:.4f} in {seconds:.0f} s")
    Console().print(table)
    if json_ is not None:
        write_json(json_, {"machine": machine, "data": str(data), "live": len(world.live), "results": results})


if __name__ == "__main__":
    run_command(attacks_command)
