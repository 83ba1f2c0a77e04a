"""The ledger: proof that the weights have every event of the feedback log exactly once.

Every version says how far into the log it has learned, and how many events its lineage has trained on and how many its
gate rejected. Between a version and its parent those counts must rise by just the events of the offsets in between:
fewer would be a gap, more an overlap. The steps of a lineage tile the log, so what holds of each holds of the whole.

The parent of a new base is the version that it was fine-tuned from, or whose events a rollback took over: its weights
have nothing of what other versions have learned in between. Where that parent is not known any more, a base starts a
lineage of its own, and its counts must be those of all events up to its offset.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol, Self

from lib.model.facts import VersionFacts


class Account(NamedTuple):
    """What one version says of itself; or, once its files are gone, what the last of several says of them all."""

    version: int
    parent: int | None  # None for the first
    log_offset: int  # the newest event that is in the weights
    events_trained: int  # by the whole lineage
    events_rejected: int
    events: int  # that this step trained on
    versions: int = 1  # that this account stands for

    @classmethod
    def of(cls, version: int, parent: int | None, log_offset: int, facts: VersionFacts) -> Self:
        """Return the account of a stored version with its facts."""
        return cls(
            version=version,
            parent=parent,
            log_offset=log_offset,
            events_trained=facts.events_trained,
            events_rejected=facts.events_rejected,
            events=facts.events or 0,
        )


NOTHING = Account(0, None, 0, 0, 0, 0)


@dataclass(frozen=True)
class Ledger:
    """The outcome of a check; without faults every event up to `log_offset` is in the weights of `version` once."""

    version: int
    versions: int  # of its lineage
    log_offset: int
    events_trained: int
    events_rejected: int
    erased: int  # offsets whose events the log does not hold any more
    waiting: int  # events of the log that are not learned yet
    faults: list[str]

    def __str__(self) -> str:
        learned = f"{self.events_trained} events trained on, {self.events_rejected} rejected by the gate"
        outcome = f"{len(self.faults)} faults" if self.faults else "each event once"
        return (
            f"version {self.version}, {self.versions} versions, log offsets up to {self.log_offset}: {learned},"
            f" {self.erased} erased, {self.waiting} waiting; {outcome}"
        )


class Log(Protocol):
    """What a check needs of the feedback log."""

    def count(self, after: int = 0, up_to: int | None = None) -> int:
        """Return the number of events that it holds of these offsets."""
        ...

    def last_offset(self) -> int:
        """Return the highest offset that it ever gave."""
        ...


def lineage(accounts: Mapping[int, Account], newest: int) -> list[Account]:
    """Return accounts from the first version to the newest, by their parents, up to one that is missing."""
    chain: list[Account] = []
    version: int | None = newest
    while version is not None and (account := accounts.get(version)) is not None:
        chain.append(account)
        version = account.parent
        if version is not None and version >= account.version:
            break
    return chain[::-1]


def check(chain: Sequence[Account], log: Log) -> Ledger:
    """Compare every step of a lineage, which has at least one version, with the log.

    An erased event may have been learned before, or not: of a range, at least the events that are there must have been
    learned, and at most as many as it has offsets.
    """
    first, newest, last_offset = chain[0], chain[-1], log.last_offset()
    if first.parent is not None:
        faults = [f"version {first.version}: its parent {first.parent} is missing"]
    else:
        start = first._replace(events=first.events_trained)
        faults = step_faults(NOTHING, start, log.count(0, first.log_offset))
    for before, account in pairwise(chain):
        faults += step_faults(before, account, log.count(before.log_offset, account.log_offset))
    if last_offset < newest.log_offset:
        faults.append(
            f"version {newest.version} has learned up to offset {newest.log_offset}, the log ends at {last_offset}"
        )
    return Ledger(
        version=newest.version,
        versions=sum(account.versions for account in chain),
        log_offset=newest.log_offset,
        events_trained=newest.events_trained,
        events_rejected=newest.events_rejected,
        erased=newest.log_offset - log.count(0, newest.log_offset),
        waiting=log.count(newest.log_offset, last_offset),
        faults=faults,
    )


def step_faults(before: Account, account: Account, held: int) -> list[str]:
    """Say what is wrong with a step from a version to the next, of whose offsets the log holds so many events."""
    step = f"version {account.version}, offsets {before.log_offset + 1} to {account.log_offset}"
    offsets = account.log_offset - before.log_offset
    trained = account.events_trained - before.events_trained
    rejected = account.events_rejected - before.events_rejected
    if offsets < 0:
        return [
            f"version {account.version}: overlap, it goes back from offset {before.log_offset} of version"
            f" {before.version} to {account.log_offset}"
        ]
    if trained < 0 or rejected < 0 or trained != account.events:
        return [f"{step}: its counts rose by {trained} and {rejected}, but it says that it trained on {account.events}"]
    if trained + rejected > offsets:
        return [f"{step}: overlap, {trained} events trained on and {rejected} rejected are more than there were"]
    if trained + rejected < held:
        return [f"{step}: gap, {trained} events trained on and {rejected} rejected of {held}"]
    return []


def folded(chain: Sequence[Account], bound: int, stored: Collection[int] = ()) -> list[Account]:
    """Fold a lineage up to version `bound` into as few accounts as prove the same.

    Steps that learned exactly one event an offset become one; any other keeps an account of its own, and so do those of
    versions that are still stored, which the next base may follow.
    """
    kept: list[Account] = []
    for account in chain:
        if account.version > bound:
            break
        foldable = len(kept) > 1 and kept[-1].version not in stored
        if foldable and _is_exact(kept[-2], kept[-1]) and _is_exact(kept[-1], account):
            last = kept.pop()
            account = account._replace(
                parent=last.parent, events=last.events + account.events, versions=last.versions + account.versions
            )
        kept.append(account)
    return kept


def _is_exact(before: Account, account: Account) -> bool:
    return not step_faults(before, account, account.log_offset - before.log_offset)
