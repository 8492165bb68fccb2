"""Layer 6. The answers to a stream of any length, batch by batch, in constant memory.

Before it: the readers of instances and the predictor; after it: `prediction`, and what writes the answers.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
from scipy.sparse import csr_matrix

from xmc_midx.errors import DataError, UsageError
from xmc_midx.types import Reporter, TopK

if TYPE_CHECKING:
    from io import BufferedIOBase

    from xmc_midx.data.instances import HeldInstances, InstanceReader
    from xmc_midx.predictor import Predictor

__all__ = ["PredictionChunk", "PredictionStream"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionChunk:
    """The answers to consecutive instances."""

    first: int
    """Number of the first one, from 0."""
    top: TopK
    input_sha256: str
    """Of the input's lines up to the last one of these."""


class PredictionStream:
    """Made by `predict_stream`; iterated once."""

    def __init__(
        self,
        predictor: Predictor,
        source: str | Path | BinaryIO | Sequence[str] | csr_matrix,
        options: Mapping[str, Any],
        *,
        exact: bool,
        text: bool | None,
        shard: tuple[int, int],
        live: bool,
        reporter: Reporter,
        model: str,
    ) -> None:
        self._predictor, self._source, self._options, self._text = predictor, source, options, text
        self._exact = exact
        self._shard, self._live, self._reporter, self._model = shard, live, reporter, model
        self._next, self._input_sha256 = 0, ""
        self._num_answered, self._num_empty, self._seconds, self._has_labels = 0, 0, 0.0, False

    @property
    def label_names(self) -> Sequence[str] | None:
        return self._predictor.label_names

    @property
    def settings(self) -> dict[str, Any]:
        """What the answers depend on besides the input; plain values."""
        lists = {name: self._options[name] for name in ("allow", "deny")}
        return {
            "model": self._model,
            "index": type(self._predictor.index).__name__,
            "exact": self._exact,
            **self._options,
            **{name: None if ids is None else _digest_of(ids) for name, ids in lists.items()},
            "text": self._text,
            "shard": list(self._shard),
        }

    def go_on(self, next_instance: int, input_sha256: str) -> None:
        """Leave out the instances before `next_instance`, the end of an earlier chunk; their lines must have this
        sha256."""
        self._next, self._input_sha256 = next_instance, input_sha256

    def __iter__(self) -> Iterator[PredictionChunk]:
        reader = self._reader()
        chosen, total = self._chosen()
        started = False
        for batch in reader.batches(lambda number, first: number in chosen and first >= self._next):
            self._check_place(reader, batch.first, batch.num_instances)
            if not started:
                known = total if total is not None else reader.num_instances
                self._reporter.start("predict", known)
                started = True
            if batch.rows is None:
                self._reporter.step(batch.num_instances if total is None else 0)
                continue
            yield self._answer(batch.first, batch.rows, reader.digest())
        if self._next > reader.num_given:
            raise self._another_input()
        if self._num_answered and not self._has_labels:
            threshold, scores = self._options["threshold"], self._options["scores"]
            why = "" if threshold is None else f": none of the {scores} reaches {threshold:g}"
            self._reporter.message(f"Nothing was predicted for these {self._num_answered:,} instances{why}.")
        if self._num_empty:
            self._reporter.message(
                f"Instances without any feature, or word, that the model has: {self._num_empty:,} of "
                f"{self._num_answered:,}. All of them get the same labels."
            )

    def _answer(self, first: int, rows: csr_matrix | list[str], digest: str) -> PredictionChunk:
        began = time.monotonic()
        try:
            features = self._predictor.read(rows)
            top = self._predictor.predict(features, **self._options)
        except DataError as error:
            raise DataError(
                f"Instances {first} to {first + _length(rows) - 1}: {error.message}", hint=error.hint
            ) from None
        self._num_answered += _length(rows)
        self._num_empty += self._predictor.num_without_features(features)
        self._has_labels |= bool((top.label_ids >= 0).any())
        self._seconds += time.monotonic() - began
        self._reporter.step(_length(rows), instances_per_second=self._num_answered / max(self._seconds, 1e-9))
        return PredictionChunk(first=first, top=top, input_sha256=digest)

    def _reader(self) -> InstanceReader | HeldInstances:
        from xmc_midx.data.files import LineChunks
        from xmc_midx.data.instances import HeldInstances, InstanceReader
        from xmc_midx.data.problems import raise_error

        num_features, source = self._predictor.num_features, self._source
        if isinstance(source, csr_matrix) or (isinstance(source, Sequence) and not isinstance(source, str)):
            return HeldInstances(source)
        if isinstance(source, str | Path):
            live = self._live and not Path(source).is_file()
            lines = LineChunks(Path(source), raise_error, live=live)
        else:
            live = self._live
            stream = cast("BufferedIOBase", source)
            lines = LineChunks(Path("standard input"), raise_error, stream=stream, live=live)
        return InstanceReader(lines, num_features=num_features, text=self._text, live=live)

    def _chosen(self) -> tuple[range, int | None]:
        """The numbers of the shard's batches, and its instances (None: not counted)."""
        index, num_shards = self._shard
        if num_shards == 1:
            return range(sys.maxsize), None
        source = self._source
        is_stream = not isinstance(source, str | Path | Sequence | csr_matrix)
        if is_stream or (isinstance(source, str | Path) and not Path(source).is_file()):
            raise UsageError(
                "A shard needs a file: its instances are counted first.",
                hint="Split a stream before it comes here, or give each part its own file.",
            )
        self._reporter.start("read", None)
        counts = [batch.num_instances for batch in self._reader().batches(lambda number, first: False)]
        chosen = range(len(counts) * (index - 1) // num_shards, len(counts) * index // num_shards)
        return chosen, sum(counts[chosen.start : chosen.stop])

    def _check_place(self, reader: InstanceReader | HeldInstances, first: int, count: int) -> None:
        end = first + count
        if first < self._next and (end > self._next or (end == self._next and reader.digest() != self._input_sha256)):
            raise self._another_input()

    def _another_input(self) -> DataError:
        return DataError(
            f"The input is not the one whose first {self._next} instances are answered already: its lines differ.",
            hint="Remove the partial output to start anew.",
        )


def _length(rows: csr_matrix | list[str]) -> int:
    return len(rows) if isinstance(rows, list) else int(rows.shape[0])


def _digest_of(ids: Sequence[int]) -> str:
    return hashlib.sha256(np.unique(np.asarray(ids, dtype="<i8")).tobytes()).hexdigest()
