"""How the ranker is fitted: what is kept back, that nothing of it leaks, and that what matters is learned."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from lib.data.histories import Histories
from lib.data.holdout import LEAVE_ONE_OUT, NONE, TEMPORAL
from lib.model import buckets
from lib.model.buckets import Figures, Moments, figures_of, figures_of_all, kept_times, step_of
from lib.model.encoder import BehaviourEncoder, BehaviourEncoderConfig
from lib.model.item_counts import NEVER
from lib.ranking import fit
from lib.ranking.features import FEATURES
from lib.ranking.fit import HeldBack, Whole, count_all, fit_ranker, likes, neighbours_for, order_of
from lib.ranking.stage import stage_of
from tests.helpers.tiny import NOW, SECOND, random_histories, tiny_config, tiny_encoder

ITEMS = 40
CLICK = 2


def counting_encoder(items: int = ITEMS) -> BehaviourEncoder:
    encoder = tiny_encoder(items)
    encoder.add_ranker(16, len(FEATURES))
    return encoder


def histories_of(rows: np.ndarray, kinds: np.ndarray | None = None) -> Histories:
    """Return (users, events) rows as histories; the users act in turns, a second apart."""
    users, events = rows.shape
    times = NOW + SECOND * (np.arange(events)[None, :] * users + np.arange(users)[:, None])
    return Histories(
        [f"u{user}" for user in range(users)],
        np.arange(0, users * events + 1, events, dtype=np.int64),
        rows.ravel().astype(np.int32),
        (np.full(rows.size, CLICK) if kinds is None else kinds.ravel()).astype(np.int8),
        np.full(rows.size, np.nan, dtype=np.float32),
        times.ravel(),
    )


def figures(*parts: Histories) -> Figures:
    return figures_of_all([figures_of(number, part) for number, part in enumerate(parts)])


def held_back(histories: Histories, config: BehaviourEncoderConfig, holdout: str, seed: int) -> HeldBack:
    return HeldBack(Whole(histories), figures(histories), config, holdout, seed)


class Buckets:
    """Histories in parts, of every third user each."""

    def __init__(self, histories: Histories):
        users = np.arange(len(histories))
        self.buckets = [histories.take(users[users % 3 == number]) for number in range(3)]
        step = step_of(len(histories.rows))
        self.moments = Moments.of([kept_times(part, step) for part in self.buckets], step)

    def parts(self) -> Iterator[Histories]:
        return iter(self.buckets)

    def order(self, histories: Histories) -> np.ndarray:
        return self.moments.places(histories.timestamps)


# ---------------------------------------------------------------------------------------------------------------------
# What is kept back


def test_for_leave_one_out_the_newest_event_of_each_user_with_three_is_kept_back():
    histories = random_histories(30, ITEMS, np.random.default_rng(0), longest=5)
    histories.kinds[:] = CLICK
    held = held_back(histories, tiny_config(ITEMS), LEAVE_ONE_OUT, seed=0)(histories)
    newest = {
        int(stop) - 1 for stop, length in zip(histories.offsets[1:], histories.lengths, strict=True) if length > 2
    }
    assert set(np.flatnonzero(held)) == newest
    assert 0 < len(newest) < 30


@pytest.mark.parametrize("holdout", [TEMPORAL, NONE])
def test_for_a_stream_the_newest_part_of_it_is_kept_back(holdout):
    histories = histories_of(np.tile(np.arange(1, 11), (20, 1)))
    held = held_back(histories, tiny_config(ITEMS), holdout, seed=0)(histories)
    assert sorted(order_of(histories)[held]) == list(range(171, 201))  # 15% of 200
    assert histories.timestamps[held].min() > histories.timestamps[~held].max()


@pytest.mark.parametrize("holdout", [LEAVE_ONE_OUT, TEMPORAL, NONE])
def test_dislikes_are_never_kept_back_and_of_many_events_some_are_drawn(holdout, monkeypatch):
    kinds = np.full((40, 10), CLICK)
    kinds[::2, -1] = tiny_config().kind_codes["dislike"]
    histories = histories_of(np.tile(np.arange(1, 11), (40, 1)), kinds)
    config = tiny_config(ITEMS)
    chosen = held_back(histories, config, holdout, seed=0)
    every = chosen(histories)
    assert every.any()
    assert (likes(histories, config)[every] == 1).all()
    assert every.sum() == pytest.approx(chosen.expected, rel=0.5)
    monkeypatch.setattr(fit, "MOST_EVENTS", 7)
    some = chosen(histories)
    assert 1 <= some.sum() <= 16
    assert not (some & ~every).any()
    assert np.array_equal(some, chosen(histories))
    assert not np.array_equal(some, held_back(histories, config, holdout, seed=1)(histories))


@pytest.mark.parametrize("holdout", [LEAVE_ONE_OUT, TEMPORAL])
def test_of_many_events_about_as_many_are_drawn_as_are_wanted(holdout):
    users = 20_000
    histories = histories_of(np.tile(np.arange(1, 11), (users, 1)))
    held = held_back(histories, tiny_config(ITEMS), holdout, seed=0)(histories)
    assert held.sum() == pytest.approx(fit.MOST_EVENTS, rel=0.05)
    begin = users * 10 - users if holdout == LEAVE_ONE_OUT else users * 10 * (1 - fit.NEWEST_SHARE)
    assert order_of(histories)[held].mean() == pytest.approx((begin + users * 10) / 2, rel=0.005)


def test_of_a_long_stream_the_newest_are_a_bounded_number(monkeypatch):
    histories = histories_of(np.tile(np.arange(1, 11), (200, 1)))
    monkeypatch.setattr(fit, "MOST_NEWEST", 50)
    held = held_back(histories, tiny_config(ITEMS), NONE, seed=0)(histories)
    assert sorted(order_of(histories)[held]) == list(range(1951, 2001))


# ---------------------------------------------------------------------------------------------------------------------
# In parts


@pytest.mark.parametrize("holdout", [LEAVE_ONE_OUT, NONE])
def test_in_parts_the_same_is_kept_back_and_counted_as_of_the_whole(holdout):
    histories = histories_of(walks(150, 8, seed=0))
    results = []
    for data in (Whole(histories), Buckets(histories)):
        encoder = tiny_encoder(ITEMS)
        encoder.add_ranker(ITEMS, len(FEATURES))  # no list is ever full
        held = HeldBack(data, figures(*data.parts()), encoder.config, holdout, seed=0)
        masks = {
            (user, int(moment))
            for part in data.parts()
            for user, moment in zip(
                np.array(part.user_ids)[part.owners(np.flatnonzero(held(part)))],
                part.timestamps[held(part)],
                strict=True,
            )
        }
        examples = fit_ranker(encoder, data, held, holdout, seed=0)
        after_fit = [dense(encoder, kind) for kind in ("next", "together")]
        count_all(encoder, data)
        results.append((masks, examples, after_fit, [dense(encoder, kind) for kind in ("next", "together")], encoder))
    whole, parts = results
    assert whole[0] == parts[0]
    assert whole[1] == pytest.approx(parts[1], rel=0.03)  # other people are seen without their history
    for one, other in zip([*whole[2], *whole[3]], [*parts[2], *parts[3]], strict=True):
        assert np.allclose(one, other, rtol=1e-5)
    for name, values in whole[4].counts.arrays().items():
        if name.startswith(("events", "followed", "trends", "counted_at", "first_at", "clock")):
            assert np.allclose(values, parts[4].counts.arrays()[name], rtol=1e-4), name
    assert torch.isfinite(parts[4].ranker.weights).all()


def test_where_an_event_stands_is_known_about_however_many_there_are(monkeypatch):
    times = np.random.default_rng(0).permutation(100_000)
    histories = histories_of(np.ones((1000, 100), dtype=np.int64))
    histories.timestamps[:] = times
    for most, error in ((1_000_000, 0), (1000, 300)):
        monkeypatch.setattr(buckets, "MOST_MOMENTS", most)
        assert np.abs(Buckets(histories).order(histories) - (times + 1)).max() <= error


# ---------------------------------------------------------------------------------------------------------------------
# No leak


@pytest.mark.parametrize("holdout", [LEAVE_ONE_OUT, NONE])
def test_no_feature_of_a_candidate_knows_what_was_taken(holdout):
    rows = np.random.default_rng(1).integers(1, ITEMS + 1, (60, 8))
    rows[:, -1] = 1 + (rows[:, -1] % (ITEMS // 2))
    first = histories_of(rows)
    held = held_back(first, counting_encoder().config, holdout, seed=0)(first)
    if holdout == NONE:  # of a stream, what its newest 256 events look like may be known to no one of them
        held &= order_of(first) > len(first.rows) - 50
    changed = first.rows.copy()
    changed[held] = 1 + (changed[held] + 7) % ITEMS  # other items were taken
    second = Histories(first.user_ids, first.offsets, changed, first.kinds, first.values, first.timestamps)
    asked = [
        list(fit._examples(counting_encoder(), Whole(own), lambda _: held, holdout, FixedChance()))
        for own in (first, second)
    ]
    for one, other in zip(*asked, strict=True):
        both = one.found & other.found
        assert both.sum() > 10
        kept = [each.features[torch.from_numpy(both[each.found])] for each in (one, other)]
        assert torch.equal(kept[0], kept[1])


class FixedChance(np.random.Generator):
    """A generator by which nobody's history is forgotten."""

    def __init__(self):
        super().__init__(np.random.PCG64(0))

    def random(self, size: int) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        return np.ones(size)


def test_counts_do_not_know_what_is_kept_back_for_leave_one_out():
    rows = np.tile(np.arange(1, 6), (30, 1))
    rows[:, -1] = np.arange(6, 36)  # taken last, by one each and never before
    histories, encoder = histories_of(rows), counting_encoder()
    held = held_back(histories, encoder.config, LEAVE_ONE_OUT, seed=0)
    fit_ranker(encoder, Whole(histories), held, LEAVE_ONE_OUT, seed=0)
    assert encoder.counts is not None
    own = encoder.counts.arrays()
    assert not own["events"][6:36].any()
    assert (own["first_at"][6:36] == NEVER).all()
    assert own["next_rows"].max() == own["together_rows"].max() == 4


@pytest.mark.parametrize(
    ("items", "events_of_each", "neighbours"),
    [
        (50, 16, 128),
        (50, 17, 256),  # many events, many neighbours
        (40_000, 30, 64),  # 128 would take 80 MB
        (4_000_000, 30, 32),  # never fewer
    ],
)
def test_neighbours_by_the_events_of_an_item_within_a_bound_of_memory(items, events_of_each, neighbours):
    assert neighbours_for(items * events_of_each, items) == neighbours


# ---------------------------------------------------------------------------------------------------------------------
# What is learned


def walks(users: int, events: int, seed: int) -> np.ndarray:
    """Return rows of people who each time go on to one of two items that come after the one before."""
    generator = np.random.default_rng(seed)
    rows = np.empty((users, events), dtype=np.int64)
    rows[:, 0] = generator.integers(0, ITEMS, users)
    for place in range(1, events):
        rows[:, place] = (rows[:, place - 1] * 7 + 3 + generator.integers(0, 2, users)) % ITEMS
    return rows + 1


def ndcg(encoder: BehaviourEncoder, histories: Histories, targets: np.ndarray) -> float:
    """Return the mean NDCG@10 of what comes after histories."""
    stage = stage_of(encoder)
    assert stage is not None
    queries = fit.queries_of(encoder, histories)
    people, again = fit.people_of(histories, histories), np.ones(len(histories), dtype=bool)
    _, rows = stage.rank(stage.candidates(people, queries, 10, repeats=again), len(people), 10)
    places = (rows == targets[:, None]).nonzero()[1]
    return float((1 / np.log2(places + 2)).sum() / len(targets))


@pytest.mark.parametrize("holdout", [LEAVE_ONE_OUT, NONE])
def test_it_is_learned_that_what_follows_matters(holdout):
    histories, encoder = histories_of(walks(150, 8, seed=0)), counting_encoder()
    encoder.config.repeats = True
    held = held_back(histories, encoder.config, holdout, seed=0)
    test, targets = walks(200, 5, seed=1), walks(200, 5, seed=1)[:, -1]
    asked = histories_of(test[:, :-1])
    count_all(encoder, Whole(histories))
    before = ndcg(encoder, asked, targets)
    assert encoder.counts is not None
    encoder.counts.clear()
    assert fit_ranker(encoder, Whole(histories), held, holdout, seed=0) > 100
    count_all(encoder, Whole(histories))
    after = ndcg(encoder, asked, targets)
    assert before < 0.3
    assert after > 0.7


@pytest.mark.parametrize("holdout", [LEAVE_ONE_OUT, NONE])
def test_the_same_seed_gives_the_same_ranker(holdout):
    fitted = []
    for seed in (0, 0, 1):
        histories, encoder = histories_of(walks(40, 8, seed=0)), counting_encoder()
        held = held_back(histories, encoder.config, holdout, seed=0)
        fit_ranker(encoder, Whole(histories), held, holdout, seed)
        assert encoder.ranker is not None
        assert not any(tensor.any() for tensor in (encoder.ranker.first, encoder.ranker.second, encoder.ranker.steps))
        assert torch.isfinite(encoder.ranker.weights).all()
        fitted.append(encoder.ranker.weights)
    assert torch.equal(fitted[0], fitted[1])
    assert not torch.equal(fitted[0], fitted[2])


def test_counting_all_is_counting_event_by_event_anew():
    histories = random_histories(20, ITEMS, np.random.default_rng(4))
    whole, single = tiny_encoder(ITEMS), tiny_encoder(ITEMS)
    for encoder in (whole, single):
        encoder.add_ranker(ITEMS, len(FEATURES))  # no list is ever full
    count_all(whole, Whole(histories))
    count_all(whole, Whole(histories))  # what was counted before is forgotten
    assert whole.counts is not None
    assert single.counts is not None
    weights, times = likes(histories, single.config), order_of(histories)
    liked, places = histories.select(weights > 0), np.cumsum(weights > 0) - 1
    for event in np.argsort(times):
        if weights[event] > 0:
            single.counts.count_events(liked, places[[event]], weights[[event]], times[[event]])
    for kind in ("next", "together"):
        assert np.allclose(dense(whole, kind), dense(single, kind), rtol=1e-5)
    one, other = whole.counts.arrays(), single.counts.arrays()
    for name in ("events", "followed", "trends", "counted_at", "first_at", "clock"):
        assert np.allclose(one[name], other[name], rtol=1e-4), name


def dense(encoder: BehaviourEncoder, kind: str) -> np.ndarray:
    """Return (R, R) the counts of all pairs."""
    assert encoder.counts is not None
    own = encoder.counts.arrays()
    table = np.zeros((ITEMS + 1, ITEMS + 1))
    np.add.at(table, (np.arange(ITEMS + 1)[:, None], own[f"{kind}_rows"]), own[f"{kind}_counts"])
    return table
