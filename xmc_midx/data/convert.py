"""Layer 2. DATA in one format -> a directory in another: splits, names, vocabulary and filter files.

Before it: `dataset` reads any format. After it: the command line. What is written is read back equal.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xmc_midx.data.dataset import Split, load_dataset
from xmc_midx.data.files import atomic_write, sync_directory
from xmc_midx.data.formats import write_xmc
from xmc_midx.data.ignored import ignored_name, write_ignored
from xmc_midx.data.npz import write_npz
from xmc_midx.data.pairs import write_sparse
from xmc_midx.data.sources import Format, SplitName, file_names
from xmc_midx.data.svmlight import write_svmlight
from xmc_midx.errors import DataError, ResourceError, UsageError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

__all__ = ["Conversion", "convert"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What `convert` wrote."""

    directory: str
    format: Format
    files: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of `convert`."""
        return {"directory": self.directory, "format": self.format, "files": list(self.files)}


def convert(data: str | Path, *, output: str | Path, format: Format, test: str | Path | None = None) -> Conversion:
    """Write DATA in another format, into a directory that is there as a whole or not at all.

    Parameters
    ----------
    data, test : as of `load_dataset`.
    output : a directory to make; it may exist if it is empty.
    format : see `sources`.

    Raises
    ------
    UsageError : there is something in `output`.
    DataError : DATA is not found or faulty, or svmlight would lose its last features or labels.
    ResourceError : the directory cannot be written.
    """
    target = Path(output).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{output}: is there already, expected a new directory.")
    dataset = load_dataset(data, test=test)
    splits: dict[SplitName, Split | None] = {"train": dataset.train, "test": dataset.test}
    found: dict[SplitName, Split] = {name: split for name, split in splits.items() if split}
    if format == "svmlight":
        _require_last_ids(dataset.name, list(found.values()))
    staging = target.with_name(f".{target.name}.{uuid.uuid4().hex}.writing")
    try:
        staging.mkdir(parents=True)
        for name, split in found.items():
            _write_split(staging, format, name, split)
        if dataset.label_names is not None:
            _write_lines(staging / "labels.txt", iter(dataset.label_names))
        if dataset.vocabulary is not None:
            dataset.vocabulary.save(staging / "vocabulary.txt")
        if target.exists():
            target.rmdir()
        staging.rename(target)
        sync_directory(target.parent)
    except OSError as error:
        raise ResourceError(f"{output}: cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    files = tuple(sorted(path.name for path in target.iterdir()))
    return Conversion(directory=str(output), format=format, files=files)


_ANOTHER = "Choose another format."


def _require_last_ids(name: str, splits: list[Split]) -> None:
    """A format that does not state its sizes needs the last feature and the last label somewhere."""
    if not all(split.num_instances for split in splits):
        raise DataError(f"{name}: a split holds no instance, and an empty svmlight file is none.", hint=_ANOTHER)
    for what in ("features", "labels"):
        matrices: list[csr_matrix[Any]] = [getattr(split, what) for split in splits]
        size = matrices[0].shape[1]
        if max(int(matrix.indices.max(initial=-1)) for matrix in matrices) != size - 1:
            text = (
                f"{name}: the last of its {size} {what} never occurs, and svmlight does not state how many there are."
            )
            raise DataError(text, hint=_ANOTHER)


def _write_split(directory: Path, format: Format, name: SplitName, split: Split) -> None:
    features, labels = (directory / file for file in file_names(format, name))
    if format == "xmc":
        write_xmc(features, split.features, split.labels)
    elif format == "svmlight":
        write_svmlight(features, split.features, split.labels)
    else:
        write = write_sparse if format == "pair" else write_npz
        write(features, split.features)
        write(labels, split.labels)
    if split.ignored is not None:
        write_ignored(directory / ignored_name(name), split.ignored)


def _write_lines(path: Path, lines: Iterator[str]) -> None:
    with atomic_write(path) as file:
        file.writelines(f"{line}\n".encode() for line in lines)
