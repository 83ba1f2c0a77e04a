"""The near-line learner: a micro-batch of feedback in, a delta of the weights out.

One update reads: extend the catalog, train on the new events with a replay sample, count popularity, gate, and either
publish the delta with the optimiser's state and the log offset in one atomic step, or go back to the live state.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lib.attributes import attribute_codes
from lib.catalog import Catalog
from lib.encoder import BehaviourEncoder
from lib.item_log import ItemChange
from lib.metrics import ndcg_at
from lib.model_folder import Manifest
from lib.popularity import DAY, event_counts, moved_reference
from lib.registry import LoadedVersion, Registry
from lib.sequences import Batch, SequenceBatches
from lib.training import Trainer, TrainingConfig
from lib.user_histories import History, MicroBatch, SampleSizes, to_histories
from lib.weights import ROW_TENSORS, Delta, Fingerprint, difference, grow_items, state_of


@dataclass(frozen=True)
class LearnerConfig:
    """How the weights follow the feedback."""

    learning_rate: float = 1e-3
    context_length: int = 32  # events read before a user's new ones, and of a replayed history; never over max_length
    replay_events: int = 1024  # of random users' histories, learned again with every update
    replay_weight: float = 0.5  # of a replayed target, where a new event's is 1
    negatives: int = 512
    popularity_half_life: float = 7 * DAY  # milliseconds
    held_out_users: int = 64
    held_out_length: int = 20  # events of their histories that the gate reads
    held_out_candidates: int = 1000  # a held-out target is ranked among so many random items
    loss_tolerance: float = 0.25  # the held-out loss may rise by this share
    quality_tolerance: float = 0.05  # the held-out NDCG@10 may fall by so much
    snapshot_every: int = 200  # versions
    keep_snapshots: int = 10
    seed: int = 0


@dataclass(frozen=True)
class Rejection:
    """An update that failed its gate: nothing of it is left in the weights."""

    last_offset: int
    events: int
    reason: str


class UndoJournal:
    """What the weights and the optimiser were before an update, of just those rows that it changes."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.dense = {name: t.clone() for name, t in state_of(trainer.encoder).items() if name not in ROW_TENSORS}
        self.optimizer = {n: v.copy() for n, v in trainer.optimizer_state(np.zeros(0, dtype=np.int64)).items()}
        self.rows: list[Tensor] = []
        self.saved: list[tuple[Tensor, ...]] = []

    def record(self, rows: Tensor) -> None:
        """Remember rows that are about to change."""
        row = self.trainer.row_optimizer
        encoder = self.trainer.encoder
        tensors = (encoder.item_embeddings.weight, encoder.item_popularity, row.first, row.second, row.steps)
        self.rows.append(rows)
        self.saved.append(tuple(tensor.detach()[rows].clone() for tensor in tensors))

    def changed_rows(self) -> Tensor:
        """(R,) all recorded rows, ascending."""
        return torch.unique(torch.cat(self.rows)) if self.rows else torch.zeros(0, dtype=torch.long)

    def undo(self) -> None:
        """Put everything back, the newest record first."""
        row = self.trainer.row_optimizer
        encoder = self.trainer.encoder
        state = state_of(encoder)
        for rows, saved in zip(reversed(self.rows), reversed(self.saved), strict=True):
            targets = (state[ROW_TENSORS[0]], encoder.item_popularity, row.first, row.second, row.steps)
            for target, values in zip(targets, saved, strict=True):
                target[rows] = values
        for name, values in self.dense.items():
            state[name].copy_(values)
        self.trainer.load_optimizer_state(self.optimizer, np.zeros(0, dtype=np.int64))


class NearlineLearner:
    """Owns the newest version of the weights and moves it on; a restarted one continues from the registry."""

    def __init__(self, registry: Registry, config: LearnerConfig, model: LoadedVersion | None = None):
        """Start from a loaded model, by default the newest version."""
        self.registry = registry
        self.config = config
        self._take(model or registry.load())

    def _take(self, loaded: LoadedVersion) -> None:
        self.encoder: BehaviourEncoder = loaded.encoder
        self.catalog: Catalog = loaded.catalog
        self.published_items = len(self.catalog)  # later ones wait for the next delta: theirs was rejected
        self.version = loaded.version
        self.log_offset = loaded.log_offset
        self.events_trained = int(loaded.facts.get("events_trained", 0))
        self.events_rejected = int(loaded.facts.get("events_rejected", 0))
        self.base = base_of(loaded, self.registry)  # the version that this one follows from by deltas alone
        self.adopted = int(loaded.facts.get("adopted", 0))  # when the base was taken over, in milliseconds
        self.offer: str | None = loaded.facts.get("offer")  # the name of the base, as long as nothing follows from it
        self.item_revision = 0  # of changed items: deltas do not hold their attributes, so all of them are asked for
        training = TrainingConfig(
            learning_rate=self.config.learning_rate, negatives=self.config.negatives, seed=self.config.seed
        )
        self.trainer = _trainer_of(loaded, training)
        self.fingerprint = Fingerprint(self.encoder)
        assert self.encoder.config.event_kinds is not None
        self.kind_codes = {kind: place + 1 for place, kind in enumerate(self.encoder.config.event_kinds)}

    @property
    def sample_sizes(self) -> SampleSizes:
        """What the learner wants with the new events of a micro-batch."""
        config = self.config
        length = min(config.context_length, self.encoder.config.max_length)
        return SampleSizes(length, config.replay_events, config.held_out_users, config.held_out_length)

    @property
    def checksum(self) -> str:
        """Fingerprint of the newest version."""
        return self.fingerprint.checksum

    def learn(self, batch: MicroBatch) -> Delta | Rejection:
        """Train on a micro-batch; the result is published already when it is a delta."""
        events = sum(batch.new_counts)
        journal = UndoJournal(self.trainer)
        if events == 0:  # their users were erased
            facts = {"kind": "nearline", "events": 0, "loss": None, "ndcg": None}
            return self._publish(self._changes(journal, self._unpublished_rows()), batch.last_offset, facts)
        self._extend_catalog(batch)
        self.trainer.before_update = journal.record
        before = self._held_out_quality(batch.held_out)
        training = self._training_batch(batch)
        loss = None if training is None else self._train(training)
        self._count_popularity(batch, journal)
        after = self._held_out_quality(batch.held_out)
        rows = torch.unique(torch.cat([journal.changed_rows(), self._unpublished_rows()]))
        reason = self._objection(loss, before, after, rows)
        if reason is not None:
            journal.undo()
            self.events_rejected += events
            self.log_offset = batch.last_offset
            return Rejection(batch.last_offset, events, reason)
        self.events_trained += events
        facts = {"kind": "nearline", "events": events, "loss": loss, "ndcg": None if np.isnan(after[1]) else after[1]}
        return self._publish(self._changes(journal, rows), batch.last_offset, facts)

    def change_items(self, changes: Sequence[ItemChange]) -> Delta | None:
        """Take items that were put or deleted while live; a new one gets a row and starts as those that are like it.

        Returns the published delta, None where no weight changed.
        """
        journal = UndoJournal(self.trainer)
        self.catalog.change({change.item_id: change.attributes for change in changes})
        self.item_revision = max(self.item_revision, changes[-1].revision)
        put = [change.item_id for change in changes if change.attributes is not None]
        known = torch.tensor(self.catalog.rows(put), dtype=torch.long)
        before = self.encoder.item_attributes[known]
        self._add_items(put)
        self._encode_attributes(known)
        changed = (self.encoder.item_attributes[known] != before).any(dim=1)
        rows = torch.unique(torch.cat([known[changed], self._unpublished_rows()]))
        if len(rows) == 0:
            return None
        facts = {"kind": "items", "items": len(changes), "loss": None}
        return self._publish(self._changes(journal, rows), self.log_offset, facts)

    def _encode_attributes(self, rows: Tensor) -> None:
        """Have the encoder read what the catalog says of these rows' items."""
        values, width = self.encoder.config.attribute_values, self.encoder.item_attributes.shape[1]
        if values and len(rows):
            items = self.catalog.described([self.catalog.item_ids[row] for row in rows.tolist()])
            self.encoder.item_attributes[rows] = torch.from_numpy(attribute_codes(items, values, width)[1:])

    def _likes(self, row: int, known: int) -> Tensor:
        """(R,) of the known rows those that share the most attributes with a row; none where none shares any."""
        if self.encoder.config.attribute_values:
            codes = self.encoder.item_attributes
            own = codes[row][codes[row] > 0]
            shared = torch.isin(codes[: known + 1], own).sum(dim=1)
            return ((shared > 0) & (shared == shared.max())).nonzero().flatten()
        likes = torch.from_numpy(self.catalog.likes(self.catalog.item_ids[row]))
        return likes[likes <= known]

    def adopt(self, model: LoadedVersion, facts: dict) -> None:
        """Publish a new version that is another model, whole; learning goes on from that model's log offset.

        The offset may go back: what the other weights have not learned is then read again from the log, and what is
        counted as trained is what they have learned. Items that the model does not know get rows behind its own.
        """
        version, catalog = self.version, self.catalog
        self._take(model)
        self.join(catalog)
        self.version = self.base = version + 1
        self.adopted = time.time_ns() // 1_000_000
        self.offer = facts.get("offer")
        manifest = Manifest(
            version=self.version,
            parent=version,
            log_offset=self.log_offset,
            facts=facts | self._ledger() | {"created": self.adopted},
        )
        self.registry.publish_base(self.encoder, self.catalog, manifest, self.trainer.optimizer_state())
        self.published_items = len(self.catalog)
        self.fingerprint = Fingerprint(self.encoder)

    def join(self, catalog: Catalog) -> None:
        """Know the items of another catalog, too; what is new gets rows behind those that are there."""
        known = len(self.catalog)
        self.catalog = self.catalog.joined(catalog)
        self._add_rows(known)

    def restore(self, version: int) -> Delta | None:
        """Publish a new version whose weights are those of a stored one; the log offset never goes back.

        Returns None where there is no delta to it, because another base came in between.

        Raises:
            InputError: the version is not stored.
        """
        loaded = self.registry.load(version)
        if base_of(loaded, self.registry) != self.base:
            if loaded.log_offset <= self.log_offset:  # else the old weights have learned what these have not yet
                loaded.log_offset = self.log_offset
                loaded.facts |= {"events_trained": self.events_trained, "events_rejected": self.events_rejected}
            self.adopt(loaded, {"kind": "rollback", "restored": version})
            return None
        grow_items(loaded.encoder, self.encoder.config.item_rows)
        target = state_of(loaded.encoder)
        later = slice(len(loaded.catalog) + 1, None)  # items that came after that version keep what they have
        for name in ROW_TENSORS:
            target[name][later] = state_of(self.encoder)[name][later]
        references = np.array([int(self.encoder.popularity_reference)]), int(loaded.encoder.popularity_reference)
        target["item_popularity"][later] *= float(event_counts(*references, self.config.popularity_half_life)[0])
        trainer = _trainer_of(loaded, self.trainer.config)
        rows = self._rows_that_differ(target, trainer)
        _, tensors = difference(self.encoder, target, rows)
        changes = (rows, {name: np.array(value) for name, value in tensors.items()})
        for name, tensor in state_of(self.encoder).items():
            tensor.copy_(target[name])
        self.trainer.load_optimizer_state(trainer.optimizer_state())
        return self._publish(changes, self.log_offset, {"kind": "rollback", "restored": version})

    def _rows_that_differ(self, target: Mapping[str, Tensor], trainer: Trainer) -> Tensor:
        """(R,) rows whose weights or optimiser state are not those of the target, and the unpublished ones."""
        state, own, other = state_of(self.encoder), self.trainer.row_optimizer, trainer.row_optimizer
        pairs = [(state[name], target[name]) for name in ROW_TENSORS]
        pairs += [(own.first, other.first), (own.second, other.second), (own.steps, other.steps)]
        differs = torch.zeros(len(own.steps), dtype=torch.bool)
        for now, then in pairs:
            differs |= (now != then).reshape(len(differs), -1).any(dim=1)
        differs[self._unpublished_rows()] = True
        return differs.nonzero().flatten()

    def _unpublished_rows(self) -> Tensor:
        """(R,) rows of the items that no delta has named yet."""
        return torch.arange(self.published_items + 1, len(self.catalog) + 1)

    def _train(self, batch: Batch) -> float:
        """One step; returns its loss. The version seeds dropout, so that a restarted learner makes the same step."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed + self.version)
            return self.trainer.step(batch).loss

    def _extend_catalog(self, batch: MicroBatch) -> None:
        """Give rows to items that feedback names for the first time."""
        self._add_items(
            item_id
            for history, count in zip(batch.histories, batch.new_counts, strict=True)
            for item_id in history.item_ids[len(history) - count :]
        )

    def _add_items(self, item_ids: Iterable[str]) -> None:
        """Give rows to the unknown ones among these items: the mean of those that are like each, a little apart."""
        known = len(self.catalog)
        self.catalog.extend(item_ids)
        self._add_rows(known)

    def _add_rows(self, known: int) -> None:
        """Give weights to the items of the catalog beyond the first `known`."""
        needed = len(self.catalog) + 1
        if needed == known + 1:
            return
        if needed > self.encoder.config.item_rows:
            grow_items(self.encoder, needed + needed // 10)
            self.trainer.row_optimizer.grow(self.encoder.config.item_rows)
        added = torch.arange(known + 1, needed)
        self._encode_attributes(added)
        generator = torch.Generator().manual_seed(self.config.seed + needed)
        table = self.encoder.item_embeddings.weight.detach()
        deviation = self.encoder.config.initializer_range
        table[added] = torch.randn(len(added), table.shape[1], generator=generator) * deviation
        mean = table[1 : known + 1].mean(dim=0) if known else torch.zeros(table.shape[1])
        for row in added.tolist():
            likes = self._likes(row, known)
            table[row] += table[likes].mean(dim=0) if len(likes) else mean
        self.trainer.items = len(self.catalog)

    def _training_batch(self, batch: MicroBatch) -> Batch | None:
        """New events as targets with their context, and the replayed histories at a lower weight."""
        length = self.sample_sizes.history_length
        histories = [h.newest(length + n) for h, n in zip(batch.histories, batch.new_counts, strict=True)]
        replay = [history.newest(length + 1) for history in batch.replay]
        flat = to_histories([*histories, *replay], self.catalog, self.kind_codes)
        sequences = SequenceBatches(flat, self.encoder.config)
        share = np.zeros(len(flat.rows), dtype=np.float32)
        share[flat.offsets[len(histories)] :] = self.config.replay_weight
        for stop, history, count in zip(flat.offsets[1:], histories, batch.new_counts, strict=False):
            known = sum(kind in self.kind_codes for kind in history.events[len(history) - count :])
            share[stop - known : stop] = 1.0
        sequences.weights = sequences.weights * share
        starts, lengths = sequences.windows()
        useful = np.array([sequences.weights[s + 1 : s + n].any() for s, n in zip(starts, lengths, strict=True)], bool)
        if not useful.any():
            return None
        return sequences.training_batch(starts[useful], lengths[useful])

    def _count_popularity(self, batch: MicroBatch, journal: UndoJournal) -> None:
        rows, timestamps = [], []
        for history, count in zip(batch.histories, batch.new_counts, strict=True):
            rows += [self.catalog.row_of[item_id] for item_id in history.item_ids[len(history) - count :]]
            timestamps += history.timestamps[len(history) - count :]
        encoder, half_life = self.encoder, self.config.popularity_half_life
        reference, factor = moved_reference(max(timestamps), int(encoder.popularity_reference), half_life)
        counts = torch.from_numpy(event_counts(np.array(timestamps), reference, half_life)).float()
        if factor == 1.0:
            journal.record(torch.unique(torch.tensor(rows)))
        else:
            journal.record(torch.arange(len(encoder.item_popularity)))
            encoder.item_popularity *= factor
            encoder.popularity_reference.fill_(reference)
        encoder.item_popularity.index_add_(0, torch.tensor(rows), counts)

    @torch.no_grad()
    def _held_out_quality(self, held_out: list[History]) -> tuple[float, float]:
        """(loss, NDCG@10) of the newest event of held-out users among random items; NaN without such users."""
        limit = self.config.held_out_length + 1
        flat = to_histories([history.newest(limit) for history in held_out], self.catalog, self.kind_codes)
        users = np.flatnonzero(flat.lengths >= 2)
        if len(users) == 0:
            return float("nan"), float("nan")
        flat = flat.take(users)
        self.encoder.eval()
        context = flat.without_newest()
        targets = torch.from_numpy(flat.rows[flat.offsets[1:] - 1].astype(np.int64))
        generator = torch.Generator().manual_seed(self.config.seed + self.version)
        others = torch.randint(1, len(self.catalog) + 1, (self.config.held_out_candidates,), generator=generator)
        losses, ranks = [], []
        for places, part in SequenceBatches(context, self.encoder.config).inference():
            u = self.encoder.interests(part.kinds, part.gaps, part.values, part.lengths, part.rows)
            queries = self.encoder.queries(u)
            wanted = targets[torch.from_numpy(places)]
            own = (queries * self.encoder.item_vectors(wanted)).sum(-1, keepdim=True)
            rest = queries @ self.encoder.item_vectors(others).T
            rest = rest.masked_fill(wanted[:, None] == others[None, :], float("-inf"))
            ranks.append((rest >= own).sum(1).numpy())  # ties count against it: where all are alike, nothing is found
            logits = torch.cat([own, rest], dim=1) / self.encoder.config.temperature
            losses.append(torch.logsumexp(logits, dim=1) - logits[:, 0])
        return float(torch.cat(losses).mean()), float(ndcg_at(np.concatenate(ranks), 10).mean())

    def _objection(
        self, loss: float | None, before: tuple[float, float], after: tuple[float, float], rows: Tensor
    ) -> str | None:
        """Why an update must not go live, or None."""
        state = state_of(self.encoder)
        finite = all(
            bool(torch.isfinite(tensor[rows] if name in ROW_TENSORS else tensor).all())
            for name, tensor in state.items()
        )
        if not finite or (loss is not None and not np.isfinite(loss)):
            return "a loss or a weight is not finite"
        if after[0] > before[0] * (1 + self.config.loss_tolerance):
            return f"the held-out loss rose from {before[0]:.3f} to {after[0]:.3f}"
        if after[1] < before[1] - self.config.quality_tolerance:
            return f"the held-out NDCG@10 fell from {before[1]:.3f} to {after[1]:.3f}"
        return None

    def _changes(self, journal: UndoJournal, rows: Tensor) -> tuple[Tensor, dict[str, np.ndarray]]:
        """The changed rows of the row tensors, and of the other tensors those that differ."""
        tensors = {}
        for name, tensor in state_of(self.encoder).items():
            if name in ROW_TENSORS:
                tensors[name] = tensor[rows].numpy()
            elif not torch.equal(tensor, journal.dense[name]):
                tensors[name] = tensor.numpy().copy()
        return rows, tensors

    def _publish(self, changes: tuple[Tensor, dict[str, np.ndarray]], last_offset: int, facts: dict) -> Delta:
        rows, tensors = changes
        checksum = self.fingerprint.update(state_of(self.encoder), rows.numpy(), set(tensors))
        delta = Delta(
            version=self.version + 1,
            parent=self.version,
            checksum=checksum,
            log_offset=last_offset,
            item_rows=self.encoder.config.item_rows,
            rows=rows.numpy(),
            tensors=tensors,
            new_items=self.catalog.item_ids[self.published_items + 1 :],
            facts=facts | self._ledger() | {"created": time.time_ns() // 1_000_000},
        )
        self.registry.publish_delta(delta, self.trainer.optimizer_state(delta.rows))
        self.version, self.log_offset, self.published_items = delta.version, last_offset, len(self.catalog)
        self.offer = None
        if self.version % self.config.snapshot_every == 0:
            self.save_snapshot(delta.facts)
        return delta

    def _ledger(self) -> dict[str, int]:
        """What every version says of those that it follows from."""
        return {name: getattr(self, name) for name in ("events_trained", "events_rejected", "base", "adopted")}

    def save_snapshot(self, facts: dict) -> None:
        """Store the newest version whole, so that loading it needs no deltas, and prune what is old."""
        manifest = Manifest(version=self.version, parent=self.version - 1, log_offset=self.log_offset, facts=facts)
        self.registry.publish_snapshot(self.encoder, self.catalog, manifest, self.trainer.optimizer_state())
        self.registry.prune(self.config.keep_snapshots, self.base)


def base_of(loaded: LoadedVersion, registry: Registry) -> int:
    """The version that a stored one follows from by deltas alone; the first one where nothing is said of it."""
    return int(loaded.facts.get("base") or registry.oldest() or loaded.version)


def _trainer_of(loaded: LoadedVersion, config: TrainingConfig) -> Trainer:
    """A trainer with the optimiser state of a loaded version."""
    # a change of these would move every item's vector, and a delta is to name the few items that it moves
    loaded.encoder.attribute_embeddings.requires_grad_(False)
    trainer = Trainer(loaded.encoder, len(loaded.catalog), config)
    if loaded.optimizer is not None:
        trainer.load_optimizer_state(loaded.optimizer)
    for rows, state in loaded.optimizer_deltas:
        trainer.load_optimizer_state(state, rows)
    return trainer
