"""The demo: a shop whose recommendations learn from clicks, on this machine, without any download.

    python -m jobs.demo [--seconds N] [--data DATA]

It makes a synthetic shop (jobs/demo/shop.py says what is synthetic), pretrains on its history, serves, and lets
simulated visitors click. The same visitors ask a second copy of the model whose weights stay as they were: the
difference of the two hit rates is what learning live gains. With --data an ingested dataset takes the shop's place:
its oldest 80% of events is trained on, the newest 20% is replayed.
"""

import asyncio
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import typer
from rich.console import Console

from cluster.local import free_port, require_free_port, running_ray

if TYPE_CHECKING:
    from jobs.demo.frozen import Frozen
    from jobs.demo.live_view import LiveView
    from jobs.demo.tally import Tally
    from jobs.demo.worlds import World

REFRESH_SECONDS = 0.5


def demo_command(
    seconds: Annotated[float | None, typer.Option(min=1, help="Stop after so many seconds of clicks.")] = None,
    data: Annotated[Path | None, typer.Option(help="Replay an ingested dataset instead of the shop.")] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Inference replicas.")] = 2,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="HTTP port; a free one by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of the synthetic shop.")] = 0,
) -> None:
    """Show the loop: pretrain, serve, click, learn, push; live against frozen weights."""
    from jobs.demo.worlds import replay_world, shop_world

    console = Console()
    if port is not None:
        require_free_port(port)
    with tempfile.TemporaryDirectory(prefix="afterclick-demo-") as folder:
        console.print("making the world" if data is None else f"splitting {data}")
        dataset, model = Path(folder) / "data", Path(folder) / "model"
        world = shop_world(dataset, seed) if data is None else replay_world(data, dataset)
        with running_ray():
            _pretrain(world, model, console)
            _serve(world, model, replicas, port or free_port(), seconds, console)


def _pretrain(world: "World", model: Path, console: Console) -> None:
    from jobs.pretrain import pretrain

    console.print(f"pretraining on {len(world.past):,} events")
    begin = time.monotonic()
    pretrain(world.data, model, world.settings)
    console.print(f"pretrained in {time.monotonic() - begin:.0f} s")


def _serve(world: "World", model: Path, replicas: int, port: int, seconds: float | None, console: Console) -> None:
    """Serve the model and let visitors click, until the time is up, the source ends or Ctrl-C; print the summary."""
    from jobs.demo.frozen import frozen_model
    from jobs.demo.live_view import LiveView, summary
    from jobs.service import counted, running_service, stop_on_signal
    from serving.app import ServeArguments

    console.print(f"starting {counted(replicas, 'replica')}")
    with running_service(ServeArguments(model=str(model), data=str(world.data), replicas=replicas), port) as url:
        console.print(f"serving at {url} (open it to click along)  Ctrl-C stops")
        stop = stop_on_signal()
        with LiveView(world.titles, console) as view:
            tally, status = asyncio.run(_run_live(url, world, frozen_model(model), seconds, view, stop.is_set))
        console.print(summary(tally, status))
    if stop.is_set():
        raise typer.Exit(stop.status)


async def _run_live(
    url: str, world: "World", frozen: "Frozen", seconds: float | None, view: "LiveView", stopped: Callable[[], bool]
) -> "tuple[Tally, dict[str, Any]]":
    """Let visitors click and show what happens; return the tally and the last status."""
    from jobs.demo.tally import Tally
    from jobs.demo.visitors import run_visitors
    from lib.data.dataset import read_rating_scale

    tally, stop, ratings = Tally(), asyncio.Event(), read_rating_scale(world.data)
    visitors = asyncio.create_task(
        run_visitors(url, world.source, frozen, tally, stop, past=world.past, ratings=ratings)
    )
    deadline = time.monotonic() + seconds if seconds is not None else float("inf")
    async with httpx.AsyncClient(base_url=url, timeout=10) as client:
        while not visitors.done() and time.monotonic() < deadline and not stopped():
            view.update(tally, await _status(client))
            await asyncio.wait([visitors], timeout=REFRESH_SECONDS)
        stop.set()
        await visitors
        status = await _status(client)
    view.update(tally, status)
    return tally, status


async def _status(client: httpx.AsyncClient) -> dict[str, Any]:
    return (await client.get("/v1/status")).raise_for_status().json()
