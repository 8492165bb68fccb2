r"""Layer 2. What a file, a pair of files or a directory is: the one place that knows all formats by their names.

Before it: the readers of the formats. After it: `dataset` and `check`, which read through `scan_source`. In the order
in which a directory is searched, for the training split (the test split has `test` and `tst`):

========  ======================================================  ===================================
format    files                                                   sizes
========  ======================================================  ===================================
xmc       train.txt                                               in the header
pair      trn_X_Xf.txt + trn_X_Y.txt                              in both headers
svmlight  train.svm (.svmlight, .libsvm)                          the largest ids of both splits
npz       X.trn.npz + Y.trn.npz, trn_X_Xf.npz + trn_X_Y.npz, ...  in both files
========  ======================================================  ===================================

Text may be compressed; a pair may be called `train` as well as `trn`. The name decides, never the content: a
train.txt that has lost its first line is damaged, and a train.svm has no line to lose.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from xmc_midx.data.files import find_variant, plain_name
from xmc_midx.data.formats import scan_xmc
from xmc_midx.data.npz import scan_npz, scan_npz_pair
from xmc_midx.data.pairs import scan_pair, scan_sparse
from xmc_midx.data.problems import Problem, Report, raise_error
from xmc_midx.data.scans import SplitScan
from xmc_midx.data.svmlight import scan_svmlight
from xmc_midx.errors import DataError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

__all__ = [
    "Format",
    "Part",
    "Source",
    "SplitName",
    "file_names",
    "find_sources",
    "is_named",
    "read_half",
    "read_source",
    "scan_source",
    "source_of",
    "split_of",
    "stem_of",
]

Format = Literal["xmc", "pair", "svmlight", "npz"]
SplitName = Literal["train", "test"]
Part = Literal["features", "labels"]

_SHORT: dict[SplitName, str] = {"train": "trn", "test": "tst"}
_SVMLIGHT_ENDS = (".svm", ".svmlight", ".libsvm")
_PAIR_ENDS = (("_X_Xf.txt", "_X_Y.txt"),)
_NPZ_ENDS = (("_X_Xf.npz", "_X_Y.npz"), ("_X.npz", "_Y.npz"))
_NPZ_STARTS = (("X.", "Y."), ("X_", "Y_"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The files of one split."""

    format: Format
    features: Path
    """The only file of `xmc` and `svmlight`."""
    labels: Path

    @property
    def paths(self) -> tuple[Path, ...]:
        """Its files, the one of the features first."""
        return tuple(dict.fromkeys((self.features, self.labels)))

    @property
    def states_sizes(self) -> bool:
        """Whether the files say how many features and labels there are, used or not."""
        return self.format != "svmlight"

    def path_of(self, part: Part) -> Path:
        """The file of the features or of the labels."""
        return self.features if part == "features" else self.labels

    def size_problem(self, part: Part, size: int, expected: str, hint: str) -> Problem:
        """An error, kind `sizes`: the number of features or labels that the files state is not the expected one."""
        fact = {"npz": f"the matrix has {size} {part}", "svmlight": f"the largest id makes {size} {part}"}
        return Problem(
            kind="sizes",
            file=str(self.path_of(part)),
            line=None if self.format in fact else 1,
            text=f"{fact.get(self.format, f'the header says {size} {part}')}, {expected}.",
            hint=hint,
        )


def source_of(path: str | Path) -> Source:
    """What one file is, with the file beside it that holds the labels.

    Raises
    ------
    DataError : it holds features or labels alone, and the other file is not there.
    """
    path = Path(path)
    name = plain_name(path)
    if name.endswith(_SVMLIGHT_ENDS):
        return Source(format="svmlight", features=path, labels=path)
    format: Literal["pair", "npz"] = "npz" if name.endswith(".npz") else "pair"
    for _, labels in _namings(name, of_features=True):
        found = find_variant(path.parent, labels) if format == "pair" else _existing(path.with_name(labels))
        if found is None:
            text = f"{path}: holds features alone, expected their labels in {labels} beside it."
            raise DataError(text, hint="Only `predict` does without labels.")
        return Source(format=format, features=path, labels=found)
    for features, _ in _namings(name, of_features=False):
        raise DataError(f"{path}: holds labels alone.", hint=f"Name the file of the features, {features}.")
    if format == "npz":
        text = f"{path}: is a matrix, expected a name that says which, such as X.trn.npz beside Y.trn.npz."
        raise DataError(text, hint="Or trn_X_Xf.npz beside trn_X_Y.npz, or train_X.npz beside train_Y.npz.")
    return Source(format="xmc", features=path, labels=path)


def is_named(path: Path) -> bool:
    """Whether the name says that a file holds sparse rows; XMC text may be called anything."""
    name = plain_name(path)
    return name.endswith((*_SVMLIGHT_ENDS, ".npz")) or any(_namings(name, of_features=True))


def find_sources(directory: Path, split: SplitName) -> list[Source]:
    """The splits of that name in a directory; the first one is the one to read.

    Raises
    ------
    DataError : there are two variants of a file; or nothing but the half of a pair.
    """
    halves: list[Path] = []
    found: list[Source] = []
    for path in _candidates(directory, split):
        try:
            found.append(source_of(path))
        except DataError:
            halves.append(path)
    if halves and not found:
        source_of(halves[0])  # says what is missing
    return found


def _candidates(directory: Path, split: SplitName) -> Iterator[Path]:
    """Files of that split that hold features, whether or not the labels are there."""
    for name in _feature_names(split):
        path = _existing(directory / name) if name.endswith(".npz") else find_variant(directory, name)
        if path:
            yield path


def split_of(path: Path) -> SplitName | None:
    """The split that a file belongs to, by its name."""
    name = plain_name(path)
    return next((split for split in _SHORT if name in _feature_names(split)), None)


def file_names(format: Format, split: SplitName) -> tuple[str, str]:
    """What the files of features and of labels are called where they are written; they are the same in two formats."""
    short = _SHORT[split]
    return {
        "xmc": (f"{split}.txt", f"{split}.txt"),
        "pair": (f"{short}_X_Xf.txt", f"{short}_X_Y.txt"),
        "svmlight": (f"{split}.svm", f"{split}.svm"),
        "npz": (f"X.{short}.npz", f"Y.{short}.npz"),
    }[format]


def _feature_names(split: SplitName) -> list[str]:
    """What the file of the features may be called, in the order of preference."""
    words = _SHORT[split], split
    names = [f"{split}.txt"]
    names += [f"{word}{end}" for word in words for end, _ in _PAIR_ENDS]
    names += [f"{split}{end}" for end in _SVMLIGHT_ENDS]
    names += [f"{start}{word}.npz" for word in words for start, _ in _NPZ_STARTS]
    return [*names, *(f"{word}{end}" for word in words for end, _ in _NPZ_ENDS)]


def _namings(name: str, *, of_features: bool) -> Iterator[tuple[str, str]]:
    """The names of both files of a pair, if `name` is that of the features (or of the labels)."""
    mine = 0 if of_features else 1
    for ends in _PAIR_ENDS + _NPZ_ENDS:
        if name.endswith(ends[mine]):
            stem = name.removesuffix(ends[mine])
            yield stem + ends[0], stem + ends[1]
            return
    for starts in _NPZ_STARTS:
        if name.endswith(".npz") and name.startswith(starts[mine]):
            rest = name.removeprefix(starts[mine])
            yield starts[0] + rest, starts[1] + rest
            return


def stem_of(path: Path) -> str:
    """The name of a file without what says its format."""
    name = plain_name(path)
    return next((name.removesuffix(end) for end in (".txt", ".npz", *_SVMLIGHT_ENDS) if name.endswith(end)), name)


def _existing(path: Path) -> Path | None:
    return path if path.exists() else None


def scan_source(source: Source, report: Report) -> SplitScan | None:
    """Read a split of any format, giving each fault to `report`; None if there is nothing to make rows of."""
    match source.format:
        case "xmc":
            return scan_xmc(source.features, report)
        case "pair":
            return scan_pair(source.features, source.labels, report)
        case "svmlight":
            return scan_svmlight(source.features, report)
        case "npz":
            return scan_npz_pair(source.features, source.labels, report)


def read_source(source: Source) -> tuple[csr_matrix[Any], csr_matrix[Any]]:
    """Features and labels of a split of any format.

    Raises
    ------
    DataError : with the place of the first fault.
    """
    scan = scan_source(source, raise_error)
    assert scan is not None  # raise_error raises
    return scan.features, scan.labels


def read_half(path: Path) -> csr_matrix[Any] | None:
    """The features in a file that holds nothing else; None for a file that holds labels as well.

    Raises
    ------
    DataError : with the place of the first fault.
    """
    name = plain_name(path)
    if not any(_namings(name, of_features=True)):
        return None
    scan = scan_npz(path, raise_error) if name.endswith(".npz") else scan_sparse(path, raise_error)
    assert scan is not None  # raise_error raises
    return scan.matrix
