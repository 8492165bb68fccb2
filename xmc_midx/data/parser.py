"""Layer 2. Lines of XMC text -> rows, in two ways with one result: strict line by line, or a chunk at once.

Before it: `problems`. After it: `table` joins the rows of all chunks. The grammar of a line, ids from 0::

    line   = [ label { "," label } ] { blank feature ":" value } [ CR ] LF
    blank  = one or more spaces or tabs; the first one may be missing where the line has no label

In svmlight, what follows a `#` is a comment, a line of nothing else is no row, and a `qid:N` is passed over.

`parse_lines` defines what is right, and names every fault. `parse_chunk` accepts a subset of it with the same
result, 100 times as fast, and returns None for anything else: `table` tries it first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xmc_midx.data.problems import Problem, Report, excerpt

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Rows", "Rules", "parse_chunk", "parse_lines"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the rows of a file may hold, and the words for it in messages."""

    file: str
    num_features: int
    """Ids before a colon are 0..num_features-1."""
    num_labels: int
    """Ids of the label list are 0..num_labels-1; 0 means that a line has no label list."""
    feature: str = "feature id"
    """What the number before a colon is called."""
    kind: str = "feature"
    """What the kinds of its problems begin with."""
    pair: str = "id:value"
    """What the number, the colon and the value are called."""
    num_features_source: str = ""
    """Where `num_features` comes from, such as `the header says 5000 features`."""
    num_labels_source: str = ""
    svmlight: bool = False
    """Whether there may be comments and query ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Parsed lines. Row i owns the next `num_features[i]` features and the next `num_labels[i]` labels."""

    label_ids: NDArray[np.int32]
    """(nnz_y,) ascending in each row, without duplicates."""
    num_labels: NDArray[np.int64]
    """(rows,)"""
    feature_ids: NDArray[np.int32]
    """(nnz,) ascending in each row, without duplicates."""
    values: NDArray[np.float32]
    """(nnz,) finite; zeros are kept."""
    num_features: NDArray[np.int64]
    """(rows,)"""
    comment_lines: NDArray[np.int64]
    """Numbers of the lines that are no rows."""


# --- A chunk at once


def parse_chunk(text: bytes, rules: Rules) -> Rows | None:
    """The rows of whole, well-formed lines; None where a line is faulty or merely unusual."""
    # Imported here: short files do without numba.
    from xmc_midx.data.kernels import scan_rows

    if rules.svmlight:
        # Lines of a comment alone remain: they are no rows.
        text = _COMMENT.sub(b"", text) if b"#" in text else text
        text = _QUERY_ID_FIRST.sub(rb"\1", text) if b"qid:" in text else text
    # As many as the text can hold: `0,` `0:1 ` and a newline.
    num_rows, num_pairs = text.count(b"\n"), len(text) // 4 + 1
    label_ids = np.empty(len(text) // 2 + 1, dtype=np.int32)
    feature_ids, values = np.empty(num_pairs, dtype=np.int32), np.empty(num_pairs, dtype=np.float32)
    num_labels, num_features = np.empty(num_rows, dtype=np.int64), np.empty(num_rows, dtype=np.int64)
    out = (label_ids, num_labels, feature_ids, values, num_features)
    is_good, labels_ascend, features_ascend, nnz_labels, nnz = scan_rows(
        np.frombuffer(text, dtype=np.uint8), rules.num_features, rules.num_labels, *out
    )
    if not is_good:
        return None
    label_ids, feature_ids, values = label_ids[:nnz_labels], feature_ids[:nnz], values[:nnz]
    if not labels_ascend:
        order = _ascending(label_ids, num_labels)
        if order is None:
            return None
        label_ids = label_ids[order]
    if not features_ascend:
        order = _ascending(feature_ids, num_features)
        if order is None:
            return None
        feature_ids, values = feature_ids[order], values[order]
    return Rows(
        label_ids=label_ids,
        num_labels=num_labels,
        feature_ids=feature_ids,
        values=values,
        num_features=num_features,
        comment_lines=np.empty(0, dtype=np.int64),
    )


def _ascending(ids: NDArray[np.int32], counts: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """The order that sorts `ids` inside each row, None if a row holds an id twice."""
    rows = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((ids, rows))
    is_sorted = ids[order]
    # Sorting inside the rows keeps their borders, so `rows` holds for the sorted ids as well.
    is_twice = (is_sorted[1:] == is_sorted[:-1]) & (rows[1:] == rows[:-1])
    return None if is_twice.any() else order


# --- Line by line

_INTEGER = re.compile(rb"-?\d+")
_FLOAT = re.compile(rb"[+-]?+(?:\d++(?:\.\d*+)?+|\.\d++)(?:[eE][+-]?+\d++)?+")
_NOT_FINITE = re.compile(rb"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)
_TOKEN = re.compile(rb"[^ \t]+")
_QUERY_ID = re.compile(rb"qid:\d+")
_QUERY_ID_FIRST = re.compile(rb"^([^ \t\r\n#]*)[ \t]+qid:\d+(?=[ \t\r\n])", re.MULTILINE)
_COMMENT = re.compile(rb"(?<=[^\s])[ \t]*#[^\n]*")
_HUGE = 2**63
"""Stands for every integer beyond int64."""


def parse_lines(text: bytes, first_line: int, rules: Rules, report: Report) -> Rows:
    """The rows of whole lines; each fault goes to `report`, and if that returns, the faulty part is left out.

    Parameters
    ----------
    text : lines, each with its newline.
    first_line : number of the first line in the file.
    rules : the ranges of the ids.
    report : receives the faults. Kinds: `encoding`, `comment`, `token`, `label-value`, `label-range`,
        `label-past-end` (the id is the number of labels itself: ids from 1?), `label-duplicate`, the same
        four of `rules.kind`, and `value`.
    """
    labels: list[int] = []
    features: list[int] = []
    values: list[float] = []
    num_labels: list[int] = []
    num_features: list[int] = []
    comment_lines: list[int] = []
    start = 0
    while start < len(text):
        end = text.index(b"\n", start)
        number = first_line + len(num_labels) + len(comment_lines)
        content = text[start:end]
        if rules.svmlight and b"#" in content:
            content = content.partition(b"#")[0]
            if not content.strip():
                comment_lines.append(number)
                start = end + 1
                continue
        line = _Line(content, number, rules, report)
        labels += sorted(line.labels)
        features += sorted(line.features)
        values += [line.features[feature] for feature in sorted(line.features)]
        num_labels.append(len(line.labels))
        num_features.append(len(line.features))
        start = end + 1
    return Rows(
        label_ids=np.array(labels, dtype=np.int32),
        num_labels=np.array(num_labels, dtype=np.int64),
        feature_ids=np.array(features, dtype=np.int32),
        values=np.array(values, dtype=np.float32),
        num_features=np.array(num_features, dtype=np.int64),
        comment_lines=np.array(comment_lines, dtype=np.int64),
    )


class _Line:
    """One line: its labels, and its features with their values."""

    def __init__(self, line: bytes, number: int, rules: Rules, report: Report) -> None:
        self.labels: set[int] = set()
        self.features: dict[int, float] = {}
        self._number = number
        self._rules = rules
        self._report = report
        line = line.removesuffix(b"\r")
        if self._is_text(line):
            for match in _TOKEN.finditer(line):
                if rules.num_labels and match.start() == 0 and b":" not in match.group():
                    self._read_labels(match.group())
                elif rules.svmlight and _QUERY_ID.fullmatch(match.group()):
                    continue
                else:
                    self._read_pair(match.group())

    def _fault(self, kind: str, text: str, hint: str | None = None) -> None:
        self._report(Problem(kind=kind, file=self._rules.file, line=self._number, text=text, hint=hint))

    def _is_text(self, line: bytes) -> bool:
        """Whether the line is worth a look at its tokens."""
        if b"\0" in line:
            hint = "Is the file binary, UTF-16 or cut by a crash?"
            self._fault("encoding", "the line holds a NUL byte, expected text.", hint)
        elif not line.isascii():
            column = next(place for place, byte in enumerate(line) if byte > 127)
            text = f"byte 0x{line[column]:02x} in column {column + 1} is no part of ASCII, expected numbers."
            self._fault("encoding", text, "Is this a file of raw text?")
        elif b"#" in line:
            self._fault("comment", "the line holds a `#`, and the format has no comments.", "Remove it.")
        else:
            return True
        return False

    def _read_labels(self, token: bytes) -> None:
        for part in token.split(b","):
            label = self._id(part, "label", "label", self._rules.num_labels, self._rules.num_labels_source)
            if label is None:
                continue
            if label in self.labels:
                self._fault("label-duplicate", f"label {label} occurs twice, expected once.")
            self.labels.add(label)

    def _read_pair(self, token: bytes) -> None:
        rules = self._rules
        name, colon, text = token.partition(b":")
        if not colon:
            hint = "The labels begin in the first column, without blanks between them." if rules.num_labels else None
            self._fault("token", f"{excerpt(token)} is not `{rules.pair}`.", hint)
            return
        feature = self._id(name, rules.kind, rules.feature, rules.num_features, rules.num_features_source)
        value = self._value(text, f"of {rules.feature} {excerpt(name)[1:-1]}")
        if feature is None or value is None:
            return
        if feature in self.features:
            self._fault(f"{rules.kind}-duplicate", f"{rules.feature} {feature} occurs twice, expected once.")
        else:
            self.features[feature] = value

    def _id(self, text: bytes, kind: str, name: str, limit: int, source: str) -> int | None:
        if not _INTEGER.fullmatch(text):
            what = f"{excerpt(text)} is not an integer, expected a {name}" if text else f"a {name} is missing"
            hint = "Ids are whole numbers from 0: write +1 and -1 as 0 and 1." if text[:1] == b"+" else None
            self._fault(f"{kind}-value", f"{what}.", hint)
            return None
        # int() refuses thousands of digits, and takes long over hundreds.
        digits = text.lstrip(b"-0")
        value = int(digits or b"0") if len(digits) < 19 else _HUGE
        if 0 <= value < limit and not text.startswith(b"-"):
            return value
        fact = f"{name} {excerpt(text)[1:-1]} is outside 0..{limit - 1} ({source})."
        if value == limit and not self._rules.svmlight:
            self._fault(f"{kind}-past-end", fact, "Do the ids of this file start from 1?")
        else:
            hint = "Is this the header of another file?" if value > 0 and source.startswith("the header") else None
            self._fault(f"{kind}-range", fact, hint)
        return None

    def _value(self, text: bytes, owner: str) -> float | None:
        if not text:
            self._fault("value", f"the value {owner} is missing.", "Is the line cut?")
        elif _FLOAT.fullmatch(text):
            with np.errstate(over="ignore"):
                value = np.float32(float(text))
            if np.isfinite(value):
                return float(value)
            self._fault("value", f"the value {excerpt(text)} {owner} is beyond the range of float32.")
        elif _NOT_FINITE.fullmatch(text):
            self._fault("value", f"the value {excerpt(text)} {owner} is not finite.")
        else:
            self._fault("value", f"the value {excerpt(text)} {owner} is not a number.")
        return None
