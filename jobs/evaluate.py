"""Evaluate models offline, side by side with each other and with simple baselines.

python -m jobs.evaluate --data DATA --model MODEL [--model OTHER] --protocol leave-one-out [--json FILE] [--plot FILE]

All contenders answer the same cases, and what they achieve is resampled with the same draws of users. The baselines are
counted on what the protocol leaves for training.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console

from jobs.configuration import write_json
from jobs.pretrain_settings import PretrainSettings
from jobs.reports import check_plot, plot_comparison, print_comparison
from lib.data.dataset import read_events, read_rating_scale
from lib.data.events import EVENT_KINDS
from lib.data.popularity import DAY
from lib.errors import InputError
from lib.evaluation.baselines import NEIGHBOURS, ItemToItem, Popularity
from lib.evaluation.comparison import WHOLE, Comparison, Estimate, activity, compare, item_popularity
from lib.evaluation.metrics import LEVEL, RESAMPLES

if TYPE_CHECKING:
    from lib.data.catalog import Catalog
    from lib.data.histories import Histories
    from lib.evaluation.protocols import Contender
    from lib.model.encoder import BehaviourEncoder
    from lib.model.folder import Manifest

BASELINES = ("popularity", "item-to-item")


@dataclass(frozen=True)
class LoadedModel:
    """A model folder under the name that the tables have for it."""

    name: str
    folder: Path
    encoder: "BehaviourEncoder"
    catalog: "Catalog"
    manifest: "Manifest"


@dataclass(frozen=True)
class Evaluation:
    """A comparison, and what there is to know of each contender beside it."""

    protocol: str
    comparison: Comparison
    facts: list[dict[str, Any]]  # of each contender
    models: int  # the first so many contenders
    items: int  # of the dataset and all models: what coverage is a share of
    sources: dict[str, Comparison]  # of models with a ranker: the whole, each source alone, the whole without each

    def as_json(self) -> dict[str, Any]:
        """Return what --json writes; a single model's own figures stand at the top, too."""
        comparison = self.comparison
        contenders = [_contender_json(self, place) for place in range(len(self.facts))]
        whole = {
            "protocol": self.protocol,
            "cases": comparison.cases,
            "users": comparison.users,
            "all_items": self.items,
            "resamples": RESAMPLES,
            "level": LEVEL,
            "contenders": contenders,
        }
        if self.models > 1:
            return whole
        metrics = {name: estimate.value for name, estimate in comparison.results[0].metrics.items()}
        return metrics | self.facts[0] | whole


def _contender_json(evaluation: Evaluation, place: int) -> dict[str, Any]:
    comparison = evaluation.comparison
    result = comparison.results[place]
    written = {"name": result.name} | evaluation.facts[place] | _estimates_json(result.metrics)
    if result.differences:
        written["difference"] = {"from": comparison.results[0].name} | _estimates_json(result.differences)
    if result.name in evaluation.sources:
        written["sources"] = [
            {"name": own.name} | _estimates_json(own.metrics) | {"difference": _estimates_json(own.differences)}
            for own in evaluation.sources[result.name].results[1:]
        ]
    for breakdown, estimates in zip(comparison.breakdowns, result.breakdowns, strict=True):
        written[f"by_{breakdown.by}"] = [
            {"bucket": label, "cases": cases}
            | ({"items": breakdown.items[bucket]} if breakdown.items is not None else {})
            | _estimates_json(estimates[bucket])
            for bucket, (label, cases) in enumerate(zip(breakdown.labels, breakdown.cases, strict=True))
        ]
    return written


def _estimates_json(estimates: dict[str, Estimate]) -> dict[str, Any]:
    """Return the values by name, and under "intervals" low and high of those that have one; null is no case."""
    values = {name: None if math.isnan(estimate.value) else estimate.value for name, estimate in estimates.items()}
    intervals = {name: [e.low, e.high] for name, e in estimates.items() if not math.isnan(e.low)}
    return values | {"intervals": intervals}


def evaluate_models(
    data: str | Path,
    models: Sequence[str | Path],
    protocol: str,
    allow_leak: bool = False,
    baselines: bool = True,
    sources: bool = True,
    without_sources: Sequence[str] = (),
) -> Evaluation:
    """Compare model folders, baselines, and the models' sources of candidates, on the cases of a dataset.

    Raises:
        InputError: unknown protocol or source, a model that was trained on what the protocol tests, or data without
            cases.
    """
    # torch and transformers, which `--help` need not wait for
    from lib.data.catalog import Catalog
    from lib.data.histories import histories_of
    from lib.data.holdout import PROTOCOLS, training_part
    from lib.evaluation.protocols import cases_of, rank
    from lib.ranking.candidates import sources_without
    from lib.ranking.contender import catalog_stage, rank_sources

    left = sources_without(without_sources)
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol: {protocol!r} is not one of {', '.join(PROTOCOLS)}")
    loaded = _load(models, None if allow_leak else protocol)
    events = read_events(data)
    items = Catalog(events["item_id"].unique().to_pylist())
    for model in loaded:
        if not any(item_id in items.row_of for item_id in model.catalog.item_ids):
            raise InputError(
                f"data: none of its items is in the catalog of {model.folder}; evaluate with the data it was trained on"
            )
    for model in loaded:
        items.extend(model.catalog.item_ids[1:])
    histories = histories_of(events, items.row_of, EVENT_KINDS)
    cases = cases_of(histories, protocol, read_rating_scale(data))
    if len(cases.users) == 0:
        raise InputError(
            f"data: {data} has no case for {protocol}: no event that is no dislike and that earlier ones of its user "
            "could predict; ingest more events"
        )
    training = training_part(histories, protocol)
    counts = np.bincount(training.rows, minlength=len(items) + 1)
    several = {}  # of models with a ranker: the whole answer, each source alone, the whole without each
    for model in loaded if sources else ():
        stage = catalog_stage(model.encoder, model.catalog)
        if stage is not None:
            with Console(stderr=True).status(f"ranking for {len(cases.users):,} cases: {model.name} and its sources"):
                several[model.name] = rank_sources(stage, model.catalog, items, cases, left)
    rankings, facts = [], []
    for contender, described in _contenders(loaded, items, histories, training, left, baselines):
        if contender.name in several:
            ranking = several[contender.name][WHOLE]
        else:
            with Console(stderr=True).status(f"ranking for {len(cases.users):,} cases: {contender.name}"):
                ranking = rank(contender, cases)
        rankings.append((contender.name, ranking))
        unknown = {
            "cases_of_unknown_target": ranking.unknown_targets,
            "cases_without_known_input": ranking.unknown_inputs,
        }
        facts.append(described | unknown)
    told = {name: compare(list(own.items()), cases, [], counts) for name, own in several.items()}
    breakdowns = [activity(cases), item_popularity(cases.targets, counts)]
    return Evaluation(protocol, compare(rankings, cases, breakdowns, counts), facts, len(loaded), len(items), told)


def _load(folders: Sequence[str | Path], protocol: str | None) -> list[LoadedModel]:
    """Load the models, each under a name of its own; those that have seen the targets of `protocol` are refused."""
    from lib.model.folder import load_model

    if not folders:
        raise InputError("model: none is given; name one or more model folders")
    loaded = []
    for name, folder in zip(_names([Path(folder) for folder in folders]), folders, strict=True):
        encoder, catalog, manifest = load_model(folder)
        if protocol is not None:
            _refuse_leak(folder, manifest, protocol)
        loaded.append(LoadedModel(name, Path(folder), encoder, catalog, manifest))
    return loaded


def _names(folders: Sequence[Path]) -> list[str]:
    """Name the folders, with as many of the folders above as tell them apart; numbered where one is repeated."""
    paths = [folder.resolve() for folder in folders]
    names: list[str] = []
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(set(paths)) and not set(names) & set(BASELINES):
            break
    times: Counter[str] = Counter()
    numbered = []
    for name in names:
        times[name] += 1
        numbered.append(name if times[name] == 1 else f"{name} ({times[name]})")
    return numbered


def _refuse_leak(folder: str | Path, manifest: "Manifest", protocol: str) -> None:
    held_out = manifest.training.holdout
    if held_out == protocol:
        return
    raise InputError(
        f"protocol: {folder} was trained with holdout {held_out!r}, so {protocol} would test it on what it has seen; "
        f"pretrain with --holdout {protocol}, or add --allow-leak"
    )


def _contenders(
    models: Sequence[LoadedModel],
    items: "Catalog",
    histories: "Histories",
    training: "Histories",
    sources: Sequence[str],
    baselines: bool,
) -> Iterator[tuple["Contender", dict[str, Any]]]:
    """Return the models, then the baselines, each with what there is to know of it."""
    from lib.evaluation.protocols import baseline_contender
    from lib.ranking.contender import answer_contender

    for model in models:
        contender = answer_contender(model.name, model.encoder, model.catalog, items, sources=sources)
        yield (
            contender,
            {
                "kind": "model",
                "folder": str(model.folder),
                "model_version": model.manifest.version,
                "items": len(model.catalog),
                "events_of_unknown_items": int((contender.own_rows[histories.rows] == 0).sum()),
            },
        )
    if not baselines:
        return
    half_life = PretrainSettings().popularity_half_life_days
    popularity = Popularity.count(training, len(items), half_life * DAY)
    yield (
        baseline_contender(BASELINES[0], popularity.scores, items),
        {"kind": "baseline", "items": len(items), "half_life_days": half_life},
    )
    neighbours = ItemToItem.count(training, len(items))
    yield (
        baseline_contender(BASELINES[1], neighbours.scores, items),
        {
            "kind": "baseline",
            "items": len(items),
            "window": neighbours.window,
            "neighbours": NEIGHBOURS,
            "recency_half_life_events": neighbours.half_life,
        },
    )


def evaluate_command(
    data: Annotated[Path, typer.Option(help="Ingested dataset.")],
    model: Annotated[list[Path], typer.Option(help="Model folder; repeatable. Differences are from the first.")],
    protocol: Annotated[str, typer.Option(help="leave-one-out or temporal.")] = "leave-one-out",
    baselines: Annotated[bool, typer.Option(help="Compare with popularity and item-to-item, too.")] = True,
    sources: Annotated[bool, typer.Option(help="Say what each source of candidates is worth, too.")] = True,
    without_sources: Annotated[list[str] | None, typer.Option(help="One to switch off; repeatable.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write all figures there.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them there, as a PNG file.")] = None,
    allow_leak: Annotated[bool, typer.Option(help="Evaluate although a model has seen the targets.")] = False,
) -> None:
    """Evaluate models offline, side by side, with popularity and item-to-item recommendations as baselines."""
    check_plot(plot)
    evaluation = evaluate_models(data, model, protocol, allow_leak, baselines, sources, without_sources or ())
    if json_ is not None:
        write_json(json_, evaluation.as_json())
    comparison = evaluation.comparison
    title = f"{data.resolve().name}, {protocol}, {comparison.cases:,} cases of {comparison.users:,} users"
    print_comparison(comparison, title)
    for name, told in evaluation.sources.items():
        print_comparison(told, f"{name}: each source of candidates alone, and the {WHOLE} answer without it")
    if plot is not None:
        plot_comparison(comparison, title, plot)


if __name__ == "__main__":
    from jobs.command_line import run_command

    run_command(evaluate_command)
