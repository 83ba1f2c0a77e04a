"""The versions of a model on storage: a folder, S3 or GCS, through pyarrow.fs.

    snapshots/<version>/   a whole model folder with the optimiser's state
    deltas/<version>       what changed from the version before, the optimiser's state of it, and the log offset
    offers/<name>/         a model folder that the learner is to take over as its next version

A version is one file (a delta) or one folder whose manifest comes last (a snapshot), so it exists as a whole or not at
all: the weights, the optimiser and the log offset move in one atomic step. Any version is the newest snapshot at or
below it plus the deltas in between. A new base (a fine-tuned model, say) has no delta: it is a snapshot, and later
versions follow from it.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.numpy
from pyarrow import fs
from pydantic import ValidationError

from lib.catalog import Catalog
from lib.encoder import BehaviourEncoder
from lib.events import InputError
from lib.model_folder import MANIFEST, Manifest, check_file, load_model, save_model, write_manifest
from lib.weights import OPTIMIZER_PREFIX, Delta, DeltaMismatch, apply_delta

OPTIMIZER_FILE = "optimizer.safetensors"
SNAPSHOTS, DELTAS, OFFERS = "snapshots", "deltas", "offers"


@dataclass(frozen=True)
class VersionInfo:
    """One line of the list of versions."""

    version: int
    kind: str  # "snapshot" or "delta"
    created: int  # milliseconds
    log_offset: int
    size: int  # bytes
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class LoadedVersion:
    """A version read from storage; the deltas' optimiser tensors come in order, to be laid over the snapshot's."""

    encoder: BehaviourEncoder
    catalog: Catalog
    version: int
    log_offset: int
    facts: dict[str, Any]
    optimizer: dict[str, np.ndarray] | None
    optimizer_deltas: list[tuple[np.ndarray, dict[str, np.ndarray]]]


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

    def start_from(self, model: str | Path) -> None:
        """Make a finished model folder the first snapshot, unless versions exist already."""
        if self.head() is not None:
            return
        encoder, catalog, manifest = load_model(model)
        self.publish_snapshot(encoder, catalog, manifest, _read_optimizer(Path(model), manifest))

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
        return len(data)

    def publish_snapshot(
        self, encoder: BehaviourEncoder, catalog: Catalog, manifest: Manifest, optimizer: dict[str, np.ndarray] | None
    ) -> None:
        """Store a whole version; a version that is a snapshot already stays as it is."""
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
        """
        self._refuse_other_learner(f"{DELTAS}/{manifest.version:010d}")
        with tempfile.TemporaryDirectory() as temporary:
            save_with_optimizer(Path(temporary), encoder, catalog, manifest, optimizer)
            self._copy(Path(temporary), f"{SNAPSHOTS}/{manifest.version:010d}", replace_manifest=False)

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
        newest_first = reversed(self.snapshots())
        return next((v for v in newest_first if self._manifest(v).facts.get("offer") == name), None)

    def read_delta(self, version: int) -> Delta:
        """Read one delta.

        Raises:
            FileNotFoundError: the version is not stored as a delta.
            DeltaMismatch: its file is damaged.
        """
        with self.fs.open_input_file(self._delta_path(version)) as file:
            return Delta.from_bytes(file.read())

    def load(self, version: int | None = None) -> LoadedVersion:
        """Load a version (the newest by default).

        Raises:
            InputError: the version is not stored, or its files are damaged.
        """
        head = self.head()
        version = head if version is None else version
        base = max(
            (snapshot for snapshot in self.snapshots() if version is not None and snapshot <= version), default=None
        )
        if version is None or base is None or head is None or version > head:
            known = f"{self.oldest()} to {head}" if head is not None else "none"
            raise InputError(f"version: {version} is not stored in {self.root}; stored are {known}")
        loaded = self._load_folder(f"{SNAPSHOTS}/{base:010d}")
        for number in range(base + 1, version + 1):
            try:
                delta = self.read_delta(number)
            except FileNotFoundError:
                raise InputError(
                    f"version: delta {number} is missing in {self.root}, so {version} cannot be made"
                ) from None
            except DeltaMismatch as error:
                raise InputError(f"version: {self._delta_path(number)} is damaged: {error}") from error
            apply_delta(loaded.encoder, delta)
            loaded.catalog.extend(delta.new_items)
            prefix = len(OPTIMIZER_PREFIX)
            moments = {name[prefix:]: t for name, t in delta.tensors.items() if name.startswith(OPTIMIZER_PREFIX)}
            loaded.optimizer_deltas.append((delta.rows, moments))
            loaded.version, loaded.log_offset, loaded.facts = number, delta.log_offset, delta.facts
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
            path = self._delta_path(version)
            header = self._delta_header(path)
            facts = header["facts"]
            found[version] = VersionInfo(
                version, "delta", facts.get("created", 0), header["log_offset"], self.fs.get_file_info(path).size, facts
            )
        for version in self.snapshots():
            manifest = self._manifest(version)
            size = sum(info.size for info in self._children(f"{SNAPSHOTS}/{version:010d}"))
            facts = manifest.facts or {"kind": "base"}
            found[version] = VersionInfo(version, "snapshot", manifest.created, manifest.log_offset, size, facts)
        return [found[version] for version in sorted(found)]

    def _manifest(self, version: int) -> Manifest:
        path = f"{self.root}/{SNAPSHOTS}/{version:010d}/{MANIFEST}"
        with self.fs.open_input_file(path) as file:
            data = file.read()
        try:
            return Manifest.model_validate_json(data)
        except ValidationError as error:
            raise InputError(f"version: {path} is damaged ({type(error).__name__}); restore it") from error

    def prune(self, keep_snapshots: int, base: int | None = None) -> None:
        """Delete what is older than the newest `keep_snapshots` snapshots; the first snapshot and `base` stay."""
        snapshots = self.snapshots()
        if len(snapshots) <= keep_snapshots:
            return
        bound = snapshots[-keep_snapshots]
        for version in self.deltas():
            if version <= bound:
                self.fs.delete_file(self._delta_path(version))
        for version in snapshots[1:-keep_snapshots]:
            if version == base:
                continue
            self.fs.delete_file(f"{self.root}/{SNAPSHOTS}/{version:010d}/{MANIFEST}")
            self.fs.delete_dir(f"{self.root}/{SNAPSHOTS}/{version:010d}")

    def _delta_path(self, version: int) -> str:
        return f"{self.root}/{DELTAS}/{version:010d}"

    def _delta_header(self, path: str) -> dict[str, Any]:
        try:
            with self.fs.open_input_file(path) as file:
                length = int.from_bytes(file.read(8), "little")
                if length > file.size():
                    raise ValueError("it is cut short")
                return json.loads(json.loads(file.read(length))["__metadata__"]["delta"])
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
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            temporary.rename(target)
        else:
            self._link(temporary, target)
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    @staticmethod
    def _link(temporary: Path, target: Path) -> None:
        """Give the file its name, unless another learner was faster: of two, one alone can."""
        try:
            os.link(temporary, target)
        finally:
            temporary.unlink()

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


def load_folder(folder: Path) -> LoadedVersion:
    """A model folder with its optimiser's state.

    Raises:
        InputError: it is missing, incomplete or damaged; the message names the file.
    """
    encoder, catalog, manifest = load_model(folder)
    optimizer = _read_optimizer(folder, manifest)
    return LoadedVersion(encoder, catalog, manifest.version, manifest.log_offset, manifest.facts, optimizer, [])


def save_with_optimizer(
    folder: Path,
    encoder: BehaviourEncoder,
    catalog: Catalog,
    manifest: Manifest,
    optimizer: dict[str, np.ndarray] | None,
) -> None:
    """Write a model folder with the optimiser's tensors, where there are any."""
    save_model(folder, encoder, catalog, manifest)
    if optimizer is not None:
        safetensors.numpy.save_file(optimizer, folder / OPTIMIZER_FILE)
    write_manifest(folder, manifest)


def _read_optimizer(folder: Path, manifest: Manifest) -> dict[str, np.ndarray] | None:
    """The optimiser's tensors that a model folder holds, or None when it was saved without."""
    path = folder / OPTIMIZER_FILE
    if OPTIMIZER_FILE not in manifest.checksums:
        return None
    check_file(path, manifest)
    return safetensors.numpy.load_file(path)
