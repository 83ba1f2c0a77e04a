"""A version as a model folder, with the optimiser's state: what a snapshot, an offer and a pretrained model are."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from lib.data.catalog import Catalog
from lib.model.encoder import BehaviourEncoder
from lib.model.facts import VersionFacts
from lib.model.folder import Manifest, check_file, load_model, save_model, write_manifest
from lib.model.version_format import FORMAT

OPTIMIZER_FILE = "optimizer.safetensors"


@dataclass
class LoadedVersion:
    """A version read from storage; the deltas' optimiser tensors come in order, to be laid over the snapshot's."""

    encoder: BehaviourEncoder
    catalog: Catalog
    version: int
    parent: int | None
    log_offset: int
    facts: VersionFacts
    optimizer: dict[str, np.ndarray] | None
    optimizer_deltas: list[tuple[np.ndarray, dict[str, np.ndarray]]] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)  # files that were passed over as they are damaged or missing
    format: int = FORMAT  # in which the newest of its files was written


def load_folder(folder: Path) -> LoadedVersion:
    """Load a model folder with its optimiser's state.

    Raises:
        InputError: it is missing, incomplete or damaged; the message names the file.
    """
    encoder, catalog, manifest = load_model(folder)
    return LoadedVersion(
        encoder=encoder,
        catalog=catalog,
        version=manifest.version,
        parent=manifest.parent,
        log_offset=manifest.log_offset,
        facts=manifest.facts,
        optimizer=_read_optimizer(folder, manifest),
        format=manifest.format,
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
    """Return the optimiser's tensors of a model folder, None where it was saved without."""
    path = folder / OPTIMIZER_FILE
    if OPTIMIZER_FILE not in manifest.checksums:
        return None
    check_file(path, manifest)
    return safetensors.numpy.load_file(path)
