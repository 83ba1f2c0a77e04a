"""Checks and figures of one GPU, in at most eight minutes.

    python -m tests.gpu --json FILE [--only PART ...] [--cpu]

Needs nothing but torch, transformers, pyarrow and numpy; three parts need more and are not run without it: a push
pydantic, the whole near-line learner typer and rich as well, approximate search FAISS. Every part runs in a process of
its own and is ended when its time is up (what earlier parts left of theirs is added to it): a part that fails, hangs or
breaks the CUDA context hides none of the others, and what it had found stands. Exit status 1 where a part failed, 0
otherwise, also where there is no GPU. `--cpu` runs every part in a tiny size on the CPU, to test the parts themselves;
its figures mean nothing.

How flops are counted, and with which peak they are compared, stands in tests/benchmarks/training_step.py.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor

from lib.model.batches import Batch
from lib.model.block import Packing
from lib.model.encoder import BehaviourEncoder
from lib.model.inference import InferenceEncoder
from lib.model.presets import PRESETS, Precision, Preset
from lib.model.trainer import Trainer, TrainingConfig, train_top_layers
from lib.retrieval.exact import exact_search
from tests.benchmarks.machine import describe_gpu, describe_machine
from tests.benchmarks.training_step import (
    FLOPS_PER_EVENT,
    encoder_config,
    measure,
    peak_flops,
    synchronize,
    synthetic_batches,
)
from tests.benchmarks.vectors import WIDTH, in_batches, recall, speed, trained_like

if TYPE_CHECKING:
    from lib.model.delta import Delta

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
ROOT = Path(__file__).resolve().parents[1]

# relative errors, of norms
HALF_PRECISION, HALF_PRECISION_GRADIENTS, FULL_PRECISION = 0.02, 0.06, 1e-3
RESUMED = 0.05  # of what the step moves; kernels of a GPU add up in any order, so not every bit is the same
LEAST_RECALL = 0.97
PUSHED_BYTES = 14_000_000  # of dense weights, as the near-line learner's trained_bytes
FOUND = 100  # rows of a search

Row = dict[str, Any]  # `name`, figures, and `passed` where it is a check


class NotRun(Exception):
    """What a part raises that cannot run here; the message says what is missing."""


@dataclass(frozen=True)
class Run:
    """Where the parts run, and whether in a size that only tests them."""

    device: torch.device
    tiny: bool

    def preset(self, name: str) -> Preset:
        """Return a preset, in the tiny size cut down to one that a CPU trains at once."""
        preset = PRESETS[name]
        if not self.tiny:
            return preset
        shape = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": min(preset.num_hidden_layers, 2)}
        return replace(preset, **shape, max_length=20, dropout=0.0, events_per_batch=256)

    def size(self, whole: int, tiny: int) -> int:
        """Return one of two sizes."""
        return tiny if self.tiny else whole

    def clock(self) -> float:
        """Return seconds, once the GPU has done all that it was given."""
        synchronize(self.device)
        return time.perf_counter()


@dataclass(frozen=True)
class Part:
    """One thing to check or measure: the function yields a row for each finding."""

    rows: Callable[[Run], Iterator[Row]]
    seconds: float  # after which it is ended, its start included
    needs: tuple[str, ...] = ()  # modules beside torch, transformers, pyarrow and numpy


# ---------------------------------------------------------------------------------------------------------------------
# The parts


def matrix_product(run: Run) -> Iterator[Row]:
    """Measure large bfloat16 products: what any training step is bounded by."""
    size = run.size(8192, 64)
    one, other = (torch.randn(size, size, device=run.device).bfloat16() for _ in range(2))
    for _ in range(3):
        torch.mm(one, other)
    begin, count = run.clock(), 10
    for _ in range(count):
        torch.mm(one, other)
    flops = 2 * size**3 * count / (run.clock() - begin)
    known = peak_flops(torch.cuda.get_device_name(run.device)) if run.device.type == "cuda" else None
    yield {"name": f"{size} x {size}, bfloat16", "flops_per_second": flops, "peak_of_data_sheet": known}


def attention(run: Run) -> Iterator[Row]:
    """Compare variable-length attention in bfloat16, and its gradients, with the CPU in float32."""
    lengths = torch.tensor([1, 7, 33, 2] if run.tiny else [1, 2, 17, 128, 500, 63, 1, 64, 65, 200])
    for width in (32, 64):  # of a head: the preset small; base and large
        generator = torch.Generator().manual_seed(width)
        heads = torch.randn(int(lengths.sum()), 3, 4, width, generator=generator).bfloat16()
        upstream = torch.randn(len(heads), 4, width, generator=generator).bfloat16()
        expected = _attended(heads.float(), upstream.float(), lengths)
        found = _attended(heads.to(run.device), upstream.to(run.device), lengths.to(run.device))
        yield _check(
            f"heads of {width}",
            outputs=(_error(found[0], expected[0]), HALF_PRECISION),
            gradients=(_error(found[1], expected[1]), HALF_PRECISION),
        )


def _attended(heads: Tensor, upstream: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return what attention gives for (N, 3, H, D) heads, and the gradient of the heads."""
    heads = heads.clone().requires_grad_()
    attended = Packing.of(lengths, int(lengths.max())).attend(heads)
    attended.backward(upstream)
    assert heads.grad is not None
    return attended.detach(), heads.grad


def encoder(run: Run) -> Iterator[Row]:
    """Compare an encoder's logits, loss and gradients with the CPU in float32; in bfloat16 it packs its events."""
    preset, items = replace(run.preset("base"), dropout=0.0), run.size(10_000, 500)
    batch = synthetic_batches(encoder_config(preset, items), items, run.size(2048, 256), 1, seed=0)[0]
    expected = _trained_once(preset, items, batch, torch.device("cpu"), "float32")
    tolerances: tuple[tuple[Precision, float, float], ...] = (
        ("float32", FULL_PRECISION, FULL_PRECISION),
        ("bfloat16", HALF_PRECISION, HALF_PRECISION_GRADIENTS),
    )
    for precision, logits, gradients in tolerances:
        found = _trained_once(preset, items, batch, run.device, precision)
        yield _check(
            precision,
            logits=(_error(found[0], expected[0]), logits),
            loss=(_error(found[1], expected[1]), logits),
            gradients=(_error(found[2], expected[2]), gradients),
        )
    histories = [
        torch.stack([batch.rows[line], batch.kinds[line], batch.gaps[line], batch.values[line]])[:, :length].numpy()
        for line, length in enumerate(batch.lengths.tolist())
    ]
    answers = [
        InferenceEncoder(_new_encoder(preset, items, device).eval()).queries(histories)
        for device in (torch.device("cpu"), run.device)
    ]
    yield _check("answers, float32", queries=(_error(answers[1], answers[0]), FULL_PRECISION))


def _new_encoder(preset: Preset, items: int, device: torch.device) -> BehaviourEncoder:
    """Make an encoder whose weights are the same on every device."""
    torch.manual_seed(0)
    encoder = BehaviourEncoder(encoder_config(preset, items))
    encoder.to(device)  # pyright: ignore[reportArgumentType]  the stubs do not know that a module takes a device
    return encoder


def _trained_once(
    preset: Preset, items: int, batch: Batch, device: torch.device, precision: Precision
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits of a thousand items at the real events, and the loss and dense gradients of a first step."""
    encoder, batch = _new_encoder(preset, items, device).eval(), batch.to(device)
    half = torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
    with torch.no_grad():
        with half:
            hidden = encoder(batch.kinds, batch.gaps, batch.values, batch.lengths, batch.rows)
        real = torch.arange(hidden.shape[1], device=device) < batch.lengths[:, None]
        vectors = encoder.item_vectors(torch.arange(1, min(items, 1000), device=device))
        logits = encoder.queries(hidden[real]) @ vectors.T
    trainer = Trainer(encoder, items, TrainingConfig(precision=precision))
    loss = trainer.step(batch).loss
    gradients = [parameter.grad.flatten() for parameter in trainer.dense.values() if parameter.grad is not None]
    return logits, torch.tensor([loss]), torch.cat(gradients)


def training(run: Run, preset: str) -> Iterator[Row]:
    """Measure training steps of a preset in bfloat16, with and without torch.compile."""
    chosen, items = run.preset(preset), run.size(1_000_000, 500)
    backend = "eager" if run.tiny else None  # which captures the graphs, and needs no compiler
    with torch.compiler.set_stance("default", force_backend=backend):
        for compiled in (False, True):
            config = TrainingConfig(
                learning_rate=chosen.learning_rate,
                precision="bfloat16",
                activation_checkpointing=chosen.activation_checkpointing,
                compile=compiled,
            )
            figures = measure(chosen, config, run.device, items, run.size(5, 1), run.size(20, 2))
            figures["tokens_per_second"] = figures.pop("events_per_second")
            finite = bool(np.isfinite(figures["last_loss"]))
            yield {"name": "compiled" if compiled else "eager", "passed": finite} | figures


def resume(run: Run) -> Iterator[Row]:
    """Save a trainer, load it into a new one, and compare the next step of both."""
    preset, items = run.preset("base"), run.size(100_000, 500)
    config = TrainingConfig(learning_rate=preset.learning_rate, precision="bfloat16")
    trainer = Trainer(_new_encoder(preset, items, run.device), items, config)
    *batches, last = (
        batch.to(run.device)
        for batch in synthetic_batches(trainer.encoder.config, items, preset.events_per_batch, 5, seed=0)
    )
    for batch in batches:
        trainer.step(batch)
    with tempfile.TemporaryDirectory() as folder:
        begin = run.clock()
        trainer.encoder.save_pretrained(folder)
        safetensors.numpy.save_file(trainer.optimizer_state(), Path(folder, "optimizer"))
        saved = run.clock()
        encoder = BehaviourEncoder.from_pretrained(folder)
        encoder.to(run.device)  # pyright: ignore[reportArgumentType]  as in _new_encoder
        resumed = Trainer(encoder, items, config)
        resumed.load_optimizer_state(safetensors.numpy.load_file(Path(folder, "optimizer")))
        loaded = run.clock()
    before = _weights(trainer)
    losses = []
    for each in (trainer, resumed):
        torch.manual_seed(1)  # of dropout
        losses.append(torch.tensor([each.step(last).loss]))
    moved, difference = _weights(trainer) - before, _weights(resumed) - _weights(trainer)
    limit = RESUMED if run.device.type == "cuda" else 0.0
    yield _check(
        "the step after",
        loss=(_error(losses[1], losses[0]), limit),
        weights=(float(difference.norm() / moved.norm()), limit),
    ) | {"save_ms": (saved - begin) * 1e3, "load_ms": (loaded - saved) * 1e3}


def _weights(trainer: Trainer) -> Tensor:
    return torch.cat([tensor.double().flatten().cpu() for tensor in trainer.encoder.state_dict().values()])


def push(run: Run) -> Iterator[Row]:
    """Measure steps like those of the near-line learner, and what changed on its way to a replica on the same GPU."""
    from lib.model.delta import Delta, apply_delta
    from lib.model.fingerprint import fingerprint

    for name in ("small", "base", "large"):
        preset, items = run.preset(name), run.size(100_000, 500)
        learned, served = (_new_encoder(preset, items, run.device) for _ in range(2))
        train_top_layers(learned, PUSHED_BYTES)
        trainer = Trainer(learned, items, TrainingConfig(learning_rate=1e-3 * min(1.0, 128 / preset.hidden_size)))
        batches = synthetic_batches(learned.config, items, run.size(2048, 128), run.size(12, 3), seed=0)
        times: list[tuple[float, float, float]] = []
        data = b""
        for version, batch in enumerate(batches, start=1):
            begin = run.clock()
            rows = trainer.step(batch.to(run.device)).rows
            trained = run.clock()
            data = _delta(learned, rows, version).to_bytes()
            built = run.clock()
            apply_delta(served, Delta.from_bytes(data))
            InferenceEncoder(served)
            times.append((trained - begin, built - trained, run.clock() - built))
        milliseconds = np.median(np.array(times[2:]), axis=0) * 1e3  # the first two warm up
        figures = dict(zip(("learn_ms", "build_ms", "apply_ms"), milliseconds.tolist(), strict=True))
        equal = fingerprint(served) == fingerprint(learned)
        yield {"name": f"{name}, {items:,} items", "passed": equal, "delta_bytes": len(data)} | figures


def _delta(encoder: BehaviourEncoder, rows: Tensor, version: int) -> "Delta":
    """Gather the changed rows and the trained dense tensors."""
    from lib.model.delta import ROW_TENSORS, Delta, dense_state, state_of

    state = state_of(encoder)
    tensors = {name: state[name][rows] for name in ROW_TENSORS} | dense_state(encoder)
    return Delta(
        version=version,
        parent=version - 1,
        checksum="",
        log_offset=0,
        item_rows=encoder.config.item_rows,
        rows=rows.cpu().numpy(),
        tensors={name: tensor.cpu().numpy() for name, tensor in tensors.items()},
    )


def learner(run: Run) -> Iterator[Row]:
    """Measure updates of the near-line learner as it is: with its gate and its registry, on the CPU."""
    from tests.benchmarks.push_size import measure as measure_pushes

    torch.set_num_threads(1)  # as in the service
    items = run.size(100_000, 500)
    figures = measure_pushes("small", items, updates=run.size(5, 1))
    yield {"name": f"small, {items:,} items, CPU", "passed": figures.pop("checksums_equal"), **figures}


def exact(run: Run) -> Iterator[Row]:
    """Measure exact search beside a bare matrix product with topk, the limit, and compare what they find."""
    for count in _catalog_sizes(run):
        vectors = torch.nn.functional.normalize(torch.randn(count, WIDTH, device=run.device))
        queries = np.random.default_rng(0).standard_normal((run.size(256, 16), WIDTH), dtype=np.float32)

        def product(some: np.ndarray, vectors: Tensor = vectors) -> np.ndarray:
            return torch.topk(torch.from_numpy(some).to(run.device) @ vectors.T, FOUND)[1].cpu().numpy()

        def search(some: np.ndarray, vectors: Tensor = vectors) -> np.ndarray:
            return exact_search(vectors, torch.from_numpy(some).to(run.device), FOUND)[1].cpu().numpy()

        found = recall(in_batches(search, queries, 64), in_batches(product, queries, 64))
        figures = {"recall": found, **_speeds("search", search, queries), **_speeds("product", product, queries)}
        yield {"name": f"{count:,} rows", "passed": found > 0.999, **figures}


def approximate(run: Run) -> Iterator[Row]:
    """Measure approximate search, and FAISS's exact index, on vectors like those of a trained model."""
    import faiss

    from lib.retrieval.faiss_lists import copy_to, search_device
    from lib.retrieval.index import ItemIndex

    if search_device().type != run.device.type:
        why = "FAISS searches on the GPU here" if run.device.type == "cpu" else "FAISS sees no GPU: install faiss-gpu"
        raise NotRun(why)
    for count in _catalog_sizes(run):
        vectors = trained_like(count, np.random.default_rng(1))
        queries = trained_like(run.size(256, 16), np.random.default_rng(2))
        flat = copy_to(run.device, faiss.IndexFlatIP(WIDTH))
        flat.add(vectors)
        exact_rows = in_batches(lambda some, flat=flat: flat.search(some, FOUND)[1], queries, 64)
        flat_speeds = _speeds("faiss_exact", lambda some, flat=flat: flat.search(some, FOUND)[1], queries)
        begin = run.clock()
        index = ItemIndex(vectors, exact_rows=256)
        built = run.clock() - begin
        found = recall(
            in_batches(lambda some, index=index: index.search(some, FOUND)[1], queries, 64),
            exact_rows,
        )
        speeds = _speeds("lists", lambda some, index=index: index.search(some, FOUND)[1], queries)
        figures = {"recall": found, **speeds, **flat_speeds, "build_s": built}
        yield {"name": f"{count:,} rows", "passed": found >= LEAST_RECALL, **figures}


def _catalog_sizes(run: Run) -> tuple[int, ...]:
    return (20_000,) if run.tiny else (1_000_000, 10_000_000)


def _speeds(name: str, search: Callable[[np.ndarray], np.ndarray], queries: np.ndarray) -> Row:
    return {
        f"{name}_queries_per_second": speed(search, queries, 64),
        f"{name}_single_queries_per_second": speed(search, queries[:64], 1),
    }


PARTS = {
    "matrix product": Part(matrix_product, 20),
    "attention": Part(attention, 25),
    "encoder": Part(encoder, 40),
    "train small": Part(partial(training, preset="small"), 45),
    "train base": Part(partial(training, preset="base"), 60),
    "train large": Part(partial(training, preset="large"), 85),
    "resume": Part(resume, 30),
    "push": Part(push, 40, needs=("pydantic",)),
    "learner": Part(learner, 20, needs=("pydantic", "typer", "rich")),
    "exact search": Part(exact, 25),
    "approximate search": Part(approximate, 90, needs=("faiss",)),
}


# ---------------------------------------------------------------------------------------------------------------------
# Checks and rows


def _error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference relative to that of what was expected."""
    expected = expected.double().cpu()
    return float((found.double().cpu() - expected).norm() / expected.norm())


def _check(name: str, **errors: tuple[float, float]) -> Row:
    """Return a row of errors, each with its limit."""
    figures = {f"{what}_error": error for what, (error, _) in errors.items()}
    return {"name": name, "passed": all(error <= limit for error, limit in errors.values()), **figures}


def described(row: Row) -> str:
    """Write a row's figures in one line."""
    figures = [
        f"{name} {_number(value)}"
        for name, value in row.items()
        if name not in ("name", "passed") and value is not None
    ]
    return f"{row['name']}{': failed' if row.get('passed') is False else ''}: {', '.join(figures)}"


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


# ---------------------------------------------------------------------------------------------------------------------
# Running them


def run_part(part: Part, run: Run, report: Callable[[Row], None]) -> Row:
    """Run a part in this process and report each of its rows; return its outcome, with the reason where it failed."""
    missing = [name for name in part.needs if find_spec(name) is None]
    if missing:
        return {"outcome": NOT_RUN, "reason": f"needs {', '.join(missing)}"}
    failed = []
    try:
        for row in part.rows(run):
            report(row)
            if row.get("passed") is False:
                failed.append(row["name"])
    except NotRun as error:
        return {"outcome": NOT_RUN, "reason": str(error)}
    except Exception:
        return {"outcome": FAILED, "reason": traceback.format_exc()}
    return {"outcome": FAILED, "reason": f"not as expected: {', '.join(failed)}"} if failed else {"outcome": PASSED}


def run_apart(name: str, seconds: float, options: list[str]) -> dict[str, Any]:
    """Run a part in a process of its own, and end it when so many seconds are over."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows")
        path.touch()
        command = [sys.executable, "-m", "tests.gpu", "--part", name, "--rows", str(path), *options]
        with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as process:
            try:
                reason = f"its process ended with exit status {process.wait(seconds)}"
            except subprocess.TimeoutExpired:
                reason = f"ended after {seconds:.0f} s"
            finally:
                _end_group(process)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    outcome = rows.pop() if rows and "outcome" in rows[-1] else {"outcome": FAILED, "reason": reason}
    return {"part": name, **outcome, "seconds": time.monotonic() - begin, "rows": rows}


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and those that it started, such as torch's compilers."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_here(name: str, run: Run, path: Path) -> None:
    """Be the process of one part: print its rows, and write them to a file with its outcome as the last line."""
    with path.open("a") as file:

        def write(row: Row) -> None:
            print(json.dumps(row, default=str), file=file, flush=True)

        def report(row: Row) -> None:
            print(f"  {described(row)}", flush=True)
            write(row)

        outcome = run_part(PARTS[name], run, report)
        if "reason" in outcome:
            print(f"  {outcome['outcome']}: {outcome['reason']}", flush=True)
        write(outcome)


def table(results: list[dict[str, Any]]) -> str:
    """Write one line for each part and each of its rows."""
    lines = []
    for result in results:
        reason = (result.get("reason") or "").strip().splitlines()
        lines.append(f"{result['part']:<20}{result['outcome']:<9}{result['seconds']:6.1f} s  {(reason or [''])[-1]}")
        lines += [f"    {described(row)}" for row in result["rows"]]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the parts one after another; return the exit status."""
    parser = argparse.ArgumentParser(description="Checks and figures of one GPU.")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--only", action="append", choices=PARTS, help="a part; repeatable")
    parser.add_argument("--cpu", action="store_true", help="tiny sizes on the CPU, to test the parts themselves")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.cpu:
        torch.set_num_threads(1)
    if given.part is not None:
        run_here(given.part, Run(torch.device("cpu" if given.cpu else "cuda"), tiny=given.cpu), given.rows)
        return 0
    gpu = describe_gpu()
    if gpu is None and not given.cpu:
        print("There is no GPU here, so there is nothing to check (--cpu tests the script itself).")
        return 0
    peak = peak_flops(gpu["name"]) if gpu else None
    print("tiny sizes on the CPU" if gpu is None or given.cpu else described({"name": "GPU"} | gpu))
    print(f"model flops of an event: {FLOPS_PER_EVENT}; data sheet's peak: {peak or 'unknown'}", flush=True)
    results: list[dict[str, Any]] = []
    flops = {"model_flops_per_event": FLOPS_PER_EVENT, "peak_flops_per_second": peak}
    document = {"machine": describe_machine(), "gpu": gpu, "cpu": given.cpu, **flops, "parts": results}
    deadline = time.monotonic()
    for name in given.only or PARTS:
        deadline += PARTS[name].seconds * (10 if given.cpu else 1)
        seconds = deadline - time.monotonic()
        print(f"{name} (at most {seconds:.0f} s)", flush=True)
        results.append(run_apart(name, seconds, ["--cpu"] if given.cpu else []))
        if given.json is not None:
            given.json.write_text(json.dumps(document, indent=2, default=str) + "\n")
    print(f"\n{table(results)}")
    return int(any(result["outcome"] == FAILED for result in results))


if __name__ == "__main__":
    sys.exit(main())
