"""What live items cost: single puts one after another, and many new items at once in a large catalog.

    python -m tests.benchmarks.live_items [--items 1000000] [--puts 10000] [--new 1000] [--json FILE]

Items have a brand, a category, a price and a text of 20 words (Zipf); the model is an untrained one, the preset small,
with the counts and the ranker of a pretrained one.
`puts`: one item a call, half of them new, each followed by a filter and by one by a word of the text: the median and
the 99th percentile of each tenth of the calls.
`new`: the steps from the item log to the first answer that holds a new item, in one process: a push over the network is
not in them. The model either reads attributes, and new items start as those that share most of them, or it does not,
and they start as those that share the rarest words.
`text`: one call of 1,000 items that have 16 MB of text together: how long answers wait for it, and when its words are
found.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import torch
import typer
from rich.console import Console
from rich.table import Table

from jobs.command_line import run_command
from jobs.configuration import write_json
from lib.data.attributes import attribute_codes, attribute_values
from lib.data.catalog import Catalog
from lib.data.events import Event
from lib.data.history import History
from lib.live.learner import NearlineLearner
from lib.live.settings import LearnerConfig
from lib.log.items import ItemLog
from lib.model.encoder import BehaviourEncoder, BehaviourEncoderConfig
from lib.model.folder import Manifest
from lib.model.presets import PRESETS
from lib.ranking.features import FEATURES
from lib.ranking.filters import ItemFilter
from lib.ranking.fit import LEAST_NEIGHBOURS
from lib.ranking.recommender import Question, Recommender
from lib.versions.registry import Registry
from tests.benchmarks.machine import describe_machine

WORDS, VOCABULARY, BRANDS, CATEGORIES = 20, 50_000, 2000, 200


def described(count: int, generator: np.random.Generator, first: int = 0) -> pa.Table:
    """Describe so many items."""
    words = np.minimum(generator.zipf(1.2, (count, WORDS)), VOCABULARY)
    return pa.table(
        {
            "item_id": [f"i{number}" for number in range(first, first + count)],
            "brand": [f"Brand {number}" for number in generator.integers(0, BRANDS, count).tolist()],
            "category": [f"Category {number}" for number in generator.integers(0, CATEGORIES, count).tolist()],
            "price": generator.integers(1, 100_000, count) / 100,
            "about": [" ".join(f"w{word}" for word in own) for own in words.tolist()],
        }
    )


def as_put(items: pa.Table) -> list[tuple[str, dict[str, Any] | None]]:
    """Return items as the item log takes them."""
    return [(item.pop("item_id"), item) for item in items.to_pylist()]


def model_of(items: pa.Table, read: bool) -> tuple[BehaviourEncoder, Catalog]:
    """Make an untrained model of these items, which reads their attributes or does not."""
    catalog = Catalog(items["item_id"].to_pylist(), items)
    values = attribute_values(catalog) if read else []
    codes = attribute_codes(catalog, values, 4)
    config = BehaviourEncoderConfig(
        item_rows=len(items) + 1,
        event_kinds=["click"],
        attribute_values=values,
        attributes_per_item=4,
        **PRESETS["small"].shape(),
    )
    torch.manual_seed(0)
    encoder = BehaviourEncoder(config)
    encoder.add_ranker(LEAST_NEIGHBOURS, len(FEATURES))
    encoder.item_attributes.copy_(torch.from_numpy(codes))
    return encoder, catalog


@contextmanager
def timed(times: dict[str, list[float]], name: str) -> Iterator[None]:
    """Note how many milliseconds a block takes."""
    start = time.perf_counter()
    yield
    times.setdefault(name, []).append((time.perf_counter() - start) * 1e3)


def measure_puts(folder: Path, items: pa.Table, puts: int) -> dict[str, Any]:
    """Put items one by one; return for each step the median and 99th percentile of each tenth of the calls, in ms."""
    generator = np.random.default_rng(1)
    log = ItemLog(folder / "items.sqlite")
    catalog = Catalog(items["item_id"].to_pylist(), items)
    conditions = {"brand": [f"Brand {number}" for number in range(500)], "price": {"max": 500}}
    times: dict[str, list[float]] = {}
    by_word = {"about": "w17"}
    with timed(times, "index"):
        catalog.table.prepare(conditions | by_word)
    for number in range(puts):
        put = as_put(described(1, generator, first=number // 2 if number % 2 else len(items) + number))
        with timed(times, "item log"):
            log.append(put)
        with timed(times, "catalog"):
            catalog.change(dict(put))
        with timed(times, "filter of 500 brands"):
            catalog.mask(conditions)
        with timed(times, "filter by a word"):
            catalog.mask(by_word)
    log.close()
    [index] = times.pop("index")
    tenths = {step: np.array_split(ms, 10) for step, ms in times.items()}
    return {"index_ms": index} | {
        step: [{"p50_ms": float(np.median(own)), "p99_ms": float(np.percentile(own, 99))} for own in parts]
        for step, parts in tenths.items()
    }


def measure_text(items: pa.Table) -> dict[str, float]:
    """Put 1,000 items of 16 MB of text in one call; return the seconds that answers wait, and until it is found."""
    catalog = Catalog(items["item_id"].to_pylist(), items)
    catalog.table.prepare({"about": "w17"})
    put = {f"text{number}": {"about": " ".join(f"t{number}x{word}" for word in range(1900))} for number in range(1000)}
    times: dict[str, list[float]] = {}
    with timed(times, "found"):
        with timed(times, "waits"):
            catalog.change(put, texts_later=True)
        catalog.table.catch_up()
    catalog.extend(put)
    assert catalog.mask({"about": "t7x1899"}).sum() == 1
    megabytes = sum(len(own["about"]) for own in put.values()) / 2**20
    return {"megabytes": megabytes} | {f"{name}_s": ms / 1e3 for name, [ms] in times.items()}


def measure_new(folder: Path, items: pa.Table, new: int, read: bool) -> dict[str, Any]:
    """Put many new items at once, twice; return the milliseconds of each step of each time."""
    encoder, catalog = model_of(items, read)
    registry = Registry(folder / "live")
    registry.publish_snapshot(encoder, catalog, Manifest(version=1), None)
    learner = NearlineLearner(registry, LearnerConfig())
    loaded = registry.load(1)
    replica = Recommender(loaded.encoder, loaded.catalog, loaded.version)
    log = ItemLog(folder / "items.sqlite")
    history = History.of([Event("u", f"i{number}", "click", None, number) for number in range(20)])
    found = []
    for turn in range(2):
        put = as_put(described(new, np.random.default_rng(2 + turn), first=len(items) + turn * new))
        times: dict[str, list[float]] = {}
        with timed(times, "item log"):
            revision = log.append(put) - len(put)
        with timed(times, "learner"):
            delta = learner.change_items(log.after(revision))
        assert delta is not None
        with timed(times, "replica"):
            replica.change_items(dict(put))
            replica.apply(delta)
        with timed(times, "answer"):
            [answer] = replica.recommend([Question(history, 10, ItemFilter.of({"allow": [name for name, _ in put]}))])
        assert len(answer) == 10
        found.append({name: value[0] for name, value in times.items()})
    log.close()
    return {"read": read, "first": found[0], "second": found[1]}


def benchmark(
    items: Annotated[int, typer.Option(min=1000, help="Items of the catalog.")] = 1_000_000,
    puts: Annotated[int, typer.Option(min=10, help="Single puts.")] = 10_000,
    new: Annotated[int, typer.Option(min=10, help="New items at once.")] = 1000,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Measure single puts, and new items in a large catalog."""
    machine = describe_machine()
    torch.set_num_threads(1)
    every = described(items, np.random.default_rng(0))
    with tempfile.TemporaryDirectory() as folder:
        single = measure_puts(Path(folder), every, puts)
    text = measure_text(every)
    many = []
    for read in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            many.append(measure_new(Path(folder), every, new, read))
    index = single.pop("index_ms")
    if json_file is not None:
        write_json(
            json_file,
            {"machine": machine, "items": items, "index_ms": index, "puts": single, "text": text, "new": many},
        )
    console = Console()
    table = Table("puts", *single, title=f"{puts:,} single puts among {items:,} items: p50 and p99 of each step, ms")
    for place, tenth in enumerate(zip(*single.values(), strict=True)):
        table.add_row(
            f"to {(place + 1) * puts // 10:,}", *(f"{step['p50_ms']:.2f} {step['p99_ms']:.2f}" for step in tenth)
        )
    console.print(table)
    console.print(f"the indexes of the filters took {index:.0f} ms, once, beside the answers")
    console.print(
        f"one put of {text['megabytes']:.0f} MB of text: answers wait {text['waits_s']:.3f} s, its words are found "
        f"after {text['found_s']:.1f} s"
    )
    table = Table(
        "model reads attributes", "time", *many[0]["first"], "together, ms", title=f"{new:,} new items at once"
    )
    for result in many:
        for turn in ("first", "second"):
            steps = result[turn].values()
            table.add_row(str(result["read"]), turn, *(f"{ms:.0f}" for ms in steps), f"{sum(steps):.0f}")
    console.print(table)


if __name__ == "__main__":
    run_command(benchmark)
