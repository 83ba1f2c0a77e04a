"""build(arguments) -> the application, for `serve run serving.app:build`, `serve deploy` and `afterclick serve`."""

from pydantic import Field
from ray import serve
from ray.serve import Application

from lib.data.dataset import check_rating_scale
from lib.data.guard import CleaningRules
from lib.errors import InputError, refuse_uri
from lib.experiments.results import ChallengerConfig
from lib.log.backend import SQLITE
from lib.log.integrity import check_log
from lib.log.layout import LogLayout
from lib.ranking.rules import RankingRules
from lib.settings import Settings
from lib.versions.accounts import Accounts
from lib.versions.registry import Registry
from serving.aggregator import AggregatorConfig, Trigger
from serving.experiment import prepare_challenger
from serving.fast_path import FastPath
from serving.http import http_application
from serving.recommendations import Recommendations, ReplicaConfig
from serving.rollout import DEPLOYMENT


class Autoscaling(Settings):
    """When replicas are started and stopped, where `most_replicas` is given."""

    target_ongoing_requests: float = Field(default=16, gt=0, description="of one replica, waiting ones counted")
    upscale_delay_s: float = Field(default=5, ge=0, description="so long the load must ask for more")
    downscale_delay_s: float = Field(default=300, ge=0, description="so long it must do with fewer")


class ServeArguments(Settings):
    """What the application is built from."""

    model: str = Field(description="model folder that serving starts from")
    state: str | None = Field(default=None, description="folder of the log, and of all else; MODEL/live if absent")
    versions: str | None = Field(default=None, description="folder or URI of the versions; the state folder if absent")
    data: str | None = Field(default=None, description="ingested dataset whose users' histories serving starts with")
    replicas: int = Field(default=2, ge=1, le=1000, description="processes that answer; the fewest, with most_replicas")
    most_replicas: int | None = Field(
        default=None, ge=1, le=1000, description="with it, between `replicas` and so many run, as the load asks for"
    )
    aggregators: int = Field(default=1, ge=1, le=1000, description="actors that share the users, for good")
    log: str = Field(default=SQLITE, description="of feedback: sqlite (in the state folder) or kafka://host:port/topic")
    autoscaling: Autoscaling = Field(default=Autoscaling(), description="when replicas are started and stopped")
    replica: ReplicaConfig = Field(default=ReplicaConfig(), description="how one replica works")
    trigger: Trigger = Field(default=Trigger(), description="when pending events are released to the learner")
    stalled_seconds: float = Field(
        default=60.0, gt=0, description="without progress, after which an aggregator is started again"
    )
    ranking: RankingRules = Field(default=RankingRules(), description="the rules of every answer")
    cleaning: CleaningRules = Field(default=CleaningRules(), description="what feedback is refused")
    challenger: ChallengerConfig | None = Field(default=None, description="a second model to compare with the live one")

    def check(self) -> None:
        """Refuse what contradicts itself, or the state folder.

        Raises:
            InputError: it names the argument.
        """
        folders = {"model": self.model, "data": self.data, "state": self.state}
        if self.challenger is not None:
            folders["challenger.model"] = self.challenger.model
        for name, folder in folders.items():
            refuse_uri(name, folder or "")
        if self.most_replicas is not None and self.most_replicas < self.replicas:
            raise InputError(f"most_replicas: {self.most_replicas} are fewer than the {self.replicas} of replicas")
        self.layout.check(self.state_location)

    @property
    def state_location(self) -> str:
        """Folder of the log, and of all else that is kept."""
        return self.state or f"{self.model.rstrip('/')}/live"

    @property
    def versions_location(self) -> str:
        """Folder or URI of the versions."""
        return self.versions or self.state_location

    @property
    def layout(self) -> LogLayout:
        """Where the feedback log is, in how many shards, and where the versions are."""
        return LogLayout(self.aggregators, self.log, self.versions)

    @property
    def aggregator(self) -> AggregatorConfig:
        """The settings of each aggregator."""
        return AggregatorConfig(trigger=self.trigger, cleaning=self.cleaning, stalled_seconds=self.stalled_seconds)


class Replica(Recommendations):
    """The deployment: a replica that answers over HTTP."""

    def __serve_build_asgi_app__(self) -> FastPath:
        """Return the application; Serve asks for it once the replica is ready."""
        return http_application(self)


def check_state(state: str, versions: str | None = None, pages: bool = False) -> None:
    """Refuse a feedback log that is damaged (`pages`: it is read whole), or ends before what versions learned of it.

    Args:
        state: the folder.
        versions: where the versions are; None for the folder.
        pages: whether all of the log is read.

    Raises:
        InputError: it names the log, and the remedy.
    """
    check_log(state, Accounts(Registry(versions or state)).log_offset(), pages)


def build(arguments: ServeArguments) -> Application:
    """Build the application; the model becomes the first version unless versions exist already.

    Raises:
        InputError: model or state are missing, incomplete or damaged, the dataset's ratings have another scale than the
            model's, or arguments contradict each other.
    """
    arguments.check()
    registry = Registry(arguments.versions_location)
    registry.start_from(arguments.model)
    if arguments.data is not None:
        check_rating_scale(arguments.data, registry.load().encoder.config.ratings)
    check_state(arguments.state_location, arguments.versions)
    arguments.layout.begin(arguments.state_location)
    wanted = arguments.challenger
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
    )(serve.ingress()(Replica))
    return deployment.bind(
        state=arguments.state_location,
        data=arguments.data,
        config=arguments.replica,
        rules=arguments.ranking,
        aggregator=arguments.aggregator,
        layout=arguments.layout,
        challenger=None if wanted is None else prepare_challenger(wanted, arguments.state_location),
    )
