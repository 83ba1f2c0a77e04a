"""What new events add to the popularity of their items, within the limits of what one user and a crowd may move."""

import numpy as np
import torch

from lib.data.popularity import event_counts, moved_reference, same_reference, start_weights
from lib.live.influence import Influence, Targets, newcomers_of
from lib.live.learning_model import LearningModel
from lib.live.micro_batch import MicroBatch
from lib.live.undo import UndoJournal


def count_popularity(batch: MicroBatch, model: LearningModel, influence: Influence, journal: UndoJournal) -> None:
    """Count the new events of items that have a row, a user's of one item once in the history at hand.

    The journal can take it back.
    """
    new_rows, new_offsets, new_owners, counted, first = [], [], [], [], []
    for user, (history, places) in enumerate(zip(batch.histories, batch.new, strict=True)):
        new = set(places)
        known = {item_id for place, item_id in enumerate(history.item_ids) if place not in new}
        for place in places:
            item_id, offset = history.item_ids[place], history.offsets[place]
            row = model.catalog.row_of.get(item_id)
            if row is None:
                continue
            new_rows.append(row)
            new_offsets.append(offset)
            new_owners.append(user)
            counted.append(item_id not in known and offset not in batch.quarantined)
            first.append(offset == history.first_offset)
            known.add(item_id)
    encoder, half_life = model.encoder, model.popularity_half_life
    reference = int(encoder.popularity_reference)
    if half_life != model.counted_half_life:  # it was set to another one: earlier counts go on from here by this one
        reference = same_reference(batch.last_offset, reference, model.counted_half_life, half_life)
        encoder.popularity_reference.fill_(reference)
    if not new_rows:
        return
    rows = np.array(new_rows)
    targets = Targets(
        weights=np.array(counted, dtype=np.float32),
        owners=np.array(new_owners),
        rows=rows,
        new=np.ones(len(rows), bool),
        newcomers=newcomers_of(batch.histories, batch.last_offset, influence.limits),
    )
    left = influence.left(targets, encoder.item_popularity.numpy())
    weights = targets.weights * left * start_weights(np.array(first))
    reference, factor = moved_reference(batch.last_offset, reference, half_life)
    counts = torch.from_numpy(event_counts(np.array(new_offsets), reference, half_life) * weights).float()
    if factor != 1.0:
        journal.scale_popularity(factor)
        encoder.popularity_reference.fill_(reference)
    journal.record(torch.from_numpy(np.unique(rows)))
    encoder.item_popularity.index_add_(0, torch.from_numpy(rows), counts)
