"""Snapshots and deltas of a model's weights, and the fingerprint that proves two copies equal to the bit.

A state is the encoder's named tensors. Some of them are row tensors, one line per item: a delta carries just their
changed rows, and of the other tensors those that changed. The rows of weights and of counts change apart, so each of
the two has rows of its own.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor, nn

from lib.model.encoder import BehaviourEncoder
from lib.model.facts import VersionFacts
from lib.model.item_counts import COUNT_TENSORS
from lib.model.rows import lengthened, with_room
from lib.model.version_format import FORMAT, OLDEST_FORMAT, OtherFormat, check_format

ROW_TENSORS = ("item_embeddings.weight", "item_popularity", "item_attributes")
ATTRIBUTE_TABLE = "attribute_embeddings.weight"
OPTIMIZER_PREFIX = "optimizer."
NO_ROWS = np.zeros(0, dtype=np.int64)


class DeltaMismatch(ValueError):
    """A delta does not follow from the state that it was applied to, or its bytes are damaged."""


def state_of(encoder: BehaviourEncoder) -> dict[str, Tensor]:
    """Return the encoder's tensors by name, sharing memory with it."""
    return {name: tensor.detach() for name, tensor in encoder.state_dict().items()}


def dense_state(encoder: BehaviourEncoder) -> dict[str, Tensor]:
    """Return those of the tensors without rows that training may change: what it freezes stays as it is."""
    frozen = {name for name, parameter in encoder.named_parameters() if not parameter.requires_grad}
    rows = {*ROW_TENSORS, *COUNT_TENSORS}
    return {name: tensor for name, tensor in state_of(encoder).items() if name not in frozen | rows}


@dataclass
class Delta:
    """What changed from version `parent` to `version`."""

    version: int
    parent: int
    checksum: str  # fingerprint of the whole state after this delta
    log_offset: int  # the newest event of the feedback log that the state has learned from
    item_rows: int  # rows of the item table after this delta
    rows: np.ndarray  # (R,) int64 changed rows of the weights, ascending
    tensors: dict[str, np.ndarray]  # row tensors as (R, ...), those of counts as (S, ...), other tensors whole
    new_items: list[str] = field(default_factory=list)  # items that got the next rows of the catalog
    popularity_scale: float = 1.0  # what the popularity of every item is multiplied with, before its rows change
    facts: VersionFacts = field(default_factory=VersionFacts)
    count_rows: np.ndarray = field(default_factory=lambda: NO_ROWS)  # (S,) int64 changed rows of the counts, ascending
    format: int = FORMAT  # of the release that made it

    def rows_of(self, name: str) -> np.ndarray | None:
        """Return the changed rows of a row tensor; None for any other tensor."""
        if name in ROW_TENSORS:
            return self.rows
        return self.count_rows if name in COUNT_TENSORS else None

    def to_bytes(self, optimizer: Mapping[str, np.ndarray] | None = None) -> bytes:
        """Return safetensors bytes; with the optimiser's tensors for storage, without them for the replicas."""
        said = {name: value for name, value in vars(self).items() if name not in ("rows", "count_rows", "tensors")}
        header = json.dumps(said | {"facts": self.facts.model_dump(mode="json"), "format": FORMAT})
        tensors = {"rows": self.rows, "count_rows": self.count_rows, **self.tensors}
        tensors |= {OPTIMIZER_PREFIX + name: value for name, value in (optimizer or {}).items()}
        contiguous = {name: np.require(value, requirements="C") for name, value in tensors.items()}
        return safetensors.numpy.save(contiguous, metadata={"delta": header, "digest": _digest(header, contiguous)})

    @classmethod
    def from_bytes(cls, data: bytes) -> "Delta":
        """Read a delta; an optimiser's tensors stay in `tensors` under their prefix.

        Raises:
            DeltaMismatch: the bytes are not a whole delta.
            OtherFormat: they are a delta of another release.
        """
        try:
            tensors = safetensors.numpy.load(data)
            length = int.from_bytes(data[:8], "little")
            metadata = json.loads(data[8 : 8 + length])["__metadata__"]
            header, digest = metadata["delta"], metadata["digest"]
            if _digest(header, tensors) != digest:
                raise ValueError("their digest is another")
            said = json.loads(header)
            check_format(f"delta {said['version']}", said)
            facts = VersionFacts.model_validate(said.pop("facts"))
            said.setdefault("format", OLDEST_FORMAT)
            rows, count_rows = tensors.pop("rows"), tensors.pop("count_rows", NO_ROWS)
            return cls(rows=rows, count_rows=count_rows, tensors=tensors, facts=facts, **said)
        except OtherFormat:
            raise
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
            raise DeltaMismatch(f"the bytes are not a whole delta: {error!r}") from error


def _digest(header: str, tensors: Mapping[str, np.ndarray]) -> str:
    """Return a digest that tells a damaged delta; unlike the fingerprint it covers header and optimiser's tensors."""
    digest = hashlib.blake2b(header.encode(), digest_size=16)
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def check_fits(encoder: BehaviourEncoder, delta: Delta) -> None:
    """Refuse a delta that the encoder cannot take, before anything of it is applied.

    Raises:
        DeltaMismatch: a row, or the name, shape or type of a tensor, is none of the encoder's.
    """
    state = state_of(encoder)
    for rows in (delta.rows, delta.count_rows):
        within = not len(rows) or 0 <= rows.min() <= rows.max() < delta.item_rows
        if rows.ndim != 1 or rows.dtype != np.int64 or not within:
            raise DeltaMismatch(f"delta {delta.version} changes rows beyond the {delta.item_rows} of its item table")
    for name, values in delta.tensors.items():
        if name.startswith(OPTIMIZER_PREFIX):
            continue
        if name not in state:
            raise DeltaMismatch(f"delta {delta.version} has a tensor {name}, and the model has none of this name")
        own = state[name]
        rows = delta.rows_of(name)
        shape = tuple(own.shape) if rows is None else (len(rows), *own.shape[1:])
        if values.shape != shape or str(own.dtype) != f"torch.{values.dtype}":
            raise DeltaMismatch(
                f"delta {delta.version}: {name} is {values.dtype} {values.shape}, the model takes {own.dtype} {shape}"
            )


def apply_delta(encoder: BehaviourEncoder, delta: Delta) -> None:
    """Bring the encoder's tensors in place to the state of the delta's version.

    Raises:
        DeltaMismatch: the encoder cannot take it, and is as it was.
    """
    check_fits(encoder, delta)
    grow_items(encoder, delta.item_rows)
    state = state_of(encoder)
    if delta.popularity_scale != 1.0:
        encoder.item_popularity *= delta.popularity_scale
    for name, values in delta.tensors.items():
        if name.startswith(OPTIMIZER_PREFIX):
            continue
        source = torch.from_numpy(np.array(values))  # a copy: shared memory is read-only
        rows = delta.rows_of(name)
        if rows is None:
            state[name].copy_(source)
        else:
            state[name][torch.from_numpy(np.array(rows))] = source.to(state[name].device)


def grow_items(encoder: BehaviourEncoder, item_rows: int) -> None:
    """Lengthen the item table to `item_rows` rows; new rows are zero until a delta or a learner fills them."""
    if item_rows > encoder.config.item_rows:
        _replace_tables(encoder, lambda table, fill: lengthened(table, item_rows, fill))
        encoder.item_embeddings.num_embeddings = encoder.config.item_rows = item_rows


def make_room(encoder: BehaviourEncoder) -> None:
    """Move the item table to memory in which it can grow by an eighth without a copy."""
    _replace_tables(encoder, lambda table, _: with_room(table))


def _replace_tables(encoder: BehaviourEncoder, change: Callable[[Tensor, float], Tensor]) -> None:
    """Replace all tables that have a line per item by what a function makes of each, given what fills new lines."""
    table = encoder.item_embeddings.weight
    encoder.item_embeddings.weight = nn.Parameter(change(table, 0), requires_grad=table.requires_grad)
    for name in ("item_popularity", "item_attributes"):
        setattr(encoder, name, change(getattr(encoder, name), 0))
    if encoder.counts is not None:
        encoder.counts.replace_tables(change)


def with_new_rows(changed: np.ndarray, known: int, rows: int) -> np.ndarray:
    """Return the rows (R,) that changed of a table of `known` rows, and all that it does not have of `rows`.

    Args:
        changed: distinct rows, ascending.
        known: rows of the table.
        rows: of the table that it is to become.
    """
    return np.concatenate([changed[changed < known], np.arange(known, rows)])


def difference(
    encoder: BehaviourEncoder, target: Mapping[str, Tensor], rows: Tensor | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return rows and tensors that lead from the encoder's state to the target's, of as many rows; without counts."""
    state = state_of(encoder)
    if rows is None:
        changed = torch.zeros(len(target[ROW_TENSORS[0]]), dtype=torch.bool)
        for name in ROW_TENSORS:
            changed |= (state[name] != target[name]).reshape(len(changed), -1).any(dim=1)
        rows = changed.nonzero().flatten()
    tensors = {name: target[name][rows].numpy() for name in ROW_TENSORS}
    for name, tensor in target.items():
        if name not in {*ROW_TENSORS, *COUNT_TENSORS} and not torch.equal(tensor, state[name]):
            tensors[name] = tensor.numpy()
    return rows.numpy(), tensors
