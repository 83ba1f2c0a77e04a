"""The ledger holds of a sound lineage, and of no lineage that learned an event twice, or not at all."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobs.command_line import run_command
from jobs.versions import versions_command
from lib.live.gate import GateConfig
from lib.live.learner import NearlineLearner, Rejection
from lib.live.settings import LearnerConfig
from lib.log.backend import LOG_FILE
from lib.log.feedback import FeedbackLog
from lib.model.delta import Delta
from lib.model.facts import VersionFacts
from lib.model.folder import Manifest, read_manifest, write_manifest
from lib.versions.accounts import Accounts
from lib.versions.folder import save_with_optimizer
from lib.versions.ledger import Account, Ledger, check, folded, lineage
from lib.versions.registry import Registry
from tests.helpers.logs import make_event
from tests.helpers.tiny import history, micro_batch, started_registry

CONFIG = LearnerConfig(negatives=8, gate=GateConfig(held_out_users=0), snapshot_every=1000)
SOUND = [
    Account(1, None, 0, 0, 0, 0),
    Account(2, 1, 10, 10, 0, 10),
    Account(3, 2, 30, 25, 5, 15),  # after an update that was rejected
    Account(4, 3, 30, 25, 5, 0),  # a rollback, or items
    Account(9, 4, 37, 32, 5, 7),  # 5 to 8 were lost
]


@dataclass
class NumbersOfALog:
    """A log that holds all of its offsets but the first few."""

    erased: int = 0

    def count(self, after: int = 0, up_to: int | None = None) -> int:
        return max((self.last_offset() if up_to is None else up_to) - max(after, self.erased), 0)

    def last_offset(self) -> int:
        return 40


def checked(*accounts: Account, erased: int = 0) -> Ledger:
    return check(accounts, NumbersOfALog(erased))


def changed(place: int, **fields: int) -> list[Account]:
    return [*SOUND[:place], SOUND[place]._replace(**fields), *SOUND[place + 1 :]]


def test_a_sound_lineage_has_every_event_once():
    ledger = checked(*SOUND)
    assert ledger.faults == []
    assert (ledger.version, ledger.versions, ledger.log_offset) == (9, 5, 37)
    assert ledger.events_trained + ledger.events_rejected == 37
    assert (ledger.erased, ledger.waiting) == (0, 3)
    assert str(ledger).endswith("32 events trained on, 5 rejected by the gate, 0 erased, 3 waiting; each event once")


@pytest.mark.parametrize(
    ("accounts", "fault"),
    [
        (changed(1, events=9, events_trained=9), "version 2, offsets 1 to 10: gap, 9 events"),
        (changed(1, log_offset=11), "version 2, offsets 1 to 11: gap, 10 events"),
        (changed(1, log_offset=9), "version 2, offsets 1 to 9: overlap, 10 events"),
        (changed(2, events_rejected=6), "version 3, offsets 11 to 30: overlap, 15 events trained on and 6"),
        (changed(2, events_rejected=4), "version 3, offsets 11 to 30: gap"),
        (changed(3, log_offset=29), "version 4: overlap, it goes back from offset 30 of version 3 to 29"),
        (changed(4, events=8), "version 9, offsets 31 to 37: its counts rose by 7 and 0, but it says"),
        (changed(3, events_trained=24), "version 4, offsets 31 to 30: its counts rose by -1"),
        (SOUND[1:], "version 2: its parent 1 is missing"),
        (changed(4, log_offset=42, events_trained=37, events=12), "up to offset 42, the log ends at 40"),
    ],
)
def test_a_gap_an_overlap_and_a_wrong_count_are_found(accounts, fault):
    assert any(fault in found for found in checked(*accounts).faults)


def test_erased_events_may_have_been_learned_or_not():
    assert checked(*SOUND, erased=8).faults == []
    unlearned = [account._replace(events_trained=max(account.events_trained - 6, 0)) for account in SOUND]
    unlearned[1] = unlearned[1]._replace(events=4)
    assert checked(*unlearned, erased=8).faults == []
    assert checked(*unlearned, erased=5).faults != []
    assert checked(*unlearned, erased=8).erased == 8


def test_a_lineage_follows_the_parents():
    accounts = {account.version: account for account in [*SOUND, Account(5, 4, 36, 31, 5, 6)]}
    assert lineage(accounts, 9) == SOUND
    del accounts[3]
    assert lineage(accounts, 9) == SOUND[3:]
    assert lineage({2: Account(2, 2, 0, 0, 0, 0)}, 2) == [Account(2, 2, 0, 0, 0, 0)]


def test_sound_steps_fold_into_one_and_others_stay_to_be_seen():
    assert folded(SOUND, 4) == [SOUND[0], Account(4, 1, 30, 25, 5, 25, 3)]
    assert folded(SOUND, 2) == SOUND[:2]
    again = folded([*folded(SOUND, 4), SOUND[4]], 9)
    assert again == [SOUND[0], Account(9, 1, 37, 32, 5, 32, 4)]
    assert checked(*again) == checked(*SOUND)
    doctored = changed(2, events_rejected=4)
    assert len(folded(doctored, 9)) == 5
    assert checked(*folded(doctored, 9)).faults == checked(*doctored).faults


def test_a_base_starts_a_lineage_that_has_learned_all_up_to_its_offset():
    assert checked(Account(7, None, 20, 18, 2, 0), Account(8, 7, 25, 23, 2, 5)).faults == []
    assert checked(Account(7, None, 20, 10, 0, 0), erased=10).faults == []
    assert checked(Account(7, None, 20, 17, 2, 0)).faults == [
        "version 7, offsets 1 to 20: gap, 17 events trained on and 2 rejected of 20"
    ]
    assert "overlap, 19 events trained on and 2" in checked(Account(7, None, 20, 19, 2, 0)).faults[0]


def test_what_is_still_stored_is_not_folded():
    chain = [SOUND[0], *(Account(n, n - 1, n - 1, n - 1, 0, 1) for n in range(2, 8))]
    assert [account.version for account in folded(chain, 7, stored=[4])] == [1, 4, 7]
    assert checked(*folded(chain, 7, stored=[4])) == checked(*chain)


# ---------------------------------------------------------------------------------------------------------------------
# Of a real registry and a real log


def learned(registry: Registry, log: FeedbackLog, updates: int, config: LearnerConfig = CONFIG) -> NearlineLearner:
    """Updates of two events each, from a learner that is restarted before every one of them."""
    learner = NearlineLearner(registry, config)
    for _ in range(updates):
        learner = NearlineLearner(registry, config)
        last = learner.log_offset + 2
        log.append([make_event(last - 1), make_event(last)]).result()
        assert isinstance(learner.learn(micro_batch(last, [history([1, 2, 3])], [2])), Delta)
    return learner


def test_the_ledger_of_stored_versions_outlives_their_files(tmp_path):
    registry = started_registry(tmp_path / "store")
    config = LearnerConfig(negatives=8, gate=GateConfig(held_out_users=0), snapshot_every=2, keep_bytes=1)
    with FeedbackLog.open(tmp_path / "log") as log:
        for updates in (5, 6):
            learner = learned(registry, log, updates, config)
            ledger = check(Accounts(Registry(registry.store.root)).newest_lineage(), log)
            assert ledger.faults == []
            assert ledger.versions == ledger.version == learner.version
            assert (ledger.log_offset, ledger.events_trained) == (log.last_offset(), log.count())
        assert registry.deltas()[0] > 6
        assert len(Accounts(registry).newest_lineage()) < 6


def offer(registry: Registry, folder: Path, name: str, since: int, events: int, log_offset: int) -> None:
    """A model that was fine-tuned from a version with so many events, up to this log offset."""
    start = registry.load(since)
    facts = VersionFacts(
        kind="finetune", since=since, events=events, events_trained=start.facts.events_trained + events
    )
    save_with_optimizer(folder, start.encoder, start.catalog, Manifest(log_offset=log_offset, facts=facts), None)
    registry.offers.add(name, folder)


@pytest.mark.parametrize("keep_bytes", [10**9, 1])  # without pruning, and with it
def test_the_lineage_of_a_new_base_has_every_event_once(tmp_path, keep_bytes):
    registry = started_registry(tmp_path / "store")
    config = CONFIG.model_copy(update={"snapshot_every": 2, "keep_bytes": keep_bytes})

    def sound() -> Ledger:
        ledger = check(Accounts(Registry(registry.store.root)).newest_lineage(), log)
        assert ledger.faults == []
        return ledger

    with FeedbackLog.open(tmp_path / "log") as log:
        learned(registry, log, 4, config)
        offer(registry, tmp_path / "one", "one", since=1, events=6, log_offset=6)
        learner = NearlineLearner(registry, config)
        learner.take_over("one")
        assert (learner.version, learner.log_offset, learner.lineage.events_trained) == (6, 6, 6)
        ledger = sound()
        assert (ledger.versions, ledger.log_offset, ledger.waiting) == (2, 6, 2)
        learner.learn(micro_batch(8, [history([1, 2, 3])], [2]))  # what was held out
        learner = learned(registry, log, 6, config)
        assert (sound().log_offset, sound().waiting) == (20, 0)
        offer(registry, tmp_path / "two", "two", since=6, events=12, log_offset=18)
        learner.take_over("two")
        assert sound().waiting == 2
        learner.restore(13)  # whose weights have learned what the new base has not
        assert (sound().log_offset, sound().waiting) == (20, 0)
        learned(registry, log, 7, config)
        assert sound().events_trained == log.count() == 34
        offer(registry, tmp_path / "three", "three", since=15, events=13, log_offset=34)
        NearlineLearner(registry, config).take_over("three")
        found = check(Accounts(registry).newest_lineage(), log).faults
        assert found == ["version 23, offsets 21 to 34: gap, 13 events trained on and 0 rejected of 14"]


def test_the_version_with_which_the_lineage_began_is_kept(tmp_path):
    registry = started_registry(tmp_path / "store")
    config = CONFIG.model_copy(update={"snapshot_every": 2, "keep_bytes": 1})
    with FeedbackLog.open(tmp_path / "log") as log:
        learner = learned(registry, log, 3, config)
        promoted = registry.load(1)  # pretrained elsewhere, and winner of an experiment
        facts = VersionFacts(kind="promotion")
        save_with_optimizer(tmp_path / "won", promoted.encoder, promoted.catalog, Manifest(facts=facts), None)
        registry.offers.add("won", tmp_path / "won")
        learner.take_over("won")
        origin = learner.version
        assert (learner.lineage.parent, learner.log_offset) == (None, 0)
        offer(registry, tmp_path / "tuned", "tuned", since=origin, events=4, log_offset=4)
        learner.take_over("tuned")
        base = learner.version
        for number in range(20):
            learner.learn(micro_batch(5 + number, [history([1, 2, 3])]))
        assert Accounts(registry).origin_of(registry.load().version) == origin
        assert {1, origin, base} <= set(registry.snapshots())
        assert len(registry.snapshots()) <= 5


def test_a_base_whose_parent_was_deleted_starts_a_lineage_of_its_own(tmp_path):
    registry = started_registry(tmp_path / "store")
    config = CONFIG.model_copy(update={"snapshot_every": 2, "keep_bytes": 1})
    with FeedbackLog.open(tmp_path / "log") as log:
        learned(registry, log, 2, config)
        offer(registry, tmp_path / "late", "late", since=3, events=4, log_offset=8)
        learner = learned(registry, log, 8, config)
        assert Accounts(registry).origin_of(3) is None
        learner.take_over("late")
        assert (learner.lineage.parent, learner.log_offset) == (None, 8)
        ledger = check(Accounts(registry).newest_lineage(), log)
        assert (ledger.faults, ledger.versions, ledger.waiting) == ([], 1, 12)


def test_what_the_gate_rejected_of_other_weights_says_nothing_of_a_new_base(tmp_path):
    registry = started_registry(tmp_path / "store")
    with FeedbackLog.open(tmp_path / "log") as log:
        learned(registry, log, 2)
        log.append([make_event(5), make_event(6)]).result()
        learner = NearlineLearner(registry, CONFIG.model_copy(update={"learning_rate": 1e38}))
        assert isinstance(learner.learn(micro_batch(6, [history([1, 2, 3])], [2])), Rejection)
        offer(registry, tmp_path / "other", "other", since=1, events=2, log_offset=2)
        manifest = read_manifest(tmp_path / "other").model_copy(update={"version": learner.version})
        write_manifest(tmp_path / "other", manifest)
        registry.offers.add("other", tmp_path / "other")
        learner = NearlineLearner(registry, CONFIG)
        assert (learner.log_offset, learner.lineage.events_rejected) == (6, 2)
        learner.take_over("other")
        for taken in (learner, NearlineLearner(registry, CONFIG)):
            assert (taken.version, taken.log_offset, taken.lineage.events_trained, taken.lineage.events_rejected) == (
                4,
                2,
                2,
                0,
            )
        assert check(Accounts(registry).newest_lineage(), log).faults == []


def test_a_doctored_registry_is_found(tmp_path):
    registry = started_registry(tmp_path / "store")
    with FeedbackLog.open(tmp_path / "log") as log:
        learned(registry, log, 4)
        assert check(Accounts(registry).newest_lineage(), log).faults == []
        path = tmp_path / "store" / "deltas" / "0000000003"
        whole = Delta.from_bytes(path.read_bytes())
        for offset, fault in ((3, "version 3, offsets 3 to 3: overlap"), (5, "version 3, offsets 3 to 5: gap")):
            whole.log_offset = offset
            path.write_bytes(whole.to_bytes())
            assert any(
                fault in found for found in check(Accounts(Registry(registry.store.root)).newest_lineage(), log).faults
            )
        path.unlink()
        assert check(Accounts(Registry(registry.store.root)).newest_lineage(), log).faults == [
            "version 4: its parent 3 is missing"
        ]


def test_the_command_says_so_and_fails_on_a_fault(tmp_path, capsys):
    def afterclick_versions() -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            run_command(versions_command, ["--model", str(tmp_path), "--check", "--json", str(tmp_path / "check.json")])
        return int(end.value.code or 0), "".join(capsys.readouterr())

    assert afterclick_versions()[0] == 2
    registry = started_registry(tmp_path / "live")
    with FeedbackLog.open(tmp_path / "live" / LOG_FILE) as log:
        learned(registry, log, 2)
        status, output = afterclick_versions()
        assert (status, output.strip().splitlines()[-1][-15:]) == (0, "each event once")
        learner = NearlineLearner(registry, CONFIG)
        learner.learn(micro_batch(4, [history([1, 2])]))  # an event that was learned before
        status, output = afterclick_versions()
        assert status == 1
        assert "fault: version 4, offsets 5 to 4: overlap, 1 events trained on" in output
        assert json.loads((tmp_path / "check.json").read_text())["faults"] != []
