"""Layer 2. Predictions of any tool, the best labels of each instance with their scores: read, and written as text.

Before it: `table` (lines -> CSR), `arrays` (.npz). After it: `metrics` through `evaluate --predictions`, and `predict
--output`. What is read, by its content, plain or compressed as `files.SUFFIXES` but for .npz:

=====  ================================================================================================================
XMC    `label:score label:score ...`, a line an instance, in any order; a first line `num_instances num_labels` is a
       header, as pyxclib and napkinXC write it; a blank line is an instance without predictions
TSV    `instance TAB rank TAB label TAB score`, and a name where there is one, as `predict` writes it; or `instance TAB
       label TAB score`; a head line that names the columns may come first; lines in any order, instances from 0
JSONL  `{"instance": 0, "labels": [{"label": 7, "score": 3.2}, ...]}`, as `predict` writes it: instances in any order,
       each once, their labels best first; other keys, such as names, are not looked at
.npz   arrays `label_ids` and `scores`, instances x k, padded with -1, as `predict` writes them; or a CSR matrix of
       scores, instances x labels, as `scipy.sparse.save_npz` writes it: PECOS's predictions
=====  ================================================================================================================

The best score is the first rank, equal scores go by the smaller label; ranks that a file states win where scores are
equal, and must not contradict them; so do the columns of `label_ids`, which may.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xmc_midx.data.arrays import ArrayFile, open_arrays
from xmc_midx.data.files import LineChunks, atomic_write
from xmc_midx.data.parser import Rules
from xmc_midx.data.problems import excerpt, json_kind, raise_error
from xmc_midx.data.table import RowTable, pair_texts, row_texts
from xmc_midx.errors import DataError
from xmc_midx.types import TopK

__all__ = ["read_predictions", "write_predictions"]

_HEADER = re.compile(rb"[ \t]*(\d{1,18})[ \t]+(\d{1,18})[ \t]*\r?")
_ANOTHER = "Are these the predictions of another data set?"
MAX_ENTRIES = 2**31
"""Largest N x K: one row with very many predictions must not fill the memory with pads."""

_Ints = NDArray[np.int64]


def read_predictions(
    path: str | Path, num_labels: int, *, num_instances: int | None = None, k: int | None = None
) -> TopK:
    """Predictions of a file; see the module for what it may hold.

    Parameters
    ----------
    path : plain, .gz, .bz2, .xz, or .npz.
    num_labels : labels are 0..num_labels-1.
    num_instances : number of rows to expect; None takes the header's, the matrix's, the number of lines, or in TSV the
        last instance that is named.
    k : keep the best k of each row; None keeps all.

    Returns
    -------
    (N, K) with K the longest row: falling float32 scores, ties to the smaller id or the smaller rank that the file
    states, padded with -1 and -inf.

    Raises
    ------
    DataError : with `file:line` where there are lines: a label outside, one that occurs twice for an instance, a score
        that is not finite, more or fewer instances; the same strictness as `read_xmc`.
    """
    path = Path(path)
    if path.suffix == ".npz" or _is_zip(path):
        with open_arrays(path) as arrays:
            entries = _read_arrays(path, arrays, num_labels, num_instances)
        return entries.best(path, k)
    lines = LineChunks(path, raise_error)
    chunks = iter(lines)
    first = next(chunks, None)
    chunks = itertools.chain([first] if first else [], chunks)
    if first and first[1].lstrip()[:1] == b"{":
        return _read_objects(path, chunks, num_labels, num_instances).best(path, k)
    if first and _is_table(first[1]):
        return _read_table(path, chunks, num_labels, num_instances).best(path, k)
    if first:
        _refuse_other_formats(path, first[1])
    return _read_text(path, lines, chunks, num_labels, num_instances).best(path, k)


def _is_zip(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _is_table(chunk: bytes) -> bool:
    """Whether the first line that is not blank has three columns that are no pairs."""
    line = chunk.lstrip().partition(b"\n")[0]
    columns = line.split(b"\t")
    return len(columns) >= 3 and not any(b":" in column for column in columns[:3])


def _refuse_other_formats(path: Path, chunk: bytes) -> None:
    """What is no pair at all is better said here than by a reader of pairs."""
    text = chunk.lstrip()
    line = text.partition(b"\n")[0].rstrip(b"\r")
    if not line or _HEADER.fullmatch(line) or (b":" in line and line[:1] != b"["):
        return
    place = f"{path}:{1 + chunk[: len(chunk) - len(text)].count(10)}"
    hint = "`predict` writes both, JSON lines and .npz: --format xmc, tsv, jsonl or npz."
    raise DataError(
        f"{place}: {excerpt(line)} is neither `label:score label:score ...` nor tab-separated instance, label, score.",
        hint="Separate the columns by tabs." if b"," in line and line[:1] != b"[" else hint,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Entries:
    """Pairs of an instance and a label, E of them, in any order."""

    num_rows: int
    rows: _Ints
    """(E,) instances."""
    ids: _Ints
    """(E,) labels."""
    scores: NDArray[np.float32]
    ranks: _Ints | None = None
    """(E,) where the file states them."""

    def best(self, path: Path, k: int | None) -> TopK:
        """The table that `read_predictions` returns."""
        counts = np.bincount(self.rows, minlength=self.num_rows).astype(np.int64)
        ties = self.ids if self.ranks is None else self.ranks
        order = np.lexsort((ties, -self.scores, self.rows))
        rows, ids, scores = self.rows[order], self.ids[order], self.scores[order]
        ranks = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        width = int(counts.max(initial=0))
        width = width if k is None else min(width, k)
        if self.num_rows * width > MAX_ENTRIES:
            raise DataError(
                f"{path}: {self.num_rows} rows of up to {width} predictions, expected at most {MAX_ENTRIES} in all.",
                hint="Keep the best few of each row.",
            )
        result, kept = TopK.empty(self.num_rows, width), ranks < width
        result.label_ids[rows[kept], ranks[kept]] = ids[kept]
        result.scores[rows[kept], ranks[kept]] = scores[kept]
        return result


# ------------------------------------------------------------------------- XMC


def _read_text(
    path: Path,
    lines: LineChunks,
    chunks: Iterator[tuple[int, bytes]],
    num_labels: int,
    num_instances: int | None,
) -> _Entries:
    source = f"expected {num_instances} as the data has"
    first = next(chunks, None)
    if first is not None:
        head, _, rest = first[1].partition(b"\n")
        if match := _HEADER.fullmatch(head):
            found = int(match[1]), int(match[2])
            expected = found[0] if num_instances is None else num_instances, num_labels
            if found != expected:
                fact = f"the header says {found[0]} instances and {found[1]} labels"
                raise DataError(f"{path}:1: {fact}, expected {expected[0]} and {expected[1]}.", hint=_ANOTHER)
            num_instances, source = found[0], f"the header says {found[0]}"
            first = (2, rest) if rest else None
    rules = Rules(
        file=str(path),
        num_features=num_labels,
        num_labels=0,
        feature="label",
        pair="label:score",
        num_features_source=f"there are {num_labels} labels",
    )
    table = RowTable(rules, raise_error, num_rows=num_instances, source=source)
    table.read(lines, itertools.chain([first] if first else [], chunks))
    scores = table.features()
    rows = np.repeat(np.arange(scores.shape[0]), np.diff(scores.indptr))
    return _Entries(num_rows=scores.shape[0], rows=rows, ids=scores.indices.astype(np.int64), scores=scores.data)


# ------------------------------------------------------------------------- TSV


def _lines(chunks: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """Numbers and lines without their ends; blank ones after the last that holds something are left out."""
    blank: list[tuple[int, bytes]] = []
    for first, chunk in chunks:
        for number, line in enumerate(chunk[:-1].split(b"\n"), start=first):
            if line.strip():
                yield from blank
                blank.clear()
                yield number, line
            else:
                blank.append((number, line))


def _read_table(
    path: Path, chunks: Iterable[tuple[int, bytes]], num_labels: int, num_instances: int | None
) -> _Entries:
    columns: Mapping[str, int] | None = None
    num_columns = 0
    numbers, scores = array("q"), array("f")  # instance, rank, label, line of each entry; their scores
    for number, line in _lines(chunks):
        fields = line.removesuffix(b"\r").split(b"\t")
        place = f"{path}:{number}"
        if columns is None:
            columns, is_head = _table_columns(fields, place)
            num_columns = len(fields)
            if is_head:
                continue
        if len(fields) != num_columns:
            raise DataError(f"{place}: has {len(fields)} columns, expected {num_columns} as the first line has.")
        most = MAX_ENTRIES if num_instances is None else num_instances
        instance = _whole(fields, columns, "instance", most, place)
        label = _whole(fields, columns, "label", num_labels, place)
        rank = _whole(fields, columns, "rank", 2**31, place) if "rank" in columns else 0
        scores.append(_score(fields[columns["score"]], label, place))
        numbers.extend((instance, rank, label, number))
    rows, ranks, ids, lines = np.frombuffer(numbers, dtype=np.int64).reshape(-1, 4).T
    if num_instances is None:
        num_instances = int(rows.max(initial=-1)) + 1
    values = np.frombuffer(scores, dtype=np.float32)
    _refuse_twice(rows, ids, lambda one: f"{path}:{lines[one]}: label {ids[one]} of instance {rows[one]}")
    is_ranked = columns is not None and "rank" in columns
    if is_ranked:
        _check_ranks(path, rows, ranks, values, lines)
    return _Entries(num_rows=num_instances, rows=rows, ids=ids, scores=values, ranks=ranks if is_ranked else None)


# ----------------------------------------------------------------------- JSONL


def _read_objects(
    path: Path, chunks: Iterable[tuple[int, bytes]], num_labels: int, num_instances: int | None
) -> _Entries:
    most = MAX_ENTRIES if num_instances is None else num_instances
    place_of: dict[int, int] = {}  # instance -> line
    numbers, scores = array("q"), array("f")  # instance, rank, label of each entry; their scores
    for number, line in _lines(chunks):
        place = f"{path}:{number}"
        record = _object(line, place)
        instance = _count(record, "instance", most, place)
        if instance in place_of:
            raise DataError(f"{place}: instance {instance} stands in line {place_of[instance]} too, expected once.")
        place_of[instance] = number
        labels = record.get("labels")
        if not isinstance(labels, list):
            raise DataError(f'{place}: "labels" is {json_kind(labels)}, expected a list of objects.')
        for rank, entry in enumerate(labels):
            if not isinstance(entry, dict):
                raise DataError(f'{place}: "labels" holds {json_kind(entry)}, expected objects.')
            label, score = _count(entry, "label", num_labels, place), entry.get("score")
            if isinstance(score, bool) or not isinstance(score, int | float):
                raise DataError(f"{place}: the score of label {label} is {json_kind(score)}, expected a number.")
            scores.append(_score(str(score).encode(), label, place))
            numbers.extend((instance, rank, label))
    rows, ranks, ids = np.frombuffer(numbers, dtype=np.int64).reshape(-1, 3).T
    values = np.frombuffer(scores, dtype=np.float32)
    _refuse_twice(rows, ids, lambda one: f"{path}:{place_of[int(rows[one])]}: label {ids[one]}")
    _check_ranks(path, rows, ranks + 1, values, np.array([place_of[row] for row in rows.tolist()], dtype=np.int64))
    num_rows = max(place_of, default=-1) + 1 if num_instances is None else num_instances
    return _Entries(num_rows=num_rows, rows=rows, ids=ids, scores=values, ranks=ranks)


def _object(line: bytes, place: str) -> dict[str, object]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError(f"{place}: {excerpt(line)} is not JSON, expected an object a line.") from None
    if not isinstance(value, dict):
        raise DataError(f"{place}: is {json_kind(value)}, expected an object a line.")
    return value


def _count(record: Mapping[str, object], name: str, end: int, place: str) -> int:
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(f"{place}: the {name} is {json_kind(value)}, expected a whole number.")
    return _within(value, name, end, place)


# ------------------------------------------------------------------------ .npz


def _read_arrays(path: Path, arrays: ArrayFile, num_labels: int, num_instances: int | None) -> _Entries:
    if {"label_ids", "scores"} <= arrays.names:
        ids_NK = arrays.read("label_ids", kinds="iu", shape=(num_instances, None), most=MAX_ENTRIES)
        scores_NK = arrays.read("scores", kinds="fiu", shape=ids_NK.shape, most=MAX_ENTRIES)
        rows, ranks = np.nonzero(ids_NK != -1)
        ids, scores = ids_NK[rows, ranks], scores_NK[rows, ranks]
        return _checked(path, len(ids_NK), rows, ids, scores, num_labels, ranks=ranks)
    if not {"format", "shape", "data", "indices", "indptr"} <= arrays.names:
        shown = ", ".join(sorted(arrays.names)[:6]) or "no array"
        raise DataError(
            f"{path}: holds {shown}; expected label_ids and scores, or a CSR matrix of scores.",
            hint="`xmc-midx predict --format npz` and `scipy.sparse.save_npz` write these.",
        )
    form = str(arrays.read("format", kinds="SU", shape=(), most=1).astype("U9"))
    if form != "csr":
        raise DataError(f"{path}: holds a matrix of the format {form}, expected csr.", hint="Save `matrix.tocsr()`.")
    num_rows, num_columns = arrays.read("shape", kinds="iu", shape=(2,), most=2).tolist()
    wanted = num_rows if num_instances is None else num_instances, num_labels
    if (num_rows, num_columns) != wanted or num_rows > MAX_ENTRIES:
        fact = f"holds a matrix of {num_rows} x {num_columns}"
        raise DataError(f"{path}: {fact}, expected {wanted[0]} instances x {wanted[1]} labels.", hint=_ANOTHER)
    offsets = arrays.read("indptr", kinds="iu", shape=(num_rows + 1,), most=MAX_ENTRIES + 1).astype(np.int64)
    counts = np.diff(offsets)
    if offsets[0] != 0 or (counts < 0).any():
        raise DataError(f"{path}: its offsets do not rise from 0, so it is not known where the rows are.")
    size = int(offsets[-1])
    ids = arrays.read("indices", kinds="iu", shape=(size,), most=MAX_ENTRIES)
    scores = arrays.read("data", kinds="fiu", shape=(size,), most=MAX_ENTRIES)
    return _checked(path, num_rows, np.repeat(np.arange(num_rows), counts), ids, scores, num_labels)


def _checked(
    path: Path,
    num_rows: int,
    rows: _Ints,
    ids: NDArray[np.integer],
    scores: NDArray[np.number],
    num_labels: int,
    ranks: _Ints | None = None,
) -> _Entries:
    outside = np.flatnonzero((ids < 0) | (ids >= num_labels))
    if outside.size:
        one = outside[0]
        raise DataError(
            f"{path}: instance {rows[one]}: label {ids[one]} is outside 0..{num_labels - 1}.", hint=_ANOTHER
        )
    with np.errstate(over="ignore"):
        values = scores.astype(np.float32)
    odd = np.flatnonzero(~np.isfinite(values))
    if odd.size:
        one = odd[0]
        raise DataError(
            f"{path}: instance {rows[one]}: the score {scores[one]} of label {ids[one]} is not finite in float32."
        )
    labels = ids.astype(np.int64)
    _refuse_twice(rows, labels, lambda one: f"{path}: instance {rows[one]}: label {labels[one]}")
    return _Entries(num_rows=num_rows, rows=rows, ids=labels, scores=values, ranks=ranks)


def _table_columns(fields: Sequence[bytes], place: str) -> tuple[Mapping[str, int], bool]:
    """Where each column stands, from the first line, and whether that is a head line."""
    names = [field.decode("utf-8", "replace").strip().lower() for field in fields]
    if names[0].isascii() and names[0].isdigit():
        order = ("instance", "label", "score") if len(fields) == 3 else ("instance", "rank", "label", "score")
        if len(fields) > 5:
            raise DataError(f"{place}: has {len(fields)} columns, expected {_COLUMNS}.")
        return {name: position for position, name in enumerate(order)}, False
    columns = {name: position for position, name in enumerate(names)}
    if len(columns) < len(names) or not {"instance", "label", "score"} <= columns.keys():
        shown = ", ".join(ascii(name[:40]) for name in names[:8])
        raise DataError(f"{place}: has the columns {shown}, expected {_COLUMNS}.")
    return columns, True


_COLUMNS = "instance, label, score or instance, rank, label, score, name"


def _whole(fields: Sequence[bytes], columns: Mapping[str, int], name: str, end: int, place: str) -> int:
    field = fields[columns[name]]
    # bytes: isdigit is of ASCII alone; int() refuses thousands of digits.
    if not field.isdigit():
        raise DataError(f"{place}: the {name} is {excerpt(field)}, expected a whole number.")
    return _within(int(field) if len(field) < 19 else 2**63 - 1, name, end, place, excerpt(field)[1:-1])


def _within(value: int, name: str, end: int, place: str, text: str | None = None) -> int:
    if not 0 <= value < end:
        hint = _ANOTHER if name == "label" else "Instances count from 0." if name == "instance" else None
        raise DataError(f"{place}: {name} {text or str(value)[:40]} is outside 0..{end - 1}.", hint=hint)
    return value


def _score(field: bytes, label: int, place: str) -> float:
    try:
        score = float(field)
    except ValueError:
        raise DataError(f"{place}: the score of label {label} is {excerpt(field)}, expected a number.") from None
    # As float32: 1e39 is finite until it is stored.
    if not math.isfinite(score) or abs(score) > _LARGEST:
        raise DataError(f"{place}: the score {excerpt(field)} of label {label} is not finite in float32.")
    return score


_LARGEST = float(np.finfo(np.float32).max)


def _refuse_twice(rows: _Ints, ids: _Ints, place: Callable[[int], str]) -> None:
    """`place` says where the entry of a number is."""
    order = np.lexsort((ids, rows))
    same = np.flatnonzero((rows[order][1:] == rows[order][:-1]) & (ids[order][1:] == ids[order][:-1]))
    if same.size:
        raise DataError(f"{place(int(order[same + 1].min()))} occurs twice, expected once.")


def _check_ranks(path: Path, rows: _Ints, ranks: _Ints, scores: NDArray[np.float32], lines: _Ints) -> None:
    order = np.lexsort((ranks, rows))
    before, after = order[:-1], order[1:]
    together = rows[before] == rows[after]
    for fault, text in (
        (ranks[before] == ranks[after], "rank {rank} of instance {row} occurs twice, expected once"),
        (scores[before] < scores[after], "rank {rank} of instance {row} has a higher score than the rank before it"),
    ):
        wrong = after[together & fault]
        if wrong.size:
            one = int(wrong[np.argmin(lines[wrong])])
            raise DataError(f"{path}:{lines[one]}: {text.format(rank=ranks[one], row=rows[one])}.")


def write_predictions(path: str | Path, predictions: TopK, num_labels: int) -> None:
    """Write predictions with a header `num_instances num_labels`, best first; pads are left out.

    `read_predictions` reads them back to equal arrays, but for columns that are all pads.

    Raises
    ------
    DataError : a label is not in -1..num_labels-1, or the score of a label is not finite.
    ResourceError : the file cannot be written.
    """
    path = Path(path)
    ids, scores = predictions.label_ids, predictions.scores
    is_label = ids >= 0
    if ids.size and not (ids.min() >= -1 and ids.max() < num_labels and np.isfinite(scores[is_label]).all()):
        raise DataError(f"{path}: predictions hold a label outside 0..{num_labels - 1} or a score not finite.")
    offsets = np.concatenate([[0], np.cumsum(is_label.sum(axis=1))])
    lines = row_texts(pair_texts(ids[is_label], scores[is_label]), offsets, " ")
    with atomic_write(path) as file:
        file.write(f"{len(ids)} {num_labels}\n".encode())
        # A blank keeps the line of a row without predictions visible where a last newline is lost.
        file.writelines(f"{line or ' '}\n".encode() for line in lines)
