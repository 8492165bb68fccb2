"""Layer 2. DATA -> `XmcDataset`: splits, names, sizes, statistics.

Before it: `formats` (files -> matrices) and `registry` (names -> places). After it: `batches`, `metrics`,
`check` and everything that trains or evaluates.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy.sparse import csr_matrix

from xmc_midx.data.cache import read_cached
from xmc_midx.data.files import SUFFIXES, find_variant
from xmc_midx.data.formats import read_labels, read_xmc
from xmc_midx.data.manifest import verify_directory
from xmc_midx.data.registry import DatasetSpec, find_spec, match_spec
from xmc_midx.errors import DataError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from xmc_midx.data.vocabulary import Vocabulary

__all__ = [
    "DataFiles",
    "Split",
    "SplitStatistics",
    "XmcDataset",
    "find_files",
    "load_dataset",
    "load_split",
    "split_statistics",
]

TAIL_MAX = 5
"""A tail label has at most this many instances, or none."""
TORSO_MAX = 100
"""A torso label has more than a tail label and at most this many instances; a head label has more."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Split:
    """Instances of one file, in its order."""

    features: csr_matrix[Any]
    """(N, F) float32, finite, ids ascending in each row. An absent feature is 0; a row may be empty."""
    labels: csr_matrix[Any]
    """(N, L) float32 ones: the positives. A row may be empty."""
    path: str
    """The file, for messages."""

    @property
    def num_instances(self) -> int:
        return int(self.features.shape[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitStatistics:
    """Figures of one split."""

    num_instances: int
    num_features: int
    num_labels: int
    num_labels_with_positives: int
    """Labels with at least one instance in this split."""
    num_feature_values: int
    """Stored entries of the feature matrix."""
    num_positives: int
    """Pairs of an instance and a label."""
    features_per_instance: float
    """Mean over all instances; like every mean here 0 where there is nothing to count."""
    labels_per_instance: float
    instances_per_label: float
    """Mean over all L labels, those without instances included."""
    num_head_labels: int
    """Labels with more than 100 instances."""
    num_torso_labels: int
    """Labels with 6 to 100 instances."""
    num_tail_labels: int
    """Labels with at most 5 instances, those without any included."""
    tail_share: float
    """`num_tail_labels` / L."""
    max_label_frequency: int
    num_without_labels: int
    """Instances without labels."""
    num_without_features: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class XmcDataset:
    """Features and labels with what is known of them. At least one of the splits is there."""

    name: str
    train: Split | None
    test: Split | None
    num_features: int
    """F of both splits."""
    num_labels: int
    """L of both splits."""
    label_names: tuple[str, ...] | None = None
    """L names; None if there is no file of them."""
    vocabulary: Vocabulary | None = None
    """What turns raw text into features; None if the features came without."""
    spec: DatasetSpec | None = None
    """The registry's entry, by name or by sizes; None for a set it does not know."""

    def split(self, name: Literal["train", "test"] | None = None) -> Split:
        """The split of that name; None means the training split, or the test split where there is no other.

        Raises
        ------
        DataError : this data set has no such split.
        """
        found = self.train or self.test if name is None else self.train if name == "train" else self.test
        if found is None:
            raise DataError(f"{self.name}: has no {name} split.", hint=f"Is there a {name}.txt?")
        return found

    def label_frequencies(self) -> NDArray[np.int64]:
        """(L,) instances of each label in the training split.

        Raises
        ------
        DataError : there is no training split.
        """
        return np.bincount(self.split("train").labels.indices, minlength=self.num_labels).astype(np.int64)

    def statistics(self, split: Literal["train", "test"] | None = None) -> SplitStatistics:
        """Figures of a split, see `split`."""
        return split_statistics(self.split(split))

    def fingerprint(self) -> str:
        """sha256 over the shapes and the CSR arrays of both splits: equal content, equal fingerprint."""
        digest = hashlib.sha256()
        for name, split in (("train", self.train), ("test", self.test)):
            for part, matrix in (("features", split.features), ("labels", split.labels)) if split else ():
                digest.update(f"{name} {part} {matrix.shape} {matrix.nnz};".encode())
                # One type on every machine, whatever index type scipy chose.
                digest.update(np.ascontiguousarray(matrix.indptr, dtype="<i8").data)
                digest.update(np.ascontiguousarray(matrix.indices, dtype="<i4").data)
                digest.update(np.ascontiguousarray(matrix.data, dtype="<f4").data)
        return digest.hexdigest()


def split_statistics(split: Split) -> SplitStatistics:
    """Count. Memory does not grow with F or L: a damaged header must not cost any."""
    num_instances, num_labels = split.labels.shape
    _, frequencies = np.unique(split.labels.indices, return_counts=True)
    num_head = int((frequencies > TORSO_MAX).sum())
    num_torso = int((frequencies > TAIL_MAX).sum()) - num_head
    num_tail = num_labels - num_head - num_torso
    return SplitStatistics(
        num_instances=num_instances,
        num_features=split.features.shape[1],
        num_labels=num_labels,
        num_labels_with_positives=len(frequencies),
        num_feature_values=split.features.nnz,
        num_positives=split.labels.nnz,
        features_per_instance=split.features.nnz / max(num_instances, 1),
        labels_per_instance=split.labels.nnz / max(num_instances, 1),
        instances_per_label=split.labels.nnz / max(num_labels, 1),
        num_head_labels=num_head,
        num_torso_labels=num_torso,
        num_tail_labels=num_tail,
        tail_share=num_tail / max(num_labels, 1),
        max_label_frequency=int(frequencies.max(initial=0)),
        num_without_labels=int((np.diff(split.labels.indptr) == 0).sum()),
        num_without_features=int((np.diff(split.features.indptr) == 0).sum()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFiles:
    """The files of DATA; nothing of them is read yet."""

    name: str
    train: Path | None
    test: Path | None
    labels: Path | None = None
    vocabulary: Path | None = None
    spec: DatasetSpec | None = None


def find_files(data: str | Path, *, test: str | Path | None = None) -> DataFiles:
    """The files that DATA means.

    Parameters
    ----------
    data : a path that exists, else a name in the registry (upper or lower case). A directory holds
    `train.txt`
        or `test.txt` or both, plain, .gz, .bz2 or .xz, and perhaps `labels.txt` and `vocabulary.txt`
        likewise. A file is the training split.
    test : a file that takes the place of the directory's test split.

    Raises
    ------
    DataError : nothing is found there, with what was looked for; or there are two variants of one file.
    """
    path = Path(data)
    test_path = None if test is None else Path(test)
    if test_path is not None and not test_path.exists():
        raise DataError(f"{test_path}: no such file.", hint="It is the file of the test split.")
    spec = None if path.exists() else _spec_on_disk(str(data))
    if spec is not None:
        path = spec.directory
    if not path.is_dir():
        name = path.name.removesuffix(path.suffix if path.suffix in SUFFIXES else "").removesuffix(".txt")
        return DataFiles(name=name, train=path, test=test_path)
    train = find_variant(path, "train.txt")
    test_path = test_path or find_variant(path, "test.txt")
    if train is None and test_path is None:
        found = sorted(entry.name for entry in path.iterdir())
        shown = ", ".join(found[:6]) + (", ..." if len(found) > 6 else "") if found else "nothing"
        raise DataError(
            f"{path}: holds {shown}, expected train.txt or test.txt (or .gz, .bz2, .xz).",
            hint="Name the sparse feature file itself, or rename it.",
        )
    return DataFiles(
        name=spec.name if spec else path.resolve().name,
        train=train,
        test=test_path,
        labels=find_variant(path, "labels.txt"),
        vocabulary=find_variant(path, "vocabulary.txt"),
        spec=spec,
    )


def _spec_on_disk(name: str) -> DatasetSpec:
    """The registry's entry of a DATA that is no path."""
    try:
        spec = find_spec(name)
    except UsageError as error:
        text = f"{name}: no such file, directory or data set of the registry."
        raise DataError(text, hint=error.hint) from None
    if not spec.directory.is_dir():
        again = "Install xmc-midx again." if spec.embedded else f"`xmc-midx download {spec.name}` fetches it."
        raise DataError(f"{spec.name}: is not on disk, expected in {spec.directory}.", hint=again)
    try:
        verify_directory(spec.directory)
    except DataError as error:
        again = f"Remove {spec.directory}, then `xmc-midx download {spec.name}` fetches it again."
        raise DataError(error.message, hint=again) from None
    return spec


def load_split(path: str | Path) -> Split:
    """One sparse feature file; see `read_xmc` for the format and the errors, `read_cached` for the cache it fills."""
    features, labels = read_cached(lambda: read_xmc(path), reader="xmc", sources=[path])
    return Split(features=features, labels=labels, path=str(path))


def load_dataset(data: str | Path, *, test: str | Path | None = None) -> XmcDataset:
    """Read DATA: a path, or a name of the registry; see `find_files` for both parameters.

    Raises
    ------
    DataError : DATA is not found; a file is not what it should be (with file and line); the splits differ
    in their
        features or labels; or names or vocabulary do not fit them.
    """
    files = find_files(data, test=test)
    train = load_split(files.train) if files.train else None
    test_split = load_split(files.test) if files.test else None
    first = train or test_split
    assert first is not None  # find_files found one
    if train and not train.num_instances:
        raise DataError(f"{train.path}:1: the header says 0 instances, expected some to train on.")
    if train and test_split:
        require_same_sizes(train, test_split)
    num_features, num_labels = first.features.shape[1], first.labels.shape[1]
    num_train = train.num_instances if train else None
    return XmcDataset(
        name=files.name,
        train=train,
        test=test_split,
        num_features=num_features,
        num_labels=num_labels,
        label_names=read_labels(files.labels, num_labels) if files.labels else None,
        vocabulary=load_vocabulary(files.vocabulary, num_features) if files.vocabulary else None,
        spec=files.spec or match_spec(num_features, num_labels, num_train),
    )


def require_same_sizes(train: Split, test: Split) -> None:
    """Raise a `DataError` unless both splits have the same features and labels."""
    for what, train_size, test_size in (
        ("features", train.features.shape[1], test.features.shape[1]),
        ("labels", train.labels.shape[1], test.labels.shape[1]),
    ):
        if train_size != test_size:
            expected = f"expected {train_size} as in {train.path}"
            raise DataError(
                f"{test.path}:1: the header says {test_size} {what}, {expected}.",
                hint="Are these splits of the same data set?",
            )


def load_vocabulary(path: Path, num_features: int) -> Vocabulary:
    """The vocabulary of a directory, checked against its number of features."""
    # Only prepared directories have one, and it brings scikit-learn along.
    from xmc_midx.data.vocabulary import Vocabulary

    vocabulary = Vocabulary.load(path)
    if vocabulary.num_features != num_features:
        raise DataError(
            f"{path}: holds {vocabulary.num_features} features, expected {num_features} as the splits have.",
            hint="Is this the vocabulary of another data set?",
        )
    return vocabulary
