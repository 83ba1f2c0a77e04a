"""Which versions are kept, and which deleted to make room."""

from lib.model.folder import MANIFEST
from lib.versions.accounts import Accounts
from lib.versions.registry import DELTAS, Registry, snapshot_folder


def prune(registry: Registry, accounts: Accounts, keep_snapshots: int, base: int | None = None) -> None:
    """Delete what is older than the newest `keep_snapshots` snapshots; the first snapshot and `base` stay.

    What the deleted versions have learned is kept in the ledger.
    """
    snapshots, store = registry.snapshots(), registry.store
    if len(snapshots) <= keep_snapshots:
        return
    bound = snapshots[-keep_snapshots]
    accounts.fold(bound, base)
    old = [name for name in store.files(DELTAS) if name.isdigit() and int(name) <= bound]
    for name in [*old, *store.unfinished(DELTAS)]:
        store.delete(f"{DELTAS}/{name}")
    for version in snapshots[1:-keep_snapshots]:
        if version != base:
            store.delete_folder(snapshot_folder(version), first=MANIFEST)
