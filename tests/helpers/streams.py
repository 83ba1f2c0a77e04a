"""A live stream without a cluster, honest or attacked, and how well what is live ranks what honest people do next.

The parts are those of the service: cleaning, histories, micro-batches, and the near-line learner with its registry.
Each honest event is ranked among all items by the version that is live when it comes (prequential), seen items removed.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from jobs.training_data import TrainingData
from jobs.training_loop import count_popularity
from lib.data.attributes import attribute_codes, attribute_values
from lib.data.catalog import Catalog
from lib.data.events import EVENT_KINDS, Event
from lib.data.guard import CleaningRules, FeedbackGuard
from lib.data.histories import histories_of
from lib.data.history import History
from lib.data.popularity import DAY
from lib.data.tables import events_of
from lib.data.user_histories import UserHistories
from lib.evaluation.comparison import WHOLE
from lib.evaluation.metrics import ndcg_at
from lib.live.learner import NearlineLearner
from lib.live.micro_batch import micro_batch
from lib.live.prequential import ranks_of
from lib.live.settings import LearnerConfig
from lib.log.log_file import LoggedEvent
from lib.model.batches import SequenceBatches, value_boundaries
from lib.model.encoder import BehaviourEncoder, BehaviourEncoderConfig
from lib.model.folder import Manifest
from lib.model.trainer import Trainer, TrainingConfig
from lib.versions.registry import Registry
from lib.versions.rejections import Rejection

BATCH_EVENTS = 64
EVENTS_PER_SECOND = 5  # of honest people
FAKE = "fake"  # what attackers' ids begin with
ATTACKS = ("one user", "a thousand users", "random labels", "learning rate")
PART = (0.25, 0.5)  # of the stream, into which an attack's events are mixed
ADVERSARIAL = (0.25, 0.35, 100.0)  # the part of the updates that are made with so many times the learning rate


class World(NamedTuple):
    """What is trained on, and what happens after it."""

    past: list[Event]
    live: list[Event]
    items: pa.Table | None


class Arrival(NamedTuple):
    """An event and when it arrives, in milliseconds."""

    time: int
    event: Event


def shop_world(visitors: int, items: int, live: int, seed: int = 1) -> World:
    """Return the synthetic shop, with what its visitors do of their own accord as the stream."""
    from jobs.demo.behaviour import Behaviour
    from jobs.demo.shop import Shop

    usual = Behaviour()
    calm = Behaviour(  # trends as in the history: an update that is held back costs what it holds, and little else
        live_choose_trend=usual.choose_trend,
        live_trend_items=usual.trend_items,
        live_trend_half_life_hours=usual.trend_half_life_hours,
    )
    shop = Shop(seed=seed, visitors=visitors, items=items, behaviour=calm)
    stream = []
    for _ in range(live):
        shop.advance(shop.seconds_per_event)
        visitor = shop.next_visitor()
        stream.append(Event(visitor, *shop.next_choice(visitor), None, shop.now))
    return World(events_of(shop.history.sort_by("timestamp")), stream, shop.items)


def pretrained(world: World, folder: Path, epochs: int, hidden_size: int = 32, max_length: int = 20) -> Registry:
    """Make a registry whose first version has learned the past."""
    catalog = Catalog.of_dataset(dict.fromkeys(event.item_id for event in world.past), world.items)
    table = pa.Table.from_pylist([event._asdict() for event in world.past])
    table = table.set_column(table.schema.get_field_index("value"), "value", table["value"].cast(pa.float32()))
    histories = histories_of(table, catalog.row_of, EVENT_KINDS)
    attributes = attribute_values(catalog)
    codes = attribute_codes(catalog, attributes)
    torch.manual_seed(0)
    encoder = BehaviourEncoder(
        BehaviourEncoderConfig(
            item_rows=len(catalog) + 1,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_length=max_length,
            dropout=0.3,
            event_kinds=list(EVENT_KINDS),
            value_boundaries=value_boundaries(histories.values),
            inputs=["kind", "value", "attributes"],
            attribute_values=attributes,
            attributes_per_item=codes.shape[1],
        )
    )
    encoder.item_attributes.copy_(torch.from_numpy(codes))
    trainer = Trainer(encoder, len(catalog), TrainingConfig(learning_rate=2e-3, negatives=256))
    batches = SequenceBatches(histories, encoder.config)
    for epoch in range(epochs):
        for batch in batches.epoch(2048, np.random.default_rng(epoch)):
            trainer.step(batch)
    count_popularity(encoder, TrainingData(histories, catalog), 7 * DAY)
    registry = Registry(folder)
    registry.publish_snapshot(encoder, catalog, Manifest(version=1), trainer.optimizer_state())
    return registry


def arrivals_of(world: World, attack: str | None) -> list[Arrival]:
    """Return the live stream with an attack's events in a part of it."""
    gap = 1000 // EVENTS_PER_SECOND
    arrivals = [Arrival(place * gap, event) for place, event in enumerate(world.live)]
    fakes = _fakes(world, attack)
    first, last = (int(share * len(arrivals)) * gap for share in PART)
    for place, fake in enumerate(fakes):
        time = first + (last - first) * place // len(fakes)
        honest = arrivals[time // gap].event.timestamp
        arrivals.append(Arrival(time, fake._replace(timestamp=honest + time % gap, event_id=f"{FAKE}-{place}")))
    return sorted(arrivals, key=lambda arrival: arrival.time)


def _fakes(world: World, attack: str | None) -> list[Event]:
    """Return an attack's events, whose times are still to be set."""
    generator = np.random.default_rng(7)
    counts = Counter(event.item_id for event in world.past)
    known = [item_id for item_id, _ in counts.most_common()]
    pushed = known[len(known) * 3 // 4]
    if attack == "one user":
        return [Event(f"{FAKE}-clicker", pushed, "click", None, 0)] * 5000
    if attack == "a thousand users":  # each looks like anybody, then buys the one item
        fakes = []
        for user in range(1000):
            seen = generator.choice(known[: len(known) // 4], 4, replace=False)
            fakes += [Event(f"{FAKE}-{user}", str(item_id), "click", None, 0) for item_id in seen]
            fakes.append(Event(f"{FAKE}-{user}", pushed, "purchase", None, 0))
        return fakes
    if attack == "random labels":
        kinds = ("click", "purchase", "like", "dislike")
        choices = zip(
            generator.integers(0, 200, 5000), generator.choice(known, 5000), generator.choice(kinds, 5000), strict=True
        )
        return [Event(f"{FAKE}-{user}", str(item_id), str(kind), None, 0) for user, item_id, kind in choices]
    return []


@dataclass
class Outcome:
    """What learning from a stream led to."""

    ndcg: dict[tuple[str, str, int], float] = field(default_factory=dict)  # NDCG@10 of each honest event
    updates: int = 0
    rejections: list[tuple[int, Rejection]] = field(default_factory=list)  # with the number of the update
    refused: Counter[str] = field(default_factory=Counter)  # by the guard, by reason

    def relative_to(self, honest: "Outcome", last: float = 1.0) -> float:
        """Return NDCG@10 of the last part (share) of the events, relative to that in an honest stream."""
        events = sorted(self.ndcg.keys() & honest.ndcg.keys(), key=lambda event: event[2])
        events = events[int(len(events) * (1 - last)) :]
        return sum(self.ndcg[event] for event in events) / sum(honest.ndcg[event] for event in events)

    @property
    def quality(self) -> float:
        """Mean NDCG@10."""
        return float(np.mean(list(self.ndcg.values())))


class LiveStream:
    """The way of an event through the service, in one process."""

    def __init__(self, world: World, registry: Registry, config: LearnerConfig, rules: CleaningRules | None = None):
        self.learner = NearlineLearner(registry, config)
        self.guard = FeedbackGuard(rules or CleaningRules())
        self.histories = UserHistories()
        for event in world.past:
            self.histories.append(event)
        self.generator = np.random.default_rng(0)
        self.offset = 0
        self.waiting: list[LoggedEvent] = []
        self.asked: list[tuple[History, Event]] = []  # by honest people, since the last update
        self.outcome = Outcome()

    def run(self, world: World, attack: str | None) -> Outcome:
        """Take every arrival of the stream, attacked or not."""
        first, last, factor = ADVERSARIAL
        updates, rate = len(world.live) // BATCH_EVENTS, self.learner.model.trainer.learning_rate
        for time, event in arrivals_of(world, attack):
            objection = self.guard.objection(event, time)
            if objection is not None:
                self.outcome.refused[objection.reason] += 1
                continue
            self.offset += 1
            context = self.histories.get(event.user_id)
            if not event.user_id.startswith(FAKE) and len(context) and event.item_id not in context.item_ids:
                self.asked.append((context, event))
            self.histories.append(event, self.offset)
            self.waiting.append(LoggedEvent(self.offset, event, time))
            if len(self.waiting) == BATCH_EVENTS:
                adversarial = attack == "learning rate" and first <= self.outcome.updates / updates < last
                self.learner.model.trainer.learning_rate = factor * rate if adversarial else rate
                self._update()
        return self.outcome

    def _update(self) -> None:
        """Answer what was asked since the last update, then learn."""
        learner, events = self.learner, [event for _, event in self.asked]
        contexts, targets = [context for context, _ in self.asked], [event.item_id for event in events]
        ranks = ranks_of(learner.model.encoder, learner.model.catalog, contexts, targets, exclude_seen=True)
        ndcg = ndcg_at(ranks[WHOLE], 10)
        keys = [(event.user_id, event.item_id, event.timestamp) for event in events]
        self.outcome.ndcg |= dict(zip(keys, ndcg.tolist(), strict=True))
        batch = micro_batch(self.waiting, learner.log_offset, self.histories, learner.sample_sizes, self.generator)
        result = learner.learn(batch)
        if isinstance(result, Rejection):
            self.outcome.rejections.append((self.outcome.updates, result))
        self.outcome.updates += 1
        self.waiting, self.asked = [], []
