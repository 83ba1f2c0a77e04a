"""The watchdog ends a process that makes no progress, and says where it was."""

import pytest

from lib.log.feedback import FeedbackLog

STALLED = """
import time
from serving.watchdog import Watchdog
def sleep_for_ever():
    time.sleep(3600)
watchdog = Watchdog(0.2, lambda stack: print(stack, flush=True))
watchdog.progress()
sleep_for_ever()
"""
RESTING = """
import time
from serving.watchdog import Watchdog
watchdog = Watchdog(0.2)
watchdog.progress()
watchdog.rest()
time.sleep(1)
watchdog.progress(3600)
time.sleep(1)
print("alive", flush=True)
"""
SPEECHLESS = """
import time
from serving.watchdog import Watchdog
watchdog = Watchdog(0.2, lambda stack: time.sleep(3600))
watchdog.progress()
time.sleep(3600)
"""


AGGREGATOR = """
import asyncio, sqlite3, sys, time
from lib.data.events import Event
from serving.aggregator import Aggregator, AggregatorConfig
def events(number):
    return [Event("user", f"item-{number}", "click", None, number)]
async def run():
    aggregator = Aggregator(sys.argv[1], config=AggregatorConfig(stalled_seconds=2.0))
    print(await aggregator.append(events(1)), flush=True)
    other = sqlite3.connect(f"{sys.argv[1]}/feedback.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")  # another writer, for whom the log waits
    HOLD_UP
    print("it has not ended", flush=True)
asyncio.run(run())
"""


def test_a_process_that_makes_no_progress_ends_and_says_where_it_was(start_process):
    process = start_process(STALLED)
    said, _ = process.communicate()
    assert process.returncode == 1
    assert "in sleep_for_ever" in said


def test_a_process_that_has_no_work_or_more_time_goes_on(start_process):
    process = start_process(RESTING)
    assert process.communicate()[0] == "alive\n"
    assert process.returncode == 0


def test_last_words_that_stall_as_well_are_not_waited_for(start_process):
    process = start_process(SPEECHLESS)
    process.communicate()
    assert process.returncode == 1


@pytest.mark.parametrize("hold_up", ["time.sleep(3600)", "await aggregator.append(events(2))"], ids=["calls", "log"])
def test_an_aggregator_ends_that_answers_nobody_or_whose_log_does_not_finish(start_process, tmp_path, hold_up):
    process = start_process(AGGREGATOR.replace("HOLD_UP", hold_up), tmp_path)
    said, errors = process.communicate()
    assert (process.returncode, said) == (1, "[None]\n"), errors
    with FeedbackLog.open(tmp_path / "feedback.sqlite") as log:  # as who follows it does
        assert log.last_offset() == 1
