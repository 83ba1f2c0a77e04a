"""The service with a model that has neither counts nor a ranker, as one that was pretrained before there were any."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lib.model.folder import Manifest
from lib.versions.folder import load_folder, save_with_optimizer
from tests.helpers.service import LiveService, assert_each_event_once, assert_refused, click, ids, started_service

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def plain_service(
    small_model: Path, shop_dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveService]:
    """The small model without counts, served."""
    loaded, folder = load_folder(small_model), tmp_path_factory.mktemp("plain")
    config = loaded.encoder.config
    loaded.encoder.counts = loaded.encoder.ranker = None
    config.neighbours, config.ranker_features, config.repeats = 0, 0, False
    save_with_optimizer(folder / "model", loaded.encoder, loaded.catalog, Manifest(), loaded.optimizer)
    with started_service(folder / "model", shop_dataset, tmp_path_factory.mktemp("plain-served")) as live:
        yield live


def test_it_answers_and_learns_by_the_encoder_alone(plain_service: LiveService) -> None:
    sent = []
    for number in range(40):
        user = f"reader-{number % 4}"
        clicked = ids(plain_service.recommend(user))[0]
        plain_service.send(click(user, clicked, event_id=f"plain-{number}"))
        sent.append((user, f"plain-{number}"))
        assert clicked not in ids(plain_service.recommend(user))
    assert_each_event_once(plain_service, sent)
    assert plain_service.status()["model_version"] > 1


def test_it_says_how_to_get_what_is_taken_together(plain_service: LiveService) -> None:
    similar = f"/v1/items/{plain_service.items()[0]}/similar?k=3"
    assert_refused(plain_service.client.get(f"{similar}&relation=together"), 422, "relation", "pretrain it again")
    nearest = plain_service.client.get(similar).raise_for_status().json()["items"]
    assert plain_service.client.get(f"{similar}&relation=similar").raise_for_status().json()["items"] == nearest
