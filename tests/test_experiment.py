"""Two models side by side: who is answered by which, what is counted, and what becomes of winner and loser."""

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from ray import serve

from lib.catalog import Catalog
from lib.events import Event, InputError
from lib.experiment import (
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
from lib.learner import NearlineLearner
from lib.model_folder import Manifest
from lib.ranking import ItemFilter
from lib.recommender import Question, Recommender
from lib.registry import Registry, load_folder, save_with_optimizer
from lib.user_histories import History
from serving.app import build
from serving.experiment import Answer, Challenger, Experiment, experiment_name, prepare_challenger
from serving.names import APPLICATION
from serving.prometheus import StatusCollector
from tests.conftest import LiveService
from tests.test_learner import CONFIG, recommender_of, update
from tests.test_service import metrics
from tests.tiny import NOW, history, item_ids, started_registry, tiny_encoder

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
    "bad", [{"share": 0}, {"share": 1}, {"alpha": 2}, {"reward": "likes"}, {"model": ""}, {"x": 1}]
)
def test_a_bad_setting_is_refused(bad):
    with pytest.raises(ValidationError):
        ChallengerConfig(**({"model": "m"} | bad))


# ---------------------------------------------------------------------------------------------------------------------
# What is counted


@pytest.fixture
def results(tmp_path) -> Callable[..., ExperimentResults]:
    return lambda **changes: ExperimentResults(tmp_path / "results.sqlite", HALF.model_copy(update=changes))


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
        live, challenger = (again.summary()["arms"][arm] for arm in (LIVE, CHALLENGER))
        assert (live["users"], live["answers"], live["rewards"]) == (2, 4, {"click": 1, "purchase": 1})
        assert (live["click_through"]["rate"], live["conversion"]["rate"]) == (0.25, 0.25)
        assert live["click_through"]["interval"] is None, "so little says nothing"
        assert (challenger["answers"], challenger["rewards"]) == (1, {"cart": 1})
        assert (challenger["click_through"]["rate"], challenger["conversion"]["rate"]) == (1.0, 0.0)
        assert again.verdict() is None


def outcomes(counted: ExperimentResults, arm: str, users: int, rewarded: int, kind: str = "click") -> None:
    names = [f"{arm}-{number}" for number in range(users)]
    reactions = [reaction(arm, name, 1, kind) for name in names[:rewarded]]
    counted.record(Records([Impression(name, arm) for name in names], reactions, []))


@pytest.mark.parametrize(
    ("live", "challenger", "verdict"), [(200, 400, "promote"), (400, 200, "rollback"), (300, 300, None)]
)
def test_the_verdict_follows_the_rewards(results, live, challenger, verdict):
    counted = results()
    outcomes(counted, LIVE, 1000, live)
    outcomes(counted, CHALLENGER, 1000, challenger)
    assert counted.verdict() == verdict
    again = results()
    assert again.totals == counted.totals
    compared = again.summary()["difference"]["click_through"]
    low, high = compared["interval"]
    assert compared["value"] == pytest.approx((challenger - live) / 1000)
    assert low < compared["value"] < high
    assert (low > 0 or high < 0) == (verdict is not None) == (compared["evidence"] >= 20)
    assert results(reward="conversion").verdict() is None
    assert results(shadow=True).verdict() is None


def test_a_purchase_decides_where_conversions_are_asked_for(results):
    counted = results(reward="conversion")
    outcomes(counted, LIVE, 1000, 200, "purchase")
    outcomes(counted, CHALLENGER, 1000, 400, "click")
    assert counted.summary()["difference"]["conversion"]["value"] == -0.2
    assert counted.verdict() is None, "of the challenger there is no purchase yet"
    reactions = [reaction(CHALLENGER, f"{CHALLENGER}-{number}", 2, "purchase") for number in range(400)]
    counted.record(Records([], reactions, []))
    assert counted.verdict() == "promote"


def test_shadows_are_compared_with_what_was_shown_and_chosen(results):
    counted = results(shadow=True)
    shadows = [Shadow("r1", ["a", "b", "c", "d"], ["b", "a", "x", "y"]), Shadow("r2", ["a", "b"], ["x", "y"])]
    chosen = [Reaction("u", SHADOW, "r1", "click", "b"), Reaction("u", SHADOW, "r2", "click", "a")]
    counted.record(Records([], [], [*shadows, shadows[0]]))
    counted.record(Records([], [*chosen, chosen[0], Reaction("u", SHADOW, "unknown", "click", "a")], []))
    assert results(shadow=True).summary() == {
        "compared": 2,
        "overlap": pytest.approx(0.25),
        "choices": 2,
        "live": {"found": 1.0, "mrr": pytest.approx(0.75)},
        "challenger": {"found": 0.5, "mrr": pytest.approx(0.5)},
    }


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

    def __init__(self, experiment: Experiment):
        self.record = Remote(experiment.record)


def started(state: Path, **settings: Any) -> tuple[Experiment, Challenger]:
    """The experiment and one replica's challenger."""
    config = prepare_challenger(ChallengerConfig(share=0.5, **settings), str(state))
    experiment = Experiment(str(state), config)
    loaded = load_folder(Path(config.model))
    recommender = Recommender(loaded.encoder, loaded.catalog, loaded.version)
    return experiment, Challenger(config, recommender, InProcess(experiment))


def test_each_arm_is_answered_by_its_model_and_says_so(state, model):
    _, challenger = started(state, model=model)
    live = recommender_of(Registry(state))
    read = [History.of(Event(user, "i3", "click", None, NOW + n) for n in range(2)) for user in USERS[:20]]
    questions = [Question(own, 5) for own in read]
    answers = challenger.answer(live, questions, [*USERS[:19], None])
    assert {answer.arm for answer in answers[:19]} == {LIVE, CHALLENGER}
    assert answers[19].arm is None
    for answer, question in zip(answers, questions, strict=True):
        recommender = challenger.recommender if answer.arm == CHALLENGER else live
        alone = recommender.recommend([question._replace(history=question.history.newest(2))])[0]
        assert [item.item_id for item in answer.items] == [item.item_id for item in alone]
        assert answer.version == recommender.version
        assert answer.version == (1 if answer.arm == CHALLENGER else 3)


def test_a_filter_that_one_model_does_not_know_takes_nobody_part(tmp_path):
    """Neither of the challenger's users nor of the others, who would else be other users."""
    registry = Registry(tmp_path / "live")
    catalog = Catalog(item_ids(24))
    registry.publish_snapshot(tiny_encoder(), catalog, Manifest(version=1), None)
    other = tmp_path / "other"
    save_with_optimizer(other, tiny_encoder(seed=3), catalog, Manifest(), None)
    _, challenger = started(tmp_path / "live", model=str(other))
    live = recommender_of(registry)
    live.catalog_changed({"i1": {"colour": "red"}})  # put a moment ago
    question = Question(history([3]), 5, ItemFilter.of({"colour": "red"}))
    answers = challenger.answer(live, [question] * 20, USERS[:20])
    assert {answer.arm for answer in answers} == {None}
    challenger.catalog_changed({"i1": {"colour": "red"}})
    answers = challenger.answer(live, [question] * 20, USERS[:20])
    assert {answer.arm for answer in answers} == {LIVE, CHALLENGER}
    assert {tuple(item.item_id for item in answer.items) for answer in answers} == {("i1",)}


def show(challenger: Challenger, users: int, rewarded: Callable[[str, int], bool]) -> None:
    """Show each user one answer and have some of them click."""
    for number, user in enumerate(USERS[:users]):
        arm = challenger.config.arm_of(user, challenger.name)
        assert arm is not None
        request_id = challenger.note(f"r{number}", user, Answer(1, [], arm))
        if rewarded(arm, number):
            challenger.react([Event(user, "i1", "click", None, NOW, None, request_id)])
    challenger.react([Event("u", "i1", "click", None, NOW, None, "no answer of this experiment")])


def test_a_winner_is_offered_and_its_arm_goes_on_until_it_is_live(state, model):
    experiment, challenger = started(state, model=model)
    assert asyncio.run(challenger.tell())
    show(challenger, 600, lambda arm, number: number % 10 < (6 if arm == CHALLENGER else 2))
    assert asyncio.run(challenger.tell()), "its users go on being answered by it"
    assert asyncio.run(challenger.tell())
    status = experiment.status()
    assert status["state"] == "promoting"
    assert sum(arm["answers"] for arm in status["arms"].values()) == 600
    registry = Registry(state)
    assert registry.offers() == [experiment.offer]
    learner = NearlineLearner(registry, CONFIG)
    learner.adopt(registry.load_offer(experiment.offer), {"offer": experiment.offer})
    registry.withdraw(experiment.offer)
    assert not asyncio.run(challenger.tell())
    assert (experiment.status()["state"], experiment.status()["version"]) == ("promoted", 4)
    # the whole log is learned by it, as nothing of it is in its weights
    assert (learner.log_offset, learner.encoder.config.hidden_size) == (0, 8)
    restarted = Experiment(str(state), challenger.config)
    assert restarted.record(Records.none()) is False
    assert registry.offers() == []


def test_a_loser_is_given_up(state, model):
    experiment, challenger = started(state, model=model)
    show(challenger, 600, lambda arm, number: number % 10 < (2 if arm == CHALLENGER else 6))
    assert not asyncio.run(challenger.tell())
    assert experiment.status()["state"] == "rolled back"
    assert Registry(state).offers() == []
    assert Experiment(str(state), challenger.config).record(Records.none()) is False


def test_who_only_reports_decides_nothing(state, model):
    experiment, challenger = started(state, model=model, decide=False)
    show(challenger, 600, lambda arm, number: number % 10 < (2 if arm == CHALLENGER else 6))
    assert asyncio.run(challenger.tell())
    status = experiment.status()
    assert (status["state"], status["difference"]["click_through"]["evidence"] > 20) == ("running", True)
    shown = {"model_version": 3, "replicas": [], "learner": {}, "aggregator": {}, "experiment": status}
    families = {family.name: family for family in StatusCollector(shown).collect()}
    answers = {sample.labels["arm"]: sample.value for sample in families["afterclick_arm_answers"].samples}
    assert answers == {arm: status["arms"][arm]["answers"] for arm in (LIVE, CHALLENGER)}
    assert families["afterclick_experiment_evidence"].samples[0].value > 20


def test_a_shadow_is_asked_later_and_never_shown(state, model, monkeypatch):
    experiment, challenger = started(state, model=model, shadow=True)
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
    monkeypatch.setattr("serving.experiment.TELL_SECONDS", 0.0)

    async def one_round() -> None:
        running = asyncio.create_task(challenger.run())
        while experiment.status()["compared"] < len(ids):
            await asyncio.sleep(0.01)
        running.cancel()

    asyncio.run(one_round())
    challenger.react([Event(USERS[0], expected[1], "click", None, NOW, None, ids[0])])
    assert asyncio.run(challenger.tell())
    status = experiment.status()
    assert (status["compared"], status["choices"]) == (len(ids), 1)
    assert status["live"] == {"found": 1.0, "mrr": 0.5}
    assert 0 <= status["overlap"] <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Which models can challenge


def test_a_stored_version_is_copied_before_it_is_pruned(state):
    config = prepare_challenger(ChallengerConfig(model="2"), str(state))
    loaded = load_folder(Path(config.model))
    assert (loaded.version, loaded.log_offset, loaded.facts["events_trained"]) == (2, 1, 1)
    assert loaded.optimizer is not None
    assert prepare_challenger(ChallengerConfig(model="2"), str(state)) == config
    shadow = config.model_copy(update={"shadow": True})
    assert experiment_name(shadow) == experiment_name(config) + "-shadow"


def test_what_cannot_challenge_is_refused(state, model, tmp_path):
    with pytest.raises(InputError, match="challenger: version: 99 is not stored"):
        prepare_challenger(ChallengerConfig(model="99"), str(state))
    with pytest.raises(InputError, match="challenger: model: no folder at"):
        prepare_challenger(ChallengerConfig(model=str(tmp_path / "none")), str(state))
    with pytest.raises(InputError, match="challenger: it needs --state in a folder"):
        prepare_challenger(ChallengerConfig(model=model), "s3://bucket/state")
    registry = Registry(tmp_path / "described")
    catalog = Catalog(item_ids(24))
    catalog.change({"i1": {"genres": "Comedy"}})
    registry.publish_snapshot(tiny_encoder(), catalog, Manifest(version=1), None)
    with pytest.raises(InputError, match=r"^challenger: its catalog has no genres; pretrain it on data"):
        prepare_challenger(ChallengerConfig(model=model), str(tmp_path / "described"))


# ---------------------------------------------------------------------------------------------------------------------
# The running service


def test_a_winner_takes_over_on_the_running_service(service: LiveService) -> None:
    """Its replicas are given a challenger: a version that is stored, whose answers somebody likes better."""
    before = service.wait_until_learned()
    config = ChallengerConfig(model=str(before["model_version"]), share=0.5, effect=0.1)
    arguments = service.arguments.model_copy(update={"challenger": config})
    serve.run(build(arguments), name=APPLICATION, route_prefix="/")
    item = service.items()[0]
    assert "arm" not in service.client.post("/v1/recommendations", json={"history": []}).json()
    answers = [service.recommend(user, 1) for user in USERS[:300]]
    assert {answer["arm"] for answer in answers} == {LIVE, CHALLENGER}
    clicked = [
        {"user_id": user, "item_id": item, "event": "click", "request_id": answer["request_id"]}
        for number, (user, answer) in enumerate(zip(USERS, answers, strict=False))
        if number % 10 < (7 if answer["arm"] == CHALLENGER else 3)
    ]
    assert service.send(*clicked)["accepted"] == len(clicked)
    decided = service.wait_until("it is promoted", lambda status: status["experiment"]["state"] == "promoted")
    assert decided
    after = service.wait_until("one model answers again", lambda _: "arm" not in service.recommend(USERS[0], 1))
    assert after
    status = service.wait_until_learned()
    experiment = status["experiment"]
    assert status["learner"]["base"] == experiment["version"] > before["model_version"]
    assert experiment["arms"]["live"]["answers"] + experiment["arms"]["challenger"]["answers"] >= 300
    assert experiment["difference"]["click_through"]["value"] == pytest.approx(0.4, abs=0.1)
    labels = {sample["arm"] for sample, _ in metrics(service)["afterclick_arm_answers_total"]}
    assert labels == {LIVE, CHALLENGER}
