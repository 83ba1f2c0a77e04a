"""What an update can be taken back with."""

import numpy as np
import torch
from torch import Tensor

from lib.model.delta import ROW_TENSORS, dense_state, state_of
from lib.model.item_counts import COUNT_TENSORS
from lib.model.trainer import Trainer


class UndoJournal:
    """What the weights and the optimiser were before an update, of just those rows that it changes."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.dense = {name: tensor.clone() for name, tensor in dense_state(trainer.encoder).items()}
        self.optimizer = {n: v.copy() for n, v in trainer.optimizer_state(np.zeros(0, dtype=np.int64)).items()}
        self.popularity: Tensor | None = None  # of all items, where it was scaled
        self.popularity_scale = 1.0
        self.rows: list[Tensor] = []
        self.saved: list[tuple[Tensor, ...]] = []
        self.count_rows = torch.zeros(0, dtype=torch.int64)
        self.counts: dict[str, Tensor] = {}  # before they were counted

    def record(self, rows: Tensor) -> None:
        """Remember rows that are about to change."""
        row = self.trainer.row_optimizer
        encoder = self.trainer.encoder
        tensors = (encoder.item_embeddings.weight, encoder.item_popularity, row.first, row.second, row.steps)
        self.rows.append(rows)
        self.saved.append(tuple(tensor.detach()[rows].clone() for tensor in tensors))

    def record_counts(self, rows: Tensor) -> None:
        """Remember rows (R,) whose counts are about to change; once an update."""
        state = state_of(self.trainer.encoder)
        self.count_rows = rows
        self.counts = {name: state[name][rows].clone() for name in COUNT_TENSORS}

    def scale_popularity(self, factor: float) -> None:
        """Multiply the popularity of every item, before any of its rows is recorded."""
        popularity = self.trainer.encoder.item_popularity
        self.popularity, self.popularity_scale = popularity.clone(), factor
        popularity *= factor

    def embeddings(self) -> list[tuple[Tensor, Tensor]]:
        """Yield recorded rows (R,) with their embeddings (R, C), the oldest record first."""
        return [(rows, saved[0]) for rows, saved in zip(self.rows, self.saved, strict=True)]

    def changed_rows(self) -> Tensor:
        """Return (R,) all recorded rows, ascending."""
        return torch.unique(torch.cat(self.rows)) if self.rows else torch.zeros(0, dtype=torch.long)

    def undo(self) -> None:
        """Put everything back, the newest record first."""
        row = self.trainer.row_optimizer
        encoder = self.trainer.encoder
        state = state_of(encoder)
        for rows, saved in zip(reversed(self.rows), reversed(self.saved), strict=True):
            targets = (state[ROW_TENSORS[0]], encoder.item_popularity, row.first, row.second, row.steps)
            for target, values in zip(targets, saved, strict=True):
                target[rows] = values
        if self.popularity is not None:
            encoder.item_popularity.copy_(self.popularity)
        for name, values in self.counts.items():
            state[name][self.count_rows] = values
        for name, values in self.dense.items():
            state[name].copy_(values)
        self.trainer.load_optimizer_state(self.optimizer, np.zeros(0, dtype=np.int64))
