"""A model that learns: encoder, catalog and optimiser together, and what an update has changed in them."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lib.data.catalog import Catalog
from lib.data.popularity import event_counts, same_reference
from lib.live.new_items import Likes, add_rows
from lib.live.settings import LearnerConfig
from lib.live.undo import UndoJournal
from lib.log.items import ItemChange
from lib.model.delta import (
    NO_ROWS,
    ROW_TENSORS,
    difference,
    grow_items,
    make_room,
    state_of,
    with_new_rows,
)
from lib.model.encoder import BehaviourEncoder
from lib.model.fingerprint import Fingerprint
from lib.model.item_counts import COUNT_TENSORS
from lib.model.trainer import Trainer, TrainingConfig, train_top_layers
from lib.ranking.stage import stage_of
from lib.versions.folder import LoadedVersion

LEAST_HALF_LIFE = 1000.0  # events: of fewer, chance decides what is popular


def popularity_half_life(chosen: float | None, loaded: LoadedVersion) -> float:
    """Return the events after which one counts half in what is popular.

    They are those chosen, or those of the version, or of one that does not say as many as it has items.
    """
    return chosen or loaded.facts.half_life or max(len(loaded.catalog), LEAST_HALF_LIFE)


class Changes(NamedTuple):
    """What a delta is made of: the changed rows (R,), the row tensors' values there, and the other tensors changed."""

    rows: Tensor
    tensors: dict[str, np.ndarray]
    popularity_scale: float = 1.0  # of all rows, before these change
    count_rows: np.ndarray = NO_ROWS  # (S,) changed rows of the counts


class LearningModel:
    """Weights, catalog and optimiser of one version, which then move on together."""

    def __init__(self, loaded: LoadedVersion, config: LearnerConfig, catalog: Catalog | None = None):
        """Continue from a loaded version; items of `catalog` that it does not know get rows behind its own.

        Raises:
            InputError: version and catalog describe their items differently.
        """
        self.config = config
        self.encoder = loaded.encoder
        self.catalog = loaded.catalog if catalog is None else loaded.catalog.joined(catalog)
        self.kind_codes = self.encoder.config.kind_codes
        self.popularity_half_life = popularity_half_life(config.popularity_half_life, loaded)
        self.counted_half_life = loaded.facts.half_life or self.popularity_half_life  # of the counts as they are
        make_room(self.encoder)
        train_top_layers(self.encoder, config.trained_bytes)
        self.trainer = _trainer_of(loaded, _training_config(config, self.encoder))
        self.trainer.row_optimizer.make_room()
        self.likes = Likes(self.encoder, self.catalog)
        add_rows(self.trainer, self.catalog, known=len(loaded.catalog), seed=config.seed, likes=self.likes)
        self.published_items = len(self.catalog)  # later ones are named by the next delta
        self.fingerprint = Fingerprint(self.encoder)  # of the published weights
        # of the published weights, and of counts as they are; None where the model has no ranker
        self.stage = stage_of(self.encoder)

    def add_items(self, item_ids: Iterable[str]) -> None:
        """Give rows to the unknown ones among these items: the mean of those that are like each, a little apart."""
        known = len(self.catalog)
        self.catalog.extend(item_ids)
        add_rows(self.trainer, self.catalog, known, self.config.seed, self.likes)

    @property
    def unpublished_items(self) -> int:
        """How many items have rows that no delta has named yet."""
        return len(self.catalog) - self.published_items

    def give_rows_back(self) -> None:
        """Take the rows of the items that no delta has named: their update was rejected, and others may have them."""
        rows = slice(self.published_items + 1, len(self.catalog) + 1)
        for name in ROW_TENSORS:
            state_of(self.encoder)[name][rows] = 0
        if self.encoder.counts is not None:
            self.encoder.counts.clear(rows)
        self.catalog.shorten(self.published_items)
        self.trainer.items = len(self.catalog)

    def change_items(self, changes: Sequence[ItemChange]) -> Tensor:
        """Take over items that were put or deleted; returns the known rows (R,) whose attributes are others now."""
        self.catalog.change({change.item_id: change.attributes for change in changes})
        put = [change.item_id for change in changes if change.attributes is not None]
        known = torch.tensor(self.catalog.rows(put), dtype=torch.long)
        before = self.encoder.item_attributes[known]
        self.add_items(put)
        self.likes.encode(known)
        return known[(self.encoder.item_attributes[known] != before).any(dim=1)]

    def rows_to_publish(self, *changed: Tensor) -> Tensor:
        """Return (R,) these rows, and those of the items that no delta has named yet; ascending."""
        unpublished = torch.arange(self.published_items + 1, len(self.catalog) + 1)
        return torch.unique(torch.cat([*changed, unpublished]))

    def changes(self, journal: UndoJournal, rows: Tensor) -> Changes:
        """Return these rows (R,) of the row tensors, and of the other tensors those that an update has changed."""
        state = state_of(self.encoder)
        tensors = {name: state[name][rows].numpy() for name in ROW_TENSORS}
        count_rows, counts = self._counts_at(self.rows_to_publish(journal.count_rows).numpy())
        changed = (name for name, before in journal.dense.items() if not torch.equal(state[name], before))
        dense = {name: state[name].numpy().copy() for name in changed}
        return Changes(rows, tensors | dense | counts, journal.popularity_scale, count_rows)

    @property
    def checksum(self) -> str:
        """Fingerprint of the published weights."""
        return self.fingerprint.checksum

    def fingerprint_with(self, changes: Changes) -> str:
        """Take changes into the fingerprint, and return it."""
        if changes.popularity_scale != 1.0:
            self.fingerprint.forget("item_popularity")
        names, rows = set(changes.tensors), changes.rows.numpy()
        return self.fingerprint.update(state_of(self.encoder), rows, names, changes.count_rows)

    def follow(self, changes: Changes) -> None:
        """Rank by these changes from now on, as they are published."""
        if self.stage is None:
            return
        index = self.stage.index
        rows = with_new_rows(changes.rows.numpy(), len(index), self.encoder.config.item_rows)
        with torch.inference_mode():
            index.update(rows, self.encoder.item_vectors(torch.from_numpy(rows)).cpu().numpy())
        self.stage.follow(changes.count_rows)

    def follow_counts(self, rows: Tensor) -> None:
        """Rank by the counts as they are now, of which these rows (S,) have changed."""
        if self.stage is not None:
            self.stage.follow(rows.numpy())

    def _counts_at(self, rows: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return rows, and the counts there by the names of their tensors; none where nothing is counted."""
        if self.encoder.counts is None:
            return NO_ROWS, {}
        state = state_of(self.encoder)
        return rows, {name: state[name].numpy()[rows] for name in COUNT_TENSORS}

    def go_back_to(self, loaded: LoadedVersion) -> Changes:
        """Take over the weights and the optimiser of another version; items that came after it keep what they have.

        So does what all items are: attributes are a fact of the catalog as it is now.
        """
        grow_items(loaded.encoder, self.encoder.config.item_rows)
        own, target = state_of(self.encoder), state_of(loaded.encoder)
        later = slice(len(loaded.catalog) + 1, None)
        for name in ROW_TENSORS:
            target[name][later] = own[name][later]
        for name in COUNT_TENSORS if self.encoder.counts is not None else ():
            target[name][later] = own[name][later]
        target["item_attributes"].copy_(own["item_attributes"])
        half_life, then = self.counted_half_life, popularity_half_life(None, loaded)
        reference = same_reference(loaded.log_offset, int(loaded.encoder.popularity_reference), then, half_life)
        loaded.encoder.popularity_reference.fill_(reference)
        factor = event_counts(np.array([int(self.encoder.popularity_reference)]), reference, half_life)
        target["item_popularity"][later] *= float(factor[0])
        train_top_layers(loaded.encoder, self.config.trained_bytes)
        trainer = _trainer_of(loaded, self.trainer.config)
        rows = self._rows_that_differ(target, trainer)
        _, tensors = difference(self.encoder, target, rows)
        counted = self._counts_that_differ(target)
        for name, tensor in own.items():
            tensor.copy_(target[name])
        count_rows, counts = self._counts_at(counted)
        changes = Changes(rows, {name: np.array(value) for name, value in tensors.items()} | counts, 1.0, count_rows)
        self.trainer.load_optimizer_state(trainer.optimizer_state())
        return changes

    def _counts_that_differ(self, target: dict[str, Tensor]) -> np.ndarray:
        """Return (S,) rows whose counts are not those of the target, and the unpublished ones."""
        differs = torch.zeros(self.encoder.config.item_rows, dtype=torch.bool)
        own = state_of(self.encoder)
        for name in COUNT_TENSORS if self.encoder.counts is not None else ():
            differs |= (own[name] != target[name]).reshape(len(differs), -1).any(dim=1)
        differs[self.rows_to_publish()] = True
        return differs.nonzero().flatten().numpy()

    def _rows_that_differ(self, target: dict[str, Tensor], trainer: Trainer) -> Tensor:
        """Return (R,) rows whose weights or optimiser state are not the target's, and the unpublished ones."""
        state, own, other = state_of(self.encoder), self.trainer.row_optimizer, trainer.row_optimizer
        pairs = [(state[name], target[name]) for name in ROW_TENSORS]
        pairs += [(own.first, other.first), (own.second, other.second), (own.steps, other.steps)]
        differs = torch.zeros(len(own.steps), dtype=torch.bool)
        for now, then in pairs:
            differs |= (now != then).reshape(len(differs), -1).any(dim=1)
        differs[self.rows_to_publish()] = True
        return differs.nonzero().flatten()


def _training_config(config: LearnerConfig, encoder: BehaviourEncoder) -> TrainingConfig:
    return TrainingConfig(
        learning_rate=config.learning_rate or 1e-3 * min(1.0, 128 / encoder.config.hidden_size),
        new_row_boost=config.new_row_boost,
        negatives=config.negatives,
        seed=config.seed,
    )


def _trainer_of(loaded: LoadedVersion, config: TrainingConfig) -> Trainer:
    """Make a trainer with the optimiser state of a loaded version."""
    # a change of these would move every item's vector, and a delta is to name the few items that it moves
    loaded.encoder.attribute_embeddings.requires_grad_(False)
    trainer = Trainer(loaded.encoder, len(loaded.catalog), config)
    if loaded.optimizer is not None:
        trainer.load_optimizer_state(loaded.optimizer)
    for rows, state in loaded.optimizer_deltas:
        trainer.load_optimizer_state(state, rows)
    return trainer
