"""Layer 2. A file's rows: all chunks of lines joined into CSR matrices, and CSR rows as text.

Before it: `files` (chunks of lines) and `parser` (lines -> rows). After it: `formats`, `pairs`, `svmlight` and
`predictions`, which differ in their headers alone.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import csr_matrix

from xmc_midx.data.files import LineChunks
from xmc_midx.data.parser import Rows, Rules, parse_chunk, parse_lines
from xmc_midx.data.problems import Problem, Report
from xmc_midx.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["RowTable", "float32_rows", "pair_texts", "row_texts", "rows_matrix"]

_DTYPES: dict[str, type[np.generic]] = {
    "label_ids": np.int32,
    "num_labels": np.int64,
    "feature_ids": np.int32,
    "values": np.float32,
    "num_features": np.int64,
    "comment_lines": np.int64,
}
"""The fields of `Rows`."""

SHORT_BYTES = 2**19
"""A shorter file is left to `parse_lines`, which takes less time than numba's start."""

_PENDING_BYTES = 48 * 2**20
"""Text that waits for its rows, one chunk aside: very long lines make large chunks."""


class RowTable:
    """The rows read so far of a file that should hold `num_rows` of them.

    Chunks are parsed by several threads while the next ones are read, and joined and reported in the file's order. The
    memory beyond the result: an eighth of it, and the chunks at hand.

    Parameters
    ----------
    rules, report : as for `parse_lines`.
    num_rows : rows to read; None reads every line as a row.
    source : who says so, such as `the header says 5 instances`.
    line_by_line : leave all lines to `parse_lines`: the reference of the tests.
    """

    def __init__(
        self, rules: Rules, report: Report, *, num_rows: int | None, source: str, line_by_line: bool = False
    ) -> None:
        self.num_rows = 0
        self._wanted = num_rows
        self._source = source
        self._rules = rules
        self._report = report
        self._line_by_line = line_by_line
        self._columns = {name: _Growing(dtype) for name, dtype in _DTYPES.items()}

    def read(self, lines: LineChunks, chunks: Iterable[tuple[int, bytes]]) -> None:
        """Read `chunks` of `lines`, up to its end. Another number of rows than wanted is a fault, kind `rows`."""
        # The stream is ahead of the rows; its fault, always the last thing of a file, waits for theirs.
        late: list[Problem] = []
        lines.report = late.append
        num_workers = _num_workers()
        pool = ThreadPoolExecutor(num_workers)
        pending: deque[_Pending] = deque()
        try:
            for first_line, text in chunks:
                num_lines = lines.num_lines - first_line + 1  # `lines` has counted them
                wanted, surplus = self._split(text, num_lines)
                num_wanted = num_lines - surplus.count(b"\n")
                pending.append(self._start(pool, first_line, wanted))
                self.num_rows += num_wanted
                if surplus.strip():
                    blank = surplus[: len(surplus) - len(surplus.lstrip())]
                    line = first_line + num_wanted + blank.count(b"\n")
                    hint = "Is this the header of another file?"
                    late.append(self._fault(line, f"a row too many, {self._source}.", hint))
                    break
                while len(pending) > num_workers or sum(len(chunk.text) for chunk in pending) > _PENDING_BYTES:
                    self._take(pending.popleft())
            while pending:
                self._take(pending.popleft())
        finally:
            pool.shutdown(cancel_futures=True)
        if lines.complete and self._wanted is not None and self.num_rows < self._wanted:
            fact = f"the file ends after {self.num_rows} instances, {self._source}."
            late.append(self._fault(max(lines.num_lines, 1), fact, "Is the file cut?"))
        for problem in late:
            self._report(problem)

    def _start(self, pool: ThreadPoolExecutor, first_line: int, text: bytes) -> _Pending:
        is_short_file = self.num_rows == 0 and len(text) <= SHORT_BYTES
        rows = None if self._line_by_line or is_short_file else pool.submit(parse_chunk, text, self._rules)
        return _Pending(first_line, text, rows)

    def _take(self, chunk: _Pending) -> None:
        rows = chunk.rows.result() if chunk.rows else None
        if rows is None:
            rows = parse_lines(chunk.text, chunk.first_line, self._rules, self._report)
        for name, column in self._columns.items():
            column.extend(getattr(rows, name))

    def _split(self, text: bytes, num_lines: int) -> tuple[bytes, bytes]:
        """The lines of `text` that are still wanted, and the rest."""
        missing = num_lines if self._wanted is None else self._wanted - self.num_rows
        if num_lines <= missing:
            return text, b""
        if missing == 0:
            return b"", text
        end = int(np.flatnonzero(np.frombuffer(text, dtype=np.uint8) == ord("\n"))[missing - 1]) + 1
        return text[:end], text[end:]

    def _fault(self, line: int, text: str, hint: str) -> Problem:
        return Problem(kind="rows", file=self._rules.file, line=line, text=text, hint=hint)

    def features(self) -> csr_matrix[Any]:
        """(rows, F) float32, ids ascending in each row."""
        ids, values = self._columns["feature_ids"].array(), self._columns["values"].array()
        return _csr(values, ids, self._columns["num_features"].array(), self._rules.num_features)

    def labels(self) -> csr_matrix[Any]:
        """(rows, L) float32, all ones, ids ascending in each row."""
        ids = self._columns["label_ids"].array()
        ones = np.ones(len(ids), dtype=np.float32)
        return _csr(ones, ids, self._columns["num_labels"].array(), self._rules.num_labels)

    def comment_lines(self) -> NDArray[np.int64]:
        """Numbers of the lines that are no rows, ascending."""
        return self._columns["comment_lines"].array()


@dataclass(frozen=True, slots=True)
class _Pending:
    """A chunk that is being parsed."""

    first_line: int
    text: bytes
    rows: Future[Rows | None] | None
    """None where it is left to `parse_lines`."""


def _num_workers() -> int:
    """Threads that parse: a stream of more than 8 times the speed of one is rare, and each holds a chunk."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)


class _Growing:
    """An array that grows at its end. Up to an eighth of it is spare; Linux moves the pages, not their bytes."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self._array = np.empty(0, dtype=dtype)
        self._size = 0

    def extend(self, part: NDArray[Any]) -> None:
        size = self._size + len(part)
        if size > len(self._array):
            self._array.resize(size + size // 8, refcheck=False)
        self._array[self._size : size] = part
        self._size = size

    def array(self) -> NDArray[Any]:
        """What it holds; nothing can be added afterwards."""
        self._array.resize(self._size, refcheck=False)
        return self._array


def _csr(values: NDArray[Any], ids: NDArray[Any], counts: NDArray[np.int64], num_columns: int) -> csr_matrix[Any]:
    offsets = np.concatenate([[0], np.cumsum(counts)])
    matrix = csr_matrix((values, ids, offsets), shape=(len(counts), num_columns))
    matrix.has_canonical_format = True
    return matrix


def rows_matrix(rows: Rows, num_features: int) -> csr_matrix[Any]:
    """(rows, F) float32 features of parsed lines, ids ascending in each row."""
    return _csr(rows.values, rows.feature_ids, rows.num_features, num_features)


def float32_rows(path: Path, matrix: csr_matrix[Any]) -> csr_matrix[Any]:
    """A copy to write: float32, ids ascending in each row, duplicates summed.

    Raises
    ------
    DataError : a value is not finite; the message names `path`.
    """
    with np.errstate(over="ignore"):
        matrix = csr_matrix(matrix, dtype=np.float32, copy=True)
    matrix.sum_duplicates()
    if not np.isfinite(matrix.data).all():
        raise DataError(f"{path}: a value to write is not finite in float32.")
    return matrix


def row_texts(texts: list[str], offsets: NDArray[Any], separator: str) -> list[str]:
    """Each row's texts joined; row i owns `offsets[i]:offsets[i+1]` of them."""
    ends = offsets.tolist()
    return [separator.join(texts[start:end]) for start, end in itertools.pairwise(ends)]


def pair_texts(ids: NDArray[Any], values: NDArray[np.float32]) -> list[str]:
    """`id:value` of each entry, the value with the fewest digits that give the same float32."""
    numbers = values.astype(np.float32).astype("U32").tolist()
    return [f"{i}:{text.removesuffix('.0')}" for i, text in zip(ids.tolist(), numbers, strict=True)]
