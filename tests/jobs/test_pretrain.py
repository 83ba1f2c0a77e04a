"""Pretraining on Ray Train: any number of workers, killed workers and killed jobs give the same weights."""

import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray._private.state
import safetensors.numpy
import torch
from ray.actor import ActorHandle
from ray.util.queue import Queue
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jobs import training_workers
from jobs.pretrain import _description, _install, _refuse_loss, pretrain
from jobs.pretrain_settings import PretrainSettings, preset_of
from jobs.progress import Report, TrainingProgress, shown_progress
from jobs.run_folder import resume_or_restart
from jobs.training_data import read_training_data
from jobs.training_loop import new_encoder
from lib.data.dataset import read_events, write_dataset
from lib.data.events import EVENT_SCHEMA
from lib.data.holdout import HOLDOUTS
from lib.data.ratings import RatingScale
from lib.errors import InputError
from lib.model.encoder import BehaviourEncoder
from lib.model.folder import Manifest, load_model, read_manifest
from lib.model.ranker import RANKER_PREFIX
from lib.ranking.fit import EXTRA_EPOCHS
from lib.versions.folder import OPTIMIZER_FILE
from tests.helpers.service import RaySession

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 20  # of about a tenth of a second: time enough to be killed in
# without dropout, whose randomness is each worker's own, the number of workers leaves the weights as they are
SETTINGS = PretrainSettings(
    epochs=EPOCHS, learning_rate=1e-3, hidden_size=16, max_length=20, dropout=0.0, negatives=64, events_per_batch=1024
)
PATIENCE = 180.0  # seconds until a wait is given up; nothing is judged by how long it took
OF_TRAINING = ("RayTrainWorker", "TrainController", "_QueueActor")  # classes of actors


torch.set_num_threads(1)  # of the workers, too; threads that wait for each other cost more than this has to compute


def weights_of(model: Path) -> dict[str, np.ndarray]:
    """All that training has made: the weights, and the optimiser's state."""
    names = ("model.safetensors", OPTIMIZER_FILE)
    return {f"{name}:{key}": t for name in names for key, t in safetensors.numpy.load_file(model / name).items()}


def assert_equal_to_the_bit(one: Path, other: Path) -> None:
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not np.array_equal(ours[key], theirs[key])] == []


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    pytest.fail(f"waited {PATIENCE:.0f} s in vain for {what}")


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run whose model is not there yet."""
    found = out.with_name(f".{out.name}.training").glob("run/checkpoint_*")
    return sorted(path for path in found if path.is_dir())


def has_moved_on(process: subprocess.Popen[str], out: Path) -> bool:
    """Whether a job has a checkpoint, or has ended."""
    return process.poll() is not None or checkpoints(out) != []


def live_actors() -> list[dict[str, Any]]:
    """Actors that training has started and not ended."""
    # straight from the cluster's table: ray.util.state asks the dashboard, which a busy machine lets wait
    actors = ray._private.state.actors().values()
    return [actor for actor in actors if actor["ActorClassName"] in OF_TRAINING and actor["State"] != "DEAD"]


def scalars(runs: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) of a TensorBoard scalar."""
    events = EventAccumulator(str(runs), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.fixture
def nothing_left(ray_session: RaySession) -> Iterator[None]:
    """After the test neither actors nor threads of training are there."""
    yield
    wait_for(lambda: not live_actors(), "the actors of training to end")
    assert [thread.name for thread in threading.enumerate() if thread.name == "progress"] == []


@pytest.fixture(scope="module")
def undisturbed(ray_session: RaySession, shop_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that one worker makes if nothing happens to it."""
    out = tmp_path_factory.mktemp("undisturbed") / "model"
    pretrain(shop_dataset, out, SETTINGS, gpu=False)
    return out


# ------------------------------------------------------------------------------------------------- what a run leaves


@pytest.mark.slow
def test_a_model_with_its_optimiser_and_what_it_was_made_of(undisturbed, shop_dataset):
    encoder, catalog, manifest = load_model(undisturbed)
    events = pq.read_table(shop_dataset / "events.parquet")
    assert encoder.config.hidden_size == 16
    assert set(events["item_id"].to_pylist()) <= set(catalog.item_ids)
    assert manifest.version == 1
    training = manifest.training.model_dump()
    assert SETTINGS.model_dump() | training == training | {"holdout": "leave-one-out"}
    assert manifest.training.events < len(events)  # the newest of each user is held out
    assert manifest.training.seconds > 0
    assert float(encoder.item_popularity.sum()) > 0
    assert OPTIMIZER_FILE in manifest.checksums
    assert not undisturbed.with_name(".model.training").exists()


@pytest.mark.slow
def test_tensorboard_has_a_point_for_every_epoch(undisturbed):
    runs = undisturbed.with_name("model.runs")
    losses = scalars(runs, "loss")
    assert len(losses) == EPOCHS + math.ceil(EXTRA_EPOCHS * EPOCHS)  # and those with what was kept back
    steps = [step for step, _ in losses]
    assert steps == sorted(set(steps))
    assert losses[-1][1] < losses[0][1]
    assert losses[-1][1] == pytest.approx(read_manifest(undisturbed).training.loss)
    assert all(rate > 0 for _, rate in scalars(runs, "sequences_per_second"))
    rates = [rate for _, rate in scalars(runs, "learning_rate")]
    assert rates[-1] < max(rates) <= 1.001e-3


@pytest.mark.slow
def test_two_workers_learn_what_one_learns(undisturbed, shop_dataset, tmp_path, nothing_left):
    manifest = pretrain(shop_dataset, tmp_path / "model", SETTINGS, workers=2, gpu=False)
    assert manifest.training.workers == 2
    one, two = weights_of(undisturbed), weights_of(tmp_path / "model")
    assert one.keys() == two.keys()
    for key in one:
        # the ranker is fitted on what the encoder finds: one candidate more or less among thousands moves it a little
        tolerance = 0.3 if f":{RANKER_PREFIX}" in key else 1e-4
        assert np.abs(one[key].astype(np.float64) - two[key]).max() < tolerance, key


# ------------------------------------------------------------------------------------------------------ what is killed


def kill_worker(out: Path, before: list[Path]) -> None:
    """Kill the one worker when it has made a new checkpoint."""
    wait_for(lambda: checkpoints(out)[-1:] not in ([], before), "a new checkpoint")
    (worker,) = [actor["Pid"] for actor in live_actors() if actor["ActorClassName"] == "RayTrainWorker"]
    os.kill(worker, signal.SIGKILL)


@pytest.mark.slow
def test_whatever_is_killed_goes_on_from_the_newest_checkpoint(
    undisturbed, shop_dataset, tmp_path, capsys, nothing_left
):
    """Kill -9 of the job, then kill -9 of its worker: the weights are those of an undisturbed run."""
    out = tmp_path / "model"
    given = [f"--set={name}={value}" for name, value in SETTINGS.model_dump().items() if value is not None]
    command = [sys.executable, "-m", "jobs.pretrain", "--data", shop_dataset, "--out", out, "--no-gpu", *given]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(partial(has_moved_on, process, out), "a checkpoint")
    finally:
        process.kill()
    output, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, output) == (-signal.SIGKILL, "")
    assert "Traceback" not in errors
    assert not out.exists(), errors
    wait_for(lambda: not live_actors(), "the actors of the killed job to end")
    with ThreadPoolExecutor() as killer:
        killed = killer.submit(kill_worker, out, checkpoints(out)[-1:])
        pretrain(shop_dataset, out, SETTINGS, gpu=False)
        killed.result()
    assert "going on with the interrupted run" in capsys.readouterr().err
    runs = out.with_name("model.runs")
    assert len(list(runs.iterdir())) == 3  # each attempt wrote a file
    expected = scalars(undisturbed.with_name("model.runs"), "loss")
    assert scalars(runs, "loss") == expected  # and no epoch stands in it twice
    assert_equal_to_the_bit(out, undisturbed)


@pytest.mark.slow
def test_an_error_in_a_worker_leaves_everything_as_it_was(
    shop_dataset, undisturbed, tmp_path, monkeypatch, nothing_left
):
    """Here the data vanishes after the driver has read it."""
    data = tmp_path / "data"
    data.mkdir()
    events = data / "events.parquet"
    events.write_bytes((shop_dataset / "events.parquet").read_bytes())
    out = tmp_path / "model"
    out.mkdir()
    for path in undisturbed.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    train = training_workers.run_workers

    def train_without_data(**arguments: Any) -> None:
        events.unlink()
        train(**arguments)

    monkeypatch.setattr(training_workers, "run_workers", train_without_data)
    monkeypatch.setattr(training_workers, "RESTARTS", 0)
    interrupt = signal.getsignal(signal.SIGINT)
    with pytest.raises(InputError, match=r"^data '.*' holds no events\.parquet; make it with 'afterclick ingest"):
        pretrain(data, out, SETTINGS, gpu=False, overwrite=True)
    assert_equal_to_the_bit(out, undisturbed)
    assert signal.getsignal(signal.SIGINT) is interrupt


def test_what_a_failed_worker_says():
    from ray.train import WorkerGroupError
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    failure = UserExceptionWithTraceback(ValueError("no more memory"), "Traceback of many lines")
    reason = training_workers._reason(WorkerGroupError("many lines", {1: failure}))
    assert str(reason) == (
        "worker 1 and its 3 restarts failed: ValueError: no more memory; "
        "the same command goes on from the newest checkpoint"
    )


def test_more_workers_than_places_are_refused(shop_dataset, tmp_path, ray_session):
    with pytest.raises(InputError, match=r"^workers: 1000 need 1000 CPUs and Ray has \d+ here; use fewer$"):
        pretrain(shop_dataset, tmp_path / "model", SETTINGS, workers=1000, gpu=False)
    with pytest.raises(InputError, match=r"^workers: 1000 need 1000 GPUs and Ray has \d+ here; train with --no-gpu"):
        pretrain(shop_dataset, tmp_path / "model", SETTINGS, workers=1000, gpu=True)


# ------------------------------------------------------------------------------------------------- resuming or not


@pytest.fixture
def interrupted(tmp_path, shop_dataset) -> Path:
    """What a run leaves that was killed before its first checkpoint."""
    storage = tmp_path / ".model.training"
    resume_or_restart(storage, _description(shop_dataset, SETTINGS))
    (storage / "kept").touch()
    return storage


def test_the_same_run_is_resumed(interrupted, shop_dataset, capsys):
    resume_or_restart(interrupted, _description(shop_dataset, SETTINGS))
    assert (interrupted / "kept").exists()
    assert capsys.readouterr().err == f"going on with the interrupted run in {interrupted}\n"


@pytest.mark.parametrize("what", ["settings", "data", "damaged"])
def test_another_run_starts_afresh(interrupted, shop_dataset, tmp_path, capsys, what):
    settings, data = SETTINGS, shop_dataset
    if what == "settings":
        settings = SETTINGS.model_copy(update={"seed": 7})
    elif what == "data":
        data = tmp_path / "data"
        data.mkdir()
        pq.write_table(pq.read_table(shop_dataset / "events.parquet").slice(1), data / "events.parquet")
    else:
        (interrupted / "run").mkdir()
        (interrupted / "run" / "checkpoint_manager_snapshot.json").write_text('{"checkpoint_res')
    resume_or_restart(interrupted, _description(data, settings))
    assert not (interrupted / "kept").exists()
    said = "is damaged" if what == "damaged" else f"had other {what}"
    assert capsys.readouterr().err == f"starting afresh: the interrupted run in {interrupted} {said}\n"
    resume_or_restart(interrupted, _description(data, settings))
    assert capsys.readouterr().err.startswith("going on")


# --------------------------------------------------------------------------------------------- what may be replaced


def test_only_a_model_is_replaced_and_only_on_request(tmp_path):
    out = tmp_path / "out"
    _refuse_loss(out, False)
    out.mkdir()
    _refuse_loss(out, False)
    (out / "manifest.json").write_text(Manifest().model_dump_json())
    with pytest.raises(InputError, match=r"^out: .* is not empty; choose another folder or add --overwrite"):
        _refuse_loss(out, False)
    _refuse_loss(out, True)
    (out / "live").mkdir()
    with pytest.raises(InputError, match=r"^out: .*/live holds a service's feedback log and versions; choose another"):
        _refuse_loss(out, True)


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match=r"^out: .* is not empty and no model folder; choose another folder"):
        _refuse_loss(tmp_path, True)
    with pytest.raises(InputError, match=r"^out: .*letter\.txt is a file; name a folder"):
        _refuse_loss(tmp_path / "letter.txt", True)


@pytest.mark.parametrize("before", ["nothing", "an empty folder", "a model"])
def test_the_result_takes_its_place(tmp_path, before):
    result, out = tmp_path / "result", tmp_path / "out"
    result.mkdir()
    (result / "new").touch()
    if before != "nothing":
        out.mkdir()
    if before == "a model":
        (out / "old").touch()
        (tmp_path / ".out.replaced").mkdir()  # of a run that was killed here
    _install(result, out)
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---------------------------------------------------------------------------------------------------------- the data


@pytest.fixture
def small_data(tmp_path) -> Path:
    """Two users with five events each, a third with one; the last tenth of the time has two events."""
    users = ["a"] * 5 + ["b"] * 5 + ["c"]
    items = [f"i{number}" for number in range(11)]
    times = [0, 100, 200, 300, 1000, 10, 110, 210, 310, 950, 500]
    rows = zip(users, items, times, strict=True)
    table = pa.Table.from_pylist(
        [
            {"user_id": user, "item_id": item, "event": "click", "value": None, "timestamp": time}
            for user, item, time in rows
        ],
        schema=pa.schema([EVENT_SCHEMA.field(n) for n in ("user_id", "item_id", "event", "value", "timestamp")]),
    )
    pq.write_table(table, tmp_path / "events.parquet")
    return tmp_path


@pytest.mark.parametrize(
    ("holdout", "missing"),
    [("leave-one-out", {"i4", "i9"}), ("temporal", {"i4", "i9"}), ("none", set())],
)
def test_what_is_held_out(small_data, holdout, missing):
    data = read_training_data(str(small_data), holdout)
    trained = {data.catalog.item_ids[row] for row in data.histories.rows}
    assert {f"i{number}" for number in range(11)} - trained == missing
    assert len(data.catalog) == 11  # every item has a row all the same


def test_the_scale_of_the_ratings_goes_from_the_data_to_the_model(small_data, tmp_path):
    write_dataset(tmp_path / "marks", read_events(small_data), None, RatingScale(1, 10))
    for folder, scale in ((tmp_path / "marks", "1-10"), (small_data, "1-5")):
        data = read_training_data(str(folder), "none")
        encoder = new_encoder(data, preset_of(PretrainSettings(), data.figures), seed=0)
        encoder.save_pretrained(tmp_path / "model")
        assert BehaviourEncoder.from_pretrained(tmp_path / "model").config.rating_scale == scale


@pytest.mark.parametrize("holdout", HOLDOUTS)
def test_data_without_two_events_of_a_user_is_refused(tmp_path, small_data, holdout):
    one_each = pq.read_table(small_data / "events.parquet").take(pa.array([0, 5, 10]))
    pq.write_table(one_each, small_data / "events.parquet")
    with pytest.raises(InputError, match=rf"^data: .* no user with two events to learn from \(holdout {holdout}\)"):
        pretrain(small_data, tmp_path / "model", PretrainSettings(holdout=holdout))
    assert not (tmp_path / ".model.training").exists()


def test_heads_that_do_not_divide_the_width_are_refused_before_anything_starts(small_data, tmp_path):
    settings = PretrainSettings(hidden_size=16, num_attention_heads=3)
    with pytest.raises(InputError, match=r"^hidden_size: 16 is not a multiple of num_attention_heads 3$"):
        pretrain(small_data, tmp_path / "model", settings)
    assert not (tmp_path / ".model.training").exists()


def test_what_is_not_set_is_chosen_from_the_data(small_data):
    figures = read_training_data(str(small_data), "none").figures
    chosen = preset_of(PretrainSettings(epochs=3), figures)
    assert chosen.epochs == 3
    assert chosen.max_length == 50


# -------------------------------------------------------------------------------------------------------- the progress


def test_lines_where_there_is_no_terminal(capsys):
    progress = TrainingProgress(Console(stderr=True, force_terminal=False))
    for epoch in (1, 2):
        progress.show(Report(epoch, epochs=2, share=epoch / 2 - 0.25))
        progress.show(Report(epoch, epochs=2, share=epoch / 2, loss=3.0 - epoch, seconds=4.2 * epoch))
    assert capsys.readouterr().err == "epoch 1/2  loss 2.000  4 s\nepoch 2/2  loss 1.000  8 s\n"


def test_a_bar_on_a_terminal(capsys):
    progress = TrainingProgress(Console(stderr=True, force_terminal=True, width=80))
    with progress.bar:
        progress.show(Report(epoch=2, epochs=4, share=0.375))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert "38%" in shown
    assert "epoch 2/4" in shown


@pytest.mark.parametrize("end", ["returns", "raises", "has lost its queue"])
def test_the_queue_and_its_thread_end_with_the_block(capsys, nothing_left, end):
    def block(reports: Queue) -> None:
        reports.put(Report(epoch=1, epochs=1, share=1.0, loss=1.0, seconds=1.0))
        if end == "raises":
            raise ValueError("training went wrong")
        if end == "has lost its queue":
            ray.kill(cast(ActorHandle, reports.actor))

    if end == "raises":
        with pytest.raises(ValueError, match="training went wrong"), shown_progress() as reports:
            block(reports)
    else:
        with shown_progress() as reports:
            block(reports)
    if end != "has lost its queue":  # its last news may be lost with it
        assert capsys.readouterr().err == "epoch 1/1  loss 1.000  1 s\n"
