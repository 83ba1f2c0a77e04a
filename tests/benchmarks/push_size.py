"""The bytes of a near-line push beside those of a snapshot, as models and catalogs grow.

    python -m tests.benchmarks.push_size [--model small,100000 --model large,20000 ...] [--json FILE]

Each model is a preset of pretraining with so many items and full lists of neighbours, untrained: sizes do not depend on
the weights. A micro-batch has 64 events of users with full histories, and the default replay sample; items are as
popular as those of a shop (Zipf, exponent 1). `equal` compares the checksum of a copy that applied every delta with the
learner's.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from jobs.command_line import run_command
from jobs.configuration import write_json
from lib.data.catalog import Catalog
from lib.data.events import Event
from lib.data.user_histories import UserHistories
from lib.live.gate import GateConfig
from lib.live.learner import NearlineLearner, Rejection
from lib.live.micro_batch import micro_batch
from lib.live.settings import LearnerConfig
from lib.log.log_file import LoggedEvent
from lib.model.delta import Delta, apply_delta
from lib.model.encoder import BehaviourEncoder, BehaviourEncoderConfig
from lib.model.fingerprint import fingerprint
from lib.model.folder import Manifest
from lib.model.presets import PRESETS
from lib.ranking.features import FEATURES
from lib.ranking.fit import LEAST_NEIGHBOURS
from lib.versions.registry import Registry
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.ranking_stage import fill

MODELS = ["small,100000", "base,100000", "large,100000"]
USERS, HISTORY, BATCH = 500, 60, 64


def random_events(items: int, generator: np.random.Generator, count: int) -> list[Event]:
    """Draw clicks of random users on items, the nth of which has a share of 1/n."""
    popularity = 1.0 / np.arange(1, items + 1)
    chosen = generator.choice(items, count, p=popularity / popularity.sum()).tolist()
    users = generator.integers(0, USERS, count).tolist()
    pairs = zip(users, chosen, strict=True)
    return [Event(f"u{user}", f"i{item}", "click", None, n) for n, (user, item) in enumerate(pairs)]


def measure(preset: str, items: int, updates: int) -> dict[str, Any]:
    """Measure some updates; return medians."""
    config = BehaviourEncoderConfig(item_rows=items + 1, event_kinds=["click"], **PRESETS[preset].shape())
    encoder, catalog = BehaviourEncoder(config), Catalog(f"i{item}" for item in range(items))
    generator = np.random.default_rng(0)
    encoder.add_ranker(LEAST_NEIGHBOURS, len(FEATURES))
    assert encoder.counts is not None
    fill(encoder.counts, items, generator)
    events = random_events(items, generator, USERS * HISTORY + updates * BATCH)
    histories = UserHistories()
    for event in events[: USERS * HISTORY]:
        histories.append(event)
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        registry = Registry(folder)
        registry.publish_snapshot(encoder, catalog, Manifest(version=1), None)
        snapshot = sum(path.stat().st_size for path in Path(folder).rglob("model.safetensors"))
        # the gate is open: an untrained model has nothing to lose
        learner = NearlineLearner(registry, LearnerConfig(gate=GateConfig(loss_tolerance=1e3, quality_tolerance=1e3)))
        for number in range(updates):
            start, new = number * BATCH, events[USERS * HISTORY + number * BATCH :][:BATCH]
            logged = [LoggedEvent(start + place + 1, event, 0) for place, event in enumerate(new)]
            for entry in logged:
                histories.append(entry.event, entry.offset)
            batch = micro_batch(logged, start, histories, learner.sample_sizes, generator)
            began = time.process_time()
            delta = learner.learn(batch)
            learned = time.process_time()
            assert not isinstance(delta, Rejection), delta.reason
            data = delta.to_bytes()
            built = time.process_time()
            apply_delta(encoder, Delta.from_bytes(data))
            applied = time.process_time()
            rows.append(
                {
                    "bytes": len(data),
                    "rows": len(delta.rows),
                    "learn_ms": (learned - began) * 1e3,
                    "build_ms": (built - learned) * 1e3,
                    "apply_ms": (applied - built) * 1e3,
                }
            )
    return {
        "preset": preset,
        "items": items,
        "snapshot_bytes": snapshot,
        **{name: statistics.median(row[name] for row in rows) for name in rows[0]},
        "trained_bytes": sum(p.nbytes for p in learner.model.trainer.dense.values()),
        "checksums_equal": fingerprint(encoder) == learner.model.checksum,
    }


def benchmark(
    model: Annotated[list[str] | None, typer.Option(help="PRESET,ITEMS; repeatable.")] = None,
    updates: Annotated[int, typer.Option(min=1)] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Measure the bytes of pushes."""
    machine = describe_machine()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    headings = ("model", "items", "snapshot MB", "trained MB", "rows", "push MB", "share")
    table = Table(*headings, "learn ms", "build ms", "apply ms", "equal")
    results = []
    for name in model or MODELS:
        preset, items = name.split(",")
        row = measure(preset, int(items), updates)
        results.append(row)
        sizes = (f"{row[size] / 1e6:.2f}" for size in ("snapshot_bytes", "trained_bytes"))
        times = (f"{row[part]:.0f}" for part in ("learn_ms", "build_ms", "apply_ms"))
        share = f"{row['bytes'] / row['snapshot_bytes']:.1%}"
        size = f"{row['bytes'] / 1e6:.2f}"
        counts = preset, f"{row['items']:,}", *sizes, f"{row['rows']:,.0f}"
        table.add_row(*counts, size, share, *times, str(row["checksums_equal"]))
    Console().print(table)
    if json_file is not None:
        write_json(json_file, {"machine": machine, "results": results})


if __name__ == "__main__":
    run_command(benchmark)
