"""Layer 6. A run's best model as files that other programs load, and how well they find: `export`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import csr_matrix

from xmc_midx.data.dataset import Data, load_dataset
from xmc_midx.errors import DataError, UsageError
from xmc_midx.paths import home_path
from xmc_midx.pipeline.inputs import called, check_sizes, say_which
from xmc_midx.rundir import RunDirectory
from xmc_midx.types import Reporter, SilentReporter

if TYPE_CHECKING:
    from xmc_midx.exporting.source import ExportSource, Measurement

__all__ = ["EXPORT_FORMATS", "ExportResult", "export"]

EXPORT_FORMATS = ("midx", "faiss", "onnx")
_MEASURED_INSTANCES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportResult:
    """What was written, and how well it finds what the exact search finds."""

    output: str
    format: str
    files: Mapping[str, int]
    """Name -> bytes, SHA256SUMS included."""
    measured: Sequence[Measurement]
    """What was exported, and last the run itself; without figures where there were no instances to measure on."""
    measured_on: str | None
    """The data; None where it was not found."""
    num_instances: int
    """Measured on."""
    num_labels: int
    """L, of the data."""
    num_label_rows: int
    """Labels that the model has a row for, which alone it searches."""
    validation: tuple[Mapping[str, float], Mapping[str, float]] | None
    """Metrics on the run's held-out instances, of the model alone, which the export's search is made of, and with the
    neighbours, the linear ranker and the frequencies that `predict` adds; None where nothing was held out."""
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of `export`."""
        alone, whole = (None, None) if self.validation is None else map(dict, self.validation)
        return {
            "output": self.output,
            "format": self.format,
            "files": dict(self.files),
            "bytes": sum(self.files.values()),
            "measured": [one.as_dict() for one in self.measured],
            "measured_on": self.measured_on,
            "num_instances": self.num_instances,
            "num_labels": self.num_labels,
            "num_label_rows": self.num_label_rows,
            "validation": {"model": alone, "predict": whole},
            "seconds": round(self.seconds, 3),
        }


def export(
    run: str | Path,
    *,
    output: str | Path,
    format: str = "midx",
    data: Data | None = None,
    reporter: Reporter | None = None,
) -> ExportResult:
    """Write a run's best model as files that other programs load, with the sha256 of each, and measure them.

    Parameters
    ----------
    run : run directory.
    output : a new directory; it appears complete or not at all.
    format : `"midx"`: the whole model, as an inverted multi-index that NumPy alone can search; `"faiss"`: the label
        table as stock indexes, HNSW and IVF; `"onnx"`: the encoder.
    data : whose instances (of the test split, where there is one) recall is measured on and the search is set by; None
        takes what the run was trained on, if it is still there.

    Raises
    ------
    UsageError : `output` is not empty, or the format is unknown or needs a package that is not installed.
    """
    from xmc_midx.exporting.faiss import export_faiss, require_faiss
    from xmc_midx.exporting.midx import export_midx
    from xmc_midx.exporting.onnx import export_onnx, require_onnx
    from xmc_midx.exporting.sealed import sealed_directory
    from xmc_midx.exporting.source import ExportSource, Queries

    writers = {"midx": export_midx, "faiss": export_faiss, "onnx": export_onnx}
    if format not in writers:
        raise UsageError(f"format is {format!r}; expected {', '.join(EXPORT_FORMATS)}.")
    if format == "faiss":
        require_faiss()
    if format == "onnx":
        require_onnx()
    started = time.perf_counter()
    reporter = reporter or SilentReporter()
    target = home_path(output)
    with sealed_directory(target) as directory:
        reporter.start("load", None)
        source = ExportSource.load(run)
        say_which(source.directory, reporter)
        reporter.start("read", None)
        features, measured_on = _instances_to_measure(source, data)
        reporter.start("export", None)
        queries = Queries.build(source, features)
        measured = writers[format](source, queries, directory)
    return ExportResult(
        output=str(output),
        format=format,
        files={file.name: file.stat().st_size for file in sorted(target.iterdir())},
        measured=measured,
        measured_on=measured_on,
        num_instances=features.shape[0],
        num_labels=source.num_labels,
        num_label_rows=source.num_rows,
        validation=_validation_of(source.directory),
        seconds=time.perf_counter() - started,
    )


def _validation_of(run: RunDirectory) -> tuple[Mapping[str, float], Mapping[str, float]] | None:
    """Of the model alone, and of all that predicts; None where the record of the epochs, which no export needs, is
    missing or damaged."""
    from xmc_midx.checkpoint import CheckpointStore

    try:
        whole, best = run.interpolation_validation(), CheckpointStore(run.checkpoints).step_of("best")
        alone = [line.get("validation") for line in run.read_metrics() if line.get("step") == best]
    except DataError:
        return None
    return (alone[-1], whole) if alone and alone[-1] and whole else None


def _instances_to_measure(source: ExportSource, data: Data | None) -> tuple[csr_matrix, str | None]:
    """Some instances of the data, the same each time; none where the run's data is gone."""
    place = source.directory.provenance().data if data is None else data
    try:
        dataset = None if place is None else load_dataset(place)
    except DataError:
        if data is not None:
            raise
        dataset = None
    if dataset is None or place is None:
        return csr_matrix(np.empty((0, source.num_features), dtype=np.float32)), None
    check_sizes(dataset, num_features=source.num_features, num_labels=source.num_labels)
    split = dataset.test if dataset.test is not None and dataset.test.num_instances else dataset.split()
    count = min(_MEASURED_INSTANCES, split.num_instances)
    rows = np.sort(np.random.default_rng(0).permutation(split.num_instances)[:count])
    return split.features[rows], called(dataset, place)
