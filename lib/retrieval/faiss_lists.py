"""Inverted lists of quantised vectors (IVF): an approximate search that reads a part of the catalog.

On the CPU a number takes four bits (a product quantiser of one-dimensional pieces over the residuals), read by the
fast-scan kernels (Andre et al., "Cache locality is not enough", 2015); on a GPU eight. Vectors that are zero (padding,
spare rows) are in no list. The quantisers are trained once. Changed rows are encoded anew, and new lists are packed
from the stored codes, in a small part of the time of the first build. Another thread can do so, for the lists that are
searched are never written to.
"""

from typing import Any, Protocol

import faiss
import numpy as np
import torch

TRAINING_ROWS = 1 << 18
ROWS_PER_CENTROID, CLUSTERING_ROUNDS = 64, 8
PROBED_LISTS = 128  # of 512 at a hundred thousand rows, of 2,048 at a million
MOST_LISTS = 4096
BITS = 4
ROWS_AT_ONCE = 1 << 16  # encoded or sent to a GPU at once, which bounds the memory that this takes


class InvertedLists(Protocol):
    """Trained quantisers and the codes of all rows."""

    def merge(self, vectors: np.ndarray, rows: np.ndarray) -> Any:
        """Encode the changed rows of vectors (N, C), after training if need be; return the packed lists to search."""
        ...

    def search(
        self, packed: Any, queries: torch.Tensor, count: int, probe_factor: int, mask: np.ndarray | None
    ) -> torch.Tensor:
        """Return (B, count) rows that are likely nearest to queries (B, C), -1 where fewer are found.

        Args:
            packed: what `merge` returned.
            queries: (B, C) float32.
            count: how many candidates.
            probe_factor: how many times the usual number of lists is read.
            mask: (N,) bool, the rows that may be found; None for all.
        """
        ...


def list_count(rows: int) -> int:
    """Return about twice the square root of the number of rows, a power of two; a build costs rows times lists."""
    return min(1 << max(round(np.log2(2 * max(rows, 1) ** 0.5)), 2), MOST_LISTS)


def training_sample(vectors: np.ndarray) -> np.ndarray:
    """Pick up to TRAINING_ROWS vectors that are not zero, spread evenly over the rows."""
    rows = np.flatnonzero(vectors.any(axis=1))
    if len(rows) > TRAINING_ROWS:
        rows = rows[np.linspace(0, len(rows) - 1, TRAINING_ROWS, dtype=np.int64)]
    return np.ascontiguousarray(vectors[rows])


def train(index: Any, vectors: np.ndarray) -> None:
    """Train centroids and quantiser of a FAISS inverted index."""
    index.cp.niter = CLUSTERING_ROUNDS
    index.cp.max_points_per_centroid = ROWS_PER_CENTROID
    index.cp.min_points_per_centroid = 1  # no warning where rows are few
    index.train(training_sample(vectors))


class CpuLists:
    """Lists on the CPU, four bits a number: C + 12 bytes an item for packed code and row, stored code and list."""

    def __init__(self, width: int):
        self._width = width
        self._template: Any = None
        self._lists = np.zeros(0, dtype=np.int32)  # (N,) the list of each row, -1 where it is in none
        self._codes = np.zeros((0, 0), dtype=np.uint8)  # (N, C / 2)

    def merge(self, vectors: np.ndarray, rows: np.ndarray) -> Any:
        """Encode the changed rows and pack all lists."""
        if self._template is None:
            self._template = self._trained(vectors)
        self._extend(len(vectors))
        for start in range(0, len(rows), ROWS_AT_ONCE):
            self._encode(vectors, rows[start : start + ROWS_AT_ONCE])
        return self._packed()

    def _trained(self, vectors: np.ndarray) -> Any:
        self._quantizer = faiss.IndexFlatIP(self._width)
        index = faiss.IndexIVFPQ(
            self._quantizer, self._width, list_count(len(vectors)), self._width, BITS, faiss.METRIC_INNER_PRODUCT
        )
        index.use_precomputed_table = -1
        index.pq.cp.niter = CLUSTERING_ROUNDS
        index.pq.cp.min_points_per_centroid = 1
        train(index, vectors)
        self._codes = np.zeros((0, index.code_size), dtype=np.uint8)
        self._centroids = self._quantizer.reconstruct_n(0, index.nlist)
        levels = faiss.vector_to_array(index.pq.centroids).reshape(self._width, 1 << BITS)
        self._order = np.argsort(levels, axis=1).astype(np.uint8)
        ascending = np.sort(levels, axis=1)
        self._bounds = (ascending[:, :-1] + ascending[:, 1:]) / 2  # between two neighbouring levels
        return index

    def _extend(self, count: int) -> None:
        added = count - len(self._lists)
        if added == 0:
            return
        lists = np.concatenate([self._lists, np.full(added, -1, dtype=np.int32)])
        codes = np.zeros((count, self._template.code_size), dtype=np.uint8)
        codes[: count - added] = self._codes
        self._lists, self._codes = lists, codes

    def _encode(self, vectors: np.ndarray, rows: np.ndarray) -> None:
        changed = np.ascontiguousarray(vectors[rows])
        lists = self._quantizer.search(changed, 1)[1][:, 0]
        residuals = changed - self._centroids[lists]
        codes = np.zeros((len(rows), 2 * self._template.code_size), dtype=np.uint8)
        for column, (bounds, order) in enumerate(zip(self._bounds, self._order, strict=True)):
            # as FAISS's own encoder does, in a tenth of its time
            codes[:, column] = order[np.searchsorted(bounds, residuals[:, column])]
        self._codes[rows] = codes[:, 0::2] | codes[:, 1::2] << BITS
        self._lists[rows] = np.where(changed.any(axis=1), lists, -1)

    def _packed(self) -> Any:
        self._template.reset()  # of what a merge that failed left
        order = np.argsort(self._lists, kind="stable")  # rows that are in no list come first
        sizes = np.bincount(self._lists + 1, minlength=self._template.nlist + 1)
        codes = self._codes[order]
        start = int(sizes[0])
        for number, size in enumerate(sizes[1:].tolist()):
            if size:
                part = slice(start, start + size)
                pointers = (faiss.swig_ptr(array[part]) for array in (order, codes))
                self._template.invlists.add_entries(number, size, *pointers)
                start += size
        self._template.ntotal = start - int(sizes[0])
        packed = faiss.IndexIVFPQFastScan(self._template)
        self._template.reset()
        return packed

    def search(
        self, packed: Any, queries: torch.Tensor, count: int, probe_factor: int, mask: np.ndarray | None
    ) -> torch.Tensor:
        """Return candidates; the mask is applied within the lists."""
        selector = None
        if mask is not None:
            bits = np.packbits(mask, bitorder="little")
            selector = faiss.IDSelectorBitmap(len(bits), faiss.swig_ptr(bits))
        parameters = probing(self._template.nlist, probe_factor, selector)
        return torch.from_numpy(packed.search(queries.numpy(), count, params=parameters)[1])


class GpuLists:
    """Lists on a GPU, eight bits a number: C + 8 bytes an item, and every merge sends all rows again.

    All but the GPU's own kernels runs on a CPU as well, for tests.
    """

    def __init__(self, width: int, device: torch.device):
        self._width, self._device = width, device
        self._template: Any = None

    def merge(self, vectors: np.ndarray, rows: np.ndarray) -> Any:
        """Build new lists on the GPU, beside those that are searched meanwhile."""
        if self._template is None:
            self._template = self._trained(vectors)
        packed = copy_to(self._device, self._template)
        for start in range(0, len(vectors), ROWS_AT_ONCE):
            part = vectors[start : start + ROWS_AT_ONCE]
            kept = np.flatnonzero(part.any(axis=1))
            packed.add_with_ids(np.ascontiguousarray(part[kept]), kept + start)
        return packed

    def _trained(self, vectors: np.ndarray) -> Any:
        kind, metric = faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
        self._quantizer, clustering = (faiss.IndexFlatIP(self._width) for _ in range(2))
        lists = list_count(len(vectors))
        index: Any = faiss.IndexIVFScalarQuantizer(self._quantizer, self._width, lists, kind, metric)
        index.clustering_index = on_device = copy_to(self._device, clustering)
        train(index, vectors)
        index.clustering_index = None
        del on_device  # not sooner: FAISS kept a pointer to it
        return index

    def search(
        self, packed: Any, queries: torch.Tensor, count: int, probe_factor: int, mask: np.ndarray | None
    ) -> torch.Tensor:
        """Return candidates, also those outside the mask. FAISS reads and writes the tensors where they are."""
        rows = torch.empty((len(queries), count), dtype=torch.int64, device=queries.device)
        scores = torch.empty((len(queries), count), device=queries.device)
        pointers = [faiss.cast_integer_to_float_ptr(tensor.data_ptr()) for tensor in (queries, scores)]
        found = faiss.cast_integer_to_idx_t_ptr(rows.data_ptr())
        packed.search_c(
            len(queries), pointers[0], count, pointers[1], found, probing(self._template.nlist, probe_factor, None)
        )
        return rows


def probing(lists: int, probe_factor: int, selector: Any) -> Any:
    """Return the parameters of a search: how many of the lists it reads, and what it leaves out."""
    library: Any = faiss  # its keyword arguments are made at run time
    return library.SearchParametersIVF(nprobe=min(PROBED_LISTS * probe_factor, lists), sel=selector)


def copy_to(device: torch.device, index: Any) -> Any:
    """Copy a FAISS index to a device, with GPU resources of its own: threads cannot share them safely."""
    if device.type != "cuda":
        return faiss.clone_index(index)
    gpu: Any = faiss  # the names below exist only in faiss-gpu
    resources = gpu.StandardGpuResources()
    resources.setDefaultNullStreamAllDevices()  # torch's stream, so that each sees what the other wrote
    return gpu.index_cpu_to_gpu(resources, device.index or 0, index)


def search_device() -> torch.device:
    """Return where searches run: the first GPU that FAISS sees, else the CPU."""
    return torch.device("cuda:0" if faiss.get_num_gpus() > 0 else "cpu")


def inverted_lists(width: int, device: torch.device) -> InvertedLists:
    """Return lists, not trained yet, for vectors of a width on a device."""
    return GpuLists(width, device) if device.type == "cuda" else CpuLists(width)
