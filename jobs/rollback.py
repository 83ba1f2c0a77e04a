"""Bring the weights of a stored version back, on every replica of a running service.

python -m jobs.rollback --version N [--url URL]
"""

from typing import Annotated

import typer

from jobs.client import DEFAULT_URL, post_json


def rollback_command(
    version: Annotated[int, typer.Option(min=1, help="The version whose weights are wanted back.")],
    url: Annotated[str, typer.Option(help="Address of the service.")] = DEFAULT_URL,
) -> None:
    """Roll back: a new version with the weights of a stored one; learning goes on from it."""
    answer = post_json(url, "/v1/rollback", {"version": version})
    print(f"version {answer['model_version']} is live everywhere with the weights of version {answer['restored']}")


if __name__ == "__main__":
    from jobs.command_line import run_command

    run_command(rollback_command)
