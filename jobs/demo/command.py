"""The demo: a shop whose recommendations learn from clicks, on this machine, without any download.

    python -m jobs.demo [--seconds N] [--data DATA]

It makes a synthetic shop (jobs/demo/shop.py says what is synthetic), pretrains on its history, serves, and lets
simulated visitors click. The same visitors ask a second copy of the model whose weights stay as they were: the
difference of the two hit rates is what learning live is worth. With --data an ingested dataset takes the shop's place:
its oldest 80% of events is trained on, the newest 20% is replayed.
"""

import asyncio
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import pyarrow as pa
import typer
from rich.console import Console

from cluster.local import free_port, require_free_port, running_ray
from jobs.demo.live_view import LiveView, summary
from jobs.demo.shop import Shop
from jobs.demo.visitors import Frozen, PastEvent, ReplaySource, ShopSource, Source, Tally, histories_of, run_visitors
from jobs.pretrain import PretrainSettings, pretrain
from jobs.service import running_service
from lib.data.dataset import read_events, read_items, write_dataset
from lib.data.history import History
from lib.data.holdout import NONE
from lib.live.prequential import split_by_time
from lib.ranking.recommender import Question, Recommender
from lib.retrieval.index import use_threads
from serving.app import ServeArguments

REPLAYED_SHARE = 0.2
SHOP_EPOCHS = 8  # of the shop's 60,000 events: half a minute on two cores, and past the steep part of the curve
REFRESH_SECONDS = 0.5


@dataclass(frozen=True)
class World:
    """What the demo runs on: a dataset that is trained on, and what happens after it."""

    data: Path
    events: pa.Table
    source: Source
    titles: dict[str, str]
    settings: PretrainSettings


def shop_world(folder: Path, seed: int) -> World:
    """The synthetic shop."""
    shop = Shop(seed=seed)
    shop.write_dataset(folder)
    settings = PretrainSettings(holdout=NONE, epochs=SHOP_EPOCHS)
    return World(folder, shop.history, ShopSource(shop), shop.titles, settings)


def replay_world(data: Path, folder: Path) -> World:
    """An ingested dataset, split by time: the oldest events to train on, the newest to replay.

    Raises:
        InputError: it has too few events to split.
    """
    stream, items = split_by_time(read_events(data), 1 - REPLAYED_SHARE), read_items(data)
    write_dataset(folder, stream.oldest, items)
    titles: dict[str, str] = {}
    if items is not None and "title" in items.column_names:
        titles = dict(zip(items["item_id"].to_pylist(), items["title"].to_pylist(), strict=True))
    return World(folder, stream.oldest, ReplaySource(stream.newest), titles, PretrainSettings(holdout=NONE))


def frozen_model(model: Path) -> Frozen:
    """The model as it was before the first click; its weights never change."""
    use_threads(1)  # the cores belong to the service
    recommender = Recommender.load(model)
    busy = threading.Lock()

    def recommend(histories: list[list[PastEvent]], k: int) -> list[list[str]]:
        questions = [Question(_history(history), k) for history in histories]
        with busy:
            return [[item.item_id for item in items] for items in recommender.recommend(questions)]

    return recommend


def _history(events: list[PastEvent]) -> History:
    return History(
        [event.item_id for event in events],
        [event.kind for event in events],
        [event.value for event in events],
        [event.timestamp for event in events],
        [0] * len(events),
    )


async def run_live(
    url: str, world: World, frozen: Frozen, seconds: float | None, view: LiveView, interrupted: Callable[[], bool]
) -> tuple[Tally, dict[str, Any]]:
    """Visitors click until the time is up, the source ends or Ctrl-C; returns the tally and the last status."""
    tally, stop = Tally(), asyncio.Event()
    visitors = asyncio.create_task(
        run_visitors(url, world.source, frozen, tally, stop, histories=histories_of(world.events))
    )
    deadline = time.monotonic() + seconds if seconds is not None else float("inf")
    status: dict[str, Any] = {}
    async with httpx.AsyncClient(base_url=url, timeout=10) as client:
        while not visitors.done() and time.monotonic() < deadline and not interrupted():
            status = (await client.get("/v1/status")).raise_for_status().json()
            view.update(tally, status)
            await asyncio.wait([visitors], timeout=REFRESH_SECONDS)
        stop.set()
        await visitors
        status = (await client.get("/v1/status")).raise_for_status().json()
    view.update(tally, status)
    return tally, status


def demo_command(
    seconds: Annotated[float | None, typer.Option(min=1, help="Stop after so many seconds of clicks.")] = None,
    data: Annotated[Path | None, typer.Option(help="Replay an ingested dataset instead of the shop.")] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Inference replicas.")] = 2,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="HTTP port; a free one by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of the synthetic shop.")] = 0,
) -> None:
    """Show the loop: pretrain, serve, click, learn, push; live against frozen weights."""
    console = Console()
    if port is not None:
        require_free_port(port)
    stop = threading.Event()
    folder = Path(tempfile.mkdtemp(prefix="afterclick-demo-"))
    try:
        console.print("making the world" if data is None else f"splitting {data}")
        world = shop_world(folder / "data", seed) if data is None else replay_world(data, folder / "data")
        with running_ray():
            console.print(f"pretraining on {len(world.events):,} events")
            begin = time.monotonic()
            pretrain(world.data, folder / "model", world.settings)
            console.print(f"pretrained in {time.monotonic() - begin:.0f} s; starting {replicas} replicas")
            arguments = ServeArguments(model=str(folder / "model"), data=str(world.data), replicas=replicas)
            with running_service(arguments, port or free_port()) as url:
                console.print(f"serving at {url} (open it to click along)  Ctrl-C stops")
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, lambda *_: stop.set())
                with LiveView(world.titles, console) as view:
                    frozen = frozen_model(folder / "model")
                    tally, status = asyncio.run(run_live(url, world, frozen, seconds, view, stop.is_set))
                console.print(summary(tally, status))
    finally:
        shutil.rmtree(folder)
