"""A feedback log under test: events to write, processes that write or hold it, and waiting for them."""

import sqlite3
import time
from pathlib import Path
from typing import Any

from lib.data.events import Event
from lib.log.feedback import FeedbackLog

ROOT = Path(__file__).resolve().parents[2]


def make_event(number: int, user: str = "user", **changes) -> Event:
    return Event(user, f"item-{number}", "click", None, 1_700_000_000_000 + number)._replace(**changes)


def connection_of(log: FeedbackLog) -> sqlite3.Connection:
    """Return the connection that writes a log's SQLite file: of the log itself, or of the copy of one on Kafka."""
    store: Any = log.store
    return getattr(store, "copy", store).database.connection


def hold_the_writer(log: FeedbackLog) -> sqlite3.Connection:
    """Take SQLite's write lock from outside, so that the writer thread waits inside its next transaction."""
    connection_of(log).execute("PRAGMA busy_timeout = 120000")
    connection = sqlite3.connect(log.path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    return connection


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)


STREAM = """
import random, sys, threading
from lib.data.events import Event
from lib.log.layout import LogLayout
from lib.log.shard import ONLY
log = LogLayout(log=sys.argv[1]).open(sys.argv[2], ONLY)
printing = threading.Lock()
def call(thread):
    number = 0
    while True:
        events = [Event(f"user-{thread}", f"item-{number + n}", "click", None, n, f"{sys.argv[3]}-{number + n}")
                  for n in range(random.randint(1, 12))]
        number += len(events)
        result = log.append(events).result()
        with printing:
            for event, offset in zip(events, result.offsets):
                print(offset, event.user_id, event.event_id, flush=True)
for thread in range(8):
    threading.Thread(target=call, args=(thread,), daemon=True).start()
threading.Event().wait()
"""
