"""afterclick replay: the arms as Ray tasks, and the same stream through a running service."""

import asyncio
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.command_line import BAD_INPUT, run_command
from jobs.replay import ReplaySettings, replay_command, run_replay
from jobs.replay_service import send_stream, through_service
from lib.data.dataset import read_events, write_dataset
from lib.data.events import EVENT_SCHEMA
from lib.errors import InputError
from lib.live.prequential import MISSED, Stream, split_by_time
from tests.helpers.service import LiveService, RaySession

SHARE = 0.85  # a short stream


@pytest.fixture(scope="module")
def folder(small_model: Path, shop_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an earlier replay of the shop has left: the oldest events and a model."""
    folder = tmp_path_factory.mktemp("replay")
    (folder / "oldest").mkdir()
    pq.write_table(split_by_time(read_events(shop_dataset), SHARE).oldest, folder / "oldest" / "events.parquet")
    shutil.copytree(small_model, folder / "model")
    return folder


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        run_command(replay_command, arguments)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.mark.slow
def test_arms_side_by_side(ray_session: RaySession, folder: Path, shop_dataset: Path, tmp_path: Path, capsys) -> None:
    written, plot = tmp_path / "replay.json", tmp_path / "replay.png"
    arms = [f"--arm={name}" for name in ("batch", "history", "live", "finetune")]
    given = ["--data", str(shop_dataset), "--out", str(folder), "--json", str(written), "--plot", str(plot)]
    assert run(*given, *arms, "--set", "finetune_epochs=1", "--set", f"share={SHARE}") == 0
    replay = json.loads(written.read_text())
    stream = split_by_time(read_events(shop_dataset), SHARE)
    answered = int(stream.targets.sum())  # dislikes and skips are learned, and not asked for
    assert replay["events"] == answered < len(stream.newest)
    assert [arm["name"] for arm in replay["arms"]] == ["batch", "history", "live", "finetune"]
    batch, history, live, finetune = replay["arms"]
    for arm in replay["arms"]:
        for metric in ("hr@10", "ndcg@10", "mrr"):
            low, high = arm["all"][metric]["interval"]
            assert low <= arm["all"][metric]["value"] <= high
    assert batch["all"]["ndcg@10"]["value"] < history["all"]["ndcg@10"]["value"]
    assert live["version"] + live["rejected_updates"] == 1 + -(-len(stream.newest) // ReplaySettings().batch_events)
    assert "lift_over_history" in live
    assert finetune["fine_tunes"] > 0 < finetune["events_read"]
    assert {len(points) for points in live["over_time"].values()} == {len(replay["times"])}
    assert plot.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr()
    assert "each scored before it is learned" in " ".join(shown.out.split())
    assert f"live: {answered:,} events answered" in shown.err


def test_bad_input_is_refused_before_anything_is_trained(folder: Path, shop_dataset: Path, tmp_path: Path, capsys):
    assert run("--data", str(shop_dataset), "--arm", "weekly") == BAD_INPUT
    assert "arm: weekly; there are batch, history, live, finetune" in capsys.readouterr().err
    assert run("--data", str(shop_dataset), "--set", "share=1.5") == BAD_INPUT
    assert "share: input should be less than 1, got 1.5" in capsys.readouterr().err
    assert run("--data", str(shop_dataset), "--plot", "x.svg") == BAD_INPUT
    with pytest.raises(InputError, match="is not the oldest part of"):
        run_replay(shop_dataset, folder, ReplaySettings(share=0.5), ["batch"])


def test_the_stream_goes_through_a_service(service: LiveService) -> None:
    known = service.items()[:6]
    events = read_events(service.arguments.data or "")
    rows = []
    for number in range(20):
        for place, item in enumerate([known[number % 6], known[(number + 1) % 6], f"unheard of {number}"]):
            times = {"timestamp": 1_700_000_000_000 + 1000 * (3 * number + place)}
            row = {"user_id": f"replayed-{number}", "item_id": item, "event": "click", "value": None}
            rows.append(row | times | {"event_id": None, "request_id": None})
    newest = events.slice(0, 0).from_pylist(rows, events.schema)
    before = service.status()["aggregator"]["events"]
    outcome = asyncio.run(send_stream(service.url, Stream(events, newest)))
    status = service.wait_until_learned()
    assert status["aggregator"]["events"] - before == 60
    assert outcome.facts["events_trained"] >= 60
    ranks = outcome.ranks.reshape(20, 3)
    assert (ranks[:, 2] == MISSED).all()
    assert ((ranks[:, :2] < 100) | (ranks[:, :2] == MISSED)).all()
    assert (ranks[:, 0] < 20).mean() > 0.9  # of whom nothing is known: what is popular comes first
    exported = service.export("replayed-3")
    assert [event["item_id"] for event in exported] == [known[3], known[4], "unheard of 3"]


def test_nothing_is_asked_of_a_service_for_what_people_turn_down(service: LiveService) -> None:
    known, kinds = service.items()[:4], ("click", "dislike", "skip", "click")
    rows = [
        {
            "user_id": "picky",
            "item_id": item,
            "event": kind,
            "value": None,
            "timestamp": 1_700_000_000_000 + 1000 * place,
        }
        for place, (item, kind) in enumerate(zip(known, kinds, strict=True))
    ]
    events = read_events(service.arguments.data or "")
    absent = dict.fromkeys(set(events.schema.names) - rows[0].keys())
    newest = events.slice(0, 0).from_pylist([row | absent for row in rows], events.schema)
    outcome = asyncio.run(send_stream(service.url, Stream(events, newest)))
    service.wait_until_learned()
    assert len(outcome.ranks) == 2
    assert outcome.ranks[0] < 100
    assert [event["event"] for event in service.export("picky")] == list(kinds)


def test_a_stream_that_only_turns_down_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"user_id": "ann", "event": "rating", "value": 1.0}
    rows = [row | {"item_id": f"i{at}", "timestamp": 1_700_000_000_000 + 1000 * at} for at in range(10)]
    write_dataset(tmp_path / "data", pa.Table.from_pylist(rows, EVENT_SCHEMA), None)
    assert run("--data", str(tmp_path / "data")) == BAD_INPUT
    refused = "data: all of the newest 4 events turn an item down, so nothing can be ranked; choose another share"
    assert refused in capsys.readouterr().err


def test_a_service_with_another_past_is_refused(service: LiveService, shop_dataset: Path) -> None:
    stream = split_by_time(read_events(shop_dataset), 0.6)
    service.send({"user_id": "u", "item_id": service.items()[0], "event": "click"})
    with pytest.raises(InputError, match="start it anew with --model and --data"):
        through_service(service.url, stream)
    with pytest.raises(InputError, match="does not answer"):
        through_service("http://127.0.0.1:9", stream)
