"""Datasets larger than memory, streamed from Parquet through Ray Data.

`prepare_stream` runs once a run, before the workers. It reads events.parquet three times, in pieces: to see what it
holds, to put each user's events into one bucket, and to write each bucket as the histories that are trained on. A
training worker then streams the buckets of each epoch (`StreamedData`): it trains on one while the next is read.
"""

import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from ray.data import Dataset, TaskPoolStrategy

from lib.data.catalog import Catalog
from lib.data.dataset import events_file, read_items, read_rating_scale
from lib.data.events import EVENT_KINDS
from lib.data.formats.files import parquet_file
from lib.data.histories import Histories, histories_of
from lib.data.pieces import Piece, merged, pieces_of, read_piece, survey
from lib.data.ratings import RatingScale
from lib.data.tables import order_events
from lib.durable import make_durably, write_durably
from lib.model.buckets import (
    SAMPLED_VALUES,
    BucketBatches,
    BucketFigures,
    Figures,
    Moments,
    bucket_count,
    figures_of,
    figures_of_all,
    histories_in,
    kept_times,
    part_to_train,
    step_of,
    table_of,
    with_bucket,
)
from lib.model.encoder import BehaviourEncoderConfig
from lib.ranking.fit import Held, order_of

EVENTS_PER_BUCKET = 2_000_000  # 35 MB of histories, and what one task holds of the events
IN_MEMORY_BYTES = 250  # of an event, at the peak, where a process reads all of them at once
MEMORY_SHARE = 0.5  # of the machine's, that reading all at once may take
PLACES_A_TASK = 4  # of the cluster's CPUs, while the stream is prepared: each task holds a bucket
FIGURES_FILE, ITEMS_FILE, PARTS_FOLDER, BUCKETS_FOLDER = "figures.json", "items.parquet", "parts", "buckets"
MOMENTS_FILE = "moments.npz"

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class StreamedData:
    """A prepared stream: what a training worker knows of the data without holding it."""

    folder: Path
    catalog: Catalog  # of all items
    figures: Figures  # of the events that are trained on
    ratings: RatingScale
    moments: Moments

    def parts(self, buckets: Sequence[int] | None = None) -> Iterator[Histories]:
        """Stream the histories of these buckets (or of all), one bucket after another."""
        return stream_buckets(self.folder, self.figures.buckets if buckets is None else buckets)

    def order(self, histories: Histories) -> np.ndarray:
        """Return (E,) int64 where the events of a bucket stand in the order of time of all, from 1."""
        single = len(self.figures.buckets) == 1
        return order_of(histories) if single else self.moments.places(histories.timestamps)

    def batches(self, config: BehaviourEncoderConfig, without: Held | None = None) -> BucketBatches:
        """Make the training batches of an encoder, without some of the events."""
        if without is None:
            return BucketBatches(self.parts, self.figures.buckets, config)

        def parts(buckets: Sequence[int]) -> Iterator[Histories]:
            return (histories.select(~without(histories)) for histories in self.parts(buckets))

        return BucketBatches(parts, self.figures.buckets, config)


def prepare_stream(
    data: str | Path, folder: Path, holdout: str, seed: int, events_per_bucket: int = EVENTS_PER_BUCKET
) -> Figures:
    """Make `folder` the stream of a dataset, on the running Ray; one that is complete is left as it is.

    Raises:
        InputError: the data is missing or breaks a rule of lib/data/dataset.py.
    """
    if (folder / FIGURES_FILE).exists():
        return _read_figures(folder)
    if folder.exists():  # of a preparation that was killed
        shutil.rmtree(folder)
    (folder / BUCKETS_FOLDER).mkdir(parents=True)
    path = events_file(data)
    pieces = pieces_of(path, events_per_bucket)
    tasks = max(1, int(ray.cluster_resources().get("CPU", 0)) // PLACES_A_TASK)
    whole = merged(_mapped(pieces, partial(survey, path), tasks))
    pq.write_table(whole.first_uses.select(["item_id"]), folder / ITEMS_FILE)
    _write_parts(path, pieces, folder / PARTS_FOLDER, bucket_count(whole.events, events_per_bucket), tasks)
    step = step_of(whole.events)
    finish = partial(
        _finish_bucket,
        folder=folder,
        holdout=holdout,
        span=(whole.oldest, whole.newest),
        value_share=SAMPLED_VALUES / max(whole.values, 1),
        seed=seed,
        ratings=read_rating_scale(data),
        step=step,
    )
    found: list[BucketFigures] = []
    times: list[np.ndarray] = []
    held = 0
    for figures, kept, events in _mapped(_buckets_in(folder / PARTS_FOLDER), finish, tasks):
        shutil.rmtree(_part(folder, figures.bucket))
        found.append(figures)
        times.append(kept)
        held += events
    (folder / PARTS_FOLDER).rmdir()
    if held != whole.events:
        raise RuntimeError(f"{folder}: the buckets hold {held} of {whole.events} events; start again")
    figures = figures_of_all(found)
    Moments.of(times, step).save(folder / MOMENTS_FILE)
    # the last step: where it is, everything is
    write_durably(folder / FIGURES_FILE, f"{json.dumps(asdict(figures), indent=2)}\n".encode())
    return figures


def read_stream(data: str | Path, folder: Path) -> StreamedData:
    """Return what `prepare_stream` has made of a dataset."""
    item_ids = pq.read_table(folder / ITEMS_FILE)["item_id"].to_pylist()
    catalog = Catalog.of_dataset(item_ids, read_items(data))
    figures = _read_figures(folder)
    return StreamedData(folder, catalog, figures, read_rating_scale(data), Moments.load(folder / MOMENTS_FILE))


def stream_buckets(folder: Path, buckets: Sequence[int]) -> Iterator[Histories]:
    """Yield the histories of buckets in this order; the next bucket is read while one is trained on."""
    # a dataset for each bucket: the scheduler of one dataset for all would take a core for as long as it held back
    # what is read too early
    with ThreadPoolExecutor(1, "buckets") as reader:
        coming = reader.submit(_streamed_bucket, folder, buckets[0])
        for following in buckets[1:]:
            histories = coming.result()
            coming = reader.submit(_streamed_bucket, folder, following)
            yield histories
        yield coming.result()


def _streamed_bucket(folder: Path, bucket: int) -> Histories:
    # Neither takes a CPU, nor asks for one as ray.data.read_parquet does to plan its reading: the training workers may
    # have taken all that there are, and would wait for a reader that waits for them.
    dataset = _dataset([bucket]).map_batches(partial(_read_buckets, folder=folder), batch_size=None, num_cpus=0)
    tables: Iterable[Any] = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    return histories_in(pa.concat_tables(tables))


def must_stream(data: str | Path, readers: int) -> bool:
    """Return whether so many processes with all events in memory would take more than MEMORY_SHARE of the machine's.

    Raises:
        InputError: there is no such dataset.
    """
    with parquet_file(events_file(data)) as file:
        events = file.metadata.num_rows
    return events * IN_MEMORY_BYTES * readers > MEMORY_SHARE * machine_memory()


def machine_memory() -> int:
    """Return the bytes of memory of this machine, or of the container that it is."""
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if path.exists() and (limit := path.read_text().strip()).isdecimal():
            return min(installed, int(limit))
    return installed


# ---------------------------------------------------------------------------------------------------------------------
# The three passes


def _dataset(items: Iterable[Any]) -> Dataset:
    """Make a Ray Data dataset of the pickled items, a block each and in this order; it does not print what it does."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns of the bars that are not shown
    rows = [{"item": pickle.dumps(item)} for item in items]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    dataset.context.enable_progress_bars = False
    dataset.context.execution_options.preserve_order = True
    return dataset


def _mapped(items: Sequence[Item], function: Callable[[Item], Result], tasks: int) -> Iterator[Result]:
    """Yield the function's results in the order of the items; at most so many tasks run at once."""
    compute = TaskPoolStrategy(min(tasks, len(items)))
    for row in _dataset(items).map(partial(_applied, function=function), compute=compute).iter_rows():
        yield pickle.loads(row["item"])


def _applied(row: dict[str, bytes], function: Callable[[Any], Any]) -> dict[str, bytes]:
    return {"item": pickle.dumps(function(pickle.loads(row["item"])))}


def _write_parts(path: Path, pieces: Sequence[Piece], folder: Path, buckets: int, tasks: int) -> None:
    """Write all events, with their bucket and their place in the file, to a folder for each bucket."""
    tasks = min(tasks, len(pieces))
    dataset = _dataset(pieces).map_batches(
        partial(_bucketed, path=path, buckets=buckets), batch_size=None, compute=TaskPoolStrategy(tasks)
    )
    dataset.write_parquet(str(folder), partition_cols=["bucket"], concurrency=tasks)


def _bucketed(batch: Any, path: Path, buckets: int) -> Iterator[pa.Table]:
    for item in batch["item"]:
        yield with_bucket(read_piece(path, pickle.loads(item)), buckets)


def _part(folder: Path, bucket: int) -> Path:
    return folder / PARTS_FOLDER / f"bucket={bucket}"  # as Arrow names it


def _buckets_in(folder: Path) -> list[int]:
    return sorted(int(path.name.partition("=")[2]) for path in folder.iterdir())


def _bucket_file(folder: Path, bucket: int) -> Path:
    return folder / BUCKETS_FOLDER / f"{bucket:04d}.parquet"


def _finish_bucket(
    bucket: int,
    folder: Path,
    holdout: str,
    span: tuple[int, int],
    value_share: float,
    seed: int,
    ratings: RatingScale,
    step: int,
) -> tuple[BucketFigures, np.ndarray, int]:
    """Write a bucket's histories without what is held out.

    Returns:
        What they hold, the times of every `step`th event, and how many events there were before.
    """
    # by ParquetFile, because read_table would take a column from the name of the folder
    parts = [pq.ParquetFile(path).read() for path in sorted(_part(folder, bucket).iterdir())]
    events = order_events(pa.concat_tables(parts).sort_by("position"))
    items = pq.read_table(folder / ITEMS_FILE)["item_id"].to_pylist()
    histories = histories_of(events, Catalog(items).row_of, EVENT_KINDS)
    trained = part_to_train(histories, holdout, *span)
    # a task may be started again while its first try still runs
    make_durably(_bucket_file(folder, bucket), lambda unfinished: pq.write_table(table_of(trained), unfinished))
    return figures_of(bucket, trained, value_share, seed, ratings), kept_times(trained, step), len(events)


def _read_buckets(batch: Any, folder: Path) -> Iterator[pa.Table]:
    for item in batch["item"]:
        yield pq.read_table(_bucket_file(folder, pickle.loads(item)))


def _read_figures(folder: Path) -> Figures:
    return Figures(**json.loads((folder / FIGURES_FILE).read_text()))
