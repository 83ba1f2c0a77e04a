"""The script for the day a GPU is at hand, on the CPU: every part in a tiny size, and what a failing part does."""

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import count

import pytest
import torch

import lib.model.delta
from lib.model.block import Packing
from tests import gpu
from tests.gpu import PARTS, NotRun, Part, Row, Run, main, run_apart, run_part

torch.set_num_threads(1)  # threads that wait for each other cost more than the tiny sizes have to compute

TINY = Run(torch.device("cpu"), tiny=True)
ROWS = {  # what each part finds at least
    "matrix product": ["64 x 64, bfloat16"],
    "attention": ["heads of 32", "heads of 64"],
    "encoder": ["float32", "bfloat16", "answers, float32"],
    "train small": ["eager", "compiled"],
    "train base": ["eager", "compiled"],
    "train large": ["eager", "compiled"],
    "resume": ["the step after"],
    "push": ["small, 500 items", "base, 500 items", "large, 500 items"],
    "learner": ["small, 500 items, CPU"],
    "exact search": ["20,000 rows"],
    "approximate search": ["20,000 rows"],
}


def test_all_parts_together_take_at_most_eight_minutes():
    assert sum(part.seconds for part in PARTS.values()) <= 8 * 60
    assert ROWS.keys() == PARTS.keys()


@pytest.mark.parametrize("name", PARTS)
def test_each_part_passes_on_the_cpu(name):
    rows: list[Row] = []
    assert run_part(PARTS[name], TINY, rows.append) == {"outcome": "passed"}
    assert [row["name"] for row in rows] == ROWS[name]
    json.dumps(rows)
    assert gpu.table([{"part": name, "outcome": "passed", "seconds": 1.0, "rows": rows}]).count("\n") == len(rows)


def test_training_states_speed_and_flops():
    rows: list[Row] = []
    run_part(PARTS["train small"], TINY, rows.append)
    for row in rows:
        tokens, sequences = row["tokens_per_second"], row["sequences_per_second"]
        assert tokens == pytest.approx(sequences * row["mean_length"])
        per_token = 6 * row["trunk_parameters"] + 12 * 1 * 32 * row["mean_attended_length"]
        assert row["model_flops_per_second"] == pytest.approx(tokens * per_token)


def _wrong_in_half_precision(packing: Packing, heads: torch.Tensor) -> torch.Tensor:
    return ATTEND(packing, heads) if heads.dtype == torch.float32 else heads[:, 2]


ATTEND = Packing.attend
CALLS = count(1)


@pytest.mark.parametrize(
    ("name", "target", "replacement"),
    [
        ("attention", (Packing, "attend"), _wrong_in_half_precision),
        ("encoder", (gpu.InferenceEncoder, "queries"), lambda *_: torch.tensor([float(next(CALLS))])),
        ("train base", (gpu, "measure"), lambda *_: {"last_loss": float("nan"), "events_per_second": 0.0}),
        ("resume", (gpu.Trainer, "load_optimizer_state"), lambda *_: None),
        ("push", (lib.model.delta, "apply_delta"), lambda *_: None),
        ("exact search", (gpu, "exact_search"), lambda vectors, queries, k: (None, torch.zeros(len(queries), k))),
    ],
)
def test_what_is_wrong_fails_the_part(name, target, replacement, monkeypatch):
    monkeypatch.setattr(*target, replacement)
    rows: list[Row] = []
    outcome = run_part(PARTS[name], TINY, rows.append)
    assert outcome["outcome"] == "failed"
    assert outcome["reason"] == f"not as expected: {', '.join(row['name'] for row in rows if not row['passed'])}"
    assert len(rows) == len(ROWS[name])


def test_a_part_that_fails_keeps_what_it_found():
    def rows(_: Run) -> Iterator[Row]:
        yield {"name": "first", "passed": True}
        raise ValueError("no such kernel")

    found: list[Row] = []
    outcome = run_part(Part(rows, 1), TINY, found.append)
    assert (outcome["outcome"], found) == ("failed", [{"name": "first", "passed": True}])
    assert "ValueError: no such kernel" in outcome["reason"]


def test_a_part_without_what_it_needs_is_not_run():
    def rows(_: Run) -> Iterator[Row]:
        yield {"name": "first"}
        raise NotRun("FAISS sees no GPU")

    found: list[Row] = []
    needs = Part(rows, 1, needs=("torch", "no_such_package"))
    assert run_part(needs, TINY, found.append) == {"outcome": "not run", "reason": "needs no_such_package"}
    assert found == []
    assert run_part(Part(rows, 1), TINY, found.append) == {"outcome": "not run", "reason": "FAISS sees no GPU"}


def test_a_part_is_ended_when_its_time_is_up():
    result = run_apart("train base", 0.05, ["--cpu"])
    assert (result["part"], result["outcome"], result["rows"]) == ("train base", "failed", [])
    assert result["reason"] == "ended after 0 s"


def test_the_script_runs_parts_in_processes_of_their_own_and_writes_its_results(tmp_path, capfd):
    path = tmp_path / "results.json"
    assert main(["--cpu", "--only", "matrix product", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert [part["part"] for part in result["parts"]] == ["matrix product"]
    assert result["parts"][0]["outcome"] == "passed"
    assert result["parts"][0]["rows"][0]["flops_per_second"] > 0
    assert result["machine"]["packages"]["torch"] == torch.__version__
    printed = capfd.readouterr().out
    assert "model flops of an event: 6 x weights" in printed
    assert "matrix product      passed" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_exits_with_0(tmp_path, capsys):
    assert main(["--json", str(tmp_path / "results.json")]) == 0
    assert "There is no GPU here" in capsys.readouterr().out


@pytest.mark.slow
def test_nothing_but_torch_transformers_pyarrow_and_numpy_is_needed():
    others = ["faiss", "fastapi", "httpx", "matplotlib", "orjson", "pydantic", "ray", "rich", "tensorboard", "typer"]
    program = f"""
import sys
sys.modules.update(dict.fromkeys({others}))  # so that none of them can be imported
import torch
from tests.gpu import PARTS, Run, run_part
torch.set_num_threads(1)
run = Run(torch.device("cpu"), tiny=True)
for name, part in PARTS.items():
    print(f"{{name}}: {{run_part(part, run, lambda row: None)['outcome']}}")
"""
    command = [sys.executable, "-c", program]
    lines = subprocess.run(command, cwd=gpu.ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    outcomes = {name: "not run" if part.needs else "passed" for name, part in PARTS.items()}
    assert lines == [f"{name}: {outcome}" for name, outcome in outcomes.items()]
