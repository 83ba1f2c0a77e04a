"""Attributes of items: which columns become codes, and what an encoder does with them."""

import numpy as np
import pyarrow as pa
import torch

from lib.data.attributes import attribute_codes, attribute_values
from lib.data.catalog import Catalog
from tests.helpers.tiny import tiny_encoder


def catalog_of(**columns) -> Catalog:
    count = len(next(iter(columns.values())))
    items = [f"i{number}" for number in range(1, count + 1)]
    return Catalog(items, pa.table({"item_id": items, **columns}))


def test_words_of_a_text_are_shared_attributes_and_a_title_is_none():
    genres = ["Drama War", "Comedy", "Drama Comedy", "War", "Drama", "Comedy War", "Drama Comedy War"] * 5
    catalog = catalog_of(title=["The War"] * 35, genres=genres)
    values = attribute_values(catalog)
    assert values == ["genres=Comedy", "genres=Drama", "genres=War"]
    codes = attribute_codes(catalog, values)
    assert codes[:4].tolist() == [[0, 0, 0], [2, 3, 0], [1, 0, 0], [1, 2, 0]]


def test_values_between_separators_keep_their_blanks():
    catalog = catalog_of(category=["Home & Garden|Tools", "Toys"] * 6)
    assert attribute_values(catalog) == ["category=Home & Garden", "category=Tools", "category=Toys"]


def test_members_of_lists_are_attributes():
    catalog = catalog_of(tags=[["a", "b"], ["b"], None] * 6)
    values = attribute_values(catalog)
    assert values == ["tags=b", "tags=a"]
    assert attribute_codes(catalog, values)[1:4].tolist() == [[1, 2], [1, 0], [0, 0]]


def test_numbers_fall_into_quantile_buckets():
    prices = [float(number) for number in range(320)]
    catalog = catalog_of(price=prices)
    values = attribute_values(catalog)
    assert len(values) == 16
    counts = np.bincount(attribute_codes(catalog, values)[1:, 0])
    assert counts[0] == 0
    assert (counts[1:] >= 19).all()
    assert (counts[1:] <= 21).all()


def test_a_column_of_which_no_two_items_share_a_value_is_left_out():
    prose = "a long story of many words that nobody would call a category, told once more " * 2
    catalog = catalog_of(sku=[f"s{number}" for number in range(40)], text=[prose] * 40, brand=["x", "y"] * 20)
    assert attribute_values(catalog) == ["brand=x", "brand=y"]


def test_an_item_keeps_the_most_common_of_too_many_attributes():
    catalog = catalog_of(tags=[["a"], ["a", "b"], ["a", "b", "c"]] * 6)
    values = attribute_values(catalog)
    assert attribute_codes(catalog, values, width=2)[3].tolist() == [1, 2]


def test_a_catalog_without_attributes_has_no_codes():
    catalog = Catalog(["i1", "i2"])
    assert attribute_values(catalog) == []
    assert attribute_codes(catalog, []).tolist() == [[0], [0], [0]]


def test_items_of_one_attribute_stand_nearer_together():
    encoder = tiny_encoder(6, attribute_values=["a=x", "a=y"], attributes_per_item=2)
    with torch.no_grad():
        encoder.item_attributes[1:4, 0] = 1
        encoder.item_attributes[4:7, 0] = 2
        encoder.attribute_embeddings.weight[1:] = torch.eye(16)[:2] * 5
    vectors = encoder.item_vectors()[1:]
    likeness = vectors @ vectors.T
    assert likeness[:3, :3].min() > likeness[:3, 3:].max()


def test_an_unknown_item_is_what_its_attributes_are():
    encoder = tiny_encoder(6, attribute_values=["a=x", "a=y"], attributes_per_item=2)
    with torch.no_grad():
        encoder.item_embeddings.weight[5] = 0
        encoder.item_attributes[5] = torch.tensor([1, 2], dtype=torch.int32)
    mean = encoder.attribute_embeddings.weight[1:3].mean(dim=0)
    assert torch.allclose(encoder.item_vectors(torch.tensor([5]))[0], mean / mean.norm(), atol=1e-6)


def test_inputs_that_are_off_change_nothing():
    encoder = tiny_encoder(6, inputs=["kind"])
    kinds, rows, lengths = torch.tensor([[1, 2]]), torch.tensor([[3, 4]]), torch.tensor([2])
    one = encoder.interests(kinds, torch.tensor([[0, 1]]), torch.tensor([[1, 2]]), lengths, rows)
    other = encoder.interests(kinds, torch.tensor([[0, 9]]), torch.tensor([[3, 0]]), lengths, rows)
    assert torch.equal(one, other)
    assert not torch.equal(one, encoder.interests(kinds.flip(1), torch.zeros_like(kinds), kinds, lengths, rows))
