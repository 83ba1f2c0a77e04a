"""The model's size, length and number of epochs, chosen from the data."""

from dataclasses import dataclass

import numpy as np

from lib.histories import Histories


@dataclass(frozen=True)
class Preset:
    """What `pretrain` uses where the user says nothing."""

    hidden_size: int = 64
    num_hidden_layers: int = 1
    num_attention_heads: int = 2
    max_length: int = 50
    dropout: float = 0.3
    epochs: int = 60
    events_per_batch: int = 2048
    learning_rate: float = 2e-3


def preset_for(histories: Histories) -> Preset:
    """Length from the users' activity, epochs from the number of events per item.

    Measured on the second-newest event (ml-100k, amazon-beauty): see tests/benchmarks.
    """
    lengths = histories.lengths[histories.lengths > 0]
    typical = int(np.quantile(lengths, 0.95)) if len(lengths) else 1
    max_length = 50 if typical <= 50 else 100
    items = max(len(np.unique(histories.rows)), 1)
    dense = len(histories.rows) / items > 40  # many events an item: learned in fewer passes
    return Preset(max_length=max_length, epochs=30 if dense else 60)
