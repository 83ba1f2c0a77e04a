"""The status: what each part of the service says of itself, as GET /v1/status shows it.

Whoever knows a part makes its model, which is checked once, there.
"""

from pydantic import BaseModel, ConfigDict, Field

from lib.experiments.results import ChallengerConfig
from lib.experiments.summary import Comparison, ShadowComparison


class Unavailable(BaseModel):
    """A part that does not answer now."""

    model_config = ConfigDict(extra="forbid")  # so that a part that says more is never read as one that is away

    state: str = Field(description="why, such as restarting")


class ReplicaStatus(BaseModel):
    """One replica; counts are those since its process started."""

    replica_id: str
    process: int = Field(description="id of its process")
    version: int = Field(description="the version that it answers with")
    checksum: str = Field(description="fingerprint of that version's whole state")
    log_offset: int = Field(description="the newest event of the log that the version has learned from")
    batches: int = Field(description="batches in which requests were answered")
    users_cached: int = Field(description="users whose histories a replica keeps a copy of")
    answers: int = Field(description="recommendation requests answered")
    refused: int = Field(description="recommendation requests refused, as their answers would have come too late")
    unrecorded: int = Field(description="explored answers that could not be written down")
    events: int = Field(description="events received")
    deltas: int = Field(description="pushed deltas applied")
    catch_ups: int = Field(description="times that this replica caught up from the registry")
    attributes_left_out: int = Field(
        description="of items put while live that did not fit their columns; the log of the service names them"
    )
    mismatches: int = Field(description="deltas that came out wrong here, so that the version was loaded whole")
    latency_buckets: list[tuple[str, int]] = Field(
        description="upper bound in seconds, and how many answers took up to so long and longer than the bound before"
    )
    latency_sum: float = Field(description="seconds of all answers")
    idle_rules: list[str] = Field(description="ranking rules without effect on the catalog as it is now, and why")


class RejectionStatus(BaseModel):
    """An update that failed its gate, or was set aside."""

    version: int = Field(description="the live version then")
    after_offset: int = Field(description="its events are those of the log beyond this one")
    last_offset: int = Field(description="up to this one")
    events: int
    events_rejected: int = Field(description="with those of all rejections before")
    reason: str
    harmful: bool = Field(description="false: learning rested, whatever the events were, and they may be replayed")
    time: int = Field(description="milliseconds since 1970, UTC")
    traceback: str | None = Field(default=None, description="where learning raised, of what was set aside")
    item_revision: int | None = Field(default=None, description="of a changed item that was set aside, not events")


class FreshnessStatus(BaseModel):
    """From an event's acknowledgement to its version live on all replicas, in milliseconds, of the latest events."""

    last_ms: float
    p50_ms: float
    p99_ms: float
    count: int = Field(description="events since the learner started")


class StoredVersionsStatus(BaseModel):
    """What the stored versions take."""

    bytes: int = Field(description="of all stored versions")
    keep_bytes: int = Field(description="setting: beyond it older versions are deleted")
    pruned: int = Field(description="versions deleted to make room since the learner started")


class UnknownItemsStatus(BaseModel):
    """Items that events name and the catalog does not have."""

    waiting: int = Field(description="items that too few users have met to get a row")
    rows: int = Field(description="rows that such items got since the base")
    refused: int = Field(description="times that one got none, as new_item_rows were given; since the learner started")


class LearnerStatus(BaseModel):
    """The near-line learner; pushes and delays are those since its process started."""

    state: str = Field(description="running, waiting for storage, or waiting for events")
    storage_error: str | None = Field(
        description="why a version cannot be stored, or no events can be had, and the remedy"
    )
    damage: list[str] = Field(description="stored files that were damaged when it started, and are passed over")
    version: int = Field(description="the newest version")
    checksum: str = Field(description="fingerprint of that version's whole state")
    base: int = Field(description="the pretrained or fine-tuned version that it grew from")
    log_offset: int = Field(description="the newest event of the log that the version has learned from")
    events_trained: int = Field(description="events that the weights have learned from")
    events_rejected: int = Field(description="events whose update failed its gate")
    rejected_updates: int = Field(description="updates that failed their gate")
    last_rejection: RejectionStatus | None
    stored: StoredVersionsStatus
    unknown_items: UnknownItemsStatus
    set_aside_updates: int = Field(description="updates that were set aside, as learning raised at every try")
    set_aside: list[RejectionStatus] = Field(description="the newest of them")
    pushes: int = Field(description="versions pushed to the replicas")
    loss: float | None = Field(description="of new events before they were learned, a running mean")
    unreached_replicas: int = Field(description="replicas that the newest push did not reach")
    freshness: FreshnessStatus | None = Field(description="null before the first event is live everywhere")
    # what the latest updates took: the median and, under `_p99`, the 99th percentile; null before the first
    learn_ms: float | None = Field(default=None, description="training, gate and storing")
    learn_ms_p99: float | None = None
    push_ms: float | None = Field(default=None, description="until the version is live on all replicas")
    push_ms_p99: float | None = None
    push_bytes: float | None = Field(default=None, description="size of a pushed delta")
    push_bytes_p99: float | None = None
    build_ms: float | None = Field(default=None, description="of a push: making its bytes")
    build_ms_p99: float | None = None
    transfer_ms: float | None = Field(default=None, description="of a push: the way to the last replica, and back")
    transfer_ms_p99: float | None = None
    apply_ms: float | None = Field(default=None, description="of a push: the longest that a replica took to apply it")
    apply_ms_p99: float | None = None
    workers: int = Field(description="processes that learn together")
    process: int = Field(description="id of its process")


class FeedbackStatus(BaseModel):
    """The feedback that was taken; counts are those since an aggregator's process started."""

    state: str = Field(description="folder or URI of log and versions")
    log_offset: int = Field(description="newest offset of the feedback log")
    learned_offset: int = Field(description="as far as the learner has asked beyond")
    pending: int = Field(description="events that wait for the learner")
    events: int = Field(description="events made durable")
    duplicates: int = Field(description="events known already")
    rejected: dict[str, int] = Field(description="events rejected, by reason")
    noticed: dict[str, int] = Field(description="events that were taken although they look odd, by reason")
    users: int = Field(description="whose histories are kept")
    commits: int = Field(description="writes to the log, each of the events that came together")
    item_revision: int = Field(description="the newest change of an item")
    damage: list[str] = Field(
        description="what was torn when it started, or is no feedback, and is passed over; what cannot be checked now"
    )


class AggregatorStatus(FeedbackStatus):
    """The only aggregator, or the one of a shard."""

    shard: int
    process: int = Field(description="id of its process")


class AggregatorsStatus(FeedbackStatus):
    """The aggregators of several shards: their sums, and each."""

    shards: list[AggregatorStatus]


class AggregatorsUnavailable(Unavailable):
    """Aggregators of which one does not answer now."""

    shards: list[AggregatorStatus] = Field(description="those that answer")


class ExperimentState(BaseModel):
    """Which experiment it is, and how far it has come."""

    name: str
    state: str = Field(description="running, promoting, promoted, refused or rolled back")
    version: int | None = Field(description="the challenger's, once it is promoted")


class ExperimentStatus(Comparison, ChallengerConfig, ExperimentState):
    """Two models side by side, each for its users."""


class ShadowStatus(ShadowComparison, ChallengerConfig, ExperimentState):
    """A challenger that is asked and compared, and never shown."""


class Status(BaseModel):
    """The whole service."""

    model_version: int = Field(description="newest version")
    replicas: list[ReplicaStatus] = Field(description="that are alive")
    learner: LearnerStatus | Unavailable
    aggregator: AggregatorStatus | AggregatorsStatus | AggregatorsUnavailable | Unavailable
    freshness: FreshnessStatus | None = Field(description="as the learner says; null before the first event is live")
    experiment: ExperimentStatus | ShadowStatus | Unavailable | None = Field(
        default=None, description="of two models side by side; null without a second one"
    )
