"""List the versions that are stored for a served model.

python -m jobs.versions --model MODEL [--json FILE] [--check]
"""

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.configuration import write_json
from jobs.tables import print_table
from lib.errors import InputError, refuse_uri

if TYPE_CHECKING:
    from lib.versions.ledger import Ledger
    from lib.versions.registry import VersionInfo


def stored_versions(model: Path, state: str | None = None) -> "list[VersionInfo]":
    """Return the versions of a model folder: those of its live state, or its own alone if it was never served.

    Raises:
        InputError: there is no such model, or nothing is stored at `state`.
    """
    # torch and transformers, which `--help` need not wait for
    from lib.model.folder import read_manifest
    from lib.versions.registry import Registry, VersionInfo

    manifest = read_manifest(model)
    versions = Registry.of(state or f"{model}/live").versions()
    if state is not None and not versions:
        raise InputError(
            f"state: no versions are stored at {state}; give the --state that `afterclick serve` was given"
        )
    size = sum(path.stat().st_size for path in model.iterdir() if path.is_file())
    return versions or [VersionInfo.of_snapshot(manifest, size)]


def checked_ledger(state: str) -> "Ledger":
    """Compare the stored versions with the feedback log beside them.

    Raises:
        InputError: there are no versions or no log, or they cannot be read.
    """
    from lib.log.layout import read_log
    from lib.versions.accounts import Accounts
    from lib.versions.ledger import check
    from lib.versions.registry import Registry

    refuse_uri("state", state)
    registry = Registry.of(state)
    registry.check_format()
    # read before the log: what is learned meanwhile is in the log already
    chain = Accounts(registry).newest_lineage()
    if not chain:
        raise InputError(
            f"state: no versions are stored at {state}, so there is nothing to check; serve the model first"
        )
    with read_log(state) as log:
        return check(chain, log)


def versions_command(
    model: Annotated[Path, typer.Option(help="Model folder.")],
    state: Annotated[str | None, typer.Option(help="Where versions live; MODEL/live if absent.")] = None,
    last: Annotated[int, typer.Option(min=1, help="How many of the newest to show.")] = 20,
    json_: Annotated[Path | None, typer.Option("--json", help="Write all of them there.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Prove by the log that each event was learned once.")] = False,
) -> None:
    """List stored versions, newest last; or check them: exit status 1 where an event was learned twice, or never."""
    if check:
        ledger = checked_ledger(state or f"{model}/live")
        if json_ is not None:
            write_json(json_, asdict(ledger))
        print(ledger)
        for fault in ledger.faults:
            print(f"fault: {fault}")
        raise typer.Exit(1 if ledger.faults else 0)
    versions = stored_versions(model, state)
    if json_ is not None:
        write_json(json_, [version.model_dump() for version in versions])
    rows = []
    for version in versions[-last:]:
        made_by: str = version.facts.kind
        if version.facts.restored is not None:
            made_by += f" to {version.facts.restored}"
        created = datetime.fromtimestamp(version.created / 1000, UTC).strftime("%Y-%m-%d %H:%M")
        events = "" if version.facts.events is None else str(version.facts.events)
        rows.append(
            [str(version.version), version.kind, made_by, created, str(version.log_offset), events, _size(version.size)]
        )
    print_table(["version", "stored", "made by", "created", "log offset", "events", "size"], rows, texts=4)
    if len(versions) > last:
        print(f"{len(versions) - last} older versions; show more with --last")


def _size(count: int) -> str:
    """Write a number of bytes in three digits."""
    return f"{count} B" if count < 1000 else f"{count / 1e3:.3g} kB" if count < 1e6 else f"{count / 1e6:.3g} MB"


if __name__ == "__main__":
    from jobs.command_line import run_command

    run_command(versions_command)
