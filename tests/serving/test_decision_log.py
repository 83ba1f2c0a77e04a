"""Explored answers are kept as they were shown, with what their propensities need to be used."""

import json

import pytest

from lib.errors import InputError
from lib.ranking.recommender import RankedItem
from serving.decision_log import DecisionLog

SHOWN = [RankedItem("a", 0.5, None, 0.25), RankedItem("b", 0.4, None, 1.0)]


def test_every_answer_is_a_line_that_can_be_read_at_once(tmp_path):
    log = DecisionLog(str(tmp_path), "replica-1")
    log.append("first", "user", 7, SHOWN)
    log.append("second", None, 8, [], "challenger")
    DecisionLog(str(tmp_path), "replica-1").append("third", "user", 9, SHOWN[:1])  # a restarted replica goes on
    lines = [json.loads(line) for line in (tmp_path / "decisions" / "replica-1.jsonl").read_text().splitlines()]
    assert [line["request_id"] for line in lines] == ["first", "second", "third"]
    assert lines[0]["items"] == ["a", "b"]
    assert [line["arm"] for line in lines] == [None, "challenger", None]
    assert lines[0]["scores"] == [0.5, 0.4]
    assert lines[0]["propensities"] == [0.25, 1.0]
    assert (lines[0]["user_id"], lines[0]["model_version"], lines[1]["user_id"]) == ("user", 7, None)


def test_a_state_that_is_no_folder_cannot_keep_them():
    with pytest.raises(InputError, match=r"^exploration_temperature: .*folder"):
        DecisionLog("s3://bucket/state", "replica-1")
