"""Rows of the item table for items that came while live: each starts as those that are like it."""

import torch
from torch import Tensor

from lib.data.attributes import attribute_codes
from lib.data.catalog import Catalog
from lib.model.delta import grow_items
from lib.model.encoder import BehaviourEncoder
from lib.model.trainer import Trainer


def add_rows(trainer: Trainer, catalog: Catalog, known: int, seed: int) -> None:
    """Give weights to the items of a catalog beyond the first `known`: the mean of those that are like each, or of all.

    Equal items lie a little apart, so that each can go its own way.
    """
    encoder, needed = trainer.encoder, len(catalog) + 1
    if needed == known + 1:
        return
    if needed > encoder.config.item_rows:
        grow_items(encoder, needed + needed // 10)
        trainer.row_optimizer.grow(encoder.config.item_rows)
    added = torch.arange(known + 1, needed)
    encode_attributes(encoder, catalog, added)
    generator = torch.Generator().manual_seed(seed + needed)
    table = encoder.item_embeddings.weight.detach()
    table[added] = torch.randn(len(added), table.shape[1], generator=generator) * encoder.config.initializer_range
    mean = table[1 : known + 1].mean(dim=0) if known else torch.zeros(table.shape[1])
    for row in added.tolist():
        likes = _likes(encoder, catalog, row, known)
        table[row] += table[likes].mean(dim=0) if len(likes) else mean
    trainer.items = len(catalog)


def encode_attributes(encoder: BehaviourEncoder, catalog: Catalog, rows: Tensor) -> None:
    """Have the encoder read what the catalog says of these rows' items."""
    values, width = encoder.config.attribute_values, encoder.item_attributes.shape[1]
    if values and len(rows):
        items = catalog.described([catalog.item_ids[row] for row in rows.tolist()])
        encoder.item_attributes[rows] = torch.from_numpy(attribute_codes(items, values, width)[1:])


def _likes(encoder: BehaviourEncoder, catalog: Catalog, row: int, known: int) -> Tensor:
    """(R,) of the known rows those that share the most attributes with a row; none where none shares any."""
    if encoder.config.attribute_values:
        codes = encoder.item_attributes
        own = codes[row][codes[row] > 0]
        shared = torch.isin(codes[: known + 1], own).sum(dim=1)
        return ((shared > 0) & (shared == shared.max())).nonzero().flatten()
    likes = torch.from_numpy(catalog.likes(catalog.item_ids[row]))
    return likes[likes <= known]
