"""Layer 2. DATA -> `CheckReport`: every problem of its files, and figures that tell whether the data makes
sense.

Before it: `formats`, whose readers report each fault and go on. After it: `xmc-midx check`. Errors are what
makes `load_dataset` refuse the data; warnings are what a careful person would want to know before training.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from xmc_midx.data.dataset import (
    DataFiles,
    Split,
    SplitStatistics,
    find_files,
    load_vocabulary,
    require_same_sizes,
    split_statistics,
)
from xmc_midx.data.formats import read_labels, scan_xmc
from xmc_midx.data.problems import Problem, ProblemList
from xmc_midx.data.registry import DEFAULT_A, DEFAULT_B, match_spec
from xmc_midx.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from scipy.sparse import csr_matrix

__all__ = ["CheckReport", "FileReport", "PropensityRange", "check_dataset"]

Role = Literal["train", "test", "labels", "vocabulary"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileReport:
    """One file of the data."""

    path: str
    role: Role
    num_errors: int
    num_warnings: int
    statistics: SplitStatistics | None = None
    """Of a split; with errors, of what could be read. None where there is no usable header."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PropensityRange:
    """Inverse propensities of the training labels, the weights of PSP@k (Jain et al. 2016)."""

    a: float
    b: float
    smallest: float
    """Of the most frequent label."""
    largest: float
    """Of the least frequent label."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What `check_dataset` found."""

    name: str
    files: tuple[FileReport, ...]
    problems: tuple[Problem, ...]
    """The first ones of each kind in each file."""
    counts: dict[str, int]
    """Kind -> number of all its problems, with those that `problems` leaves out."""
    num_errors: int
    num_warnings: int
    num_test_in_train: int | None
    """Test instances whose features, not empty, are those of a training instance; None without both splits."""
    propensity: PropensityRange | None
    """None without a sound training split of at least 3 instances."""

    @property
    def ok(self) -> bool:
        """Whether `load_dataset` takes the data."""
        return self.num_errors == 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"ok": self.ok, **asdict(self)}


def check_dataset(data: str | Path, *, test: str | Path | None = None, limit: int = 20) -> CheckReport:
    """Find all problems of DATA in one pass over each file.

    Parameters
    ----------
    data, test : see `find_files`.
    limit : problems kept of each kind in each file; all are counted.

    Raises
    ------
    DataError : there are no files to check.
    """
    return _Check(find_files(data, test=test), limit).run()


class _Check:
    def __init__(self, files: DataFiles, limit: int) -> None:
        self.files = files
        self.found = ProblemList(limit)
        self.splits: dict[Role, Split] = {}
        self.sound: dict[Role, Split] = {}
        """The splits without errors: what is said of instances is true of these alone."""

    def run(self) -> CheckReport:
        for role, path in self._paths():
            if role in ("train", "test"):
                self._read_split(role, path)
        self._compare_sizes()
        self._check_names()
        for role, split in self.sound.items():
            self._check_instances(role, split)
        self._check_labels()
        self._check_first_id("feature")
        self._check_first_id("label")
        num_test_in_train = self._check_overlap()
        counts: Counter[str] = Counter()
        for (_, _, kind), number in self.found.counts.items():
            counts[kind] += number
        return CheckReport(
            name=self.files.name,
            files=tuple(self._file_report(role, path) for role, path in self._paths()),
            problems=tuple(self.found.problems),
            counts=dict(counts),
            num_errors=self.found.count(level="error"),
            num_warnings=self.found.count(level="warning"),
            num_test_in_train=num_test_in_train,
            propensity=self._propensity(),
        )

    def _paths(self) -> list[tuple[Role, Path]]:
        files = self.files
        paths: list[tuple[Role, Path | None]] = [
            ("train", files.train),
            ("test", files.test),
            ("labels", files.labels),
            ("vocabulary", files.vocabulary),
        ]
        return [(role, path) for role, path in paths if path is not None]

    def _file_report(self, role: Role, path: Path) -> FileReport:
        return FileReport(
            path=str(path),
            role=role,
            num_errors=self.found.count(level="error", file=str(path)),
            num_warnings=self.found.count(level="warning", file=str(path)),
            statistics=split_statistics(self.splits[role]) if role in self.splits else None,
        )

    def _warn(self, kind: str, file: str, text: str, line: int | None = None, hint: str | None = None) -> None:
        self.found(Problem(level="warning", kind=kind, file=file, line=line, text=text, hint=hint))

    def _error(self, kind: str, file: str, error: DataError) -> None:
        """Note an error that a function raised, whose message begins with the file."""
        match = re.fullmatch(rf"(?:{re.escape(file)}(?::(\d+))?: )?(.*)", error.message, re.DOTALL)
        assert match is not None
        line = int(match[1]) if match[1] else None
        self.found(Problem(kind=kind, file=file, line=line, text=match[2], hint=error.hint))

    def _read_split(self, role: Role, path: Path) -> None:
        scan = scan_xmc(path, self.found)
        if scan is None:
            return
        split = Split(features=scan.features, labels=scan.labels, path=str(path))
        self.splits[role] = split
        if not scan.final_newline:
            text = "the last line has no newline."
            self._warn("final-newline", split.path, text, split.num_instances + 1, "Is the file cut?")
        if role == "train" and scan.header.num_instances == 0:
            self._error("rows", split.path, DataError("the header says 0 instances, expected some to train on."))
        if not self.found.count(level="error", file=split.path):
            self.sound[role] = split

    def _compare_sizes(self) -> None:
        if len(self.splits) == 2:
            try:
                require_same_sizes(self.splits["train"], self.splits["test"])
            except DataError as error:
                self._error("sizes", self.splits["test"].path, error)

    def _check_names(self) -> None:
        """Label names and vocabulary against the first split that has a header."""
        first = next(iter(self.splits.values()), None)
        num_features, num_labels = (first.features.shape[1], first.labels.shape[1]) if first else (None, None)
        if self.files.labels:
            read_labels(self.files.labels, num_labels, report=self.found)
        if self.files.vocabulary and num_features is not None:
            try:
                load_vocabulary(self.files.vocabulary, num_features)
            except DataError as error:
                self._error("vocabulary", str(self.files.vocabulary), error)

    def _check_instances(self, role: Role, split: Split) -> None:
        for kind, what, matrix in (
            ("no-labels", "labels", split.labels),
            ("no-features", "features", split.features),
        ):
            empty = np.flatnonzero(np.diff(matrix.indptr) == 0)
            if len(empty):
                text = f"{len(empty)} of {split.num_instances} instances have no {what}; this is the first."
                self._warn(kind, split.path, text, _line(empty[0]))
        # Instances without features are all alike and counted above.
        rows = np.flatnonzero(np.diff(split.features.indptr))
        features, labels = _row_hashes(split.features)[rows], _row_hashes(split.labels)[rows]
        again = _repeats(features)
        if again.any():
            num_same = int(_repeats(features * np.uint64(3) + labels).sum())
            text = f"{again.sum()} instances have the features of an earlier one, {num_same} its labels as well; "
            text += "this is the first."
            self._warn("duplicates", split.path, text, _line(rows[np.flatnonzero(again)[0]]))

    def _check_labels(self) -> None:
        if train := self.sound.get("train"):
            statistics = split_statistics(train)
            missing = statistics.num_labels - statistics.num_labels_with_positives
            if missing:
                text = f"{missing} of {statistics.num_labels} labels have no training instance: nothing finds them."
                self._warn("unseen-labels", train.path, text)

    def _check_first_id(self, what: Literal["feature", "label"]) -> None:
        """Guess whether the ids start from 1."""
        if not self.splits:
            return
        matrices = [split.features if what == "feature" else split.labels for split in self.splits.values()]
        used = np.unique(np.concatenate([np.unique(matrix.indices) for matrix in matrices]))
        if not len(used) or used[0] == 0:
            return
        size = max(matrix.shape[1] for matrix in matrices)
        file = next(iter(self.splits.values())).path
        hint = "Subtract 1 from each id, or correct the header."
        if self.found.count(kind=f"{what}-past-end"):
            text = f"the {what} ids seem to start from 1: id 0 never occurs, and id {size} does."
            self._warn("first-id", file, text, hint=hint)
        elif size >= _MANY_IDS and len(used) >= _NEARLY_ALL * (size - 1):
            text = f"the {what} ids may start from 1: id 0 never occurs, and nearly all others do."
            self._warn("first-id", file, text, hint=hint)

    def _check_overlap(self) -> int | None:
        if len(self.sound) < 2:
            return None
        train, test = self.sound["train"], self.sound["test"]
        rows = np.flatnonzero(np.diff(test.features.indptr))
        shared = rows[np.isin(_row_hashes(test.features)[rows], _row_hashes(train.features))]
        if len(shared):
            text = f"{len(shared)} of {test.num_instances} instances have the features of a training instance; "
            self._warn("overlap", test.path, text + "this is the first.", _line(shared[0]))
        return len(shared)

    def _propensity(self) -> PropensityRange | None:
        train = self.sound.get("train")
        if train is None or train.num_instances < 3:
            return None
        num_features, num_labels = train.features.shape[1], train.labels.shape[1]
        spec = self.files.spec or match_spec(num_features, num_labels, train.num_instances)
        a, b = (spec.propensity_a, spec.propensity_b) if spec else (DEFAULT_A, DEFAULT_B)
        _, frequencies = np.unique(train.labels.indices, return_counts=True)
        rarest = int(frequencies.min(initial=train.num_instances)) if len(frequencies) == num_labels else 0
        scale = (math.log(train.num_instances) - 1) * (b + 1) ** a
        smallest, largest = (1 + scale * (n + b) ** -a for n in (int(frequencies.max(initial=0)), rarest))
        return PropensityRange(a=a, b=b, smallest=smallest, largest=largest)


_MANY_IDS = 100
_NEARLY_ALL = 0.99
"""An unused id 0 is odd only where hardly any id is unused: by chance it happens in 1 of 100 such files."""


def _line(row: int) -> int:
    """The line of a row: the header is line 1, and every row keeps its place."""
    return int(row) + 2


def _row_hashes(matrix: csr_matrix[Any]) -> NDArray[np.uint64]:
    """(N,) 64-bit hashes: equal rows have equal ones, and rows without entries 0.

    The sum over the row of `mix(id, bits of the value)`, splitmix64's finaliser (Steele et al. 2014). Two
    different rows of 10^6 agree by chance with probability 3e-8.
    """
    bits = matrix.data.astype("<f4").view("<u4").astype(np.uint64)
    mixed = (matrix.indices.astype(np.uint64) << np.uint64(32)) | bits
    mixed += np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(mixed, dtype=np.uint64)])
    hashes: NDArray[np.uint64] = sums[matrix.indptr[1:]] - sums[matrix.indptr[:-1]]
    return hashes


def _repeats(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """(N,) whether an earlier element is equal."""
    again = np.ones(len(hashes), dtype=bool)
    again[np.unique(hashes, return_index=True)[1]] = False
    return again
