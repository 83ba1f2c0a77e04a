"""An explanation names the events whose absence costs the item most."""

import numpy as np
import pytest
import torch

from lib.data.catalog import Catalog
from lib.data.history import History, to_histories
from lib.model.batches import SequenceBatches
from lib.model.encoder import BehaviourEncoder
from lib.ranking.explain import Influence, influences, most_influential, occluded
from tests.helpers.tiny import NOW, SECOND, item_ids, tiny_encoder

ITEMS = 24


@pytest.fixture(scope="module")
def encoder() -> BehaviourEncoder:
    return tiny_encoder(ITEMS)


def told(encoder: BehaviourEncoder, history: History):
    """What the encoder knows of a history."""
    assert encoder.config.event_kinds is not None
    kinds = {kind: place + 1 for place, kind in enumerate(encoder.config.event_kinds)}
    return to_histories([history], Catalog(item_ids(ITEMS)), kinds)


def mixed_history(events: int, seed: int = 0) -> History:
    """Events of several kinds, some with values, at times from seconds to hours apart."""
    generator = np.random.default_rng(seed)
    times = NOW + np.cumsum(2 ** generator.integers(0, 14, events)) * SECOND
    kinds = generator.choice(["click", "rating", "purchase"], events)
    return History(
        [f"i{row}" for row in generator.integers(1, ITEMS + 1, events)],
        kinds.tolist(),
        [float(generator.integers(3, 6)) if kind == "rating" else None for kind in kinds],
        times.tolist(),
        [0] * events,
    )


def without(history: History, event: int) -> History:
    """The same history, had one event never happened."""
    rest = history.slice(0, event)
    rest.extend(history.slice(event + 1, len(history)))
    return rest


@torch.no_grad()
def scores_of(encoder: BehaviourEncoder, history: History) -> np.ndarray:
    """(items + 1,) s = uT A v, through the batches that training and evaluation read."""
    _, batch = next(SequenceBatches(told(encoder, history), encoder.config).inference())
    u = encoder(batch.kinds, batch.gaps, batch.values, batch.lengths, batch.rows)[0, int(batch.lengths[0]) - 1]
    return (encoder.queries(u) @ encoder.item_vectors().T).numpy()


def queries_of(encoder: BehaviourEncoder):
    """The encoder as a function of (4, T) codes, one history at a time."""

    @torch.no_grad()
    def queries(histories) -> np.ndarray:
        lines = []
        for codes in histories:
            rows, kinds, gaps, values = torch.from_numpy(codes)[:, None]
            u = encoder.interests(kinds, gaps, values, torch.tensor([codes.shape[1]]), rows)
            lines.append(encoder.queries(u).numpy()[0])
        return np.stack(lines)

    return queries


@pytest.mark.parametrize("events", [2, 5, 8, 9, 10, 15])  # the encoder reads 8
def test_influence_is_what_the_score_loses_without_the_event(encoder, events):
    history, items = mixed_history(events), np.array([3, 9, 20])
    vectors = encoder.item_vectors().detach().numpy()[items]
    found = influences(told(encoder, history), encoder.config, queries_of(encoder), vectors)
    explained = range(max(events - 8, 0), events)
    whole = scores_of(encoder, history)[items]
    expected = [whole - scores_of(encoder, without(history, event))[items] for event in explained]
    assert found.shape == (len(explained), 3)
    assert np.allclose(found, expected, atol=1e-5)
    assert np.abs(found).max() > 0.01


def test_the_only_event_has_all_the_influence(encoder):
    history = mixed_history(1)
    vectors = encoder.item_vectors().detach().numpy()[[3, 9]]
    found = influences(told(encoder, history), encoder.config, queries_of(encoder), vectors)
    assert np.allclose(found, scores_of(encoder, history)[None, [3, 9]], atol=1e-6)


def test_the_whole_history_comes_first_and_then_without_each_event_from_the_oldest(encoder):
    history = mixed_history(11)
    events = told(encoder, history)
    whole, *others = occluded(events, encoder.config)
    assert whole[0].tolist() == events.rows[3:].tolist()
    assert len(others) == 8
    for place, codes in enumerate(others):
        assert codes[0].tolist() == np.delete(events.rows, 3 + place)[-8:].tolist()


def test_events_that_the_encoder_does_not_look_at_have_no_influence():
    """Without attention the newest event alone makes the interest."""
    changed = tiny_encoder(ITEMS)
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if "blocks" in name:
                parameter.zero_()
    history = mixed_history(6)
    vectors = changed.item_vectors().detach().numpy()
    found = influences(told(changed, history), changed.config, queries_of(changed), vectors)
    assert np.allclose(found[:-2], 0, atol=1e-6)  # the gap of the newest event is from the one before
    assert (np.abs(found[-1]) > 0.01).mean() > 0.5


def test_the_strongest_events_that_raised_the_score_are_named():
    influence = np.array([[0.1, -0.2], [0.3, 0.0], [-0.1, -0.3], [0.2, -0.1], [0.05, 0.4]])
    assert most_influential(influence) == [
        [Influence(1, 0.3), Influence(3, 0.2), Influence(0, 0.1)],
        [Influence(4, 0.4)],
    ]
    assert most_influential(influence, 1) == [[Influence(1, 0.3)], [Influence(4, 0.4)]]
    assert most_influential(-np.ones((2, 1))) == [[]]
