"""The ledger holds of a sound lineage, and of no lineage that learned an event twice, or not at all."""

import json
from dataclasses import dataclass

import pytest

from jobs.command_line import run_command
from jobs.versions import versions_command
from lib.feedback_log import FeedbackLog
from lib.learner import LearnerConfig, NearlineLearner
from lib.ledger import Account, Ledger, check, folded, lineage
from lib.registry import Registry
from lib.weights import Delta
from serving.aggregator import LOG_FILE
from tests.test_feedback_log import make_event
from tests.tiny import history, micro_batch, started_registry

CONFIG = LearnerConfig(negatives=8, held_out_users=0, snapshot_every=1000)
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
    config = LearnerConfig(negatives=8, held_out_users=0, snapshot_every=2, keep_snapshots=2)
    with FeedbackLog(tmp_path / "log") as log:
        for updates in (5, 6):
            learner = learned(registry, log, updates, config)
            ledger = check(Registry(registry.root).ledger(), log)
            assert ledger.faults == []
            assert ledger.versions == ledger.version == learner.version
            assert (ledger.log_offset, ledger.events_trained) == (log.last_offset(), log.count())
        assert registry.deltas()[0] > 6
        assert len(registry.ledger()) < 6


def test_a_doctored_registry_is_found(tmp_path):
    registry = started_registry(tmp_path / "store")
    with FeedbackLog(tmp_path / "log") as log:
        learned(registry, log, 4)
        assert check(registry.ledger(), log).faults == []
        path = tmp_path / "store" / "deltas" / "0000000003"
        whole = Delta.from_bytes(path.read_bytes())
        for offset, fault in ((3, "version 3, offsets 3 to 3: overlap"), (5, "version 3, offsets 3 to 5: gap")):
            whole.log_offset = offset
            path.write_bytes(whole.to_bytes())
            assert any(fault in found for found in check(Registry(registry.root).ledger(), log).faults)
        path.unlink()
        assert check(Registry(registry.root).ledger(), log).faults == ["version 4: its parent 3 is missing"]


def test_the_command_says_so_and_fails_on_a_fault(tmp_path, capsys):
    def afterclick_versions() -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            run_command(versions_command, ["--model", str(tmp_path), "--check", "--json", str(tmp_path / "check.json")])
        return int(end.value.code or 0), "".join(capsys.readouterr())

    assert afterclick_versions()[0] == 2
    registry = started_registry(tmp_path / "live")
    with FeedbackLog(tmp_path / "live" / LOG_FILE) as log:
        learned(registry, log, 2)
        status, output = afterclick_versions()
        assert (status, output.strip().splitlines()[-1][-15:]) == (0, "each event once")
        learner = NearlineLearner(registry, CONFIG)
        learner.learn(micro_batch(4, [history([1, 2])]))  # an event that was learned before
        status, output = afterclick_versions()
        assert status == 1
        assert "fault: version 4, offsets 5 to 4: overlap, 1 events trained on" in output
        assert json.loads((tmp_path / "check.json").read_text())["faults"] != []
