"""`afterclick finetune`: a new base takes the place of the live weights under traffic, or leaves them as they are."""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import jobs.finetune
from jobs import training_workers
from jobs.command_line import run_command
from jobs.finetune import FOLDER, FinetuneSettings, Outcome, _alone, _origin, finetune, finetune_command
from jobs.pretrain_settings import PretrainSettings
from lib.data.catalog import Catalog
from lib.data.dataset import write_dataset
from lib.data.events import EVENT_SCHEMA, Event
from lib.data.history import History
from lib.data.ratings import RatingScale
from lib.errors import InputError
from lib.live import finetuning
from lib.live.learner import NearlineLearner
from lib.log.feedback import FeedbackLog
from lib.log.layout import ORDER_FILE, LogLayout, read_log
from lib.log.order import LogOrder
from lib.log.reader import FeedbackLogReader
from lib.log.shard import shard_of
from lib.model.encoder import BehaviourEncoder
from lib.model.facts import VersionFacts
from lib.model.folder import Manifest
from lib.model.item_counts import WINDOW, ItemCounts
from lib.ranking.features import FEATURES
from lib.versions.accounts import Accounts
from lib.versions.folder import load_folder, save_with_optimizer
from lib.versions.ledger import check
from lib.versions.offers import Offers
from lib.versions.registry import Registry
from lib.versions.rejections import Rejection, Rejections
from tests.helpers.learners import CONFIG
from tests.helpers.service import LiveService, assert_each_event_once, versions_and_checksums
from tests.helpers.tiny import COUNTED, NOW, SECOND, history, item_ids, micro_batch, started_registry, tiny_encoder
from tests.helpers.traffic import Traffic

SETTINGS = FinetuneSettings(epochs=1, tolerance=2.0, negatives=64)  # NDCG cannot be so much worse


def test_a_new_base_goes_live_without_a_failed_request_and_learning_goes_on(
    mortal_service: LiveService, shop_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Traffic(mortal_service, "finetuned", senders=1, askers=1) as traffic:
        traffic.wait_for(events=200)
        before = mortal_service.status()
        outcome = finetune(mortal_service.state, shop_dataset, settings=SETTINGS, gpu=False)
        live = mortal_service.status()
        traffic.wait_for(events=50, answers=50)
    assert traffic.failures == []
    assert outcome.version is not None
    assert traffic.versions[0] < outcome.version <= traffic.versions[-1]
    assert (outcome.accepted, outcome.since) == (True, before["learner"]["base"])
    assert all(replica["version"] >= outcome.version for replica in live["replicas"])
    assert live["learner"]["base"] == outcome.version
    # what was held out, and what came while it was trained, is learned after it, each event once
    assert_each_event_once(mortal_service, traffic.acknowledged)
    after = mortal_service.wait_until_learned()
    assert versions_and_checksums(after) == [(after["model_version"], after["learner"]["checksum"])] * 2
    registry = Registry(mortal_service.state)
    base = registry.load(outcome.version)
    assert (base.log_offset, base.facts.kind) == (outcome.log_offset, "finetune")
    with FeedbackLogReader(mortal_service.log) as log:
        assert base.facts.events_trained + base.facts.events_rejected == len(
            [logged for logged in log.replay() if logged.offset <= outcome.log_offset]
        )
    assert registry.offers.names() == []
    assert not (mortal_service.state / "finetuning").exists()
    said = capsys.readouterr()
    assert "epoch 1/1  loss" in said.err

    # a rollback behind the base: a version of other weights, whole
    response = mortal_service.client.post("/v1/rollback", json={"version": before["model_version"]})
    restored = response.raise_for_status().json()["model_version"]
    status = mortal_service.status()
    assert [replica["version"] for replica in status["replicas"]] == [restored] * 2
    assert status["learner"]["log_offset"] == after["learner"]["log_offset"]
    mortal_service.wait_until_learned()


# ---------------------------------------------------------------------------------------------------------------------
# Without a service, and without Ray Train, whose place a function takes that makes a result of what it starts from


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A log of two hundred events, all of them learned by a small model."""
    return learned_state(tmp_path / "live")


def learned_state(folder: Path, **settings: int) -> Path:
    """Return the folder with such a log and model; settings of its encoder."""
    registry = started_registry(folder, **settings)
    with FeedbackLog.open(folder / "feedback.sqlite") as log:
        events = [
            Event(f"u{n % 20}", f"i{(n % 20 + n // 20) % 24 + 1}", "click", None, NOW + n * SECOND, str(n))
            for n in range(1, 201)
        ]
        log.append(events).result()
    learner = NearlineLearner(registry, CONFIG)
    for first in range(0, 200, 20):
        histories = [History.of([event]) for event in events[first : first + 20]]
        assert not isinstance(learner.learn(micro_batch(first + 20, histories)), Rejection)
    return folder


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The runs of the workers that there were: where each of them started."""
    runs: list[Path] = []

    def run(*, settings: PretrainSettings, storage: Path, start: Path, **_: Any) -> None:
        runs.append(start)
        loaded = load_folder(start)
        if len(runs) == 1 and settings.seed == 13:
            raise RuntimeError("the power fails")
        if settings.seed == 7:
            loaded.encoder.item_embeddings.weight.data[1:] = 1.0  # all items are alike, and none is found
        save_with_optimizer(storage / "result", loaded.encoder, loaded.catalog, Manifest(), loaded.optimizer)

    monkeypatch.setattr(training_workers, "run_workers", run)
    monkeypatch.setattr(jobs.finetune, "running_ray", nullcontext)
    monkeypatch.setattr(jobs.finetune, "TAKE_OVER_SECONDS", 0.0)
    return runs


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], state: Path) -> Callable[..., tuple[int, str, str]]:
    """`afterclick finetune ...` in this process: status, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            run_command(finetune_command, ["--model", str(state.parent), *map(str, arguments)])
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return run


def test_what_is_worse_is_not_published_and_says_so(command, state, trained, tmp_path):
    before = Registry(state).versions()
    status, out, err = command("--set", "seed=7", "--set", "tolerance=0", "--json", tmp_path / "outcome.json")
    assert status == 1
    assert out.startswith("not published: worse than the live version beyond the tolerance (ndcg@10 ")
    assert out.endswith("; nothing has changed\n")
    assert "fine-tuning version 1 with 180 events" in err
    assert Registry(state).versions() == before
    assert Registry(state).offers.names() == []
    assert not (state / FOLDER).exists()
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    assert (outcome["accepted"], outcome["version"], outcome["rival"], outcome["log_offset"]) == (False, None, 10, 180)
    assert (outcome["events"], outcome["held_out_events"]) == (180, 20)
    assert set(outcome["metrics"]) == {"live", "base", "difference"}
    assert outcome["metrics"]["difference"]["ndcg@10"]["value"] < 0


def test_without_a_learner_the_result_waits_for_one_that_takes_it_over_once(command, state, trained):
    status, out, _ = command("--set", "tolerance=1", "--since", 6)
    assert status == 0
    assert out.startswith("offered (ndcg@10 ")
    registry = Registry(state)
    (name,) = registry.offers.names()
    offered = registry.offers.load(name)
    assert (offered.log_offset, offered.facts.since) == (180, 6)
    assert (offered.facts.events_trained, offered.facts.events_rejected) == (180, 0)
    assert offered.facts.half_life == registry.load(6).facts.half_life == 1000
    learner = NearlineLearner(registry, CONFIG)
    learner.take_over(name)
    assert learner.lineage.facts.half_life == 1000
    assert int(learner.model.encoder.popularity_reference) == learner.log_offset
    assert (learner.version, learner.log_offset, learner.lineage.events_trained) == (12, 180, 180)
    restarted = NearlineLearner(registry, CONFIG)
    assert restarted.lineage.facts.offer == name, "which a learner that died before the offer was gone knows it by"
    with FeedbackLogReader(state / "feedback.sqlite") as log:
        ledger = check(Accounts(registry).newest_lineage(), log)
    assert (ledger.faults, ledger.versions, ledger.events_trained, ledger.waiting) == ([], 7, 180, 20)


def test_the_live_version_may_be_pruned_while_the_workers_train(state, trained, monkeypatch):
    train = training_workers.run_workers

    def run(**arguments: Any) -> None:
        train(**arguments)
        for delta in (state / "deltas").iterdir():
            delta.unlink()

    monkeypatch.setattr(training_workers, "run_workers", run)
    outcome = finetune(state, settings=FinetuneSettings(tolerance=1.0))
    assert (outcome.accepted, outcome.rival) == (True, 10)


def test_what_the_gate_rejected_is_neither_learned_nor_judged_by(state, trained):
    rejected = Rejections(Registry(state).store)
    rejected.add(Rejection(3, 30, 50, 20, 20, "it did harm"))
    rejected.add(Rejection(10, 190, 200, 10, 30, "it did harm"))
    outcome = finetune(state, settings=FinetuneSettings(tolerance=1.0, older_events=0.0))
    (name,) = Registry(state).offers.names()
    facts = Registry(state).offers.load(name).facts
    assert outcome.events + outcome.held_out_events == 170
    learned = outcome.log_offset - 20
    assert (outcome.events, facts.events_trained, facts.events_rejected) == (learned, learned, 20)


def test_two_runs_do_not_work_in_one_folder(command, state, trained):
    with _alone(state):
        status, _, err = command()
    assert (status, trained) == (2, [])
    assert "is being fine-tuned by another process; wait until it has ended" in err
    assert command("--set", "tolerance=1")[0] == 0


def test_a_result_that_the_learner_could_not_use_is_not_offered_again(state, trained, monkeypatch):
    monkeypatch.setattr(Offers, "add", lambda *_: None)  # as if the learner had withdrawn it
    with pytest.raises(RuntimeError, match="the learner could not take the result over"):
        finetune(state, settings=FinetuneSettings(tolerance=1.0))
    assert not (state / FOLDER).exists()


def test_the_next_run_starts_from_the_new_base(state, trained):
    finetune(state, settings=FinetuneSettings(tolerance=1.0))
    registry = Registry(state)
    learner = NearlineLearner(registry, CONFIG)
    (name,) = registry.offers.names()
    learner.take_over(name)
    registry.offers.withdraw(name)
    with pytest.raises(InputError, match=r"^since: 20 events came after version 12, and it takes at least 40"):
        finetune(state)
    assert not (state / FOLDER).exists()


def test_a_killed_run_goes_on_with_what_it_had_planned(state, trained, capsys):
    settings = FinetuneSettings(tolerance=1.0, seed=13)
    with pytest.raises(RuntimeError, match="the power fails"):
        finetune(state, settings=settings)
    plan = (state / FOLDER / "plan.json").read_text()
    with FeedbackLog.open(state / "feedback.sqlite") as log:
        log.append([Event("late", "i1", "click", None, NOW + n, str(n)) for n in range(50)]).result()
    outcome = finetune(state, settings=settings)
    assert json.loads(plan)["cut"]["until"] == outcome.log_offset == 180
    assert Registry(state).offers.names() == [json.loads(plan)["name"]]
    assert "going on with the interrupted run" in capsys.readouterr().err
    assert len(trained) == 2


@pytest.mark.parametrize("taken_over", [False, True])
def test_a_run_that_is_killed_after_its_offer_does_not_offer_again(state, trained, monkeypatch, taken_over):
    settings = FinetuneSettings(tolerance=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(jobs.finetune, "_taken_over", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            finetune(state, settings=settings)
    registry = Registry(state)
    (name,) = registry.offers.names()
    if taken_over:
        NearlineLearner(registry, CONFIG).take_over(name)
        registry.offers.withdraw(name)
    outcome = finetune(state, settings=settings)
    assert outcome.version == (12 if taken_over else None)
    assert registry.offers.names() == ([] if taken_over else [name])
    assert not (state / FOLDER).exists()


def test_feedback_of_several_shards_is_learned_in_their_order(tmp_path, trained):
    folder, layout = tmp_path / "live", LogLayout(aggregators=2)
    registry = started_registry(folder)
    layout.begin(folder)
    logs = [layout.open(folder, shard) for shard in layout.shards()]
    for n in range(1, 201):
        event = Event(f"u{n % 20}", f"i{(n % 20 + n // 20) % 24 + 1}", "click", None, NOW + n * SECOND, str(n))
        logs[shard_of(event.user_id, 2)].append([event]).result()
    learner, order = NearlineLearner(registry, CONFIG), LogOrder(folder / ORDER_FILE)
    for turn in range(40):
        log, shard = logs[turn % 2], turn % 2
        place = order.place(shard)
        events = [logged.event for logged in log.read(place, 10)]
        if events:
            run = order.extend(shard, place, place + len(events))
            learner.learn(micro_batch(run.end, [History.of([event]) for event in events]))
    assert order.end() == learner.log_offset == 200
    outcome = finetune(folder, settings=FinetuneSettings(tolerance=1.0))
    (name,) = registry.offers.names()
    learner.take_over(name)
    assert (learner.log_offset, learner.lineage.events_trained) == (outcome.log_offset, outcome.events)
    with read_log(folder) as log:
        ledger = check(Accounts(registry).newest_lineage(), log)
    assert (ledger.faults, ledger.waiting) == ([], 200 - outcome.log_offset)
    for log in (*logs, order):
        log.close()


@pytest.mark.parametrize("at_once", [finetuning.EVENTS_AT_ONCE, 60], ids=["at once", "in parts"])
def test_what_an_erased_user_added_is_in_no_count_of_the_next_base(tmp_path, trained, monkeypatch, at_once):
    state = learned_state(tmp_path / "live", neighbours=24, ranker_features=len(FEATURES))  # no list is ever full
    monkeypatch.setattr(finetuning, "EVENTS_AT_ONCE", at_once)
    registry = Registry(state)
    expected = registry.load(1).encoder.counts
    assert expected is not None
    before = registry.load().encoder.counts
    assert before is not None
    with FeedbackLog.open(state / "feedback.sqlite") as log:
        assert log.erase("u3") == 10
    outcome = finetune(state, settings=SETTINGS)
    with FeedbackLogReader(state / "feedback.sqlite") as log:
        histories: dict[str, list[int]] = {}
        for entry in log.replay():
            if entry.offset > outcome.log_offset:
                break
            rows = histories.setdefault(entry.event.user_id, [])
            context = np.zeros((1, WINDOW), dtype=np.int64)
            newest = list(dict.fromkeys(rows[::-1]))[:WINDOW]
            context[0, : len(newest)] = newest
            rows.append(int(entry.event.item_id.removeprefix("i")))
            expected.count(context, np.array(rows[-1:]), np.ones(1), np.array([entry.offset]))
    [name] = registry.offers.names()
    counts = registry.offers.load(name).encoder.counts
    assert counts is not None
    assert "u3" not in histories
    assert float(counts.events.sum()) == sum(map(len, histories.values())) < float(before.events.sum())
    for kind in ("next", "together"):
        assert pairs_of(counts, kind) == pytest.approx(pairs_of(expected, kind), rel=1e-5)
    for counted in ("events", "followed", "trends", "counted_at", "first_at"):
        assert torch.allclose(getattr(counts, counted).double(), getattr(expected, counted).double(), rtol=1e-5)


@pytest.mark.parametrize("stored", [True, False], ids=["at the cut", "nowhere but at the end"])
def test_the_next_base_keeps_what_the_ranker_has_learned_live(tmp_path, trained, stored):
    state = learned_state(tmp_path / "live", **COUNTED)
    registry = Registry(state)
    if not stored:
        learner = NearlineLearner(registry, CONFIG)
        learner.lineage.save_snapshot(learner.model)
        for delta in sorted((state / "deltas").iterdir())[:-1]:
            delta.unlink()
    outcome = finetune(state, settings=SETTINGS)
    assert outcome.rival == (10 if stored else 11)
    [name] = registry.offers.names()
    learner = NearlineLearner(registry, CONFIG)
    learner.take_over(name)
    first, rival, offered, adopted = (
        ranker_of(encoder)
        for encoder in (
            registry.load(1).encoder,
            registry.load(outcome.rival).encoder,
            registry.offers.load(name).encoder,
            learner.model.encoder,
        )
    )
    assert rival["weights"] != first["weights"]
    assert rival["steps"] > [0]
    assert rival == offered == adopted


def ranker_of(encoder: BehaviourEncoder) -> dict[str, list]:
    assert encoder.ranker is not None
    return {name: tensor.tolist() for name, tensor in encoder.ranker.state_dict().items()}


def test_counts_begin_with_the_version_itself_where_its_lineage_began_with_other_items(tmp_path):
    registry = Registry(learned_state(tmp_path / "live", neighbours=4, ranker_features=len(FEATURES)))
    learner = NearlineLearner(registry, CONFIG)
    assert _origin(registry, registry.load(5)).version == 1
    facts = VersionFacts(kind="promotion")
    won = tiny_encoder(24, neighbours=4, ranker_features=len(FEATURES))
    save_with_optimizer(tmp_path / "won", won, Catalog(item_ids(24)[::-1]), Manifest(facts=facts), None)
    registry.offers.add("won", tmp_path / "won")
    learner.take_over("won")
    promoted = learner.version
    learner.learn(micro_batch(200, [history([1, 2, 3])]))
    learner.restore(5)  # what these weights have not learned of the log was learned by others
    assert registry.load().catalog.item_ids[1] == "i1"
    assert Accounts(registry).origin_of(learner.version) == promoted
    assert _origin(registry, registry.load()).version == learner.version


def pairs_of(counts: ItemCounts, kind: str) -> dict[tuple[int, int], float]:
    """Return what is counted of each pair."""
    rows, values = getattr(counts, f"{kind}_rows"), getattr(counts, f"{kind}_counts")
    owners, places = (rows > 0).nonzero(as_tuple=True)
    return {
        (owner, other): value
        for owner, other, value in zip(
            owners.tolist(), rows[owners, places].tolist(), values[owners, places].tolist(), strict=True
        )
    }


def test_a_job_that_repeats_outlives_a_run_that_fails(state, trained, monkeypatch, capsys):
    waited: list[float] = []
    plan = jobs.finetune._plan

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            monkeypatch.setattr(jobs.finetune, "_plan", fail)
        if len(waited) == 3:
            monkeypatch.setattr(jobs.finetune, "_plan", plan)
        if len(waited) == 4:
            raise KeyboardInterrupt

    def fail(*arguments: Any) -> None:
        raise OSError("the disk is full")

    # its own clock alone: other threads of this process sleep, too
    clock = SimpleNamespace(monotonic=time.monotonic, time_ns=time.time_ns, sleep=wait)
    monkeypatch.setattr(jobs.finetune, "time", clock)
    with pytest.raises(SystemExit) as end:
        run_command(
            finetune_command,
            ["--model", str(state.parent), "--every", "24", "--set", "seed=13", "--set", "tolerance=1"],
        )
    assert end.value.code == 130
    said = capsys.readouterr()
    assert "failed: the power fails\n" in said.err
    assert "failed: the disk is full\n" in said.err
    assert said.out.count("offered (") == 2
    assert all(24 * 3600 - 60 < seconds <= 24 * 3600 for seconds in waited)


def test_feedback_of_strangers_alone_is_refused(state, trained):
    """Whose every event is their first: there is nothing to learn from, and nothing to judge by."""
    with FeedbackLog.open(state / "feedback.sqlite") as log:
        log.append([Event(f"new-{n}", "i1", "click", None, NOW + n, str(n)) for n in range(50)]).result()
    with pytest.raises(InputError, match=r"^since: no event follows another one of its user; wait for more feedback"):
        finetune(state, since=11)
    assert not (state / FOLDER).exists()
    assert trained == []


@pytest.mark.parametrize(
    ("arguments", "beginning"),
    [
        (["--since", "99"], "error: version: 99 is not stored"),
        (["--state", "/nowhere"], "error: state: /nowhere has no feedback log; serve the model"),
        (["--every", "24", "--state", "/nowhere"], "error: state: /nowhere has no feedback log"),
        (["--every", "-1"], "error: every: -1.0 is no number of hours"),
        (["--data", "/nowhere"], "error: data '/nowhere' does not exist"),
        (["--set", "epochs=0"], "error: epochs: input should be greater than or equal to 1, got 0"),
        (["--set", "held_out=0.9"], "error: held_out: input should be less than or equal to 0.5, got 0.9"),
        (["--set", "epoch=3"], "error: epoch: no such setting, did you mean epochs?"),
    ],
)
def test_bad_input_is_one_line(command, state, trained, arguments, beginning):
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith(beginning)
    assert err.count("\n") == 1
    assert not (state / FOLDER).exists()
    assert trained == []


def test_a_dataset_of_another_rating_scale_is_refused(command, state, trained, tmp_path):
    rating = {"user_id": "ann", "item_id": "i1", "event": "rating", "value": 4.0, "timestamp": NOW}
    write_dataset(tmp_path / "tens", pa.Table.from_pylist([rating], EVENT_SCHEMA), None, RatingScale(1.0, 10.0))
    status, out, err = command("--data", tmp_path / "tens")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: data: the ratings of {tmp_path / 'tens'} are on the scale 1-10, and those of the")
    assert "model on 1-5; ingest the data with --rating-scale 1-5 if that is theirs, or pretrain a model" in err
    assert not (state / FOLDER).exists()
    assert trained == []


def test_a_sentence_for_a_person():
    metric = {"ndcg@10": {"value": 0.25}}
    metrics = {name: metric for name in ("live", "base", "difference")}
    outcome = Outcome(1, 9, 500, 50, 450, metrics, accepted=True, version=12, seconds=1.0)
    expected = (
        "version 12 is live, fine-tuned with 500 events (ndcg@10 0.2500 against 0.2500 of version 9 on 50 events)"
    )
    assert outcome.sentence() == expected
