"""What new events do beside training the encoder: they are counted, and the ranker learns from them.

First the ranker takes a step: it is shown what it would have answered, with weights and counts that know nothing of the
new events yet, and what the person then took. Then the events are counted (lib/model/item_counts.py).
"""

from dataclasses import dataclass

import numpy as np
import torch

from lib.data.histories import Histories
from lib.data.history import to_histories
from lib.live.influence import Influence, Targets, newcomers_of
from lib.live.learning_model import LearningModel
from lib.live.micro_batch import MicroBatch
from lib.live.training_batch import offsets_and_new
from lib.live.undo import UndoJournal
from lib.model.distributed import broadcast_from_rank_0
from lib.model.item_counts import contexts_of
from lib.ranking.fit import examples_at, likes

LEARNING_RATE = 1e-3  # of the ranker, where new events count in full


@dataclass(frozen=True)
class NewEvents:
    """New events that were no dislikes, in the order of the log."""

    histories: Histories  # that they are in
    places: np.ndarray  # (E,) int64, of the events in these
    liked: np.ndarray  # (N,) bool, of all events of the histories
    weights: np.ndarray  # (E,) what is left of each within the limits of influence


def new_events(batch: MicroBatch, model: LearningModel, influence: Influence) -> NewEvents:
    """Return the new events of a micro-batch; those in quarantine are left out."""
    histories = to_histories(batch.histories, model.catalog, model.kind_codes)
    offsets, new = offsets_and_new(batch.histories, [set(places) for places in batch.new], model)
    liked = likes(histories, model.encoder.config) > 0
    counted = new & liked & ~np.isin(offsets, list(batch.quarantined))
    targets = Targets(
        weights=counted.astype(np.float32),
        owners=np.repeat(np.arange(len(histories)), histories.lengths),
        rows=histories.rows,
        new=new,
        newcomers=newcomers_of(batch.histories, batch.last_offset, influence.limits),
    )
    left = influence.left(targets, model.encoder.item_popularity.numpy())
    places = np.flatnonzero(counted)
    places = places[np.argsort(offsets[places], kind="stable")]
    return NewEvents(histories, places, liked, left[places])


def learn_ranking(events: NewEvents, model: LearningModel) -> None:
    """Take a step of the ranker; of several workers that learn together rank 0 does, and the others take it over."""
    ranker = model.encoder.ranker
    assert ranker is not None
    own = dict(ranker.named_buffers())

    def stepped() -> dict[str, np.ndarray]:
        _step(events, model)
        return {name: tensor.numpy() for name, tensor in own.items()}

    for name, values in broadcast_from_rank_0(stepped).items():
        own[name].copy_(torch.from_numpy(values))


def _step(events: NewEvents, model: LearningModel) -> None:
    stage = model.stage
    assert stage is not None
    known = events.histories.rows < len(stage.index)  # not so of items that are new with these events
    answered = known[events.places]
    if not answered.any():
        return
    places = (np.cumsum(known) - 1)[events.places[answered]]
    examples = examples_at(stage, events.histories.select(known), places)
    weights = torch.from_numpy(events.weights[answered][examples.found])
    if float(weights.sum()) > 0:
        rate = LEARNING_RATE * min(float(events.weights.mean()), 1.0)
        stage.ranker.step(examples.features, examples.kinds, examples.targets, weights, rate)


def count_events(events: NewEvents, model: LearningModel, journal: UndoJournal) -> None:
    """Count the events; the journal can take it back."""
    counts = model.encoder.counts
    assert counts is not None
    liked = events.histories.select(events.liked)
    places = (np.cumsum(events.liked) - 1)[events.places]
    contexts, items = contexts_of(liked, places), liked.rows[places].astype(np.int64)
    journal.record_counts(torch.from_numpy(counts.rows_of(contexts, items)))
    times = int(counts.clock) + 1 + np.arange(len(items))
    counts.count(contexts, items, events.weights.astype(np.float64), times)
    model.follow_counts(journal.count_rows)  # the gate judges what is answered with them
