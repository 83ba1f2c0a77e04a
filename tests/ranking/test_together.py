"""What is taken together with an item, by the counts of a synthetic shop's orders."""

import numpy as np
import pytest

from lib.data.catalog import Catalog
from lib.data.events import EVENT_KINDS
from lib.data.histories import Histories
from lib.errors import InputError
from lib.model.item_counts import ItemCounts
from lib.ranking.features import FEATURES
from lib.ranking.filters import ItemFilter
from lib.ranking.fit import Whole, count_all, neighbours_for, order_of
from lib.ranking.recommender import Recommender
from tests.helpers.tiny import NOW, SECOND, item_ids, tiny_encoder

ITEMS, PAIRS, CUSTOMERS = 1_500, 120, 1_200
PURCHASE = EVENT_KINDS.index("purchase") + 1


def histories_of(orders: list[list[list[int]]]) -> Histories:
    """Each customer's orders as purchases, a second between items and a day between orders."""
    rows = [[item for order in own for item in order] for own in orders]
    count = sum(map(len, rows))
    return Histories(
        [f"customer-{number}" for number in range(len(orders))],
        np.cumsum([0, *map(len, rows)]),
        np.array([item for own in rows for item in own], dtype=np.int32),
        np.full(count, PURCHASE, dtype=np.int8),
        np.full(count, np.nan, dtype=np.float32),
        NOW + np.arange(count) * SECOND,
    )


def recommender_of(orders: list[list[list[int]]], items: int = ITEMS) -> Recommender:
    histories = histories_of(orders)
    encoder = tiny_encoder(items)
    encoder.add_ranker(neighbours_for(len(histories.rows), 200), len(FEATURES))
    count_all(encoder, Whole(histories))
    return Recommender(encoder, Catalog(item_ids(items)), version=1)


def planted() -> tuple[list[list[list[int]]], dict[int, int]]:
    """Orders of customers in which the partner of a planted item is there every second time, and the pairs."""
    random = np.random.default_rng(0)
    drawn = random.permutation(np.arange(1, ITEMS + 1))[: 2 * PAIRS].tolist()
    partner = dict(zip(drawn[::2], drawn[1::2], strict=True))
    chances = 1 / np.arange(10, ITEMS + 10) ** 0.8  # some items are in every tenth order
    chances = random.permutation(chances / chances.sum())
    orders = []
    for _ in range(CUSTOMERS):
        own = []
        for _ in range(random.integers(1, 5)):
            order = random.choice(np.arange(1, ITEMS + 1), random.integers(2, 7), replace=False, p=chances).tolist()
            if random.random() < 0.5:
                order.append(int(random.choice(list(partner))))
            order += [partner[item] for item in order if item in partner and random.random() < 0.5]
            own.append(order)
        orders.append(own)
    return orders, partner


def ids(items) -> list[str]:
    return [item.item_id for item in items]


def test_partners_in_orders_are_found_together():
    orders, partner = planted()
    recommender = recommender_of(orders)

    def found(relation) -> int:
        pairs = partner.items()
        return sum(f"i{other}" in ids(recommender.similar(f"i{item}", 10, relation=relation)) for item, other in pairs)

    assert found("together") >= 0.9 * PAIRS
    assert found("similar") < 0.1 * PAIRS, "the encoder is not trained: it knows nothing of orders"


def test_full_lists_keep_partners_though_most_of_what_comes_comes_once():
    orders, partner = planted()
    histories = histories_of(orders)
    counts = ItemCounts(ITEMS + 1, neighbours=32)
    counts.count_histories(histories, np.ones(len(histories.rows)), order_of(histories))
    pairs = [*partner.items(), *zip(partner.values(), partner.keys(), strict=True)]
    assert (counts.together_counts > 0).all(dim=1).sum() > ITEMS / 3, "a third of all lists are full"
    assert sum(other in counts.together_rows[item] for item, other in pairs) > 0.93 * len(pairs)


def test_a_chance_pair_does_not_beat_a_frequent_one():
    often = [[[1, 2]]] * 30 + [[[2]]] * 30 + [[[1]]] * 30  # a cosine of 1/2
    once = [[[1, 3]]]  # of 1 / sqrt(61), and of 3 alone with 4 a cosine of 1
    recommender = recommender_of([*often, *once, [[4, 5]], [[4, 6]]], items=9)
    found = recommender.similar("i1", 10, relation="together")
    assert ids(found) == ["i2", "i3"]
    assert found[0].score == pytest.approx(30 / np.sqrt(61 * 60) * 30 / 35, rel=1e-5)
    assert recommender.similar("i4", 10, relation="together")[0].score < found[0].score


def test_only_items_that_are_there_and_pass_are_together():
    recommender = recommender_of([[[1, 2, 3, 4]]] * 4, items=9)
    assert ids(recommender.similar("i1", 10, relation="together")) == ["i2", "i3", "i4"]
    assert ids(recommender.similar("i1", 2, relation="together")) == ["i2", "i3"]
    filter = ItemFilter.of({"deny": ["i2"]})
    assert ids(recommender.similar("i1", 10, filter, "together")) == ["i3", "i4"]
    recommender.change_items({"i3": None})
    assert ids(recommender.similar("i1", 10, relation="together")) == ["i2", "i4"]
    assert recommender.similar("i9", 10, relation="together") == [], "it was never taken"
    with pytest.raises(KeyError):
        recommender.similar("i3", 10, relation="together")


def test_a_model_without_counts_says_what_to_do():
    recommender = Recommender(tiny_encoder(9), Catalog(item_ids(9)), version=1)
    with pytest.raises(InputError, match=r"^relation: .*pretrain it again"):
        recommender.similar("i1", 10, relation="together")
