"""Rows of the item table for items that came while live: each starts as those that are like it."""

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from lib.data.attributes import attribute_codes
from lib.data.catalog import Catalog
from lib.model.delta import grow_items
from lib.model.encoder import BehaviourEncoder
from lib.model.trainer import Trainer

MOST_LOOKED_AT = 1000  # rows of a code


class Likes:
    """Finds the rows that are most like a new one: by attribute codes where the model reads them, else by words.

    Rows are listed by code once, when they are first asked for, and from then on as they are encoded. A row stays
    listed under codes that it had before; the codes of what is found are compared. So a look costs the same in a
    catalog of any size.
    """

    def __init__(self, encoder: BehaviourEncoder, catalog: Catalog):
        self.encoder = encoder
        self.catalog = catalog
        self.forget()

    def forget(self) -> None:
        """List all rows anew when they are next asked for: the encoder has other codes now."""
        self._listed: tuple[np.ndarray, np.ndarray] | None = None  # rows by code, and where each code's rows start
        self._added: defaultdict[int, set[int]] = defaultdict(set)

    def encode(self, rows: Tensor) -> None:
        """Have the encoder read what the catalog says of these rows' items."""
        values, width = self.encoder.config.attribute_values, self.encoder.item_attributes.shape[1]
        if not values or not len(rows):
            return
        items = self.catalog.described([self.catalog.item_ids[row] for row in rows.tolist()])
        codes = attribute_codes(items, values, width)[1:]
        self.encoder.item_attributes[rows] = torch.from_numpy(codes)
        for row, own in zip(rows.tolist(), codes.tolist(), strict=True):
            for code in filter(None, own):
                self._added[code].add(row)

    def prepare(self) -> None:
        """Make the lists now: it takes seconds where there are a million items."""
        if self.encoder.config.attribute_values:
            self._list()
        else:
            self.catalog.prepare_likes()

    def of(self, row: int, known: int) -> np.ndarray:
        """Return (R,) of the rows up to `known` those most like a row; none where none is."""
        if not self.encoder.config.attribute_values:
            return self.catalog.likes(self.catalog.item_ids[row], known)
        codes = self.encoder.item_attributes.numpy()
        own = codes[row][codes[row] > 0]
        lists = sorted((self._rows_of(code) for code in own.tolist()), key=len)
        found, best = [np.zeros(0, dtype=np.int64)], 0
        for place, listed in enumerate(lists):
            if best > len(lists) - place:  # what has none of the codes before shares fewer
                break
            rows = listed[listed <= known]
            shared = (codes[rows][:, :, None] == own).any(axis=2).sum(axis=1)
            if (most := int(shared.max(initial=0))) > best:
                found, best = [], most
            if most == best > 0:
                found.append(rows[shared == most])
        return np.unique(np.concatenate(found))

    def _rows_of(self, code: int) -> np.ndarray:
        """Return (R,) rows of a code; of very many some, spread evenly."""
        rows, starts = self._list()
        listed = rows[starts[code] : starts[code + 1]]
        if added := self._added.get(code):
            return np.concatenate([_some(listed), _some(np.array(sorted(added), dtype=np.int64))])
        return _some(listed)

    def _list(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all rows by code, and where each code's rows start."""
        if self._listed is None:
            codes = self.encoder.item_attributes.numpy()
            rows, places = codes.nonzero()
            keys = np.sort(codes[rows, places].astype(np.int64) << 32 | rows)
            starts = np.searchsorted(keys, np.arange(len(self.encoder.attribute_embeddings.weight) + 1) << 32)
            self._listed = keys & 0xFFFFFFFF, starts
            self._added.clear()
        return self._listed


def _some(rows: np.ndarray) -> np.ndarray:
    return rows[:: max(-(-len(rows) // MOST_LOOKED_AT), 1)]


def add_rows(trainer: Trainer, catalog: Catalog, known: int, seed: int, likes: Likes) -> None:
    """Give weights to the items of a catalog beyond the first `known`: the mean of those that are like each, or of all.

    Equal items lie a little apart, so that each can go its own way.
    """
    encoder, needed = trainer.encoder, len(catalog) + 1
    if needed == known + 1:
        return
    if needed > encoder.config.item_rows:
        grow_items(encoder, needed + max(min(needed // 10, 1000), needed // 100))
        trainer.row_optimizer.grow(encoder.config.item_rows)
    added = torch.arange(known + 1, needed)
    likes.encode(added)
    generator = torch.Generator().manual_seed(seed + needed)
    table = encoder.item_embeddings.weight.detach()
    table[added] = torch.randn(len(added), table.shape[1], generator=generator) * encoder.config.initializer_range
    mean = None
    for row in added.tolist():
        alike = torch.from_numpy(likes.of(row, known))
        if len(alike):
            table[row] += table[alike].mean(dim=0)
        elif known:
            mean = table[1 : known + 1].mean(dim=0) if mean is None else mean
            table[row] += mean
    if encoder.counts is not None:
        encoder.counts.first_at[added] = encoder.counts.clock  # new from now on, also before anybody met them
    trainer.items = len(catalog)
