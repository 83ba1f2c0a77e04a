"""What a dislike does to the next answer, and what leaving dislikes out of the interest costs.

    python -m tests.benchmarks.dislikes --data DIR --model DIR [--column genres] [--weight W ...] [--json FILE]

The model is one of `afterclick pretrain --holdout temporal`. Of each person three clicks on items outside a genre are
known, then come five items of it: they are liked, not there, disliked, skipped, or rated worst or best. Of the first
100 answered items it is counted how many are of the genre, and at which place they are on average; the five themselves
are left out of every answer. Genres and items are drawn by popularity, the same for every reaction.

Then each event of the newest 20% of the time span is ranked, all items but those seen: ndcg@10 and recall@10 of those
that were liked, where more is better, and recall@10 of those that were turned down, where less is. `--weight` is the
ranking rule dislike_weight, the default if none is given.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from jobs.command_line import run_command
from jobs.configuration import write_json
from lib.data.catalog import Catalog
from lib.data.dataset import read_events, read_items, read_rating_scale
from lib.data.events import EVENT_KINDS, Event
from lib.data.histories import histories_of
from lib.data.history import History
from lib.data.holdout import TEMPORAL, cutoff_time
from lib.data.ratings import RatingScale
from lib.evaluation.metrics import ndcg_at, recall_at
from lib.evaluation.protocols import Cases, cases_of, model_contender, rank
from lib.model.batches import target_weights
from lib.model.encoder import BehaviourEncoder
from lib.model.folder import load_model
from lib.model.presets import DISLIKE_WEIGHT
from lib.ranking.recommender import Question, Recommender
from lib.ranking.rules import RankingRules
from tests.benchmarks.machine import describe_machine

PEOPLE, CLICKS, REACTIONS, ANSWERED = 200, 3, 5, 100
MOST_SHARE = 0.2  # of the items are of a genre: else it says little
NOW = 1_700_000_000_000
MINUTE = 60_000


class Genres:
    """Items by genre, and how often each is met."""

    def __init__(self, data: Path, catalog: Catalog, column: str):
        items = read_items(data)
        assert items is not None, f"{data} describes no items"
        values = items[column].to_pylist()
        rows = catalog.rows(items["item_id"].to_pylist())
        self.of_row: dict[int, set[str]] = {row: _words(value) for row, value in zip(rows, values, strict=True)}
        events = catalog.rows(read_events(data)["item_id"].to_pylist())
        self.counts = np.bincount(events, minlength=len(catalog) + 1).astype(np.float64)
        names = sorted({name for own in self.of_row.values() for name in own})
        most = MOST_SHARE * len(catalog)
        self.names = [name for name in names if 2 * REACTIONS <= len(self.rows(name)) <= most]

    def rows(self, name: str) -> list[int]:
        """Return the rows of a genre's items that anybody met."""
        return [row for row, own in self.of_row.items() if name in own and self.counts[row] > 0]

    def draw(self, generator: np.random.Generator) -> tuple[str, np.ndarray, np.ndarray]:
        """Return a genre, items outside of it, and items of it."""
        name = str(generator.choice(self.names))
        inside = np.array(self.rows(name))
        outside = np.setdiff1d(np.flatnonzero(self.counts), inside)
        outside, inside = (
            generator.choice(rows, count, replace=False, p=self.counts[rows] / self.counts[rows].sum())
            for rows, count in ((outside, CLICKS), (inside, REACTIONS))
        )
        return name, outside, inside


def _words(value: object) -> set[str]:
    return {word for word in re.split(r"[\s|,;]+", str(value or "")) if word}


def reactions(ratings: RatingScale) -> dict[str, tuple[str, float | None] | None]:
    """Return what a person does with the items of the genre."""
    return {
        "nothing": None,
        "like": ("like", None),
        "rated best": ("rating", ratings.best),
        "dislike": ("dislike", None),
        "skip": ("skip", None),
        "rated worst": ("rating", ratings.worst),
    }


def answered(recommender: Recommender, genres: Genres, ratings: RatingScale) -> dict[str, dict[str, float]]:
    """Return for each reaction the genre's share of the first 100 items, and the mean place of its items."""
    generator = np.random.default_rng(0)
    people = [genres.draw(generator) for _ in range(PEOPLE)]
    figures = {}
    for label, reaction in reactions(ratings).items():
        histories = [History.of(_events(recommender.catalog, clicked, met, reaction)) for _, clicked, met in people]
        questions = [Question(history, ANSWERED + REACTIONS) for history in histories]
        shares, places = [], []
        for (name, _, met), answer in zip(people, recommender.recommend(questions), strict=True):
            rows = [row for row in recommender.catalog.rows(item.item_id for item in answer) if row not in met]
            found = [place for place, row in enumerate(rows[:ANSWERED], start=1) if name in genres.of_row.get(row, ())]
            shares.append(len(found) / ANSWERED)
            places.append(float(np.mean(found)) if found else ANSWERED + 1.0)
        figures[label] = {"share": float(np.mean(shares)), "mean place": float(np.mean(places))}
    return figures


def _events(
    catalog: Catalog, clicked: np.ndarray, met: np.ndarray, reaction: tuple[str, float | None] | None
) -> Iterator[Event]:
    kinds = [("click", None)] * len(clicked) + ([] if reaction is None else [reaction] * len(met))
    rows = np.concatenate([clicked, met])
    for place, (row, (kind, value)) in enumerate(zip(rows.tolist(), kinds, strict=False)):
        yield Event("somebody", catalog.item_ids[row], kind, value, NOW + place * MINUTE)


def ranked(encoder: BehaviourEncoder, catalog: Catalog, data: Path, weight: float) -> dict[str, float]:
    """Return how liked events of the newest 20% of the time are ranked, and those that were turned down."""
    ratings = read_rating_scale(data)
    items = Catalog(catalog.item_ids[1:])
    items.extend(read_events(data)["item_id"].unique().to_pylist())
    histories = histories_of(read_events(data), items.row_of, EVENT_KINDS)
    contender = model_contender("", encoder, catalog, items, weight)
    liked = rank(contender, cases_of(histories, TEMPORAL, ratings)).ranks
    figures = {
        "liked ndcg@10": float(ndcg_at(liked, 10).mean()),
        "liked recall@10": float(recall_at(liked, 10).mean()),
    }
    owners = np.repeat(np.arange(len(histories)), histories.lengths)
    places = np.arange(len(histories.rows)) - histories.offsets[owners]
    tested = (histories.timestamps >= cutoff_time(histories.timestamps)) & (places > 0)
    tested &= target_weights(histories.kinds, histories.values, EVENT_KINDS, ratings) < 0
    if tested.any():
        disliked = rank(contender, Cases(histories, owners[tested], places[tested])).ranks
        figures["disliked recall@10"] = float(recall_at(disliked, 10).mean())
    return figures


def benchmark(
    data: Annotated[Path, typer.Option(help="An ingested dataset with times and described items.")],
    model: Annotated[Path, typer.Option(help="Its model, pretrained with --holdout temporal.")],
    column: Annotated[str, typer.Option(help="The items' column that names their genres.")] = "genres",
    weight: Annotated[list[float] | None, typer.Option(help="dislike_weight; repeatable.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Measure what dislikes do."""
    torch.set_num_threads(1)
    machine, results = describe_machine(), {}
    encoder, catalog, manifest = load_model(model)
    genres, ratings = Genres(data, catalog, column), read_rating_scale(data)
    for own in weight or [DISLIKE_WEIGHT]:
        rules = RankingRules(dislike_weight=own)
        shares = answered(Recommender(encoder, catalog, manifest.version, rules=rules), genres, ratings)
        figures = ranked(encoder, catalog, data, own)
        results[str(own)] = {"answers": shares, "ranked": figures}
        table = Table("after", "share of the genre", "mean place", title=f"{data.name}, dislike_weight {own:g}")
        for label, row in shares.items():
            table.add_row(label, f"{row['share']:.3f}", f"{row['mean place']:.1f}")
        Console().print(table)
        print(", ".join(f"{name} {figure:.4f}" for name, figure in figures.items()))
    if json_file is not None:
        write_json(json_file, {"machine": machine, "genres": genres.names, "results": results})


if __name__ == "__main__":
    run_command(benchmark)
