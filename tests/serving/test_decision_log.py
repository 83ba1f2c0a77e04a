"""Explored answers are kept as they were shown, with what their propensities need to be used."""

import json
from pathlib import Path

import pytest

from lib.errors import InputError
from lib.ranking.recommender import RankedItem
from serving.decision_log import DecisionLog

SHOWN = [RankedItem("a", 0.5, None, 0.25), RankedItem("b", 0.4, None, 1.0)]


def test_every_answer_is_a_line_that_can_be_read_at_once(tmp_path):
    log = DecisionLog(str(tmp_path), "replica-1", 1_000_000)
    log.append("first", "user", 7, SHOWN)
    log.append("second", None, 8, [], "challenger")
    DecisionLog(str(tmp_path), "replica-1", 1_000_000).append(
        "third", "user", 9, SHOWN[:1]
    )  # a restarted replica goes on
    lines = [json.loads(line) for line in (tmp_path / "decisions" / "replica-1-000001.jsonl").read_text().splitlines()]
    assert [line["request_id"] for line in lines] == ["first", "second", "third"]
    assert lines[0]["items"] == ["a", "b"]
    assert [line["arm"] for line in lines] == [None, "challenger", None]
    assert lines[0]["scores"] == [0.5, 0.4]
    assert lines[0]["propensities"] == [0.25, 1.0]
    assert (lines[0]["user_id"], lines[0]["model_version"], lines[1]["user_id"]) == ("user", 7, None)


def requests_in(folder: Path) -> list[str]:
    """The ids of what is recorded, in the order of the files."""
    files = sorted(folder.glob("*.jsonl"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    return [json.loads(line)["request_id"] for path in files for line in path.read_text().splitlines()]


def test_the_files_of_all_replicas_together_stay_within_their_room(tmp_path):
    folder, room = tmp_path / "decisions", 20_000
    gone = DecisionLog(str(tmp_path), "gone", room)
    for number in range(30):
        gone.append(f"gone-{number}", "user", 7, SHOWN)
    log = DecisionLog(str(tmp_path), "replica", room)
    for number in range(400):
        log.append(f"{number}", "user", 7, SHOWN)
        assert sum(path.stat().st_size for path in folder.iterdir()) <= room
    kept = requests_in(folder)
    assert kept == [f"{number}" for number in range(400 - len(kept), 400)]  # the newest, and none is lost in between
    assert len(kept) > 50
    assert log.unrecorded == 0


def test_a_file_that_another_replica_deleted_is_begun_anew(tmp_path):
    log = DecisionLog(str(tmp_path), "replica", 1_000_000)
    log.append("first", "user", 7, SHOWN)
    for path in (tmp_path / "decisions").iterdir():
        path.unlink()
    log.append("second", "user", 7, SHOWN)
    assert requests_in(tmp_path / "decisions") == ["second"]


def test_a_state_that_is_no_folder_cannot_keep_them():
    with pytest.raises(InputError, match=r"^exploration_temperature: .*folder"):
        DecisionLog("s3://bucket/state", "replica-1", 1_000_000)
