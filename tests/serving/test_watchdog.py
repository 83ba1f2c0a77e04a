"""The watchdog ends a process that makes no progress, and says where it was."""

import os
import time
from pathlib import Path
from typing import Any

import ray

from lib.log.layout import LogLayout
from serving.aggregator import Aggregator, AggregatorConfig, start_aggregator
from tests.helpers.logs import make_event

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


def stall(aggregator: Aggregator) -> None:
    """Hold up everything that this aggregator is asked."""
    if not Path(aggregator.state, "stalled").exists():  # the call is repeated after the restart
        Path(aggregator.state, "stalled").touch()
        time.sleep(3600)


def test_an_aggregator_that_answers_nobody_is_started_again(ray_session: object, tmp_path: Path) -> None:
    layout = LogLayout(aggregators=2)
    layout.begin(tmp_path)
    config = AggregatorConfig(stalled_seconds=2.0)
    aggregator = start_aggregator(str(tmp_path), None, config, layout.shards()[1], layout)
    try:
        assert ray.get(aggregator.append.remote([make_event(1)])) == [None]
        before: Any = ray.get(aggregator.status.remote())
        ray.get(aggregator.__ray_call__.remote(stall))
        after: Any = ray.get(aggregator.status.remote())
        assert after.process != before.process
        assert after.log_offset == 1
        os.kill(after.process, 0)
    finally:
        ray.kill(aggregator)
