"""What the demo runs on: the synthetic shop, or an ingested dataset that is replayed."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from jobs.demo.shop import Shop
from jobs.pretrain_settings import PretrainSettings
from lib.data.dataset import read_events, read_items, read_rating_scale, write_dataset
from lib.data.events import Event
from lib.data.holdout import NONE
from lib.live.prequential import events_of, split_by_time

REACTION_SECONDS = 2.0  # simulated time between seeing a recommendation and clicking it
REPLAYED_SHARE = 0.2
SHOP_EPOCHS = 8  # of the shop's 60,000 events: half a minute on two cores, and past the steep part of the curve


class Source(Protocol):
    """Where the visitors' events come from."""

    def next_event(self, busy: Collection[str]) -> Event | None:
        """Return the next event in order, None at the end; `busy` are the users whose event before is not over yet."""
        ...

    def react(self, user_id: str, recommended_item_ids: list[str]) -> list[Event]:
        """Return what the user does with the recommendations that were shown, often nothing."""
        ...


class ShopSource:
    """The visitors of the synthetic shop; it never ends. Takes the shop's time forward."""

    def __init__(self, shop: Shop):
        self.shop = shop

    def next_event(self, busy: Collection[str]) -> Event | None:
        """Return what a visitor who is not busy chooses of their own accord."""
        self.shop.advance(self.shop.seconds_per_event)
        visitor = self.shop.next_visitor(busy)
        return Event(visitor, *self.shop.next_choice(visitor), value=None, timestamp=self.shop.now)

    def react(self, user_id: str, recommended_item_ids: list[str]) -> list[Event]:
        """Return a click on one of the recommendations, perhaps a cart after it, or nothing."""
        events = []
        for item_id, kind in self.shop.react(user_id, recommended_item_ids):
            self.shop.advance(REACTION_SECONDS)
            events.append(Event(user_id, item_id, kind, value=None, timestamp=self.shop.now))
        return events


class ReplaySource:
    """The events of a table once, oldest first; nobody reacts to recommendations."""

    def __init__(self, table: pa.Table):
        self._events = iter(sorted(events_of(table), key=lambda event: event.timestamp))

    def next_event(self, busy: Collection[str]) -> Event | None:
        """Return the next event of the table; the order stands even where its user is busy."""
        return next(self._events, None)

    def react(self, user_id: str, recommended_item_ids: list[str]) -> list[Event]:
        """Return nothing: what was recommended then is not known."""
        return []


@dataclass(frozen=True)
class World:
    """A dataset that is trained on, and what happens after it."""

    data: Path
    past: list[Event]  # of the dataset
    source: Source
    titles: dict[str, str]
    settings: PretrainSettings


def shop_world(folder: Path, seed: int) -> World:
    """Make a synthetic shop; its history is trained on."""
    shop = Shop(seed=seed)
    shop.write_dataset(folder)
    settings = PretrainSettings(holdout=NONE, epochs=SHOP_EPOCHS)
    return World(folder, events_of(shop.history), ShopSource(shop), shop.titles, settings)


def replay_world(data: Path, folder: Path) -> World:
    """Split an ingested dataset by time: the oldest events are trained on, the newest replayed.

    Raises:
        InputError: it has too few events to split.
    """
    stream, items = split_by_time(read_events(data), 1 - REPLAYED_SHARE), read_items(data)
    write_dataset(folder, stream.oldest, items, read_rating_scale(data))
    titles: dict[str, str] = {}
    if items is not None and "title" in items.column_names:
        titles = dict(zip(items["item_id"].to_pylist(), items["title"].to_pylist(), strict=True))
    settings = PretrainSettings(holdout=NONE)
    return World(folder, events_of(stream.oldest), ReplaySource(stream.newest), titles, settings)
