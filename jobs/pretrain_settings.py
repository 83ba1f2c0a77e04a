"""The settings of a pretraining run, importable without torch."""

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from lib.data.holdout import LEAVE_ONE_OUT, Holdout
from lib.errors import InputError
from lib.model.presets import (
    DEFAULT_INPUTS,
    PRESETS,
    EventInput,
    Precision,
    Preset,
    preset_for,
)
from lib.settings import Seed, Settings

if TYPE_CHECKING:
    from lib.model.buckets import Figures

HistoryLength = Annotated[int, Field(ge=2)]
DropoutRate = Annotated[float, Field(ge=0, lt=1)]


class PretrainSettings(Settings):
    """What a run is made of; None is chosen by the preset (lib/model/presets.py) or by lib/model/trainer.py."""

    holdout: Holdout = Field(default=LEAVE_ONE_OUT, description="what is held out of training, to evaluate on")
    preset: str = Field(default="small", description=f"size of the model: {', '.join(PRESETS)}")
    hidden_size: PositiveInt | None = Field(default=None, description="width of the encoder")
    num_hidden_layers: PositiveInt | None = Field(default=None, description="transformer blocks")
    num_attention_heads: PositiveInt | None = Field(default=None, description="of a block; must divide hidden_size")
    max_length: HistoryLength | None = Field(default=None, description="events of a history that are read")
    dropout: DropoutRate | None = Field(default=None, description="of the inputs and of each residual branch")
    epochs: PositiveInt | None = Field(default=None, description="passes over the training part")
    events_per_batch: PositiveInt | None = Field(default=None, description="of a batch, over all workers")
    learning_rate: PositiveFloat | None = Field(default=None, description="peak of the schedule")
    weight_decay: NonNegativeFloat | None = Field(default=None, description="of AdamW")
    negatives: PositiveInt | None = Field(default=None, description="sampled items that all targets of a batch share")
    clip_norm: PositiveFloat | None = Field(default=None, description="largest norm of all gradients of a step")
    dislike_weight: NonNegativeFloat | None = Field(
        default=None, description="of pushing away what was disliked, where drawing near what was liked counts 1"
    )
    inputs: list[EventInput] = Field(
        default=list(DEFAULT_INPUTS), description="what is read of an event beside its item and its place"
    )
    precision: Precision | None = Field(
        default=None, description="of the blocks; by default bfloat16 for base and large on a GPU, else float32"
    )
    activation_checkpointing: bool | None = Field(
        default=None, description="recompute the blocks' activations in the backward pass"
    )
    accumulation: PositiveInt | None = Field(default=None, description="parts that a worker splits a batch into")
    compile: bool = Field(default=False, description="torch.compile the blocks: worth its minute on a GPU only")
    sharded: bool = Field(default=False, description="shard the dense weights over the workers (FSDP2)")
    neighbours: NonNegativeInt | None = Field(
        default=None,
        description="kept of each item, of what follows it and of what goes together with it, for the ranker; by "
        "default 256 where items have more than 16 events each, else 128, as far as 64 MiB go, and 32 at least; 0: no "
        "ranker, answers are the encoder's alone",
    )
    popularity_half_life_days: PositiveFloat = Field(
        default=7.0, description="after which an event counts half in what is popular"
    )
    stream: bool | None = Field(
        default=None, description="read the events from disk; by default where they would fill the machine's memory"
    )
    seed: Seed = Field(default=0, description="equal seeds give equal weights")

    @field_validator("preset")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in PRESETS:
            raise InputError(f"preset: {name!r} is not one of {', '.join(PRESETS)}")
        return name


def preset_of(settings: PretrainSettings, figures: "Figures") -> Preset:
    """Return the preset that was asked for, fitted to this data, with what was set by hand.

    Raises:
        InputError: the heads do not divide the width.
    """
    preset = preset_for(figures.users_of_length, figures.items, settings.preset)
    return replace(preset, **settings.model_dump(include=set(asdict(preset)), exclude_none=True))
