"""The versions of a model on storage: a folder, S3 or GCS, through pyarrow.fs.

    snapshots/<version>/   a whole model folder with the optimiser's state
    deltas/<version>       what changed from the version before, the optimiser's state of it, and the log offset
    offers/<name>/         a model folder that the learner is to take over as its next version
    ledger.json            what versions that were deleted have learned (lib/versions/ledger.py)
    rejections/<number>    updates that were not published, and why (lib/versions/rejections.py)

A version is one file (a delta) or one folder whose manifest comes last (a snapshot), so it exists as a whole or not at
all: the weights, the optimiser and the log offset move in one atomic step. Any version is the newest snapshot at or
below it plus the deltas in between. A new base (a fine-tuned model, say) has no delta: it is a snapshot, and later
versions follow from it. Every file has a checksum: where the newest versions are damaged, the newest whole one is
loaded, and learning goes on from its log offset under numbers that were never given.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import safetensors
import safetensors.numpy
from pyarrow import fs
from pydantic import BaseModel, ValidationError

from lib.data.catalog import Catalog
from lib.errors import InputError
from lib.model.delta import OPTIMIZER_PREFIX, Delta, DeltaMismatch, apply_delta
from lib.model.encoder import BehaviourEncoder
from lib.model.facts import VersionFacts
from lib.model.folder import MANIFEST, Manifest, check_file, load_model, save_model, write_manifest
from lib.versions.ledger import Account, folded, lineage

OPTIMIZER_FILE = "optimizer.safetensors"
LEDGER_FILE = "ledger.json"
SNAPSHOTS, DELTAS, OFFERS = "snapshots", "deltas", "offers"


class VersionInfo(BaseModel):
    """One line of the list of versions."""

    version: int
    kind: Literal["snapshot", "delta", "damaged"]
    created: int = 0  # milliseconds
    log_offset: int = 0
    size: int  # bytes
    facts: VersionFacts


class DeltaHeader(BaseModel):
    """Of a stored delta what the list of versions shows; the rest of it is not read."""

    parent: int
    log_offset: int
    facts: VersionFacts


@dataclass
class LoadedVersion:
    """A version read from storage; the deltas' optimiser tensors come in order, to be laid over the snapshot's."""

    encoder: BehaviourEncoder
    catalog: Catalog
    version: int
    log_offset: int
    facts: VersionFacts
    optimizer: dict[str, np.ndarray] | None
    optimizer_deltas: list[tuple[np.ndarray, dict[str, np.ndarray]]]
    parent: int | None
    damage: list[str] = field(default_factory=list)  # what was not used, for it is not whole


class Registry:
    """Publishes, lists, loads and prunes versions."""

    def __init__(self, location: str | Path):
        """Open the registry at a folder or a URI (s3://, gs://, file://).

        Raises:
            InputError: a URI of an unknown kind.
        """
        text = str(location)
        if "://" in text:
            try:
                self.fs, self.root = fs.FileSystem.from_uri(text)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise InputError(f"state: {text} is no storage that can be used: {error}") from error
        else:
            self.fs, self.root = fs.LocalFileSystem(), str(Path(text).absolute())
        self.local = isinstance(self.fs, fs.LocalFileSystem)
        self._folders: set[str] = set()  # made already
        self._accounts: dict[int, Account] = {}  # that were read already; a version never changes

    def start_from(self, model: str | Path) -> None:
        """Make a finished model folder the first snapshot, unless versions exist already."""
        if self.head() is not None:
            return
        encoder, catalog, manifest = load_model(model)
        optimizer = _read_optimizer(Path(model), manifest)
        self.publish_snapshot(encoder, catalog, manifest.model_copy(update={"parent": None}), optimizer)

    def snapshots(self) -> list[int]:
        """Versions that are stored whole, ascending."""
        folders = self._children(SNAPSHOTS)
        return sorted(
            int(Path(info.path).name)
            for info in folders
            if info.type == fs.FileType.Directory and Path(info.path).name.isdigit() and self._is_model(info.path)
        )

    def deltas(self) -> list[int]:
        """Versions that are stored as deltas, ascending."""
        return sorted(int(Path(info.path).name) for info in self._children(DELTAS) if Path(info.path).name.isdigit())

    def head(self) -> int | None:
        """The newest version, or None when there is none."""
        newest = [versions[-1] for versions in (self.snapshots(), self.deltas()) if versions]
        return max(newest, default=None)

    def publish_delta(self, delta: Delta, optimizer: dict[str, np.ndarray]) -> int:
        """Store a delta with its optimiser state in one atomic step; returns its bytes.

        Raises:
            FileExistsError: the version exists, so another learner is at work on this registry.
        """
        self._refuse_other_learner(f"{SNAPSHOTS}/{delta.version:010d}/{MANIFEST}")
        data = delta.to_bytes(optimizer)
        self._write(f"{DELTAS}/{delta.version:010d}", data)
        self._accounts[delta.version] = Account.of(delta.version, delta.parent, delta.log_offset, delta.facts)
        return len(data)

    def publish_snapshot(
        self, encoder: BehaviourEncoder, catalog: Catalog, manifest: Manifest, optimizer: dict[str, np.ndarray] | None
    ) -> None:
        """Store a whole version; a version that is a snapshot already stays as it is.

        Raises:
            OSError: it could not be written.
        """
        target = f"{SNAPSHOTS}/{manifest.version:010d}"
        if self._is_model(f"{self.root}/{target}"):
            return
        with tempfile.TemporaryDirectory() as temporary:
            save_with_optimizer(Path(temporary), encoder, catalog, manifest, optimizer)
            self._copy(Path(temporary), target)

    def publish_base(
        self, encoder: BehaviourEncoder, catalog: Catalog, manifest: Manifest, optimizer: dict[str, np.ndarray]
    ) -> None:
        """Store a version that does not follow from the one before it, in one atomic step.

        Raises:
            FileExistsError: the version exists, so another learner is at work on this registry.
            OSError: it could not be written.
        """
        target = f"{SNAPSHOTS}/{manifest.version:010d}"
        for name in (f"{DELTAS}/{manifest.version:010d}", f"{target}/{MANIFEST}"):
            self._refuse_other_learner(name)
        with tempfile.TemporaryDirectory() as temporary:
            save_with_optimizer(Path(temporary), encoder, catalog, manifest, optimizer)
            self._copy(Path(temporary), target, replace_manifest=False)

    def offer(self, name: str, model: Path) -> None:
        """Have the learner take over a model folder as its next version; one of this name is replaced."""
        self._copy(model, f"{OFFERS}/{name}")

    def offers(self) -> list[str]:
        """Names of the models that wait to be taken over, ascending."""
        return sorted(Path(info.path).name for info in self._children(OFFERS) if self._is_model(info.path))

    def load_offer(self, name: str) -> LoadedVersion:
        """Load a model that waits to be taken over; its version is that of its manifest.

        Raises:
            InputError: it is damaged.
        """
        return self._load_folder(f"{OFFERS}/{name}")

    def withdraw(self, name: str) -> None:
        """Take an offer back, done or not."""
        self.fs.delete_file(f"{self.root}/{OFFERS}/{name}/{MANIFEST}")
        self.fs.delete_dir(f"{self.root}/{OFFERS}/{name}")

    def adopted(self, name: str) -> int | None:
        """The version as which an offer was taken over, None where it was not (yet)."""
        newest_first = reversed(self.versions())
        return next((info.version for info in newest_first if info.facts.offer == name), None)

    def read_delta(self, version: int) -> Delta:
        """Read one delta.

        Raises:
            FileNotFoundError: the version is not stored as a delta.
            DeltaMismatch: its file is damaged.
        """
        with self.fs.open_input_file(self._delta_path(version)) as file:
            return Delta.from_bytes(file.read())

    def load(self, version: int | None = None) -> LoadedVersion:
        """Load a version, by default the newest that is whole; its `damage` names newer files that are not.

        Raises:
            InputError: the version is not stored, or its files are damaged.
        """
        head = self.head()
        target = head if version is None else version
        bases = [snapshot for snapshot in self.snapshots() if target is not None and snapshot <= target]
        if target is None or head is None or target > head or not bases:
            known = f"{self.oldest()} to {head}" if head is not None else "none"
            raise InputError(f"version: {version} is not stored in {self.root}; stored are {known}")
        damage: list[str] = []
        for base in reversed(bases):
            try:
                loaded = self._load_from(base, target, damage)
            except InputError as error:
                damage.append(str(error))
                continue
            if version is not None and loaded.version != version:
                break
            loaded.damage = damage
            return loaded
        raise InputError(damage[0])

    def _load_from(self, base: int, target: int, damage: list[str]) -> LoadedVersion:
        """A snapshot and the deltas up to the target, or up to the first that is not whole, which is noted."""
        loaded = self._load_folder(f"{SNAPSHOTS}/{base:010d}")
        for number in range(base + 1, target + 1):
            try:
                delta = self.read_delta(number)
                if delta.parent != loaded.version:
                    raise DeltaMismatch(f"it follows version {delta.parent}, not {loaded.version}")
            except FileNotFoundError:
                damage.append(f"version: delta {number} is missing in {self.root}, so {target} cannot be made")
                break
            except DeltaMismatch as error:
                damage.append(f"version: {self._delta_path(number)} is damaged: {error}")
                break
            apply_delta(loaded.encoder, delta)
            loaded.catalog.extend(delta.new_items)
            prefix = len(OPTIMIZER_PREFIX)
            moments = {name[prefix:]: t for name, t in delta.tensors.items() if name.startswith(OPTIMIZER_PREFIX)}
            loaded.optimizer_deltas.append((delta.rows, moments))
            loaded.version, loaded.parent = number, delta.parent
            loaded.log_offset, loaded.facts = delta.log_offset, delta.facts
        return loaded

    def _load_folder(self, name: str) -> LoadedVersion:
        with self._local_folder(name) as folder:
            return load_folder(folder)

    def oldest(self) -> int | None:
        """The oldest version that can be loaded."""
        return min(self.snapshots(), default=None)

    def versions(self) -> list[VersionInfo]:
        """Every stored version, ascending, with what is known of it."""
        found: dict[int, VersionInfo] = {}
        for version in self.deltas():
            size = self.fs.get_file_info(self._delta_path(version)).size
            try:
                header = self._delta_header(version)
            except InputError as error:
                found[version] = _damaged(version, size, error)
                continue
            found[version] = VersionInfo(
                version=version,
                kind="delta",
                created=header.facts.created,
                log_offset=header.log_offset,
                size=size,
                facts=header.facts,
            )
        for version in self.snapshots():
            size = sum(info.size for info in self._children(f"{SNAPSHOTS}/{version:010d}"))
            try:
                manifest = self._manifest(version)
            except InputError as error:
                found[version] = _damaged(version, size, error)
                continue
            found[version] = VersionInfo(
                version=version,
                kind="snapshot",
                created=manifest.created,
                log_offset=manifest.log_offset,
                size=size,
                facts=manifest.facts,
            )
        return [found[version] for version in sorted(found)]

    def ledger(self) -> list[Account]:
        """What the newest version and those before it have learned, for `lib.versions.ledger.check`; empty without
        versions.

        Raises:
            InputError: ledger.json is damaged.
        """
        accounts = self._known_accounts()
        return lineage(accounts, max(accounts)) if accounts else []

    def traces(self, version: int) -> bool:
        """Whether it is known what a version and all before it have learned.

        Raises:
            InputError: ledger.json is damaged.
        """
        chain = lineage(self._known_accounts(), version)
        return bool(chain) and chain[0].parent is None

    def log_offset(self) -> int:
        """The highest log offset that any version has learned up to, 0 where there is none."""
        return max((account.log_offset for account in self._known_accounts().values()), default=0)

    def _known_accounts(self) -> dict[int, Account]:
        """The accounts of all versions whose account can be read, and of those that were deleted."""
        for version in {*self.snapshots(), *self.deltas()} - self._accounts.keys():
            if (account := self._account(version)) is not None:
                self._accounts[version] = account
        return self._accounts | {account.version: account for account in self._folded_accounts()}

    def _account(self, version: int) -> Account | None:
        """What a stored version says of itself; None where it is damaged, so that a lineage ends there."""
        with suppress(InputError, FileNotFoundError):
            header = self._delta_header(version)
            return Account.of(version, header.parent, header.log_offset, header.facts)
        with suppress(InputError, FileNotFoundError):
            manifest = self._manifest(version)
            return Account.of(version, manifest.parent, manifest.log_offset, manifest.facts)
        return None

    def _folded_accounts(self) -> list[Account]:
        path = f"{self.root}/{LEDGER_FILE}"
        if self.fs.get_file_info(path).type != fs.FileType.File:
            return []
        try:
            with self.fs.open_input_file(path) as file:
                return [Account(**fields) for fields in json.loads(file.read())["accounts"]]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"state: {path} is damaged ({error!r}); restore it, or remove it") from error

    def prune(self, keep_snapshots: int, base: int | None = None) -> None:
        """Delete what is older than the newest `keep_snapshots` snapshots; the first snapshot and `base` stay.

        What the deleted versions have learned is kept in the ledger.
        """
        snapshots = self.snapshots()
        if len(snapshots) <= keep_snapshots:
            return
        bound = snapshots[-keep_snapshots]
        accounts = [account._asdict() for account in folded(self.ledger(), bound, base)]
        self._write(LEDGER_FILE, json.dumps({"accounts": accounts}).encode(), replace=True)
        for info in self._children(DELTAS):
            unfinished = Path(info.path).name.startswith(".")  # of a process that was killed
            if unfinished or (Path(info.path).name.isdigit() and int(Path(info.path).name) <= bound):
                self.fs.delete_file(info.path)
        for version in snapshots[1:-keep_snapshots]:
            if version == base:
                continue
            self.fs.delete_file(f"{self.root}/{SNAPSHOTS}/{version:010d}/{MANIFEST}")
            self.fs.delete_dir(f"{self.root}/{SNAPSHOTS}/{version:010d}")
        self._accounts = {version: account for version, account in self._accounts.items() if version > bound}

    def _manifest(self, version: int) -> Manifest:
        path = f"{self.root}/{SNAPSHOTS}/{version:010d}/{MANIFEST}"
        with self.fs.open_input_file(path) as file:
            data = file.read()
        try:
            return Manifest.model_validate_json(data)
        except ValidationError as error:
            raise InputError(f"version: {path} is damaged ({type(error).__name__}); restore it") from error

    def files(self, folder: str) -> list[str]:
        """Names of a folder's files, ascending."""
        names = (Path(info.path).name for info in self._children(folder))
        return sorted(name for name in names if not name.startswith("."))  # those are being written

    def read(self, name: str) -> bytes:
        """A file of the registry."""
        with self.fs.open_input_file(f"{self.root}/{name}") as file:
            return file.read()

    def replace(self, name: str, data: bytes) -> None:
        """Write a file anew, or for the first time, in one atomic step."""
        self._write(name, data, replace=True)

    def _delta_path(self, version: int) -> str:
        return f"{self.root}/{DELTAS}/{version:010d}"

    def _delta_header(self, version: int) -> DeltaHeader:
        path = self._delta_path(version)
        try:
            with self.fs.open_input_file(path) as file:
                length = int.from_bytes(file.read(8), "little")
                if length > file.size():
                    raise ValueError("it is cut short")
                return DeltaHeader.model_validate_json(json.loads(file.read(length))["__metadata__"]["delta"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"version: {path} is damaged: {error!r}") from error

    def _is_model(self, path: str) -> bool:
        """Whether a folder has a manifest, which is the last to come and the first to go."""
        return self.fs.get_file_info(f"{path}/{MANIFEST}").type == fs.FileType.File

    def _refuse_other_learner(self, name: str) -> None:
        path = f"{self.root}/{name}"
        if self.fs.get_file_info(path).type != fs.FileType.NotFound:
            raise FileExistsError(f"{path} exists: another learner publishes to this registry")

    def _copy(self, folder: Path, target: str, replace_manifest: bool = True) -> None:
        """Store a model folder, the manifest last: it is what makes it exist."""
        for name in sorted((path.name for path in folder.iterdir()), key=lambda name: name == MANIFEST):
            replace = replace_manifest or name != MANIFEST
            self._write(f"{target}/{name}", (folder / name).read_bytes(), replace)

    def _children(self, folder: str) -> list[fs.FileInfo]:
        return self.fs.get_file_info(fs.FileSelector(f"{self.root}/{folder}", allow_not_found=True))

    def _write(self, name: str, data: bytes, replace: bool = False) -> None:
        path = f"{self.root}/{name}"
        if not replace:
            self._refuse_other_learner(name)
        if not self.local:  # an object store shows an object when its upload is complete
            self._make_folder(path.rpartition("/")[0])
            with self.fs.open_output_stream(path) as stream:
                stream.write(data)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if replace:
                temporary.rename(target)
            else:
                os.link(temporary, target)  # unless another learner was faster: of two, one alone can
        finally:
            temporary.unlink(missing_ok=True)
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _make_folder(self, path: str) -> None:
        if path not in self._folders:
            self.fs.create_dir(path, recursive=True)
            self._folders.add(path)

    @contextmanager
    def _local_folder(self, name: str) -> Iterator[Path]:
        path = f"{self.root}/{name}"
        if self.local:
            yield Path(path)
            return
        folder = Path(tempfile.mkdtemp())
        try:
            fs.copy_files(path, str(folder), source_filesystem=self.fs, destination_filesystem=fs.LocalFileSystem())
            yield folder
        finally:
            shutil.rmtree(folder)


def _damaged(version: int, size: int, error: InputError) -> VersionInfo:
    facts = VersionFacts(kind="damaged", reason=str(error))
    return VersionInfo(version=version, kind="damaged", size=size, facts=facts)


def load_folder(folder: Path) -> LoadedVersion:
    """A model folder with its optimiser's state.

    Raises:
        InputError: it is missing, incomplete or damaged; the message names the file.
    """
    encoder, catalog, manifest = load_model(folder)
    optimizer = _read_optimizer(folder, manifest)
    return LoadedVersion(
        encoder=encoder,
        catalog=catalog,
        version=manifest.version,
        log_offset=manifest.log_offset,
        facts=manifest.facts,
        optimizer=optimizer,
        optimizer_deltas=[],
        parent=manifest.parent,
    )


def save_with_optimizer(
    folder: Path,
    encoder: BehaviourEncoder,
    catalog: Catalog,
    manifest: Manifest,
    optimizer: dict[str, np.ndarray] | None,
) -> None:
    """Write a model folder with the optimiser's tensors, where there are any.

    Raises:
        OSError: it could not be written.
    """
    try:
        save_model(folder, encoder, catalog, manifest)
        if optimizer is not None:
            safetensors.numpy.save_file(optimizer, folder / OPTIMIZER_FILE)
    except safetensors.SafetensorError as error:  # which is no OSError, also where the disk is full
        raise OSError(f"{folder}: {error}") from error
    write_manifest(folder, manifest)


def _read_optimizer(folder: Path, manifest: Manifest) -> dict[str, np.ndarray] | None:
    """The optimiser's tensors that a model folder holds, or None when it was saved without."""
    path = folder / OPTIMIZER_FILE
    if OPTIMIZER_FILE not in manifest.checksums:
        return None
    check_file(path, manifest)
    return safetensors.numpy.load_file(path)
