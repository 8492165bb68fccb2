"""Layer 2. The archives of the XMC repository's smallest sets: all instances in one file, and which of them train.

Before it: an unpacked archive; after it: `download` has the two files that `dataset` looks for. `NAME_data.txt` is XMC
text. `NAME_trSplit.txt` and `NAME_tstSplit.txt` hold a row number, counting from 1, in each line and column; a column
is one division of the instances, and the first is taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from xmc_midx.errors import DataError

__all__ = ["divide_folds", "find_folds"]

_SPLITS = {"trSplit": "train.txt", "tstSplit": "test.txt"}


def find_folds(names: Iterable[str]) -> tuple[str, dict[str, str]] | None:
    """The data file and `{"train.txt": its rows' file, "test.txt": ...}` among the names; None where one is missing."""
    by_pattern: dict[str, list[str]] = {}
    for name in names:
        found = re.fullmatch(r"(?:.*/)?[^/]*_(data|trSplit|tstSplit)\.txt", name, re.IGNORECASE)
        if found:
            by_pattern.setdefault(found[1].lower(), []).append(name)
    if any(len(by_pattern.get(kind, [])) != 1 for kind in ("data", "trsplit", "tstsplit")):
        return None
    return by_pattern["data"][0], {target: by_pattern[kind.lower()][0] for kind, target in _SPLITS.items()}


def divide_folds(data: Path, rows_of: dict[Path, Path]) -> None:
    """Write each file of instances that a file of row numbers names.

    Parameters
    ----------
    data : XMC text with a header.
    rows_of : file that is written -> file of row numbers.

    Raises
    ------
    DataError : a row number is none, is out of range, or occurs twice in a split or in both.
    """
    header, *lines = data.read_bytes().splitlines() or [b""]
    numbers = header.removeprefix(b"\xef\xbb\xbf").split()
    while lines and not lines[-1].strip():
        lines.pop()
    is_header = len(numbers) == 3 and all(re.fullmatch(rb"\d{1,18}", number) for number in numbers)
    if not is_header or int(numbers[0]) != len(lines):
        raise DataError(f"{data.name}:1: expected a header of three numbers, the first of them {len(lines)} instances.")
    seen: dict[int, str] = {}
    for target, source in rows_of.items():
        rows = []
        for place, line in enumerate(source.read_bytes().splitlines(), 1):
            fields = line.split()
            if not fields:
                continue
            row = int(fields[0]) if re.fullmatch(rb"\d{1,18}", fields[0]) else 0
            if not 1 <= row <= len(lines):
                shown = fields[0].decode(errors="replace")
                raise DataError(f"{source.name}:{place}: row {shown}, expected a number from 1 to {len(lines)}.")
            if row in seen:
                raise DataError(f"{source.name}:{place}: row {row} stands in {seen[row]} already.")
            seen[row] = f"{source.name}:{place}"
            rows.append(row)
        head = b" ".join([b"%d" % len(rows), *numbers[1:]])
        target.write_bytes(b"\n".join([head, *(lines[row - 1] for row in rows), b""]))
