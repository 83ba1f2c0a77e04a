"""The settings of the near-line learner: how the weights follow the feedback."""

from pydantic import Field

from lib.data.replay import ReplaySample
from lib.live.gate import GateConfig
from lib.live.influence import InfluenceLimits
from lib.live.micro_batch import SampleSizes
from lib.settings import Settings


class ReplayConfig(Settings):
    """Which earlier behaviour is learned again with every update, so that it is not forgotten."""

    events: int = Field(default=1000, ge=0, description="in windows of histories; 0: none")
    recent_share: float = Field(
        default=0.3, ge=0, le=1, description="of the windows around the latest events; the others are around any"
    )
    recent_events: int = Field(default=2000, ge=1, description="so many are the latest")
    weight: float = Field(default=0.2, ge=0, description="of a replayed target, where a new event's is 1")


class LearnerConfig(Settings):
    """How the weights follow the feedback."""

    learning_rate: float | None = Field(
        default=None, gt=0, description="default: 1e-3, and of a model wider than 128 as much less as it is wider"
    )
    new_row_boost: float = Field(
        default=20.0,
        ge=0,
        description="times the learning rate that a new item's row moves faster; it fades with the row's updates",
    )
    steps: int = Field(
        default=1,
        ge=1,
        description="training steps of an update, each with the new events and its own part of the replayed windows",
    )
    context_length: int = Field(
        default=50,
        ge=1,
        description="events read before a user's new ones, and of a replayed window; at most the model's max_length",
    )
    context_events: int = Field(
        default=1000,
        ge=0,
        description="events read before new ones of all users together: fewer of each where many act at once",
    )
    negatives: int = Field(default=512, ge=1, description="random items that each update's targets are compared with")
    trained_bytes: int = Field(
        default=14_000_000, ge=0, description="the top layers that fit into it are trained, and pushed"
    )
    new_item_users: int = Field(
        default=2,
        ge=1,
        description="users who must have met an unknown item before it gets a row; one that is put has it",
    )
    new_item_rows: int = Field(
        default=100_000, ge=0, description="rows that items which events alone name may get since the base"
    )
    popularity_half_life: float | None = Field(
        default=None, gt=0, description="in events; default: as many as the catalog has items, and at least 1000"
    )
    keep_bytes: int = Field(
        default=300_000_000,
        ge=1,
        description="bytes of stored versions; older ones are deleted, but for the first, that with which the lineage "
        "began, the base, the newest two snapshots and the deltas since",
    )
    snapshot_every: int = Field(
        default=2000,
        ge=1,
        description="versions from one snapshot to the next at most; sooner where the deltas take a third of "
        "keep_bytes, and as much as a snapshot",
    )
    stalled_seconds: float = Field(
        default=60.0,
        gt=0,
        description="without progress, or an answer, after which the learner or an aggregator is started again",
    )
    seed: int = Field(default=0, ge=0, description="of dropout, negatives, new rows and the gate's candidates")
    replay: ReplayConfig = ReplayConfig()
    gate: GateConfig = GateConfig()
    influence: InfluenceLimits = InfluenceLimits()

    def sample_sizes(self, max_length: int) -> SampleSizes:
        """Return what a learner wants with new events, whose model reads at most `max_length` events of a user."""
        return SampleSizes(
            history_length=min(self.context_length, max_length),
            replay=ReplaySample(
                events=self.replay.events,
                recent_share=self.replay.recent_share,
                recent_events=self.replay.recent_events,
            ),
            held_out_users=self.gate.held_out_users,
            held_out_length=self.gate.held_out_length,
        )
