"""The parts of the demo that need no service: its worlds, and the frozen model."""

import pyarrow.parquet as pq
import pytest

from jobs.demo.frozen import frozen_model
from jobs.demo.worlds import replay_world, shop_world
from lib.data.catalog import Catalog
from lib.data.dataset import read_events
from lib.data.events import Event
from lib.data.history import History
from lib.errors import InputError
from lib.model.folder import Manifest, save_model
from tests.helpers.tiny import item_ids, tiny_encoder


def test_a_replay_trains_on_the_oldest_events_and_replays_the_rest_in_order(tmp_path):
    world = shop_world(tmp_path / "shop", seed=1)
    replay = replay_world(tmp_path / "shop", tmp_path / "split")
    trained, replayed = read_events(tmp_path / "split"), []
    while (event := replay.source.next_event(())) is not None:
        replayed.append(event)
    assert len(trained) == len(replay.past)
    assert len(trained) + len(replayed) == len(world.past)
    assert len(replayed) == pytest.approx(0.2 * len(world.past), rel=0.01)
    times = [event.timestamp for event in replayed]
    assert times == sorted(times)
    assert max(trained["timestamp"].to_pylist()) <= times[0]
    assert set(replay.titles) == set(world.titles)


def test_a_dataset_too_small_to_split_is_refused(tmp_path):
    shop_world(tmp_path / "shop", seed=1)
    small = tmp_path / "small"
    small.mkdir()
    pq.write_table(read_events(tmp_path / "shop").slice(0, 2), small / "events.parquet")
    with pytest.raises(InputError, match="2 events"):
        replay_world(small, tmp_path / "split")


def test_the_frozen_model_answers_newcomers_and_leaves_out_seen_items(tmp_path):
    save_model(tmp_path, tiny_encoder(items=24), Catalog(item_ids(24)), Manifest())
    recommend = frozen_model(tmp_path)
    seen = item_ids(5)
    history = History.of(Event("user", item, "click", None, 1) for item in seen)
    known, newcomer = recommend([history, History()], 10)
    assert len(known) == 10
    assert not set(known) & set(seen)
    assert len(newcomer) == 10
