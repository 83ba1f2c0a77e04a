"""A near-line learner for a cluster that serves (serving/learner.py has the learner itself).

python -m jobs.nearline --model MODEL     joins the running cluster and keeps a learner there
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from cluster.local import running_ray

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from serving.status import LearnerStatus


def nearline_command(
    model: Annotated[Path, typer.Option(help="Model folder that is being served.")],
    state: Annotated[str | None, typer.Option(help="Where log and versions live; MODEL/live if absent.")] = None,
    learner_workers: Annotated[int, typer.Option(min=1, help="Processes that learn together.")] = 1,
) -> None:
    """Keep a near-line learner running on the cluster that serves this model; the job lasts as long as it does."""
    import ray

    from serving.aggregators import statuses_of
    from serving.learner import aggregators_of, check_logs, start_learner

    state = state or f"{model}/live"
    with running_ray():
        check_logs(state, statuses_of(aggregators_of(state)))
        learner = start_learner(state, workers=learner_workers)
        print(f"learner at version {_status_of(learner).version}; Ctrl-C stops it", flush=True)
        try:
            while True:
                time.sleep(10)
                status = _status_of(learner)
                print(
                    f"version {status.version}  pushes {status.pushes}  rejected {status.rejected_updates}"
                    f"  events {status.events_trained}",
                    flush=True,
                )
        finally:
            ray.get(learner.stop.remote())
            ray.kill(learner)


def _status_of(learner: "ActorHandle") -> "LearnerStatus":
    import ray

    return cast("LearnerStatus", ray.get(learner.status.remote()))


if __name__ == "__main__":
    from jobs.command_line import run_command

    run_command(nearline_command)
