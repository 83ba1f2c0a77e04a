"""Tables of a line per item that grow without a copy: behind them lies memory for an eighth more lines.

A copy of all tables of a million items takes longer than a new item may take to be answered with.
"""

import math

from torch import Tensor

SPARE_SHARE = 8
MARK = "used_bytes"  # of a table's memory: what is behind other tensors, or behind a part of a table, is not free


def with_room(table: Tensor) -> Tensor:
    """Return a copy of a table (N, ...) with room behind it."""
    copy = _roomy(table, len(table))
    copy.copy_(table.detach())
    return copy


def lengthened(table: Tensor, rows: int, fill: float = 0) -> Tensor:
    """Return a table (N, ...) with `rows` rows, the new ones filled; a copy only where its room is too small."""
    storage, known = table.untyped_storage(), len(table)
    if rows == known:
        return table
    line = table.element_size() * math.prod(table.shape[1:])
    if getattr(storage, MARK, None) == known * line and rows * line <= storage.nbytes():
        setattr(storage, MARK, rows * line)
        grown = table.new_empty(0).set_(storage, 0, (rows, *table.shape[1:]), table.stride())
    else:
        grown = _roomy(table, rows)
        grown[:known] = table.detach()
    grown[known:] = fill
    return grown


def _roomy(table: Tensor, rows: int) -> Tensor:
    larger = table.new_empty((rows + rows // SPARE_SHARE, *table.shape[1:]))
    setattr(larger.untyped_storage(), MARK, larger[:rows].nbytes)
    return larger[:rows]
