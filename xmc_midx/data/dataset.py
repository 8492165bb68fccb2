"""Layer 2. DATA -> `XmcDataset`: splits, names, sizes, statistics.

Before it: `sources` (files -> matrices), `matrices` and `registry` (names -> places). After it: `batches`, `metrics`,
`check` and everything that trains or evaluates.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeGuard

import numpy as np
from scipy.sparse import csr_matrix

from xmc_midx.data.cache import read_cached
from xmc_midx.data.files import find_variant
from xmc_midx.data.formats import read_labels
from xmc_midx.data.ignored import ignored_name, read_ignored
from xmc_midx.data.manifest import verify_directory
from xmc_midx.data.matrices import scan_matrices
from xmc_midx.data.problems import Report, raise_error
from xmc_midx.data.registry import DatasetSpec, find_spec, match_spec
from xmc_midx.data.scans import MAX_SIZE, canonical
from xmc_midx.data.sources import Part, Source, find_sources, read_half, read_source, source_of, split_of, stem_of
from xmc_midx.errors import DataError, UsageError
from xmc_midx.paths import home_path

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from xmc_midx.data.vocabulary import Vocabulary

__all__ = [
    "Data",
    "DataFiles",
    "Split",
    "SplitStatistics",
    "XmcDataset",
    "find_files",
    "fit_sizes",
    "is_in_memory",
    "load_dataset",
    "load_features",
    "load_split",
    "split_statistics",
    "training_faults",
]

_MANY_IDS, _RAREST = 10_000_000, 100
"""More labels or features than this, of which fewer than one in a hundred could occur, are ids with gaps."""
TAIL_MAX = 5
"""A tail label has at most this many instances, or none."""
TORSO_MAX = 100
"""A torso label has more than a tail label and at most this many instances; a head label has more."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Split:
    """Instances of one file, or of two matrices, in their order."""

    features: csr_matrix[Any]
    """(N, F) float32, finite, ids ascending in each row. An absent feature is 0; a row may be empty."""
    labels: csr_matrix[Any]
    """(N, L) float32 ones: the positives. A row may be empty."""
    source: Source
    """The files; of matrices in memory, what messages call them."""
    ignored: csr_matrix[Any] | None = None
    """(N, L), not 0 where an evaluation passes over a label of an instance; None if there is no filter file."""

    @property
    def num_instances(self) -> int:
        return int(self.features.shape[0])

    @property
    def path(self) -> str:
        """The file of the features, for messages."""
        return str(self.source.features)


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

    @classmethod
    def from_matrices(
        cls,
        train: tuple[Any, Any] | None,
        test: tuple[Any, Any] | None = None,
        *,
        label_names: Sequence[str] | None = None,
        name: str = "data in memory",
    ) -> XmcDataset:
        """What is in memory already. The matrices are not changed, and not copied where they are CSR of float32 with
        ascending ids.

        Parameters
        ----------
        train, test : a pair of features (N, F) and labels (N, L) each, SciPy matrices or arrays of any format or NumPy
            arrays of two dimensions. A label applies where its entry is not 0. One of the pairs may be None.
        label_names : L names.
        name : of the dataset, for messages.

        Raises
        ------
        UsageError : a pair is none, or holds something else than matrices of numbers.
        DataError : values, sizes or names do not fit.
        """
        if train is None and test is None:
            raise UsageError("There are no matrices: expected those of a training split or of a test split.")
        splits = (
            None if train is None else _split_in_memory(train, ""),
            None if test is None else _split_in_memory(test, "test "),
        )
        fit_sizes(*splits)
        first = splits[0] or splits[1]
        assert first is not None
        num_features, num_labels = first.features.shape[1], first.labels.shape[1]
        return cls(
            name=name,
            train=splits[0],
            test=splits[1],
            num_features=num_features,
            num_labels=num_labels,
            label_names=None if label_names is None else _checked_names(label_names, num_labels),
            spec=match_spec(num_features, num_labels, splits[0].num_instances if splits[0] else None),
        )

    def split(self, name: Literal["train", "test"] | None = None) -> Split:
        """The split of that name; None means the training split, or the test split where there is no other.

        Raises
        ------
        DataError : this data set has no such split.
        UsageError : no data set has one of that name.
        """
        if name not in (None, "train", "test"):
            raise UsageError(f"split {name!r}: expected 'train' or 'test'.")
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


Data: TypeAlias = str | Path | tuple[Any, Any] | XmcDataset
"""What functions take as data: a path or a name, see `find_files`; one split in memory, as of
`XmcDataset.from_matrices`; or a whole dataset."""


def is_in_memory(data: Any) -> TypeGuard[tuple[Any, Any] | XmcDataset]:
    """Whether it is no path and no name."""
    return isinstance(data, tuple | XmcDataset)


def training_faults(split: Split) -> Iterator[tuple[str, DataError]]:
    """Why nothing can be trained on a split that can be read: the kind of each fault, and what is said of it."""
    (_, num_features), (_, num_labels) = split.features.shape, split.labels.shape
    positives, values = split.labels.nnz, split.features.nnz
    says, hint = "one more than the largest id", ""
    if split.source.format == "npz":
        says = "so large is the matrix"
    elif split.source.states_sizes:
        says, hint = "its header says", "Is it the header of this file? "
    if positives == 0:
        yield "no-positives", DataError(f"{split.path}: no instance has a label, so there is nothing to learn.")
    elif num_labels > _MANY_IDS and _RAREST * positives < num_labels:
        yield (
            "gaps",
            DataError(
                f"{split.path}: has {num_labels:,} labels, {says}, but only {positives:,} positives.",
                hint=f"{hint}Ids count from 0 and leave no large gaps: renumber them. "
                "`xmc-midx prepare` does that for raw text.",
            ),
        )
    if num_features > _MANY_IDS and _RAREST * values < num_features:
        yield (
            "gaps",
            DataError(
                f"{split.path}: has {num_features:,} features, {says}, but only {values:,} values.",
                hint=f"{hint}Ids count from 0 and leave no large gaps: renumber them, or hash to fewer.",
            ),
        )


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
    train: Source | None
    test: Source | None
    labels: Path | None = None
    label_maps: tuple[Path, ...] = ()
    """Names of the labels as the repository ships them: the first that fits is a help, others are no error."""
    feature_map: Path | None = None
    """Names of the features, of which nothing but their number is known to be of use."""
    vocabulary: Path | None = None
    ignored_train: Path | None = None
    """Filter file of the training split."""
    ignored_test: Path | None = None
    unread: tuple[tuple[Source, Source], ...] = ()
    """What is there once more in another format, and the split that goes before it."""
    spec: DatasetSpec | None = None


LABEL_MAPS = ("Y.txt", "Yf.txt")
FEATURE_MAP = "Xf.txt"


def find_files(data: str | Path, *, test: str | Path | None = None) -> DataFiles:
    """The files that DATA means.

    Parameters
    ----------
    data : a path that exists, else a name in the registry (upper or lower case). A directory holds a training split or
        a test split or both, in one of the formats of `sources`, and perhaps `labels.txt` (else `Y.txt` or `Yf.txt`),
        `vocabulary.txt`, `filter_labels_train.txt` and `filter_labels_test.txt`, plain, .gz, .bz2 or .xz. A file is the
        training split. The filter file of a split goes with it, also where the file itself is given.
    test : a file that takes the place of the directory's test split.

    Raises
    ------
    DataError : nothing is found there, with what was looked for; or there are two variants of one file.
    UsageError : `data` is no path.
    """
    if not isinstance(data, str | os.PathLike):
        raise UsageError(
            f"data is a {type(data).__name__}; expected a path, or the name of a dataset.",
            hint=None if is_in_memory(data) else "Matrices in memory are a pair, features and labels: data=(X, Y).",
        )
    path = home_path(data)
    test_path = None if test is None else _found_test(test)
    spec = None if path.exists() else _spec_on_disk(str(data))
    if spec is not None:
        path = spec.directory
    own_test = None if test_path is None else source_of(test_path)
    ignored_test = None if test_path is None else _ignored_beside(test_path)
    if not path.is_dir():
        return DataFiles(
            name=stem_of(path),
            train=source_of(path),
            test=own_test,
            ignored_train=_ignored_beside(path),
            ignored_test=ignored_test,
        )
    trains = find_sources(path, "train")
    tests = [own_test] if own_test else find_sources(path, "test")
    if not trains and not tests:
        raise _nothing_found(path)
    if own_test is None:
        ignored_test = find_variant(path, ignored_name("test"))
    return DataFiles(
        name=spec.name if spec else path.resolve().name,
        train=trains[0] if trains else None,
        test=tests[0] if tests else None,
        labels=find_variant(path, "labels.txt"),
        label_maps=tuple(found for name in LABEL_MAPS if (found := find_variant(path, name))),
        feature_map=find_variant(path, FEATURE_MAP),
        vocabulary=find_variant(path, "vocabulary.txt"),
        ignored_train=find_variant(path, ignored_name("train")),
        ignored_test=ignored_test,
        unread=tuple((other, group[0]) for group in (trains, tests) for other in group[1:]),
        spec=spec,
    )


def _found_test(test: str | Path) -> Path:
    if isinstance(test, tuple):
        raise UsageError(
            "test is a tuple; expected the path of a file.",
            hint="In memory: data=XmcDataset.from_matrices((X, Y), (X_test, Y_test)).",
        )
    path = home_path(test)
    if not path.exists():
        raise DataError(f"{path}: no such file.", hint="It is the file of the test split.")
    return path


def _nothing_found(directory: Path) -> DataError:
    found = sorted(entry.name for entry in directory.iterdir())
    shown = ", ".join(found[:6]) + (", ..." if len(found) > 6 else "") if found else "nothing"
    text = f"{directory}: holds {shown}, expected train.txt or test.txt (or .gz, .bz2, .xz)"
    hint = "Or trn_X_Xf.txt with trn_X_Y.txt, train.svm, X.trn.npz with Y.trn.npz; or name the file itself."
    if any(name.startswith(("trn.json", "train.json")) for name in found):
        hint = "Raw text: `xmc-midx prepare` makes features of it."
    return DataError(f"{text}.", hint=hint)


def _ignored_beside(path: Path) -> Path | None:
    """The filter file that lies beside the file of a split."""
    split = split_of(path)
    return find_variant(path.parent, ignored_name(split)) if split else None


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


def load_split(path: str | Path | Source) -> Split:
    """One split by its file of features, see `source_of` for the formats; `read_cached` for the cache it fills.

    Raises
    ------
    DataError : with the place of the first fault.
    """
    source = path if isinstance(path, Source) else source_of(path)
    features, labels = read_cached(lambda: read_source(source), reader=source.format, sources=source.paths)
    return Split(features=features, labels=labels, source=source)


def load_features(path: str | Path, num_features: int) -> csr_matrix[Any]:
    """The features alone of a file of any format, as of a model of `num_features` features.

    A file without labels will do. One that does not state its sizes gets them from the model.

    Raises
    ------
    DataError : with the place of the first fault.
    """
    features = read_half(Path(path))
    if features is None:
        split, _ = fit_sizes(load_split(path), None, (num_features, MAX_SIZE))
        assert split is not None
        features = split.features
    return features


def load_dataset(data: Data, *, test: str | Path | None = None, sizes: tuple[int, int] | None = None) -> XmcDataset:
    """Read DATA: a path, or a name of the registry; what is in memory is taken as it is.

    Parameters
    ----------
    data : see `find_files`; or a pair of matrices, or a dataset.
    test : see `find_files`.
    sizes : features and labels of a model that the data is for. Files that do not state their sizes get these.

    Returns
    -------
    XmcDataset : its splits' features are CSR float32 (N, F), perhaps mapped from the cache, and labels CSR (N, L).

    Raises
    ------
    DataError : DATA is not found; a file is not what it should be (with file and line); the splits differ in their
        features or labels; or names, vocabulary or filter files do not fit them.
    """
    if isinstance(data, tuple | XmcDataset):
        dataset = data if isinstance(data, XmcDataset) else XmcDataset.from_matrices(data)
        return dataset if test is None else _with_test(dataset, _found_test(test))
    files = find_files(data, test=test)
    train = load_split(files.train) if files.train else None
    test_split = load_split(files.test) if files.test else None
    train, test_split = fit_sizes(train, test_split, sizes)
    first = train or test_split
    assert first is not None  # find_files found one
    if train and not train.num_instances:
        raise DataError(f"{train.path}: holds 0 instances, expected some to train on.")
    num_features, num_labels = first.features.shape[1], first.labels.shape[1]
    num_train = train.num_instances if train else None
    return XmcDataset(
        name=files.name,
        train=train and _with_ignored(train, files.ignored_train),
        test=test_split and _with_ignored(test_split, files.ignored_test),
        num_features=num_features,
        num_labels=num_labels,
        label_names=_label_names(files, num_labels),
        vocabulary=load_vocabulary(files.vocabulary, num_features) if files.vocabulary else None,
        spec=files.spec or match_spec(None if files.vocabulary else num_features, num_labels, num_train),
    )


def _split_in_memory(pair: tuple[Any, Any], kind: str) -> Split:
    if not isinstance(pair, tuple) or len(pair) != 2:
        found = f"a tuple of {len(pair)}" if isinstance(pair, tuple) else f"a {type(pair).__name__}"
        raise UsageError(f"The matrices are {found}; expected a pair, features and labels: (X, Y).")
    scan = scan_matrices(*pair, kind=kind)
    # As of files that hold nothing but a matrix.
    source = Source(format="npz", features=Path(scan.features_at.file), labels=Path(scan.labels_at.file))
    return Split(features=scan.features, labels=scan.labels, source=source)


def _with_test(dataset: XmcDataset, path: Path) -> XmcDataset:
    """The dataset with the file of another test split."""
    train, test = fit_sizes(dataset.train, load_split(path))
    assert test is not None
    (_, num_features), (_, num_labels) = test.features.shape, test.labels.shape
    test = _with_ignored(test, _ignored_beside(path))
    return replace(dataset, train=train, test=test, num_features=num_features, num_labels=num_labels)


def _checked_names(names: Sequence[str], num_labels: int) -> tuple[str, ...]:
    if isinstance(names, str):
        raise UsageError("label_names is one text; expected a sequence of them.")
    found = tuple(names)
    if len(found) != num_labels:
        raise DataError(f"There are {len(found)} label names, expected {num_labels}, one a column of the labels.")
    for label, name in enumerate(found):
        if not isinstance(name, str) or not _is_line(name):
            raise DataError(f"The name of label {label} is {name!a:.60}; expected text of one line, without tabs.")
    return found


def _is_line(name: str) -> bool:
    """Whether a file of names can hold it."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return not {"\n", "\t"} & {*name}


def _with_ignored(split: Split, path: Path | None) -> Split:
    return replace(split, ignored=read_ignored(path, *split.labels.shape)) if path else split


def _label_names(files: DataFiles, num_labels: int) -> tuple[str, ...] | None:
    if files.labels:
        return read_labels(files.labels, num_labels)
    for path in files.label_maps:
        with suppress(DataError):  # `check` says what does not fit
            return read_labels(path, num_labels)
    return None


def fit_sizes(
    train: Split | None,
    test: Split | None,
    sizes: tuple[int, int] | None = None,
    *,
    report: Report = raise_error,
) -> tuple[Split | None, Split | None]:
    """Both splits with the same features and labels; one that does not state its sizes gets what the others have.

    Parameters
    ----------
    sizes : features and labels of a model, for splits of which none states its sizes. Without them these get the least
        that holds the ids of both.
    report : receives what does not fit, kind `sizes`.
    """
    fitted = {name: split for name, split in (("train", train), ("test", test)) if split}
    stated = next((split for split in fitted.values() if split.source.states_sizes), None)
    for axis, what in enumerate(_PARTS):
        widths = {name: _part(split, what).shape[1] for name, split in fitted.items()}
        if stated:
            width = _part(stated, what).shape[1]
            expected = f"{width} as in {stated.source.path_of(what)}"
        elif sizes:
            width = sizes[axis]
            expected = f"{width} as the model has"
        else:
            width, expected = max(widths.values(), default=0), ""
        for name, split in fitted.items():
            if split.source.states_sizes and widths[name] != width:
                hint = "Are these splits of the same data set?"
                report(split.source.size_problem(what, widths[name], f"expected {expected}", hint))
            elif widths[name] > width:
                hint = "Is it of the same data set?"
                report(split.source.size_problem(what, widths[name], f"expected at most {expected}", hint))
            elif widths[name] < width:
                narrow = _part(split, what)
                wide = csr_matrix((narrow.data, narrow.indices, narrow.indptr), shape=(narrow.shape[0], width))
                wide = canonical(wide)
                fitted[name] = replace(split, features=wide) if what == "features" else replace(split, labels=wide)
    return fitted.get("train"), fitted.get("test")


_PARTS: tuple[Part, Part] = ("features", "labels")


def _part(split: Split, what: Part) -> csr_matrix[Any]:
    return split.features if what == "features" else split.labels


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
