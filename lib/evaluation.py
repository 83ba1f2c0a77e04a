"""The two offline protocols, and what they measure.

leave-one-out: per user the newest event is the target and everything before it the input.
temporal: the newest 20% of the time span is the test; every test event is a target, its user's history so far the input
(histories advance with time, weights stay).

Both rank all items of the catalog with the user's seen items removed.
"""

# pyarrow.compute makes its functions as it is imported, so a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from lib.catalog import Catalog
from lib.encoder import BehaviourEncoder
from lib.events import InputError
from lib.histories import Histories, histories_of
from lib.metrics import coverage_at, ndcg_at, recall_at, reciprocal_rank
from lib.sequences import SequenceBatches

LEAVE_ONE_OUT, TEMPORAL, NONE = "leave-one-out", "temporal", "none"
PROTOCOLS = (LEAVE_ONE_OUT, TEMPORAL)
TEST_SHARE = 0.2  # of the time span


@dataclass(frozen=True)
class Cases:
    """What is to be predicted: for case i, the event after `inputs[i]` events of user `users[i]`."""

    histories: Histories
    users: np.ndarray  # (cases,)
    inputs: np.ndarray  # (cases,) number of the user's events that come before the target


def cutoff_time(timestamps: np.ndarray) -> int:
    """The time at which the newest 20% of the span begins."""
    first, last = int(timestamps.min()), int(timestamps.max())
    return first + int((last - first) * (1 - TEST_SHARE))


def training_part(histories: Histories, holdout: str) -> Histories:
    """The histories without what a protocol tests on."""
    if holdout == LEAVE_ONE_OUT:
        # who has a single event keeps it: there is nothing to predict it from, so it is no target
        newest = histories.offsets[1:][histories.lengths >= 2] - 1
        keep = np.ones(len(histories.rows), dtype=bool)
        keep[newest] = False
        return histories.select(keep)
    if holdout == TEMPORAL:
        return histories.select(histories.timestamps < cutoff_time(histories.timestamps))
    return histories


def cases_of(histories: Histories, protocol: str) -> Cases:
    """The cases of a protocol; every case has at least one event of input."""
    if protocol == LEAVE_ONE_OUT:
        users = np.flatnonzero(histories.lengths >= 2)
        return Cases(histories, users, histories.lengths[users] - 1)
    owners = np.repeat(np.arange(len(histories)), histories.lengths)
    places = np.arange(len(histories.rows)) - histories.offsets[owners]
    tested = (histories.timestamps >= cutoff_time(histories.timestamps)) & (places > 0)
    return Cases(histories, owners[tested], places[tested])


def known_histories(table: pa.Table, catalog: Catalog, event_kinds: list[str]) -> tuple[Histories, int]:
    """Histories of the events whose item the catalog knows, and the number of events left out."""
    known = pc.is_in(table["item_id"], value_set=pa.array(catalog.item_ids[1:], pa.string()))
    kept = table.filter(known)
    if len(kept) == 0:
        raise InputError("data: none of its items is in the model's catalog; evaluate with the data it was trained on")
    return histories_of(kept, catalog.row_of, event_kinds), len(table) - len(kept)


@torch.inference_mode()
def evaluate(
    encoder: BehaviourEncoder, catalog: Catalog, cases: Cases, k: int = 10, batch: int = 256
) -> dict[str, Any]:
    """recall@k, ndcg@k, mrr (over the whole ranking) and coverage@k of a model on the cases of a protocol."""
    encoder.eval()
    vectors = encoder.item_vectors(torch.arange(len(catalog) + 1))  # (N + 1, C)
    ranks = np.empty(len(cases.users), dtype=np.int64)
    recommended = np.zeros((len(cases.users), k), dtype=np.int64)
    for start in range(0, len(cases.users), batch):
        part = slice(start, start + batch)
        inputs, targets = case_inputs(cases, part)
        for places, b in SequenceBatches(inputs, encoder.config).inference():
            interests = encoder.interests(b.kinds, b.gaps, b.values, b.lengths, b.rows)
            scores = encoder.queries(interests) @ vectors.T  # (B, N + 1)
            for line, place in enumerate(places):
                seen = inputs.rows[inputs.offsets[place] : inputs.offsets[place + 1]]
                scores[line, torch.from_numpy(seen.astype(np.int64))] = float("-inf")
            scores[:, 0] = float("-inf")
            own = scores[torch.arange(len(places)), torch.from_numpy(targets[places])]
            # ties count against the target: a model to which all items are alike finds none
            rank = (scores >= own[:, None]).sum(dim=1) - 1
            # a target that the user has had before is removed with the seen items: a miss, however few are left
            ranks[start + places] = torch.where(torch.isfinite(own), rank, max(len(catalog), k)).numpy()
            top = scores.topk(min(k, scores.shape[1]), dim=1)
            left = torch.where(torch.isneginf(top.values), 0, top.indices)
            recommended[start + places, : left.shape[1]] = left.numpy()
    return {
        f"recall@{k}": float(recall_at(ranks, k).mean()),
        f"ndcg@{k}": float(ndcg_at(ranks, k).mean()),
        "mrr": float(reciprocal_rank(ranks).mean()),
        f"coverage@{k}": coverage_at(recommended, len(catalog)),
        "cases": len(ranks),
    }


def case_inputs(cases: Cases, part: slice) -> tuple[Histories, np.ndarray]:
    """The input histories of some cases, and their targets' rows."""
    users, lengths = cases.users[part], cases.inputs[part]
    starts = cases.histories.offsets[users]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    events = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
    source = cases.histories
    inputs = Histories(
        [source.user_ids[user] for user in users],
        offsets,
        source.rows[events],
        source.kinds[events],
        source.values[events],
        source.timestamps[events],
    )
    return inputs, source.rows[starts + lengths].astype(np.int64)
