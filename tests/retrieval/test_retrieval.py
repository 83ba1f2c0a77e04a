"""Retrieval equals brute force where it is exact, comes near it where it is not, and follows updates and filters."""

import time
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from lib.retrieval.approximate import FreshRows, inner_products, is_seen
from lib.retrieval.exact import among_largest, exact_search, largest
from lib.retrieval.faiss_lists import PROBED_LISTS, CpuLists, GpuLists, inverted_lists, list_count, search_device
from lib.retrieval.index import ItemIndex, SomeRows, use_threads
from tests.benchmarks.vectors import recall, trained_like

ITEMS = 30_000


def unit(rows: int, seed: int = 0, width: int = 16) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def brute_force(vectors: np.ndarray, queries: np.ndarray, k: int, mask=None, seen=None) -> np.ndarray:
    """The k best rows, -1 where fewer pass."""
    scores = queries @ vectors.T
    if mask is not None:
        scores[:, ~mask] = -np.inf
    for line, rows in enumerate(seen or []):
        scores[line, rows] = -np.inf
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    rows[np.take_along_axis(scores, rows, axis=1) == -np.inf] = -1
    return rows


def random_seen(people: int, items: int, most: int = 60) -> list[np.ndarray]:
    """Histories of different lengths, one of them empty."""
    generator = np.random.default_rng(7)
    lengths = [0, *generator.integers(1, most, people - 1)] if people > 1 else [most]
    return [np.unique(generator.integers(0, items, length)).astype(np.int32) for length in lengths]


def wait_for_merge(index: ItemIndex) -> None:
    limit = time.monotonic() + 60
    while index.merging:
        assert time.monotonic() < limit
        time.sleep(0.01)


# ---------------------------------------------------------------------------------------------------------------------
# Exact


@pytest.mark.parametrize("people", [1, 7, 64])
@pytest.mark.parametrize("share", [None, 0.02, 0.3, 0.99])  # gathered, added to the product, set row by row
@pytest.mark.parametrize("with_seen", [False, True])
def test_search_equals_brute_force(people, share, with_seen):
    vectors, queries = unit(600), unit(people, seed=1)
    mask = np.random.default_rng(2).random(600) < share if share else None
    seen = random_seen(people, 600) if with_seen else None
    scores, rows = ItemIndex(vectors).search(queries, 20, mask, seen)
    assert rows.shape == scores.shape == (people, 20)
    assert np.array_equal(rows, brute_force(vectors, queries, 20, mask, seen))
    expected = np.take_along_axis(queries @ vectors.T, rows, axis=1)
    assert np.allclose(scores[rows >= 0], expected[rows >= 0], atol=1e-6)
    assert (scores[rows < 0] == -np.inf).all()


def test_a_large_product_is_computed_in_parts(monkeypatch):
    monkeypatch.setattr("lib.retrieval.exact.SCORES_AT_ONCE", 3 * 600)
    vectors, queries, seen = unit(600), unit(10, seed=1), random_seen(10, 600)
    assert np.array_equal(
        ItemIndex(vectors).search(queries, 20, None, seen)[1], brute_force(vectors, queries, 20, None, seen)
    )


@pytest.mark.parametrize("rows", [8, 9, 64, 65])
def test_a_mask_that_leaves_one_row(rows):
    vectors = unit(rows)
    index = ItemIndex(vectors)
    for row in range(rows):
        mask = np.zeros(rows, dtype=bool)
        mask[row] = True
        _, found = index.search(vectors[:1], 3, mask)
        assert found[0].tolist() == [row, -1, -1]


def test_minus_one_where_fewer_exist():
    vectors = unit(5)
    scores, rows = ItemIndex(vectors).search(vectors[:1], 7, None, [np.array([2])])
    assert sorted(rows[0].tolist()) == [-1, -1, -1, 0, 1, 3, 4]
    assert (scores[0, 4:] == -np.inf).all()
    assert (rows[0, 4:] == -1).all()
    assert (ItemIndex(vectors).search(vectors[:2], 5, np.zeros(5, dtype=bool))[1] == -1).all()
    seen = [np.arange(2), np.array([4])]
    assert (ItemIndex(vectors).search(vectors[:2], 5, np.zeros(5, dtype=bool), seen)[1] == -1).all()
    assert (ItemIndex(vectors).search(vectors[:2], 5, None, [np.arange(5)] * 2)[1] == -1).all()


def test_a_row_is_updated_in_place_and_found_by_the_next_search():
    vectors, query = unit(50), unit(1, seed=1)
    index = ItemIndex(vectors)
    assert index.search(query, 1)[1][0, 0] != 33
    index.update(np.array([33]), query)
    vectors[33] = query
    assert index.search(query, 1)[1][0, 0] == 33
    assert np.array_equal(index.vectors, vectors)
    assert len(index) == 50


def test_rows_beyond_the_end_extend_the_index():
    vectors = unit(20)
    index = ItemIndex(vectors[:10])
    changed = vectors.copy()
    changed[3] = unit(1, seed=9)[0]
    index.update(np.array([3, *range(10, 20)]), changed[[3, *range(10, 20)]])
    assert len(index) == 20
    assert np.array_equal(index.vectors, changed)
    queries = unit(4, seed=5)
    assert np.array_equal(index.search(queries, 20)[1], brute_force(changed, queries, 20))
    with pytest.raises(ValueError, match="do not follow the index's 20 rows"):
        index.update(np.array([22]), vectors[:1])
    index.update(np.zeros(0, dtype=np.int64), vectors[:0])
    assert len(index) == 20


def test_the_index_keeps_its_own_copy():
    vectors = unit(10)
    index = ItemIndex(vectors)
    before = index.vectors.copy()
    vectors[:] = 0
    assert np.array_equal(index.vectors, before)


# ---------------------------------------------------------------------------------------------------------------------
# Approximate


@pytest.fixture(scope="module")
def items() -> np.ndarray:
    vectors = trained_like(ITEMS, np.random.default_rng(1))
    vectors[0] = 0
    return vectors


@pytest.fixture(scope="module")
def queries() -> np.ndarray:
    return trained_like(64, np.random.default_rng(2))


@pytest.fixture(scope="module")
def lasting(items) -> ItemIndex:
    """An approximate index that no test changes."""
    return ItemIndex(items, exact_rows=256)


@pytest.fixture
def index(items, monkeypatch) -> ItemIndex:
    """An approximate index for a test that changes it, trained briefly."""
    monkeypatch.setattr("lib.retrieval.faiss_lists.CLUSTERING_ROUNDS", 2)
    return ItemIndex(items, exact_rows=256)


def found_share(index: ItemIndex, queries: np.ndarray, mask=None, seen=None, k: int = 100) -> float:
    """Recall against brute force; the answer must be full, best first, of right scores, and within mask and seen."""
    scores, rows = index.search(queries, k, mask, seen)
    assert (rows >= 0).all()
    assert all(len(np.unique(line)) == k for line in rows)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert np.allclose(scores, np.take_along_axis(queries @ index.vectors.T, rows, axis=1), atol=1e-5)
    if mask is not None:
        assert mask[rows].all()
    if seen is not None:
        assert not any(np.isin(line, unwanted).any() for line, unwanted in zip(rows, seen, strict=True))
    return recall(rows, brute_force(index.vectors, queries, k, mask, seen))


@pytest.mark.parametrize("k", [10, 100])
def test_nearly_all_of_the_best_are_found(lasting, queries, k):
    assert list_count(ITEMS) > PROBED_LISTS  # otherwise all were read
    assert found_share(lasting, queries, k=k) >= 0.98
    one_by_one = [lasting.search(query[None], k)[1][0] for query in queries]
    assert recall(np.array(one_by_one), brute_force(lasting.vectors, queries, k)) >= 0.98


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.95])
def test_filters_keep_k_results_whenever_k_exist(lasting, queries, share):
    mask = np.random.default_rng(3).random(ITEMS) < share
    mask[0] = False
    k = min(100, int(mask.sum()))
    assert found_share(lasting, queries, mask, random_seen(64, ITEMS, 1000) if share > 0.01 else None, k) >= 0.98
    _, rows = lasting.search(queries[:3], ITEMS, mask)
    assert ((rows >= 0).sum(axis=1) == mask.sum()).all()


class GpuLimits(GpuLists):
    """The lists for a GPU on the CPU, which refuse what the kernels of a GPU refuse."""

    def search(
        self, packed: Any, queries: torch.Tensor, count: int, probe_factor: int, mask: np.ndarray | None
    ) -> torch.Tensor:
        """Return candidates, if they are not more than the kernels can select."""
        if count > 2048:
            raise RuntimeError(f"GPU index only supports k <= 2048 (requested {count})")
        return super().search(packed, queries, count, probe_factor, mask)


@pytest.fixture(scope="module", params=["exact", "for a CPU", "for a GPU"])
def every_index(items, request) -> ItemIndex:
    """Each kind of index, over a catalog that is small enough to be searched thousands of times."""
    use_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "for a GPU":
            patch.setattr("lib.retrieval.approximate.inverted_lists", GpuLimits)
        return ItemIndex(items[:2500], exact_rows=2500 if request.param == "exact" else 256)


@pytest.mark.parametrize(("share", "seen_best"), [(1.0, 0), (1.0, 500), (0.6, 300)])
def test_every_k_from_1_to_1000_is_answered_in_full(every_index, queries, share, seen_best):
    """Filters and seen rows widen the search, up to an exact one."""
    mask = np.random.default_rng(3).random(2500) < share
    mask[0] = False
    seen = [np.sort(line) for line in brute_force(every_index.vectors, queries[:1], seen_best)] if seen_best else None
    for k in range(1, 1001):
        scores, rows = every_index.search(queries[:1], k, mask, seen)
        assert rows.shape == (1, k)
        assert (rows > 0).all()
        assert (np.diff(scores, axis=1) <= 0).all()
        assert all(len(np.unique(line)) == k for line in rows)
        assert mask[rows].all()
        assert seen is None or not any(np.isin(line, own).any() for line, own in zip(rows, seen, strict=True))


def test_a_filter_that_leaves_one_region_of_the_catalog(lasting, items, queries):
    nearness = items @ queries[0]
    mask = nearness > np.quantile(nearness, 0.7)
    mask[0] = False
    assert found_share(lasting, queries, mask) >= 0.98


@pytest.mark.parametrize("seen_best", [50, 300, 5000])
def test_a_person_who_has_seen_the_best_gets_the_next_best(lasting, items, queries, seen_best):
    best = brute_force(items, queries, seen_best)
    seen = [np.sort(line) for line in best]
    assert found_share(lasting, queries, None, seen) >= 0.98
    seen[1:] = [line[:0] for line in seen[1:]]  # one who comes out short does not disturb the others
    assert found_share(lasting, queries, None, seen) >= 0.98


def test_changed_and_new_rows_are_found_at_once_and_removed_ones_never(index, items, queries):
    index.update(np.arange(100, 164), queries)
    assert index.search(queries, 1)[1][:, 0].tolist() == list(range(100, 164))
    index.update(np.arange(ITEMS, ITEMS + 64), queries * 2)
    assert index.search(queries, 1)[1][:, 0].tolist() == list(range(ITEMS, ITEMS + 64))
    mask = np.ones(ITEMS + 64, dtype=bool)
    mask[0], mask[ITEMS:] = False, False
    assert index.search(queries, 1, mask)[1][:, 0].tolist() == list(range(100, 164))
    seen = [np.array([row]) for row in range(100, 164)]
    assert found_share(index, queries, mask, seen) >= 0.98
    index.update(np.arange(100, 164), items[100:164])
    assert found_share(index, queries, mask) >= 0.98
    assert not index.merging


def test_recall_holds_after_a_fifth_of_the_rows_changed_while_merging(index, queries):
    changed = trained_like(ITEMS, np.random.default_rng(5))
    rows = 1 + np.random.default_rng(4).permutation(ITEMS - 1)[: ITEMS // 5]
    merged = 0
    for start in range(0, len(rows), 500):
        piece = rows[start : start + 500]
        index.update(piece, changed[piece])
        merged += index.merging
        newest = index.search(changed[piece[:8]], 1)
        assert newest[1][:, 0].tolist() == piece[:8].tolist()
        index.update(piece[:8], changed[piece[:8]])  # again, perhaps while the other thread reads them
    assert merged
    assert found_share(index, queries) >= 0.98
    wait_for_merge(index)
    assert found_share(index, queries) >= 0.98


def test_rows_that_change_during_a_merge_stay_fresh(index, items, queries):
    rows = np.arange(1, 3001)
    index.update(rows, items[rows])
    assert index.merging
    index.update(rows[:64], queries)
    wait_for_merge(index)
    assert index.search(queries, 1)[1][:, 0].tolist() == rows[:64].tolist()
    index.update(rows, np.concatenate([queries[::-1], items[1 : len(rows) - 63]]))  # merged the next time
    index.update(rows + 3000, items[rows])
    wait_for_merge(index)
    for _ in range(2):  # the search takes the lists and has what changed meanwhile merged
        assert index.search(queries, 1)[1][:, 0].tolist() == rows[:64][::-1].tolist()
        index.update(rows[64:], items[rows[64:]])
        wait_for_merge(index)
    assert found_share(index, queries) >= 0.98


def test_a_catalog_that_outgrows_the_bound_becomes_approximate_without_a_gap(items, queries, monkeypatch):
    monkeypatch.setattr("lib.retrieval.faiss_lists.CLUSTERING_ROUNDS", 2)
    index = ItemIndex(items[:1000], exact_rows=2000)
    index.update(np.arange(1000, 6000), items[1000:6000])
    index.update(np.arange(1, 65), queries)
    assert index.search(queries, 1)[1][:, 0].tolist() == list(range(1, 65))
    wait_for_merge(index)
    assert index.search(queries, 1)[1][:, 0].tolist() == list(range(1, 65))
    assert found_share(index, queries) >= 0.98


def test_searches_are_exact_where_the_lists_cannot_be_built(caplog):
    index = ItemIndex(unit(4), exact_rows=5)  # so few rows cannot be clustered
    index.update(np.arange(4, 10), unit(6, seed=1))
    wait_for_merge(index)
    for _ in range(2):
        assert index.search(index.vectors, 1)[1][:, 0].tolist() == list(range(10))
    assert caplog.text.count("an index was not packed anew") == 1


def test_a_merge_that_fails_is_tried_again_and_no_search_fails(index, items, queries, monkeypatch, caplog):
    def no_memory(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(CpuLists, "_encode", no_memory)
        index.update(np.arange(1, 3001), items[1:3001])
        wait_for_merge(index)
        for first in (0, 32):  # changed before the failure is noticed, and after it
            index.update(np.arange(101 + first, 133 + first), queries[first : first + 32])
            assert index.search(queries[: first + 32], 1)[1][:, 0].tolist() == list(range(101, 133 + first))
        assert found_share(index, queries) >= 0.98
        assert caplog.text.count("an index was not packed anew") == 1
        assert not index.merging
    index.update(np.arange(3001, 6001), items[3001:6001])  # twice as many
    assert index.merging
    wait_for_merge(index)
    assert index.search(queries, 1)[1][:, 0].tolist() == list(range(101, 165))
    assert found_share(index, queries) >= 0.98
    assert caplog.text.count("an index was not packed anew") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Pieces


def test_fresh_rows_hold_the_newest_vector_of_each_row():
    vectors, fresh = unit(3000), FreshRows(16, torch.device("cpu"))
    for rows in (np.arange(5, 10), np.arange(8, 2000), np.array([2500])):
        fresh.put(rows, torch.from_numpy(vectors[rows] * (1 if rows[0] < 8 else 2)), 2000 if rows[-1] < 2000 else 2600)
    assert len(fresh) == 1996
    query = torch.from_numpy(vectors[[9, 2500]])
    scores, rows = fresh.search(query, 1, None, None)
    assert (rows[:, 0].tolist(), scores[:, 0].round().tolist()) == ([9, 2500], [2, 2])
    fresh.retire(np.array([9, 2700]))
    assert fresh.search(query, 1, None, [np.array([1]), np.array([2500, 2800])])[1][0, 0] not in (9, 2500)


def test_scores_of_candidates_and_seen_candidates():
    vectors, queries = torch.from_numpy(unit(40)), torch.from_numpy(unit(2, seed=1))
    rows = torch.tensor([[3, -1, 39], [0, 7, 7]])
    scores = inner_products(vectors, queries, rows)
    assert torch.allclose(scores[1], (vectors[rows[1]] @ queries[1]))
    assert scores[0, 1] == -torch.inf
    assert is_seen(rows, [np.array([4, 39]), np.array([0])], 40).tolist() == [
        [False, False, True],
        [True, False, False],
    ]
    assert not is_seen(rows, [np.zeros(0, dtype=np.int32)] * 2, 40).any()


def test_exact_search_gives_tensors_where_the_vectors_are():
    vectors = torch.from_numpy(unit(40))
    scores, rows = exact_search(vectors, vectors[:3], 2)
    assert rows[:, 0].tolist() == [0, 1, 2]
    assert scores.device == vectors.device


@pytest.mark.parametrize(("gpus", "device", "lists"), [(0, "cpu", CpuLists), (2, "cuda:0", GpuLists)])
def test_a_gpu_is_chosen_where_faiss_sees_one(gpus, device, lists, monkeypatch):
    assert search_device().type == ("cuda" if faiss.get_num_gpus() else "cpu")
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: gpus)
    assert search_device() == torch.device(device)
    assert isinstance(inverted_lists(8, search_device()), lists)


def test_the_lists_for_a_gpu_find_the_best_and_follow_a_merge(items, queries):
    """On the CPU, with the same calls, tensors in and tensors out."""
    lists, asked = GpuLists(64, torch.device("cpu")), torch.from_numpy(queries)
    packed = lists.merge(items, np.arange(ITEMS))
    assert packed.ntotal == ITEMS - 1  # not the row of zeros
    changed = items.copy()
    changed[100:164], changed[200] = queries, 0
    merged = lists.merge(changed, np.arange(100, 201))
    for vectors, searched in ((items, packed), (changed, merged)):
        rows = lists.search(searched, asked, 264, 1, None)
        assert isinstance(rows, torch.Tensor)
        places = inner_products(torch.from_numpy(vectors), asked, rows).topk(100).indices
        assert recall(rows.gather(1, places).numpy(), brute_force(vectors, queries, 100)) >= 0.98
    assert merged.ntotal == ITEMS - 2


def test_the_largest_come_best_first_and_in_half_the_time_in_any_order():
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(5, 200)).astype("f4")
    scores[1, 3:] = -np.inf  # fewer are finite than are asked for
    expected = np.argsort(-scores, axis=1)
    assert (largest(scores, 7)[[0, 2, 3, 4]] == expected[[0, 2, 3, 4], :7]).all()
    assert largest(scores, 7)[1, :3].tolist() == expected[1, :3].tolist()
    assert largest(scores, 0).shape == (5, 0)
    assert (largest(scores, 200)[0] == expected[0]).all()
    lines, columns = among_largest(scores, 7)
    for line in range(5):
        assert columns[lines == line].tolist() == sorted(expected[line, : 3 if line == 1 else 7].tolist())
    lines, columns = among_largest(scores, 300)
    assert len(lines) == 4 * 200 + 3
    tied = np.array([[1, 2, 2, 2, 0]], dtype="f4")
    assert among_largest(tied, 2)[1].tolist() == [1, 2, 3]


def test_all_products_are_worked_out_where_a_search_would_do_so():
    generator = np.random.default_rng(0)
    vectors, queries = generator.normal(size=(600, 8)).astype("f4"), generator.normal(size=(4, 8)).astype("f4")
    index, asked = ItemIndex(vectors), torch.from_numpy(queries)
    assert index.products(asked) == pytest.approx(queries @ vectors.T, abs=1e-5)
    assert index.products(asked, np.arange(600) > 0) is not None
    assert index.products(asked, np.arange(600) < 20) is None  # these few are gathered
    assert ItemIndex(vectors, exact_rows=256).products(asked) is None
    assert SomeRows(np.arange(10, 20), vectors[10:20]).products(asked) is None


@pytest.mark.parametrize("asked", [3, 400])
def test_scores_of_pairs_are_inner_products(asked):
    generator = np.random.default_rng(0)
    vectors, queries = generator.normal(size=(60, 8)).astype("f4"), generator.normal(size=(4, 8)).astype("f4")
    lines, rows = np.sort(generator.integers(0, 4, asked)), generator.integers(0, 60, asked)
    found = ItemIndex(vectors).scores(torch.from_numpy(queries), lines, rows)
    assert found == pytest.approx((queries[lines] * vectors[rows]).sum(axis=1), abs=1e-5)
    assert len(ItemIndex(vectors).scores(torch.from_numpy(queries), lines[:0], rows[:0])) == 0
