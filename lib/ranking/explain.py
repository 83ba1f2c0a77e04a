"""Explanation: the events of a history that moved an item most, by leaving each of them out.

The influence of an event on an item is the score s = uT A v that the item has with the whole history, less the score
it has with the history without the event (occlusion; Zeiler & Fergus 2014, for images). It is what the encoder does,
not a similarity of items. Of two events that say the same, leaving out either changes little: both show little
influence.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lib.data.catalog import Catalog
from lib.data.histories import Histories
from lib.data.history import History, to_histories
from lib.model.batches import SequenceBatches
from lib.model.dislikes import without_dislikes
from lib.model.encoder import BehaviourEncoderConfig

Queries = Callable[[Sequence[np.ndarray]], np.ndarray]  # histories as (4, T) codes -> (B, C) uT A


class Influence(NamedTuple):
    """An event, by its place among the explained ones, and what it added to the item's score."""

    event: int
    score: float


def reasons(
    history: History, catalog: Catalog, config: BehaviourEncoderConfig, queries: Queries, vectors: np.ndarray
) -> list[str | None]:
    """Name for each item the events that raised its score most, such as "click i3, purchase i7"; None where none did.

    Args:
        history: one person's events, of which the encoder knows at least one that is no dislike.
        catalog: the encoder's.
        config: the encoder's.
        queries: the encoder.
        vectors: (k, C) vectors v of the items.
    """
    liked, _ = without_dislikes(to_histories([history], catalog, config.kind_codes), config)
    influence = influences(liked, config, queries, vectors)
    kinds = config.event_kinds or []
    names = [
        f"{kinds[kind - 1]} {catalog.item_ids[row]}"
        for row, kind in zip(liked.rows.tolist(), liked.kinds.tolist(), strict=True)
    ][-config.max_length :]
    return [", ".join(dict.fromkeys(names[event] for event, _ in own)) or None for own in most_influential(influence)]


def influences(history: Histories, config: BehaviourEncoderConfig, queries: Queries, vectors: np.ndarray) -> np.ndarray:
    """Return (H, k) what each of the newest H = min(events, max_length) events added to the score of each item.

    The oldest event comes first. An event that is the only one added the whole score.

    Args:
        history: one person's events that the encoder knows, at least one.
        config: the encoder's.
        queries: the encoder; it is called once, with all histories, of which none is empty.
        vectors: (k, C) item vectors v.
    """
    whole, *without = occluded(history, config)
    scores = queries([whole, *(codes for codes in without if codes.shape[1])]) @ vectors.T  # (H + 1, k)
    if len(scores) == 1:
        return scores
    return scores[0] - scores[1:]


def occluded(history: Histories, config: BehaviourEncoderConfig) -> list[np.ndarray]:
    """Return the history as (4, T) codes, whole and then without each of its newest H events.

    Codes are rows, kinds, gaps and values. An event that lay just beyond max_length comes in where another is left out,
    as it would had that never happened; gaps are those between the events that are left.
    """
    count = len(history.rows)
    explained = min(count, config.max_length)
    events = np.arange(max(count - config.max_length - 2, 0), count)  # the one that comes in, and what its gap is from
    kept = [events, *(events[events != event] for event in range(count - explained, count))]
    places = np.concatenate(kept)
    lengths = np.array([len(own) for own in kept])
    several = Histories(
        user_ids=[""] * len(kept),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        rows=history.rows[places],
        kinds=history.kinds[places],
        values=history.values[places],
        timestamps=history.timestamps[places],
    )
    codes = SequenceBatches(several, config).codes()
    stops = several.offsets[1:]
    starts = np.maximum(several.offsets[:-1], stops - config.max_length)
    return [codes[:, start:stop] for start, stop in zip(starts, stops, strict=True)]


def most_influential(influence: np.ndarray, count: int = 3) -> list[list[Influence]]:
    """Find for each of k items at most `count` events that raised its score, the strongest first.

    Args:
        influence: (H, k) of each event on each item.
        count: the most events of an item.
    """
    order = np.argsort(-influence, axis=0, kind="stable")[:count]  # (<= count, k)
    return [
        [Influence(int(event), float(influence[event, item])) for event in order[:, item] if influence[event, item] > 0]
        for item in range(influence.shape[1])
    ]
