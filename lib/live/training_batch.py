"""What a micro-batch becomes before a training step: context, new events and replayed windows, each with its weight."""

from collections.abc import Sequence, Set

import numpy as np

from lib.data.history import History, to_histories
from lib.live.influence import Influence, Targets, last_opinions, newcomers_of
from lib.live.learning_model import LearningModel
from lib.live.micro_batch import MicroBatch
from lib.live.settings import LearnerConfig
from lib.model.batches import Batch, SequenceBatches
from lib.versions.rejections import Rejections

LEAST_CONTEXT = 8  # events before a user's new ones


def training_batch(
    batch: MicroBatch, model: LearningModel, config: LearnerConfig, influence: Influence, rejections: Rejections
) -> Batch | None:
    """Make new events targets with their context, and replayed ones at a lower weight; None where none is a target.

    Args:
        batch: the new events and the windows to learn again.
        model: that learns; its catalog has the new items.
        config: how much context is read, and what a replayed target weighs.
        influence: limits what one user and a crowd may move.
        rejections: events that did harm once are context, and no targets again.
    """
    length = min(config.context_length, model.encoder.config.max_length)
    context = min(length, max(config.context_events // max(len(batch.histories), 1), LEAST_CONTEXT))
    starts = [max(places[0] - context, 0) for places in batch.new]
    histories = [history.slice(start, len(history)) for history, start in zip(batch.histories, starts, strict=True)]
    replay = [history.newest(length + 1) for history in batch.replay]
    flat = to_histories([*histories, *replay], model.catalog, model.kind_codes)
    places = [{place - start for place in own} for own, start in zip(batch.new, starts, strict=True)]
    offsets, new = offsets_and_new([*histories, *replay], [*places, *(set() for _ in replay)], model)
    share = new.astype(np.float32)
    share[flat.offsets[len(histories)] :] = config.replay.weight
    share[new & np.isin(offsets, list(batch.quarantined))] = 0.0
    share[~new & rejections.cover(offsets)] = 0.0
    sequences = SequenceBatches(flat, model.encoder.config)
    owners = np.repeat(np.arange(len(flat)), flat.lengths)
    weights = sequences.weights * share * last_opinions(flat, owners, model.kind_codes)
    weights[flat.offsets[:-1][flat.lengths > 0]] = 0.0  # a first event has nothing that it could follow from
    targets = Targets(
        weights=weights,
        owners=owners,
        rows=flat.rows,
        new=new,
        newcomers=newcomers_of([*histories, *replay], batch.last_offset, influence.limits),
    )
    sequences.weights = influence.limited(targets, model.encoder.item_popularity.numpy())
    return _useful(sequences)


def offsets_and_new(
    histories: Sequence[History], new: Sequence[Set[int]], model: LearningModel
) -> tuple[np.ndarray, np.ndarray]:
    """Return (E,) the log offset, and (E,) bool whether it is new, of each event that `to_histories` reads."""
    row_of, codes = model.catalog.row_of, model.kind_codes
    offsets: list[int] = []
    are_new: list[bool] = []
    for history, places in zip(histories, new, strict=True):
        columns = zip(history.item_ids, history.events, history.offsets, strict=True)
        for place, (item_id, kind, offset) in enumerate(columns):
            if item_id in row_of and kind in codes:
                offsets.append(offset)
                are_new.append(place in places)
    return np.array(offsets, dtype=np.int64), np.array(are_new, dtype=bool)


def _useful(sequences: SequenceBatches) -> Batch | None:
    """Return the windows that have a target."""
    starts, lengths = sequences.windows()
    useful = np.array([sequences.weights[s + 1 : s + n].any() for s, n in zip(starts, lengths, strict=True)], bool)
    return sequences.training_batch(starts[useful], lengths[useful]) if useful.any() else None
