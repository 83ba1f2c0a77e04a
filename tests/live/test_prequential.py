"""The prequential replay: each event is answered from what came before it, and only the live arms learn."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from jobs.reports import print_replay
from lib.data.catalog import Catalog
from lib.data.events import EVENT_SCHEMA
from lib.data.history import History
from lib.data.popularity import DAY
from lib.data.ratings import RatingScale
from lib.data.user_histories import UserHistories
from lib.errors import InputError
from lib.evaluation.comparison import WHOLE
from lib.live.gate import GateConfig
from lib.live.prequential import MISSED, Finetuned, Frozen, Live, Outcome, Stream, ranks_of, replay, split_by_time
from lib.live.prequential_comparison import compare_arms
from lib.live.settings import LearnerConfig
from lib.log.log_file import LoggedEvent
from lib.model.batches import gap_buckets
from lib.model.facts import TrainingFacts
from lib.model.folder import Manifest, save_model, write_manifest
from tests.helpers.tiny import NOW, SECOND, history, item_ids, tiny_encoder


def table(rows: Sequence[tuple[str, str, int]]) -> pa.Table:
    """Clicks: (user, item, seconds)."""
    return pa.Table.from_pylist(
        [
            {"user_id": user, "item_id": item, "event": "click", "value": None, "timestamp": NOW + at * SECOND}
            for user, item, at in rows
        ],
        EVENT_SCHEMA,
    )


def pairs(users: int, first: int, spacing: int = 60) -> list[tuple[str, str, int]]:
    """Users who each click two items that go together: i1 with i2, i3 with i4, up to i20."""
    generator = np.random.default_rng(first)
    rows = []
    for number in range(first, first + users):
        pair = int(generator.integers(0, 10))
        at = number * spacing
        rows += [(f"u{number}", f"i{2 * pair + 1}", at), (f"u{number}", f"i{2 * pair + 2}", at + 1)]
    return rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of i1 to i24."""
    folder = tmp_path_factory.mktemp("prequential") / "model"
    manifest = Manifest(training=TrainingFacts(events_per_batch=256))
    save_model(folder, tiny_encoder(), Catalog(item_ids(24)), manifest)
    write_manifest(folder, manifest)
    return folder


class Witness:
    """Notes what it is asked and told."""

    def __init__(self) -> None:
        self.contexts: list[tuple[list[str], str]] = []
        self.learned: list[str] = []
        self.learned_before: list[int] = []

    def ranks(self, contexts: Sequence[History], targets: Sequence[str]) -> dict[str, np.ndarray]:
        self.contexts += [(list(context.item_ids), target) for context, target in zip(contexts, targets, strict=True)]
        self.learned_before += [len(self.learned)] * len(targets)
        return {WHOLE: np.arange(len(targets)), "new": np.arange(len(targets)) + 5}

    def learn(self, events: Sequence[LoggedEvent], histories: UserHistories) -> None:
        self.learned += [logged.event.item_id for logged in events]

    def facts(self) -> dict:
        return {"seen": len(self.learned)}


def test_every_event_is_answered_from_what_came_before_it_and_learned_after():
    stream = Stream(table([("a", "i1", 0)]), table([("a", "i2", 1), ("b", "i3", 2), ("a", "i4", 3), ("a", "i5", 4)]))
    witness = Witness()
    outcome = replay(stream, witness, batch_events=2)
    assert witness.contexts == [(["i1"], "i2"), ([], "i3"), (["i1", "i2"], "i4"), (["i1", "i2", "i4"], "i5")]
    assert witness.learned == ["i2", "i3", "i4", "i5"]
    assert witness.learned_before == [0, 0, 2, 2]
    assert outcome.ranks.tolist() == [0, 1, 0, 1]
    assert outcome.alone["new"].tolist() == [5, 6, 5, 6]
    assert outcome.facts["seen"] == 4


def test_what_people_turn_down_is_learned_and_is_no_target():
    rows = [
        ("a", "i2", "rating", 4.0),
        ("a", "i3", "rating", 5.0),
        ("b", "i4", "skip", None),
        ("a", "i5", "dislike", None),
    ]
    rows += [("b", "i6", "click", None), ("a", "new", "rating", 1.0), ("a", "i7", "rating", None)]
    newest = table([(user, item, at) for at, (user, item, *_) in enumerate(rows, start=1)])
    for place, name in ((2, "event"), (3, "value")):
        column = pa.array([row[place] for row in rows], EVENT_SCHEMA.field(name).type)
        newest = newest.set_column(newest.schema.get_field_index(name), EVENT_SCHEMA.field(name), column)
    stream, witness = Stream(table([("a", "i1", 0)]), newest, RatingScale(1, 10)), Witness()
    assert stream.targets.tolist() == [False, True, False, False, True, False, True]  # 4 is low on this scale
    outcome = replay(stream, witness, batch_events=1)
    assert [target for _, target in witness.contexts] == ["i3", "i6", "i7"]
    assert witness.contexts[-1][0] == ["i1", "i2", "i3", "i5", "new"]
    assert witness.learned == ["i2", "i3", "i4", "i5", "i6", "new", "i7"]
    assert outcome.ranks.tolist() == [0, 0, 0]
    comparison = compare_arms(stream, {"live": outcome})
    assert (comparison.events, comparison.users) == (3, 2)
    assert comparison.groups == {"all": 3, "new users": 1, "new items": 3}
    assert comparison.times == [NOW + at * SECOND for at in (2, 5, 7)]
    assert comparison.arms[0].metrics["all"]["hr@10"].value == 1.0
    assert stream.repeats is False
    assert Stream(stream.oldest, newest).targets.tolist() == [True, True, False, False, True, False, True]


def test_frozen_histories_stay_as_they_were_at_the_split():
    stream = Stream(table([("a", "i1", 0)]), table([("a", "i2", 1), ("a", "i4", 3)]))
    witness = Witness()
    replay(stream, witness, live_histories=False)
    assert witness.contexts == [(["i1"], "i2"), (["i1"], "i4")]


def test_the_oldest_share_comes_first_and_ties_keep_their_order():
    rows = [("a", "late", 9), ("a", "i1", 5), ("b", "i2", 5), ("c", "early", 0), ("c", "i3", 5)]
    stream = split_by_time(table(rows), 0.4)
    assert stream.oldest["item_id"].to_pylist() == ["early", "i1"]
    assert stream.newest["item_id"].to_pylist() == ["i2", "i3", "late"]
    assert not stream.repeats
    assert split_by_time(table([*rows, ("a", "i1", 20)]), 0.4).repeats
    with pytest.raises(InputError, match=r"share of 0\.1 of 5 events leaves one part empty"):
        split_by_time(table(rows), 0.1)


def test_ranks_are_those_of_all_scores_with_ties_against_the_target():
    encoder, catalog = tiny_encoder(), Catalog(item_ids(24))
    encoder.item_popularity[1:4] = torch.tensor([3.0, 2.0, 2.0])
    contexts = [history([1, 2]), History(), History(), History(), history([5])]
    targets = ["i7", "i1", "i2", "i9", "unknown"]
    (ranks,) = ranks_of(encoder, catalog, contexts, targets, exclude_seen=False).values()
    codes = torch.tensor([[1, 2]])
    kinds = torch.full((1, 2), encoder.config.event_kinds.index("click") + 1)  # pyright: ignore[reportOptionalMemberAccess]
    gaps = torch.from_numpy(gap_buckets(np.array([0, 60_000]), np.array([0]), encoder.config.gap_buckets))[None]
    with torch.inference_mode():
        u = encoder.interests(kinds, gaps, torch.zeros(1, 2, dtype=torch.long), torch.tensor([2]), codes)
        scores = (encoder.queries(u) @ encoder.item_vectors(torch.arange(25)).T)[0, 1:]
    assert ranks[0] == int((scores > scores[6]).sum())
    assert ranks.tolist()[1:] == [0, 2, MISSED, MISSED]  # i2 and i3 are equally popular, i9 is not at all
    seen = ranks_of(encoder, catalog, [history([1, 2])], ["i1"], exclude_seen=True)
    assert seen[WHOLE].tolist() == [MISSED]


def test_live_learns_what_goes_together_and_frozen_does_not(model, tmp_path):
    stream = split_by_time(table(pairs(400, 0)), 0.2)
    config = LearnerConfig(learning_rate=1e-2, negatives=24, gate=GateConfig(loss_tolerance=9.0, quality_tolerance=1.0))
    outcomes = {
        "history": replay(stream, Frozen(model, exclude_seen=True)),
        "live": replay(stream, Live(model, tmp_path / "state", config, exclude_seen=True), batch_events=16),
    }
    comparison = compare_arms(stream, outcomes)
    history_arm, live_arm = comparison.arms
    assert live_arm.lift["ndcg@10"].low > 0.2
    assert live_arm.over_time["ndcg@10"][-1] > live_arm.over_time["ndcg@10"][0] + 0.1
    assert history_arm.lift == {}
    assert live_arm.facts["version"] == 1 + len(stream.newest) // 16
    assert live_arm.facts["events_read"] > len(stream.newest)
    assert comparison.groups == {"all": 640, "new users": 640, "new items": 0}


@pytest.mark.parametrize("hours", [24, 6])
def test_a_fine_tune_ends_each_period_and_takes_new_items(model, hours):
    rows = [("a", "i1", 0), ("a", "i2", 1)]
    day = DAY // SECOND
    for number in range(3):
        rows += [(user, item, day * number + at) for user, item, at in pairs(80, 100 * number, 10)]
        rows += [("z", f"new{number}", day * number + 80_000)]
    stream = Stream(table(rows[:2]), table(sorted(rows[2:], key=lambda row: row[2])))
    period = hours * 3_600_000
    arm = Finetuned(model, exclude_seen=True, epochs=3, learning_rate=1e-2, period=period)
    outcome = replay(stream, arm, batch_events=16)
    times = stream.newest["timestamp"].to_numpy()
    ends = np.append(times[15::16], times[-1])  # of the micro-batches
    assert outcome.facts["fine_tunes"] == len(np.unique(ends // period)) - 1
    assert {"new0", "new1"} <= set(arm.catalog.item_ids)
    assert torch.isfinite(arm.encoder.item_embeddings.weight).all()
    first, last = np.array_split(outcome.ranks, 3)[0], np.array_split(outcome.ranks, 3)[2]
    assert (last < 3).mean() > (first < 3).mean() + 0.2


def test_comparison_of_known_ranks():
    stream = Stream(table([("a", "i1", 0)]), table([("a", "i1", 1), ("b", "new", 2), ("b", "i1", 3), ("c", "i1", 4)]))
    outcomes = {
        "history": Outcome(np.array([0, 50, MISSED, 1])),
        "live": Outcome(np.array([0, 0, 0, 1])),
    }
    comparison = compare_arms(stream, outcomes)
    assert comparison.groups == {"all": 4, "new users": 3, "new items": 1}
    frozen, live = comparison.arms
    assert frozen.metrics["all"]["hr@10"].value == 0.5
    assert frozen.metrics["all"]["mrr"].value == pytest.approx((1 + 1 / 51 + 0 + 0.5) / 4)
    assert live.metrics["new items"]["ndcg@10"].value == 1.0
    assert live.metrics["new users"]["hr@10"].value == 1.0
    assert live.lift["hr@10"].value == pytest.approx(1.0)
    assert frozen.over_time["ndcg@10"] == pytest.approx([1, 0, 0, 1 / np.log2(3)])
    written = comparison.as_json()
    assert written["arms"][1]["lift_over_history"]["hr@10"]["value"] == pytest.approx(1.0)


def test_sources_are_compared_with_the_whole_of_their_arm(capsys):
    stream = Stream(table([("a", "i1", 0)]), table([("a", "i1", 1), ("b", "new", 2), ("b", "i1", 3), ("c", "i1", 4)]))
    alone = {"nearest": np.array([0, 0, 0, 1]), "new": np.array([MISSED] * 4)}
    outcomes = {
        "history": Outcome(np.array([0, 50, MISSED, 1])),
        "live": Outcome(np.array([0, MISSED, 0, 1]), alone=alone),
    }
    comparison = compare_arms(stream, outcomes)
    frozen, live = comparison.arms
    assert frozen.sources == {}
    assert live.sources["nearest"].metrics["hr@10"].value == 1.0
    difference = live.sources["nearest"].difference["hr@10"]
    assert difference.value == 0.25
    assert 0 == difference.low <= difference.high <= 0.75  # the users' worth: none of theirs is worse
    assert live.sources["new"].difference["ndcg@10"].high < 0
    written = comparison.as_json()["arms"][1]["sources"]["nearest"]
    assert written["hr@10"]["value"] == 1.0
    assert written["difference_from_whole"]["hr@10"]["value"] == 0.25
    print_replay(comparison, "a stream")
    shown = capsys.readouterr().out
    assert "ndcg@10 of each source of candidates alone" in shown
    assert "difference from the whole, paired" in shown
