"""The near-line learner: a micro-batch of feedback in, a delta of the weights out.

One update reads: extend the catalog, train on the new events with a replay sample, count popularity, gate, and either
publish the delta with the optimiser's state and the log offset in one atomic step, or go back to the live state.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from lib.errors import InputError
from lib.live.counting import count_events, learn_ranking, new_events
from lib.live.gate import Gate
from lib.live.influence import Influence
from lib.live.learning_model import LearningModel
from lib.live.lineage import Lineage
from lib.live.micro_batch import MicroBatch, SampleSizes
from lib.live.popularity import count_popularity
from lib.live.settings import LearnerConfig
from lib.live.training_batch import training_batch
from lib.live.undo import UndoJournal
from lib.log.items import ItemChange
from lib.model.delta import Delta
from lib.model.distributed import broadcast_from_rank_0, is_rank_0, local_batch
from lib.model.facts import RejectedSpan, VersionFacts
from lib.versions.folder import LoadedVersion
from lib.versions.registry import Registry
from lib.versions.rejections import Rejection, Rejections


class NearlineLearner:
    """Owns the newest version of the weights and moves it on; a restarted one continues from the registry.

    Where the newest versions are damaged it continues from the newest whole one, whose later events it is given again;
    `damage` says so. `when_storage_fails` hears of a version that could not be stored: it is stored once it returns.

    Where torch.distributed workers each have one and do the same with it, they share every training step and stay equal
    to the bit; rank 0 alone judges and stores (serving/learner_workers.py).
    """

    def __init__(
        self,
        registry: Registry,
        config: LearnerConfig,
        when_storage_fails: Callable[[OSError], None] | None = None,
    ):
        """Start from the newest whole version."""
        self.registry = registry
        self.config = config
        self.rejections = Rejections(registry.store)
        stored = registry.load()
        loaded = self.rejections.passed_by(stored)
        self.damage = loaded.damage
        self.lineage = Lineage(registry, config, loaded, when_storage_fails)
        self.influence = Influence(config.influence, loaded.facts.newcomers)
        self._learn_from(LearningModel(loaded, config))
        if loaded is stored:
            self._mark_again(loaded)

    def _learn_from(self, model: LearningModel) -> None:
        self.model = model
        model.likes.prepare()
        self.gate = Gate(
            self.config.gate, model.encoder, model.catalog, model.kind_codes, self.config.seed, model.stage
        )
        self.item_revision = 0  # of changed items: deltas do not hold their attributes, so all of them are asked for

    @property
    def version(self) -> int:
        """The newest version."""
        return self.lineage.version

    @property
    def log_offset(self) -> int:
        """The log offset up to which events were learned or rejected."""
        return self.lineage.log_offset

    @property
    def sample_sizes(self) -> SampleSizes:
        """What the learner wants with the new events of a micro-batch."""
        return self.config.sample_sizes(self.model.encoder.config.max_length)

    # -------------------------------------------------------------------------------------------------------- updates

    def learn(self, batch: MicroBatch) -> Delta | Rejection:
        """Train on a micro-batch; a delta that is returned is published already."""
        journal = UndoJournal(self.model.trainer)
        if batch.events == 0:  # their users were erased
            return self._publish(journal, VersionFacts(kind="nearline", events=0), log_offset=batch.last_offset)
        met = self.lineage.unknown_items.met(batch, self.model.catalog.row_of.keys())
        self.model.add_items(self.lineage.unknown_items.ready(met))
        if (rest := broadcast_from_rank_0(self.gate.resting)) is not None:
            return self._reject(batch, rest, harmful=False)
        if is_rank_0():
            self.gate.before(batch, self.version, self.log_offset)
        if (harm := broadcast_from_rank_0(self.gate.harm)) is not None:
            return self._take_back(batch, harm)
        events = new_events(batch, self.model, self.influence) if self.model.stage is not None else None
        if events is not None:
            learn_ranking(events, self.model)
        loss = self._train(batch, journal)
        count_popularity(batch, self.model, self.influence, journal)
        if events is not None:
            count_events(events, self.model, journal)
        if (objection := self._objection(loss, journal)) is not None:
            journal.undo()
            rejection = self._reject(batch, objection)
            self.model.follow_counts(journal.count_rows)
            return rejection
        self.lineage.events_trained += batch.events
        self.influence.passed()
        self.lineage.unknown_items.count(met)
        self.lineage.unknown_items.rows += self.model.unpublished_items
        self.model.counted_half_life = self.model.popularity_half_life
        facts = VersionFacts(kind="nearline", events=batch.events, loss=loss, ndcg=self.gate.live_quality)
        delta = self._publish(journal, facts, log_offset=batch.last_offset)
        if is_rank_0():
            self.gate.passed(batch.events, delta.version, delta.log_offset, journal.embeddings())
        return delta

    def _train(self, batch: MicroBatch, journal: UndoJournal) -> float | None:
        """Take some steps, each with the new events and its own part of the replay; returns the loss of the first.

        The version seeds dropout, so that a restarted learner makes the same steps.
        """
        losses = []
        trainer, steps = self.model.trainer, self.config.steps
        trainer.before_update = journal.record
        rate = trainer.learning_rate
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed + self.version)
            for number in range(steps):
                part = replace(batch, replay=batch.replay[number::steps])
                training = training_batch(part, self.model, self.config, self.influence, self.rejections)
                if training is not None:
                    trainer.learning_rate = rate * self.influence.kept  # as far as new events count, weights may move
                    losses.append(trainer.step(local_batch(training)).loss)
        trainer.learning_rate = rate
        return losses[0] if losses else None

    def _objection(self, loss: float | None, journal: UndoJournal) -> str | None:
        rows = self.model.rows_to_publish(journal.changed_rows())
        judged = loss, rows, journal.dense, self.influence.kept, journal.count_rows.numpy()
        return broadcast_from_rank_0(lambda: self.gate.objection(*judged))

    def _publish(
        self, journal: UndoJournal, facts: VersionFacts, *changed: torch.Tensor, log_offset: int | None = None
    ) -> Delta:
        """Publish what the journal has recorded, beside other rows (R,) that changed."""
        self.lineage.reference = self.gate.reference.version if self.gate.reference else None
        rows = self.model.rows_to_publish(journal.changed_rows(), *changed)
        changes = self.model.changes(journal, rows)
        return self.lineage.publish(self.model, changes, facts, self.influence.newcomers, log_offset)

    def change_items(self, changes: Sequence[ItemChange]) -> Delta | None:
        """Take items that were put or deleted while live; a new one gets a row and starts as those that are like it.

        Returns the published delta, None where no weight changed.
        """
        journal = UndoJournal(self.model.trainer)
        changed = self.model.change_items(changes)
        self.item_revision = max(self.item_revision, changes[-1].revision)
        if len(self.model.rows_to_publish(changed)) == 0:
            return None
        return self._publish(journal, VersionFacts(kind="items", items=len(changes)), changed)

    def store_whole(self) -> Delta:
        """Publish a version that changes nothing and is stored whole, so that no older file is needed to load it."""
        delta = self._publish(UndoJournal(self.model.trainer), VersionFacts(kind="whole"))
        self.lineage.save_snapshot(self.model)
        return delta

    # ----------------------------------------------------------------------------------------------------- rejections

    def _reject(self, batch: MicroBatch, reason: str, harmful: bool = True) -> Rejection:
        """Pass a micro-batch by."""
        self.model.give_rows_back()
        self.lineage.events_rejected += batch.events
        span = RejectedSpan(after_offset=self.log_offset, events=batch.events)
        return self._mark(self._rejection(span, batch.last_offset, reason, harmful))

    def set_aside(self, batch: MicroBatch, traceback: str) -> Rejection:
        """Pass by, for good, a micro-batch at which learning raised each time that it was tried.

        Args:
            batch: what was tried.
            traceback: of the last error.
        """
        self.lineage.events_rejected += batch.events
        span = RejectedSpan(after_offset=self.log_offset, events=batch.events)
        error = traceback.strip().rpartition("\n")[2]
        rejection = self._rejection(span, batch.last_offset, f"learning raised each time that it was tried: {error}")
        return self._mark(replace(rejection, traceback=traceback))

    def set_aside_change(self, what: str, traceback: str, item_revision: int | None = None) -> Rejection:
        """Pass by, for good, a changed item or an offered model at which learning raised each time.

        Args:
            what: names it.
            traceback: of the last error.
            item_revision: of a changed item.
        """
        error = traceback.strip().rpartition("\n")[2]
        span = RejectedSpan(after_offset=self.log_offset, events=0)
        reason = f"learning raised each time that {what} was tried: {error}"
        rejection = self._rejection(span, self.log_offset, reason, harmful=False)
        return self._mark(replace(rejection, traceback=traceback, item_revision=item_revision))

    def _take_back(self, batch: MicroBatch, reason: str) -> Rejection:
        """Publish the weights of the gate's reference anew: what was learned since did harm, a little each time."""
        self.model.give_rows_back()
        version, log_offset, since = broadcast_from_rank_0(self.gate.since_reference)
        self.gate.went_back()
        try:
            loaded = self.registry.load(version)
        except InputError:  # it was pruned: what can be had is that it gets no worse
            self.gate.forget()
            return self._reject(batch, reason)
        self.lineage.events_rejected += batch.events  # those before were trained on, and count as such
        rejected = RejectedSpan(after_offset=log_offset, events=batch.events + since)
        facts = VersionFacts(kind="rollback", restored=version, reason=reason, rejected=rejected)
        delta = self._go_back_to(loaded, facts, log_offset=batch.last_offset)
        return self._mark(self._rejection(rejected, batch.last_offset, reason, delta=delta))

    def _rejection(
        self, span: RejectedSpan, last_offset: int, reason: str, harmful: bool = True, delta: Delta | None = None
    ) -> Rejection:
        """Describe a rejection of the present version."""
        return Rejection(
            version=self.version,
            after_offset=span.after_offset,
            last_offset=last_offset,
            events=span.events,
            events_rejected=self.lineage.events_rejected,
            reason=reason,
            harmful=harmful,
            delta=delta,
        )

    def _mark(self, rejection: Rejection) -> Rejection:
        """Have it known for good which events the weights have not learned from; harmful ones are not replayed."""
        self.rejections.remember(rejection)
        self.lineage.store(lambda: self.rejections.add(rejection))
        self.lineage.log_offset = rejection.last_offset
        return rejection

    def _mark_again(self, loaded: LoadedVersion) -> None:
        """List what the newest version took back, where the process ended before that was listed."""
        if loaded.facts.rejected is None:
            return
        rejection = self._rejection(loaded.facts.rejected, self.log_offset, loaded.facts.reason or "")
        if rejection not in self.rejections.all():
            self._mark(rejection)

    # --------------------------------------------------------------------------------------------------- other weights

    def take_over(self, name: str) -> None:
        """Make a model that was offered the next version.

        Raises:
            InputError: it is damaged, or describes its items differently; nothing has changed.
        """
        model = self.registry.offers.load(name)
        said = model.facts
        facts = VersionFacts(kind=said.kind, offer=name, **said.model_dump(include={"since", "events"}))
        self.adopt(model, facts, parent=said.since)

    def adopt(self, loaded: LoadedVersion, facts: VersionFacts, parent: int | None = None) -> None:
        """Publish a new version that is another model, whole; learning goes on from that model's log offset.

        The offset may go back: what the other weights have not learned is then read again from the log, and what is
        counted as trained and rejected is what they say. Items that the model does not know get rows behind its own.

        Args:
            loaded: the other model.
            facts: of the new version; `events` is what the model has learned beyond its parent.
            parent: the version whose events the model has learned (lib/versions/ledger.py), None where that is not
            known.

        Raises:
            InputError: the two models describe their items differently; nothing has changed.
        """
        model = LearningModel(loaded, self.config, catalog=self.model.catalog)
        if parent is not None and self.lineage.accounts.origin_of(parent) is None:
            parent = None
        self.lineage.follow(replace(loaded, parent=parent))
        self.lineage.unknown_items.forget(model.catalog.row_of.keys())
        self._learn_from(model)
        self.lineage.publish_base(model, facts, self.influence.newcomers)

    def restore(self, version: int) -> Delta | None:
        """Publish a new version whose weights are those of a stored one; the log offset never goes back.

        Returns None where there is no delta to it, because another base came in between.

        Raises:
            InputError: the version is not stored.
        """
        loaded = self.registry.load(version)
        facts = VersionFacts(kind="rollback", restored=version)
        if self.registry.base_of(loaded) == self.lineage.base:
            return self._go_back_to(loaded, facts)
        parent = version
        if loaded.log_offset <= self.log_offset:  # else the old weights have learned what these have not yet
            counts = {
                "events_trained": self.lineage.events_trained,
                "events_rejected": self.lineage.events_rejected,
            }
            facts_so_far = loaded.facts.model_copy(update=counts)
            loaded = replace(loaded, log_offset=self.log_offset, facts=facts_so_far)
            parent = self.version
        self.adopt(loaded, facts, parent)
        return None

    def _go_back_to(self, loaded: LoadedVersion, facts: VersionFacts, log_offset: int | None = None) -> Delta:
        changes = self.model.go_back_to(loaded)
        self.gate.forget()
        return self.lineage.publish(self.model, changes, facts, self.influence.newcomers, log_offset)
