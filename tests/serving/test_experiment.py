"""Two models side by side: who is answered by which, what is counted, and what becomes of winner and loser."""

import asyncio
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ray.exceptions import RayActorError

from lib.data.catalog import Catalog
from lib.data.events import Event
from lib.data.history import History
from lib.errors import InputError
from lib.experiments.results import (
    CHALLENGER,
    LIVE,
    SHADOW,
    ChallengerConfig,
    ExperimentResults,
    Impression,
    Reaction,
    Records,
    Shadow,
    arm_in,
    tagged,
)
from lib.live.learner import NearlineLearner
from lib.log.feedback import FeedbackLog
from lib.log.reader import FeedbackLogReader
from lib.model.facts import VersionFacts
from lib.model.folder import Manifest
from lib.ranking.filters import ItemFilter
from lib.ranking.recommender import Question, Recommender
from lib.ranking.rules import RankingRules
from lib.versions.accounts import Accounts
from lib.versions.folder import load_folder, save_with_optimizer
from lib.versions.ledger import check
from lib.versions.registry import Registry
from serving.challenger import Answer, Challenger, load_challenger
from serving.experiment import Experiments, prepare_challenger
from serving.live_models import LiveModels
from serving.prometheus import StatusCollector
from serving.status import Status, Unavailable
from tests.helpers.learners import CONFIG, recommender_of, update
from tests.helpers.service import LiveService, assert_each_event_once, metrics
from tests.helpers.tiny import NOW, history, item_ids, micro_batch, started_registry, tiny_encoder
from tests.helpers.traffic import Traffic

HALF = ChallengerConfig(model="somewhere", share=0.5)
USERS = [f"user-{number}" for number in range(4000)]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Three versions of a tiny model."""
    learner = NearlineLearner(started_registry(tmp_path / "live"), CONFIG)
    update(learner, 1)
    update(learner, 2)
    return tmp_path / "live"


@pytest.fixture
def model(tmp_path: Path) -> str:
    """Another model."""
    folder = tmp_path / "other"
    save_with_optimizer(folder, tiny_encoder(seed=5, hidden_size=8), Catalog(item_ids(20)), Manifest(version=1), None)
    (folder / "live").mkdir()  # it is served somewhere, too
    return str(folder)


def reaction(arm: str, user: str, number: int, kind: str = "click", item: str = "i1") -> Reaction:
    return Reaction(user, arm, f"{user}-{number}", kind, item)


# ---------------------------------------------------------------------------------------------------------------------
# Who takes part


def test_users_are_divided_by_share_and_stay_where_they_are():
    config = ChallengerConfig(model="m", share=0.2)
    arms = {user: config.arm_of(user, "one") for user in USERS}
    assert arms == {user: config.arm_of(user, "one") for user in USERS}
    counts = Counter(arms.values())
    assert counts.keys() == {LIVE, CHALLENGER}
    assert 0.17 < counts[CHALLENGER] / len(USERS) < 0.23
    other = {user: config.arm_of(user, "two") for user in USERS}
    both = sum(arms[user] == other[user] == CHALLENGER for user in USERS) / len(USERS)
    assert 0.02 < both < 0.06, "another experiment divides them anew"


def test_requests_without_a_user_take_no_part():
    assert HALF.arm_of(None, "one") is None
    shadow = HALF.model_copy(update={"shadow": True})
    assert {shadow.arm_of(user, "one") for user in USERS} == {SHADOW, None}


def test_an_answers_id_names_its_arm():
    for arm in (LIVE, CHALLENGER, SHADOW):
        assert arm_in(tagged("abc", "7f-shadow", arm), "7f-shadow") == arm
    assert arm_in(tagged("abc", "other", LIVE), "7f") is None
    for unknown in (None, "", "abc", "abc.7f", "abc.7f.nobody", "7f.live"):
        assert arm_in(unknown, "7f") is None


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"share": 0}, "share: input should be greater than 0, got 0"),
        ({"share": 1}, "share: input should be less than 1, got 1"),
        ({"alpha": 2}, "alpha: "),
        ({"reward": "likes"}, "reward: input should be 'click_through' or 'conversion', got 'likes'"),
        ({"model": ""}, "model: "),
        ({"x": 1}, "x: no such setting; there are model, share, shadow"),
    ],
)
def test_a_bad_setting_is_refused(bad, message):
    with pytest.raises(InputError) as error:
        ChallengerConfig(**{"model": "m", **bad})
    assert str(error.value).startswith(message)


# ---------------------------------------------------------------------------------------------------------------------
# What is counted


@pytest.fixture
def results(tmp_path) -> Callable[[], ExperimentResults]:
    return lambda: ExperimentResults(tmp_path / "results.sqlite")


def test_each_answer_counts_and_each_kind_of_reward_once_an_answer(results):
    counted = results()
    impressions = [Impression("u", LIVE)] * 3 + [Impression("v", LIVE), Impression("w", CHALLENGER)]
    reactions = [
        reaction(LIVE, "u", 1),
        reaction(LIVE, "u", 1),  # once more the same
        reaction(LIVE, "u", 1, "purchase"),
        reaction(LIVE, "u", 2, "dislike"),  # no reward
        reaction(CHALLENGER, "w", 1, "cart"),
    ]
    counted.record(Records(impressions, reactions[:2], []))
    counted.record(Records([], reactions[2:], []))
    for again in (counted, results()):  # and a restarted one has it from its file
        live, challenger = (again.summary(HALF).model_dump()["arms"][arm] for arm in (LIVE, CHALLENGER))
        assert (live["users"], live["answers"], live["rewards"]) == (2, 4, {"click": 1, "purchase": 1})
        assert (live["click_through"]["rate"], live["conversion"]["rate"]) == (0.25, 0.25)
        assert live["click_through"]["interval"] is None, "so little says nothing"
        assert live["click_through"]["unknown"] == "2 users so far; it takes 100"
        assert again.summary(HALF).model_dump()["difference"]["conversion"]["unknown"] == (
            "live: 2 users so far; it takes 100; challenger: 1 users so far; it takes 100"
        )
        assert (challenger["answers"], challenger["rewards"]) == (1, {"cart": 1})
        assert (challenger["click_through"]["rate"], challenger["conversion"]["rate"]) == (1.0, 0.0)
        assert again.verdict(HALF) is None


def test_nobody_has_more_rewards_than_answers(results):
    """Ids of answers can be made up; a reaction may also be told of before its answer, by another replica."""
    counted = results()
    counted.record(Records([], [reaction(CHALLENGER, "early", 1)], []))
    made_up = [reaction(CHALLENGER, "liar", number) for number in range(50)]
    never_asked = [reaction(CHALLENGER, "stranger", number) for number in range(50)]
    counted.record(Records([Impression("early", CHALLENGER), Impression("liar", CHALLENGER)], made_up, []))
    counted.record(Records([Impression("other", CHALLENGER)] * 2, never_asked, []))
    for again in (counted, results()):
        totals = again.totals[CHALLENGER, "click_through"]
        assert (totals.users, totals.answers, totals.rewarded, totals.rewarded_squared) == (3, 4, 2, 2)
    assert counted.totals == results().totals


def outcomes(counted: ExperimentResults, arm: str, users: int, rewarded: int, kind: str = "click") -> None:
    names = [f"{arm}-{number}" for number in range(users)]
    reactions = [reaction(arm, name, 1, kind) for name in names[:rewarded]]
    counted.record(Records([Impression(name, arm) for name in names], reactions, []))


@pytest.mark.parametrize(
    ("live", "challenger", "verdict"),
    [(200, 400, "promote"), (400, 200, "rollback"), (300, 300, None), (300, 0, "rollback"), (0, 0, None)],
)
def test_the_verdict_follows_the_rewards(results, live, challenger, verdict):
    counted = results()
    outcomes(counted, LIVE, 1000, live)
    outcomes(counted, CHALLENGER, 1000, challenger)
    assert counted.verdict(HALF) == verdict
    again = results()
    assert again.totals == counted.totals
    compared = again.summary(HALF).model_dump()["difference"]["click_through"]
    low, high = compared["interval"] or (-1.0, 1.0)
    assert compared["value"] == pytest.approx((challenger - live) / 1000)
    assert low < compared["value"] < high
    assert (compared["interval"] is None) == (compared["unknown"] is not None)
    if live == challenger == 0:
        few = "too few answers with a reward, or without one: 0 so far; it takes 30"
        assert compared["unknown"] == f"live: {few}; challenger: {few}"
    assert (low > 0 or high < 0) == (verdict is not None) == (compared["evidence"] >= 20)
    assert counted.verdict(HALF.model_copy(update={"reward": "conversion"})) is None
    assert counted.verdict(HALF.model_copy(update={"shadow": True})) is None


def test_a_purchase_decides_where_conversions_are_asked_for(results):
    counted, config = results(), HALF.model_copy(update={"reward": "conversion"})
    outcomes(counted, LIVE, 1000, 200, "purchase")
    outcomes(counted, CHALLENGER, 1000, 400, "click")
    assert counted.summary(config).model_dump()["difference"]["conversion"]["value"] == -0.2
    assert counted.verdict(config) == "rollback", "of the challenger there is no purchase yet"
    reactions = [reaction(CHALLENGER, f"{CHALLENGER}-{number}", 2, "purchase") for number in range(400)]
    counted.record(Records([], reactions, []))
    assert counted.verdict(config) == "promote"


def test_shadows_are_compared_with_what_was_shown_and_chosen(results):
    counted = results()
    shadows = [Shadow("r1", ["a", "b", "c", "d"], ["b", "a", "x", "y"]), Shadow("r2", ["a", "b"], ["x", "y"])]
    chosen = [Reaction("u", SHADOW, "r1", "click", "b"), Reaction("u", SHADOW, "r2", "click", "a")]
    counted.record(Records([], [], [*shadows, shadows[0]]))
    counted.record(Records([], [*chosen, chosen[0], Reaction("u", SHADOW, "unknown", "click", "a")], []))
    assert results().summary(HALF.model_copy(update={"shadow": True})).model_dump() == {
        "compared": 2,
        "overlap": pytest.approx(0.25),
        "choices": 2,
        "arms": {
            LIVE: {"found": 1.0, "mrr": pytest.approx(0.75)},
            CHALLENGER: {"found": 0.5, "mrr": pytest.approx(0.5)},
        },
    }


def test_what_was_chosen_before_its_shadow_was_computed_counts_once_it_is(results, monkeypatch):
    monkeypatch.setattr("lib.experiments.results.SHADOWS_KEPT", 2)
    config = HALF.model_copy(update={"shadow": True})
    chosen = [Reaction("u", SHADOW, f"r{number}", "click", "b") for number in (1, 2, 3)]
    results().record(Records([], [*chosen, chosen[2]], []))
    assert results().summary(config).choices == 0
    for asked in ((1, 2, 3), (3,)):
        results().record(Records([], [], [Shadow(f"r{number}", ["a", "b"], ["b", "x"]) for number in asked]))
    assert results().summary(config).model_dump() == {
        "compared": 3,
        "overlap": pytest.approx(0.5),
        "choices": 2,  # the oldest of three was not waited for
        "arms": {
            LIVE: {"found": 1.0, "mrr": pytest.approx(0.5)},
            CHALLENGER: {"found": 1.0, "mrr": pytest.approx(1.0)},
        },
    }
    results().record(Records([], [Reaction("u", SHADOW, "r3", "purchase", "x")], []))
    assert results().summary(config).choices == 3


def test_what_cannot_be_written_is_not_counted_at_all(results):
    counted = results()
    outcomes(counted, LIVE, 10, 5)
    before = dict(counted.totals)
    counted._connection.execute("PRAGMA max_page_count = 1")  # a full disk
    with pytest.raises(sqlite3.OperationalError):
        outcomes(counted, CHALLENGER, 5000, 5)
    assert counted.totals == before
    counted._connection.execute("PRAGMA max_page_count = 100000")
    outcomes(counted, CHALLENGER, 10, 5)
    assert counted.totals == results().totals


# ---------------------------------------------------------------------------------------------------------------------
# In a replica, with the actor in this process


class Remote:
    """Calls a method as an actor's is called."""

    def __init__(self, method: Callable[..., Any]):
        self.method = method

    async def remote(self, *arguments: Any) -> Any:
        """The method's result."""
        return self.method(*arguments)


class InProcess:
    """An actor that is no process of its own."""

    def __init__(self, experiments: Experiments):
        self.experiments = experiments
        self.record = Remote(experiments.record)


def started(state: Path, experiments: Experiments | None = None, **settings: Any) -> tuple[Experiments, Challenger]:
    """The actor and one replica's challenger."""
    given: dict[str, Any] = {"share": 0.5, "effect": 0.1}
    prepared = prepare_challenger(ChallengerConfig(**given | settings), str(state))
    experiments = experiments or Experiments(str(state))
    loaded = load_folder(prepared.model)
    recommender = Recommender(loaded.encoder, loaded.catalog, loaded.version)
    return experiments, Challenger(prepared, recommender, InProcess(experiments))


def status_of(challenger: Challenger) -> dict[str, Any]:
    """The JSON that GET /v1/status has of it."""
    return whole_status(challenger).model_dump()["experiment"]


def whole_status(challenger: Challenger) -> Status:
    """The status of a service whose other parts are away."""
    experiment, away = challenger.actor.experiments.status(challenger.name), Unavailable(state="restarting")
    assert experiment is not None
    return Status(model_version=3, replicas=[], learner=away, aggregator=away, freshness=None, experiment=experiment)


def test_each_arm_is_answered_by_its_model_and_says_so(state, model):
    _, challenger = started(state, model=model)
    live = recommender_of(Registry(state))
    read = [History.of(Event(user, "i3", "click", None, NOW + n) for n in range(2)) for user in USERS[:20]]
    questions = [Question(own, 5, explain=True) for own in read]
    answers = challenger.answer(live, questions, [*USERS[:19], None])
    assert {answer.arm for answer in answers[:19]} == {LIVE, CHALLENGER}
    assert answers[19].arm is None
    for answer, question in zip(answers, questions, strict=True):
        recommender = challenger.recommender if answer.arm == CHALLENGER else live
        alone = recommender.recommend([question._replace(history=question.history.newest(2))])[0]
        assert [(item.item_id, item.reason) for item in answer.items] == [(i.item_id, i.reason) for i in alone]
        assert answer.version == (1 if answer.arm == CHALLENGER else 3)


def test_items_are_described_alike_in_both_arms(tmp_path, model):
    """As the live catalog does it, whatever the challenger was pretrained with, and as they are changed later."""
    registry, catalog = Registry(tmp_path / "live"), Catalog(item_ids(24))
    catalog.change({f"i{n}": {"genres": "Comedy", "year": 1990 + n} for n in range(1, 11)} | {"i2": None})
    registry.publish_snapshot(tiny_encoder(), catalog, Manifest(version=1), None)
    other = load_folder(Path(model))
    other.catalog.change({"i1": {"year": "nineteen", "genres": "Drama", "colour": 7}})
    save_with_optimizer(Path(model), other.encoder, other.catalog, Manifest(version=1), None)
    _, challenger = started(tmp_path / "live", model=model)
    live = recommender_of(registry)

    def found(**filter: Any) -> list[set[str]]:
        """What a user of each arm is answered."""
        question = Question(History(), 30, ItemFilter.of(filter))
        answers = challenger.answer(live, [question] * 20, USERS[:20])
        return [{i.item_id for a in answers if a.arm == arm for i in a.items} for arm in (LIVE, CHALLENGER)]

    assert found(genres="Comedy") == [{"i1", *item_ids(8, 3)}] * 2
    assert found(year={"min": 1999}) == [{"i9", "i10"}] * 2
    for changed in (live, challenger):
        changed.change_items({"i1": {"colour": "red"}, "i2": {"genres": "Comedy"}, "i3": None})
    assert found(colour="red") == [{"i1"}] * 2
    assert found(genres="Comedy") == [{"i2", *item_ids(7, 4)}] * 2
    assert [answer & {"i3"} for answer in found()] == [set(), set()]
    # and when it is promoted
    learner = NearlineLearner(registry, CONFIG)
    learner.adopt(load_folder(challenger.prepared.model), VersionFacts())
    attributes = learner.model.catalog.attributes
    assert attributes is not None
    assert (attributes.column_names, learner.model.catalog.removed) == (["item_id", "genres", "year"], {"i2"})


def show(challenger: Challenger, users: int, rewarded: Callable[[str, int], bool]) -> None:
    """Show each user one answer and have some of them click."""
    for number, user in enumerate(USERS[:users]):
        arm = challenger.arm_of(user)
        assert arm is not None
        request_id = challenger.note(f"r{number}", user, Answer(1, [], arm))
        if rewarded(arm, number):
            challenger.react([Event(user, "i1", "click", None, NOW, None, request_id)])
    challenger.react([Event("u", "i1", "click", None, NOW, None, "no answer of this experiment")])


@pytest.mark.parametrize(("scale", "high"), [("1-5", 2.0), ("1-10", 4.0)])
def test_what_was_turned_down_is_no_reward(tmp_path, scale, high):
    registry = started_registry(tmp_path / "live", rating_scale=scale)
    _, challenger = started(Path(registry.store.root), model="1")
    user = USERS[0]
    arm = challenger.arm_of(user)
    assert arm is not None
    events = [
        ("rating", 1.0),
        ("rating", high),
        ("skip", None),
        ("dislike", None),
        ("rating", None),
        ("rating", 3 * high),
    ]
    for number, (kind, value) in enumerate(events):
        request_id = challenger.note(f"r{number}", user, Answer(1, [], arm))
        challenger.react([Event(user, "i1", kind, value, NOW, None, request_id)])
    assert asyncio.run(challenger.tell())
    own = status_of(challenger)["arms"][arm]
    assert (own["answers"], own["rewards"], own["click_through"]["rate"]) == (6, {"rating": 2}, pytest.approx(2 / 6))


def test_what_was_turned_down_is_no_choice_of_a_shadow_either(state):
    _, challenger = started(state, model="2", shadow=True)
    user = next(user for user in USERS if challenger.arm_of(user) == SHADOW)
    request_id = challenger.note("r", user, Answer(1, [], SHADOW))
    challenger.react([Event(user, "i1", "rating", 1.0, NOW, None, request_id)])
    assert challenger.records.reactions == []


def wins(arm: str, number: int) -> bool:
    return number % 10 < (6 if arm == CHALLENGER else 2)


def loses(arm: str, number: int) -> bool:
    return wins(LIVE if arm == CHALLENGER else CHALLENGER, number)


@pytest.mark.parametrize("stored", [True, False], ids=["a stored version", "a model of another shape"])
def test_a_winner_is_offered_and_its_arm_goes_on_until_it_is_live(state, model, stored):
    experiments, challenger = started(state, model="2" if stored else model)
    assert asyncio.run(challenger.tell())
    show(challenger, 300, wins)
    assert asyncio.run(challenger.tell())
    # a replica and the actor that are restarted in between go on, and the users keep their arms
    arms = [challenger.arm_of(user) for user in USERS]
    experiments.close()
    experiments, challenger = started(state, model="2" if stored else model)
    assert [challenger.arm_of(user) for user in USERS] == arms
    show(challenger, 600, wins)
    assert asyncio.run(challenger.tell()), "its users go on being answered by it"
    assert asyncio.run(challenger.tell())
    status = status_of(challenger)
    assert status["state"] == "promoting"
    assert sum(arm["answers"] for arm in status["arms"].values()) == 900
    registry = Registry(state)
    assert registry.offers.names() == [experiments.running[challenger.name].offer]
    learner = NearlineLearner(registry, CONFIG)
    learner.take_over(registry.offers.names()[0])
    assert asyncio.run(challenger.tell()), "the replicas have it when the offer is gone"
    registry.offers.withdraw(registry.offers.names()[0])
    assert not asyncio.run(challenger.tell())
    assert (status_of(challenger)["state"], status_of(challenger)["version"]) == ("promoted", 4)
    # learning goes on from where its weights are: nothing of the log is in another model's
    assert (learner.log_offset, learner.lineage.events_trained) == ((1, 1) if stored else (0, 0))
    assert learner.model.encoder.config.hidden_size == (16 if stored else 8)
    assert learner.learn(micro_batch(learner.log_offset + 1, [history([1, 2])])).version == 5
    with FeedbackLog.open(state / "feedback.sqlite") as log:
        log.append([Event("u", "i1", "click", None, NOW, str(number)) for number in range(2)]).result()
        assert check(Accounts(registry).newest_lineage(), log).faults == []
    restarted, _ = started(state, model="2" if stored else model)
    assert restarted.record(challenger.prepared, Records.none()) is False
    assert registry.offers.names() == []


def test_a_loser_is_given_up(state, model):
    _, challenger = started(state, model=model)
    show(challenger, 600, loses)
    assert not asyncio.run(challenger.tell())
    assert status_of(challenger)["state"] == "rolled back"
    assert Registry(state).offers.names() == []
    assert not asyncio.run(started(state, model=model)[1].tell())


def test_a_winner_that_the_learner_refuses_is_no_endless_offer(state, model):
    _, challenger = started(state, model=model)
    show(challenger, 600, wins)
    assert asyncio.run(challenger.tell())
    registry = Registry(state)
    registry.offers.withdraw(registry.offers.names()[0])
    assert not asyncio.run(challenger.tell())
    assert (status_of(challenger)["state"], registry.offers.names()) == ("refused", [])


def test_results_that_are_removed_begin_another_experiment(state, model):
    experiments, challenger = started(state, model=model)
    show(challenger, 600, wins)
    assert asyncio.run(challenger.tell())
    first = Registry(state).offers.names()
    experiments.close()
    challenger.prepared.results.unlink()
    experiments, challenger = started(state, model=model)
    assert asyncio.run(challenger.tell())
    assert status_of(challenger)["state"] == "running"
    assert experiments.running[challenger.name].offer not in first


def test_who_is_deployed_last_says_how_it_is_compared(state, model):
    experiments, first = started(state, model=model, decide=False)
    show(first, 600, loses)
    assert asyncio.run(first.tell()), "who only reports decides nothing"
    status = status_of(first)
    assert (status["state"], status["difference"]["click_through"]["evidence"] > 20) == ("running", True)
    families = {family.name: family for family in StatusCollector(whole_status(first)).collect()}
    answers = {sample.labels["arm"]: sample.value for sample in families["afterclick_arm_answers"].samples}
    assert answers == {arm: status["arms"][arm]["answers"] for arm in (LIVE, CHALLENGER)}
    assert families["afterclick_experiment_evidence"].samples[0].value > 20
    _, other = started(state, experiments, model="2")
    assert asyncio.run(other.tell()), "another challenger is another experiment"
    assert status_of(other)["arms"][LIVE]["answers"] == 0
    _, again = started(state, experiments, model=model, share=0.9)
    moved = {(first.arm_of(user), again.arm_of(user)) for user in USERS}
    assert (CHALLENGER, LIVE) not in moved, "a larger share takes nobody out of the challenger's arm"
    assert not asyncio.run(again.tell())
    assert status_of(first)["state"] == "rolled back"


def test_a_shadow_is_asked_later_and_never_shown(state, model, monkeypatch):
    _, challenger = started(state, model=model, shadow=True)
    live = recommender_of(Registry(state))
    question = Question(history([3, 4]), 5)
    answers = challenger.answer(live, [question] * 20, USERS[:20])
    expected = [item.item_id for item in live.recommend([question])[0]]
    ids = []
    for user, answer in zip(USERS[:20], answers, strict=True):
        assert [item.item_id for item in answer.items] == expected
        if answer.arm is not None:
            assert answer.arm == SHADOW
            ids.append(challenger.note("r" + user, user, answer))
    assert 0 < len(ids) < 20
    monkeypatch.setattr("serving.challenger.TELL_SECONDS", 0.01)

    async def one_round() -> None:
        running = asyncio.create_task(challenger.run())
        await asyncio.sleep(0)
        while status_of(challenger)["compared"] < len(ids):
            await asyncio.sleep(0.01)
        running.cancel()

    asyncio.run(one_round())
    challenger.react([Event(USERS[0], expected[1], "click", None, NOW, None, ids[0])])
    assert asyncio.run(challenger.tell())
    status = status_of(challenger)
    assert (status["name"], status["compared"], status["choices"]) == (challenger.name, len(ids), 1)
    assert status["arms"][LIVE] == {"found": 1.0, "mrr": 0.5}
    assert 0 <= status["overlap"] <= 1
    assert challenger.name.endswith("-shadow")
    families = StatusCollector(whole_status(challenger)).collect()
    assert not [family for family in families if "arm" in family.name]


def test_a_second_in_which_the_actor_is_away_is_lost_and_no_more(state, model):
    _, challenger = started(state, model=model)
    record = challenger.actor.record

    def away(*arguments: Any) -> bool:
        raise RayActorError

    challenger.actor.record = Remote(away)
    show(challenger, 10, wins)
    assert asyncio.run(challenger.tell())
    challenger.actor.record = record
    show(challenger, 20, wins)
    assert asyncio.run(challenger.tell())
    assert sum(arm["answers"] for arm in status_of(challenger)["arms"].values()) == 20


def test_a_challenger_that_fails_leaves_the_live_model(state, model, caplog):
    """Its files are damaged when a replica starts, or it breaks while it runs: everybody is answered all the same."""
    _, challenger = started(state, model=model, shadow=True)
    models = LiveModels(Registry(state), RankingRules())
    models.challenger = challenger
    challenger.tell = None  # pyright: ignore[reportAttributeAccessIssue]
    asyncio.run(models.run_challenger(challenger))
    assert models.challenger is None
    (challenger.prepared.model / "model.safetensors").write_bytes(b"damaged")
    assert load_challenger(str(state), challenger.prepared, RankingRules()) is None


# ---------------------------------------------------------------------------------------------------------------------
# Which models can challenge


def test_a_challenger_is_kept_as_it_was(state, model):
    """A stored version may be pruned, and a model trained again, while the experiment runs."""
    stored = prepare_challenger(ChallengerConfig(model="2"), str(state))
    loaded = load_folder(stored.model)
    assert (stored.name, loaded.version, loaded.log_offset, loaded.facts.events_trained) == ("version-2", 2, 1, 1)
    assert loaded.optimizer is not None
    (state / "deltas" / "0000000002").unlink()
    assert prepare_challenger(ChallengerConfig(model="2"), str(state)) == stored
    made = prepare_challenger(ChallengerConfig(model=model), str(state))
    save_with_optimizer(Path(model), tiny_encoder(seed=6), Catalog(item_ids(24)), Manifest(version=1), None)
    assert load_folder(made.model).encoder.config.hidden_size == 8
    assert prepare_challenger(ChallengerConfig(model=model), str(state)).name != made.name


def test_what_cannot_challenge_is_refused(state, model, tmp_path):
    def refused(message: str, named: str, state: Path | str = state) -> None:
        with pytest.raises(InputError, match=f"^challenger: {message}"):
            prepare_challenger(ChallengerConfig(model=named), str(state))

    refused("version: 99 is not stored", "99")
    refused("model: no folder at", str(tmp_path / "none"))
    refused("it needs --state in a folder", model, "s3://bucket/state")
    refused(r".* has learned from a feedback log, up to offset 2: name a version", str(snapshot_of(state)))
    kept = prepare_challenger(ChallengerConfig(model=model), str(state))
    kept.results.write_bytes(b"no database" * 1000)
    refused(r"its results .* cannot be used: .*; free the disk, or remove it to begin anew", model)
    (kept.model / "model.safetensors").write_bytes(b"damaged")
    refused(r"model: .*model\.safetensors is not the file that the manifest describes", model)
    shutil.rmtree(kept.folder)
    other = load_folder(Path(model))
    save_with_optimizer(Path(model), other.encoder, Catalog(f"film-{n}" for n in range(20)), Manifest(), None)
    refused("it has|.* has none of the live model's items", model)
    tens = tmp_path / "tens"
    save_with_optimizer(tens, tiny_encoder(rating_scale="1-10"), Catalog(item_ids(20)), Manifest(), None)
    refused(r"the ratings of .*tens are on the scale 1-10, and the live model's on 1-5; pretrain it", str(tens))
    (Path(model) / "config.json").write_text("{}")
    refused(r"model: .*config\.json is not the file", model)


def snapshot_of(state: Path) -> Path:
    """The newest version, whole."""
    learner = NearlineLearner(Registry(state), CONFIG)
    learner.lineage.save_snapshot(learner.model)
    return state / "snapshots" / "0000000003"


# ---------------------------------------------------------------------------------------------------------------------
# The running service, which is stopped, and started again with a challenger: the newest version that was stored


class Restart(NamedTuple):
    """What was before it, and the events that were acknowledged until then."""

    before: dict[str, Any]
    acknowledged: list[tuple[str, str]]


@pytest.fixture(scope="module")
def restart(mortal_service: LiveService) -> Restart:
    items = [{"item_id": item, "category": "kept"} for item in ("kept", "gone")]
    mortal_service.client.put("/v1/items", json={"items": items}).raise_for_status()
    mortal_service.client.delete("/v1/items/gone").raise_for_status()
    mortal_service.send({"user_id": "somebody", "item_id": "kept", "event": "click"})
    before = mortal_service.wait_until_learned()
    with Traffic(mortal_service, "stopped", askers=0) as traffic:
        traffic.wait_for(events=100)
    # the newest of them are not learned yet
    mortal_service.stop()
    config = ChallengerConfig(model=str(before["model_version"]), share=0.5, effect=0.1)
    mortal_service.start(challenger=config)
    return Restart(before, traffic.acknowledged)


def test_a_stopped_service_continues_where_it_was(mortal_service: LiveService, restart: Restart) -> None:
    after = mortal_service.wait_until_learned()
    assert_each_event_once(mortal_service, restart.acknowledged)
    assert after["model_version"] > restart.before["model_version"]
    assert after["aggregator"]["log_offset"] >= restart.before["aggregator"]["log_offset"] + len(restart.acknowledged)
    assert len(mortal_service.export("visitor-00001")) > 0, "the histories of the dataset are there"


def test_both_arms_are_answered_and_know_the_items(mortal_service: LiveService, restart: Restart) -> None:
    answers = [
        mortal_service.client.post(
            "/v1/recommendations", json={"user_id": user, "filter": {"category": "kept"}, "explain": True}
        )
        .raise_for_status()
        .json()
        for user in USERS[:20]
    ]
    assert {answer["arm"] for answer in answers} == {LIVE, CHALLENGER}
    assert {tuple(item["item_id"] for item in answer["items"]) for answer in answers} == {("kept",)}
    challenged = {answer["model_version"] for answer in answers if answer["arm"] == CHALLENGER}
    assert challenged == {restart.before["model_version"]}, "it does not learn"
    assert "arm" not in mortal_service.client.post("/v1/recommendations", json={"history": []}).json()


def test_a_winner_takes_over_without_a_failed_request(mortal_service: LiveService, restart: Restart) -> None:
    item = mortal_service.items()[0]
    answers = [mortal_service.recommend(user, 1) for user in USERS[:300]]
    clicked = [
        {"user_id": user, "item_id": item, "event": "click", "request_id": answer["request_id"]}
        for number, (user, answer) in enumerate(zip(USERS, answers, strict=False))
        if number % 10 < (7 if answer["arm"] == CHALLENGER else 2)
    ]
    with Traffic(mortal_service, "promoted", senders=1, askers=1) as traffic:
        assert mortal_service.send(*clicked)["accepted"] == len(clicked)
        assert mortal_service.wait_until("it is promoted", lambda status: status["experiment"]["state"] == "promoted")
        assert mortal_service.wait_until(
            "one model answers again", lambda _: "arm" not in mortal_service.recommend(USERS[0], 1)
        )
        traffic.wait_for(events=20, answers=20)
    assert traffic.failures == []
    assert_each_event_once(mortal_service, traffic.acknowledged)
    status = mortal_service.wait_until_learned()
    experiment = status["experiment"]
    assert status["learner"]["base"] == experiment["version"] > restart.before["model_version"]
    assert experiment["arms"][LIVE]["answers"] + experiment["arms"][CHALLENGER]["answers"] >= 300
    assert experiment["difference"]["click_through"]["value"] > 0.2
    labels = {sample["arm"] for sample, _ in metrics(mortal_service)["afterclick_arm_answers_total"]}
    assert labels == {LIVE, CHALLENGER}
    with FeedbackLogReader(mortal_service.log) as log:
        assert check(Accounts(Registry(mortal_service.state)).newest_lineage(), log).faults == []
