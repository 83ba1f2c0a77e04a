"""Prequential evaluation: a stream of events is answered one by one, each before anything learns from it.

Test-then-train (Dawid 1984; Gama, Sebastiao & Rodrigues 2013): the oldest events are what a model is pretrained on, the
rest streams in order of time. An arm answers each event's user from what it knows at that moment, and the rank of the
item that the person then chose is all that counts. Every event counts but those that turned an item down: they are
learned, and are no targets. A user of whom nothing is known is answered with what is popular. What differs between arms
is how they follow the stream:

    batch     nothing moves: weights and histories stay as they were at the split
    history   weights stay, histories grow
    live      histories grow, and micro-batches train the weights by the code of the near-line learner
    finetune  histories grow, and each period of the stream's time (a day, an hour) ends with a fine-tune on all so far

Where the model has a ranker, what each source of candidates says alone is ranked beside the whole answer: by the same
arm, at the same moment, among the same candidates.
"""

# pyarrow.compute makes its functions as it is imported, so a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from lib.data.catalog import Catalog
from lib.data.events import EVENT_KINDS
from lib.data.history import History, to_histories
from lib.data.popularity import DAY, popularity_of
from lib.data.ratings import STARS, RatingScale
from lib.data.tables import events_of
from lib.data.user_histories import UserHistories
from lib.errors import InputError
from lib.evaluation.comparison import WHOLE
from lib.evaluation.protocols import model_scores, remove_seen, target_ranks
from lib.live.learner import NearlineLearner, Rejection
from lib.live.micro_batch import micro_batch
from lib.live.new_items import Likes, add_rows
from lib.live.settings import LearnerConfig
from lib.log.log_file import LoggedEvent
from lib.model.batches import SequenceBatches, target_weights
from lib.model.encoder import PADDING_ROW, BehaviourEncoder
from lib.model.folder import load_model
from lib.model.trainer import Trainer, TrainingConfig
from lib.ranking.candidates import SOURCES
from lib.ranking.contender import answers, ranks_alone
from lib.ranking.fit import REPEATED_SHARE, Whole, count_all
from lib.ranking.stage import RankingStage, stage_of
from lib.versions.registry import Registry

KEEP_EVENTS = 1000  # of each user's history, as the aggregator keeps them
MISSED = np.iinfo(np.int64).max  # rank of a target that is not in an answer


@dataclass(frozen=True)
class Stream:
    """A dataset cut in two by time."""

    oldest: pa.Table  # what the model is pretrained on
    newest: pa.Table  # what streams in
    ratings: RatingScale = STARS  # their scale

    @cached_property
    def targets(self) -> np.ndarray:
        """(E,) bool, which of the newest events chose an item; the others turned one down."""
        kinds = pc.index_in(self.newest["event"], value_set=pa.array(EVENT_KINDS)).to_numpy() + 1
        values = pc.fill_null(self.newest["value"], float("nan")).to_numpy()
        return target_weights(kinds, values, EVENT_KINDS, self.ratings) > 0

    @cached_property
    def repeats(self) -> bool:
        """Whether people come back to items: then what they have seen belongs into the answers."""
        both = pa.concat_tables([self.oldest, self.newest])
        distinct = both.group_by(["user_id", "item_id"]).aggregate([]).num_rows
        return len(both) - distinct > REPEATED_SHARE * len(both)


def split_by_time(events: pa.Table, share: float, ratings: RatingScale = STARS) -> Stream:
    """Split events into the oldest `share` and the rest; events of one time keep their order.

    Raises:
        InputError: one of the two would be empty.
    """
    order = np.argsort(events["timestamp"].to_numpy(), kind="stable")
    events = events.take(pa.array(order))
    split = int(len(events) * share)
    if split < 2 or split == len(events):
        raise InputError(f"data: a share of {share} of {len(events)} events leaves one part empty; ingest more events")
    return Stream(events.slice(0, split), events.slice(split), ratings)


class Arm(Protocol):
    """Something that answers and may learn."""

    def ranks(self, contexts: Sequence[History], targets: Sequence[str]) -> Mapping[str, np.ndarray]:
        """Return (E,) int64 places of targets in the answers to their contexts, 0 is the top, MISSED if not in it.

        Of the WHOLE answer, and of each source of candidates alone where there are several.
        """
        ...

    def learn(self, events: Sequence[LoggedEvent], histories: UserHistories) -> None:
        """Take events whose targets were answered; the histories have them."""
        ...

    def facts(self) -> dict[str, Any]:
        """Return what it says of its learning; `events_read` are the events that went through training steps."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What an arm made of a stream."""

    ranks: np.ndarray  # (N,) of the stream's targets
    facts: dict[str, Any] = field(default_factory=dict)  # the arm's, and seconds of CPU for answers and learning
    alone: dict[str, np.ndarray] = field(default_factory=dict)  # (N,) ranks by each source of candidates alone


def replay(stream: Stream, arm: Arm, batch_events: int = 64, live_histories: bool = True) -> Outcome:
    """Answer every target of the stream's newest part; all of it is learned in micro-batches.

    Args:
        stream: what was before, and what streams in.
        arm: who answers.
        batch_events: events of a micro-batch: the arm learns when so many have come.
        live_histories: whether histories grow with the stream.
    """
    histories = UserHistories(KEEP_EVENTS)
    for event in events_of(stream.oldest):
        histories.append(event)
    ranks: list[Mapping[str, np.ndarray]] = []
    answer_seconds = learn_seconds = 0.0
    events, wanted = events_of(stream.newest), stream.targets.tolist()
    for start in range(0, len(events), batch_events):
        part = [LoggedEvent(start + i + 1, e, e.timestamp) for i, e in enumerate(events[start : start + batch_events])]
        contexts, targets = [], []
        for logged in part:
            if wanted[logged.offset - 1]:
                contexts.append(histories.get(logged.event.user_id))
                targets.append(logged.event.item_id)
            if live_histories:
                histories.append(logged.event, logged.offset)
        begin = time.process_time()
        if targets:
            ranks.append(arm.ranks(contexts, targets))
        answered = time.process_time()
        arm.learn(part, histories)
        answer_seconds += answered - begin
        learn_seconds += time.process_time() - answered
    seconds = {"answer_seconds": answer_seconds, "learn_seconds": learn_seconds}
    alone = {name: np.concatenate([part[name] for part in ranks]) for name in ranks[0]}
    return Outcome(alone.pop(WHOLE), seconds | arm.facts(), alone)


@torch.inference_mode()
def ranks_of(
    encoder: BehaviourEncoder,
    catalog: Catalog,
    contexts: Sequence[History],
    targets: Sequence[str],
    exclude_seen: bool,
    stage: RankingStage | None = None,
    sources: Sequence[str] = tuple(SOURCES),
) -> dict[str, np.ndarray]:
    """Return (E,) int64 places of targets among all items, as the ranking stage ranks, and by each source alone.

    Without a stage that is by s = uT A v, or by popularity for an empty history, and there are no sources. Ties count
    against the target; MISSED where the catalog does not know it or it is removed as seen.
    """
    encoder.eval()
    flat = to_histories(contexts, catalog, encoder.config.kind_codes)
    rows = np.array([catalog.row_of.get(target, PADDING_ROW) for target in targets], dtype=np.int64)
    scores = torch.empty(len(contexts), len(catalog) + 1)
    speaking = [name for name in sources if name != "seen" or not exclude_seen]
    alone: dict[str, np.ndarray] = {}
    if stage is None:
        for places, part in model_scores(encoder, encoder.item_vectors(torch.arange(len(catalog) + 1)), flat):
            scores[torch.from_numpy(places)] = part
    else:
        for places, part, found in answers(stage, flat, repeats=not exclude_seen, sources=sources):
            scores[torch.from_numpy(places)] = part[:, : len(catalog) + 1]
            for name, ranks in ranks_alone(found, rows[places], speaking, MISSED).items():
                alone.setdefault(name, np.full(len(contexts), MISSED))[places] = ranks
    if exclude_seen:
        remove_seen(scores, flat, np.arange(len(contexts)))
    scores[:, PADDING_ROW] = float("-inf")
    return {WHOLE: target_ranks(scores, rows, missed=MISSED)} | alone


class ModelArm:
    """A model that ranks all of its items."""

    def __init__(
        self, encoder: BehaviourEncoder, catalog: Catalog, exclude_seen: bool, sources: Sequence[str] = tuple(SOURCES)
    ):
        self.encoder = encoder
        self.catalog = catalog
        self.exclude_seen = exclude_seen
        self.sources = sources
        self.stage = stage_of(encoder)

    def ranks(self, contexts: Sequence[History], targets: Sequence[str]) -> dict[str, np.ndarray]:
        """Return where the targets rank."""
        return ranks_of(
            self.encoder, self.catalog, contexts, targets, self.exclude_seen, stage=self.stage, sources=self.sources
        )


class Frozen(ModelArm):
    """A model whose weights stay: the arms `batch` and `history`."""

    def __init__(self, model: Path, exclude_seen: bool, sources: Sequence[str] = tuple(SOURCES)):
        encoder, catalog, _ = load_model(model)
        super().__init__(encoder, catalog, exclude_seen, sources)

    def learn(self, events: Sequence[LoggedEvent], histories: UserHistories) -> None:
        """Learn nothing."""

    def facts(self) -> dict[str, Any]:
        """Say nothing."""
        return {}


class Live(ModelArm):
    """The near-line learner itself, with its replay sample, its gate and its registry: the arm `live`."""

    def __init__(
        self,
        model: Path,
        state: Path,
        config: LearnerConfig,
        exclude_seen: bool,
        seed: int = 0,
        sources: Sequence[str] = tuple(SOURCES),
    ):
        registry = Registry(state)
        registry.start_from(model)
        self.learner = NearlineLearner(registry, config)
        super().__init__(self.learner.model.encoder, self.learner.model.catalog, exclude_seen, sources)
        self.stage = self.learner.model.stage
        self.generator = np.random.default_rng(seed)
        self.rejected: list[str] = []
        self.events_read = 0

    def learn(self, events: Sequence[LoggedEvent], histories: UserHistories) -> None:
        """Learn one micro-batch."""
        learner = self.learner
        batch = micro_batch(events, events[0].offset - 1, histories, learner.sample_sizes, self.generator)
        result = learner.learn(batch)
        self.events_read += sum(map(len, batch.histories)) + sum(map(len, batch.replay))
        if isinstance(result, Rejection):
            self.rejected.append(result.reason)

    def facts(self) -> dict[str, Any]:
        """Say how many versions there were, and what the gate held back."""
        return {
            "events_read": self.events_read,
            "version": self.learner.version,
            "rejected_updates": len(self.rejected),
            "rejections": sorted(set(self.rejected)),
        }


class Finetuned(ModelArm):
    """A fine-tune on all events so far at the end of each period of the stream's time: the arm `finetune`.

    Each is `epochs` passes over everything, from the weights of the one before, with a learning rate that decays. The
    ranker stays as pretraining has fitted it: the fine-tune of a service keeps what it has learned live.
    """

    def __init__(
        self,
        model: Path,
        exclude_seen: bool,
        epochs: int,
        learning_rate: float,
        period: float = DAY,
        half_life: float = 7 * DAY,
        sources: Sequence[str] = tuple(SOURCES),
    ):
        encoder, catalog, manifest = load_model(model)
        super().__init__(encoder, catalog, exclude_seen, sources)
        self.epochs = epochs
        self.period = period
        self.half_life = half_life
        self.events_per_batch = manifest.training.events_per_batch
        self.trainer = Trainer(self.encoder, len(self.catalog), TrainingConfig(learning_rate=learning_rate))
        self.now: int | None = None  # which period it is
        self.fine_tunes = 0
        self.events_read = 0

    def learn(self, events: Sequence[LoggedEvent], histories: UserHistories) -> None:
        """Fine-tune when a new period has begun."""
        now = int(events[-1].event.timestamp // self.period)
        if self.now is not None and now > self.now:
            self._fine_tune(histories)
        self.now = now

    def _fine_tune(self, histories: UserHistories) -> None:
        every = [histories.get(user_id) for user_id in histories.users(len(histories))]
        known = len(self.catalog)
        self.catalog.extend(item_id for history in every for item_id in history.item_ids)
        add_rows(self.trainer, self.catalog, known, self.fine_tunes, Likes(self.encoder, self.catalog))
        flat = to_histories(every, self.catalog, self.encoder.config.kind_codes)
        batches = SequenceBatches(flat, self.encoder.config)
        peak = self.trainer.config.learning_rate
        for epoch in range(self.epochs):
            generator = np.random.default_rng((self.fine_tunes, epoch))
            self.trainer.learning_rate = peak * (1 - epoch / self.epochs)
            for batch in batches.epoch(self.events_per_batch, generator):
                self.trainer.step(batch)
            self.events_read += len(flat.rows)
        newest = int(flat.timestamps.max())
        totals = popularity_of(flat, newest, self.half_life, self.encoder.config.item_rows)
        self.encoder.item_popularity.copy_(torch.from_numpy(totals.astype(np.float32)))
        if self.encoder.counts is not None:
            count_all(self.encoder, Whole(flat))
        self.stage = stage_of(self.encoder)
        self.fine_tunes += 1

    def facts(self) -> dict[str, Any]:
        """Say how often, and how much."""
        return {"events_read": self.events_read, "fine_tunes": self.fine_tunes}
