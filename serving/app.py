"""build(arguments) -> the application, for `serve run serving.app:build`, `serve deploy` and `afterclick serve`."""

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

from lib.data.guard import CleaningRules
from lib.errors import InputError
from lib.experiments.results import ChallengerConfig
from lib.log.backend import SQLITE
from lib.log.integrity import check_log
from lib.log.layout import LogLayout
from lib.ranking.rules import RankingRules
from lib.versions.registry import Registry
from serving.experiment import prepare_challenger
from serving.recommendations import Recommendations, ReplicaConfig
from serving.rollout import DEPLOYMENT


class Autoscaling(BaseModel):
    """When replicas are started and stopped, where `most_replicas` is given."""

    model_config = ConfigDict(extra="forbid")

    target_ongoing_requests: float = Field(default=16, gt=0, description="of one replica, waiting ones counted")
    upscale_delay_s: float = Field(default=5, ge=0, description="so long the load must ask for more")
    downscale_delay_s: float = Field(default=300, ge=0, description="so long it must do with fewer")


class ServeArguments(BaseModel):
    """What the application is built from."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(description="model folder that serving starts from")
    state: str | None = Field(default=None, description="where log and versions live; MODEL/live if absent")
    data: str | None = Field(default=None, description="ingested dataset whose users' histories serving starts with")
    replicas: int = Field(default=2, ge=1, le=1000)
    most_replicas: int | None = Field(
        default=None, ge=1, le=1000, description="with it, between `replicas` and so many run, as the load asks for"
    )
    aggregators: int = Field(default=1, ge=1, le=1000, description="actors that share the users, for good")
    log: str = Field(default=SQLITE, description="of feedback: sqlite (in the state folder) or kafka://host:port/topic")
    autoscaling: Autoscaling = Autoscaling()
    replica: ReplicaConfig = ReplicaConfig()
    ranking: RankingRules = RankingRules()
    cleaning: CleaningRules = CleaningRules()
    challenger: ChallengerConfig | None = Field(default=None, description="a second model to compare with the live one")

    def check(self) -> None:
        """Refuse what contradicts itself, or the state folder.

        Raises:
            InputError: it names the argument.
        """
        if self.most_replicas is not None and self.most_replicas < self.replicas:
            raise InputError(f"most_replicas: {self.most_replicas} are fewer than the {self.replicas} of replicas")
        self.layout.check(self.state_location)

    @property
    def state_location(self) -> str:
        """Folder or URI of log and versions."""
        return self.state or f"{self.model.rstrip('/')}/live"

    @property
    def layout(self) -> LogLayout:
        """Where the feedback log is, and in how many shards."""
        return LogLayout(self.aggregators, self.log)


def check_state(state: str, pages: bool = False) -> None:
    """Refuse a feedback log that is damaged (`pages`: it is read whole), or ends before what versions learned of it.

    Raises:
        InputError: it names the log, and the remedy.
    """
    check_log(state, Registry(state).log_offset(), pages)


def build(arguments: ServeArguments) -> Application:
    """The application; the model becomes the first version unless versions exist already.

    Raises:
        InputError: model or state are missing, incomplete or damaged, or arguments contradict each other.
    """
    arguments.check()
    Registry(arguments.state_location).start_from(arguments.model)
    check_state(arguments.state_location)
    arguments.layout.record(arguments.state_location)
    wanted = arguments.challenger
    challenger = None if wanted is None else prepare_challenger(wanted, arguments.state_location)
    scaled = {
        "min_replicas": arguments.replicas,
        "max_replicas": arguments.most_replicas,
        **arguments.autoscaling.model_dump(),
    }
    deployment = serve.deployment(
        name=DEPLOYMENT,
        num_replicas=arguments.replicas if arguments.most_replicas is None else None,
        autoscaling_config=None if arguments.most_replicas is None else scaled,
        ray_actor_options={"num_cpus": 0.5},
        max_ongoing_requests=2000,
        health_check_period_s=1,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=5,
        logging_config={"enable_access_log": False},  # a line a request costs more than reading the request
    )(serve.ingress()(Recommendations))
    return deployment.bind(
        arguments.state_location,
        arguments.data,
        arguments.replica,
        arguments.ranking,
        arguments.cleaning,
        arguments.layout,
        challenger,
    )
