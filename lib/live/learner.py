"""The near-line learner: a micro-batch of feedback in, a delta of the weights out.

One update reads: extend the catalog, train on the new events with a replay sample, count popularity, gate, and either
publish the delta with the optimiser's state and the log offset in one atomic step, or go back to the live state.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib.data.catalog import Catalog
from lib.data.histories import Histories
from lib.data.history import History, to_histories
from lib.data.popularity import event_counts, moved_reference, start_weights
from lib.data.replay import ReplaySample
from lib.errors import InputError
from lib.live.gate import Gate
from lib.live.influence import Influence, Targets, is_newcomer, last_opinions
from lib.live.micro_batch import MicroBatch, SampleSizes
from lib.live.new_items import add_rows, encode_attributes
from lib.live.settings import LearnerConfig
from lib.live.undo import UndoJournal
from lib.log.items import ItemChange
from lib.model.batches import Batch, SequenceBatches
from lib.model.delta import ROW_TENSORS, Delta, difference, grow_items, state_of
from lib.model.distributed import broadcast_from_rank_0, is_rank_0, local_batch, require_equal
from lib.model.encoder import BehaviourEncoder
from lib.model.facts import NewcomerShare, RejectedSpan, VersionFacts
from lib.model.fingerprint import Fingerprint
from lib.model.folder import Manifest
from lib.model.trainer import Trainer, TrainingConfig, train_top_layers
from lib.versions.accounts import Accounts
from lib.versions.folder import LoadedVersion
from lib.versions.registry import Registry
from lib.versions.rejections import Rejection, Rejections
from lib.versions.retention import prune

LEAST_CONTEXT = 8  # events before a user's new ones
LEAST_HALF_LIFE = 1000.0  # events: of fewer, chance decides what is popular


class NearlineLearner:
    """Owns the newest version of the weights and moves it on; a restarted one continues from the registry.

    Where the newest versions are damaged it continues from the newest whole one, whose later events it is given again;
    `damage` says so. `when_storage_fails` hears of a version that could not be stored: it is stored once it returns.

    Where torch.distributed workers each have one and do the same with it, they share every training step and stay equal
    to the bit; the first worker alone judges and stores (serving/learner_workers.py).
    """

    def __init__(
        self,
        registry: Registry,
        config: LearnerConfig,
        when_storage_fails: Callable[[OSError], None] | None = None,
        version: int | None = None,
    ):
        """Start from a stored version, the newest whole one by default."""
        self.registry = registry
        self.accounts = Accounts(registry)
        self.config = config
        self.when_storage_fails = when_storage_fails
        loaded = registry.load(version)
        self.damage = loaded.damage
        self.newest_number = max(loaded.version, registry.head() or 0)  # also of versions that are damaged
        self._take(loaded)
        self.influence = Influence(config.influence, loaded.facts.newcomers)
        self.rejections = Rejections(registry.store)
        newest = self.rejections.newest
        if newest is not None and newest.version == self.version:  # no version was published since
            self.log_offset, self.events_rejected = newest.last_offset, newest.events_rejected
        elif version is None and loaded.facts.rejected is not None:
            rejection = Rejection(
                version=self.version,
                after_offset=loaded.facts.rejected.after_offset,
                last_offset=self.log_offset,
                events=loaded.facts.rejected.events,
                events_rejected=self.events_rejected,
                reason=loaded.facts.reason or "",
            )
            if rejection not in self.rejections.all():  # the process ended after it went back, before it said so there
                self._mark(rejection)

    def _take(self, loaded: LoadedVersion) -> None:
        self.encoder: BehaviourEncoder = loaded.encoder
        self.catalog: Catalog = loaded.catalog
        self.popularity_half_life = self.config.popularity_half_life or max(len(self.catalog), LEAST_HALF_LIFE)
        self.published_items = len(self.catalog)  # later ones wait for the next delta: theirs was rejected
        self.version = loaded.version
        self.parent = loaded.parent
        self.log_offset = loaded.log_offset
        self.facts = loaded.facts
        self.events_trained = loaded.facts.events_trained
        self.events_rejected = loaded.facts.events_rejected
        self.base = base_of(loaded, self.registry)  # the version that this one follows from by deltas alone
        self.item_revision = 0  # of changed items: deltas do not hold their attributes, so all of them are asked for
        training = TrainingConfig(
            learning_rate=self.config.learning_rate or 1e-3 * min(1.0, 128 / self.encoder.config.hidden_size),
            new_row_boost=self.config.new_row_boost,
            negatives=self.config.negatives,
            seed=self.config.seed,
        )
        train_top_layers(self.encoder, self.config.trained_bytes)
        self.trainer = _trainer_of(loaded, training)
        self.fingerprint = Fingerprint(self.encoder)
        self.kind_codes = self.encoder.config.kind_codes
        self.gate = Gate(self.config.gate, self.encoder, self.catalog, self.kind_codes, self.config.seed)

    @property
    def sample_sizes(self) -> SampleSizes:
        """What the learner wants with the new events of a micro-batch."""
        config = self.config
        length = min(config.context_length, self.encoder.config.max_length)
        replay = ReplaySample(
            events=config.replay.events,
            recent_share=config.replay.recent_share,
            recent_events=config.replay.recent_events,
        )
        return SampleSizes(
            history_length=length,
            replay=replay,
            held_out_users=config.gate.held_out_users,
            held_out_length=config.gate.held_out_length,
        )

    @property
    def checksum(self) -> str:
        """Fingerprint of the newest version."""
        return self.fingerprint.checksum

    def learn(self, batch: MicroBatch) -> Delta | Rejection:
        """Train on a micro-batch; the result is published already when it is a delta."""
        events = sum(batch.new_counts)
        journal = UndoJournal(self.trainer)
        if events == 0:  # their users were erased
            facts = VersionFacts(kind="nearline", events=0)
            return self._publish(self._changes(journal, self._unpublished_rows()), batch.last_offset, facts)
        self._extend_catalog(batch)
        if (rest := broadcast_from_rank_0(self.gate.resting)) is not None:
            return self._reject(batch, rest, harmful=False)
        self.trainer.before_update = journal.record
        if is_rank_0():
            self.gate.before(batch, self.version, self.log_offset)
        if (harm := broadcast_from_rank_0(self.gate.harm)) is not None:
            return self._go_back(batch, harm)
        loss = self._train(batch)
        self._count_popularity(batch, journal)
        rows = torch.unique(torch.cat([journal.changed_rows(), self._unpublished_rows()]))
        reason = broadcast_from_rank_0(lambda: self.gate.objection(loss, rows, journal.dense, self.influence.kept))
        if reason is not None:
            journal.undo()
            return self._reject(batch, reason)
        self.events_trained += events
        self.influence.passed()
        quality = self.gate.live.quality
        ndcg = None if np.isnan(quality) else quality
        facts = VersionFacts(kind="nearline", events=events, loss=loss, ndcg=ndcg)
        delta = self._publish(self._changes(journal, rows), batch.last_offset, facts)
        if is_rank_0():
            self.gate.passed(events, delta.version, delta.log_offset, journal.embeddings())
        return delta

    def _reject(self, batch: MicroBatch, reason: str, harmful: bool = True) -> Rejection:
        """Pass a micro-batch by."""
        events = sum(batch.new_counts)
        self.events_rejected += events
        return self._mark(
            Rejection(
                version=self.version,
                after_offset=self.log_offset,
                last_offset=batch.last_offset,
                events=events,
                events_rejected=self.events_rejected,
                reason=reason,
                harmful=harmful,
            )
        )

    def _go_back(self, batch: MicroBatch, reason: str) -> Rejection:
        """Publish the weights of the gate's reference anew: what was learned since did harm, a little each time."""
        version, log_offset, since = broadcast_from_rank_0(self.gate.since_reference)
        events = sum(batch.new_counts)
        self.gate.went_back()
        try:
            loaded = self.registry.load(version)
        except InputError:  # it was pruned: what can be had is that it gets no worse
            self.gate.forget()
            return self._reject(batch, reason)
        self.events_rejected += events  # those before were trained on, and count as such
        events += since
        rejected = RejectedSpan(after_offset=log_offset, events=events)
        facts = VersionFacts(kind="rollback", restored=version, reason=reason, rejected=rejected)
        delta = self._restore(loaded, batch.last_offset, facts)
        return self._mark(
            Rejection(
                version=self.version,
                after_offset=log_offset,
                last_offset=batch.last_offset,
                events=events,
                events_rejected=self.events_rejected,
                reason=reason,
                delta=delta,
            )
        )

    def _mark(self, rejection: Rejection) -> Rejection:
        """Have it known for good which events the weights have not learned from; harmful ones are not replayed."""
        self.rejections.remember(rejection)
        self._store(lambda: self.rejections.add(rejection))
        self.log_offset = rejection.last_offset
        return rejection

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
        encode_attributes(self.encoder, self.catalog, known)
        changed = (self.encoder.item_attributes[known] != before).any(dim=1)
        rows = torch.unique(torch.cat([known[changed], self._unpublished_rows()]))
        if len(rows) == 0:
            return None
        facts = VersionFacts(kind="items", items=len(changes))
        return self._publish(self._changes(journal, rows), self.log_offset, facts)

    def take_over(self, name: str) -> None:
        """Make a model that was offered the next version.

        Raises:
            InputError: it is damaged, or describes its items differently; nothing has changed.
        """
        model = self.registry.offers.load(name)
        known = model.facts
        facts = VersionFacts(kind=known.kind, offer=name, since=known.since, events=known.events)
        self.adopt(model, facts, known.since)

    def adopt(self, model: LoadedVersion, facts: VersionFacts, parent: int | None = None) -> None:
        """Publish a new version that is another model, whole; learning goes on from that model's log offset.

        The offset may go back: what the other weights have not learned is then read again from the log, and what is
        counted as trained and rejected is what they say. Items that the model does not know get rows behind its own.

        Args:
            model: the other model.
            facts: of the new version; `events` is what the model has learned beyond its parent.
            parent: the version whose events the model has learned (lib/versions/ledger.py), None where that is not
            known.

        Raises:
            InputError: the two models describe their items differently; nothing has changed.
        """
        known, catalog = len(model.catalog), model.catalog.joined(self.catalog)
        if parent is not None and not self.accounts.traces(parent):
            parent = None
        self._take(replace(model, catalog=catalog, parent=parent))
        self._add_rows(known)
        self.version = self.base = self.newest_number = self.newest_number + 1
        self.facts = self._with_lineage(facts, time.time_ns() // 1_000_000)
        manifest = Manifest(
            version=self.version,
            parent=parent,
            log_offset=self.log_offset,
            facts=self.facts,
        )
        optimizer = self.trainer.optimizer_state()
        self.fingerprint = Fingerprint(self.encoder)
        require_equal(self.checksum)
        self._store(lambda: self.registry.publish_base(self.encoder, self.catalog, manifest, optimizer))

    def join(self, catalog: Catalog) -> None:
        """Know the items of another catalog, too; what is new gets rows behind those that are there."""
        known = len(self.catalog)
        self.catalog = self.gate.catalog = self.catalog.joined(catalog)
        self._add_rows(known)

    def restore(self, version: int) -> Delta | None:
        """Publish a new version whose weights are those of a stored one; the log offset never goes back.

        Returns None where there is no delta to it, because another base came in between.

        Raises:
            InputError: the version is not stored.
        """
        loaded = self.registry.load(version)
        facts = VersionFacts(kind="rollback", restored=version)
        if base_of(loaded, self.registry) == self.base:
            return self._restore(loaded, self.log_offset, facts)
        parent = version
        if loaded.log_offset <= self.log_offset:  # else the old weights have learned what these have not yet
            parent, loaded.log_offset = self.version, self.log_offset
            counts = {"events_trained": self.events_trained, "events_rejected": self.events_rejected}
            loaded.facts = loaded.facts.model_copy(update=counts)
        self.adopt(loaded, facts, parent)
        return None

    def _restore(self, loaded: LoadedVersion, log_offset: int, facts: VersionFacts) -> Delta:
        grow_items(loaded.encoder, self.encoder.config.item_rows)
        target = state_of(loaded.encoder)
        later = slice(len(loaded.catalog) + 1, None)  # items that came after that version keep what they have
        for name in ROW_TENSORS:
            target[name][later] = state_of(self.encoder)[name][later]
        references = np.array([int(self.encoder.popularity_reference)]), int(loaded.encoder.popularity_reference)
        target["item_popularity"][later] *= float(event_counts(*references, self.popularity_half_life)[0])
        train_top_layers(loaded.encoder, self.config.trained_bytes)
        trainer = _trainer_of(loaded, self.trainer.config)
        rows = self._rows_that_differ(target, trainer)
        _, tensors = difference(self.encoder, target, rows)
        changes = (rows, {name: np.array(value) for name, value in tensors.items()})
        for name, tensor in state_of(self.encoder).items():
            tensor.copy_(target[name])
        self.trainer.load_optimizer_state(trainer.optimizer_state())
        self.gate.forget()
        return self._publish(changes, log_offset, facts)

    def store_whole(self) -> Delta:
        """Publish a version that changes nothing and is stored whole, so that no older file is needed to load it."""
        changes = self._changes(UndoJournal(self.trainer), self._unpublished_rows())
        delta = self._publish(changes, self.log_offset, VersionFacts(kind="whole"))
        self.save_snapshot()
        return delta

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

    def _train(self, batch: MicroBatch) -> float | None:
        """Some steps, each with the new events and its own part of the replay; returns the loss of the first.

        The version seeds dropout, so that a restarted learner makes the same steps.
        """
        losses = []
        rate = self.trainer.learning_rate
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed + self.version)
            for number in range(self.config.steps):
                training = self._training_batch(replace(batch, replay=batch.replay[number :: self.config.steps]))
                if training is not None:
                    # as far as new events count, the weights may move
                    self.trainer.learning_rate = rate * self.influence.kept
                    losses.append(self.trainer.step(local_batch(training)).loss)
        self.trainer.learning_rate = rate
        return losses[0] if losses else None

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
        add_rows(self.trainer, self.catalog, known, self.config.seed)

    def _training_batch(self, batch: MicroBatch) -> Batch | None:
        """New events as targets with their context, and the replayed histories at a lower weight."""
        length = self.sample_sizes.history_length
        context = min(length, max(self.config.context_events // max(len(batch.histories), 1), LEAST_CONTEXT))
        histories = [h.newest(context + n) for h, n in zip(batch.histories, batch.new_counts, strict=True)]
        replay = [history.newest(length + 1) for history in batch.replay]
        flat = to_histories([*histories, *replay], self.catalog, self.kind_codes)
        sequences = SequenceBatches(flat, self.encoder.config)
        offsets = self._offsets([*histories, *replay])
        new = np.zeros(len(flat.rows), dtype=bool)
        for stop, history, count in zip(flat.offsets[1:], histories, batch.new_counts, strict=False):
            known = sum(kind in self.kind_codes for kind in history.newest(count).events)
            new[stop - known : stop] = True
        share = new.astype(np.float32)
        share[flat.offsets[len(histories)] :] = self.config.replay.weight
        share[new & np.isin(offsets, list(batch.quarantined))] = 0.0
        share[~new & self.rejections.cover(offsets)] = 0.0
        newcomers = self._newcomers([*histories, *replay], batch.last_offset)
        sequences.weights = self._limited(sequences.weights * share, new, flat, newcomers)
        starts, lengths = sequences.windows()
        useful = np.array([sequences.weights[s + 1 : s + n].any() for s, n in zip(starts, lengths, strict=True)], bool)
        if not useful.any():
            return None
        return sequences.training_batch(starts[useful], lengths[useful])

    def _offsets(self, histories: Sequence[History]) -> np.ndarray:
        """(E,) the log offset of every event that `to_histories` reads."""
        row_of, codes = self.catalog.row_of, self.kind_codes
        columns = ((history.offsets, history.item_ids, history.events) for history in histories)
        every = (event for column in columns for event in zip(*column, strict=True))
        return np.array([offset for offset, item, kind in every if item in row_of and kind in codes], dtype=np.int64)

    def _limited(self, weights: np.ndarray, new: np.ndarray, flat: Histories, newcomers: np.ndarray) -> np.ndarray:
        """(E,) the weights of targets, within the limits of what one user and a crowd may move."""
        owners = np.repeat(np.arange(len(flat)), flat.lengths)
        weights = weights * last_opinions(flat, owners, self.kind_codes)
        weights[flat.offsets[:-1][flat.lengths > 0]] = 0.0  # a first event has nothing that it could follow from
        targets = Targets(weights, owners, flat.rows, new, newcomers)
        return self.influence.limited(targets, self.encoder.item_popularity.numpy())

    def _newcomers(self, histories: Sequence[History], last_offset: int) -> np.ndarray:
        """(U,) bool, whose users are new here."""
        return np.array([is_newcomer(history, last_offset, self.config.influence) for history in histories], dtype=bool)

    def _count_popularity(self, batch: MicroBatch, journal: UndoJournal) -> None:
        """Count the new events, a user's of one item once in the history at hand, all within the limits."""
        new_rows, new_offsets, new_owners, counted, first = [], [], [], [], []
        for user, (history, count) in enumerate(zip(batch.histories, batch.new_counts, strict=True)):
            before = len(history) - count
            new_rows += [self.catalog.row_of[item_id] for item_id in history.item_ids[before:]]
            new_offsets += history.offsets[before:]
            new_owners += [user] * count
            known = set(history.item_ids[:before])
            for item_id, offset in zip(history.item_ids[before:], history.offsets[before:], strict=True):
                counted.append(item_id not in known and offset not in batch.quarantined)
                first.append(offset == history.first_offset)
                known.add(item_id)
        encoder, half_life = self.encoder, self.popularity_half_life
        rows = np.array(new_rows)
        popularity = encoder.item_popularity.numpy()
        targets = Targets(
            weights=np.array(counted, dtype=np.float32),
            owners=np.array(new_owners),
            rows=rows,
            new=np.ones(len(rows), bool),
            newcomers=self._newcomers(batch.histories, batch.last_offset),
        )
        left = self.influence.left(targets, popularity)
        weights = targets.weights * left * start_weights(np.array(first))
        reference, factor = moved_reference(batch.last_offset, int(encoder.popularity_reference), half_life)
        counts = torch.from_numpy(event_counts(np.array(new_offsets), reference, half_life) * weights).float()
        if factor == 1.0:
            journal.record(torch.from_numpy(np.unique(rows)))
        else:
            journal.record(torch.arange(len(encoder.item_popularity)))
            encoder.item_popularity *= factor
            encoder.popularity_reference.fill_(reference)
        encoder.item_popularity.index_add_(0, torch.from_numpy(rows), counts)

    def _changes(self, journal: UndoJournal, rows: Tensor) -> tuple[Tensor, dict[str, np.ndarray]]:
        """The changed rows of the row tensors, and of the other tensors those that differ."""
        state = state_of(self.encoder)
        tensors = {name: state[name][rows].numpy() for name in ROW_TENSORS}
        changed = (name for name, before in journal.dense.items() if not torch.equal(state[name], before))
        return rows, tensors | {name: state[name].numpy().copy() for name in changed}

    def _publish(self, changes: tuple[Tensor, dict[str, np.ndarray]], last_offset: int, facts: VersionFacts) -> Delta:
        rows, tensors = changes
        checksum = self.fingerprint.update(state_of(self.encoder), rows.numpy(), set(tensors))
        delta = Delta(
            version=self.newest_number + 1,
            parent=self.version,
            checksum=checksum,
            log_offset=last_offset,
            item_rows=self.encoder.config.item_rows,
            rows=rows.numpy(),
            tensors=tensors,
            new_items=self.catalog.item_ids[self.published_items + 1 :],
            facts=self._with_lineage(facts),
        )
        require_equal(checksum)  # and what others may still read here is not pruned before
        optimizer = self.trainer.optimizer_state(delta.rows)
        self._store(lambda: self.registry.publish_delta(delta, optimizer))
        self.accounts.add(delta)
        self.version = self.newest_number = delta.version
        self.parent, self.log_offset, self.published_items = delta.parent, last_offset, len(self.catalog)
        self.facts = delta.facts
        if self.version % self.config.snapshot_every == 0 or self.version != delta.parent + 1:
            self.save_snapshot()
        return delta

    def _with_lineage(self, facts: VersionFacts, adopted: int | None = None) -> VersionFacts:
        """Add what every version says of those that it follows from; `adopted` is the time of a new base."""
        lineage = {
            "events_trained": self.events_trained,
            "events_rejected": self.events_rejected,
            "base": self.base,
            "adopted": self.facts.adopted if adopted is None else adopted,
            "newcomers": NewcomerShare(self.influence.usual, self.influence.updates),
            "created": time.time_ns() // 1_000_000 if adopted is None else adopted,
        }
        return facts.model_copy(update=lineage)

    def save_snapshot(self) -> None:
        """Store the newest version whole, so that loading it needs no deltas, and prune what is old."""
        manifest = Manifest(version=self.version, parent=self.parent, log_offset=self.log_offset, facts=self.facts)
        optimizer = self.trainer.optimizer_state()
        self._store(lambda: self.registry.publish_snapshot(self.encoder, self.catalog, manifest, optimizer))
        self._store(lambda: prune(self.registry, self.accounts, self.config.keep_snapshots, self.base))

    def _store(self, write: Callable[[], Any]) -> None:
        """Write, and write again as often as it fails, where somebody waits for the storage."""
        if not is_rank_0():
            return
        while True:
            try:
                write()
                return
            except OSError as error:
                if self.when_storage_fails is None or isinstance(error, FileExistsError):
                    raise
                self.when_storage_fails(error)


def base_of(loaded: LoadedVersion, registry: Registry) -> int:
    """The version that a stored one follows from by deltas alone; the first one where nothing is said of it."""
    return loaded.facts.base or registry.oldest() or loaded.version


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
