"""A near-line learner for a cluster that serves (serving/learner.py has the learner itself).

python -m jobs.nearline --model MODEL     joins the running cluster and keeps a learner there
"""

import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from cluster.local import running_ray

if TYPE_CHECKING:
    from serving.status import LearnerStatus, Unavailable

REPORT_SECONDS = 10.0


def nearline_command(
    model: Annotated[Path, typer.Option(help="Model folder that is being served.")],
    state: Annotated[Path | None, typer.Option(help="Where log and versions live; MODEL/live if absent.")] = None,
    learner_workers: Annotated[int, typer.Option(min=1, help="Processes that learn together.")] = 1,
) -> None:
    """Keep a near-line learner running on the cluster that serves this model; the job lasts as long as it does."""
    import ray
    from ray.exceptions import RayError

    from lib.live.settings import LearnerConfig
    from serving.aggregators import statuses_of
    from serving.learner import aggregators_of, check_logs, start_learner
    from serving.rollout import learner_handle
    from serving.supervision import supervised

    location = str(state or model / "live")
    with running_ray():
        check_logs(location, statuses_of(aggregators_of(location)))
        learner = start_learner(location, LearnerConfig(), learner_workers)
        status = cast("LearnerStatus", ray.get(learner.wait_until_started.remote()))
        print(f"learner at version {status.version}; Ctrl-C stops it", flush=True)
        try:
            with supervised(location, LearnerConfig(), learner_workers):
                while True:
                    time.sleep(REPORT_SECONDS)
                    try:
                        answer = ray.get(learner_handle().status.remote(), timeout=REPORT_SECONDS)
                    except (RayError, ValueError):
                        print("the learner is started again", flush=True)
                        continue
                    print(_line(cast("LearnerStatus | Unavailable", answer)), flush=True)
        finally:
            with suppress(ValueError):  # it died, and was not started again yet
                learner = learner_handle()
                ray.get(learner.stop.remote())
                ray.kill(learner)


def _line(status: "LearnerStatus | Unavailable") -> str:
    """Return what is printed of a status."""
    from serving.status import LearnerStatus

    if not isinstance(status, LearnerStatus):
        return status.state
    return (
        f"version {status.version}  pushes {status.pushes}  rejected {status.rejected_updates}"
        f"  events {status.events_trained}"
    )


if __name__ == "__main__":
    from jobs.command_line import run_command

    run_command(nearline_command)
