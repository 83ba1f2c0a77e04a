"""What training workers read: a dataset in memory, or a fine-tune's histories; jobs/event_stream.py streams others."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from lib.data.catalog import Catalog
from lib.data.dataset import read_events, read_items, read_rating_scale
from lib.data.events import EVENT_KINDS
from lib.data.histories import histories_of
from lib.data.holdout import training_part
from lib.data.ratings import STARS, RatingScale
from lib.errors import InputError
from lib.live.finetuning import WeightedBatches
from lib.model.batches import SequenceBatches
from lib.model.buckets import Figures, figures_of, figures_of_all
from lib.model.encoder import BehaviourEncoderConfig
from lib.ranking.fit import Held, Whole


@dataclass(frozen=True)
class TrainingData(Whole):
    """The part of the histories that is trained on, and the catalog of all items."""

    catalog: Catalog
    ratings: RatingScale = STARS

    @cached_property
    def figures(self) -> Figures:
        """What must be known of the histories before training."""
        return figures_of_all([figures_of(0, self.histories, ratings=self.ratings)])

    def batches(self, config: BehaviourEncoderConfig, without: Held | None = None) -> SequenceBatches:
        """Return training batches for an encoder, without some of the events."""
        histories = self.histories if without is None else self.histories.select(~without(self.histories))
        return SequenceBatches(histories, config)


@dataclass(frozen=True, kw_only=True)
class WeightedData(TrainingData):
    """The data of a fine-tune, in which each event has a weight of its own as a target."""

    weights: np.ndarray  # (E,)

    def batches(self, config: BehaviourEncoderConfig, without: Held | None = None) -> SequenceBatches:
        """Return training batches for an encoder; a fine-tune keeps nothing back."""
        assert without is None
        return WeightedBatches(self.histories, config, self.weights)


def read_training_data(data: str | Path, holdout: str) -> TrainingData:
    """Read an ingested dataset into memory.

    Raises:
        InputError: it is missing, or too small to learn from.
    """
    events = read_events(data)
    catalog = Catalog.of_dataset(events["item_id"].unique().to_pylist(), read_items(data))
    histories = training_part(histories_of(events, catalog.row_of, EVENT_KINDS), holdout)
    training_data = TrainingData(histories, catalog, read_rating_scale(data))
    refuse_too_small(data, holdout, training_data.figures)
    return training_data


def refuse_too_small(data: str | Path, holdout: str, figures: Figures) -> None:
    """Refuse data that has nothing to learn from.

    Raises:
        InputError: no user has two events.
    """
    if figures.users_to_learn_from == 0:
        raise InputError(
            f"data: {data} leaves no user with two events to learn from (holdout {holdout}); ingest more events"
        )
