"""Two models side by side: who is answered by which, and what came of it, counted durably in one SQLite file.

Users are divided by a hash of their id. The id of an answer names the experiment and the arm, so that a reaction finds
its arm by its `request_id`, whatever was restarted in between. A user has at most as many rewards as answers of an arm,
so nobody moves a rate by naming answers that were never given. In shadow mode everybody is answered by the live model;
what the challenger would have answered is compared with it, and with what was chosen.
"""

import json
import sqlite3
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from lib.data.events import EVENT_WEIGHTS
from lib.errors import InputError
from lib.experiments.sequential_test import ArmTotals, difference, evidence, interval, verdict
from lib.experiments.split import place_of
from lib.experiments.summary import (
    ArmSummary,
    Comparison,
    Difference,
    Interval,
    Rate,
    ShadowArmSummary,
    ShadowComparison,
)
from lib.settings import Settings
from lib.sqlite import Database

LIVE, CHALLENGER, SHADOW = "live", "challenger", "shadow"
ARMS = (LIVE, CHALLENGER)
CLICK_THROUGH, CONVERSION = "click_through", "conversion"
REWARDS = (CLICK_THROUGH, CONVERSION)
CONVERSIONS = ("purchase",)
SHADOWS_KEPT = 100_000  # answers that a reaction may still be compared with, and reactions that wait for their answer
SCHEMA = """
CREATE TABLE IF NOT EXISTS users(
    user_id TEXT, arm TEXT, answers INTEGER DEFAULT 0, click_through INTEGER DEFAULT 0, conversion INTEGER DEFAULT 0,
    PRIMARY KEY(user_id, arm)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rewards(request_id TEXT, kind TEXT, arm TEXT, PRIMARY KEY(request_id, kind)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS shadows(request_id TEXT UNIQUE, live TEXT, challenger TEXT);
CREATE TABLE IF NOT EXISTS early_choices(request_id TEXT, item_id TEXT);
CREATE INDEX IF NOT EXISTS early_choices_of_request ON early_choices(request_id);
CREATE TABLE IF NOT EXISTS facts(name TEXT PRIMARY KEY, value);
"""
ADD = "INSERT INTO facts VALUES(?, ?) ON CONFLICT(name) DO UPDATE SET value = value + excluded.value"


class ChallengerConfig(Settings):
    """A second model, and how it is compared with the live one."""

    model: str = Field(min_length=1, description="a model folder, or the number of a stored version")
    share: float = Field(default=0.1, gt=0, lt=1, description="of the users, that it answers or (shadow) is asked for")
    shadow: bool = Field(default=False, description="it is asked and compared, and never shown")
    reward: Literal["click_through", "conversion"] = Field(
        default="click_through", description="what decides: answers with a positive event, or with a purchase"
    )
    decide: bool = Field(default=True, description="promote or give up the challenger when the test is sure")
    alpha: float = Field(default=0.05, gt=0, lt=1, description="probability of a wrong decision, however long it runs")
    effect: float = Field(default=0.01, gt=0, lt=1, description="difference of rates that the test is best at")

    def arm_of(self, user_id: str | None, experiment: str) -> str | None:
        """Return the arm of a user; None for who takes no part, as whoever comes without an id."""
        if user_id is None:
            return None
        chosen = place_of(user_id, experiment) < self.share
        if self.shadow:
            return SHADOW if chosen else None
        return CHALLENGER if chosen else LIVE


def tagged(request_id: str, experiment: str, arm: str) -> str:
    """Make the id of an answer that takes part in an experiment."""
    return f"{request_id}.{experiment}.{arm}"


def arm_in(request_id: str | None, experiment: str) -> str | None:
    """Return the arm that an answer's id names, None for an answer that took no part in this experiment."""
    _, _, rest = (request_id or "").partition(".")
    named, _, arm = rest.rpartition(".")
    return arm if named == experiment and arm in (*ARMS, SHADOW) else None


class Impression(NamedTuple):
    """One answer that was shown."""

    user_id: str
    arm: str


class Reaction(NamedTuple):
    """One event that names the answer that led to it, and turned nothing down."""

    user_id: str
    arm: str
    request_id: str
    kind: str
    item_id: str


class Shadow(NamedTuple):
    """One answer that was shown, and the one that would have been; item ids, the best first."""

    request_id: str
    live: list[str]
    challenger: list[str]


@dataclass
class Records:
    """What a replica has seen since it last told."""

    impressions: list[Impression]
    reactions: list[Reaction]
    shadows: list[Shadow]

    @classmethod
    def none(cls) -> "Records":
        """Return results of nothing yet."""
        return cls([], [], [])


class ExperimentResults:
    """Counts answers and rewards, a row a user; one process writes.

    Raises:
        InputError: the file cannot be used; the message names it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.totals: dict[tuple[str, str], ArmTotals] = {}
        self.kinds: Counter[tuple[str, str]] = Counter()
        path.parent.mkdir(parents=True, exist_ok=True)
        # to lose the newest counts in a power loss is no harm, an fsync for each would be
        self._database = Database(path, "rwc", self._error, synchronous="NORMAL")
        self._connection = self._database.connection
        with self._database.opening():
            self._connection.executescript(SCHEMA)
            self._read()

    def _read(self) -> None:
        self.totals = {(arm, reward): self._read_totals(arm, reward) for arm in ARMS for reward in REWARDS}
        counted = self._connection.execute("SELECT arm, kind, COUNT(*) FROM rewards GROUP BY arm, kind")
        self.kinds = Counter({(arm, kind): count for arm, kind, count in counted})

    def _read_totals(self, arm: str, reward: str) -> ArmTotals:
        sums = "SUM(answers > 0), SUM(answers), SUM(r), SUM(answers * answers), SUM(r * r), SUM(answers * r)"
        source = f"(SELECT answers, MIN(answers, {reward}) AS r FROM users WHERE arm = ?)"
        found = self._connection.execute(f"SELECT {sums} FROM {source}", (arm,)).fetchone()
        return ArmTotals(*(value or 0 for value in found))

    def record(self, records: Records) -> None:
        """Count what a replica has seen, all of it or nothing; a reaction to one answer counts once a kind.

        Raises:
            sqlite3.Error: it could not be written.
        """
        try:
            with self._database.transaction():
                for (user_id, arm), answers in Counter(records.impressions).items():
                    self._count(user_id, arm, answers=answers)
                for shadow in records.shadows:
                    self._compare(shadow)
                for reaction in records.reactions:
                    self._react(reaction)
        except sqlite3.Error:
            self._read()  # what is counted in memory is what the file has
            raise

    def _count(self, user_id: str, arm: str, answers: int = 0, click_through: int = 0, conversion: int = 0) -> None:
        found = self._connection.execute(
            "SELECT answers, click_through, conversion FROM users WHERE user_id = ? AND arm = ?", (user_id, arm)
        ).fetchone()
        before, *rewarded = found or (0, 0, 0)
        after, counts = before + answers, (rewarded[0] + click_through, rewarded[1] + conversion)
        for reward, had, has in zip(REWARDS, rewarded, counts, strict=True):
            known, more = min(had, before), min(has, after) - min(had, before)
            self.totals[arm, reward] = self.totals[arm, reward].plus(before, known, answers, more)
        self._connection.execute("INSERT OR REPLACE INTO users VALUES(?, ?, ?, ?, ?)", (user_id, arm, after, *counts))

    def _react(self, reaction: Reaction) -> None:
        if EVENT_WEIGHTS[reaction.kind] <= 0 or not self._is_first(reaction, reaction.kind):
            return
        if reaction.arm == SHADOW:
            self._compare_choice(reaction.request_id, reaction.item_id)
            return
        self.kinds[reaction.arm, reaction.kind] += 1
        click_through = self._is_first(reaction, CLICK_THROUGH)
        conversion = reaction.kind in CONVERSIONS
        self._count(reaction.user_id, reaction.arm, 0, int(click_through), int(conversion))

    def _is_first(self, reaction: Reaction, kind: str) -> bool:
        values = (reaction.request_id, kind, reaction.arm)
        return self._connection.execute("INSERT OR IGNORE INTO rewards VALUES(?, ?, ?)", values).rowcount == 1

    def _compare(self, shadow: Shadow) -> None:
        values = (shadow.request_id, json.dumps(shadow.live), json.dumps(shadow.challenger))
        if self._connection.execute("INSERT OR IGNORE INTO shadows VALUES(?, ?, ?)", values).rowcount == 0:
            return
        self._keep_newest("shadows")
        both = len(set(shadow.live) & set(shadow.challenger))
        self._connection.executemany(ADD, [("compared", 1), ("overlap", both / max(len(shadow.live), 1))])
        of_request = "FROM early_choices WHERE request_id = ?"
        for (item_id,) in self._connection.execute(f"SELECT item_id {of_request}", (shadow.request_id,)).fetchall():
            self._compare_choice(shadow.request_id, item_id)
        self._connection.execute(f"DELETE {of_request}", (shadow.request_id,))

    def _keep_newest(self, table: str) -> None:
        newest = self._connection.execute(f"SELECT MAX(rowid) FROM {table}").fetchone()[0]
        self._connection.execute(f"DELETE FROM {table} WHERE rowid <= ?", (newest - SHADOWS_KEPT,))

    def _compare_choice(self, request_id: str, item_id: str) -> None:
        """Count what was chosen from an answer; it waits where the challenger has yet to be asked for its own."""
        found = self._connection.execute(
            "SELECT live, challenger FROM shadows WHERE request_id = ?", (request_id,)
        ).fetchone()
        if found is None:
            self._connection.execute("INSERT INTO early_choices VALUES(?, ?)", (request_id, item_id))
            self._keep_newest("early_choices")
            return
        self._connection.execute(ADD, ("choices", 1))
        for arm, text in zip(ARMS, found, strict=True):
            items = json.loads(text)
            if item_id in items:
                place = items.index(item_id) + 1
                values = [(f"{arm}_found", 1), (f"{arm}_reciprocal_rank", 1 / place)]
                self._connection.executemany(ADD, values)

    def fact(self, name: str) -> Any:
        """Return what is kept under a name, None for nothing."""
        found = self._connection.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if found is None else found[0]

    def keep(self, name: str, value: str | int) -> None:
        """Keep something for good."""
        self._connection.execute("INSERT OR REPLACE INTO facts VALUES(?, ?)", (name, value))

    def verdict(self, config: ChallengerConfig) -> str | None:
        """Return what the sequential test says by now: "promote", "rollback", or None for nothing yet."""
        if config.shadow:
            return None
        live, challenger = (self.totals[arm, config.reward] for arm in ARMS)
        return verdict(live, challenger, config.alpha, config.effect)

    def summary(self, config: ChallengerConfig) -> Comparison | ShadowComparison:
        """Return the results of each arm and of their difference, or of the comparison in shadow mode."""
        return self._shadow_comparison() if config.shadow else self._comparison(config.alpha, config.effect)

    def _comparison(self, alpha: float, effect: float) -> Comparison:
        arms = {arm: self._arm_summary(arm, alpha, effect) for arm in ARMS}
        return Comparison(arms=arms, difference={reward: self._difference(reward, alpha, effect) for reward in REWARDS})

    def _arm_summary(self, arm: str, alpha: float, effect: float) -> ArmSummary:
        totals = {reward: self.totals[arm, reward] for reward in REWARDS}
        return ArmSummary(
            users=int(totals[CLICK_THROUGH].users),
            answers=int(totals[CLICK_THROUGH].answers),
            rewards={kind: self.kinds[arm, kind] for kind in EVENT_WEIGHTS if self.kinds[arm, kind]},
            click_through=_rate(totals[CLICK_THROUGH], alpha, effect),
            conversion=_rate(totals[CONVERSION], alpha, effect),
        )

    def _difference(self, reward: str, alpha: float, effect: float) -> Difference:
        live, challenger = (self.totals[arm, reward] for arm in ARMS)
        distance, information = (float(value) for value in difference(live, challenger))
        rate = (live.rewarded + challenger.rewarded) / max(live.answers + challenger.answers, 1)
        lacking = [(arm, totals.lacking(rate)) for arm, totals in ((LIVE, live), (CHALLENGER, challenger))]
        return Difference(
            value=distance,
            interval=_bounds(interval(distance, information, alpha, effect)),
            unknown="; ".join(f"{arm}: {what}" for arm, what in lacking if what is not None) or None,
            evidence=float(evidence(live, challenger, effect)),
        )

    def _shadow_comparison(self) -> ShadowComparison:
        compared, overlap, choices = (self.fact(name) or 0 for name in ("compared", "overlap", "choices"))
        return ShadowComparison(
            compared=compared,
            overlap=overlap / max(compared, 1),
            choices=choices,
            arms={arm: self._shadow_arm(arm, max(choices, 1)) for arm in ARMS},
        )

    def _shadow_arm(self, arm: str, choices: int) -> ShadowArmSummary:
        found, ranks = (self.fact(f"{arm}_{sum_of}") or 0 for sum_of in ("found", "reciprocal_rank"))
        return ShadowArmSummary(found=found / choices, mrr=ranks / choices)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _error(self, error: sqlite3.Error) -> InputError:
        return InputError(
            f"challenger: its results {self.path} cannot be used: {error}; free the disk, or remove it to begin anew"
        )


def _rate(totals: ArmTotals, alpha: float, effect: float) -> Rate:
    rate, variance = float(totals.rate), float(totals.variance)
    unknown = totals.lacking(rate) or (None if variance > 0 else "every user has the same rate so far")
    information = 0.0 if unknown else 1 / variance
    return Rate(rate=rate, interval=_bounds(interval(rate, information, alpha, effect)), unknown=unknown)


def _bounds(bounds: tuple[float, float]) -> Interval:
    """Return bounds for JSON, which knows no infinity: None while nothing is known."""
    return None if bounds[0] == float("-inf") else bounds
