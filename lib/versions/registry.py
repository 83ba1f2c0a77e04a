"""The versions of a model on storage.

    snapshots/<version>/   a whole model folder with the optimiser's state (lib/versions/folder.py)
    deltas/<version>       what changed from the version before, the optimiser's state of it, and the log offset
    offers/<name>/         a model that the learner is to take over as its next version (lib/versions/offers.py)
    ledger.json            what deleted versions have learned (lib/versions/accounts.py)
    rejections/<number>    updates that were not published, and why (lib/versions/rejections.py)

A version is one file (a delta) or one folder whose manifest comes last (a snapshot), so it exists as a whole or not at
all: the weights, the optimiser and the log offset move in one atomic step. Any version is the newest snapshot at or
below it plus the deltas in between. A new base (a fine-tuned model, say) has no delta: it is a snapshot, and later
versions follow from it. Every file has a checksum: where the newest versions are damaged, the newest whole one is
loaded, and learning goes on from its log offset under numbers that were never given.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import BaseModel

from lib.data.catalog import Catalog
from lib.errors import InputError
from lib.log.layout import LogLayout
from lib.model.delta import OPTIMIZER_PREFIX, Delta, DeltaMismatch, apply_delta
from lib.model.encoder import BehaviourEncoder
from lib.model.facts import VersionFacts
from lib.model.folder import MANIFEST, Manifest, bring_up, manifest_of, read_manifest
from lib.model.version_format import OtherFormat, check_format
from lib.versions.folder import LoadedVersion, load_folder, save_with_optimizer
from lib.versions.offers import Offers
from lib.versions.store import Store

SNAPSHOTS, DELTAS = "snapshots", "deltas"
MOST_SPANS = 8  # that a message names


def snapshot_folder(version: int) -> str:
    """Return the name of a snapshot's folder."""
    return f"{SNAPSHOTS}/{version:010d}"


def delta_file(version: int) -> str:
    """Return the name of a delta's file."""
    return f"{DELTAS}/{version:010d}"


class VersionInfo(BaseModel):
    """One line of the list of versions."""

    version: int
    kind: Literal["snapshot", "delta", "damaged"]
    created: int = 0  # milliseconds
    log_offset: int = 0
    size: int  # bytes
    facts: VersionFacts

    @classmethod
    def of_snapshot(cls, manifest: Manifest, size: int) -> Self:
        """Return the line of a version that is stored whole."""
        return cls(
            version=manifest.version,
            kind="snapshot",
            created=manifest.created,
            log_offset=manifest.log_offset,
            size=size,
            facts=manifest.facts if manifest.facts.model_fields_set else VersionFacts(kind="base"),
        )

    @classmethod
    def damaged(cls, version: int, size: int, reason: str) -> Self:
        """Return the line of a version that cannot be read."""
        facts = VersionFacts(kind="damaged", reason=reason)
        return cls(version=version, kind="damaged", size=size, facts=facts)


class DeltaHeader(BaseModel):
    """Of a stored delta what the list of versions shows; the rest of it is not read."""

    parent: int
    log_offset: int
    facts: VersionFacts


class Registry:
    """Publishes, lists and loads versions."""

    def __init__(self, location: str | Path):
        """Open the registry in a folder or at a URI (s3://, gs://, file://).

        Raises:
            InputError: a URI of an unknown kind.
        """
        self.store = Store(location)
        self.offers = Offers(self.store)

    @classmethod
    def of(cls, state: str | Path) -> Self:
        """Open the registry of a state folder: in the folder itself, or where its record says that the versions are.

        Raises:
            InputError: the record is damaged, or says a URI of an unknown kind.
        """
        return cls(LogLayout.of(state).versions or state)

    def start_from(self, model: str | Path) -> None:
        """Make a finished model folder the first snapshot, unless versions exist already.

        Raises:
            InputError: the folder is missing, incomplete or damaged.
        """
        if self.head() is not None:
            return
        loaded = load_folder(Path(model))
        manifest = read_manifest(model).model_copy(update={"parent": None})
        self.publish_snapshot(loaded.encoder, loaded.catalog, manifest, loaded.optimizer)

    def snapshots(self) -> list[int]:
        """Return the versions that are stored whole, ascending."""
        numbers = _numbers(self.store.folders(SNAPSHOTS))
        return [version for version in numbers if self._is_snapshot(version)]

    def deltas(self) -> list[int]:
        """Return the versions that are stored as deltas, ascending."""
        return _numbers(self.store.files(DELTAS))

    def head(self) -> int | None:
        """Return the newest version, None where there is none."""
        return max([*self.snapshots()[-1:], *self.deltas()[-1:]], default=None)

    def check_format(self) -> None:
        """Refuse versions of which the newest was written by another release, in a format that this one does not read.

        Raises:
            OtherFormat: it names the file and the remedy.
        """
        for newest, read in ((self.snapshots()[-1:], self.manifest), (self.deltas()[-1:], self.delta_header)):
            for version in newest:
                try:
                    read(version)
                except OtherFormat:
                    raise
                except InputError:  # it is damaged: an older one is loaded
                    continue

    def oldest(self) -> int | None:
        """Return the oldest version that can be loaded."""
        return min(self.snapshots(), default=None)

    def sizes(self) -> tuple[dict[int, int], dict[int, int]]:
        """Return the bytes of each snapshot and of each delta, by version, ascending."""
        whole = set(self.snapshots())
        snapshots, deltas = (
            {int(name): size for name, size in sorted(self.store.sizes(folder).items()) if name.isdigit()}
            for folder in (SNAPSHOTS, DELTAS)
        )
        return {version: size for version, size in snapshots.items() if version in whole}, deltas

    def _is_snapshot(self, version: int) -> bool:
        """Return whether a snapshot has its manifest, which is the last file to come and the first to go."""
        return self.store.is_file(f"{snapshot_folder(version)}/{MANIFEST}")

    # ----------------------------------------------------------------------------------------------------- publishing

    def publish_delta(self, delta: Delta, optimizer: dict[str, np.ndarray]) -> int:
        """Store a delta with its optimiser state in one atomic step; returns the bytes that it takes.

        Raises:
            FileExistsError: the version exists, so another learner is at work on this registry.
            OSError: it could not be written.
        """
        self.store.refuse_existing(f"{snapshot_folder(delta.version)}/{MANIFEST}")
        data = delta.to_bytes(optimizer)
        self.store.write(delta_file(delta.version), data)
        return len(data)

    def publish_snapshot(
        self, encoder: BehaviourEncoder, catalog: Catalog, manifest: Manifest, optimizer: dict[str, np.ndarray] | None
    ) -> None:
        """Store a whole version; a version that is a snapshot already stays as it is.

        Raises:
            OSError: it could not be written.
        """
        if self._is_snapshot(manifest.version):
            return
        with self.store.new_folder(snapshot_folder(manifest.version), last=MANIFEST) as folder:
            save_with_optimizer(folder, encoder, catalog, manifest, optimizer)

    def publish_base(
        self, encoder: BehaviourEncoder, catalog: Catalog, manifest: Manifest, optimizer: dict[str, np.ndarray]
    ) -> None:
        """Store a version that does not follow from the one before it, in one atomic step.

        Raises:
            FileExistsError: the version exists, so another learner is at work on this registry.
            OSError: it could not be written.
        """
        self.store.refuse_existing(delta_file(manifest.version))
        with self.store.new_folder(snapshot_folder(manifest.version), last=MANIFEST) as folder:
            save_with_optimizer(folder, encoder, catalog, manifest, optimizer)

    # -------------------------------------------------------------------------------------------------------- loading

    def load(self, version: int | None = None) -> LoadedVersion:
        """Load a version, by default the newest that is whole; its `damage` names newer files that are not.

        Raises:
            InputError: the version is not stored, or its files are damaged.
            OtherFormat: another release wrote it.
        """
        snapshots = self.snapshots()
        stored = sorted({*snapshots, *self.deltas()})
        target = stored[-1] if stored and version is None else version
        bases = [snapshot for snapshot in snapshots if target is not None and snapshot <= target]
        if target not in stored or not bases:
            pruned = stored and target is not None and 0 < target < stored[-1]
            gone = " any more, as older versions make room for newer ones (keep_bytes)" if pruned else ""
            raise InputError(f"version: {version} is not stored in {self.store.root}{gone}; stored are {spans(stored)}")
        damage: list[str] = []
        for base in reversed(bases):
            try:
                loaded = self._load_from(base, target, damage)
            except OtherFormat:  # to go on from an older version would be to give up what the other release learned
                raise
            except InputError as error:
                damage.append(str(error))
                continue
            if version is not None and loaded.version != version:
                break
            loaded.damage = damage
            return loaded
        raise InputError(damage[0])

    def _load_from(self, base: int, target: int, damage: list[str]) -> LoadedVersion:
        """Load a snapshot and the deltas up to the target, or up to the first that is not whole, which is noted."""
        with self.store.downloaded(snapshot_folder(base)) as folder:
            loaded = load_folder(folder)
        for number in range(base + 1, target + 1):
            try:
                delta = self.read_delta(number)
                if delta.parent != loaded.version:
                    raise DeltaMismatch(f"it follows version {delta.parent}, not {loaded.version}")
                _follow(loaded, delta)
            except FileNotFoundError:
                damage.append(f"version: delta {number} is missing in {self.store.root}, so {target} cannot be made")
                break
            except DeltaMismatch as error:
                damage.append(f"version: {self.store.path(delta_file(number))} is damaged: {error}")
                break
        bring_up(loaded.encoder, loaded.format)
        return loaded

    def base_of(self, loaded: LoadedVersion) -> int:
        """Return the version that a loaded one follows from by deltas alone; the first one where nothing is said."""
        return loaded.facts.base or self.oldest() or loaded.version

    def read_delta(self, version: int) -> Delta:
        """Read one delta.

        Raises:
            FileNotFoundError: the version is not stored as a delta.
            DeltaMismatch: its file is damaged.
            OtherFormat: another release wrote it.
        """
        return Delta.from_bytes(self.store.read(delta_file(version)))

    # -------------------------------------------------------------------------------------------------------- listing

    def versions(self) -> list[VersionInfo]:
        """Return every stored version, ascending, with what is known of it; a snapshot hides the delta beside it."""
        found = {version: self._delta_info(version) for version in self.deltas()}
        found |= {version: self._snapshot_info(version) for version in self.snapshots()}
        return [found[version] for version in sorted(found)]

    def version_of_offer(self, name: str) -> int | None:
        """Return the version as which an offer was taken over, None where it was not (yet)."""
        newest_first = reversed(self.versions())
        return next((info.version for info in newest_first if info.facts.offer == name), None)

    def _delta_info(self, version: int) -> VersionInfo:
        size = self.store.size(delta_file(version))
        try:
            header = self.delta_header(version)
        except InputError as error:
            return VersionInfo.damaged(version, size, str(error))
        return VersionInfo(
            version=version,
            kind="delta",
            created=header.facts.created,
            log_offset=header.log_offset,
            size=size,
            facts=header.facts,
        )

    def _snapshot_info(self, version: int) -> VersionInfo:
        size = self.store.size(snapshot_folder(version))
        try:
            return VersionInfo.of_snapshot(self.manifest(version), size)
        except InputError as error:
            return VersionInfo.damaged(version, size, str(error))

    def delta_header(self, version: int) -> DeltaHeader:
        """Read what a delta says of itself, without its tensors.

        Raises:
            FileNotFoundError: the version is not stored as a delta.
            InputError: its file is damaged.
        """
        name = delta_file(version)
        try:
            with self.store.open(name) as file:
                length = int.from_bytes(file.read(8), "little")
                if length > file.size():
                    raise ValueError("it is cut short")
                said = json.loads(json.loads(file.read(length))["__metadata__"]["delta"])
            check_format(self.store.path(name), said)
            return DeltaHeader.model_validate(said)
        except OtherFormat:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"version: {self.store.path(name)} is damaged: {error!r}") from error

    def manifest(self, version: int) -> Manifest:
        """Read the manifest of a snapshot.

        Raises:
            FileNotFoundError: the version is not stored whole.
            InputError: the manifest is damaged.
        """
        name = f"{snapshot_folder(version)}/{MANIFEST}"
        return manifest_of(self.store.read(name), self.store.path(name))


def spans(numbers: Sequence[int]) -> str:
    """Return ascending numbers as words, such as "1, 5 to 9"; of many spans the first and the last."""
    known = set(numbers)
    starts = [number for number in numbers if number - 1 not in known]
    ends = [number for number in numbers if number + 1 not in known]
    words = [str(start) if start == end else f"{start} to {end}" for start, end in zip(starts, ends, strict=True)]
    if len(words) > MOST_SPANS:
        words = [*words[: MOST_SPANS // 2], "...", *words[-MOST_SPANS // 2 :]]
    return ", ".join(words) or "none"


def _numbers(names: Sequence[str]) -> list[int]:
    return sorted(int(name) for name in names if name.isdigit())


def _follow(loaded: LoadedVersion, delta: Delta) -> None:
    """Bring a loaded version to the next one.

    A delta is of weights in its own format: the learner that made it had brought up what it loaded, just here.

    Raises:
        DeltaMismatch: it cannot take the delta, and is as it was.
    """
    bring_up(loaded.encoder, loaded.format, delta.format)
    loaded.format = delta.format
    apply_delta(loaded.encoder, delta)
    loaded.catalog.extend(delta.new_items)
    stored = {name: tensor for name, tensor in delta.tensors.items() if name.startswith(OPTIMIZER_PREFIX)}
    moments = {name.removeprefix(OPTIMIZER_PREFIX): tensor for name, tensor in stored.items()}
    loaded.optimizer_deltas.append((delta.rows, moments))
    loaded.version, loaded.parent = delta.version, delta.parent
    loaded.log_offset, loaded.facts = delta.log_offset, delta.facts
