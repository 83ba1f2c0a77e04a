"""Which versions are kept, which deleted to make room, and when one is stored whole, so that loading needs few deltas.

Deltas are kept since the newest snapshot but one, so each of these versions can be loaded. Of the older ones snapshots
stay, as long as there is room; the first one, that with which the newest lineage began (a fine-tune counts anew from
it), the present base and what the gate may go back to stay in any case.
"""

from lib.model.folder import MANIFEST
from lib.versions.accounts import Accounts
from lib.versions.offers import OFFERS
from lib.versions.registry import DELTAS, SNAPSHOTS, Registry, delta_file, snapshot_folder
from lib.versions.rejections import REJECTIONS
from lib.versions.store import sweep_scratch

ABANDONED = 86_400.0  # seconds; what takes longer to write was given up
PARTS = 3  # of the room, one is for snapshots and two for deltas: those since the newest snapshot, and before it


class Retention:
    """What a learner's versions take on storage, within `keep_bytes`, or what it takes to load the newest ones."""

    def __init__(self, registry: Registry, accounts: Accounts, keep_bytes: int, snapshot_every: int):
        """Look at what is stored."""
        self.registry = registry
        self.accounts = accounts
        self.keep_bytes = keep_bytes
        self.snapshot_every = snapshot_every
        self.pruned = 0  # versions that were deleted since the process started
        self.measure()

    def measure(self) -> None:
        """Look at what is stored now."""
        snapshots, deltas = self.registry.sizes()
        newest = max(snapshots, default=0)
        self.used = sum(snapshots.values()) + sum(deltas.values())  # bytes
        self.newest_snapshot = snapshots.get(newest, 0)  # bytes
        self.since_snapshot = sum(size for version, size in deltas.items() if version > newest)  # bytes of deltas

    def add(self, size: int) -> None:
        """Count the bytes of a delta that was stored."""
        self.used += size
        self.since_snapshot += size

    def snapshot_is_due(self, version: int) -> bool:
        """Return whether the newest version is to be stored whole: the deltas since the last one have grown large."""
        large = max(self.newest_snapshot, self.keep_bytes // PARTS)
        return self.since_snapshot >= large or version % self.snapshot_every == 0

    def prune(self, base: int, reference: int | None) -> None:
        """Delete what there is no room for; what the deleted versions have learned is kept in the ledger.

        The present base stays, and `reference`: the version that the gate may go back to.
        """
        snapshots, deltas = self.registry.sizes()
        newest = sorted(snapshots)[-2:]
        below = max((version for version in snapshots if version <= (reference or 0)), default=0)
        leading = range(below + 1, (reference or 0) + 1)  # the deltas that lead to the reference
        old_deltas = [version for version in deltas if version <= newest[0] and version not in leading]
        origin = self.accounts.origin_of(newest[-1]) or base
        old_snapshots = self._superfluous(snapshots, {min(snapshots), origin, base, below, *newest})
        if old_deltas or old_snapshots:
            left = snapshots.keys() - set(old_snapshots)
            self.accounts.fold(newest[0], left | {base})
            for version in old_deltas:
                self.registry.store.delete(delta_file(version))
            for version in old_snapshots:
                self.registry.store.delete_folder(snapshot_folder(version), first=MANIFEST)
            self.pruned += len({*old_deltas, *old_snapshots} - left)
        self.measure()

    def _superfluous(self, snapshots: dict[int, int], needed: set[int]) -> list[int]:
        """Return the oldest snapshots, as many as there is no room for."""
        found, taken = [], sum(snapshots.values())
        for version, size in sorted(snapshots.items()):
            if taken <= self.keep_bytes // PARTS:
                break
            if version not in needed:
                found.append(version)
                taken -= size
        return found


def sweep(registry: Registry) -> None:
    """Delete what killed processes have left: halves of versions and offers, temporary files, and copies.

    For the one learner, before it writes.
    """
    store = registry.store
    sweep_scratch()
    store.sweep("", ABANDONED)  # where others write, too
    for folder in (SNAPSHOTS, DELTAS, REJECTIONS):
        store.sweep(folder)
    whole = {snapshot_folder(version) for version in registry.snapshots()}
    halves = [f"{SNAPSHOTS}/{name}" for name in store.folders(SNAPSHOTS) if name.isdigit()]
    for half in halves:
        if half not in whole:
            store.delete_half(half)
    for name in set(store.folders(OFFERS)) - set(registry.offers.names()):  # which may be being written now
        if store.age(f"{OFFERS}/{name}") > ABANDONED:
            store.delete_half(f"{OFFERS}/{name}")
