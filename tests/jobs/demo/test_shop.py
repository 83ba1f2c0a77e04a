from collections import Counter, defaultdict, deque

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.demo.behaviour import Behaviour
from jobs.demo.shop import Shop
from lib.data.events import EVENT_SCHEMA
from lib.errors import InputError

DAY = 86_400


@pytest.fixture(scope="module")
def history():
    return Shop(seed=1).history


@pytest.fixture
def small():
    return Shop(seed=3, visitors=200, items=200)


def in_time_order(table):
    rows = zip(*(table[name].to_pylist() for name in ("timestamp", "user_id", "item_id", "event")), strict=True)
    return [row[1:] for row in sorted(rows)]


def take_steps(shop, count):
    steps = []
    for _ in range(count):
        shop.advance(shop.seconds_per_event)
        visitor = shop.next_visitor()
        steps.append((visitor, *shop.next_choice(visitor)))
    return steps


class CooccurrenceCounts:
    """What followed what, and what is popular: the simplest recommender that uses the item before."""

    def __init__(self):
        self.followed = defaultdict(Counter)
        self.popular = Counter()

    def learn(self, before, item):
        self.popular[item] += 1
        if before is not None and before != item:
            self.followed[before][item] += 1

    def top(self, before, seen, k=10):
        followers = [item for item, _ in self.followed[before].most_common() if item not in seen]
        if len(followers) >= k:
            return followers[:k]
        return list(dict.fromkeys(followers + self.top_popular(seen, k)))[:k]

    def top_popular(self, seen, k=10):
        return [item for item, _ in self.popular.most_common(k + len(seen)) if item not in seen][:k]


def test_the_same_seed_gives_the_same_shop_and_another_seed_another():
    first, same, other = (Shop(seed=seed, visitors=100, items=100) for seed in (5, 5, 6))
    assert first.history.equals(same.history)
    assert first.items.equals(same.items)
    assert take_steps(first, 300) == take_steps(same, 300)
    shown = first.item_ids[:10]
    assert [first.react(v, shown) for v in first.visitor_ids] == [same.react(v, shown) for v in same.visitor_ids]
    assert not first.history.equals(other.history)


def test_the_dataset_has_the_schema_with_users_contiguous_and_in_time_order(small, tmp_path):
    small.write_dataset(tmp_path / "shop")
    events, items = (pq.read_table(tmp_path / "shop" / f"{name}.parquet") for name in ("events", "items"))
    assert events.schema.equals(EVENT_SCHEMA)
    assert events.num_rows == 200 * 30
    assert set(events["event"].to_pylist()) == {"view", "click", "cart", "purchase", "dislike"}
    assert set(events["item_id"].to_pylist()) <= set(items["item_id"].to_pylist())
    rows = list(zip(events["user_id"].to_pylist(), events["timestamp"].to_pylist(), strict=True))
    assert rows == sorted(rows)
    assert len(rows) == len(set(rows))
    days = (max(time for _, time in rows) - min(time for _, time in rows)) / 1000 / DAY
    assert 27 < days < 33
    assert items.column_names == ["item_id", "title", "category", "price"]


def test_items_have_titles_of_their_own_and_prices_of_their_category():
    items = Shop(visitors=100, items=1500).items  # more than styles times products: series
    assert len(set(items["title"].to_pylist())) == 1500
    assert len(set(items["category"].to_pylist())) == 20
    prices = defaultdict(list)
    for row in items.to_pylist():
        prices[row["category"]].append(row["price"])
    assert np.median(prices["Desks"]) > 3 * np.median(prices["Tea"])
    assert min(items["price"].to_pylist()) > 0


def test_the_item_before_tells_far_more_about_the_next_than_popularity_does(history):
    events = in_time_order(history)
    begin = len(events) * 4 // 5
    counts, before, seen = CooccurrenceCounts(), {}, defaultdict(set)
    trials = hits = popular_hits = 0
    for place, (visitor, item, kind) in enumerate(events):
        if place < begin:
            counts.learn(before.get(visitor), item)
        elif item not in seen[visitor] and kind != "dislike":
            trials += 1
            hits += item in counts.top(before.get(visitor), seen[visitor])
            popular_hits += item in counts.top_popular(seen[visitor])
        before[visitor] = item
        seen[visitor].add(item)
    assert trials > 8000
    assert hits / trials > 0.35
    assert hits > 3 * popular_hits


def test_counts_that_go_on_learning_live_beat_the_same_counts_frozen():
    shop = Shop(seed=2, visitors=1000)
    live, frozen, before, seen = CooccurrenceCounts(), CooccurrenceCounts(), {}, defaultdict(set)
    for visitor, item, _ in in_time_order(shop.history):
        live.learn(before.get(visitor), item)
        frozen.learn(before.get(visitor), item)
        before[visitor] = item
        seen[visitor].add(item)
    recent = deque(maxlen=1000)
    trials = live_hits = frozen_hits = 0
    for visitor, item, kind in take_steps(shop, 4000):
        if item not in seen[visitor] and kind != "dislike":
            trials += 1
            trending = [other for other, _ in Counter(recent).most_common(40) if other not in seen[visitor]][:4]
            live_hits += item in {*live.top(before.get(visitor), seen[visitor], 6), *trending}
            frozen_hits += item in frozen.top(before.get(visitor), seen[visitor])
        live.learn(before.get(visitor), item)
        recent.append(item)
        before[visitor] = item
        seen[visitor].add(item)
    assert (live_hits - frozen_hits) / trials > 0.02


def test_items_on_trend_surge_and_then_fade():
    shop = Shop(seed=4, visitors=500)
    shop.advance(DAY / 2)
    surging = set(shop.trending[: shop.behaviour.trend_items])
    usual = Counter(shop.history["item_id"].to_pylist())
    share_before = sum(usual[item] for item in surging) / shop.history.num_rows
    choices = [item for _, item, _ in take_steps(shop, 1500)]
    assert sum(item in surging for item in choices) / len(choices) > 5 * share_before
    shop.advance(5 * DAY)
    assert surging.isdisjoint(shop.trending)
    assert shop.trending  # others have begun


def test_best_partners_shift_faster_live_than_in_the_history():
    calm, shop = (Shop(seed=4, visitors=100, behaviour=Behaviour(live_shifts=shifts)) for shifts in (0, 30))
    for moving, changed in ((calm, 0), (shop, 30)):
        before = moving.pairs
        moving.advance(DAY / 2)
        assert (moving.pairs != before).any(axis=1).sum() == changed
        assert (moving.pairs[:, 1:] == before[:, 1:]).all()
        assert (moving.pairs != np.arange(1000)[:, None]).all()  # nothing goes with itself


def test_tastes_drift_a_little_in_a_day_and_much_in_a_month(small):
    start = small.category_taste.copy()

    def likeness():
        return np.corrcoef(start.ravel(), small.category_taste.ravel())[0, 1]

    small.advance(DAY)
    assert 0.9 < likeness() < 1.0
    small.advance(30 * DAY)
    assert 0.2 < likeness() < 0.6
    assert small.category_taste.std() == pytest.approx(start.std(), rel=0.1)


def test_a_session_stays_with_its_interest(history):
    before, same, count = {}, 0, 0
    category = {item: int(item[-4:]) % 20 for item in set(history["item_id"].to_pylist())}
    for visitor, item, _ in in_time_order(history):
        if visitor in before and before[visitor] != item:
            count += 1
            same += category[before[visitor]] == category[item]
        before[visitor] = item
    assert same / count > 4 / 20  # one in 20 by chance


def test_reactions_depend_on_position_and_taste(small):
    visitors = small.visitor_ids
    loved = {visitor: int(np.argmax(small.category_taste[row])) for row, visitor in enumerate(visitors)}
    hated = {visitor: int(np.argmin(small.category_taste[row])) for row, visitor in enumerate(visitors)}
    first, last, disliked = 0, 0, 0
    for _ in range(20):
        for visitor in visitors:
            good, bad = f"item-{loved[visitor]:04d}", f"item-{hated[visitor]:04d}"
            first += bool(small.react(visitor, [good]))
            last += bool(small.react(visitor, ["unknown"] * 9 + [good]))
            disliked += bool(small.react(visitor, [bad]))
    assert first > 1.5 * last > 0
    assert first > 2 * disliked


def test_a_reaction_is_at_most_one_item_of_the_list(small):
    shown, kinds = small.item_ids[20:30], Counter()
    for visitor in small.visitor_ids * 20:
        reaction = small.react(visitor, shown)
        assert len({item for item, _ in reaction}) <= 1
        assert all(item in shown for item, _ in reaction)
        kinds[tuple(kind for _, kind in reaction)] += 1
    assert set(kinds) == {(), ("click",), ("click", "cart")}
    assert small.react(small.visitor_ids[0], []) == []
    assert all(small.react(visitor, ["not-sold-here"]) == [] for visitor in small.visitor_ids)


def test_a_busy_visitor_is_never_next_and_all_busy_is_an_error(small):
    busy = set(small.visitor_ids[:190])
    for _ in range(200):
        visitor = small.next_visitor(busy)
        assert visitor not in busy
        small.next_choice(visitor)
    with pytest.raises(InputError, match="all 200 are busy"):
        small.next_visitor(small.visitor_ids)


def test_visitors_who_have_met_much_are_followed_by_newcomers():
    shop = Shop(seed=1, visitors=100, items=200, behaviour=Behaviour(leave_after_items=20))
    before = set(shop.visitor_ids)
    take_steps(shop, 3000)
    assert len(set(shop.visitor_ids)) == 100
    assert not before >= set(shop.visitor_ids)


@pytest.mark.parametrize("size", [{"visitors": 99}, {"items": 99}])
def test_a_shop_that_is_too_small_is_an_error_that_names_the_field(size):
    with pytest.raises(InputError, match=f"{next(iter(size))}: a shop needs at least 100, got 99"):
        Shop(**size)
