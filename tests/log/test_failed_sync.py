"""A write whose sync failed: what was answered, and what the log holds after a crash, agree."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lib.log.feedback import FeedbackLog
from lib.log.items import ItemLog
from tests.helpers.logs import ROOT

COMPILER = shutil.which("cc")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="a sync that fails is made with a C compiler")

# fdatasync and fsync fail as often as they are told to
SYNC = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
static int failures;
void fail_syncs(int count) { failures = count; }
static int fails(void) { if (failures == 0) return 0; failures--; errno = EIO; return 1; }
int fdatasync(int file) { return fails() ? -1 : ((int (*)(int))dlsym(RTLD_NEXT, "fdatasync"))(file); }
int fsync(int file) { return fails() ? -1 : ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(file); }
"""

APPEND = """
import ctypes, os, signal, sys
from pathlib import Path
from lib.data.events import Event
from lib.log.errors import LogWriteError
from lib.log.feedback import FeedbackLog
from lib.log.items import ItemLog

def append(name):
    try:
        if sys.argv[2] == "items":
            log.append([(name, {"title": name})])
        else:
            log.append([Event("user", name, "click", None, 1)]).result()
        print(f"{name} taken", flush=True)
    except LogWriteError as error:
        print(f"{name} {type(error).__name__}", flush=True)

path = Path(sys.argv[1])
log = ItemLog(path) if sys.argv[2] == "items" else FeedbackLog.open(path)
append("first")
ctypes.CDLL(None).fail_syncs(int(sys.argv[3]))
append("second")
if sys.argv[4] == "go on":
    append("third")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What makes syncs fail, to be loaded before the C library."""
    folder = tmp_path_factory.mktemp("sync")
    (folder / "sync.c").write_text(SYNC)
    built = folder / "sync.so"
    subprocess.run([str(COMPILER), "-shared", "-fPIC", "-o", built, folder / "sync.c", "-ldl"], check=True)
    return built


def answers_and_log(library: Path, path: Path, kind: str, failures: int, then: str) -> tuple[list[str], list[str]]:
    """What a process was answered that was killed, and what the log holds afterwards."""
    run = subprocess.run(
        [sys.executable, "-c", APPEND, str(path), kind, str(failures), then],
        cwd=ROOT,
        env=os.environ | {"LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    if kind == "items":
        log = ItemLog(path)
        held = [change.item_id for change in log.after(0)]
        log.close()
    else:
        with FeedbackLog.open(path) as events:
            held = [entry.event.item_id for entry in events.replay()]
    return run.stdout.splitlines(), held


@pytest.mark.parametrize("kind", ["events", "items"])
@pytest.mark.parametrize("then", ["end", "go on"])
def test_what_was_answered_as_not_taken_is_not_in_the_log_after_a_crash(library, tmp_path, kind, then):
    answers, held = answers_and_log(library, tmp_path / "log", kind, 1, then)
    third = ["third"] if then == "go on" else []
    assert answers == ["first taken", "second LogWriteError", *(f"{name} taken" for name in third)]
    assert held == ["first", *third]


@pytest.mark.parametrize("kind", ["events", "items"])
def test_where_it_is_not_known_whether_a_write_was_taken_the_answer_says_so(library, tmp_path, kind):
    answers, held = answers_and_log(library, tmp_path / "log", kind, 2, "end")
    assert answers == ["first taken", "second LogUnsure"]
    assert held[0] == "first"
    answers, held = answers_and_log(library, tmp_path / "another", kind, 2, "go on")
    assert answers == ["first taken", "second LogUnsure", "third taken"]
    assert held == ["first", "third"]
