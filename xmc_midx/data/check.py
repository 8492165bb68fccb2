"""Layer 2. DATA -> `CheckReport`: every problem of its files, and figures that tell whether the data makes
sense.

Before it: `sources`, whose readers report each fault and go on. After it: `xmc-midx check`. Errors are what
makes `load_dataset` or a training refuse the data; warnings are what a careful person would want to know before one.
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
    fit_sizes,
    load_vocabulary,
    split_statistics,
    training_faults,
)
from xmc_midx.data.features import are_counts, row_hashes
from xmc_midx.data.files import LineChunks
from xmc_midx.data.formats import read_labels
from xmc_midx.data.ignored import read_ignored
from xmc_midx.data.problems import Problem, ProblemList
from xmc_midx.data.registry import match_spec
from xmc_midx.data.scans import SplitScan
from xmc_midx.data.sources import Source, scan_source
from xmc_midx.errors import DataError
from xmc_midx.types import DEFAULT_PROPENSITY

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["CheckReport", "FileReport", "PropensityRange", "check_dataset"]

SplitRole = Literal["train", "test"]
Role = Literal["train", "test", "labels", "features", "vocabulary", "ignored"]
"""`features`: their names; `ignored`: a filter file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileReport:
    """One file of the data."""

    path: str
    role: Role
    num_errors: int
    num_warnings: int
    statistics: SplitStatistics | None = None
    """Of a split, with its first file; with errors, of what could be read. None where nothing could."""


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
        """Whether `load_dataset` takes the data, and a training what it has of a training split."""
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
        self.splits: dict[SplitRole, Split] = {}
        self.scans: dict[SplitRole, SplitScan] = {}
        self.sound: dict[SplitRole, Split] = {}
        """The splits without errors: what is said of instances is true of these alone."""

    def run(self) -> CheckReport:
        for role, source in self._sources().items():
            self._read_split(role, source)
        if self.files.train is None and self.files.test is not None:
            path = str(self.files.test.features)
            self._warn("no-training", "there is no training split beside it: it serves for an evaluation.", file=path)
        self._fit_sizes()
        self._check_sizes()
        self._check_training()
        self._check_unread()
        self._check_names()
        self._check_ignored()
        for role, split in self.sound.items():
            self._check_instances(split, self.scans[role])
        self._check_labels()
        self._check_features()
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

    def _sources(self) -> dict[SplitRole, Source]:
        sources: dict[SplitRole, Source | None] = {"train": self.files.train, "test": self.files.test}
        return {role: source for role, source in sources.items() if source}

    def _paths(self) -> list[tuple[Role, Path]]:
        files = self.files
        paths: list[tuple[Role, Path | None]] = [
            *((role, path) for role, source in self._sources().items() for path in source.paths),
            ("labels", files.labels),
            *(("labels", path) for path in files.label_maps if not files.labels),
            ("features", files.feature_map),
            ("vocabulary", files.vocabulary),
            ("ignored", files.ignored_train),
            ("ignored", files.ignored_test),
        ]
        return [(role, path) for role, path in paths if path is not None]

    def _file_report(self, role: Role, path: Path) -> FileReport:
        split = self.splits.get(role) if role == "train" or role == "test" else None
        return FileReport(
            path=str(path),
            role=role,
            num_errors=self.found.count(level="error", file=str(path)),
            num_warnings=self.found.count(level="warning", file=str(path)),
            statistics=split_statistics(split) if split and split.source.features == path else None,
        )

    def _warn(self, kind: str, text: str, hint: str | None = None, **place: Any) -> None:
        """`place` is the `file` and perhaps the `line` or the `row`."""
        self.found(Problem(level="warning", kind=kind, text=text, hint=hint, **place))

    def _error(self, kind: str, file: str, error: DataError) -> None:
        """Note an error that a function raised, whose message begins with the file."""
        match = re.fullmatch(rf"(?:{re.escape(file)}(?::(\d+))?: )?(.*)", error.message, re.DOTALL)
        assert match is not None
        line = int(match[1]) if match[1] else None
        self.found(Problem(kind=kind, file=file, line=line, text=match[2], hint=error.hint))

    def _read_split(self, role: SplitRole, source: Source) -> None:
        scan = scan_source(source, self.found)
        if scan is None:
            return
        split = Split(features=scan.features, labels=scan.labels, source=source)
        self.splits[role], self.scans[role] = split, scan
        is_sound = not any(self.found.count(level="error", file=str(path)) for path in source.paths)
        if is_sound and role == "train" and not split.num_instances:
            self._error("rows", split.path, DataError("holds 0 instances, expected some to train on."))
        elif is_sound and not split.num_instances:
            self._warn("rows", "holds 0 instances: there is nothing to evaluate on.", file=split.path)
            self.sound[role] = split
        elif is_sound:
            self.sound[role] = split

    def _fit_sizes(self) -> None:
        train, test = fit_sizes(self.splits.get("train"), self.splits.get("test"), report=self.found)
        fitted: dict[SplitRole, Split | None] = {"train": train, "test": test}
        for role, split in fitted.items():
            for splits in (self.splits, self.sound):
                if split and role in splits:
                    splits[role] = split

    def _check_sizes(self) -> None:
        """Sizes that no file states are worth a look: an id that never occurs is missing from them."""
        if self.splits and not any(split.source.states_sizes for split in self.splits.values()):
            split = next(iter(self.splits.values()))
            sizes = f"{split.features.shape[1]} features and {split.labels.shape[1]} labels"
            self._warn("sizes", f"nothing states the sizes: {sizes} are what the largest ids make.", file=split.path)

    def _check_training(self) -> None:
        if train := self.sound.get("train"):
            for kind, error in training_faults(train):
                self._error(kind, train.path, error)

    def _check_unread(self) -> None:
        for other, source in self.files.unread:
            names = " and ".join(path.name for path in source.paths)
            self._warn("unread", f"is not read: the split is in {names}.", file=str(other.features))

    def _check_names(self) -> None:
        """Names of labels and features, and the vocabulary, against the first split that could be read."""
        first = next(iter(self.splits.values()), None)
        num_features, num_labels = (first.features.shape[1], first.labels.shape[1]) if first else (None, None)
        if self.files.labels:
            read_labels(self.files.labels, num_labels, report=self.found)
        elif num_labels is not None:
            self._check_label_maps(num_labels)
        if self.files.feature_map and num_features is not None:
            num_names = sum(text.count(b"\n") for _, text in LineChunks(self.files.feature_map, self.found))
            if num_names != num_features:
                text = f"holds {num_names} lines, the splits have {num_features} features."
                hint = "Nothing needs it."
                self._warn("map", text, hint, file=str(self.files.feature_map))
        if self.files.vocabulary and num_features is not None:
            try:
                load_vocabulary(self.files.vocabulary, num_features)
            except DataError as error:
                self._error("vocabulary", str(self.files.vocabulary), error)

    def _check_label_maps(self, num_labels: int) -> None:
        """The first that fits is used; a warning for each of those before it."""
        for path in self.files.label_maps:
            faults = ProblemList(1)
            read_labels(path, num_labels, report=faults)
            if not faults.problems:
                break
            fault = faults.problems[0]
            self._warn("map", f"{fault.text} It is not used.", fault.hint, file=fault.file, line=fault.line)

    def _check_ignored(self) -> None:
        ignored_files: dict[SplitRole, Path | None] = {
            "train": self.files.ignored_train,
            "test": self.files.ignored_test,
        }
        for role, path in ignored_files.items():
            split = self.sound.get(role)
            if not path or not split:
                continue
            ignored = read_ignored(path, *split.labels.shape, report=self.found)
            shared = int(ignored.multiply(split.labels).nnz)
            if shared and not self.found.count(level="error", file=str(path)):
                text = f"{shared} of its {ignored.nnz} pairs are positives: an evaluation counts them as neither "
                self._warn("ignored", text + "true nor predicted.", file=str(path))

    def _check_instances(self, split: Split, scan: SplitScan) -> None:
        for kind, what, matrix, places in (
            ("no-labels", "labels", split.labels, scan.labels_at),
            ("no-features", "features", split.features, scan.features_at),
        ):
            empty = np.flatnonzero(np.diff(matrix.indptr) == 0)
            if len(empty):
                text = f"{len(empty)} of {split.num_instances} instances have no {what}; this is the first."
                self._warn(kind, text, **places.of(empty[0]))
        # Instances without features are all alike and counted above.
        rows = np.flatnonzero(np.diff(split.features.indptr))
        features, labels = row_hashes(split.features)[rows], row_hashes(split.labels)[rows]
        again = _repeats(features)
        if again.any():
            num_same = int(_repeats(features * np.uint64(3) + labels).sum())
            text = f"{again.sum()} instances have the features of an earlier one, {num_same} its labels as well; "
            text += "this is the first."
            self._warn("duplicates", text, **scan.features_at.of(rows[np.flatnonzero(again)[0]]))

    def _check_labels(self) -> None:
        if train := self.sound.get("train"):
            statistics = split_statistics(train)
            missing = statistics.num_labels - statistics.num_labels_with_positives
            if missing:
                text = f"{missing} of {statistics.num_labels} labels have no training instance: nothing finds them."
                self._warn("unseen-labels", text, file=str(train.source.labels))

    def _check_features(self) -> None:
        """Whether one leaves nothing of the rest."""
        train = self.sound.get("train")
        if train is None or not train.features.nnz:
            return
        if are_counts(train.features):
            return  # they are weighted, by how rare they are too
        shares = np.zeros(int(train.features.indices.max()) + 1)
        for begin in range(0, train.num_instances, _ROWS):
            part = train.features[begin : begin + _ROWS]
            squares = part.data.astype(np.float64) ** 2
            rows = np.repeat(np.arange(part.shape[0]), np.diff(part.indptr))
            lengths = np.bincount(rows, squares, minlength=part.shape[0])
            squares /= np.where(lengths > 0.0, lengths, 1.0)[rows]
            np.add.at(shares, part.indices, squares)
        shares /= train.num_instances
        if np.count_nonzero(shares) > 1 and shares.max() > _DOMINANT:
            largest = int(np.argmax(shares))
            text = f"feature {largest} makes up {shares[largest]:.0%} of the rows' squared length, on the mean: "
            text += "scaled to length 1, they leave little to the others."
            hint = "Scale it, leave it out, or --set data.normalize=none."
            self._warn("dominant-feature", text, hint, file=str(train.source.features))

    def _check_first_id(self, what: Literal["feature", "label"]) -> None:
        """Guess whether the ids start from 1."""
        if not self.splits:
            return
        matrices = [split.features if what == "feature" else split.labels for split in self.splits.values()]
        used = np.unique(np.concatenate([np.unique(matrix.indices) for matrix in matrices]))
        if not len(used) or used[0] == 0:
            return
        size = max(matrix.shape[1] for matrix in matrices)
        source = next(iter(self.splits.values())).source
        file = str(source.features if what == "feature" else source.labels)
        hint = "Subtract 1 from each id, or correct the header."
        if not source.states_sizes:
            hint = f"Ids are taken as they are: {what} 0 stays unused."
        if self.found.count(kind=f"{what}-past-end"):
            text = f"the {what} ids seem to start from 1: id 0 never occurs, and id {size} does."
            self._warn("first-id", text, hint, file=file)
        elif size >= _MANY_IDS and len(used) >= _NEARLY_ALL * (size - 1):
            text = f"the {what} ids may start from 1: id 0 never occurs, and nearly all others do."
            self._warn("first-id", text, hint, file=file)

    def _check_overlap(self) -> int | None:
        if len(self.sound) < 2:
            return None
        train, test = self.sound["train"], self.sound["test"]
        rows = np.flatnonzero(np.diff(test.features.indptr))
        shared = rows[np.isin(row_hashes(test.features)[rows], row_hashes(train.features))]
        if len(shared):
            text = f"{len(shared)} of {test.num_instances} instances have the features of a training instance; "
            self._warn("overlap", text + "this is the first.", **self.scans["test"].features_at.of(shared[0]))
        return len(shared)

    def _propensity(self) -> PropensityRange | None:
        train = self.sound.get("train")
        if train is None or train.num_instances < 3:
            return None
        num_features, num_labels = train.features.shape[1], train.labels.shape[1]
        own_features = None if self.files.vocabulary else num_features
        spec = self.files.spec or match_spec(own_features, num_labels, train.num_instances)
        a, b = (spec.propensity_a, spec.propensity_b) if spec else DEFAULT_PROPENSITY
        _, frequencies = np.unique(train.labels.indices, return_counts=True)
        rarest = int(frequencies.min(initial=train.num_instances)) if len(frequencies) == num_labels else 0
        scale = (math.log(train.num_instances) - 1) * (b + 1) ** a
        smallest, largest = (1 + scale * (n + b) ** -a for n in (int(frequencies.max(initial=0)), rarest))
        return PropensityRange(a=a, b=b, smallest=smallest, largest=largest)


_ROWS = 1 << 14
"""Looked at at once."""
_DOMINANT = 0.5
_MANY_IDS = 100
_NEARLY_ALL = 0.99
"""An unused id 0 is odd only where hardly any id is unused: by chance it happens in 1 of 100 such files."""


def _repeats(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """(N,) whether an earlier element is equal."""
    again = np.ones(len(hashes), dtype=bool)
    again[np.unique(hashes, return_index=True)[1]] = False
    return again
