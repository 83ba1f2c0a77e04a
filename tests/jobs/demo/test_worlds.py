"""The parts of the demo that need no service: the split of a dataset, and the frozen model."""

import pyarrow.parquet as pq
import pytest

from jobs.demo.demo import frozen_model, replay_world, shop_world
from jobs.demo.visitors import PastEvent, Step
from lib.data.catalog import Catalog
from lib.data.dataset import read_events
from lib.errors import InputError
from lib.model.folder import Manifest, save_model
from tests.helpers.tiny import item_ids, tiny_encoder


def test_a_replay_trains_on_the_oldest_events_and_replays_the_rest_in_order(tmp_path):
    world = shop_world(tmp_path / "shop", seed=1)
    replay = replay_world(tmp_path / "shop", tmp_path / "split")
    trained, replayed = read_events(tmp_path / "split"), []
    while (step := replay.source.next_step(())) is not None:
        replayed.append(step)
    assert len(trained) + len(replayed) == len(world.events)
    assert len(replayed) == pytest.approx(0.2 * len(world.events), rel=0.01)
    times = [step.timestamp for step in replayed if isinstance(step, Step)]
    assert times == sorted(times)
    assert max(trained["timestamp"].to_pylist()) <= times[0]
    assert set(replay.titles) == set(world.titles)


def test_a_dataset_too_small_to_split_is_refused(tmp_path):
    world = shop_world(tmp_path / "shop", seed=1)
    small = tmp_path / "small"
    small.mkdir()
    pq.write_table(world.events.slice(0, 2), small / "events.parquet")
    with pytest.raises(InputError, match="2 events"):
        replay_world(small, tmp_path / "split")


def test_the_frozen_model_answers_newcomers_and_leaves_out_seen_items(tmp_path):
    save_model(tmp_path, tiny_encoder(items=24), Catalog(item_ids(24)), Manifest())
    recommend = frozen_model(tmp_path)
    seen = item_ids(5)
    known, newcomer = recommend([[PastEvent(item, "click", None, 1) for item in seen], []], 10)
    assert len(known) == 10
    assert not set(known) & set(seen)
    assert len(newcomer) == 10
