"""Items that are put and deleted while live: their row, first vector and attributes, in every later version."""

import asyncio
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lib.data.attributes import attribute_codes, attribute_values
from lib.data.catalog import Catalog
from lib.data.history import History
from lib.live.learner import NearlineLearner
from lib.live.new_items import Likes
from lib.live.settings import LearnerConfig
from lib.log.items import ItemChange
from lib.model.delta import Delta
from lib.model.encoder import BehaviourEncoder
from lib.model.folder import Manifest
from lib.ranking.features import FEATURES
from lib.ranking.filters import ItemFilter
from lib.ranking.recommender import Question, Recommender
from lib.ranking.rules import RankingRules
from lib.versions.registry import Registry
from serving.live_models import LiveModels
from tests.helpers.tiny import history, item_ids, micro_batch, tiny_encoder

ITEMS = 24


def described() -> Catalog:
    """Every third item is of one kind; the year is the number."""
    names = item_ids(ITEMS)
    attributes = {
        "item_id": names,
        "kind": [f"kind{number % 3}" for number in range(1, ITEMS + 1)],
        "year": list(range(1, ITEMS + 1)),
    }
    return Catalog(names, pa.table(attributes))


def encoder_of(catalog: Catalog, read: bool) -> BehaviourEncoder:
    values = attribute_values(catalog) if read else []
    encoder = tiny_encoder(ITEMS, attribute_values=values, attributes_per_item=2)
    if read:
        encoder.item_attributes[: ITEMS + 1] = torch.from_numpy(attribute_codes(catalog, values, 2))
    return encoder


@pytest.fixture(params=[True, False], ids=["attributes read by the model", "attributes in the catalog alone"])
def registry(request, tmp_path) -> Registry:
    registry, catalog = Registry(tmp_path), described()
    registry.publish_snapshot(encoder_of(catalog, request.param), catalog, Manifest(version=1), None)
    return registry


@pytest.fixture
def learner(registry) -> NearlineLearner:
    return NearlineLearner(registry, LearnerConfig())


def recommender_of(registry: Registry, version: int | None = None) -> Recommender:
    loaded = registry.load(version)
    return Recommender(loaded.encoder, loaded.catalog, loaded.version, loaded.log_offset)


def put(item_id: str, revision: int = 1, **attributes) -> ItemChange:
    return ItemChange(revision, item_id, attributes)


def recommended(recommender: Recommender, k: int = 100, **filter) -> list[str]:
    question = Question(history([3, 6]), k, ItemFilter.of(filter))
    return [item.item_id for item in recommender.recommend([question])[0]]


def test_a_new_item_has_a_row_and_is_recommended_by_what_it_is(registry, learner):
    delta = learner.change_items([put("new", kind="kind0")])
    assert delta is not None
    assert delta.new_items == ["new"]
    assert delta.rows.tolist() == [ITEMS + 1]
    assert delta.log_offset == 0
    replica = recommender_of(registry, 1)
    replica.change_items({"new": {"kind": "kind0"}})
    assert "new" not in recommended(replica), "it has no row yet"
    replica.apply(delta)
    assert replica.checksum == learner.model.checksum
    assert recommended(replica, kind="kind0")
    assert "new" in recommended(replica, kind="kind0")
    assert "new" not in recommended(replica, kind="kind1")


def test_a_new_item_is_new_and_one_of_the_first_catalog_as_old_as_all_events(tmp_path):
    registry, catalog = Registry(tmp_path), described()
    encoder = encoder_of(catalog, read=False)
    encoder.add_ranker(2, len(FEATURES))
    assert encoder.counts is not None
    encoder.counts.count(np.zeros((3, 1), dtype=np.int64), np.array([3, 3, 5]), np.ones(3), np.array([1, 2, 3]))
    registry.publish_snapshot(encoder, catalog, Manifest(version=1), None)
    learner, replica = NearlineLearner(registry, LearnerConfig()), recommender_of(registry, 1)
    delta = learner.change_items([put("new", kind="kind0")])
    assert delta is not None
    replica.apply(delta)
    rows = np.array([3, 5, 4, ITEMS + 1])  # of 4 there was no event
    for stage in (learner.model.stage, replica.stage):
        assert stage is not None
        assert stage.standing.age(rows).tolist() == [2, 0, 3, 0]
    assert replica.checksum == learner.model.checksum


def test_a_new_item_starts_as_the_items_that_are_like_it(learner):
    learner.change_items([put("new", kind="kind0"), put("other", 2, kind="kind1"), put("unlike", 3, kind="another")])
    table = learner.model.encoder.item_embeddings.weight.detach()
    noise = 5 * learner.model.encoder.config.initializer_range
    for row, likes in ((25, range(3, 25, 3)), (26, range(1, 25, 3)), (27, range(1, 25))):
        assert torch.allclose(table[row], table[list(likes)].mean(dim=0), atol=noise)
    assert not torch.allclose(table[25], table[27], atol=noise / 2)


def test_other_attributes_of_a_known_item_are_read_by_the_model(registry, learner):
    before = learner.model.encoder.item_vectors(torch.tensor([5, 6]))
    delta = learner.change_items([put("i5", kind="kind0", year=5)])
    read = bool(learner.model.encoder.config.attribute_values)
    assert (delta is not None) == read, "without a model that reads it, no weight changes"
    after = learner.model.encoder.item_vectors(torch.tensor([5, 6]))
    assert torch.equal(after[0], before[0]) != read
    assert torch.equal(after[1], before[1])
    if delta is not None:
        replica = recommender_of(registry, 1)
        replica.apply(delta)
        assert np.allclose(replica.index.vectors[5], after[0].numpy(), atol=1e-6)


def test_the_same_changes_once_more_change_nothing(learner):
    changes = [put("new", kind="kind0"), put("i5", 2, kind="kind2"), ItemChange(3, "i6", None)]
    learner.change_items(changes)
    version, checksum = learner.version, learner.model.checksum
    assert learner.change_items(changes) is None
    assert (learner.version, learner.model.checksum) == (version, checksum)


def test_a_restarted_learner_asks_for_all_and_comes_to_the_same(registry, learner):
    changes = [put("new", kind="kind0"), put("i5", 2, kind="kind2"), ItemChange(3, "i6", None)]
    learner.change_items(changes)
    again = NearlineLearner(registry, LearnerConfig())
    assert again.item_revision == 0
    assert again.change_items(changes) is None
    assert again.model.checksum == learner.model.checksum
    assert again.model.catalog.removed == {"i6"}
    assert again.item_revision == 3


def test_a_rollback_brings_weights_back_and_leaves_what_items_are(registry, learner):
    before = learner.version
    learner.learn(micro_batch(1, [history([3, 6, 9])]))
    learner.change_items([put("i5", kind="kind0", year=5), put("i6", 2, kind="kind1", year=6)])
    attributes = learner.model.encoder.item_attributes.clone()
    replica = recommender_of(registry)
    delta = learner.restore(before)
    assert isinstance(delta, Delta)
    assert torch.equal(learner.model.encoder.item_attributes, attributes)
    old = registry.load(before).encoder
    assert torch.equal(learner.model.encoder.item_embeddings.weight, old.item_embeddings.weight)
    assert torch.equal(learner.model.encoder.interest_to_item, old.interest_to_item)
    replica.apply(Delta.from_bytes(delta.to_bytes()))
    assert replica.checksum == learner.model.checksum
    assert torch.equal(registry.load().encoder.item_attributes, attributes)
    assert learner.change_items([put("i5", kind="kind0", year=5), put("i6", 2, kind="kind1", year=6)]) is None


def test_another_base_that_is_brought_back_gets_what_items_are_now(registry, learner):
    """No delta leads to it: the learner asks for all changes anew, and the next version has them."""
    changes = [put("i5", kind="kind0", year=5), put("i6", 2, kind="kind1", year=6)]
    learner.change_items(changes)
    attributes = learner.model.encoder.item_attributes.clone()
    base = registry.load(1)
    learner.adopt(base, base.facts)
    assert learner.restore(1) is None
    assert learner.item_revision == 0
    learner.change_items(changes)
    assert torch.equal(learner.model.encoder.item_attributes, attributes)


def test_a_snapshot_holds_attributes_and_removals(registry, learner):
    learner.change_items([put("new", kind="kind0", title="New"), ItemChange(2, "i6", None)])
    learner.lineage.save_snapshot(learner.model)
    replica = recommender_of(registry)
    assert replica.catalog.titles["new"] == "New"
    assert "new" in recommended(replica, kind="kind0")
    assert "i6" not in recommended(replica)


def test_a_deleted_item_is_in_no_answer_until_it_is_put_again(registry):
    replica = recommender_of(registry)
    replica.encoder.item_popularity[9] = 5.0
    assert "i9" in recommended(replica)
    replica.change_items({"i9": None})
    assert "i9" not in recommended(replica)
    assert "i9" not in recommended(replica, allow=["i9", "i10"])
    assert "i9" not in [item.item_id for item in replica.recommend([Question(History(), 100)])[0]]
    assert "i9" not in [item.item_id for item in replica.similar("i12", 100)]
    with pytest.raises(KeyError):
        replica.similar("i9", 5)
    assert len(recommended(replica)) == ITEMS - 3
    replica.change_items({"i9": {"kind": "kind0"}})
    assert "i9" in recommended(replica)


def test_feedback_for_a_described_item_that_nobody_met_finds_its_row(learner):
    learner.change_items([put("new", kind="kind0")])
    learner.learn(micro_batch(1, [history([3, "new"])]))
    assert len(learner.model.catalog) == ITEMS + 1


@pytest.mark.parametrize(
    ("attributes", "word"),
    [({"year": "last"}, "year"), ({"kind": 3}, "kind"), ({"kind": ["a"]}, "kind"), ({"item_id": "x"}, "item_id")],
)
def test_attributes_of_another_type_are_left_out_counted_and_logged(attributes, word, caplog):
    """The item log refuses them; what is durable all the same must not stop those who read it."""
    catalog = described()
    catalog.change({"good": {"kind": "kind1"}, "i2": attributes | {"colour": "red"}})
    assert catalog.table.attributes_of("i2") == {"colour": "red"}
    assert catalog.table.attributes_of("good") == {"kind": "kind1"}
    assert catalog.table.skipped == 1
    [record] = caplog.records
    assert record.getMessage().startswith(f"an attribute is left out: {word}: ")
    catalog.change({"i2": {"kind": "kind1"}})
    assert catalog.table.attributes_of("i2") == {"kind": "kind1"}


def test_a_learner_and_a_replica_advance_over_what_they_cannot_apply(registry, learner):
    changes = [put("a", 1, size="XL"), put("b", 2, size=42, kind="kind1"), put("c", 3, size="M")]
    learner.change_items(changes)
    assert learner.item_revision == 3
    learner.learn(micro_batch(1, [history([3, "b"])]))
    learner.lineage.save_snapshot(learner.model)
    again = NearlineLearner(registry, LearnerConfig())
    again.change_items(changes)
    assert again.item_revision == 3
    models = LiveModels(registry, RankingRules())
    asyncio.run(models.change_items(changes))
    assert models.item_revision == 3
    assert recommended(models.live, size=["XL", "M"])
    assert sorted(recommended(models.live, size=["XL", "M"])) == ["a", "c"]
    assert "b" in recommended(models.live, kind="kind1")


def test_whole_numbers_widen_and_nothing_is_cut(tmp_path):
    catalog = described()
    catalog.change({"i5": {"year": 19.99}})
    catalog.change({"i6": {"year": 20}})
    catalog.save(tmp_path / "catalog.parquet")
    for one in (catalog, Catalog.load(tmp_path / "catalog.parquet")):
        assert np.flatnonzero(one.mask({"year": {"min": 19.5, "max": 20}})).tolist() == [5, 6, 20]
        assert np.flatnonzero(one.mask({"year": {"min": 18.5, "max": 19.5}})).tolist() == [19]
        assert one.table.kinds["year"] == "numbers"
        assert one.table.attributes_of("i5") == {"year": 19.99}


@pytest.mark.parametrize("empty", [[], None])
def test_an_empty_list_and_null_fix_no_type(tmp_path, empty):
    for first, last, found in ((["a"], "b", "a"), ("a", ["b"], "a"), (3, "x", 3)):
        catalog = described()
        catalog.change({"i1": {"tags": empty}})
        catalog.save(tmp_path / "catalog.parquet")
        for one in (catalog, Catalog.load(tmp_path / "catalog.parquet")):
            one.change({"i2": {"tags": first}, "i3": {"tags": empty}})
            one.change({"i4": {"tags": last}})  # of another kind
            assert one.table.skipped == 1
            assert np.flatnonzero(one.mask({"tags": found})).tolist() == [2]
            one.save(tmp_path / "again.parquet")
            assert np.flatnonzero(Catalog.load(tmp_path / "again.parquet").mask({"tags": found})).tolist() == [2]


def test_numbers_of_few_bits_and_large_whole_numbers_are_not_cut(tmp_path):
    attributes = {
        "item_id": ["a", "b"],
        "small": pa.array([1, 200], pa.uint8()),
        "single": pa.array([1.5, 2.99], pa.float32()),
        "huge": pa.array([2**63 + 5, 1], pa.uint64()),
        "code": pa.array(["x", "y"]).dictionary_encode(),
    }
    catalog = Catalog(["a", "b"], pa.table(attributes))
    catalog.change({"a": {"small": -70_000, "single": 19.99, "huge": -1, "code": "z"}})
    catalog.save(tmp_path / "catalog.parquet")
    for one in (catalog, Catalog.load(tmp_path / "catalog.parquet")):
        expected = {"small": -70_000, "single": 19.99, "huge": -1, "code": "z"}
        assert one.table.attributes_of("a") == expected
        assert np.flatnonzero(one.mask({"single": {"min": 19.99, "max": 19.99}})).tolist() == [1]
        assert np.flatnonzero(one.mask({"small": -70_000, "code": "z"})).tolist() == [1]
        assert np.flatnonzero(one.mask({"single": 2.99})).tolist() == [2]
        assert np.flatnonzero(one.mask({"single": {"min": 2.99, "max": 2.99}})).tolist() == [2]


def test_a_put_of_an_unchanged_film_keeps_its_codes():
    """How a text is split belongs to the model: one film alone says nothing of it."""
    genres = ["Drama War", "Comedy", "Drama Comedy", "War", "Drama", "Comedy War", "Drama Comedy War"] * 5
    shops = ["Tools & Home", "Toys", "The North Face"] * 11 + ["Toys", "Toys"]
    parts = ["a|b c", "b c", "a|d e"] * 11 + ["a", "b c"]
    prices = [float(number) for number in range(35)]
    names = item_ids(35)
    columns = {"genres": genres, "shop": shops, "parts": parts, "price": prices}
    catalog = Catalog(names, pa.table({"item_id": names, **columns}))
    values = attribute_values(catalog)
    learned = attribute_codes(catalog, values, 8)
    encoder = tiny_encoder(35, attribute_values=values, attributes_per_item=8)
    encoder.item_attributes.copy_(torch.from_numpy(learned))
    likes = Likes(encoder, catalog)
    for place, name in enumerate(names):
        catalog.change({name: {column: values[place] for column, values in columns.items()}})
        likes.encode(torch.tensor([place + 1]))
        assert encoder.item_attributes[place + 1].tolist() == learned[place + 1].tolist()
    long = "Drama " * 100
    catalog.change({"i1": {"genres": long}})
    likes.encode(torch.tensor([1]))
    assert (
        encoder.item_attributes[1].tolist()
        == attribute_codes(
            Catalog(["x"], pa.table({"item_id": ["x"], "genres": ["Drama"]}), splits={"genres": "at blanks"}), values, 8
        )[1].tolist()
    )


def test_a_model_that_was_stored_without_its_splits_finds_them_in_its_own_catalog(tmp_path):
    """One of an earlier release: what is put since says nothing of how its texts are split."""
    names = item_ids(12)
    genres = ["Drama War", "Comedy", "Drama Comedy", "War", "Drama", "Comedy War"] * 2
    pq.write_table(pa.table({"item_id": names, "genres": genres}), tmp_path / "catalog.parquet")
    catalog = Catalog.load(tmp_path / "catalog.parquet")
    values = ["genres=Comedy", "genres=Drama", "genres=War"]
    learned = attribute_codes(catalog, values, 3)
    again = Catalog.load(tmp_path / "catalog.parquet")
    again.change({name: {"genres": genre} for name, genre in zip(names, genres, strict=True)})
    for place, name in enumerate(names, start=1):
        assert attribute_codes(again.described([name]), values, 3)[1].tolist() == learned[place].tolist()


def test_how_texts_are_split_is_stored_with_the_model_and_survives_other_texts(tmp_path):
    names = item_ids(12)
    genres = ["Drama War", "Comedy", "Drama Comedy", "War", "Drama", "Comedy War"] * 2
    catalog = Catalog(names, pa.table({"item_id": names, "genres": genres}))
    values = ["genres=Comedy", "genres=Drama", "genres=War"]
    learned = attribute_codes(catalog, values, 3)
    catalog.change({name: {"genres": "Comedy, War"} for name in names[6:]})  # as texts of another rule are written
    for _ in range(2):
        catalog.save(tmp_path / "catalog.parquet")
        catalog = Catalog.load(tmp_path / "catalog.parquet")
        assert attribute_codes(catalog.described(names[:6]), values, 3)[1:].tolist() == learned[1:7].tolist()
    joined = catalog.joined(Catalog(["new"], pa.table({"item_id": ["new"], "genres": ["Drama|War"]})))
    assert attribute_codes(joined.described(names[:6]), values, 3)[1:].tolist() == learned[1:7].tolist()


def test_described_items_keep_what_the_others_have(tmp_path):
    catalog = described()
    catalog.change({"i2": {"kind": "kind0", "colour": "red"}, "new": {"tags": ["a", "b"], "title": "N"}, "i3": None})
    catalog.extend(["new"])
    catalog.save(tmp_path / "catalog.parquet")
    for one in (catalog, Catalog.load(tmp_path / "catalog.parquet")):
        assert np.flatnonzero(one.mask({"kind": "kind0"})).tolist() == [2, *range(3, 25, 3)]
        assert np.flatnonzero(one.mask({"colour": "red"})).tolist() == [2]
        assert np.flatnonzero(one.mask({"tags": "b"})).tolist() == [25]
        assert np.flatnonzero(one.mask({"year": {"min": 23}})).tolist() == [23, 24]
        assert np.flatnonzero(one.mask({"year": {"max": 2}})).tolist() == [1], "a put item is what it was put as"
        assert one.titles == {"new": "N"}
        assert one.removed == {"i3"}


def test_a_catalog_without_attributes_gets_its_first():
    catalog = Catalog(["a", "b"])
    catalog.change({"a": {"price": 2.5, "empty": None}})
    assert np.flatnonzero(catalog.mask({"price": {"max": 3}})).tolist() == [1]
    catalog.change({"b": {"price": 3}})
    assert np.flatnonzero(catalog.mask({"price": {"max": 3}})).tolist() == [1, 2]


def test_numbers_of_new_items_fall_into_the_buckets_that_were_learned():
    prices = [round(0.37 * number, 2) for number in range(400)]
    names = item_ids(400)
    catalog = Catalog(names, pa.table({"item_id": names, "price": prices}))
    values = attribute_values(catalog)
    learned = attribute_codes(catalog, values)
    alone = catalog.described(["i7", "i200", "i399"])
    assert np.array_equal(attribute_codes(alone, values)[1:], learned[[7, 200, 399]])


def test_a_model_that_is_loaded_beside_another_is_ready_for_the_same_filters(registry):
    models = LiveModels(registry, RankingRules())
    for written in ({"kind": "kind0", "year": {"min": 3}}, {"colour": "red"}):
        filter = ItemFilter.of(written)
        assert filter is not None
        asyncio.run(models.check_filter(filter))
    asyncio.run(models.change_items([put("new", 1, colour="red")]))
    again = models._load(models.changed_items, models.live)
    for known in ({"kind": "x"}, {"year": 1995}):
        assert again.catalog.table.is_prepared(known)
    assert not again.catalog.table.is_prepared({"kind": {"min": 3}})
    assert recommended(again, kind="kind0", year={"max": 6}) == recommended(models.live, kind="kind0", year={"max": 6})


def test_a_filter_is_prepared_without_holding_answers_up(registry):
    """A large catalog's index takes seconds: whoever asks for other things is answered meanwhile."""
    models = LiveModels(registry, RankingRules())
    table, filter = models.live.catalog.table, ItemFilter.of({"kind": "kind0"})
    assert filter is not None
    prepare, started, going_on = table.prepare, threading.Event(), threading.Event()

    def slow(conditions: Mapping[str, Any]) -> None:
        started.set()
        assert going_on.wait(60)
        prepare(conditions)

    table.prepare = slow

    async def ask() -> list[str]:
        checked = asyncio.create_task(models.check_filter(filter))
        await asyncio.to_thread(started.wait)
        [answer] = await models.answer([Question(history([3, 6]), 5)], [None])
        assert len(answer.items) == 5
        assert not checked.done()
        going_on.set()
        return await checked

    assert asyncio.run(ask()) == []
    assert table.is_prepared({"kind": "x"})


def test_an_older_answer_of_the_aggregator_does_not_undo_a_newer_one(registry):
    """A replica reads the changes in several tasks, whose answers may come back in the other order."""
    models = LiveModels(registry, RankingRules())
    first, old, new = put("1", revision=1, kind="a"), put("2", revision=2, kind="old"), put("2", revision=3, kind="new")
    asyncio.run(models.change_items([first, new]))
    asyncio.run(models.change_items([first, old]))
    assert models.item_revision == 3
    assert models.changed_items == {"1": {"kind": "a"}, "2": {"kind": "new"}}
    attributes = models.live.catalog.described(["2"]).attributes
    assert attributes is not None
    assert attributes["kind"].to_pylist() == ["new"]


@pytest.mark.parametrize("width", [1, 4])
def test_the_likes_of_a_new_item_are_those_that_share_most_codes(width):
    """As comparing every row with it finds them, also after rows have got other codes."""
    generator = np.random.default_rng(width)
    values = [f"a={code}" for code in range(6)]
    encoder = tiny_encoder(200, attribute_values=values, attributes_per_item=width)
    catalog = Catalog(item_ids(200))
    codes = generator.permuted(np.tile(np.arange(7, dtype=np.int32), (200, 1)), axis=1)[:, :width]
    encoder.item_attributes[1:] = torch.from_numpy(codes.copy())
    likes = Likes(encoder, catalog)
    for _ in range(30):
        changed, row, known = generator.integers(1, 201, 3).tolist()
        catalog.change({f"i{changed}": {"a": str(generator.integers(6))}})
        likes.encode(torch.tensor([changed]))
        codes = encoder.item_attributes
        own = codes[row][codes[row] > 0]
        shared = torch.isin(codes[: known + 1], own).sum(dim=1)
        expected = ((shared > 0) & (shared == shared.max())).nonzero().flatten().tolist()
        assert likes.of(row, known).tolist() == expected


def test_the_likes_of_a_new_item_in_a_large_catalog_are_some_of_those_that_share_most():
    """Of codes and words that very many have, some are looked at; the rarest are always."""
    items = 30_000
    encoder = tiny_encoder(items, attribute_values=["a=0", "a=1", "a=2"], attributes_per_item=2)
    names = item_ids(items)
    encoder.item_attributes[1:, 0] = 1
    encoder.item_attributes[1::3, 1] = 2
    encoder.item_attributes[77, 1] = 3
    likes = Likes(encoder, Catalog(names))
    found = likes.of(1, items)
    assert 1000 <= len(found) <= 1001
    assert (encoder.item_attributes[found, 1] == 2).all()
    assert likes.of(77, items).tolist() == [77]
    about = [f"all third{number % 3} rare{number // 10}" for number in range(1, items + 1)]
    catalog = Catalog(names, pa.table({"item_id": names, "about": about}))
    catalog.change({"new": {"about": "all third1 rare7"}})
    catalog.extend(["new"])
    assert catalog.likes("new", items).tolist() == [number for number in range(70, 80) if number % 3 == 1]
    catalog.change({"new": {"about": "all third1"}})
    common = catalog.likes("new", items)
    assert 500 < len(common) <= 2000
    assert (common % 3 == 1).all()


def test_new_items_are_like_known_ones_and_not_like_each_other():
    catalog = described()
    catalog.change({f"new{number}": {"kind": "kind0", "about": "the same words"} for number in range(5)})
    catalog.extend([f"new{number}" for number in range(5)])
    assert catalog.likes("new0", ITEMS).tolist() == list(range(3, ITEMS + 1, 3))
