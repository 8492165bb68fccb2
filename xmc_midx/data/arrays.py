"""Layer 2. Arrays of an .npz file, of which nothing is run and nothing is believed.

Before it: nothing. After it: `npz` and `predictions`. No pickles; an array is read only if its header has the shape and
type that are expected, and only so many bytes as that says, whatever the archive unpacks to.
"""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from xmc_midx.errors import DataError

__all__ = ["ArrayFile", "open_arrays"]

_MAX_HEADER_BYTES = 10_000
_BLOCK_BYTES = 2**20
_KINDS = {"iu": "integers", "fiu": "numbers", "fbiu": "numbers", "SU": "a word"}
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError),
    *(ValueError, NotImplementedError, OverflowError, RuntimeError, KeyError),
)
"""What zipfile and NumPy raise on a damaged file."""


@contextmanager
def open_arrays(path: Path) -> Iterator[ArrayFile]:
    """The arrays of a file; faults of the file that come up in the block are a `DataError` with the path."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield ArrayFile(path, archive)
    except _DAMAGE as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()).rstrip(".")[:80]
        raise DataError(f"{path}: is no .npz file, or a damaged one ({reason}).", hint="Copy it again.") from None


class ArrayFile:
    """An open .npz file."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self._path, self._archive = path, archive
        self.names = frozenset(name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy"))

    def read(
        self, name: str, *, kinds: str, shape: tuple[int | None, ...], most: int, spare: bool = False
    ) -> NDArray[Any]:
        """An array.

        Parameters
        ----------
        name : one of `names`.
        kinds : letters of the dtypes' kinds: `"iu"`, `"fiu"`, `"fbiu"` or `"SU"`.
        shape : expected sizes; None takes any.
        most : entries that are read at most.
        spare : whether there may be more of them than expected.

        Raises
        ------
        DataError : the array is another one.
        """
        with self._archive.open(f"{name}.npy") as stream:
            version = np.lib.format.read_magic(stream)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"array {name} of the version {version}")
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            found, by_columns, dtype = header(stream, max_header_size=_MAX_HEADER_BYTES)
            fits = len(found) == len(shape) and all(
                want is None or size == want or (spare and size > want) for size, want in zip(found, shape, strict=True)
            )
            if dtype.kind not in kinds or dtype.hasobject or not fits:
                raise DataError(
                    f"{self._path}: the array {name!r} is {_shape(found)} of {dtype}, expected {_shape(shape)} of "
                    f"{_KINDS[kinds]}."
                )
            if math.prod(found) > most:
                raise DataError(
                    f"{self._path}: the array {name!r} has {_shape(found)} entries, expected at most {most}."
                )
            content = _read_exactly(stream, math.prod(found) * dtype.itemsize)
        array: NDArray[Any] = np.frombuffer(content, dtype=dtype)
        return array.reshape(found, order="F" if by_columns else "C")


def _shape(sizes: tuple[int | None, ...]) -> str:
    return " x ".join("any" if size is None else str(size) for size in sizes) or "one value"


def _read_exactly(stream: IO[bytes], size: int) -> bytes:
    """The bytes up to the end, where zipfile compares the checksum."""
    content = bytearray()
    while len(content) <= size and (block := stream.read(_BLOCK_BYTES)):
        content += block
    if len(content) != size:
        raise ValueError("an array is not as long as it states")
    return bytes(content)
