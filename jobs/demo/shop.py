"""A synthetic shop: named items, and visitors whose wishes can be learned and do not stand still.

Nothing in it is measured from a real shop. What is synthetic, exactly:

- Items: 20 categories; a title is a style and a product ("Nordic Desk Lamp"); prices are log-normal around the
  category's; popularity falls with rank as 1 / (rank + 10).
- Taste: every visitor has a liking for each category and each style, a random walk pulled weakly back to zero.
- Sessions: about 6 events on one category and one style of the visitor's liking. Of the choices of a new item about
  half follow a "goes well with" pair of the item before (three partners an item: two from complementary
  categories, one similar), two in ten are an item on trend, the rest is browsing in the session's category.
- Trends: twice a simulated day four unpopular items surge, then lose half of their pull every day; after the history
  two at a time, which draw twice as many choices and fade twice as fast.
- Shifts: twice a simulated day some popular items get a new best partner: one in the history, `live_shifts` after it.
  The live phase begins with a trend and a shift, and its trends and pairs change faster than those of the history
  did, on purpose: so that a minute shows what learning live is worth where a real shop would take weeks.
- Reactions: a visitor looks at a list from the top, less and less likely with the position, and clicks at most one
  item, the likelier the better it suits the taste, the item before and the trends.
- Newcomers: who has met 120 items leaves, and somebody new with another taste takes the place.

One `Shop` is the world after its 30 days of history; time goes on from there by `advance`, `next_choice` and `react`.
The same seed and the same calls give the same shop, event for event.
"""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pyarrow as pa

from jobs.demo.assortment import CATEGORIES, STYLES, Assortment, draw
from jobs.demo.behaviour import Behaviour
from jobs.demo.fashion import HOUR, Fashion
from lib.data.dataset import write_dataset
from lib.data.events import EVENT_SCHEMA
from lib.errors import InputError

HISTORY_START = 1_577_836_800_000  # 2020-01-01: far enough back that simulated time stays behind the real one
HISTORY_DAYS = 30
HISTORY_EVENTS_PER_VISITOR = 30
SECONDS_PER_DAY = 86_400
SMALLEST_SHOP = 100  # visitors, and items


class Shop:
    """The shop after its history: `history` and `items` are its tables, `now` is simulated time in milliseconds.

    `category_taste` is every visitor's liking for each category, float (visitors, categories).

    Args:
        seed: the same seed gives the same shop.
        visitors: how many visit at a time, at least 100; the history has 30 events for each.
        items: how many are sold, at least 100.
        behaviour: how visitors behave.

    Raises:
        InputError: fewer than 100 visitors or items.
    """

    def __init__(self, seed: int = 0, visitors: int = 2000, items: int = 1000, behaviour: Behaviour | None = None):
        for name, count in (("visitors", visitors), ("items", items)):
            if count < SMALLEST_SHOP:
                raise InputError(f"{name}: a shop needs at least {SMALLEST_SHOP}, got {count}")
        self.behaviour = behaviour or Behaviour()
        self.random = np.random.default_rng(seed)
        self.now = HISTORY_START
        self.seconds_per_event = HISTORY_DAYS * SECONDS_PER_DAY / (visitors * HISTORY_EVENTS_PER_VISITOR)
        self.assortment = Assortment(items, self.random)
        self.fashion = Fashion(self.assortment, self.behaviour, self.random)
        self._open(visitors)
        self.history = self._visit(visitors * HISTORY_EVENTS_PER_VISITOR)
        self.behaviour = self.behaviour.live()
        self.fashion.change(self.now, self.behaviour)
        self.fashion.fade(self.now, self.behaviour)

    @property
    def items(self) -> pa.Table:
        """The items with their titles, categories and prices."""
        return self.assortment.table

    @property
    def item_ids(self) -> list[str]:
        """The id of each item."""
        return self.assortment.item_ids

    @property
    def titles(self) -> dict[str, str]:
        """Item id -> title."""
        return dict(zip(self.item_ids, self.items["title"].to_pylist(), strict=True))

    @property
    def trending(self) -> list[str]:
        """The items on trend now, the strongest first."""
        pull = self.fashion.pull
        return [self.item_ids[row] for row in np.argsort(-pull, kind="stable") if pull[row] > 0]

    @property
    def pairs(self) -> np.ndarray:
        """What goes well with what: item rows, int (items, partners), the likeliest partner first."""
        return self.fashion.partners.copy()

    def write_dataset(self, out: Path) -> None:
        """Write the history as an ingested dataset: out/events.parquet and out/items.parquet."""
        write_dataset(out, self.history, self.items)

    def advance(self, seconds: float) -> None:
        """Move simulated time on: tastes drift day by day, trends start and fade, pairs shift."""
        end = self.now + max(1, round(seconds * 1000))
        while self.now < end:
            self.now = min(end, (self.now // HOUR + 1) * HOUR)
            if self.now % HOUR == 0:
                self._strike(self.now // HOUR)

    def next_visitor(self, busy: Collection[str] = ()) -> str:
        """Return who acts next: one of those inside who is not `busy`, or an arrival when a session is over.

        Raises:
            InputError: every visitor of the shop is busy.
        """
        first = int(self.random.random() * len(self._inside))
        for place in (*range(first, len(self._inside)), *range(first)):
            visitor = self._inside[place]
            if self.visitor_ids[visitor] in busy:
                continue
            if self._events_left[visitor] <= 0:
                visitor = self._inside[place] = self._arrive(busy)
            return self.visitor_ids[visitor]
        return self.visitor_ids[self._arrive(busy)]

    def next_choice(self, visitor_id: str) -> tuple[str, str]:
        """Return the item the visitor turns to next of their own accord, and the kind of the event."""
        visitor = self._visitor_rows[visitor_id]
        if self._events_left[visitor] <= 0:
            self._start_session(visitor)
        self._events_left[visitor] -= 1
        item, kind = self._choose(visitor)
        self._remember(visitor, item, kind)
        return self.item_ids[item], kind

    def react(self, visitor_id: str, recommended_item_ids: list[str]) -> list[tuple[str, str]]:
        """Return the visitor's reaction to a list, best first: nothing, a click, or a click and a cart of one item."""
        visitor, row_of = self._visitor_rows[visitor_id], self.assortment.row_of
        # an item that the shop does not sell is not clicked, and takes its place in the list all the same
        shown = [(place, row_of[item]) for place, item in enumerate(recommended_item_ids) if item in row_of]
        if not shown:
            return []
        places, items = (np.array(column) for column in zip(*shown, strict=True))
        looked_at = 1.0 / np.log2(places + 2.0)
        clicked = self.random.random(len(items)) < looked_at / (1.0 + np.exp(-self._appeal(visitor, items)))
        if not clicked.any():
            return []
        item = int(items[clicked.argmax()])
        self._remember(visitor, item, "click")
        reaction = [(self.item_ids[item], "click")]
        if self.random.random() < self.behaviour.cart_after_view:
            self._remember(visitor, item, "cart")
            reaction.append((self.item_ids[item], "cart"))
        return reaction

    # ----------------------------------------------------------------------------------------- visitors come and leave

    def _open(self, visitors: int) -> None:
        """Let the first visitors in."""
        behaviour = self.behaviour
        self.category_taste = self.random.normal(0, behaviour.category_spread, (visitors, len(CATEGORIES)))
        self._style_taste = self.random.normal(0, behaviour.style_spread, (visitors, len(STYLES)))
        self._activity = np.exp(self.random.normal(0, 0.7, visitors))  # a few come often, many seldom
        self.visitor_ids = [f"visitor-{number:05d}" for number in range(visitors)]
        self._visitor_rows = {visitor_id: row for row, visitor_id in enumerate(self.visitor_ids)}
        self._next_number = visitors
        self._met: list[set[int]] = [set() for _ in range(visitors)]
        self._events_left = [0] * visitors
        self._interest = [(0, 0)] * visitors  # the session's category and style
        self._last: list[tuple[int, str] | None] = [None] * visitors  # the session's newest item and event kind
        self._inside: list[int] = []
        for _ in range(min(behaviour.visitors_inside, visitors // 2)):
            self._inside.append(self._arrive(()))

    def _visit(self, events: int) -> pa.Table:
        """Return so many events, by user and time, and the shop after them."""
        rows = []
        for _ in range(events):
            self.advance(self.seconds_per_event * (0.5 + self.random.random()))
            visitor_id = self.next_visitor()
            rows.append((visitor_id, *self.next_choice(visitor_id), self.now))
        users, items, kinds, times = zip(*rows, strict=True)
        columns = {"user_id": users, "item_id": items, "event": kinds, "timestamp": times}
        arrays = [
            pa.array(columns[field.name], field.type) if field.name in columns else pa.nulls(events, field.type)
            for field in EVENT_SCHEMA
        ]
        table = pa.Table.from_arrays(arrays, schema=EVENT_SCHEMA)
        return table.sort_by([("user_id", "ascending"), ("timestamp", "ascending")])

    def _arrive(self, busy: Collection[str]) -> int:
        """Draw somebody who is neither inside nor busy, and start their session."""
        weights = self._activity.copy()
        weights[self._inside] = 0.0
        weights[[self._visitor_rows[visitor_id] for visitor_id in busy if visitor_id in self._visitor_rows]] = 0.0
        if not weights.any():
            raise InputError(f"visitors: all {len(weights)} are busy; take a larger shop or fewer connections")
        visitor = draw(weights, self.random)
        if len(self._met[visitor]) >= self.behaviour.leave_after_items:
            self._replace(visitor)
        self._start_session(visitor)
        return visitor

    def _replace(self, visitor: int) -> None:
        """Have a newcomer take the place of a visitor who leaves."""
        del self._visitor_rows[self.visitor_ids[visitor]]
        self.visitor_ids[visitor] = f"visitor-{self._next_number:05d}"
        self._visitor_rows[self.visitor_ids[visitor]] = visitor
        self._next_number += 1
        self._met[visitor] = set()
        self.category_taste[visitor] = self.random.normal(0, self.behaviour.category_spread, len(CATEGORIES))
        self._style_taste[visitor] = self.random.normal(0, self.behaviour.style_spread, len(STYLES))

    def _start_session(self, visitor: int) -> None:
        self._events_left[visitor] = int(self.random.geometric(1.0 / self.behaviour.session_events))
        category = draw(np.exp(self.category_taste[visitor]), self.random)
        self._interest[visitor] = (category, draw(np.exp(self._style_taste[visitor]), self.random))
        self._last[visitor] = None

    # ---------------------------------------------------------------------------------------------- what they turn to

    def _choose(self, visitor: int) -> tuple[int, str]:
        behaviour, last = self.behaviour, self._last[visitor]
        if last and last[1] == "cart" and self.random.random() < behaviour.purchase_after_cart:
            return last[0], "purchase"
        if last and last[1] in ("view", "click") and self.random.random() < behaviour.cart_after_view:
            return last[0], "cart"
        if self.random.random() < behaviour.choose_trend:
            item = self._choose_trend(visitor)
            if item is not None:
                return item, "view"
        if last and self.random.random() < behaviour.follow_pair:
            item = self._choose_partner(visitor, last[0])
            if item is not None:
                return item, "click"
        kind = "dislike" if self.random.random() < behaviour.dislike else "view"
        return self._browse(visitor), kind

    def _choose_trend(self, visitor: int) -> int | None:
        pull = self.fashion.pull
        trending = [row for row in pull.nonzero()[0].tolist() if row not in self._met[visitor]]
        if not trending:
            return None
        liking = np.exp(0.5 * self.category_taste[visitor, self.assortment.category[trending]])
        return trending[draw(pull[trending] * liking, self.random)]

    def _choose_partner(self, visitor: int, item: int) -> int | None:
        met = self._met[visitor]
        partners = self.fashion.partners[item].tolist()
        weights = [
            0.0 if partner in met else weight
            for partner, weight in zip(partners, self.behaviour.partner_weights, strict=True)
        ]
        return partners[draw(np.array(weights), self.random)] if any(weights) else None

    def _browse(self, visitor: int) -> int:
        category, style = self._interest[visitor]
        members = self.assortment.members[category]
        styles = self.assortment.style[members]
        liking = np.exp(self._style_taste[visitor, styles] + 1.5 * (styles == style))
        return int(members[draw(self.assortment.popularity[members] * liking, self.random)])

    def _remember(self, visitor: int, item: int, kind: str) -> None:
        self._met[visitor].add(item)
        if kind != "dislike":  # the session goes on from the last item that was liked
            self._last[visitor] = (item, kind)

    def _appeal(self, visitor: int, items: np.ndarray) -> np.ndarray:
        """Return the log odds (items,) that a visitor clicks each item, if they look at it."""
        last = self._last[visitor]
        partners = self.fashion.partners
        goes_with_last = np.isin(items, partners[last[0]]) if last else np.zeros(len(items), dtype=bool)
        taste = 0.5 * self.category_taste[visitor, self.assortment.category[items]]
        taste = taste + 0.5 * self._style_taste[visitor, self.assortment.style[items]]
        return self.behaviour.click_ease + taste + 2.0 * goes_with_last + self.fashion.pull[items]

    # ----------------------------------------------------------------------------------------------------- time passes

    def _strike(self, hour: int) -> None:
        """Let a full hour change what it changes."""
        if hour % 24 == 0:
            self._drift()
        if hour % self.behaviour.change_hours == 0:
            self.fashion.change(self.now, self.behaviour)
        self.fashion.fade(self.now, self.behaviour)

    def _drift(self) -> None:
        """Renew a part of every taste."""
        keep = 1.0 - self.behaviour.drift
        renew = np.sqrt(1.0 - keep**2)  # keeps the spread of the tastes as it is
        for taste, spread in (
            (self.category_taste, self.behaviour.category_spread),
            (self._style_taste, self.behaviour.style_spread),
        ):
            taste *= keep
            taste += self.random.normal(0, spread * renew, taste.shape)
