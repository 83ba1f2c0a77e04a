import asyncio
import hashlib
import socket
import threading
import time
from collections import defaultdict
from contextlib import contextmanager
from itertools import pairwise

import pyarrow as pa
import pytest
import uvicorn
from fastapi import FastAPI, HTTPException, Response

from jobs.demo.shop import Shop
from jobs.demo.tally import Tally
from jobs.demo.visitors import histories_of, run_visitors
from jobs.demo.worlds import ReplaySource, ShopSource
from lib.data.events import EVENT_SCHEMA, Event
from lib.data.history import History
from lib.errors import InputError
from lib.live.prequential import events_of

ITEMS = [f"item-{row:04d}" for row in range(100)]


def rank(history, k):
    """A top k that any difference between two histories turns over; `history` is of (item, kind, value, time)."""
    seen = {event[0] for event in history}
    key = repr([tuple(event) for event in history]).encode()
    fresh = [item for item in ITEMS if item not in seen]
    return sorted(fresh, key=lambda item: hashlib.blake2b(item.encode(), key=hashlib.sha256(key).digest()).digest())[:k]


def rank_all(histories, k):
    return [rank(rows_of(history), k) for history in histories]


def rows_of(history):
    return list(zip(history.item_ids, history.events, history.values, history.timestamps, strict=True))


class Service:
    """A service of the same two routes: it keeps histories, answers by `rank`, and fails when it is told to."""

    def __init__(self, histories=None):
        self.histories = defaultdict(list, histories or {})
        self.calls = []  # (method, user, event or None)
        self.failed = 0
        self.fail = lambda call: False  # whether call number so and so is answered with 503
        self.lose_answer = lambda call: False  # kept, and then answered with 503 all the same
        self.refuse = lambda event: None  # the reason
        self.version = 1
        self.url = ""
        self.app = FastAPI()
        self.app.get("/v1/users/{user_id}/recommendations")(self.recommend)
        self.app.post("/v1/events")(self.take_events)

    def maybe_fail(self, fails):
        if fails(len(self.calls)):
            self.failed += 1
            raise HTTPException(503, "injected")

    async def recommend(self, user_id: str, k: int):
        self.calls.append(("GET", user_id, None))
        self.maybe_fail(self.fail)
        items = [{"item_id": item, "score": 1.0} for item in rank(self.histories[user_id], k)]
        return {"request_id": f"request-{len(self.calls)}", "model_version": self.version, "items": items}

    async def take_events(self, body: dict):
        (event,) = body["events"]
        self.calls.append(("POST", event["user_id"], event))
        self.maybe_fail(self.fail)
        reason = self.refuse(event)
        if reason:
            return {"accepted": 0, "duplicates": 0, "rejected": [{"index": 0, "reason": reason}]}
        past = (event["item_id"], event["event"], event["value"], event["timestamp"])
        self.histories[event["user_id"]].append(past)
        self.maybe_fail(self.lose_answer)
        return {"accepted": 1, "duplicates": 0, "rejected": []}

    def sent(self):
        return [event for _, _, event in self.calls if event]


@contextmanager
def listening(app):
    # on a busy machine a connection rests longer than uvicorn's five seconds, and would be closed under a request
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_keep_alive=600))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # the system picks a port that is free
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def service():
    service = Service()
    with listening(service.app) as service.url:
        yield service


@pytest.fixture(scope="module")
def shop_start():
    return events_of(Shop(seed=7, visitors=100, items=100).history)


def known_to(service, past):
    """Give the service the events that it knows at the start."""
    histories = histories_of(past)
    service.histories.update({user: rows_of(histories.get(user)) for user in histories.users(len(histories))})


@pytest.fixture
def shop():
    return Shop(seed=7, visitors=100, items=100)


def table(*rows):
    """An event table of (user, item, kind, time) rows, ratings with a value after that."""
    names = ("user_id", "item_id", "event", "timestamp", "value")
    return pa.Table.from_pylist([dict(zip(names, row, strict=False)) for row in rows], schema=EVENT_SCHEMA)


def drive(url, source, frozen=rank_all, steps=None, **options):
    """Run the visitors to the source's end, or until so many events have been sent."""
    tally = Tally()

    async def run():
        stop = asyncio.Event()
        visitors = asyncio.create_task(
            run_visitors(url, source, frozen, tally, stop, **{"events_per_second": 5000, **options})
        )
        while not visitors.done() and (steps is None or tally.events_sent < steps):
            await asyncio.sleep(0.01)
        stop.set()
        await visitors

    asyncio.run(run())
    return tally


def test_shop_visitors_are_compared_under_the_histories_the_service_has(service, shop, shop_start):
    known_to(service, shop_start)
    tally = drive(service.url, ShopSource(shop), steps=600, past=shop_start)
    # both sides rank by the whole history: one event more or less, or in another order, and they would disagree
    assert tally.trials > 200
    assert tally.only_live == tally.only_frozen == 0
    assert tally.hits_live == tally.hits_frozen > 10
    assert tally.failed_requests == 0
    assert tally.events_sent == tally.events_acknowledged == len(service.sent()) >= 600
    assert tally.requests == len(service.calls) == tally.answers + tally.events_sent
    assert 0 < tally.reactions < tally.answers


def test_a_reaction_names_the_answer_that_it_follows(service, shop):
    tally = drive(service.url, ShopSource(shop), steps=300)
    named = [event for event in service.sent() if event["request_id"]]
    assert len(named) >= tally.reactions > 0
    assert all(event["event"] in ("click", "cart") for event in named)
    answers = {f"request-{number}": user for number, (_, user, _) in enumerate(service.calls, start=1)}
    assert all(answers[event["request_id"]] == event["user_id"] for event in named)


def test_the_live_answer_is_asked_for_before_the_choice_is_sent(service):
    rows = [(f"user-{n % 3}", ITEMS[n], "view", n) for n in range(30)]
    drive(service.url, ReplaySource(table(*rows)))
    for user in ("user-0", "user-1", "user-2"):
        calls = [(method, event and event["timestamp"]) for method, who, event in service.calls if who == user]
        own = [time for who, _, _, time in rows if who == user]
        assert calls == [call for time in own for call in (("GET", None), ("POST", time))]


def test_every_failed_request_is_counted_and_none_is_repeated(service, shop, shop_start):
    known_to(service, shop_start)
    service.fail = lambda call: call % 7 == 0
    tally = drive(service.url, ShopSource(shop), steps=500, past=shop_start)
    assert tally.failed_requests == service.failed > 50
    assert tally.requests == len(service.calls)
    assert tally.requests == tally.answers + tally.events_acknowledged + tally.failed_requests
    assert tally.last_error is not None
    assert "503" in tally.last_error
    assert "injected" in tally.last_error
    sent = [event["event_id"] for event in service.sent()]
    assert len(sent) == len(set(sent)) == tally.events_sent


def test_a_user_whose_event_may_or_may_not_be_kept_is_no_longer_compared(service):
    service.lose_answer = lambda call: call == 2  # user-0's first event is kept, but its acknowledgement is lost
    rows = [(user, ITEMS[n], "view", 2 * n + m) for n in range(20) for m, user in enumerate(("user-0", "user-1"))]
    tally = drive(service.url, ReplaySource(table(*rows)), concurrency=1)
    assert tally.users_unsure == 1
    assert tally.trials == 1 + 20
    assert tally.only_live == tally.only_frozen == 0
    assert tally.events_acknowledged == 39
    assert tally.failed_requests == 1


def test_a_service_that_is_away_is_nothing_but_failures():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        tally = drive(url, ReplaySource(table(*[("user", ITEMS[n], "view", n) for n in range(5)])))
    assert tally.requests == tally.failed_requests == 10
    assert tally.trials == tally.answers == tally.events_acknowledged == 0
    assert tally.last_error is not None
    assert "ConnectError" in tally.last_error


def test_an_answer_that_is_not_json_is_a_failed_request():
    app = FastAPI()
    app.get("/{path:path}")(lambda path: Response("<html>"))
    app.post("/{path:path}")(lambda path: Response("<html>"))
    with listening(app) as url:
        tally = drive(url, ReplaySource(table(("user", ITEMS[0], "view", 0))))
    assert tally.failed_requests == 2
    assert tally.last_error is not None
    assert "not JSON" in tally.last_error


def test_refused_events_are_counted_and_stay_out_of_the_history(service):
    service.refuse = lambda event: "item_id: unknown" if event["item_id"] == ITEMS[1] else None
    rows = [("user", ITEMS[n], "view", n) for n in range(10)]
    tally = drive(service.url, ReplaySource(table(*rows)))
    assert (tally.events_sent, tally.events_acknowledged, tally.events_refused) == (10, 9, 1)
    assert tally.last_refusal == "item_id: unknown"
    assert tally.failed_requests == 0
    assert tally.trials == 10
    assert tally.only_live == tally.only_frozen == 0


def test_only_choices_that_both_models_could_hit_are_trials(service):
    events = table(
        ("user", ITEMS[0], "view", 10),
        ("user", ITEMS[0], "cart", 20),  # had it
        ("user", ITEMS[1], "dislike", 30),
        ("user", ITEMS[2], "rating", 40, 2.0),  # a bad rating
        ("user", ITEMS[3], "rating", 50, 4.0),
        ("user", ITEMS[9], "view", 60),  # had it before the run
    )
    start = [Event("user", ITEMS[9], "view", None, 5)]
    known_to(service, start)
    tally = drive(service.url, ReplaySource(events), past=start)
    assert tally.trials == 2
    assert tally.events_acknowledged == 6
    assert len(start) == 1  # copied, not grown


def test_the_two_models_are_counted_apart(service):
    rows = [(f"user-{n}", ITEMS[n], "view", n) for n in range(50)]
    all_of_them = drive(service.url, ReplaySource(table(*rows)), frozen=lambda histories, k: [ITEMS for _ in histories])
    assert all_of_them.hits_frozen == all_of_them.trials == 50
    assert all_of_them.hits_live < 50
    service.histories.clear()
    none = drive(service.url, ReplaySource(table(*rows)), frozen=lambda histories, k: [[] for _ in histories])
    assert none.hits_frozen == 0
    assert none.hits_live == none.only_live == all_of_them.hits_live > 0


def test_the_frozen_model_is_asked_in_batches_one_at_a_time(service):
    batches, running = [], threading.Lock()

    def slow(histories, k):
        assert running.acquire(blocking=False)
        assert threading.current_thread() is not threading.main_thread()
        time.sleep(0.02)
        batches.append(len(histories))
        running.release()
        return rank_all(histories, k)

    rows = [(f"user-{n}", ITEMS[n % 100], "view", n) for n in range(80)]
    tally = drive(service.url, ReplaySource(table(*rows)), frozen=slow)
    assert sum(batches) == tally.trials == 80
    assert max(batches) > 1


def test_a_frozen_model_that_fails_ends_the_run(service):
    def broken(histories, k):
        raise RuntimeError("no weights")

    with pytest.raises(ExceptionGroup) as raised:
        drive(service.url, ReplaySource(table(("user", ITEMS[0], "view", 0))), frozen=broken)
    assert raised.group_contains(RuntimeError, match="no weights")


def test_versions_are_noted_when_they_are_new():
    tally = Tally()
    for version in (3, 3, 4, 3, 4, 7):  # a replica that is a push behind changes nothing
        tally.count_version(version)
    assert tally.version == 7
    assert [version for _, version in tally.version_changes] == [3, 4, 7]


def test_a_replay_goes_through_the_table_in_time_order():
    source = ReplaySource(table(("b", "y", "view", 20), ("a", "x", "rating", 10, 3.5), ("c", "z", "view", 20)))
    assert [source.next_event(()) for _ in range(4)] == [
        Event("a", "x", "rating", 3.5, 10),
        Event("b", "y", "view", None, 20),
        Event("c", "z", "view", None, 20),
        None,
    ]
    assert source.react("a", ["x"]) == []


def test_the_shop_s_time_never_stands_still(shop):
    source, times = ShopSource(shop), [shop.now]
    for _ in range(300):
        choice = source.next_event(())
        assert choice is not None
        times += [choice.timestamp, *(event.timestamp for event in source.react(choice.user_id, ITEMS[:10]))]
    assert len(times) > 310
    assert all(before < after for before, after in pairwise(times))


def test_histories_are_in_time_order():
    events = table(("a", "y", "view", 20), ("a", "x", "rating", 10, 4.0), ("b", "z", "click", 5))
    histories = histories_of(events_of(events))
    assert {user: histories.get(user) for user in histories.users(9)} == {
        "a": History.of([Event("a", "x", "rating", 4.0, 10), Event("a", "y", "view", None, 20)]),
        "b": History.of([Event("b", "z", "click", None, 5)]),
    }


def test_the_interval_of_the_difference_is_that_of_paired_trials():
    tally = Tally()
    for live, frozen, times in ((True, False, 30), (False, True, 10), (True, True, 20), (False, False, 40)):
        for _ in range(times):
            tally.count_trial(live, frozen)
    assert tally.rates() == (0.5, 0.3)
    mean, low, high = tally.difference()
    # differences: 30 times +1, 10 times -1, 60 times 0: variance 0.4 - 0.2 ** 2 = 0.36, standard error 0.06
    assert mean == pytest.approx(0.2)
    assert (low, high) == (pytest.approx(0.2 - 1.96 * 0.06), pytest.approx(0.2 + 1.96 * 0.06))


def test_the_window_forgets_and_the_tally_stays_small():
    tally = Tally()
    for trial in range(20_000):
        tally.count_trial(trial < 19_000, False)
        tally.count_version(trial)
        tally.latencies_ms.append(1.0)
    assert tally.rates() == (0.95, 0.0)
    assert tally.window_rates() == (0.0, 0.0, 1000)
    assert max(len(tally.window), len(tally.differences), len(tally.version_changes), len(tally.latencies_ms)) <= 5000


@pytest.mark.parametrize("option", ["concurrency", "events_per_second", "k"])
def test_a_number_out_of_range_is_an_error_that_names_it(option):
    with pytest.raises(InputError, match=f"{option}: must be above 0, got 0"):
        drive("http://127.0.0.1", ReplaySource(table()), **{option: 0})
