"""Layer 2. Instances as a stream, in batches: rows of XMC text, or raw texts, of a file of any size or of a pipe.

Before it: `files` (chunks of lines) and `parser` (lines -> rows). After it: `pipeline.predict_stream`. At most two
batches are in memory, and nothing goes into the cache: such a file is read once.

Rows may have a header or not. `num_instances num_features num_labels` (XMC text) and `num_instances num_features` (a
file of features alone) are checked against the rows that follow; without one, every line is an instance. A row's
labels, if any, are read past.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from xmc_midx.data.files import LineChunks, plain_name
from xmc_midx.data.parser import Rules, parse_chunk, parse_lines
from xmc_midx.data.problems import excerpt, raise_error
from xmc_midx.data.raw import form_of
from xmc_midx.data.table import SHORT_BYTES, rows_matrix
from xmc_midx.errors import DataError

__all__ = ["BATCH_ROWS", "HeldInstances", "InstanceBatch", "InstanceReader", "Wanted", "looks_like_text"]

BATCH_ROWS = 1024
"""Instances of a batch, but for the last one and those with long lines."""
Wanted = Callable[[int, int], bool]
"""Number of a batch and of its first instance, both from 0 -> whether its rows are read."""
_BATCH_BYTES = 16 * 2**20
"""A batch also ends with the line that brings it to so many bytes: long rows must not fill the memory."""

_MAX_SIZE = 2**31 - 1
_LOOK_BYTES = 65536
"""Of the first line: what is looked at."""
_NUMBERS = re.compile(rb"[\d\s.,+-]*")
_FEATURE = re.compile(rb"\d+:(?:[\d.+-].*|nan|inf(?:inity)?)?", re.IGNORECASE)
_HEADER = re.compile(rb"[ \t]*\d+[ \t]+\d+(?:[ \t]+\d+)?[ \t]*\r?")
_LABELLED = {"tsv": b"\t", "csv": b",", "jsonl": b"{"}
"""Forms of files of texts with their labels, and what a line of one holds."""
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00")
"""How gzip, bzip2 and xz streams begin."""


def looks_like_text(line: bytes) -> bool:
    """Whether a first line is neither a header nor sparse features.

    In doubt it is not: rows that were taken for text would be answered, and wrongly, without a complaint. A time of
    day or a ratio in a sentence leaves no doubt: of a row, half of the words at least are features.
    """
    if line.startswith(_COMPRESSED) or _NUMBERS.fullmatch(line):
        return False
    words = line.split()
    return 2 * sum(_FEATURE.fullmatch(word) is not None for word in words) < len(words)


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceBatch:
    """Consecutive instances. Where they begin and end depends on their lines alone, not on how these arrive (but for
    a live stream)."""

    first: int
    """Number of the first one, from 0."""
    num_instances: int
    rows: csr_matrix[Any] | list[str] | None
    """(B, F) float32 feature rows, or B raw texts; None where they were not wanted."""


class InstanceReader:
    """Reads the instances of `lines`, once.

    Parameters
    ----------
    lines : the file or the pipe.
    num_features : F of the model; a header must say the same.
    text : whether the lines are raw text; None decides by the first line (`looks_like_text`). False: the model could
        not read any.
    live : whether a batch also ends where nothing more is at hand, as the chunks of `lines` do.
    """

    def __init__(self, lines: LineChunks, *, num_features: int, text: bool | None, live: bool = False) -> None:
        self._lines, self._num_features, self._live = lines, num_features, live
        self._is_never_text = text is False
        self.is_text = text
        """None until a line has shown it."""
        self.num_instances: int | None = None
        """As the header says; None where there is none, or before the first batch."""
        self._rules = self._make_rules("the model has", _MAX_SIZE, "without a header, any id below 2^31")
        self.num_given = 0
        """Instances so far."""
        self._num_bytes = 0
        self._digest = hashlib.sha256()

    def digest(self) -> str:
        """sha256 of all lines given so far, in hexadecimal."""
        return self._digest.hexdigest()

    def batches(self, wanted: Wanted | None = None) -> Iterator[InstanceBatch]:
        """All batches in order.

        Parameters
        ----------
        wanted : which batches are read; the others are counted alone. None wants all.

        Raises
        ------
        DataError : with `file:line` of the first fault; the batches before it have been given.
        """
        for number, (first_line, text, count) in enumerate(self._batch_lines()):
            if self.num_instances is not None and self.num_given + count > self.num_instances:
                kept, surplus = _split(text, self.num_instances - self.num_given)
                if surplus.strip():
                    blank = surplus[: len(surplus) - len(surplus.lstrip())].count(b"\n")
                    line = first_line + (self.num_instances - self.num_given) + blank
                    raise DataError(
                        f"{self._lines.path}:{line}: a row too many, the header says {self.num_instances}.",
                        hint="Is this the header of another file?",
                    )
                text, count = kept, self.num_instances - self.num_given
                if not count:
                    continue
            self._digest.update(text)
            self._decide(text)
            rows = self._read(text, first_line) if wanted is None or wanted(number, self.num_given) else None
            yield InstanceBatch(first=self.num_given, num_instances=count, rows=rows)
            self.num_given += count
        if self.num_instances is not None and self.num_given < self.num_instances:
            raise DataError(
                f"{self._lines.path}:{self._lines.num_lines}: the file ends after {self.num_given} instances, "
                f"the header says {self.num_instances}.",
                hint="Is the file cut?",
            )

    def _batch_lines(self) -> Iterator[tuple[int, bytes, int]]:
        """(number of the first line, the lines, how many) of each batch; the header is taken out."""
        pending, pending_from = b"", 1
        for first_line, chunk in self._lines:
            if first_line == 1:
                chunk, pending_from = self._start(chunk)
            text = pending + chunk
            ends = np.flatnonzero(np.frombuffer(text, dtype=np.uint8) == ord("\n")) + 1
            done = row = 0
            while row < len(ends):
                full = int(np.searchsorted(ends, done + _BATCH_BYTES)) + 1
                after = min(row + BATCH_ROWS, full)
                if after > len(ends):
                    if not self._live:
                        break
                    after = len(ends)
                end = int(ends[after - 1])
                yield pending_from, text[done:end], after - row
                pending_from += after - row
                done, row = end, after
            pending = text[done:]
        if pending:
            yield pending_from, pending, pending.count(b"\n")

    def _start(self, chunk: bytes) -> tuple[bytes, int]:
        """The first chunk without its header, and the number of its first line."""
        head, _, rest = chunk.partition(b"\n")
        if self.is_text:
            return chunk, 1
        if head.startswith(_COMPRESSED):
            raise DataError(
                f"{self._lines.path}: is a compressed stream, expected text.", hint="Send it through zcat or xzcat."
            )
        if not _HEADER.fullmatch(head):
            return chunk, 1
        sizes = [int(word) if len(word) < 19 else 2**63 for word in head.split()]
        self._check_header(head, sizes)
        self.is_text, self.num_instances = False, sizes[0]
        num_labels = sizes[2] if len(sizes) == 3 else 0
        self._rules = self._make_rules("the header says", num_labels, f"the header says {num_labels} labels")
        return rest, 2

    def _make_rules(self, source: str, num_labels: int, labels_source: str) -> Rules:
        return Rules(
            file=str(self._lines.path),
            num_features=self._num_features,
            num_labels=num_labels,
            num_features_source=f"{source} {self._num_features} features",
            num_labels_source=labels_source,
        )

    def _check_header(self, line: bytes, sizes: list[int]) -> None:
        names = ("instances", "features", "labels")
        for name, size, least in zip(names, sizes, (0, 1, 1), strict=False):
            if not least <= size <= _MAX_SIZE:
                raise DataError(
                    f"{self._lines.path}:1: the header is {excerpt(line.strip())}, expected {least} to {_MAX_SIZE} "
                    f"{name}."
                )
        if sizes[1] != self._num_features:
            raise DataError(
                f"{self._lines.path}:1: the header says {sizes[1]} features; the model was trained with "
                f"{self._num_features}.",
                hint="Is this the model of another dataset?",
            )

    def _decide(self, text: bytes) -> None:
        """Text or rows: the first line that is not blank shows it; a blank line is an empty instance of either."""
        if self.is_text is None and (start := text.lstrip()):
            line = start.partition(b"\n")[0][:_LOOK_BYTES]
            self.is_text = looks_like_text(line)
            form = form_of(self._lines.path)
            # In texts of any name there may be tabs; of two columns the first are labels.
            num_marks = line.count(_LABELLED[form]) if form is not None else 0
            is_table = num_marks == 1 if plain_name(self._lines.path).lower().endswith(".txt") else num_marks > 0
            if self.is_text and is_table:
                raise DataError(
                    f"{self._lines.path}: looks like texts with their labels, as `prepare` reads them; expected texts "
                    "alone, a line each.",
                    hint="Give a file of the texts; --text takes the lines as they are.",
                )

    def _read(self, text: bytes, first_line: int) -> csr_matrix[Any] | list[str]:
        if self.is_text:
            return [
                self._decoded(line, number)
                for number, line in enumerate(text.removesuffix(b"\n").split(b"\n"), start=first_line)
            ]
        self._num_bytes += len(text)
        # As in `table`: a little text takes less time than the compiled parser's start.
        rows = parse_chunk(text, self._rules) if self._num_bytes > SHORT_BYTES else None
        try:
            rows = rows or parse_lines(text, first_line, self._rules, raise_error)
        except DataError as error:
            if self._is_never_text and looks_like_text(text.partition(b"\n")[0][:_LOOK_BYTES]):
                hint = "Is this raw text? The model has no vocabulary, so it reads rows of features alone."
                raise DataError(error.message, hint=hint) from None
            if self.is_text is False and not self._is_never_text and error.hint is None:
                raise DataError(error.message, hint="Are the lines raw text? --text says so.") from None
            raise
        return rows_matrix(rows, self._num_features)

    def _decoded(self, line: bytes, number: int) -> str:
        try:
            return line.decode("utf-8").rstrip("\r")
        except UnicodeDecodeError:
            raise DataError(f"{self._lines.path}:{number}: is not UTF-8, expected text.") from None


class HeldInstances:
    """Instances that are in memory already, in the same batches.

    Parameters
    ----------
    rows : (N, F) features, or N raw texts.
    """

    def __init__(self, rows: csr_matrix[Any] | Sequence[str]) -> None:
        self._rows = rows
        self.num_instances: int | None = len(rows) if isinstance(rows, Sequence) else int(rows.shape[0])
        self.num_given = 0
        """Instances so far."""
        self._digest = hashlib.sha256()

    def digest(self) -> str:
        """sha256 of all instances given so far, in hexadecimal."""
        return self._digest.hexdigest()

    def batches(self, wanted: Wanted | None = None) -> Iterator[InstanceBatch]:
        """All batches in order; see `InstanceReader.batches`."""
        assert self.num_instances is not None
        for number, first in enumerate(range(0, self.num_instances, BATCH_ROWS)):
            part = self._rows[first : first + BATCH_ROWS]
            rows = list(part) if isinstance(part, Sequence) else csr_matrix(part)
            if isinstance(rows, list):
                self._digest.update("".join(f"{text}\n" for text in rows).encode("utf-8", errors="surrogatepass"))
            else:
                for array, kind in ((rows.indptr, "<i8"), (rows.indices, "<i8"), (rows.data, "<f4")):
                    self._digest.update(np.ascontiguousarray(array, dtype=kind).data)
            count = min(BATCH_ROWS, self.num_instances - first)
            is_wanted = wanted is None or wanted(number, first)
            yield InstanceBatch(first=first, num_instances=count, rows=rows if is_wanted else None)
            self.num_given += count


def _split(text: bytes, num_lines: int) -> tuple[bytes, bytes]:
    """The first lines of `text`, and the rest."""
    if num_lines == 0:
        return b"", text
    end = int(np.flatnonzero(np.frombuffer(text, dtype=np.uint8) == ord("\n"))[num_lines - 1]) + 1
    return text[:end], text[end:]
