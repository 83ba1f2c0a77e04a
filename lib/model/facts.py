"""What a version says of itself: how it was made, and what the weights have learned up to it.

Stored as JSON with every version, in the header of a delta and in the manifest of a model folder. What was not said is
not written; names that are unknown here, those of another release, are left out. Another `kind` needs another format
(lib/model/version_format.py).
"""

from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

Kind = Literal["base", "nearline", "items", "whole", "rollback", "finetune", "promotion", "damaged"]


class NewcomerShare(NamedTuple):
    """The usual share of newcomers in the weight of new events (lib/live/influence.py)."""

    usual: float = 0.0
    updates: int = 0  # that the mean was taken over


class RejectedSpan(NamedTuple):
    """Events that a rollback by the gate took out of the weights."""

    after_offset: int  # they are the events beyond this log offset, up to the version's own
    events: int


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True)

    @model_serializer(mode="wrap")
    def _only_what_was_said(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in write(self).items() if name in self.model_fields_set}


class VersionFacts(_Facts):
    """What a version says of itself and of all that it follows from."""

    kind: Kind = "base"  # what made it
    created: int = 0  # milliseconds; of a delta
    events: int | None = None  # that this version trained on, beyond its parent's
    loss: float | None = None  # of them, before they were learned
    ndcg: float | None = None  # NDCG@10 of the gate's held-out window, before they were learned
    items: int | None = None  # that were put or deleted

    # all versions up to this one
    events_trained: int = 0
    events_rejected: int = 0
    base: int | None = None  # the version that this one follows from by deltas alone
    adopted: int = 0  # when the base was taken over, in milliseconds
    newcomers: NewcomerShare = NewcomerShare()
    rows_by_events: int = 0  # since the base, of items that events alone named
    half_life: float | None = None  # of popularity: the events after which a count is half of what it was

    # a rollback
    restored: int | None = None  # the version whose weights are back
    rejected: RejectedSpan | None = None  # where the gate asked for it
    reason: str | None = None

    # a model that was taken over from an offer
    offer: str | None = None  # the offer's name
    since: int | None = None  # the version whose events it has learned, with `events` more
    rival: int | None = None  # the live version that it was compared with


class TrainingFacts(_Facts):
    """What a manifest says of a training: its result, and beside that every setting by its name."""

    model_config = ConfigDict(extra="allow")

    holdout: str | None = None  # what was held out of the training
    epochs: int = 0
    events_per_batch: int = 2048
    seconds: float = 0.0
    sequences_per_second: float = 0.0
    loss: float | None = None  # of the last epoch
    workers: int = 1
    device: str = "cpu"
    events: int = 0
    users: int = 0
    items: int = 0
