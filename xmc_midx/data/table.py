"""Layer 2. A file's rows: all chunks of lines joined into CSR matrices, and CSR rows as text.

Before it: `files` (chunks of lines) and `parser` (lines -> rows). After it: `formats` and `predictions`,
which differ in their headers alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import csr_matrix

from xmc_midx.data.files import LineChunks
from xmc_midx.data.parser import Rows, Rules, parse_rows
from xmc_midx.data.problems import Problem, Report

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["RowTable", "pair_texts", "row_texts"]

Parse = Callable[[bytes, int, Rules, Report], Rows]


class RowTable:
    """The rows read so far of a file that should hold `num_rows` of them.

    Parameters
    ----------
    rules, report : as for `parse_rows`.
    num_rows : rows to read; None reads every line as a row.
    source : who says so, such as `the header says 5 instances`.
    parse : `parse_rows`, or the strict reader that is its reference.
    """

    def __init__(
        self, rules: Rules, report: Report, *, num_rows: int | None, source: str, parse: Parse = parse_rows
    ) -> None:
        self.num_rows = 0
        self._chunks: list[Rows] = []
        self._wanted = num_rows
        self._source = source
        self._rules = rules
        self._report = report
        self._parse = parse

    def read(self, lines: LineChunks, chunks: Iterable[tuple[int, bytes]]) -> None:
        """Read `chunks`, the rest of `lines`. Another number of rows than wanted is a fault, kind `rows`."""
        for first_line, text in chunks:
            wanted, surplus = self._split(text)
            if wanted:
                rows = self._parse(wanted, first_line, self._rules, self._report)
                self._chunks.append(rows)
                self.num_rows += len(rows.num_labels)
            if surplus.strip():
                blank = surplus[: len(surplus) - len(surplus.lstrip())]
                line = first_line + wanted.count(b"\n") + blank.count(b"\n")
                self._fault(line, f"a row too many, {self._source}.", "Is this the header of another file?")
                return
        if lines.complete and self._wanted is not None and self.num_rows < self._wanted:
            text_ = f"the file ends after {self.num_rows} instances, {self._source}."
            self._fault(lines.num_lines, text_, "Is the file cut?")

    def _split(self, text: bytes) -> tuple[bytes, bytes]:
        """The lines that are still wanted, and the rest."""
        missing = text.count(b"\n") if self._wanted is None else self._wanted - self.num_rows
        if text.count(b"\n") <= missing:
            return text, b""
        if missing == 0:
            return b"", text
        end = int(np.flatnonzero(np.frombuffer(text, dtype=np.uint8) == ord("\n"))[missing - 1]) + 1
        return text[:end], text[end:]

    def _fault(self, line: int, text: str, hint: str) -> None:
        self._report(Problem(kind="rows", file=self._rules.file, line=line, text=text, hint=hint))

    def features(self) -> csr_matrix[Any]:
        """(rows, F) float32, ids ascending in each row."""
        ids = _join([rows.feature_ids for rows in self._chunks], np.int32)
        values = _join([rows.values for rows in self._chunks], np.float32)
        counts = _join([rows.num_features for rows in self._chunks], np.int64)
        return _csr(values, ids, counts, self._rules.num_features)

    def labels(self) -> csr_matrix[Any]:
        """(rows, L) float32, all ones, ids ascending in each row."""
        ids = _join([rows.label_ids for rows in self._chunks], np.int32)
        counts = _join([rows.num_labels for rows in self._chunks], np.int64)
        return _csr(np.ones(len(ids), dtype=np.float32), ids, counts, self._rules.num_labels)


def _join(parts: list[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate([np.empty(0, dtype=dtype), *parts])


def _csr(values: NDArray[Any], ids: NDArray[Any], counts: NDArray[np.int64], num_columns: int) -> csr_matrix[Any]:
    offsets = np.concatenate([[0], np.cumsum(counts)])
    matrix = csr_matrix((values, ids, offsets), shape=(len(counts), num_columns))
    matrix.has_canonical_format = True
    return matrix


def row_texts(texts: list[str], offsets: NDArray[Any], separator: str) -> list[str]:
    """Each row's texts joined; row i owns `offsets[i]:offsets[i+1]` of them."""
    ends = offsets.tolist()
    return [separator.join(texts[start:end]) for start, end in itertools.pairwise(ends)]


def pair_texts(ids: NDArray[Any], values: NDArray[np.float32]) -> list[str]:
    """`id:value` of each entry, the value with the fewest digits that give the same float32."""
    numbers = values.astype(np.float32).astype("U32").tolist()
    return [f"{i}:{text.removesuffix('.0')}" for i, text in zip(ids.tolist(), numbers, strict=True)]
