"""The versions that a learner makes, each of which follows from the one before: numbered, counted and stored."""

import time
from collections.abc import Callable
from typing import TypeVar

from lib.live.learning_model import Changes, LearningModel
from lib.live.settings import LearnerConfig
from lib.live.unknown_items import UnknownItems
from lib.model.delta import Delta
from lib.model.distributed import is_rank_0, require_equal
from lib.model.facts import NewcomerShare, VersionFacts
from lib.model.folder import Manifest
from lib.versions.accounts import Accounts
from lib.versions.folder import LoadedVersion
from lib.versions.registry import Registry
from lib.versions.retention import Retention, sweep

T = TypeVar("T")


class Lineage:
    """The newest version, what it and those before it have learned, and how the next one is published.

    Of several workers that learn together, rank 0 alone stores. `when_storage_fails` hears of what could not be stored;
    it is tried again once that returns.
    """

    def __init__(
        self,
        registry: Registry,
        config: LearnerConfig,
        loaded: LoadedVersion,
        when_storage_fails: Callable[[OSError], None] | None = None,
    ):
        self.registry = registry
        self.accounts = Accounts(registry)
        self.config = config
        self.when_storage_fails = when_storage_fails
        self.before_snapshot: Callable[[], None] | None = None  # hears of one, which takes long
        if is_rank_0():
            sweep(registry)
        self.retention = Retention(registry, self.accounts, config.keep_bytes, config.snapshot_every)
        self.newest_number = max(loaded.version, registry.head() or 0)  # also of versions that are damaged
        self.reference: int | None = None  # the version that the gate may go back to
        self.unknown_items = UnknownItems(loaded, config.new_item_users, config.new_item_rows)
        self.follow(loaded)

    def follow(self, loaded: LoadedVersion) -> None:
        """Continue from a loaded version."""
        self.version = loaded.version
        self.parent = loaded.parent
        self.log_offset = loaded.log_offset
        self.facts = loaded.facts
        self.events_trained = loaded.facts.events_trained
        self.events_rejected = loaded.facts.events_rejected
        self.unknown_items.rows = loaded.facts.rows_by_events
        self.base = self.registry.base_of(loaded)  # the version that this one follows from by deltas alone

    def publish(
        self,
        model: LearningModel,
        changes: Changes,
        facts: VersionFacts,
        newcomers: NewcomerShare,
        log_offset: int | None = None,
    ) -> Delta:
        """Store the next version as a delta; its log offset is the present one unless it is given."""
        new_items = model.catalog.item_ids[model.published_items + 1 :]
        delta = Delta(
            version=self.newest_number + 1,
            parent=self.version,
            checksum=model.fingerprint_with(changes),
            log_offset=self.log_offset if log_offset is None else log_offset,
            item_rows=model.encoder.config.item_rows,
            rows=changes.rows.numpy(),
            tensors=changes.tensors,
            popularity_scale=changes.popularity_scale,
            new_items=new_items,
            facts=self._complete(model, facts, newcomers, created=_now(), adopted=self.facts.adopted),
            count_rows=changes.count_rows,
        )
        model.follow(changes)
        require_equal(delta.checksum)  # and what others may still read here is not pruned before
        optimizer = model.trainer.optimizer_state(delta.rows) | self.unknown_items.publish(new_items)
        self.retention.add(self.store(lambda: self.registry.publish_delta(delta, optimizer)) or 0)
        self.accounts.add(delta)
        model.published_items = len(model.catalog)
        self.version = self.newest_number = delta.version
        self.parent, self.log_offset, self.facts = delta.parent, delta.log_offset, delta.facts
        if self.version != delta.parent + 1 or self.retention.snapshot_is_due(self.version):
            self.save_snapshot(model)
        return delta

    def publish_base(self, model: LearningModel, facts: VersionFacts, newcomers: NewcomerShare) -> None:
        """Store the next version whole: no delta leads to it from the one before."""
        self.version = self.base = self.newest_number = self.newest_number + 1
        now = _now()
        self.facts = self._complete(model, facts, newcomers, created=now, adopted=now)
        manifest, optimizer = self._manifest(), model.trainer.optimizer_state() | self.unknown_items.whole()
        require_equal(model.checksum)
        self.store(lambda: self.registry.publish_base(model.encoder, model.catalog, manifest, optimizer))
        self.store(lambda: self.retention.prune(self.base, self.reference))

    def save_snapshot(self, model: LearningModel) -> None:
        """Store the newest version whole, so that loading it needs no deltas, and prune what is old."""
        if self.before_snapshot is not None:
            self.before_snapshot()
        manifest, optimizer = self._manifest(), model.trainer.optimizer_state() | self.unknown_items.whole()
        self.store(lambda: self.registry.publish_snapshot(model.encoder, model.catalog, manifest, optimizer))
        self.store(lambda: self.retention.prune(self.base, self.reference))

    def store(self, write: Callable[[], T]) -> T | None:
        """Write, and write again as often as it fails, where somebody waits for the storage; None where rank 0 does."""
        if not is_rank_0():
            return None
        while True:
            try:
                return write()
            except OSError as error:
                if self.when_storage_fails is None or isinstance(error, FileExistsError):
                    raise
                self.when_storage_fails(error)

    def _manifest(self) -> Manifest:
        return Manifest(version=self.version, parent=self.parent, log_offset=self.log_offset, facts=self.facts)

    def _complete(
        self, model: LearningModel, facts: VersionFacts, newcomers: NewcomerShare, created: int, adopted: int
    ) -> VersionFacts:
        """Add what every version says of those that it follows from."""
        return facts.model_copy(
            update={
                "events_trained": self.events_trained,
                "events_rejected": self.events_rejected,
                "base": self.base,
                "adopted": adopted,
                "newcomers": newcomers,
                "rows_by_events": self.unknown_items.rows,
                "half_life": model.counted_half_life,
                "created": created,
            }
        )


def _now() -> int:
    return time.time_ns() // 1_000_000
