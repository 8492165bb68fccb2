"""Layer 2. Sparse rows, and tables of one byte a number, in as few bytes as they take, without loss.

Before it: training rows, the linear ranker's weights, the model's tables; after it: `rundir`. Columns are numbered by
falling frequency and a row holds the gaps between its columns, most of which are small; integers are cut into their
bytes, all first bytes together, then all second ones; and zlib does the rest. gnd-tib's training rows: 23.6 -> 13.4 MB.
Of a table's codes some are far more frequent than others, and its rows of zeros are runs: debian-deps's default model
37.7 -> 26.9 MB (EXPERIMENTS.md, "The saved model").
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from xmc_midx.threads import in_threads

__all__ = ["pack_rows", "pack_tables", "unpack_rows", "unpack_tables"]

_LEVEL = 4
"""Of zlib: 6 takes twice the time for 2% of the bytes."""
_MOST = 1100
"""Bytes that a byte can become at most, a little more than zlib's 1,032: a file cannot ask for more memory."""
_HEADER = 64
_PACKED, _SHAPE = ".packed", ".shape"
_LARGEST_TABLE = 64 << 20
"""Bytes of a table that is packed: a larger one is mapped from its file, so that only what is used is in memory."""

Arrays = Mapping[str, NDArray[Any]]


def pack_tables(arrays: Arrays) -> dict[str, NDArray[Any]]:
    """What `unpack_tables` makes the arrays of again.

    Parameters
    ----------
    arrays : name -> array.

    Returns
    -------
    The same; but of a table (two dimensions) of int8 or uint8 that is not large, and where it takes fewer bytes,
    `name.packed`, its zlib stream, as an array of its dtype, and `name.shape` (2,) int64.
    """
    found = dict(arrays)
    small = [name for name, array in arrays.items() if _is_packable(array)]
    streams: dict[str, bytes] = {}

    def pack(first: int, last: int) -> None:
        for name in small[first:last]:
            # Codes have frequencies, and runs where rows are zeros, but no other repetitions: to look for these takes
            # four times as long, and finds those by chance.
            deflater = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
            streams[name] = deflater.compress(np.ascontiguousarray(arrays[name]).data) + deflater.flush()

    in_threads(pack, len(small), least=2)
    for name in small:
        if len(streams[name]) < arrays[name].nbytes:
            table = found.pop(name)
            found[name + _PACKED] = np.frombuffer(streams[name], dtype=table.dtype)
            found[name + _SHAPE] = np.array(table.shape, dtype=np.int64)
    return found


def unpack_tables(arrays: Arrays) -> dict[str, NDArray[Any]]:
    """What `pack_tables` was given; a ValueError or LookupError where it is not that."""
    packed = [name.removesuffix(_PACKED) for name in arrays if name.endswith(_PACKED)]
    ours = {name + ending for name in packed for ending in (_PACKED, _SHAPE)}
    found = {name: array for name, array in arrays.items() if name not in ours}

    def unpack(first: int, last: int) -> None:
        for name in packed[first:last]:
            stream, (num_rows, num_columns) = arrays[name + _PACKED], map(int, arrays[name + _SHAPE])
            if num_rows * num_columns > _LARGEST_TABLE:
                raise ValueError(f"{name}: a table of {num_rows} x {num_columns} is not packed")
            data = _decompress(stream.view(np.uint8), num_rows * num_columns)
            # A copy can be written to, as what is mapped: code that is compiled for the one is for the other.
            found[name] = np.frombuffer(data, dtype=stream.dtype).reshape(num_rows, num_columns).copy()

    in_threads(unpack, len(packed), least=2)
    return found


def _is_packable(array: NDArray[Any]) -> bool:
    return array.ndim == 2 and array.dtype in (np.int8, np.uint8) and array.nbytes <= _LARGEST_TABLE


def pack_rows(rows: csr_matrix) -> dict[str, NDArray[Any]]:
    """What `unpack_rows` makes `rows` (R, F) of again.

    Parameters
    ----------
    rows : values of one or two bytes, of any kind; ids in any order.

    Returns
    -------
    `shape` (2,) int64, R and F; and zlib streams (uint8) of integers (uint32 but for the values),
    least significant bytes first: `frequencies` (F,) of the columns, which are numbered anew by falling frequency (of
    equal ones by id); `sizes` (R,) of the rows; `gaps`, of each value's new column to the one before in its row, the
    first to column 0; `values`.
    """
    frequencies = np.bincount(rows.indices, minlength=rows.shape[1])
    numbers = np.empty(rows.shape[1], dtype=rows.indices.dtype)
    numbers[_by_frequency(frequencies)] = np.arange(rows.shape[1], dtype=rows.indices.dtype)
    values = rows.data.view(f"i{rows.data.itemsize}")
    renumbered = csr_matrix((values, numbers[rows.indices], rows.indptr), shape=rows.shape, copy=True)
    renumbered.sort_indices()
    sizes = np.diff(rows.indptr)
    gaps = np.diff(renumbered.indices, prepend=0)
    first = rows.indptr[:-1][sizes > 0]
    gaps[first] = renumbered.indices[first]
    return {
        "shape": np.array(rows.shape, dtype=np.int64),
        "frequencies": _deflate(frequencies.astype("<u4")),
        "sizes": _deflate(sizes.astype("<u4")),
        "gaps": _deflate(gaps.astype("<u4")),
        "values": _deflate(renumbered.data),
    }


def unpack_rows(arrays: Mapping[str, NDArray[Any]], dtype: str) -> csr_matrix:
    """The rows of `pack_rows`, ids rising, values of `dtype`; a ValueError or LookupError where it is not that."""
    num_rows, num_columns = (int(size) for size in arrays["shape"])
    sizes = _inflate(arrays["sizes"], "<u4", num_rows)
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    num_values = int(offsets[-1])
    frequencies = _inflate(arrays["frequencies"], "<u4", num_columns)
    sums = np.cumsum(_inflate(arrays["gaps"], "<u4", num_values), dtype=np.int64)
    columns = sums - np.repeat(np.concatenate([[0], sums])[offsets[:-1]], sizes)
    if num_values and columns.max() >= num_columns:
        raise ValueError("a column is beyond the last")
    kind = np.dtype(dtype)
    values = _inflate(arrays["values"], f"<i{kind.itemsize}", num_values)
    ids = _by_frequency(frequencies).astype(np.int32)[columns]
    rows = csr_matrix((values, ids, offsets), shape=(num_rows, num_columns))
    rows.sort_indices()
    # Compiled code follows these ids without looking: the file must not lead it out of bounds.
    rows.check_format(full_check=True)
    rows.data = rows.data.view(kind)
    return rows


def _by_frequency(frequencies: NDArray[Any]) -> NDArray[np.int64]:
    return np.argsort(-frequencies.astype(np.int64), kind="stable")


def _deflate(values: NDArray[Any]) -> NDArray[np.uint8]:
    planes = np.ascontiguousarray(values.view(np.uint8).reshape(len(values), values.itemsize).T)
    return np.frombuffer(zlib.compress(planes.tobytes(), _LEVEL), dtype=np.uint8)


def _inflate(stream: NDArray[Any], dtype: str, count: int) -> NDArray[Any]:
    data = _decompress(stream, count * np.dtype(dtype).itemsize)
    planes = np.frombuffer(data, dtype=np.uint8).reshape(np.dtype(dtype).itemsize, count)
    return np.array(planes.T, order="C").reshape(-1).view(dtype)


def _decompress(stream: NDArray[Any], size: int) -> bytes:
    """So many bytes of a zlib stream; a ValueError where they are more, fewer or damaged."""
    if stream.dtype != np.uint8 or not 0 <= size <= _MOST * stream.nbytes + _HEADER:
        raise ValueError("sizes do not fit what is packed")
    inflater = zlib.decompressobj()
    try:
        # One byte more than wanted shows that there are more.
        data = inflater.decompress(np.ascontiguousarray(stream).data, size + 1)
    except zlib.error as error:
        raise ValueError(f"what is packed is damaged: {error}") from None
    if len(data) != size or not inflater.eof:
        raise ValueError("sizes do not fit what is packed")
    return data
