"""A tiny model, and feedback for it, that the tests of lib share."""

from collections.abc import Sequence

import numpy as np
import torch

from lib.data.catalog import Catalog
from lib.data.events import EVENT_KINDS, Event
from lib.data.histories import Histories
from lib.data.history import History
from lib.live.micro_batch import MicroBatch
from lib.model.delta import state_of
from lib.model.encoder import BehaviourEncoder, BehaviourEncoderConfig
from lib.model.folder import Manifest
from lib.model.item_counts import HALF_LIVES, ItemCounts
from lib.model.presets import INPUTS
from lib.ranking.features import FEATURES
from lib.versions.registry import Registry

NOW = 1_700_000_000_000
SECOND = 1000  # milliseconds
COUNTED = {"neighbours": 4, "ranker_features": len(FEATURES)}  # settings of an encoder with counts and a ranker

torch.set_num_threads(1)  # threads that wait for each other cost more than so small a model has to compute


def tiny_config(items: int = 24, **changes) -> BehaviourEncoderConfig:
    """Width 16, one block, no dropout."""
    settings = {
        "item_rows": items + 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "max_length": 8,
        "dropout": 0.0,
        "event_kinds": list(EVENT_KINDS),
        "inputs": list(INPUTS),
        "value_boundaries": [2.0, 3.0, 4.0, 5.0],
    }
    return BehaviourEncoderConfig(**(settings | changes))


def tiny_encoder(items: int = 24, seed: int = 0, **changes) -> BehaviourEncoder:
    """An untrained encoder whose every tensor is random, so that each of them matters."""
    torch.manual_seed(seed)
    encoder = BehaviourEncoder(tiny_config(items, **changes))
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "norm" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        encoder.item_embeddings.weight[0] = 0.0
    return encoder.eval()


def item_ids(count: int, first: int = 1) -> list[str]:
    """i1, i2, ...: the number is the row in a catalog made of them."""
    return [f"i{number}" for number in range(first, first + count)]


def history(items: Sequence[int | str], event: str = "click", start: int = NOW, user_id: str = "u") -> History:
    """Events a minute apart, all of one kind."""
    names = [item if isinstance(item, str) else f"i{item}" for item in items]
    times = range(start, start + 60 * SECOND * len(names), 60 * SECOND)
    return History.of(
        Event(user_id, name, event, None, timestamp) for name, timestamp in zip(names, times, strict=True)
    )


def random_histories(users: int, items: int, generator: np.random.Generator, longest: int = 30) -> Histories:
    """Users with random events of every kind, values where the kind is a rating."""
    lengths = generator.integers(1, longest + 1, users)
    count = int(lengths.sum())
    kinds = generator.integers(1, len(EVENT_KINDS) + 1, count).astype(np.int8)
    rated = kinds == EVENT_KINDS.index("rating") + 1
    return Histories(
        [f"u{user}" for user in range(users)],
        np.concatenate([[0], np.cumsum(lengths)]),
        generator.integers(1, items + 1, count).astype(np.int32),
        kinds,
        np.where(rated, generator.integers(1, 6, count), np.nan).astype(np.float32),
        NOW + np.cumsum(generator.integers(0, 1000, count)) * SECOND,
    )


def micro_batch(
    last_offset: int,
    histories: Sequence[History],
    new_counts: Sequence[int] | None = None,
    replay: Sequence[History] = (),
    held_out: Sequence[History] = (),
) -> MicroBatch:
    """What the aggregator would release; by default the newest event of each history is new."""
    counts = [1] * len(histories) if new_counts is None else list(new_counts)
    new = [[*range(len(history) - count, len(history))] for history, count in zip(histories, counts, strict=True)]
    users = [f"user-{number}" for number in range(len(counts))]
    return MicroBatch(
        last_offset, list(histories), new, [NOW] * sum(counts), list(replay), list(held_out), user_ids=users
    )


def started_registry(location, items: int = 24, **changes) -> Registry:
    """A registry whose first version is a tiny encoder of items i1, i2, ..."""
    registry = Registry(location)
    registry.publish_snapshot(tiny_encoder(items, **changes), Catalog(item_ids(items)), Manifest(version=1), None)
    return registry


def trends_now(counts: ItemCounts, rows: np.ndarray) -> np.ndarray:
    """The trends of rows as of the clock, (..., H)."""
    own = counts.arrays()
    ago = own["counted_at"][rows] - own["clock"][0]
    return (own["trends"][rows] * np.exp2(ago[..., None] / HALF_LIVES)).astype(np.float32)


def copied_state(encoder: BehaviourEncoder) -> dict[str, torch.Tensor]:
    """The encoder's tensors, copied."""
    return {name: tensor.clone() for name, tensor in state_of(encoder).items()}


def assert_same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Equal to the bit."""
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f"these tensors differ: {different}"
