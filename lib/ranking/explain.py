"""Explanation: why an item is in an answer, by leaving out one thing after another.

The ranker's reasons (lib/model/ranker.py) are what the logit of an item loses when the features of one group have their
mean instead; the share of a group is its part of all that the groups add. Which of the recent events is named for it is
what added most to the feature, and for the encoder's interest, the event of the largest influence.

The influence of an event on an item is the score s = uT A v that the item has with the whole history, less the score
it has with the history without the event (occlusion; Zeiler & Fergus 2014, for images). It is what the encoder does,
not a similarity of items. Of two events that say the same, leaving out either changes little: both show little
influence. A model without a ranker gives no other reasons.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lib.data.attribute_kinds import TEXT, TEXTS
from lib.data.catalog import Catalog
from lib.data.histories import Histories
from lib.data.history import History, Person, to_histories
from lib.model.batches import SequenceBatches
from lib.model.dislikes import without_dislikes
from lib.model.encoder import BehaviourEncoderConfig
from lib.model.ranker import Ranker
from lib.ranking.candidates import following, together
from lib.ranking.candidates.asked import RECENT, STRONGEST
from lib.ranking.features import FEATURES
from lib.ranking.stage import RankingStage

GROUPS = {  # features that say the same are left out together
    "interest": ("interest",),
    "follows": ("follows",),
    "together": ("together", "together_long"),
    "seen": ("seen", "seen_recently", "is_newest"),
    "trending": ("trend_100", "trend_1000"),
    "popular": ("trend_10000", "popularity"),
    "new": ("age",),
}
COLUMNS = {group: [FEATURES.index(name) for name in names] for group, names in GROUPS.items()}
DID = {
    "view": "viewed {}",
    "click": "clicked {}",
    "play": "played {}",
    "cart": "put {} in the cart",
    "purchase": "bought {}",
    "rating": "rated {}",
    "like": "liked {}",
}
MOST_REASONS = 3
LEAST_SHARE = 0.05  # of a reason that is given
NEW_SHARE = 10  # an item is new among the newest tenth of the catalog, and of the newest that the standing keeps
Queries = Callable[[Sequence[np.ndarray]], np.ndarray]  # histories as (4, T) codes -> (B, C) uT A


class Influence(NamedTuple):
    """An event, by its place among the explained ones, and what it added to the item's score."""

    event: int
    score: float


def reasons(
    history: History, catalog: Catalog, config: BehaviourEncoderConfig, queries: Queries, vectors: np.ndarray
) -> list[str | None]:
    """Name for each item the events that raised its score most, such as "click i3, purchase i7"; None where none did.

    Args:
        history: one person's events, of which the encoder knows at least one that is no dislike.
        catalog: the encoder's.
        config: the encoder's.
        queries: the encoder.
        vectors: (k, C) vectors v of the items.
    """
    found = strongest_events(history, catalog, config, queries, vectors)
    return [", ".join(dict.fromkeys(f"{kind} {item_id}" for kind, item_id in own)) or None for own in found]


def strongest_events(
    history: History,
    catalog: Catalog,
    config: BehaviourEncoderConfig,
    queries: Queries,
    vectors: np.ndarray,
    count: int = 3,
) -> list[list[tuple[str, str]]]:
    """Return for each of k items kind and item id of at most `count` events that raised s most; arguments as above."""
    liked, _ = without_dislikes(to_histories([history], catalog, config.kind_codes), config)
    influence = influences(liked, config, queries, vectors)
    kinds = config.event_kinds or []
    events = [
        (kinds[kind - 1], catalog.item_ids[row])
        for row, kind in zip(liked.rows.tolist(), liked.kinds.tolist(), strict=True)
    ][-config.max_length :]
    return [[events[place] for place, _ in own] for own in most_influential(influence, count)]


def influences(history: Histories, config: BehaviourEncoderConfig, queries: Queries, vectors: np.ndarray) -> np.ndarray:
    """Return (H, k) what each of the newest H = min(events, max_length) events added to the score of each item.

    The oldest event comes first. An event that is the only one added the whole score.

    Args:
        history: one person's events that the encoder knows, at least one.
        config: the encoder's.
        queries: the encoder; it is called once, with all histories, of which none is empty.
        vectors: (k, C) item vectors v.
    """
    whole, *without = occluded(history, config)
    scores = queries([whole, *(codes for codes in without if codes.shape[1])]) @ vectors.T  # (H + 1, k)
    if len(scores) == 1:
        return scores
    return scores[0] - scores[1:]


def occluded(history: Histories, config: BehaviourEncoderConfig) -> list[np.ndarray]:
    """Return the history as (4, T) codes, whole and then without each of its newest H events.

    Codes are rows, kinds, gaps and values. An event that lay just beyond max_length comes in where another is left out,
    as it would had that never happened; gaps are those between the events that are left.
    """
    count = len(history.rows)
    explained = min(count, config.max_length)
    events = np.arange(max(count - config.max_length - 2, 0), count)  # the one that comes in, and what its gap is from
    kept = [events, *(events[events != event] for event in range(count - explained, count))]
    places = np.concatenate(kept)
    lengths = np.array([len(own) for own in kept])
    several = Histories(
        user_ids=[""] * len(kept),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        rows=history.rows[places],
        kinds=history.kinds[places],
        values=history.values[places],
        timestamps=history.timestamps[places],
    )
    codes = SequenceBatches(several, config).codes()
    stops = several.offsets[1:]
    starts = np.maximum(several.offsets[:-1], stops - config.max_length)
    return [codes[:, start:stop] for start, stop in zip(starts, stops, strict=True)]


def most_influential(influence: np.ndarray, count: int = 3) -> list[list[Influence]]:
    """Find for each of k items at most `count` events that raised its score, the strongest first.

    Args:
        influence: (H, k) of each event on each item.
        count: the most events of an item.
    """
    order = np.argsort(-influence, axis=0, kind="stable")[:count]  # (<= count, k)
    return [
        [Influence(int(event), float(influence[event, item])) for event in order[:, item] if influence[event, item] > 0]
        for item in range(influence.shape[1])
    ]


# ------------------------------------------------------------------------------------------- what the ranker goes by


def ranker_reasons(
    stage: RankingStage,
    catalog: Catalog,
    person: Person,
    rows: np.ndarray,
    features: np.ndarray,
    events: Sequence[tuple[str, str] | None],
) -> list[str | None]:
    """Say for each of k items why, such as "often taken together with Scream (41%); new in Comedy (20%)".

    Args:
        stage: that ranked them.
        catalog: the stage's.
        person: who was answered.
        rows: (k,) int64 of the items.
        features: (k, F) that the stage ranked them by.
        events: of each item, kind and item id of the event that raised the encoder's score most; None where none did.

    Returns:
        At most MOST_REASONS for each, the largest share first; None where nothing raised the logit.
    """
    kinds = torch.full((len(rows),), person.kind, dtype=torch.int64)
    parts = shares(stage.ranker, torch.from_numpy(features), kinds)
    words = _words(stage, catalog, person, rows, features)
    words["interest"] = [_interest(person, event, catalog) for event in events]
    reasons: list[str | None] = []
    for place in range(len(rows)):
        strongest = sorted(zip(GROUPS, parts[:, place].tolist(), strict=True), key=lambda each: -each[1])
        said = [(words[group][place], share) for group, share in strongest if share >= LEAST_SHARE]
        given = [f"{own} ({share:.0%})" for own, share in said if own is not None]
        reasons.append("; ".join(given[:MOST_REASONS]) or None)
    return reasons


@torch.inference_mode()
def shares(ranker: Ranker, features: Tensor, kinds: Tensor) -> np.ndarray:
    """Return (G, P) the share that each of GROUPS has of all that raises the logits of P candidates.

    Args:
        ranker: of the logits.
        features: (P, F) float32.
        kinds: (P,) int64.
    """
    several = features.repeat(len(GROUPS) + 1, 1, 1)  # whole, and without each group
    for place, columns in enumerate(COLUMNS.values(), start=1):
        several[place][:, columns] = ranker.mean[columns]
    logits = ranker.logits(several, kinds.expand(several.shape[:2]))
    raised = (logits[0] - logits[1:]).clamp(min=0)
    return (raised / raised.sum(dim=0).clamp(min=1e-9)).numpy()


def _interest(person: Person, event: tuple[str, str] | None, catalog: Catalog) -> str | None:
    if not person.length:  # the feature is popularity then
        return "popular with newcomers"
    if event is None:
        return None
    kind, item_id = event
    return f"because you {DID.get(kind, f'{kind} {{}}').format(catalog.titles.get(item_id, item_id))}"


def _words(
    stage: RankingStage, catalog: Catalog, person: Person, rows: np.ndarray, features: np.ndarray
) -> dict[str, list[str | None]]:
    """Return by group what it says of each of P candidates; None where that would not be true, or did not count."""
    ranker = stage.ranker
    above = (features - ranker.mean.numpy()) / ranker.deviation.numpy()  # (P, F)

    def named(group: str, words: str, causes: np.ndarray) -> list[str | None]:
        ids = [catalog.item_ids[row] if own else "" for row, own in zip(causes.tolist(), counted(group), strict=True)]
        return [f"{words} {catalog.titles.get(item_id, item_id)}" if item_id else None for item_id in ids]

    def where(words: str, true: np.ndarray) -> list[str | None]:
        return [words if own else None for own in true.tolist()]

    def counted(group: str) -> np.ndarray:
        return features[:, COLUMNS[group][0]] > 0  # 0 where its source is off, or has not found the item

    counts, recent = stage.counts.arrays(), person.recent[:RECENT]
    followed = following.RECENCY[:RECENT] / (counts["followed"][recent] + 1)
    met = sum(each[:RECENT] for each in together.RECENCY.values()) / np.sqrt(counts["events"][recent] + 1)
    after = strongest_recent(counts, "next", followed, recent, rows)
    partners = strongest_recent(counts, "together", met, recent, rows)
    return {
        "follows": named("follows", "comes after", after),
        "together": named("together", "often taken together with", partners),
        "seen": where("you had it before", counted("seen")),
        "trending": where("trending now", above[:, COLUMNS["trending"]].sum(axis=1) > 0),
        "popular": where("popular of late", above[:, COLUMNS["popular"]].sum(axis=1) > 0),
        "new": _new(stage, catalog, person, rows),
    }


def strongest_recent(
    counts: Mapping[str, np.ndarray], name: str, weights: np.ndarray, recent: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """Return (P,) the row of the recent item in whose list each candidate has the largest weighted count; 0 for none.

    Args:
        counts: of lib/model/item_counts.py.
        name: of the lists, of which the STRONGEST are looked up, as for the answer.
        weights: (W,) of the recent items.
        recent: (W,) their rows.
        rows: (P,) of the candidates, each once.
    """
    lists = counts[f"{name}_rows"][recent, :STRONGEST]  # (W, K)
    strengths = counts[f"{name}_counts"][recent, :STRONGEST] * weights[:, None]
    ascending = np.sort(rows)
    places = np.searchsorted(ascending, lists).clip(max=len(rows) - 1)
    hits = (ascending[places] == lists) & (lists > 0)
    owners = np.broadcast_to(np.arange(len(recent))[:, None], lists.shape)
    table = np.zeros((len(rows), len(recent)), dtype=np.float32)
    table[places[hits], owners[hits]] = strengths[hits]
    strongest = np.where(table.max(axis=1) > 0, recent[table.argmax(axis=1)], 0)
    return strongest[np.searchsorted(ascending, rows)]


def _new(stage: RankingStage, catalog: Catalog, person: Person, rows: np.ndarray) -> list[str | None]:
    """Say of those among the newest that they are, and in what: the value that most of the recent items have, too."""
    newest = set(stage.standing.newest(None, -(-len(catalog) // NEW_SHARE)).tolist())
    values, kinds = stage.encoder.config.attribute_values or [], catalog.table.kinds
    attributes = stage.encoder.item_attributes
    recent = attributes[torch.from_numpy(person.recent)].cpu().numpy()
    words: list[str | None] = []
    for row in rows.tolist():
        codes = [code for code in attributes[row].tolist() if code] if row in newest else []
        named = [code for code in codes if kinds.get(values[code - 1].partition("=")[0]) in (TEXT, TEXTS)]
        if named:
            shared = max(named, key=lambda code: int((recent == code).sum()))
            words.append(f"new in {values[shared - 1].partition('=')[2]}")
        else:
            words.append("new" if row in newest else None)
    return words
