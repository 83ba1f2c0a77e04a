"""Poisoned feedback: honest people are recommended what they would be without it."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from lib.live.gate import GateConfig
from lib.live.settings import LearnerConfig, ReplayConfig
from lib.versions.registry import Registry
from tests.helpers.streams import ADVERSARIAL, ATTACKS, LiveStream, Outcome, World, pretrained, shop_world

pytestmark = pytest.mark.slow

CONFIG = LearnerConfig(replay=ReplayConfig(events=300), negatives=128, gate=GateConfig(held_out_candidates=100))


@pytest.fixture(scope="module")
def world() -> World:
    return shop_world(visitors=200, items=200, live=3840)


@pytest.fixture(scope="module")
def base(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attacked") / "base"
    pretrained(world, folder, epochs=8)
    return folder


def outcome_of(world: World, base: Path, folder: Path, attack: str | None) -> Outcome:
    shutil.copytree(base, folder)
    return LiveStream(world, Registry(folder), CONFIG).run(world, attack)


@pytest.fixture(scope="module")
def honest(world: World, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return outcome_of(world, base, tmp_path_factory.mktemp("honest") / "live", None)


def test_an_honest_stream_passes_whole(world, honest):
    assert honest.rejections == []
    assert honest.refused.total() == 0
    assert honest.updates == len(world.live) // 64


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_costs_honest_people_nothing_that_can_be_told(world, base, honest, tmp_path, attack):
    outcome = outcome_of(world, base, tmp_path / "live", attack)
    assert outcome.relative_to(honest) > 0.98
    assert len(outcome.ndcg) > 0.98 * len(honest.ndcg)
    if attack == "one user":
        assert outcome.refused.total() > 4000  # of 5,000 clicks
    if attack == "learning rate":
        first, last, _ = ADVERSARIAL
        updates = np.array([update for update, _ in outcome.rejections])
        assert len(updates) >= int((last - first) * honest.updates)
        assert (updates >= int(first * honest.updates)).all()
