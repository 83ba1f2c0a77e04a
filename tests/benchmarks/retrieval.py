"""Retrieval as the catalog grows: exact beside approximate search, then filters, then a fifth of the rows changed.

    python -m tests.benchmarks.retrieval [--items 10000 --items 100000 ...] [--threads N] [--gaussian] [--json FILE]

Queries a second for the 100 best rows: `FAISS exact` is IndexFlatIP at its best batch size (16, 64 or 256), `product` a
matrix product with torch.topk (the limit on a GPU), `lists` the approximate index; the last two in batches of 64 and
one by one. All use the same threads. Recall is the share of the exact 100 best rows.

The vectors are synthetic and look like trained ones (tests/benchmarks/vectors.py). `--gaussian` draws plain Gaussian
directions instead, which have no neighbourhoods to find and are the worst case.

Changed: a fifth of the rows (at most 200,000) gets new vectors of the same kind, a thousand rows each tenth of a
second, with searches of 8 queries in between without a pause; recall is taken before the last merge and after it. The
longest update and search are those that began while another thread merged; `longest_computing` in the JSON is CPU time,
without the wait for a core on a busy machine.
"""

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import faiss
import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from jobs.command_line import run_command
from jobs.configuration import write_json
from lib.retrieval.faiss_lists import copy_to, search_device
from lib.retrieval.index import ItemIndex, use_threads
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.vectors import WIDTH, Search, gaussian, in_batches, recall, speed, trained_like

SIZES = [10_000, 100_000, 1_000_000]
K, BATCH, SINGLE, REPEATS = 100, 64, 64, 3
PIECE, PIECE_SECONDS, SEARCHED, MOST_CHANGED = 1000, 0.1, 8, 200_000
BATCHES = (16, 64, 256)


def resident_bytes() -> int:
    """Return the memory that this process holds, after giving back what is free, so that differences are exact."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def faiss_exact(vectors: np.ndarray) -> Search:
    """Return the search of the exact peer, on the GPU where FAISS sees one."""
    index = copy_to(search_device(), faiss.IndexFlatIP(WIDTH))
    index.add(vectors)
    return lambda queries: index.search(queries, K)[1]


def measure_exact(vectors: np.ndarray, queries: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """Measure FAISS's exact index and the matrix product; return also the exact rows."""
    search, few = faiss_exact(vectors), 1 if len(vectors) > 100_000 else REPEATS
    exact = in_batches(search, queries, BATCH)
    speeds = {batch: speed(search, queries, batch, few) for batch in BATCHES}
    del search
    product = ItemIndex(vectors, exact_rows=len(vectors))
    result = {
        "faiss_exact_queries_per_s": max(speeds.values()),
        "faiss_exact_batch": max(speeds, key=lambda batch: speeds[batch]),
        "product_queries_per_s": speed(lambda some: product.search(some, K)[1], queries, BATCH, few),
        "product_single_queries_per_s": speed(lambda some: product.search(some, K)[1], queries[:SINGLE], 1, few),
    }
    return result, exact


def measure_filters(index: ItemIndex, queries: np.ndarray) -> dict[str, Any]:
    """Measure masks that leave half, a tenth and a thousandth of the rows."""
    results = {}
    for share in (0.5, 0.1, 0.001):
        mask = np.random.default_rng(3).random(len(index)) < share
        exact = faiss_exact_masked(index.vectors, queries, mask)
        found = in_batches(lambda some, mask=mask: index.search(some, K, mask)[1], queries, BATCH)
        results[str(share)] = {
            "passing": int(mask.sum()),
            "recall": recall(found, exact),
            "full_answers": bool(((found >= 0).sum(axis=1) == min(K, mask.sum())).all()),
            "queries_per_s": speed(lambda some, mask=mask: index.search(some, K, mask)[1], queries, BATCH, 1),
        }
    return results


def faiss_exact_masked(vectors: np.ndarray, queries: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the exact best rows of those that pass a mask."""
    passing = np.flatnonzero(mask)
    places = faiss.knn(queries, vectors[passing], min(K, len(passing)), faiss.METRIC_INNER_PRODUCT)[1]
    return passing[places]


def measure_change(index: ItemIndex, vectors: np.ndarray, queries: np.ndarray) -> dict[str, Any]:
    """Change rows to the vectors, piece by piece, while searches go on; return recall and times."""
    rows = np.random.default_rng(4).permutation(len(index))[: len(vectors)]
    calls: dict[tuple[str, bool], list[tuple[float, float]]] = {}

    def timed(name: str, call: Callable[[], Any]) -> None:
        merging, started, used = index.merging, time.perf_counter(), time.thread_time()
        call()
        calls.setdefault((name, merging), []).append((time.perf_counter() - started, time.thread_time() - used))

    def search_some() -> None:
        timed("search", lambda: index.search(queries[:SEARCHED], K))

    def searched_all() -> bool:
        was_merging = index.merging
        search_some()  # it takes the merged lists, and starts a merge of what changed meanwhile
        return not was_merging and not index.merging

    started = time.perf_counter()
    for start in range(0, len(rows), PIECE):
        part = slice(start, start + PIECE)
        timed("update", lambda part=part: index.update(rows[part], vectors[part]))
        search_some()
        while time.perf_counter() - started < (start / PIECE + 1) * PIECE_SECONDS:
            search_some()
    changed = time.perf_counter() - started
    found = in_batches(lambda some: index.search(some, K)[1], queries, BATCH)
    while not searched_all():
        pass
    merged = in_batches(lambda some: index.search(some, K)[1], queries, BATCH)
    exact = in_batches(faiss_exact(index.vectors), queries, BATCH)
    result: dict[str, Any] = {"rows": len(rows), "rows_per_s": len(rows) / changed}
    result |= {"recall_at_once": recall(found, exact), "recall_merged": recall(merged, exact)}
    result["queries_per_s_merged"] = speed(lambda some: index.search(some, K)[1], queries, BATCH)
    for (name, merging), seconds in calls.items():
        when = "while_merging" if merging else "otherwise"
        milliseconds, computing = np.array(seconds).T * 1e3
        median, high = np.quantile(milliseconds, [0.5, 0.99]).tolist()
        longest = {"longest": float(milliseconds.max()), "longest_computing": float(computing.max())}
        result[f"{name}_ms_{when}"] = {"median": median, "p99": high, **longest}
    return result


def measure(items: int, draw: Callable[[int, np.random.Generator], np.ndarray]) -> dict[str, Any]:
    """Measure one catalog size."""
    vectors = draw(items, np.random.default_rng(1))
    queries = draw(256 if items <= 1_000_000 else 64, np.random.default_rng(2))
    result, exact = measure_exact(vectors, queries)
    before, started = resident_bytes(), time.perf_counter()
    index = ItemIndex(vectors, exact_rows=max(items // 20, 256))
    result |= {"items": items, "build_s": time.perf_counter() - started}
    result["bytes_per_item"] = (resident_bytes() - before) / items
    result["recall"] = recall(in_batches(lambda some: index.search(some, K)[1], queries, BATCH), exact)
    result["queries_per_s"] = speed(lambda some: index.search(some, K)[1], queries, BATCH)
    result["single_queries_per_s"] = speed(lambda some: index.search(some, K)[1], queries[:SINGLE], 1)
    result["times_faiss_exact"] = result["queries_per_s"] / result["faiss_exact_queries_per_s"]
    result["filters"] = measure_filters(index, queries)
    vectors = draw(min(items // 5, MOST_CHANGED), np.random.default_rng(5))
    result["changed"] = measure_change(index, vectors, queries)
    return result


def tables(results: list[dict[str, Any]], title: str) -> list[Table]:
    """Return the tables of the results."""
    speeds = Table("items", "FAISS exact", "product", "one", "lists", "one", "recall", "build, s", "bytes an item")
    speeds.title = f"Queries a second, k = {K}; {title}"
    changes = Table("items", "recall at once", "merged", "longest update, ms", "search, ms", "filter: recall, full")
    changes.title = "A fifth of the rows changed; filters that leave 0.1%"
    for line in results:
        names = ("faiss_exact", "product", "product_single", "", "single")
        numbers = [f"{line[f'{name}_queries_per_s'.lstrip('_')]:,.0f}" for name in names]
        rest = (f"{line['recall']:.4f}", f"{line['build_s']:.1f}", f"{line['bytes_per_item']:.0f}")
        speeds.add_row(f"{line['items']:,}", *numbers, *rest)
        changed, filtered = line["changed"], line["filters"]["0.001"]
        pauses = [changed.get(f"{name}_ms_while_merging", {}).get("longest") for name in ("update", "search")]
        changes.add_row(
            f"{line['items']:,}",
            f"{changed['recall_at_once']:.4f}",
            f"{changed['recall_merged']:.4f}",
            *("no merge" if pause is None else f"{pause:.1f}" for pause in pauses),
            f"{filtered['recall']:.4f}, {'yes' if filtered['full_answers'] else 'no'}",
        )
    return [speeds, changes]


def benchmark(
    items: Annotated[list[int] | None, typer.Option(help="Catalog size; repeatable.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of every search and of the building.")] = 1,
    random: Annotated[bool, typer.Option("--gaussian", help="Plain Gaussian directions.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Measure retrieval at several catalog sizes."""
    machine = describe_machine()
    use_threads(threads)
    device = search_device()
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    results = []
    for size in items or SIZES:
        results.append(measure(size, gaussian if random else trained_like))
        gc.collect()
        if json_file is not None:
            settings = {"width": WIDTH, "k": K, "batch": BATCH, "threads": threads, "gaussian": random}
            write_json(json_file, {"machine": machine, "settings": settings, "results": results})
    for table in tables(results, f"{threads} threads, {machine.get('gpu', machine['processor'])}"):
        Console().print(table)


if __name__ == "__main__":
    run_command(benchmark)
