"""A model folder: config.json, model.safetensors, catalog.parquet and manifest.json.

The manifest is written last and holds the checksums of the other files, so a folder with a manifest is whole.
"""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import safetensors
from pydantic import BaseModel, Field
from pydantic_core import from_json, to_json

from lib.data.catalog import Catalog
from lib.durable import write_durably
from lib.errors import InputError
from lib.model.encoder import WEIGHTS, BehaviourEncoder
from lib.model.facts import TrainingFacts, VersionFacts
from lib.model.version_format import FORMAT, ORDERED_LISTS, check_format

FILES = ("config.json", WEIGHTS, "catalog.parquet")
MANIFEST = "manifest.json"


class Manifest(BaseModel):
    """What manifest.json says of a version."""

    format: int = FORMAT  # lib/model/version_format.py
    version: int = 1
    parent: int | None = None
    log_offset: int = 0
    created: int = Field(default_factory=lambda: time.time_ns() // 1_000_000)  # milliseconds
    training: TrainingFacts = TrainingFacts()
    metrics: dict[str, Any] = {}
    facts: VersionFacts = VersionFacts()
    checksums: dict[str, str] = {}  # sha256 of each file


def save_model(folder: Path, encoder: BehaviourEncoder, catalog: Catalog, manifest: Manifest) -> None:
    """Write a model folder; files that lie in it already are overwritten, the manifest last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    encoder.save_pretrained(folder)
    catalog.save(folder / "catalog.parquet")
    write_manifest(folder, manifest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json with the checksums of the files that lie in the folder now."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".parquet"))
    checksums = {path.name: _sha256(path) for path in files if path.name != MANIFEST}
    whole = manifest.model_copy(update={"checksums": checksums, "format": FORMAT})
    whole.checksums[MANIFEST] = _own_checksum(from_json(whole.model_dump_json()))
    write_durably(folder / MANIFEST, f"{whole.model_dump_json(indent=2)}\n".encode())


def read_manifest(folder: str | Path) -> Manifest:
    """Read manifest.json.

    Raises:
        InputError: there is no such folder, or it is no model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"model: no folder at {folder}; make one with `afterclick pretrain --data D --out {folder}`")
    try:
        data = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise InputError(f"model: {folder} has no {MANIFEST}, so it is no finished model; pretrain it again") from None
    return manifest_of(data, str(folder / MANIFEST))


def manifest_of(data: bytes, name: str) -> Manifest:
    """Return what the bytes of a manifest.json say.

    Raises:
        InputError: they are damaged.
        OtherFormat: they are of another release.
    """
    try:
        said = from_json(data)
        own = _own_checksum(said)
        if said.get("checksums", {}).get(MANIFEST, own) != own:
            raise InputError(f"model: {name} was changed since it was written; restore it or pretrain again")
        check_format(name, said)
        return Manifest.model_validate(said)
    except InputError:
        raise
    except (ValueError, AttributeError, TypeError) as error:  # pydantic's objections are ValueErrors
        raise InputError(f"model: {name} is damaged ({type(error).__name__}); restore it or pretrain again") from error


def load_model(folder: str | Path) -> tuple[BehaviourEncoder, Catalog, Manifest]:
    """Read a model folder whose files are what its manifest says.

    Raises:
        InputError: the folder is missing, incomplete or damaged; the message names the file.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name in FILES:
        check_file(folder / name, manifest)
    try:
        encoder = BehaviourEncoder.from_pretrained(folder)
        catalog = Catalog.load(folder / "catalog.parquet")
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise InputError(f"model: {folder} cannot be loaded: {error}") from error
    bring_up(encoder, manifest.format)
    return encoder, catalog, manifest


def bring_up(encoder: BehaviourEncoder, written: int, wanted: int = FORMAT) -> None:
    """Bring weights of one format to a later one."""
    if written < ORDERED_LISTS <= wanted and encoder.counts is not None:
        encoder.counts.sort()


def check_file(path: Path, manifest: Manifest) -> None:
    """Refuse a file of a model folder that is not what the manifest says.

    Raises:
        InputError: the file is missing or damaged.
    """
    if not path.is_file():
        raise InputError(f"model: {path} is missing; restore it or pretrain again")
    if manifest.checksums.get(path.name) != _sha256(path):
        raise InputError(f"model: {path} is not the file that the manifest describes; restore it or pretrain again")


def _own_checksum(said: dict[str, Any]) -> str:
    """Return the sha256 of what a manifest says, its own checksum left out."""
    checksums = {name: checksum for name, checksum in said.get("checksums", {}).items() if name != MANIFEST}
    return hashlib.sha256(to_json(said | {"checksums": checksums})).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
