"""What can be chosen of a model without loading torch: what it reads of an event, its precision, and three presets.

The smallest preset is fitted to the data.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from lib.errors import InputError

EventInput = Literal["kind", "gap", "value", "attributes"]  # what can be read of an event beside its item and its place
INPUTS: tuple[EventInput, ...] = get_args(EventInput)
# the gap improved ranking on none of the data sets (tests/benchmarks/results)
DEFAULT_INPUTS: tuple[EventInput, ...] = ("kind", "value", "attributes")
DISLIKE_WEIGHT = 0.4  # of an answer (lib/model/dislikes.py), in units of the score, which is about a cosine
Precision = Literal["float32", "bfloat16"]
# sampled items that targets are compared with, where the preset is fitted to the data: a share of the items
NEGATIVES_SHARE, FEWEST_NEGATIVES, MOST_NEGATIVES = 1 / 6, 512, 2048


@dataclass(frozen=True)
class Preset:
    """What `pretrain` uses where the user sets nothing; jobs/pretrain_settings.py has the bounds of each value."""

    hidden_size: int = 64
    num_hidden_layers: int = 1
    num_attention_heads: int = 2
    max_length: int = 50
    dropout: float = 0.3
    epochs: int = 30
    events_per_batch: int = 2048
    learning_rate: float = 2e-3
    negatives: int = 512
    gpu_precision: Precision = "float32"  # on a CPU it is float32, unless set otherwise
    activation_checkpointing: bool = False
    accumulation: int = 1

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads != 0:
            raise InputError(
                f"hidden_size: {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )

    def shape(self) -> dict[str, Any]:
        """Return the settings of BehaviourEncoderConfig that it decides."""
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_length", "dropout")
        return {name: getattr(self, name) for name in names} | {"intermediate_size": 2 * self.hidden_size}


# A block of width C has 12 C^2 weights. Heads are 64 wide, what attention kernels are made for.
PRESETS = {
    "small": Preset(),
    "base": Preset(  # 25 million weights in the blocks
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_length=200,
        dropout=0.2,
        epochs=20,
        events_per_batch=16_384,
        learning_rate=5e-4,
        gpu_precision="bfloat16",
    ),
    "large": Preset(  # 151 million
        hidden_size=1024,
        num_hidden_layers=12,
        num_attention_heads=16,
        max_length=500,
        dropout=0.1,
        epochs=10,
        events_per_batch=32_768,
        learning_rate=2e-4,
        gpu_precision="bfloat16",
        activation_checkpointing=True,
    ),
}


def preset_for(users_of_length: Sequence[Sequence[int]], items: int, name: str = "small") -> Preset:
    """Return a preset; of `small` the length follows from the users' activity, the negatives from the number of items.

    Measured on second-newest events: see tests/benchmarks. The larger ones are not measured: their sizes and rates are
    those that language models of their width are trained with.

    Args:
        users_of_length: (length, users with so many events), the lengths rising.
        items: that have events.
        name: of the preset.
    """
    preset = PRESETS[name]
    if name != "small":
        return preset
    lengths, users = np.array(users_of_length, dtype=np.int64).reshape(-1, 2).T
    most_are_short = users[lengths <= 50].sum() >= 0.95 * users.sum()
    nearest_power = round(math.log2(max(items * NEGATIVES_SHARE, 1)))
    return replace(
        preset,
        max_length=50 if most_are_short else 100,
        negatives=min(max(2**nearest_power, FEWEST_NEGATIVES), MOST_NEGATIVES),
    )
