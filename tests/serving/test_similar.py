"""The route of similar items, with a model whose counts are known."""

from types import SimpleNamespace

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from lib.data.catalog import Catalog
from lib.model.folder import Manifest
from lib.ranking.features import FEATURES
from lib.ranking.rules import RankingRules
from lib.versions.registry import Registry
from serving.live_models import LiveModels
from serving.routes.recommendations import router
from tests.helpers.tiny import item_ids, tiny_encoder

ITEMS = 24


@pytest.fixture
def client(tmp_path) -> TestClient:
    encoder = tiny_encoder(ITEMS)
    encoder.add_ranker(32, len(FEATURES))
    assert encoder.counts is not None
    contexts = np.repeat([[1, 0], [3, 1]], 20, axis=0)  # 1 before 2, twenty times, and 3 and 1 before 4
    items = np.repeat([2, 4], 20)
    encoder.counts.count(contexts, items, np.ones(40), np.arange(1, 41))
    registry = Registry(tmp_path)
    registry.publish_snapshot(encoder, Catalog(item_ids(ITEMS)), Manifest(version=1), None)
    models = LiveModels(registry, RankingRules())

    async def current_models() -> LiveModels:
        return models

    app = FastAPI()
    app.include_router(router)
    app.state.replica = SimpleNamespace(models=models, current_models=current_models)
    return TestClient(app)


def test_the_relation_says_which_items_are_found(client):
    together = client.get("/v1/items/i1/similar?k=5&relation=together").raise_for_status().json()
    assert [item["item_id"] for item in together["items"]] in (["i2", "i4"], ["i4", "i2"])
    assert together["model_version"] == 1
    nearest = client.get("/v1/items/i1/similar?k=5").raise_for_status().json()["items"]
    assert client.get("/v1/items/i1/similar?k=5&relation=similar").json()["items"] == nearest
    assert len(nearest) == 5
    assert client.get("/v1/items/i9/similar?relation=together").json()["items"] == [], "it was never taken"
