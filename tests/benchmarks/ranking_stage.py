"""The ranking stage by itself: milliseconds and candidates a question, as catalogs and batches grow.

    python -m tests.benchmarks.ranking_stage [--items 10000 --items 1000000 ...] [--json FILE]

An untrained model of the smallest preset, with lists of neighbours, trends and ages drawn at random (items are as
popular as those of a shop, Zipf with exponent 1), and people with 20 recent items. `encoder` is what the answer costs
without the stage: the search for the ten best items. `stage` is all sources of candidates, their features, the ranker
and the ten best. Both are seconds of one thread's CPU, the median batch. `bytes` are what the counts of an item take in
memory and on disk, `opening` is what a version costs beyond its index before it can answer.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from jobs.command_line import run_command
from jobs.configuration import write_json
from lib.data.histories import Person
from lib.model.encoder import BehaviourEncoder, BehaviourEncoderConfig
from lib.model.item_counts import WINDOW, ItemCounts
from lib.model.presets import PRESETS
from lib.ranking.features import FEATURES
from lib.ranking.fit import LEAST_NEIGHBOURS
from lib.ranking.stage import RankingStage
from lib.retrieval.index import ItemIndex, use_threads
from tests.benchmarks.machine import describe_machine

SIZES = [10_000, 100_000, 1_000_000]
BATCHES = (1, 8, 32)
ROUNDS, ANSWER = 40, 10


def popular(items: int, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draw rows of items, the nth of which has a share of about 1/n."""
    return np.minimum(np.exp(generator.random(shape) * np.log(items + 1)).astype(np.int64), items)


def fill(counts: ItemCounts, items: int, generator: np.random.Generator) -> None:
    """Make up what was counted of ten events an item."""
    own = counts.arrays()
    for name in ("next", "together"):
        lists = own[f"{name}_rows"]
        lists[1:] = popular(items, generator, lists[1:].shape)
        own[f"{name}_counts"][1:] = 10.0 / np.arange(1, lists.shape[1] + 1)
    events = 10 * items / np.arange(1, items + 1) / np.log(items)
    own["events"][1:], own["followed"][1:] = events, 3 * events
    own["trends"][1:] = events[:, None] * np.array([1e-3, 1e-2, 1e-1, 1.0])
    own["clock"][0] = 10 * items
    own["counted_at"][1:] = generator.integers(0, 10 * items, items)
    own["first_at"][1:] = generator.integers(0, 10 * items, items)


def somebody(items: int, generator: np.random.Generator) -> Person:
    """Draw a person with WINDOW recent items."""
    recent = np.unique(popular(items, generator, (3 * WINDOW,)))
    recent = generator.permutation(recent)[:WINDOW]
    ago = np.arange(len(recent), dtype=np.float32)[np.argsort(recent)]
    padded = np.pad(recent, (0, WINDOW - len(recent)))
    return Person(padded, np.sort(recent).astype(np.int32), np.ones_like(ago), ago, len(recent), 1)


def cpu_ms(work: Callable[[], Any]) -> float:
    """Return the milliseconds of CPU that a call takes."""
    start = time.process_time()
    work()
    return (time.process_time() - start) * 1e3


def measure(items: int) -> list[dict[str, Any]]:
    """Measure one catalog size; a row for each size of a batch."""
    generator = np.random.default_rng(0)
    config = BehaviourEncoderConfig(item_rows=items + 1, event_kinds=["click"], **PRESETS["small"].shape())
    encoder = BehaviourEncoder(config).eval()
    encoder.add_ranker(LEAST_NEIGHBOURS, len(FEATURES))
    assert encoder.counts is not None
    fill(encoder.counts, items, generator)
    with torch.inference_mode():
        index = ItemIndex(encoder.item_vectors().numpy())
    start = time.process_time()
    stage = RankingStage(encoder, index)
    opening = time.process_time() - start
    size = sum(array.nbytes for array in encoder.counts.arrays().values()) / (items + 1)
    results = []
    for batch in BATCHES:
        alone, whole, found = [], [], []
        for _ in range(ROUNDS):
            people = [somebody(items, generator) for _ in range(batch)]
            queries = torch.nn.functional.normalize(torch.randn(batch, config.hidden_size), dim=1)
            seen = [person.seen for person in people]
            alone.append(cpu_ms(lambda own=queries, seen=seen: index.search(own, ANSWER, None, seen)) / batch)
            candidates = stage.candidates(people, queries, ANSWER)
            found.append(len(candidates.rows) / batch)

            def answer(people: list[Person] = people, queries: torch.Tensor = queries) -> None:
                stage.rank(stage.candidates(people, queries, ANSWER), len(people), ANSWER)

            whole.append(cpu_ms(answer) / batch)
        results.append(
            {
                "items": items,
                "batch": batch,
                "candidates": statistics.median(found),
                "encoder_ms": statistics.median(alone),
                "stage_ms": statistics.median(whole),
                "bytes_an_item": size,
                "opening_seconds": opening,
            }
        )
    return results


def benchmark(
    items: Annotated[list[int] | None, typer.Option(help="Size of a catalog; repeatable.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Measure the ranking stage."""
    machine = describe_machine()
    use_threads(1)
    torch.manual_seed(0)
    table = Table("items", "batch", "candidates", "encoder ms", "stage ms", "bytes", "opening s")
    results = []
    for count in items or SIZES:
        for row in measure(count):
            results.append(row)
            times = f"{row['encoder_ms']:.3f}", f"{row['stage_ms']:.3f}"
            rest = f"{row['bytes_an_item']:,.0f}", f"{row['opening_seconds']:.2f}"
            table.add_row(f"{row['items']:,}", str(row["batch"]), f"{row['candidates']:,.0f}", *times, *rest)
    Console().print(table)
    if json_file is not None:
        write_json(json_file, {"machine": machine, "results": results})


if __name__ == "__main__":
    run_command(benchmark)
