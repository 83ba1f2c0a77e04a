"""Counts of items by hand: what an event adds to which rows, what decays, and what a full list gives up."""

import numpy as np
import pytest
import torch

from lib.data.histories import Histories
from lib.model.item_counts import HALF_LIVES, NEVER, WINDOW, ItemCounts, newest_distinct, people_of
from lib.model.rows import lengthened
from tests.helpers.tiny import NOW, SECOND, random_histories, trends_now

ROWS = 12


def histories_of(*users: list[int], kinds: list[list[int]] | None = None) -> Histories:
    """Return histories of these rows, a second apart, one user's events after another's."""
    lengths = [len(rows) for rows in users]
    count = sum(lengths)
    codes = np.concatenate([np.array(own, dtype=np.int8) for own in kinds]) if kinds else np.full(count, 2, np.int8)
    return Histories(
        [f"u{number}" for number in range(len(users))],
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.array([row for rows in users for row in rows], dtype=np.int32),
        codes,
        np.full(count, np.nan, dtype=np.float32),
        NOW + np.arange(count) * SECOND,
    )


def context(*rows: int) -> np.ndarray:
    """(1, WINDOW) rows before an event, the newest first."""
    return np.array([[*rows, *[0] * (WINDOW - len(rows))]])


def count(counts: ItemCounts, before: tuple[int, ...], item: int, weight: float = 1.0, time: int = 1) -> None:
    """Count one event."""
    counts.count(context(*before), np.array([item]), np.array([weight]), np.array([time]))


def listed(counts: ItemCounts, name: str, row: int) -> dict[int, float]:
    """Return the neighbours of a row that have a count."""
    own = counts.arrays()
    pairs = zip(own[f"{name}_rows"][row].tolist(), own[f"{name}_counts"][row].tolist(), strict=True)
    return {other: number for other, number in pairs if number > 0}


def same(one: ItemCounts, other: ItemCounts) -> bool:
    """Equal to the byte."""
    pairs = zip(one.arrays().items(), other.arrays().items(), strict=True)
    return all(first[0] == second[0] and first[1].tobytes() == second[1].tobytes() for first, second in pairs)


# ---------------------------------------------------------------------------------------------------------------------
# What an event adds


def test_an_event_adds_to_what_follows_and_to_what_goes_together():
    counts = ItemCounts(ROWS, 4)
    count(counts, (5, 3), 7, time=9)  # 5 is the newest before it
    assert listed(counts, "next", 5) == {7: 1.0}
    assert listed(counts, "next", 3) == {7: 0.5}
    assert listed(counts, "next", 7) == {}
    assert listed(counts, "together", 7) == {5: 1.0, 3: 1.0}
    assert listed(counts, "together", 5) == listed(counts, "together", 3) == {7: 1.0}
    own = counts.arrays()
    assert own["events"].tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert own["followed"].nonzero()[0].tolist() == [3, 5]
    assert own["followed"][[3, 5]].tolist() == [0.5, 1.0]
    assert own["first_at"].tolist() == [9 if row == 7 else NEVER for row in range(ROWS)]
    assert own["counted_at"][7] == 9
    assert own["clock"].tolist() == [9]


def test_an_event_weighs_what_it_is_given():
    counts = ItemCounts(ROWS, 4)
    count(counts, (5, 3), 7, weight=0.25)
    assert listed(counts, "next", 5) == {7: 0.25}
    assert listed(counts, "next", 3) == {7: 0.125}
    assert listed(counts, "together", 7) == {5: 0.25, 3: 0.25}
    assert counts.events[7] == 0.25


@pytest.mark.parametrize(("item", "weight"), [(7, 0.0), (7, -1.0), (0, 1.0)])
def test_what_weighs_nothing_or_is_no_item_is_not_counted(item, weight):
    counts = ItemCounts(ROWS, 4)
    count(counts, (5,), item, weight)
    assert same(counts, ItemCounts(ROWS, 4))


def test_an_item_follows_itself_and_does_not_go_together_with_itself():
    counts = ItemCounts(ROWS, 4)
    count(counts, (7, 5), 7)
    assert listed(counts, "next", 7) == {7: 1.0}
    assert listed(counts, "next", 5) == {7: 0.5}
    assert listed(counts, "together", 7) == {5: 1.0}
    assert listed(counts, "together", 5) == {7: 1.0}


def test_histories_are_counted_event_by_event():
    counts = ItemCounts(ROWS, 4)
    histories = histories_of([1, 2, 1, 3], [4, 3])
    counts.count_histories(histories, np.ones(6), np.arange(1, 7))
    assert listed(counts, "next", 1) == {2: 1.0, 1: 0.5, 3: 1.0}  # 1 is the newest before 3, though it came before 2
    assert listed(counts, "next", 2) == {1: 1.0, 3: 0.5}
    assert listed(counts, "next", 4) == {3: 1.0}
    assert listed(counts, "together", 3) == {1: 1.0, 2: 1.0, 4: 1.0}
    assert listed(counts, "together", 1) == {2: 2.0, 3: 1.0}
    assert counts.events.tolist()[:5] == [0, 2, 1, 2, 1]
    assert counts.first_at.tolist()[:5] == [NEVER, 1, 2, 4, 5]
    assert int(counts.clock) == 6


def test_what_has_no_weight_is_no_context_of_others_either():
    counts = ItemCounts(ROWS, 4)
    counts.count_histories(histories_of([1, 2, 3]), np.array([1.0, 0.0, 1.0]), np.arange(1, 4))
    assert listed(counts, "next", 1) == {3: 1.0}
    assert listed(counts, "next", 2) == listed(counts, "together", 2) == {}


def test_the_changed_rows_are_those_that_counting_names():
    generator = np.random.default_rng(0)
    histories = random_histories(6, ROWS - 1, generator)
    counts = ItemCounts(ROWS + 20, 4)
    events = np.arange(3, 9)
    before = {name: values.copy() for name, values in counts.arrays().items()}
    weights = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 0.5])
    rows = counts.count_events(histories, events, weights, events)
    changed = np.zeros(ROWS + 20, dtype=bool)
    for name, values in counts.arrays().items():
        if name != "clock":
            changed |= (values != before[name]).reshape(len(values), -1).any(axis=1)
    assert rows.tolist() == np.flatnonzero(changed).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Trends


def test_a_trend_halves_with_each_half_life():
    counts = ItemCounts(ROWS, 4)
    count(counts, (), 7, time=1)
    count(counts, (), 8, time=101)
    trends = trends_now(counts, np.array([7, 8, 9]))
    assert np.allclose(trends[0], np.exp2(-100 / HALF_LIVES))
    assert trends[0, 0] == 0.5
    assert np.allclose(trends[1], 1)
    assert not trends[2].any()
    count(counts, (), 7, time=201)  # 1 of now, and a quarter of the first
    assert np.allclose(trends_now(counts, np.array([7]))[0, 0], 1.25)


def test_trends_do_not_depend_on_the_order_or_on_the_batches():
    generator = np.random.default_rng(0)
    items, times = generator.integers(1, ROWS, 400), np.arange(1, 401)
    weights = generator.uniform(0.1, 2, 400)
    nothing = np.zeros((400, WINDOW), dtype=np.int64)
    whole, single, mixed = ItemCounts(ROWS, 4), ItemCounts(ROWS, 4), ItemCounts(ROWS, 4)
    whole.count(nothing, items, weights, times)
    for place in range(400):
        single.count(nothing[:1], items[[place]], weights[[place]], times[[place]])
    for part in np.array_split(generator.permutation(400), 7):
        mixed.count(nothing[part], items[part], weights[part], times[part])
    expected = np.zeros((ROWS, len(HALF_LIVES)))
    np.add.at(expected, items, weights[:, None] * np.exp2((times[:, None] - 400) / HALF_LIVES))
    for counts in (whole, single, mixed):
        assert np.allclose(trends_now(counts, np.arange(ROWS)), expected, rtol=1e-4)
        assert np.array_equal(counts.arrays()["first_at"], whole.arrays()["first_at"])
        assert int(counts.clock) == 400


# ---------------------------------------------------------------------------------------------------------------------
# Full lists


def test_a_newcomer_takes_the_place_and_the_count_of_the_smallest_entry_by_chance():
    counts, lists = ItemCounts(1_010, 2), range(10, 1_010)
    for item, weight in ((2, 5.0), (3, 2.0), (4, 1.0)):
        before = np.zeros((len(lists), WINDOW), dtype=np.int64)
        before[:, 0] = lists
        counts.count(before, np.full(len(lists), item), np.full(len(lists), weight), np.full(len(lists), item))
    found = [listed(counts, "next", row) for row in lists]
    admitted = [own == {2: 5.0, 4: 3.0} for own in found]
    assert all(own == {2: 5.0, 3: 2.0} for own, came in zip(found, admitted, strict=True) if not came)
    assert np.mean(admitted) == pytest.approx(1 / 3, abs=0.05)
    assert (counts.followed[10:] == 8.0).all()  # of all that followed, listed or not


def test_what_comes_again_gets_into_a_list_full_of_what_came_once():
    counts = ItemCounts(3_001, 4)
    for time in range(1, 1_000):
        count(counts, (1,), 2 if time > 100 and time % 5 == 0 else 2_000 + time, time=time)
    for name in ("next", "together"):
        number = listed(counts, name, 1)[2]
        assert number == max(listed(counts, name, 1).values())
        assert number == pytest.approx(180, rel=0.15)


def test_lists_hold_no_more_than_was_counted_and_each_item_once():
    generator = np.random.default_rng(1)
    shares = 1 / np.arange(1, 60) ** 1.3
    drawn = generator.choice(np.arange(1, 60), 2400, p=shares / shares.sum())
    histories = histories_of(*drawn.reshape(60, 40).tolist())
    exact, bounded = ItemCounts(60, 60), ItemCounts(60, 8)
    for counts in (exact, bounded):
        counts.count_histories(histories, np.ones(2400), np.arange(1, 2401))
    for name in ("next", "together"):
        held, true = bounded.arrays()[f"{name}_counts"], exact.arrays()[f"{name}_counts"]
        assert (held >= 0).all()
        assert (held.sum(axis=1) <= true.sum(axis=1) * (1 + 1e-5)).all()
        assert {1, 2} <= set(listed(bounded, name, 3))
    for row in range(1, 60):
        listed_rows = bounded.arrays()["next_rows"][row]
        taken = listed_rows[listed_rows > 0]
        assert len(np.unique(taken)) == len(taken)


def test_the_strongest_of_a_list_stand_first():
    counts = ItemCounts(ROWS, 8)
    for time, item in enumerate([5, 2, 3, 3, 2, 3, 4, 4, 4, 4], start=1):
        count(counts, (1,), item, time=time)
    assert counts.next_rows[1].tolist() == [4, 3, 2, 5, 0, 0, 0, 0]
    count(counts, (1,), 5, weight=10.0, time=11)
    for time in range(12, 80):
        count(counts, (), 4, time=time)  # popular without 1: what goes together is by its cosine
    count(counts, (1,), 6, time=80)
    assert counts.next_rows[1].tolist() == [5, 4, 3, 2, 6, 0, 0, 0]
    assert counts.together_rows[1].tolist() == [5, 3, 2, 6, 4, 0, 0, 0]


def test_sorting_gives_the_same_lists_whatever_their_order_was():
    counts, shuffled, generator = ItemCounts(ROWS, 6), ItemCounts(ROWS, 6), np.random.default_rng(0)
    for time, (before, item) in enumerate(generator.integers(1, ROWS, (80, 2)).tolist()):
        count(counts, (before,), item, time=time)
    shuffled.load_state_dict(counts.state_dict())
    for own in (shuffled.next_rows, shuffled.next_counts), (shuffled.together_rows, shuffled.together_counts):
        order = torch.from_numpy(generator.permuted(np.tile(np.arange(6), (ROWS, 1)), axis=1))
        for table in own:
            table.copy_(table.gather(1, order))
    assert not same(counts, shuffled)
    for each in (counts, shuffled):
        each.sort()
    assert same(counts, shuffled)
    own = counts.arrays()
    assert (np.diff(own["next_counts"]) <= 0).all()
    assert (np.diff(own["together_counts"] / np.sqrt(own["events"][own["together_rows"]] + 1)) <= 0).all()
    assert (np.diff(own["next_counts"]) == 0)[own["next_counts"][:, 1:] > 0].any(), (
        "and what is equal has an order, too"
    )


def test_the_same_events_give_the_same_bytes():
    histories = random_histories(40, ROWS - 1, np.random.default_rng(2))
    events = len(histories.rows)
    one, other = ItemCounts(ROWS, 4), ItemCounts(ROWS, 4)
    for counts in (one, other):
        counts.count_histories(histories, np.ones(events), np.arange(1, events + 1))
    assert same(one, other)
    assert one.next_rows.any()


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def counted() -> ItemCounts:
    counts = ItemCounts(ROWS, 4)
    histories = random_histories(10, ROWS - 1, np.random.default_rng(3))
    counts.count_histories(histories, np.ones(len(histories.rows)), np.arange(1, len(histories.rows) + 1))
    return counts


def test_growth_keeps_the_rows_and_adds_uncounted_ones():
    counts, before = counted(), counted().arrays()
    counts.replace_tables(lambda table, fill: lengthened(table, ROWS + 3, fill))
    empty = ItemCounts(3, 4).arrays()
    for name, values in counts.arrays().items():
        if name == "clock":
            assert values == before[name]
            continue
        assert np.array_equal(values[:ROWS], before[name]), name
        assert np.array_equal(values[ROWS:], empty[name]), name
    count(counts, (1,), ROWS + 2, time=1000)
    assert listed(counts, "together", ROWS + 2) == {1: 1.0}


def test_clearing_forgets_everything():
    counts = counted()
    counts.clear()
    assert same(counts, ItemCounts(ROWS, 4))


def test_clearing_rows_leaves_the_others_and_the_clock():
    counts, before, empty = counted(), counted().arrays(), ItemCounts(ROWS, 4).arrays()
    counts.clear(slice(8, 10))
    for name, values in counts.arrays().items():
        if name == "clock":
            assert values == before[name]
            continue
        assert np.array_equal(values[8:10], empty[name][8:10]), name
        assert np.array_equal(values[:8], before[name][:8]), name
        assert np.array_equal(values[10:], before[name][10:]), name


def test_counts_stay_on_the_cpu_and_keep_their_types():
    counts = counted()
    before = {name: (tensor.device, tensor.dtype) for name, tensor in counts.named_buffers()}
    torch.nn.Sequential(counts).to("meta", torch.float16)
    assert {name: (tensor.device, tensor.dtype) for name, tensor in counts.named_buffers()} == before


# ---------------------------------------------------------------------------------------------------------------------
# Contexts and people


def test_the_newest_distinct_rows_are_of_the_same_user_and_each_once():
    rows = np.array([9, 8, 1, 2, 1, 3, 3, 0, 2])
    found = newest_distinct(rows, np.array([2, 2, 2, 0]), np.array([9, 6, 2, 1]))
    assert found.shape == (4, WINDOW)
    assert found[0].tolist() == context(2, 3, 1)[0].tolist()  # row 0 is no item
    assert found[1].tolist() == context(3, 1, 2)[0].tolist()
    assert found[2].tolist() == context()[0].tolist()  # 8 and 9 are another's
    assert found[3].tolist() == context(9)[0].tolist()


def test_the_newest_distinct_rows_are_a_window_of_them():
    rows = np.arange(1, 3 * WINDOW + 1)
    stop = np.array([len(rows)])
    assert newest_distinct(rows, np.array([0]), stop)[0].tolist() == rows[-WINDOW:][::-1].tolist()
    repeated = np.repeat(rows, 4)  # among the newest 2 W events there are only W / 2
    found = newest_distinct(repeated, np.array([0]), np.array([len(repeated)]))[0]
    assert found[: WINDOW // 2].tolist() == rows[-WINDOW // 2 :][::-1].tolist()
    assert not found[WINDOW // 2 :].any()


def test_of_no_events_there_are_no_newest():
    nothing = np.zeros(0, dtype=np.int32)
    assert not newest_distinct(nothing, np.zeros(2, dtype=np.int64), np.zeros(2, dtype=np.int64)).any()


def test_a_person_is_what_they_saw_and_what_they_liked():
    histories = histories_of([4, 6, 4, 5], [], [3], kinds=[[2, 3, 2, 8], [], [8]])
    liked = histories.select(np.array([True, True, True, False, False]))
    first, second, third = people_of(histories, liked)
    assert first.recent.tolist() == context(4, 6)[0].tolist()
    assert first.seen.tolist() == [4, 5, 6]
    assert first.times.tolist() == [2, 1, 1]
    assert first.ago.tolist() == [1, 0, 2]
    assert (first.length, first.kind) == (3, 2)
    assert not second.recent.any()
    assert (len(second.seen), second.length, second.kind) == (0, 0, 0)
    assert not third.recent.any()
    assert third.seen.tolist() == [3]
    assert (third.length, third.kind) == (0, 0)
