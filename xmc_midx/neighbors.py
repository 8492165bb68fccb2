"""Layer 2. The nearest training instances of a feature row, by an inverted list of the training features.

What an encoder of D numbers must forget (a rare word that names a rare label), the training rows remember;
`xmc_midx.predictor` adds the labels of the neighbours to the model's own. Exact inner products over the features that
are not in too many rows.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scipy.sparse import csr_matrix

__all__ = ["NeighborIndex", "save_rows"]

_MAX_SHARE = 0.1
"""A feature of more than this share of the rows is left out: such lists are long and say little (EXPERIMENTS.md,
"Neighbours")."""
_SMALL = 20_000
"""Up to so many rows no feature is left out."""


class NeighborIndex:
    """Finds the training instances with the largest inner product.

    Parameters
    ----------
    features : (N, F) float, rows of unit length: the inner product is the cosine.
    labels : (N, L); a stored value is a label of the row.
    """

    def __init__(self, features: csr_matrix, labels: csr_matrix) -> None:
        assert features.shape[0] == labels.shape[0], "features and labels are rows of the same instances"
        self.num_features = int(features.shape[1])
        self.labels = csr_matrix(
            (np.ones(labels.nnz, dtype=np.float32), labels.indices, labels.indptr), shape=labels.shape
        )
        columns = features.tocsc()
        counts = np.diff(columns.indptr)
        if features.shape[0] > _SMALL:
            kept = counts <= _MAX_SHARE * features.shape[0]
            mask = np.repeat(kept, counts)
            counts = np.where(kept, counts, 0)
            rows, values = columns.indices[mask], columns.data[mask]
        else:
            rows, values = columns.indices, columns.data
        self._offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._rows = rows.astype(np.int32)
        self._values = values.astype(np.float32)

    @property
    def num_instances(self) -> int:
        return int(self.labels.shape[0])

    @classmethod
    def load(cls, path: Path) -> NeighborIndex:
        """The index over what `save_rows` wrote; a ValueError, LookupError or SafetensorError where it is not that."""
        arrays = load_file(path)
        num_features, num_labels = (int(n) for n in arrays["num_features_and_labels"])
        num_rows = arrays["labels.offsets"].shape[0] - 1
        values = arrays["features.values"].astype(np.float32)
        features = csr_matrix(
            (values, arrays["features.ids"], arrays["features.offsets"]), shape=(num_rows, num_features)
        )
        ones = np.ones(arrays["labels.ids"].shape[0], dtype=np.float32)
        labels = csr_matrix((ones, arrays["labels.ids"], arrays["labels.offsets"]), shape=(num_rows, num_labels))
        for matrix in (features, labels):
            # Compiled code follows these ids without looking: the file must not lead it out of bounds.
            matrix.check_format(full_check=True)
        return cls(features, labels)

    def search(self, features: csr_matrix, count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The `count` nearest training rows of each of B rows.

        Returns
        -------
        (B, count) int64 row numbers and (B, count) float32 inner products: falling, ties to the smaller row; -1 and 0
        where fewer rows share a feature with the query.
        """
        assert features.shape[1] == self.num_features, "queries and training rows have the same features"
        num_rows = features.shape[0]
        rows_BK = np.full((num_rows, count), -1, dtype=np.int64)
        scores_BK = np.zeros((num_rows, count), dtype=np.float32)
        queries = (features.indptr.astype(np.int64), features.indices, features.data.astype(np.float32))
        lists = (self._offsets, self._rows, self._values)

        def run(begin: int, end: int) -> None:
            _search(*queries, *lists, self.num_instances, begin, end, rows_BK, scores_BK)

        workers = numba.get_num_threads()
        borders = np.linspace(0, num_rows, workers + 1).astype(int)
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(run, borders[:-1], borders[1:]))
        return rows_BK, scores_BK

    def votes(self, rows_BK: NDArray[np.int64], scores_BK: NDArray[np.float32], temperature: float) -> csr_matrix:
        """The neighbours' labels, (B, L) float64: the share of the neighbours that have a label, each neighbour
        weighted by
        `softmax(score / temperature)`. In [0, 1]; an instance without neighbours has none.
        """
        found_BK = rows_BK >= 0
        logits_BK = np.where(found_BK, scores_BK.astype(np.float64) / temperature, -np.inf)
        peak_B1 = np.max(logits_BK, axis=1, keepdims=True, initial=-1e300)
        weight_BK = np.exp(logits_BK - peak_B1)
        weight_BK /= np.maximum(weight_BK.sum(1, keepdims=True), 1e-300)
        chosen = csr_matrix(
            (weight_BK[found_BK], rows_BK[found_BK], np.concatenate([[0], np.cumsum(found_BK.sum(1))])),
            shape=(rows_BK.shape[0], self.num_instances),
        )
        return csr_matrix(chosen @ self.labels)


def save_rows(path: Path, features: csr_matrix, labels: csr_matrix) -> None:
    """Write training rows (N, F) and their labels (N, L) as safetensors: values in half precision, four bytes an id."""
    arrays: dict[str, NDArray[Any]] = {
        "features.values": features.data.astype(np.float16),
        "features.ids": features.indices.astype(np.int32),
        "features.offsets": features.indptr.astype(np.int64),
        "labels.ids": labels.indices.astype(np.int32),
        "labels.offsets": labels.indptr.astype(np.int64),
        "num_features_and_labels": np.array([features.shape[1], labels.shape[1]], dtype=np.int64),
    }
    save_file(arrays, path)


@numba.njit(nogil=True, cache=True)
def _search(
    query_offsets: Any,
    query_ids: Any,
    query_values: Any,
    offsets: Any,
    rows: Any,
    values: Any,
    num_rows: int,
    begin: int,
    end: int,
    found_BK: Any,
    score_BK: Any,
) -> None:
    """For the queries begin..end: `scores = queries @ training.T`, the best K of each row, without the matrix."""
    total = np.zeros(num_rows, dtype=np.float32)
    seen = np.full(num_rows, -1, dtype=np.int64)
    touched = np.empty(num_rows, dtype=np.int32)
    count = found_BK.shape[1]
    for query in range(begin, end):
        num_touched = 0
        for entry in range(query_offsets[query], query_offsets[query + 1]):
            feature, weight = query_ids[entry], query_values[entry]
            for position in range(offsets[feature], offsets[feature + 1]):
                row = rows[position]
                if seen[row] != query:
                    seen[row] = query
                    total[row] = 0.0
                    touched[num_touched] = row
                    num_touched += 1
                total[row] += weight * values[position]
        filled = 0
        for index in range(num_touched):
            row = touched[index]
            score = total[row]
            place = filled
            # Insertion from the end: after the first rows nearly every candidate loses to the last place at once.
            while place > 0 and (
                score > score_BK[query, place - 1]
                or (score == score_BK[query, place - 1] and row < found_BK[query, place - 1])
            ):
                place -= 1
            if place >= count:
                continue
            last = min(filled, count - 1)
            for move in range(last, place, -1):
                found_BK[query, move] = found_BK[query, move - 1]
                score_BK[query, move] = score_BK[query, move - 1]
            found_BK[query, place] = row
            score_BK[query, place] = score
            filled = min(filled + 1, count)
