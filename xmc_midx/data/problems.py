"""Layer 2. What is wrong with a data file, and who hears of it: a reader that stops or a check that goes on.

Before it: nothing. After it: `files`, `parser` and `formats` report every fault through a `Report`, so that
one pass over a file serves both `load_dataset` (the first error is raised) and `check_dataset` (all are
counted, some of each kind kept).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from xmc_midx.errors import DataError

__all__ = ["Problem", "ProblemList", "Report", "excerpt", "json_kind", "raise_error", "shown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One fault of one file."""

    level: Literal["error", "warning"] = "error"
    """An error makes the file unusable; a warning is worth a look."""
    kind: str
    """Short name of the kind of fault, such as `feature-range`; `ProblemList` limits and counts by it."""
    file: str
    line: int | None = None
    """Counted from 1; None where the fault is the whole file's, or the file has no lines."""
    row: int | None = None
    """Of a matrix, counted from 0; None where the file has lines."""
    text: str
    """Fact and expectation."""
    hint: str | None = None

    @property
    def place(self) -> str:
        """`file`, `file:line` or `file: row N`."""
        if self.row is not None:
            return f"{self.file}: row {self.row}"
        return self.file if self.line is None else f"{self.file}:{self.line}"

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


Report = Callable[[Problem], None]
"""Receives each problem in the order of the file. One that returns asks the reader to go on as it can."""


def raise_error(problem: Problem) -> None:
    """The `Report` of a reader: the first error ends it, warnings pass.

    Raises
    ------
    DataError : always, for an error.
    """
    if problem.level == "error":
        raise DataError(str(problem), hint=problem.hint)


class ProblemList:
    """The `Report` of a check: keeps the first `limit` of each kind in each file and counts them all."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.problems: list[Problem] = []
        self.counts: Counter[tuple[str, str, str]] = Counter()
        """(level, file, kind) -> number of problems, with those that were not kept."""

    def __call__(self, problem: Problem) -> None:
        key = (problem.level, problem.file, problem.kind)
        self.counts[key] += 1
        if self.counts[key] <= self.limit:
            self.problems.append(problem)

    def count(self, *, level: str | None = None, file: str | None = None, kind: str | None = None) -> int:
        """Number of problems of a level, file and kind; None means any."""
        wanted = (level, file, kind)
        return sum(
            number
            for key, number in self.counts.items()
            if all(want is None or want == part for want, part in zip(wanted, key, strict=True))
        )


def excerpt(text: bytes, limit: int = 40) -> str:
    """`text` as it may stand in a message: printable, quoted, at most about `limit` characters long."""
    shown = ascii(text[:limit].decode("latin-1"))
    return shown if len(text) <= limit else f"{shown[:-1]}...'"


def shown(text: str) -> str:
    """`text` as `excerpt` shows bytes, in its own letters where they can be printed."""
    start = text if len(text) <= 40 else f"{text[:40]}..."
    return repr(start) if start.isprintable() else ascii(start)


def json_kind(value: Any) -> str:
    """What a JSON value is, for a message."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() | float():
            return f"the number {str(value)[:40]}"
        case str():
            return f"the string {shown(value)}"
        case list():
            return "a list"
    return "an object"
