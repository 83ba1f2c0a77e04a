"""What every version says that it has learned, as it is stored: with the version, and for deleted ones in ledger.json.

lib/versions/ledger.py compares these accounts with the feedback log.
"""

import json
from collections.abc import Collection
from contextlib import suppress

from lib.errors import InputError
from lib.model.delta import Delta
from lib.model.version_format import FORMAT, OtherFormat, check_format
from lib.versions.ledger import Account, folded, lineage
from lib.versions.registry import Registry

LEDGER_FILE = "ledger.json"


class Accounts:
    """The accounts of one registry's versions.

    Every method raises InputError where ledger.json is damaged.
    """

    def __init__(self, registry: Registry):
        self.registry = registry
        self._read: dict[int, Account] = {}  # a version never changes

    def newest_lineage(self) -> list[Account]:
        """Return the accounts of the newest version and all that it follows from, the oldest first."""
        accounts = self._all()
        return lineage(accounts, max(accounts)) if accounts else []

    def origin_of(self, version: int) -> int | None:
        """Return the version with which the lineage of one began; None where it is not known any more."""
        chain = lineage(self._all(), version)
        return chain[0].version if chain and chain[0].parent is None else None

    def log_offset(self) -> int:
        """Return the highest log offset that any version has learned up to, 0 where there is none."""
        return max((account.log_offset for account in self._all().values()), default=0)

    def newest_log_offset(self) -> int:
        """Return the log offset that the newest version that can be read has learned up to; 0 where there is none.

        Raises:
            InputError: there are versions, and all of them are damaged.
        """
        stored = {*self.registry.snapshots(), *self.registry.deltas()}
        for version in sorted(stored, reverse=True):
            if (account := self._account(version)) is not None:
                return account.log_offset
        if stored:
            raise InputError(f"versions: all in {self.registry.store.root} are damaged; restore them from a copy")
        return 0

    def add(self, delta: Delta) -> None:
        """Take the account of a delta that was just published; it need not be read."""
        self._read[delta.version] = Account.of(delta.version, delta.parent, delta.log_offset, delta.facts)

    def fold(self, bound: int, stored: Collection[int]) -> None:
        """Write the accounts of the lineage up to a version into ledger.json, so that its files may be deleted.

        Those of the versions `stored`, which stay, are kept apart.
        """
        accounts = [account._asdict() for account in folded(self.newest_lineage(), bound, stored)]
        ledger = {"format": FORMAT, "accounts": accounts}
        self.registry.store.write(LEDGER_FILE, json.dumps(ledger).encode(), replace=True)
        self._read = {version: account for version, account in self._read.items() if version > bound}

    def _all(self) -> dict[int, Account]:
        """Return the accounts of all versions that can be read, and of those that were deleted."""
        for version in {*self.registry.snapshots(), *self.registry.deltas()} - self._read.keys():
            if (account := self._account(version)) is not None:
                self._read[version] = account
        return self._read | {account.version: account for account in self._folded()}

    def _account(self, version: int) -> Account | None:
        """Return what a stored version says of itself; None where it is damaged, so that a lineage ends there."""
        for read in (self.registry.delta_header, self.registry.manifest):
            with suppress(InputError, FileNotFoundError):
                said = read(version)
                return Account.of(version, said.parent, said.log_offset, said.facts)
        return None

    def _folded(self) -> list[Account]:
        store = self.registry.store
        if not store.is_file(LEDGER_FILE):
            return []
        try:
            said = json.loads(store.read(LEDGER_FILE))
            check_format(store.path(LEDGER_FILE), said)
            return [Account(**fields) for fields in said["accounts"]]
        except OtherFormat:
            raise
        except (ValueError, KeyError, TypeError) as error:
            path = store.path(LEDGER_FILE)
            raise InputError(f"state: {path} is damaged ({error!r}); restore it, or remove it") from error
