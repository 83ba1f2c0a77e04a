"""Datasets that are streamed: the same events, items and batches as in memory, whatever the number of buckets."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import safetensors.numpy
import torch
from ray.util.placement_group import placement_group, remove_placement_group

import lib.model.buckets
from jobs import event_stream
from jobs.event_stream import StreamedData, must_stream, prepare_stream, read_stream
from jobs.pretrain import pretrain
from jobs.pretrain_settings import PretrainSettings
from jobs.training_data import read_training_data
from lib.data.catalog import Catalog
from lib.data.dataset import RATING_SCALE, read_events
from lib.data.events import EVENT_KINDS
from lib.data.histories import Histories
from lib.data.holdout import LEAVE_ONE_OUT, NONE, TEMPORAL, training_part
from lib.data.pieces import Piece, first_uses, merged, pieces_of, read_piece, survey
from lib.data.ratings import RatingScale
from lib.errors import InputError
from lib.model.batches import Batch, SequenceBatches, target_weights, value_boundaries
from lib.model.buckets import (
    BucketBatches,
    bucket_count,
    figures_of,
    figures_of_all,
    histories_in,
    part_to_train,
    table_of,
    with_bucket,
)
from lib.model.folder import read_manifest
from lib.versions.folder import OPTIMIZER_FILE
from tests.helpers.tiny import random_histories, tiny_config

HOLDOUTS = (LEAVE_ONE_OUT, TEMPORAL, NONE)
COLUMNS = ("rows", "kinds", "values", "timestamps")


def random_events(users: int = 40, events: int = 1200, seed: int = 0) -> pa.Table:
    """Events in no order at all, many of a user at the same time."""
    generator = np.random.default_rng(seed)
    kinds = generator.choice(["click", "rating", "skip"], events)
    return pa.table(
        {
            "user_id": [f"u{number}" for number in generator.integers(0, users, events)],
            "item_id": [f"i{number}" for number in generator.integers(0, 90, events)],
            "event": kinds,
            "value": pa.array(
                [float(generator.integers(1, 6)) if kind == "rating" else None for kind in kinds], pa.float32()
            ),
            "timestamp": generator.integers(0, 50, events) * 1000,
        }
    )


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """1200 random events in row groups of 100, rated from 0 to 5."""
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(
        random_events().replace_schema_metadata({RATING_SCALE: "0-5"}), folder / "events.parquet", row_group_size=100
    )
    return folder


def split(histories: Histories, buckets: int) -> list[Histories]:
    """Users dealt out to buckets in turn."""
    return [histories.take(np.arange(bucket, len(histories), buckets)) for bucket in range(buckets)]


def bucket_batches(parts: Sequence[Histories]) -> BucketBatches:
    return BucketBatches(lambda order: (parts[bucket] for bucket in order), range(len(parts)), tiny_config())


def assert_same_histories(one: Histories, other: Histories) -> None:
    assert one.user_ids == other.user_ids
    for name in ("offsets", *COLUMNS):
        ours, theirs = getattr(one, name), getattr(other, name)
        assert ours.dtype == theirs.dtype, name
        np.testing.assert_array_equal(ours, theirs, err_msg=name)


def assert_same_batches(one: Iterator[Batch], other: Iterator[Batch]) -> None:
    for ours, theirs in zip(one, other, strict=True):
        for name, tensor in vars(ours).items():
            assert torch.equal(tensor, getattr(theirs, name)), name


def events_by_user(parts: Sequence[Histories]) -> dict[str, list[tuple]]:
    """Each user's events, in their order; fails where a user is in two parts."""
    found: dict[str, list[tuple]] = {}
    for part in parts:
        for user, start, stop in zip(part.user_ids, part.offsets[:-1], part.offsets[1:], strict=True):
            assert user not in found
            columns = (part.rows, part.kinds, np.nan_to_num(part.values, nan=-1.0), part.timestamps)
            found[user] = list(zip(*(column[start:stop].tolist() for column in columns), strict=True))
    return found


# ------------------------------------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize(
    ("most", "sizes"), [(1200, [1200]), (1000, [1000, 200]), (250, [200] * 6), (70, [70, 30] * 12)]
)
def test_pieces_end_between_row_groups_where_these_are_small_enough(dataset, most, sizes):
    pieces = pieces_of(dataset / "events.parquet", most)
    assert [piece.stop - piece.start for piece in pieces] == sizes
    assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]


@pytest.mark.parametrize("piece", [Piece(0, 1200), Piece(70, 100), Piece(150, 420), Piece(1199, 1200)])
def test_a_piece_is_these_rows_and_their_places(dataset, piece):
    table = read_piece(dataset / "events.parquet", piece)
    whole = pq.read_table(dataset / "events.parquet")
    expected = whole.slice(piece.start, piece.stop - piece.start)
    assert table.drop_columns(["position"]).equals(expected.cast(table.drop_columns(["position"]).schema))
    assert table["position"].to_pylist() == list(range(piece.start, piece.stop))


def test_what_pieces_hold_is_what_the_file_holds(dataset, monkeypatch):
    monkeypatch.setattr("lib.data.pieces.MERGE_ROWS", 10)
    path = dataset / "events.parquet"
    events = read_events(dataset)
    whole = merged(survey(path, piece) for piece in pieces_of(path, 130))
    assert whole.first_uses["item_id"].to_pylist() == list(dict.fromkeys(events["item_id"].to_pylist()))
    assert whole.events == 1200
    assert whole.values == 1200 - events["value"].null_count
    assert (whole.oldest, whole.newest) == (0, 49_000)


def test_of_equal_times_the_first_in_the_file_counts():
    rows = [("a", "late", 5, 0), ("a", "second", 1, 2), ("a", "first", 1, 1), ("b", "never", 0, 3), ("a", "late", 1, 9)]
    names = ["item_id", "user_id", "timestamp", "position"]
    table = pa.table(dict(zip(names, zip(*((i, u, t, p) for u, i, t, p in rows), strict=True), strict=True)))
    assert first_uses(table)["item_id"].to_pylist() == ["first", "second", "late", "never"]


@pytest.mark.parametrize(
    ("column", "values", "reason"),
    [
        ("item_id", ["i1", None], "column 'item_id' is null in 1 rows; ingest the data"),
        ("event", ["click", "stare"], "unknown event 'stare'; ingest the data with --event-kind stare=KIND"),
        ("timestamp", None, "column 'timestamp' is missing"),
        ("timestamp", ["1", "2"], "column 'timestamp' has type string; it must be int64"),
    ],
)
def test_bad_input_is_refused_with_its_reason(tmp_path, column, values, reason):
    columns = {"user_id": ["a", "b"], "item_id": ["i1", "i2"], "event": ["click", "view"], "timestamp": [1, 2]}
    columns[column] = values
    path = tmp_path / "events.parquet"
    pq.write_table(pa.table({name: part for name, part in columns.items() if part is not None}), path)
    with pytest.raises(InputError, match=f"^{path}: {reason}"):
        merged(survey(path, piece) for piece in pieces_of(path, 1))


def test_a_file_without_events_is_refused(tmp_path):
    pq.write_table(random_events().slice(0, 0), tmp_path / "events.parquet")
    with pytest.raises(InputError, match=r"events\.parquet: it has no events; ingest some$"):
        pieces_of(tmp_path / "events.parquet", 10)


# ------------------------------------------------------------------------------------------------------------ buckets


def test_the_bucket_of_a_user_is_always_the_same():
    events = random_events()
    buckets = with_bucket(events, 7)["bucket"].to_pylist()
    users = events["user_id"].to_pylist()
    assert len(set(zip(users, buckets, strict=True))) == len(set(users))
    assert set(buckets) == set(range(7))
    assert with_bucket(pa.table({"user_id": ["u1", "u2", "u1"]}), 7)["bucket"].to_pylist() == [0, 4, 0]


def test_buckets_are_of_the_size_that_is_asked_for():
    assert [bucket_count(events, 100) for events in (1, 100, 101, 1000)] == [1, 1, 2, 10]
    assert bucket_count(10**9, 1) == lib.model.buckets.MOST_BUCKETS
    # a dataset of one bucket has all its values looked at, or its boundaries would not be those of memory
    assert lib.model.buckets.SAMPLED_VALUES >= event_stream.EVENTS_PER_BUCKET


@pytest.mark.parametrize("users", [0, 1, 30])
def test_histories_survive_a_table(users, tmp_path):
    histories = random_histories(users, 24, np.random.default_rng(0))
    table = table_of(histories)
    assert_same_histories(histories_in(table), histories)
    pq.write_table(table, tmp_path / "bucket.parquet")
    assert_same_histories(histories_in(pq.read_table(tmp_path / "bucket.parquet")), histories)


def test_histories_of_part_of_a_table():
    histories = random_histories(30, 24, np.random.default_rng(0))
    assert_same_histories(histories_in(table_of(histories).slice(7, 9)), histories.take(np.arange(7, 16)))


@pytest.mark.parametrize("holdout", HOLDOUTS)
def test_buckets_hold_out_what_the_whole_holds_out(holdout):
    histories = random_histories(40, 24, np.random.default_rng(1))
    span = int(histories.timestamps.min()), int(histories.timestamps.max())
    parts = [part_to_train(part, holdout, *span) for part in split(histories, 4)]
    assert events_by_user(parts) == events_by_user([training_part(histories, holdout)])


def test_figures_of_buckets_are_those_of_the_whole():
    histories = random_histories(60, 24, np.random.default_rng(2), longest=9)
    parts = [*split(histories, 3), random_histories(0, 24, np.random.default_rng(0))]
    figures = figures_of_all([figures_of(bucket, part, 1.0, 0) for bucket, part in enumerate(parts)])
    assert (figures.events, figures.users) == (len(histories.rows), 60)
    assert figures.users_to_learn_from == int((histories.lengths >= 2).sum()) < 60
    assert figures.newest == histories.timestamps.max()
    assert figures.value_boundaries == value_boundaries(histories.values)
    liked = target_weights(histories.kinds, histories.values, EVENT_KINDS) > 0
    newest = liked[histories.offsets[1:][histories.lengths > 2] - 1]
    assert (figures.liked, figures.newest_liked) == (int(liked.sum()), int(newest.sum()))
    users = [histories.rows[start:stop] for start, stop in pairwise(histories.offsets)]
    first = sum(len(np.unique(rows)) for rows in users)
    assert figures.repeated == figures.events - first > 0
    assert figures.items == len(np.unique(histories.rows))


def test_a_share_of_the_values_gives_boundaries_close_to_those_of_all():
    histories = random_histories(20_000, 24, np.random.default_rng(4))
    rated = ~np.isnan(histories.values)
    values = np.where(rated, np.random.default_rng(5).random(len(rated)), np.nan).astype(np.float32)
    parts = split(replace(histories, values=values), 4)
    figures = [figures_of(bucket, part, 0.25, 0) for bucket, part in enumerate(parts)]
    assert sum(len(part.values) for part in figures) == pytest.approx(rated.sum() / 4, rel=0.05)
    boundaries = figures_of_all(figures).value_boundaries
    np.testing.assert_allclose(boundaries, value_boundaries(values), atol=0.02)
    assert boundaries == figures_of_all([figures_of(b, part, 0.25, 0) for b, part in enumerate(parts)]).value_boundaries


# ------------------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("shards", [1, 2])
def test_of_one_bucket_the_batches_are_those_of_memory(shards):
    histories = random_histories(60, 24, np.random.default_rng(6))
    memory, stream = SequenceBatches(histories, tiny_config()), bucket_batches([histories])
    for shard in range(shards):
        ours = stream.epoch(64, np.random.default_rng((0, 1)), shard, shards)
        assert_same_batches(ours, memory.epoch(64, np.random.default_rng((0, 1)), shard, shards))
    counts = [sum(1 for _ in batches.groups(64, np.random.default_rng(0))) for batches in (memory, stream)]
    assert counts[0] == counts[1] > 1


def test_every_target_of_every_user_comes_once_an_epoch():
    """Each item belongs to one user here, so an item that is a target tells whose and which event it is."""
    histories = random_histories(50, 24, np.random.default_rng(7), longest=9)  # no history is longer than a window
    histories = replace(
        histories,
        rows=np.arange(1, len(histories.rows) + 1, dtype=np.int32),
        kinds=np.ones_like(histories.kinds),
        values=np.full_like(histories.values, np.nan),
    )
    expected = np.setdiff1d(histories.rows, histories.rows[histories.offsets[:-1]])  # all but each user's first
    for epoch in range(2):
        batches = bucket_batches(split(histories, 5)).epoch(64, np.random.default_rng((0, epoch)))
        seen = Counter(row for batch in batches for row in batch.target_rows[batch.target_weights > 0].tolist())
        assert seen == Counter(expected.tolist())


def test_two_workers_see_the_batches_that_one_sees():
    parts = split(random_histories(60, 24, np.random.default_rng(8)), 3)

    def windows(batch: Batch) -> Counter:
        return Counter(
            tuple(rows[:length].tolist() + targets[:length].tolist())
            for rows, targets, length, weights in zip(
                batch.rows, batch.target_rows, batch.lengths.tolist(), batch.target_weights, strict=True
            )
            if weights.any()
        )

    def epoch(shard: int, shards: int) -> list[Counter]:
        return [windows(b) for b in bucket_batches(parts).epoch(64, np.random.default_rng((0, 3)), shard, shards)]

    first, second, alone = epoch(0, 2), epoch(1, 2), epoch(0, 1)
    assert len(alone) > 3
    assert [one + other for one, other in zip(first, second, strict=True)] == alone


def test_the_order_of_buckets_follows_from_seed_and_epoch():
    parts = split(random_histories(60, 24, np.random.default_rng(9)), 6)
    read: list[list[int]] = []

    def recorded(order: Sequence[int]) -> Iterator[Histories]:
        read.append(list(order))
        return (parts[bucket] for bucket in order)

    batches = BucketBatches(recorded, range(6), tiny_config())
    uninterrupted = [list(batches.epoch(64, np.random.default_rng((0, epoch)))) for epoch in range(4)]
    assert all(sorted(order) == list(range(6)) for order in read)
    assert len({tuple(order) for order in read}) > 1
    for epoch in (2, 3):  # of a run that goes on from the end of the second epoch
        resumed = bucket_batches(parts).epoch(64, np.random.default_rng((0, epoch)))
        assert_same_batches(iter(uninterrupted[epoch]), resumed)


def test_a_bucket_is_read_when_it_is_its_turn():
    parts = split(random_histories(60, 24, np.random.default_rng(9)), 6)
    read = []

    def reading(order: Sequence[int]) -> Iterator[Histories]:
        for bucket in order:
            read.append(bucket)
            yield parts[bucket]

    batches = BucketBatches(reading, range(6), tiny_config()).epoch(10**6, np.random.default_rng(0))
    for turn, _ in enumerate(batches, start=1):
        assert len(read) == turn
    assert len(read) == 6


# ----------------------------------------------------------------------------------------------------------- Ray Data


def streamed(dataset: Path, folder: Path, holdout: str, events_per_bucket: int) -> StreamedData:
    prepare_stream(dataset, folder, holdout, 0, events_per_bucket)
    return read_stream(dataset, folder)


@pytest.mark.parametrize("holdout", HOLDOUTS)
def test_one_bucket_is_the_dataset(ray_session, dataset, tmp_path, holdout):
    memory = read_training_data(str(dataset), holdout)
    stream = streamed(dataset, tmp_path / "stream", holdout, 10_000)
    assert stream.catalog.item_ids == memory.catalog.item_ids
    assert stream.ratings == memory.ratings == RatingScale(0, 5)
    (histories,) = stream.parts()
    assert_same_histories(histories, memory.histories)
    assert stream.figures == memory.figures
    assert np.array_equal(stream.order(histories), memory.order(memory.histories))
    assert not (tmp_path / "stream" / "parts").exists()


@pytest.mark.parametrize("holdout", [LEAVE_ONE_OUT, TEMPORAL])
def test_several_buckets_hold_every_event_in_its_order(ray_session, dataset, tmp_path, holdout):
    memory = read_training_data(str(dataset), holdout)
    stream = streamed(dataset, tmp_path / "stream", holdout, 130)
    assert stream.figures.buckets == list(range(10))
    assert stream.catalog.item_ids == memory.catalog.item_ids
    assert events_by_user(list(stream.parts())) == events_by_user([memory.histories])
    order = [7, 0, 9, 3]
    in_order = [part.user_ids for part in stream.parts(order)]
    assert in_order == [next(iter(stream.parts([bucket]))).user_ids for bucket in order]
    assert stream.figures.events == len(memory.histories.rows)
    times = np.sort(memory.histories.timestamps)
    for part in stream.parts():
        assert np.array_equal(stream.order(part), np.searchsorted(times, part.timestamps, side="right"))


def test_batches_leave_out_what_is_kept_back(ray_session, dataset, tmp_path):
    stream, config = streamed(dataset, tmp_path / "stream", NONE, 500), tiny_config()

    def odd(histories: Histories) -> np.ndarray:
        return histories.rows % 2 == 1

    def rows(without: Callable[[Histories], np.ndarray] | None) -> set[int]:
        batches = stream.batches(config, without).epoch(1000, np.random.default_rng(0))
        return {row for batch in batches for row in batch.rows.unique().tolist()}

    assert any(row % 2 for row in rows(None))
    assert not any(row % 2 for row in rows(odd))


def test_a_complete_stream_is_kept_and_an_incomplete_one_made_anew(ray_session, dataset, tmp_path):
    folder = tmp_path / "stream"
    figures = prepare_stream(dataset, folder, NONE, 0, 500)
    buckets = folder / "buckets"
    made = {path.name: path.stat().st_mtime_ns for path in buckets.iterdir()}
    assert prepare_stream(dataset, folder, NONE, 0, 500) == figures
    assert {path.name: path.stat().st_mtime_ns for path in buckets.iterdir()} == made
    (folder / "figures.json").unlink()
    (folder / "parts").mkdir()
    (buckets / "0001.parquet").write_bytes(b"half of it")
    assert prepare_stream(dataset, folder, NONE, 0, 500) == figures
    assert len(events_by_user(list(read_stream(dataset, folder).parts()))) == figures.users


def test_buckets_are_read_where_training_has_taken_all_places(ray_session, dataset, tmp_path):
    stream = streamed(dataset, tmp_path / "stream", NONE, 500)
    taken = placement_group([{"CPU": int(ray.available_resources()["CPU"])}])
    try:
        ray.get(taken.ready())
        assert len(list(stream.parts())) == 3
    finally:
        remove_placement_group(taken)


def test_bad_input_in_a_later_piece_is_told_as_such(ray_session, dataset, tmp_path):
    events = pq.read_table(dataset / "events.parquet").to_pylist()
    events[700]["event"] = "stare"
    pq.write_table(pa.Table.from_pylist(events), dataset / "events.parquet", row_group_size=100)
    with pytest.raises(InputError, match=r"events\.parquet: unknown event 'stare'; ingest the data"):
        prepare_stream(dataset, tmp_path / "stream", NONE, 0, 130)


def test_what_would_fill_memory_is_streamed(dataset, monkeypatch):
    needed = 1200 * event_stream.IN_MEMORY_BYTES / event_stream.MEMORY_SHARE
    monkeypatch.setattr(event_stream, "machine_memory", lambda: needed + 1)
    assert not must_stream(dataset, readers=1)
    assert must_stream(dataset, readers=2)
    monkeypatch.setattr(event_stream, "machine_memory", lambda: needed - 1)
    assert must_stream(dataset, readers=1)


def test_the_memory_of_this_machine():
    assert 1 << 28 < event_stream.machine_memory() < 1 << 50


# --------------------------------------------------------------------------------------------------------- pretraining


@pytest.mark.slow
def test_streamed_training_gives_the_weights_of_training_in_memory(
    ray_session, small_model, shop_dataset, tmp_path, monkeypatch, capsys
):
    """To the bit where the stream is a single bucket; here it is chosen because the machine is said to be tiny."""
    monkeypatch.setattr(event_stream, "machine_memory", lambda: 1000)
    out = tmp_path / "model"
    manifest = pretrain(shop_dataset, out, PretrainSettings(epochs=2, max_length=20, hidden_size=32), gpu=False)
    expected = read_manifest(small_model).training
    measured = {name: getattr(manifest.training, name) for name in ("seconds", "sequences_per_second")}
    assert manifest.training == expected.model_copy(update=measured | {"stream": True})
    for name in ("model.safetensors", OPTIMIZER_FILE):
        ours, theirs = (safetensors.numpy.load_file(folder / name) for folder in (out, small_model))
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not np.array_equal(ours[key], theirs[key])] == []
    assert Catalog.load(out / "catalog.parquet").item_ids == Catalog.load(small_model / "catalog.parquet").item_ids
    assert not (tmp_path / ".model.training").exists()
    assert f"streaming {shop_dataset}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, r"^data: .* leaves no user with two events to learn from \(holdout none\)"),
        ({"hidden_size": 16, "num_attention_heads": 3}, "^hidden_size: 16 is not a multiple of num_attention_heads 3$"),
    ],
)
def test_what_cannot_be_trained_on_leaves_nothing_of_a_streamed_run(ray_session, dataset, tmp_path, changes, reason):
    if not changes:
        events = pq.read_table(dataset / "events.parquet").slice(0, 1)
        pq.write_table(events, dataset / "events.parquet")
    settings = PretrainSettings(stream=True, holdout="none", **changes)
    with pytest.raises(InputError, match=reason):
        pretrain(dataset, tmp_path / "model", settings, gpu=False)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
