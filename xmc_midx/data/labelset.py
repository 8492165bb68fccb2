"""Layer 2. Labels as they stand in raw text, ids or names -> the ids 0..L-1 and their names.

Before it: `raw` (records). After it: `prepare`. Labels that are all whole numbers (without leading zeros) are ids, else
all are names; a mixture is an error, unless it is said what they are. With a list of names, line i of it is label i,
and nothing outside it is a label. Without one, names are numbered in the order of their code points: first those that
the training split has, then those that the test split alone has.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from xmc_midx.data.files import plain_name
from xmc_midx.data.formats import read_labels
from xmc_midx.data.raw import read_names
from xmc_midx.errors import DataError

__all__ = ["LabelKind", "LabelRows", "LabelSet", "NameList", "RawLabels", "read_label_names"]

LabelKind = Literal["auto", "ids", "names"]

MAX_LABELS = 2**31 - 1
"""Largest number of labels: ids are int32."""

_ID = re.compile("0|[1-9][0-9]*")


class LabelRows:
    """The labels of a split's instances, as numbers of `RawLabels`; filled row by row."""

    def __init__(self) -> None:
        self.numbers, self.counts = array("i"), array("i")

    def matrix(self, labels: LabelSet) -> csr_matrix[Any]:
        """(N, L) float32 ones, ids in any order in a row."""
        ids = labels.ids[np.frombuffer(self.numbers, dtype=np.int32)] if self.numbers else np.empty(0, dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(np.frombuffer(self.counts, dtype=np.int32), dtype=np.int64)])
        ones = np.ones(len(ids), dtype=np.float32)
        return csr_matrix((ones, ids, offsets), shape=(len(self.counts), labels.num_labels))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelSet:
    """Which id each label has."""

    kind: Literal["ids", "names"]
    """What the labels of the text were."""
    ids: NDArray[np.int64]
    """Id of each number of `RawLabels`."""
    num_labels: int
    names: tuple[str, ...] | None
    """L names; None where the text has ids and there is no list of names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NameList:
    """Names of the labels 0..L-1, and the file that they stand in."""

    path: Path
    names: tuple[str, ...]


class RawLabels:
    """The distinct labels of all splits, numbered in the order in which they are first met."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._places: list[tuple[Path, int]] = []

    def add(self, rows: LabelRows, labels: Sequence[str], path: Path, line: int) -> None:
        """Append an instance to `rows`."""
        for label in labels:
            number = self._numbers.setdefault(label, len(self._numbers))
            if number == len(self._places):
                self._places.append((path, line))
            rows.numbers.append(number)
        rows.counts.append(len(labels))

    @property
    def num_distinct(self) -> int:
        return len(self._numbers)

    def assign(self, train: LabelRows, *, kind: LabelKind, names: NameList | None) -> LabelSet:
        """Ids of all labels; see the module.

        Parameters
        ----------
        train : the training split's rows, which come first in the order of names.
        kind : what the labels are.
        names : of all labels; None where there is no list of them.

        Raises
        ------
        DataError : with `file:line`: ids and names are mixed, an id is outside the list or the int32 range, a name is
            not in the list, or stands there twice.
        """
        found = self._kind() if kind == "auto" else kind
        if found == "ids":
            return self._assign_ids(names)
        if names is not None:
            return self._look_up(names)
        in_train = np.zeros(len(self._numbers), dtype=bool)
        if train.numbers:
            in_train[np.frombuffer(train.numbers, dtype=np.int32)] = True
        texts = list(self._numbers)
        order = sorted(range(len(texts)), key=lambda number: (not in_train[number], texts[number]))
        ids = np.empty(len(texts), dtype=np.int64)
        ids[order] = np.arange(len(texts))
        return LabelSet(kind="names", ids=ids, num_labels=len(texts), names=tuple(texts[number] for number in order))

    def _kind(self) -> Literal["ids", "names"]:
        first_id = next((label for label in self._numbers if _ID.fullmatch(label)), None)
        first_name = next((label for label in self._numbers if not _ID.fullmatch(label)), None)
        if first_id is None or first_name is None:
            return "ids" if first_name is None else "names"
        (path, line), (other_path, other_line) = self._place(first_name), self._place(first_id)
        other = f"{other_path.name}:{other_line}" if other_path != path else f"line {other_line}"
        separated = re.fullmatch(r"\d+(?:\s*([;|/:]| )\s*\d+)+", first_name)
        hint = "--label-kind names takes numbers for names as well."
        if separated:
            hint = f"Are the labels separated by {separated[1]!r}? --label-separator '{separated[1]}'."
        raise DataError(
            f"{path}:{line}: the label {first_name!r} is a name, but {other} has the id {first_id}; "
            "expected ids or names, not both.",
            hint=hint,
        )

    def _assign_ids(self, names: NameList | None) -> LabelSet:
        most = MAX_LABELS if names is None else len(names.names)
        ids = []
        for label in self._numbers:
            # int() refuses thousands of digits.
            if not _ID.fullmatch(label) or len(label) > 10 or int(label) >= most:
                path, line = self._place(label)
                outside = f"is outside 0..{most - 1}" if _ID.fullmatch(label) else "is no id, expected whole numbers"
                why = f", the lines of {names.path}" if names is not None else ""
                raise DataError(
                    f"{path}:{line}: the label {label!r} {outside}{why}.",
                    hint="Ids count from 0. Numbers that name labels: --label-kind names.",
                )
            ids.append(int(label))
        return LabelSet(
            kind="ids",
            ids=np.array(ids, dtype=np.int64),
            num_labels=max(ids) + 1 if names is None else len(names.names),
            names=None if names is None else names.names,
        )

    def _look_up(self, names: NameList) -> LabelSet:
        lines = {name: line for line, name in enumerate(names.names)}
        if len(lines) < len(names.names):
            (name, number), *_ = Counter(names.names).most_common(1)
            first, second, *_ = (line for line, other in enumerate(names.names, start=1) if other == name)
            raise DataError(
                f"{names.path}:{second}: the name {name!r} stands in line {first} already ({number} times in all); "
                "expected each once, as the labels of the text are names.",
                hint="Use ids in the text, or make the names differ.",
            )
        for label in self._numbers:
            if label not in lines:
                path, line = self._place(label)
                raise DataError(
                    f"{path}:{line}: the label {label!r} is not in {names.path}.", hint="Is it written the same there?"
                )
        ids = np.array([lines[label] for label in self._numbers], dtype=np.int64)
        return LabelSet(kind="names", ids=ids, num_labels=len(names.names), names=names.names)

    def remarks(self, labels: LabelSet, train: LabelRows) -> Iterator[str]:
        """What is worth a look: ids with gaps, ids from 1, separators that were not understood."""
        if labels.kind == "ids" and labels.names is None:
            if int(labels.ids.min()) == 1:
                yield "no instance has the label 0; ids count from 0. --label-kind names numbers them anew."
            if labels.num_labels > max(1000, 10 * self.num_distinct):
                yield (
                    f"the ids go up to {labels.num_labels - 1:,}, but {self.num_distinct:,} labels occur; "
                    "--label-kind names numbers those alone."
                )
        if labels.kind == "names" and max(train.counts, default=0) == 1:
            for mark in ";|,":
                number = sum(mark in label for label in self._numbers)
                if 2 * number > self.num_distinct:
                    yield (
                        f"every instance has one label, and {number:,} of {self.num_distinct:,} labels hold "
                        f"{mark!r}; is that the separator? --label-separator '{mark}'."
                    )

    def _place(self, label: str) -> tuple[Path, int]:
        return self._places[self._numbers[label]]


def read_label_names(path: str | Path) -> NameList:
    """A file of names: a line each (see `read_labels`), or JSON lines with `title` (.json, .jsonl).

    Raises
    ------
    DataError : the file is missing, empty, or not what its name says.
    """
    path = Path(path)
    is_json = Path(plain_name(path)).suffix.lower() in (".json", ".jsonl")
    names = tuple(read_names(path)) if is_json else read_labels(path)
    if not names:
        raise DataError(f"{path}: is empty, expected a label's name on each line.")
    return NameList(path=path, names=names)
