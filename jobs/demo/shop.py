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
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from lib.data.dataset import write_dataset
from lib.data.events import EVENT_SCHEMA
from lib.errors import InputError

HISTORY_START = 1_577_836_800_000  # 2020-01-01: far enough back that simulated time stays behind the real one
HISTORY_DAYS = 30
HISTORY_EVENTS_PER_VISITOR = 30
SECONDS_PER_DAY = 86_400
HOUR = 3_600_000  # milliseconds
SMALLEST_SHOP = 100  # visitors, and items

STYLES = ("Classic", "Nordic", "Vintage", "Compact", "Eco", "Bold", "Premium", "Everyday")
# category: typical price, the two categories that go with it, its products
CATEGORIES = {
    "Tents": (190, ("Sleeping Bags", "Camp Kitchen"), "Dome Tent,Family Tent,Tarp,Hammock,Bivy,Awning,Beach Shelter"),
    "Sleeping Bags": (90, ("Tents", "Backpacks"), "Down Bag,Summer Bag,Quilt,Sleeping Mat,Air Pillow,Liner,Bag Duo"),
    "Camp Kitchen": (45, ("Tents", "Coffee"), "Gas Stove,Camp Pot,Mess Kit,Cool Box,Spork Set,Water Filter,Fire Bowl"),
    "Backpacks": (85, ("Hiking Shoes", "Sleeping Bags"), "Daypack,Trekking Pack,Roll Top,Duffel,Sling,Dry Bag,Tote"),
    "Hiking Shoes": (120, ("Backpacks", "Jackets"), "Trail Shoe,Boot,Sandal,Approach Shoe,Gaiters,Wool Socks,Insoles"),
    "Jackets": (150, ("Hiking Shoes", "Running"), "Rain Jacket,Parka,Fleece,Down Vest,Windbreaker,Softshell,Poncho"),
    "Running": (70, ("Fitness", "Headphones"), "Road Shoe,Running Tee,Shorts,Running Belt,Headlamp,Cap,Arm Sleeves"),
    "Fitness": (40, ("Running", "Tea"), "Yoga Mat,Kettlebell,Foam Roller,Jump Rope,Resistance Band,Dumbbell,Gym Towel"),
    "Cycling": (110, ("Jackets", "Backpacks"), "Helmet,Pannier,Bike Light,Saddle,Floor Pump,Lock,Handlebar Bag"),
    "Coffee": (60, ("Tableware", "Tea"), "Grinder,Moka Pot,Pour-Over Set,French Press,Espresso Beans,Scale,Kettle"),
    "Tea": (25, ("Tableware", "Coffee"), "Green Tea,Black Tea,Teapot,Infuser,Matcha Set,Herbal Blend,Tea Caddy"),
    "Tableware": (30, ("Cookware", "Tea"), "Mug,Dinner Plate,Bowl,Carafe,Cutlery Set,Serving Board,Tumbler"),
    "Cookware": (75, ("Kitchen Tools", "Tableware"), "Skillet,Saucepan,Dutch Oven,Wok,Roasting Tin,Casserole,Griddle"),
    "Kitchen Tools": (28, ("Cookware", "Tableware"), "Chef Knife,Peeler,Whisk,Cutting Board,Grater,Mortar,Colander"),
    "Desks": (240, ("Lamps", "Keyboards"), "Standing Desk,Writing Desk,Office Chair,Stool,Monitor Arm,Footrest,Mat"),
    "Lamps": (65, ("Desks", "Shelves"), "Desk Lamp,Floor Lamp,Pendant,Reading Light,Lantern,Light Strip,Bedside Lamp"),
    "Shelves": (80, ("Lamps", "Plants"), "Bookcase,Wall Shelf,Storage Box,Coat Rack,Cube Shelf,Bookend,Wire Basket"),
    "Plants": (24, ("Shelves", "Lamps"), "Monstera,Fern,Cactus,Plant Pot,Watering Can,Hanging Planter,Plant Stand"),
    "Keyboards": (70, ("Headphones", "Desks"), "Keyboard,Mouse,Trackball,Wrist Rest,Keycap Set,Number Pad,USB Hub"),
    "Headphones": (110, ("Keyboards", "Running"), "Earbuds,Headset,Over-Ears,Sport Buds,Amplifier,Ear Pads,Stand"),
}


@dataclass(frozen=True)
class Behaviour:
    """How the shop's visitors behave; probabilities unless a unit is named."""

    session_events: float = 6.0  # mean length of a session
    visitors_inside: int = 24  # how many sessions go on at the same time
    follow_pair: float = 0.65  # of the new items that are not on trend
    partner_weights: tuple[float, ...] = (0.5, 0.3, 0.2)
    choose_trend: float = 0.2
    cart_after_view: float = 0.10
    purchase_after_cart: float = 0.45
    dislike: float = 0.04  # of the items met while browsing
    category_spread: float = 1.5  # standard deviation of the liking for a category
    style_spread: float = 1.0
    drift: float = 0.03  # the part of a taste that is renewed in a day
    change_hours: int = 12  # simulated hours between new trends, and between shifts
    trend_items: int = 4
    trend_half_life_hours: float = 24.0
    shifts: int = 1  # popular items with a new best partner at each change
    live_shifts: int = 30  # what it is after the history, as the three below
    live_choose_trend: float = 0.4
    live_trend_items: int = 2
    live_trend_half_life_hours: float = 12.0
    click_ease: float = -3.5  # log odds of a click on an item of neutral appeal that is looked at
    leave_after_items: int = 120  # a visitor who has met so many items leaves; a newcomer takes the place

    def live(self) -> "Behaviour":
        """How they behave after the history."""
        return replace(
            self,
            shifts=self.live_shifts,
            choose_trend=self.live_choose_trend,
            trend_items=self.live_trend_items,
            trend_half_life_hours=self.live_trend_half_life_hours,
        )


@dataclass(frozen=True)
class Trend:
    """Items that many want for a while; `start` in milliseconds of simulated time."""

    items: np.ndarray
    start: int


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
        self._stock(items)
        self._open(visitors)
        self.history = self._visit(visitors * HISTORY_EVENTS_PER_VISITOR)
        self.behaviour = self.behaviour.live()
        self._change()
        self._fade_trends()

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
        """Who acts next: one of those inside who is not `busy`, or an arrival when a session is over.

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
        """The item the visitor turns to next of their own accord, and the kind of the event."""
        visitor = self._visitor_rows[visitor_id]
        if self._events_left[visitor] <= 0:
            self._start_session(visitor)
        self._events_left[visitor] -= 1
        item, kind = self._choose(visitor)
        self._remember(visitor, item, kind)
        return self.item_ids[item], kind

    def react(self, visitor_id: str, recommended_item_ids: list[str]) -> list[tuple[str, str]]:
        """The visitor's reaction to a list, best first: nothing, a click, or a click and a cart of one item."""
        visitor = self._visitor_rows[visitor_id]
        # an item that the shop does not sell is not clicked, and takes its place in the list all the same
        shown = [(place, self._item_rows[i]) for place, i in enumerate(recommended_item_ids) if i in self._item_rows]
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

    @property
    def trending(self) -> list[str]:
        """The items on trend now, the strongest first."""
        return [self.item_ids[row] for row in np.argsort(-self._pull, kind="stable") if self._pull[row] > 0]

    @property
    def pairs(self) -> np.ndarray:
        """What goes well with what: item rows, int (items, partners), the likeliest partner first."""
        return self._partners.copy()

    def _stock(self, count: int) -> None:
        names = list(CATEGORIES)
        self._category = np.arange(count) % len(names)
        self._members = [np.flatnonzero(self._category == category) for category in range(len(names))]
        titles, styles = [""] * count, np.zeros(count, dtype=np.int64)
        for name, members in zip(names, self._members, strict=True):
            products = CATEGORIES[name][2].split(",")
            for place, row in enumerate(members):
                series, kind = divmod(place, len(STYLES) * len(products))
                styles[row] = kind % len(STYLES)
                titles[row] = f"{STYLES[styles[row]]} {products[kind // len(STYLES)]}"
                if series:
                    titles[row] += f" Mk {series + 1}"
        self._style = styles
        typical = np.array([CATEGORIES[name][0] for name in names])[self._category]
        dearer = np.where(styles == STYLES.index("Premium"), 1.6, 1.0)
        price = np.floor(typical * dearer * np.exp(self.random.normal(0, 0.35, count))) + 0.99
        self._popularity = 1.0 / (self.random.permutation(count) + 10.0)
        self.item_ids = [f"item-{row:04d}" for row in range(count)]
        self._item_rows = {item_id: row for row, item_id in enumerate(self.item_ids)}
        self.titles = dict(zip(self.item_ids, titles, strict=True))
        self.items = pa.table(
            {
                "item_id": self.item_ids,
                "title": titles,
                "category": [names[category] for category in self._category],
                "price": pa.array(price, pa.float64()),
            }
        )
        self._complements = [[names.index(other) for other in CATEGORIES[name][1]] for name in names]
        self._partners = np.array([self._draw_partners(row) for row in range(count)])
        self._trends: list[Trend] = []
        self._pull = np.zeros(count)

    def _open(self, visitors: int) -> None:
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
        weights = self._activity.copy()
        weights[self._inside] = 0.0
        weights[[self._visitor_rows[visitor_id] for visitor_id in busy if visitor_id in self._visitor_rows]] = 0.0
        if not weights.any():
            raise InputError(f"visitors: all {len(weights)} are busy; take a larger shop or fewer connections")
        visitor = self._draw(weights)
        if len(self._met[visitor]) >= self.behaviour.leave_after_items:
            self._replace(visitor)
        self._start_session(visitor)
        return visitor

    def _replace(self, visitor: int) -> None:
        del self._visitor_rows[self.visitor_ids[visitor]]
        self.visitor_ids[visitor] = f"visitor-{self._next_number:05d}"
        self._visitor_rows[self.visitor_ids[visitor]] = visitor
        self._next_number += 1
        self._met[visitor] = set()
        self.category_taste[visitor] = self.random.normal(0, self.behaviour.category_spread, len(CATEGORIES))
        self._style_taste[visitor] = self.random.normal(0, self.behaviour.style_spread, len(STYLES))

    def _start_session(self, visitor: int) -> None:
        self._events_left[visitor] = int(self.random.geometric(1.0 / self.behaviour.session_events))
        category = self._draw(np.exp(self.category_taste[visitor]))
        self._interest[visitor] = (category, self._draw(np.exp(self._style_taste[visitor])))
        self._last[visitor] = None

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
        trending = [row for row in self._pull.nonzero()[0].tolist() if row not in self._met[visitor]]
        if not trending:
            return None
        liking = np.exp(0.5 * self.category_taste[visitor, self._category[trending]])
        return trending[self._draw(self._pull[trending] * liking)]

    def _choose_partner(self, visitor: int, item: int) -> int | None:
        met = self._met[visitor]
        partners = self._partners[item].tolist()
        weights = [
            0.0 if partner in met else weight
            for partner, weight in zip(partners, self.behaviour.partner_weights, strict=True)
        ]
        return partners[self._draw(np.array(weights))] if any(weights) else None

    def _browse(self, visitor: int) -> int:
        category, style = self._interest[visitor]
        members = self._members[category]
        styles = self._style[members]
        liking = np.exp(self._style_taste[visitor, styles] + 1.5 * (styles == style))
        return int(members[self._draw(self._popularity[members] * liking)])

    def _remember(self, visitor: int, item: int, kind: str) -> None:
        self._met[visitor].add(item)
        if kind != "dislike":  # the session goes on from the last item that was liked
            self._last[visitor] = (item, kind)

    def _appeal(self, visitor: int, items: np.ndarray) -> np.ndarray:
        last = self._last[visitor]
        goes_with_last = np.isin(items, self._partners[last[0]]) if last else np.zeros(len(items), dtype=bool)
        taste = 0.5 * self.category_taste[visitor, self._category[items]]
        taste = taste + 0.5 * self._style_taste[visitor, self._style[items]]
        return self.behaviour.click_ease + taste + 2.0 * goes_with_last + self._pull[items]

    def _strike(self, hour: int) -> None:
        if hour % 24 == 0:
            self._drift()
        if hour % self.behaviour.change_hours == 0:
            self._change()
        self._fade_trends()

    def _change(self) -> None:
        self._start_trend()
        self._shift_pairs(self.behaviour.shifts)

    def _drift(self) -> None:
        keep = 1.0 - self.behaviour.drift
        renew = np.sqrt(1.0 - keep**2)  # keeps the spread of the tastes as it is
        for taste, spread in (
            (self.category_taste, self.behaviour.category_spread),
            (self._style_taste, self.behaviour.style_spread),
        ):
            taste *= keep
            taste += self.random.normal(0, spread * renew, taste.shape)

    def _start_trend(self) -> None:
        unpopular = np.flatnonzero((self._popularity < np.median(self._popularity)) & (self._pull == 0))
        items = self.random.choice(unpopular, self.behaviour.trend_items, replace=False)
        self._trends.append(Trend(items, self.now))

    def _fade_trends(self) -> None:
        self._pull[:] = 0.0
        going_on = []
        for trend in self._trends:
            hours = (self.now - trend.start) / HOUR
            pull = 0.5 ** (hours / self.behaviour.trend_half_life_hours)
            if pull > 0.1:
                self._pull[trend.items] = pull
                going_on.append(trend)
        self._trends = going_on

    def _shift_pairs(self, count: int) -> None:
        chances = self._popularity / self._popularity.sum()
        for row in self.random.choice(len(chances), count, replace=False, p=chances):
            partner = self._draw_partner(row)
            while partner in self._partners[row]:
                partner = self._draw_partner(row)
            self._partners[row, 0] = partner

    def _draw_partners(self, row: int) -> list[int]:
        partners: list[int] = []
        while len(partners) < len(self.behaviour.partner_weights):
            # the last partner is a similar item, those before it go with the item
            similar = len(partners) == len(self.behaviour.partner_weights) - 1
            partner = self._draw_partner(row, [int(self._category[row])] if similar else None)
            if partner not in partners:
                partners.append(partner)
        return partners

    def _draw_partner(self, row: int, categories: list[int] | None = None) -> int:
        categories = categories or self._complements[self._category[row]]
        members = self._members[categories[int(self.random.integers(len(categories)))]]
        weights = self._popularity[members] * np.where(self._style[members] == self._style[row], 4.0, 1.0)
        return int(members[self._draw(weights * (members != row))])

    def _draw(self, weights: np.ndarray) -> int:
        cumulative = weights.cumsum()
        return int(cumulative.searchsorted(self.random.random() * cumulative[-1], side="right"))
