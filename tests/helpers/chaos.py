"""Chaos: a load that sends every event until it is acknowledged, the processes that can be killed, and the proofs.

`tests/serving/test_chaos.py` kills parts of the session's service, `tests/benchmarks/chaos.py` for minutes those of one
of its own, and now and then all of it.
"""

import asyncio
import itertools
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from lib.data.history import History
from lib.log.layout import read_log
from lib.log.reader import LogReader
from lib.model.fingerprint import fingerprint
from lib.versions.accounts import Accounts
from lib.versions.folder import LoadedVersion
from lib.versions.ledger import check
from lib.versions.registry import Registry
from lib.versions.rejections import Rejections

SENDERS = 16
LARGEST_REQUEST = 50  # events that waited meanwhile go out together
USERS = 2000  # share the events, which keeps each below what counts as a flood
PATIENCE = 120.0
SAMPLED_USERS = 20  # whose histories are compared with the log

# what the process of each part is called
TITLES = {
    "aggregator": "ray::Aggregator",
    "learner": "ray::Learner",
    "replica": "ray::ServeReplica:afterclick:Recommendations",
    "controller": "ray::ServeController",
    "proxy manager": "ray::HAProxyManager",
}
PROXY = "proxy"
PARTS = (*TITLES, PROXY)


# -------------------------------------------------------------------------------------------------------- the processes


def command_line(process: int) -> str:
    """What a process is called, empty when it has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def descendants(root: int) -> list[int]:
    """The processes that a process started, and those that they started, and so on."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, waiting = [], [root]
    while waiting:
        started = children.get(waiting.pop(), [])
        found += started
        waiting += started
    return found


def processes_of(root: int) -> dict[str, list[int]]:
    """The processes of each part of the service that process `root` started; HAProxy also when it is an orphan."""
    found: dict[str, list[int]] = {part: [] for part in PARTS}
    for process in descendants(root):
        title = command_line(process)
        for part, beginning in TITLES.items():
            if title.startswith(beginning):
                found[part].append(process)
    found[PROXY] = haproxies_of(root)
    return found


def haproxies_of(root: int) -> list[int]:
    """The HAProxy processes of a service, by their configuration file (cluster/local.py)."""
    numbers = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
    titles = ((number, command_line(number)) for number in numbers)
    return [number for number, title in titles if "haproxy -db" in title and f"afterclick-{root}/" in title]


def everything_of(root: int) -> list[int]:
    """Every process of a service, its root first."""
    return [root, *descendants(root), *haproxies_of(root)]


def kill(processes: Iterable[int]) -> None:
    """Kill -9; one that has ended already is no fault."""
    for process in processes:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue


# ------------------------------------------------------------------------------------------------------------- the load


@dataclass(frozen=True)
class Failure:
    """A request that did not end in a 200."""

    at: float  # monotonic seconds
    request: str
    kind: str


@dataclass
class Load:
    """Events and questions at fixed rates, whatever happens; what came of each is kept."""

    url: str
    name: str  # of its users and events
    items: list[str]
    replicas: int = 2
    events_per_second: float = 200.0
    questions_per_second: float = 100.0
    sent: set[tuple[str, str]] = field(default_factory=set)  # (user_id, event_id)
    acknowledged: list[tuple[str, str]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    good_answers: list[tuple[float, float]] = field(default_factory=list)  # monotonic seconds: asked, answered
    faults: list[str] = field(default_factory=list)  # answers that must never be given
    floor: int = 0  # a version that every live replica had; none answers with an older one from then on
    versions: dict[str, int] = field(default_factory=dict)  # the newest seen of each replica

    def __post_init__(self) -> None:
        self._numbers = itertools.count()
        self._waiting: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._unacknowledged = 0
        self._stopping = False
        self._tasks: list[asyncio.Task] = []
        self._rates: list[asyncio.Task] = []
        self._random = random.Random(self.name)

    async def __aenter__(self) -> "Load":
        connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=PATIENCE)
        self.client = aiohttp.ClientSession(self.url, timeout=timeout, connector=connector)
        return self

    def begin(self) -> None:
        """Send and ask from now on."""
        self._tasks = [asyncio.create_task(self._send()) for _ in range(SENDERS)]
        self._rates = [
            asyncio.create_task(self._at_rate(self._new_event, self.events_per_second)),
            asyncio.create_task(self._at_rate(self._ask_in_turn, self.questions_per_second)),
            asyncio.create_task(self._watch()),
        ]

    async def __aexit__(self, *exception: object) -> None:
        for task in [*self._rates, *self._tasks]:
            task.cancel()
        await asyncio.gather(*self._rates, *self._tasks, return_exceptions=True)
        await self.client.close()

    async def _at_rate(self, action: Callable[[], None], per_second: float) -> None:
        start = time.monotonic()
        for number in itertools.count():
            await asyncio.sleep(max(0.0, start + number / per_second - time.monotonic()))
            if self._stopping:
                return
            action()

    def _new_event(self) -> None:
        number = next(self._numbers)
        user, item = f"{self.name}-{self._random.randrange(USERS)}", self._random.choice(self.items)
        event = {"user_id": user, "item_id": item, "event": "click", "event_id": f"{self.name}-{number}"}
        self.sent.add((user, event["event_id"]))
        self._unacknowledged += 1
        self._waiting.put_nowait(event)

    async def _send(self) -> None:
        while True:
            events = [await self._waiting.get()]
            while len(events) < LARGEST_REQUEST and not self._waiting.empty():
                events.append(self._waiting.get_nowait())
            pause = 0.05
            while (answer := await self.request("POST", "/v1/events", {"events": events})) is None:
                await asyncio.sleep(pause)
                pause = min(2 * pause, 1.0)
            if answer["rejected"] or answer["accepted"] + answer["duplicates"] != len(events):
                self.faults.append(f"events were not taken: {answer}")
            self.acknowledged += [(event["user_id"], event["event_id"]) for event in events]
            self._unacknowledged -= len(events)

    def _ask_in_turn(self) -> None:
        self._tasks = [task for task in self._tasks if not task.done()]
        self._tasks.append(asyncio.create_task(self._ask()))

    async def _ask(self) -> None:
        user, floor, asked = f"{self.name}-{self._random.randrange(USERS)}", self.floor, time.monotonic()
        answer = await self.request("POST", "/v1/recommendations", {"user_id": user, "k": 5})
        if answer is None:
            return
        self.good_answers.append((asked, time.monotonic()))
        if len(answer["items"]) != 5:
            self.faults.append(f"an answer has {len(answer['items'])} of 5 items")
        if answer["model_version"] < floor:
            self.faults.append(f"an answer is of version {answer['model_version']}, after every replica had {floor}")

    async def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """One request; None, and a noted failure, where it does not end in a 200."""
        answer, failure = await self._tried(method, path, body)
        if answer is None:
            self.failures.append(Failure(time.monotonic(), path, failure))
        return answer

    async def _tried(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[dict[str, Any] | None, str]:
        try:
            async with self.client.request(method, path, json=body) as response:
                content = await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            return None, type(error).__name__
        if response.status == 200:
            return json.loads(content), ""
        return None, f"{response.status} {_reason(content)}"

    async def status(self) -> dict[str, Any] | None:
        """The status where it can be had, with what it says of versions held against what was said before."""
        known = dict(self.versions)  # two that are asked for at once may come in another order
        status, _ = await self._tried("GET", "/v1/status", None)
        if status is None:
            return None
        seen = {replica["replica_id"]: replica["version"] for replica in status["replicas"]}
        for replica, version in seen.items():
            if version < known.get(replica, 0):
                self.faults.append(f"replica {replica} went back from version {known[replica]} to {version}")
        self.versions |= {replica: max(version, self.versions.get(replica, 0)) for replica, version in seen.items()}
        if len(seen) == self.replicas:
            self.floor = max(self.floor, min(seen.values()))
        return status

    async def _watch(self) -> None:
        while True:
            await self.status()
            await asyncio.sleep(0.5)

    async def settled(self) -> dict[str, Any]:
        """Send no more, and wait until every event is acknowledged, learned and live on every replica; the status then.

        Raises:
            TimeoutError: that did not come true.
        """
        self._stopping = True
        return await self.wait_until(
            "everything is learned and live",
            lambda status: self._unacknowledged == 0 and is_whole(status, self.replicas) and _is_learned(status),
            while_learning=True,  # it may be far behind
        )

    async def wait_until(
        self, what: str, condition: Callable[[dict[str, Any]], bool], while_learning: bool = False
    ) -> dict[str, Any]:
        """The first status of which a condition is true.

        Raises:
            TimeoutError: none was for PATIENCE seconds; with `while_learning`, in which nothing was learned either.
        """
        deadline, status, learned = time.monotonic() + PATIENCE, None, 0
        while time.monotonic() < deadline:
            status = await self.status()
            if status is not None and condition(status):
                return status
            if while_learning and status is not None and status["learner"].get("log_offset", 0) > learned:
                deadline, learned = time.monotonic() + PATIENCE, status["learner"]["log_offset"]
            await asyncio.sleep(0.1)
        raise TimeoutError(f"waited {PATIENCE:.0f} s in vain until {what}; the last status: {status}")


def _reason(content: bytes) -> str:
    """What an error says, for counting."""
    try:
        return json.loads(content)["detail"][:60]
    except (ValueError, KeyError, TypeError):
        return content.decode(errors="replace").split("\n")[0][:60]


def is_whole(status: dict[str, Any], replicas: int) -> bool:
    """Whether every part answers."""
    present = "process" in status["learner"] and "log_offset" in status["aggregator"]
    return present and len(status["replicas"]) == replicas


def aggregators_of(status: dict[str, Any]) -> list[dict[str, Any]]:
    """What each aggregator says of itself."""
    return status["aggregator"].get("shards", [status["aggregator"]])


def _is_learned(status: dict[str, Any]) -> bool:
    learner = status["learner"]
    states = {(replica["version"], replica["checksum"]) for replica in status["replicas"]}
    return learner["log_offset"] == status["aggregator"]["log_offset"] and states == {
        (learner["version"], learner["checksum"])
    }


# ------------------------------------------------------------------------------------------------------------ the kills


@dataclass
class Kill:
    """A part that was killed, and how long it took until the service was what it had been."""

    part: str
    processes: list[int]
    at: float = field(default_factory=time.monotonic)
    whole_after: float | None = None  # seconds until every part answered, none of them in a killed process

    def answered_after(self, load: Load) -> float | None:
        """Seconds until somebody who asked afterwards had an answer."""
        return min((answered - self.at for asked, answered in load.good_answers if asked > self.at), default=None)


def strike(root: int, part: str, choice: random.Random) -> Kill | None:
    """Kill one process of a part; None where it has none now."""
    running = processes_of(root)[part]
    if not running:
        return None
    # one replica of several; of HAProxy, which may be about to follow itself on, all
    victims = running if part == PROXY else [choice.choice(running)]
    kill(victims)
    return Kill(part, victims)


async def recovered(load: Load, root: int, kill: Kill) -> None:
    """Wait until every part runs and answers, none of them in a process that was killed.

    Raises:
        TimeoutError: that did not come true.
    """

    def whole(status: dict[str, Any]) -> bool:
        running = processes_of(root)
        if not is_whole(status, load.replicas) or not all(running.values()):
            return False
        answering = [part["process"] for part in (status["learner"], *aggregators_of(status), *status["replicas"])]
        return not set(kill.processes) & {*answering, *itertools.chain(*running.values())}

    await load.wait_until(f"the {kill.part} is back", whole)
    kill.whole_after = time.monotonic() - kill.at


# --------------------------------------------------------------------------------------------------------------- proofs


async def proofs(load: Load, state: Path) -> tuple[list[str], dict[str, Any]]:
    """What does not hold of a service once it has settled (empty: everything does), and its ledger."""
    try:
        status = await load.settled()
    except TimeoutError as error:
        return [*sorted(set(load.faults)), str(error)], {}
    faults, registry, learner = sorted(set(load.faults)), Registry(state), status["learner"]
    with read_log(state) as log:
        ledger = check(Accounts(registry).newest_lineage(), log)
        faults += _log_faults(load, log) + await _history_faults(load, log) + ledger.faults
        if learner["events_trained"] + learner["events_rejected"] != log.count():
            faults.append(f"the learner counts other events than the {log.count()} of the log: {learner}")
    loaded = registry.load()
    if loaded.damage:
        faults.append(f"a stored version is damaged: {loaded.damage}")
    if (loaded.version, fingerprint(loaded.encoder)) != (learner["version"], learner["checksum"]):
        faults.append(f"version {loaded.version} is stored with other weights than version {learner['version']} has")
    with read_log(state) as log:
        faults += _count_faults(registry, loaded, log)
    return faults + await _liveness_faults(load, status), asdict(ledger)


def _count_faults(registry: Registry, loaded: LoadedVersion, log: LogReader) -> list[str]:
    """What is counted of each item is what pretraining counted, and each learned event once; no limit may lower one."""
    counts = loaded.encoder.counts
    if counts is None:
        return []
    origin = Accounts(registry).origin_of(loaded.version)
    assert origin is not None
    first = registry.load(origin).encoder.counts
    assert first is not None
    passed_by = [(each.after_offset, each.last_offset) for each in Rejections(registry.store).all()]
    learned = Counter(
        entry.event.item_id
        for entry in log.replay()
        if entry.offset <= loaded.log_offset and not any(after < entry.offset <= last for after, last in passed_by)
    )
    faults = []
    expected = counts.events.new_zeros(len(counts.events))
    expected[: len(first.events)] = first.events
    for item_id, events in learned.items():
        expected[loaded.catalog.row_of[item_id]] += events
    if wrong := (counts.events != expected).nonzero().flatten().tolist():
        row = wrong[0]
        faults.append(
            f"the counts of {len(wrong)} items are not their events, such as {loaded.catalog.item_ids[row]}: "
            f"{float(counts.events[row])} instead of {float(expected[row])}"
        )
    if (counted := int(counts.clock - first.clock)) != learned.total():
        faults.append(f"the counts say that {counted} events were counted, of {learned.total()} that were learned")
    return faults


def _log_faults(load: Load, log: LogReader) -> list[str]:
    faults = []
    logged = Counter((entry.event.user_id, str(entry.event.event_id)) for entry in log.replay())
    acknowledged = set(load.acknowledged)
    if lost := [event for event in acknowledged if logged[event] == 0]:
        faults.append(f"{len(lost)} acknowledged events are not in the log, such as {lost[0]}")
    if doubled := [event for event in acknowledged if logged[event] > 1]:
        faults.append(f"{len(doubled)} acknowledged events are in the log more than once, such as {doubled[0]}")
    ours = [event for event in logged if event[0].startswith(f"{load.name}-")]
    if strange := [event for event in ours if event not in load.sent]:
        faults.append(f"{len(strange)} events are in the log that nobody sent, such as {strange[0]}")
    return faults


async def _history_faults(load: Load, log: LogReader) -> list[str]:
    faults, users = [], sorted({user for user, _ in load.acknowledged})[:SAMPLED_USERS]
    logged = {user: History() for user in users}  # two replicas may stamp events in another order than the log's
    for entry in log.replay():
        if entry.event.user_id in logged:
            logged[entry.event.user_id].add(entry.event, entry.offset)
    for user in users:
        answer = await load.request("GET", f"/v1/users/{user}/export")
        history = [event["item_id"] for event in answer["events"]] if answer is not None else None
        if history != logged[user].item_ids:
            faults.append(f"the history of {user} is not what the log has of it: {history}")
    return faults


async def _liveness_faults(load: Load, before: dict[str, Any]) -> list[str]:
    """The loop is live: one more event becomes a version that every replica answers with."""
    user, item = f"{load.name}-0", load.items[0]
    event = {"user_id": user, "item_id": item, "event": "click", "event_id": f"{load.name}-afterwards"}
    load.sent.add((user, event["event_id"]))
    if await load.request("POST", "/v1/events", {"events": [event]}) is None:
        return [f"an event afterwards was not taken: {load.failures[-1].kind}"]
    try:
        offset = before["learner"]["log_offset"]
        after = await load.wait_until(
            "an event afterwards is learned",
            lambda status: (
                is_whole(status, load.replicas) and _is_learned(status) and status["learner"]["log_offset"] > offset
            ),
        )
    except TimeoutError as error:
        return [str(error)]
    if after["learner"]["version"] <= before["learner"]["version"] and not after["learner"]["rejected_updates"]:
        return ["an event afterwards made no version"]
    return []
