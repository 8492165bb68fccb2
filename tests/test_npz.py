"""SciPy's matrices on disk: read as text is, with every check, whatever is in the file (R7, R8)."""

from __future__ import annotations

import io
import json
import random
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import coo_matrix, csc_matrix, csr_array, csr_matrix, load_npz, save_npz

from xmc_midx.cli import app
from xmc_midx.data.dataset import load_dataset
from xmc_midx.data.npz import scan_npz, write_npz
from xmc_midx.data.problems import ProblemList, raise_error
from xmc_midx.errors import DataError

X = np.array([[1, 0, 0, 0.5, 0], [0, -2, 0, 0, 0], [0, 0, 0, 0, 0.015]], dtype=np.float32)
Y = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]], dtype=np.float32)
GOOD = {
    "format": np.array(b"csr"),
    "shape": np.array([3, 5]),
    "indptr": np.array([0, 2, 3, 4]),
    "indices": np.array([0, 3, 1, 4]),
    "data": np.array([1, 0.5, -2, 0.015]),
}


def put(directory: Path, *, name: str = "X.trn.npz", without: str = "", **changes: Any) -> Path:
    """A file of `GOOD` with other arrays, beside its sound labels."""
    path = directory / name
    arrays = {key: value for key, value in {**GOOD, **changes}.items() if key != without}
    np.savez(path, **arrays)
    save_npz(directory / "Y.trn.npz", csr_matrix(Y))
    return path


def read(path: Path) -> csr_matrix:
    scan = scan_npz(path, raise_error)
    assert scan is not None
    return scan.matrix


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({}, X),
        ({"format": np.array("csr")}, X),
        ({"data": GOOD["data"].astype(">f4"), "indices": GOOD["indices"].astype(np.uint16)}, X),
        ({"indptr": GOOD["indptr"].astype(np.uint64), "indices": GOOD["indices"].astype(np.int32)}, X),
        ({"data": np.array([True, True, True, False])}, np.sign(np.abs(X)) * [[1, 1, 1, 1, 0]]),
        ({"indices": np.array([3, 0, 1, 4]), "data": np.array([0.5, 1, -2, 0.015])}, X),  # unsorted
        ({"indices": np.array([0, 3, 1, 4, 9, 9]), "data": np.array([1, 0.5, -2, 0.015, np.nan])}, X),  # room for more
        ({"data": np.array([3, 2, 1, 0], dtype=np.int8)}, [[3, 0, 0, 2, 0], [0, 1, 0, 0, 0], [0] * 5]),
    ],
    ids=["plain", "a str", "big-endian", "unsigned", "bool", "unsorted", "integers", "room for more"],
)
def test_reads_what_scipy_may_write(tmp_path: Path, arrays: dict[str, Any], expected: Any) -> None:
    matrix = read(put(tmp_path, **arrays))
    assert matrix.dtype == np.float32 and matrix.nnz == 4  # a stored zero stays
    assert matrix.indices.tolist() == [0, 3, 1, 4]
    np.testing.assert_array_equal(matrix.toarray(), np.asarray(expected, dtype=np.float32))


@pytest.mark.parametrize("make", [csr_matrix, csr_array])
@pytest.mark.parametrize("compressed", [False, True])
def test_reads_what_save_npz_writes(
    tmp_path: Path, random_rows: Callable[..., csr_matrix], make: Any, compressed: bool
) -> None:
    matrix = random_rows(3001, 200, density=0.02)
    save_npz(tmp_path / "a.npz", make(matrix.astype(np.float64)), compressed=compressed)
    found = read(tmp_path / "a.npz")
    assert (found != matrix).nnz == 0 and found.shape == matrix.shape and found.has_canonical_format


def test_what_is_written_is_read_back_equal_by_us_and_by_scipy(
    tmp_path: Path, random_rows: Callable[..., csr_matrix]
) -> None:
    matrix = random_rows(3001, 200, density=0.02)
    path = tmp_path / "a.npz"
    write_npz(path, matrix)
    for found in (read(path), csr_matrix(load_npz(path))):
        assert found.shape == matrix.shape and found.dtype == np.float32
        for name in ("indptr", "indices", "data"):
            assert getattr(found, name).tolist() == getattr(matrix, name).tolist()
    first = path.read_bytes()
    time.sleep(0.01)
    write_npz(path, matrix)
    assert path.read_bytes() == first
    with pytest.raises(DataError, match="not finite"):
        write_npz(path, csr_matrix([[np.nan]]))
    assert path.read_bytes() == first and [entry.name for entry in tmp_path.iterdir()] == ["a.npz"]


NAN, HUGE = np.array([np.nan, 0.5, -np.inf, 1]), np.array([1, 1e39, 1, 1])
DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "negative size": ({"shape": np.array([3, -5])}, ": holds a matrix of 3 x -5, expected sizes up to 2147483647."),
    "huge size": (
        {"shape": np.array([3, 2**31])},
        ": holds a matrix of 3 x 2147483648, expected sizes up to 2147483647",
    ),
    "a shape of three": ({"shape": np.array([3, 5, 1])}, ": the array 'shape' is 3 of int64, expected 2 of integers."),
    "too few rows": ({"shape": np.array([4, 5])}, ": the array 'indptr' is 4 of int64, expected 5 of integers."),
    "far too few rows": (
        {"shape": np.array([2**31 - 1, 5])},
        ": the array 'indptr' is 4 of int64, expected 2147483648",
    ),
    "too many rows": ({"shape": np.array([2, 5])}, ": the array 'indptr' is 4 of int64, expected 3 of integers."),
    "offsets that fall": ({"indptr": np.array([0, 3, 2, 4])}, ": its offsets do not rise from 0, so it is not known"),
    "offsets not from 0": ({"indptr": np.array([1, 2, 3, 4])}, ": its offsets do not rise from 0"),
    "offsets past the end": ({"indptr": np.array([0, 2, 3, 9])}, ": the array 'indices' is 4 of int64, expected 9 of"),
    "a value missing": ({"data": np.ones(3)}, ": the array 'data' is 3 of float64, expected 4 of numbers."),
    "an id past the end": (
        {"indices": np.array([0, 3, 5, 4])},
        ": row 1: feature id 5 is outside 0..4 (the shape has 5 columns). Do the feature ids start from 1?",
    ),
    "ids out of range": (
        {"indices": np.array([0, 7, 2**40, 4])},
        ": row 0: feature id 7 is outside 0..4 (the shape has 5 columns). There are 2 of them.",
    ),
    "a negative id": ({"indices": np.array([0, 3, 1, -1])}, ": row 2: feature id -1 is outside 0..4"),
    "an id beyond int64": (
        {"indices": np.array([0, 3, 2**64 - 1, 4], dtype=np.uint64)},
        ": row 1: feature id 18446744073709551615 is outside 0..4",
    ),
    "an id twice": ({"indices": np.array([3, 3, 1, 4])}, ": row 0: feature id 3 occurs twice, expected once."),
    "NaN and inf": ({"data": NAN}, ": row 0: the value nan of feature id 0 is not finite. There are 2 of them."),
    "1e39": ({"data": HUGE}, ": row 0: the value 1e+39 of feature id 3 is beyond the range of float32."),
    "complex values": ({"data": np.ones(4, complex)}, ": the array 'data' is 4 of complex128, expected 4 of numbers."),
    "ids that are floats": ({"indices": np.ones(4)}, ": the array 'indices' is 4 of float64, expected 4 of integers."),
    "values in two dimensions": ({"data": np.ones((2, 2))}, ": the array 'data' is 2 x 2 of float64, expected 4 of"),
    "an object": (
        {"data": np.array([1, {}, [], ""], dtype=object)},
        ": the array 'data' is 4 of object, expected 4 of",
    ),
    "another format": (
        {"format": np.array(b"bsr")},
        ": holds a matrix of the format b'bsr', expected csr. Save `matrix",
    ),
    "no format": ({"without": "format"}, ": holds data, indices, indptr, shape, expected the arrays data, format,"),
    "no ids": (
        {"without": "indices"},
        ": holds data, format, indptr, shape, expected the arrays data, format, indices",
    ),
}


@pytest.mark.fault("R8")
@pytest.mark.parametrize("case", DAMAGE)
def test_damage_has_its_message_and_exit_code_3(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    changes, message = DAMAGE[case]
    path = put(tmp_path, **changes)
    with pytest.raises(DataError) as caught:
        load_dataset(tmp_path)
    assert str(caught.value).startswith(f"{path}{message}")
    assert app.run(["check", str(tmp_path), "--json"]) == 3
    shown = capsys.readouterr()
    assert shown.err == ""
    problem = next(problem for problem in json.loads(shown.out)["problems"] if problem["level"] == "error")
    assert (problem["file"], problem["line"]) == (str(path), None)
    assert (": row " in message) == (problem["row"] is not None)


def test_a_check_goes_on_without_the_faulty_entries(tmp_path: Path) -> None:
    found = ProblemList(5)
    path = put(
        tmp_path,
        indptr=np.array([0, 3, 3, 6]),
        indices=np.array([4, 9, 4, 0, 1, 2]),
        data=np.array([1, 2, 3, np.nan, 5, 6]),
    )
    scan = scan_npz(path, found, column="label")
    assert scan is not None
    assert scan.matrix.toarray().tolist() == [[0, 0, 0, 0, 1], [0] * 5, [0, 5, 6, 0, 0]]
    assert [(problem.kind, problem.row) for problem in found.problems] == [
        ("label-range", 0),
        ("value", 2),
        ("label-duplicate", 0),
    ]


def test_matrices_of_other_numbers_of_rows_are_no_pair(tmp_path: Path) -> None:
    put(tmp_path)
    save_npz(tmp_path / "Y.trn.npz", csr_matrix(Y[:2]))
    message = r"Y\.trn\.npz: there are 2 rows of labels, expected 3 as of features in X\.trn\.npz\. Are both files of"
    with pytest.raises(DataError, match=message):
        load_dataset(tmp_path)


def test_what_is_no_matrix_is_named(tmp_path: Path) -> None:
    put(tmp_path)
    path = tmp_path / "X.trn.npz"
    for content, message in (
        (b"", "is no .npz file, or a damaged one"),
        (b"PK\x05\x06" + bytes(18), "holds nothing, expected the arrays"),
        (b"1 2 3\n", "is no .npz file, or a damaged one"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"X.trn.npz: {message}"):
            load_dataset(tmp_path)
    for matrix in (csc_matrix(X), coo_matrix(X)):
        save_npz(path, matrix)
        with pytest.raises(
            DataError, match=f"a matrix of the format b'{matrix.format}', expected csr. Save `matrix.tocsr"
        ):
            load_dataset(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=r"X\.trn\.npz: is no \.npz file, or a damaged one \(Is a directory"):
        load_dataset(tmp_path)


@pytest.mark.fault("R7")
def test_an_array_that_states_a_huge_size_costs_no_memory(tmp_path: Path) -> None:
    put(tmp_path)
    path = tmp_path / "X.trn.npz"
    for arrays, name, size, message in (
        (GOOD, "data", 2**60, "the array 'data' has 1152921504606846976 entries, expected at most"),
        (GOOD, "data", 10**30, "the array 'data' has 10+ entries, expected at most"),
        ({**GOOD, "shape": np.array([2**31 - 2, 5])}, "indptr", 2**31 - 1, "an array is not as long as it states"),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            for key, array in arrays.items():
                stream = io.BytesIO()
                np.lib.format.write_array(stream, array)
                content = stream.getvalue()
                if key == name:
                    content = content.replace(b"(4,), }", f"({size},), }}".encode())
                archive.writestr(f"{key}.npy", content)
        began = time.process_time()
        with pytest.raises(DataError, match=message):
            load_dataset(tmp_path)
        assert time.process_time() - began < 2


@pytest.mark.fault("R8")
def test_a_file_cut_at_every_byte_or_with_a_flipped_bit_is_refused_or_harmless(
    tmp_path: Path, record_property: Callable[..., None]
) -> None:
    write_npz(tmp_path / "whole.npz", csr_matrix(X))
    whole = (tmp_path / "whole.npz").read_bytes()
    path = tmp_path / "a.npz"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"a\.npz: "):
            read(path)
    rng, num_harmless = random.Random(0), 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            matrix = read(path)
        except DataError:
            continue
        num_harmless += 1
        np.testing.assert_array_equal(matrix.toarray(), X)
    assert num_harmless < len(whole) / 2  # times, versions and attributes of the archive
    record_property("count", 2 * len(whole))


@pytest.mark.fault("R8")
def test_fuzzed_arrays_are_read_or_refused(tmp_path: Path, record_property: Callable[..., None]) -> None:
    rng = np.random.default_rng(0)
    num_read = 0
    for _ in range(300):
        changes: dict[str, Any] = {}
        for name in rng.choice(["shape", "indptr", "indices", "data"], rng.integers(1, 3), replace=False):
            array = GOOD[name].copy()
            odd = [-1, 0, 1, 2, 3, 4, 5, 2**31, 2**62, np.nan, np.inf, 1e300]
            array = array.astype(rng.choice(["f8", "i8", "i8", "u8", "f4"])) if rng.random() < 0.3 else array
            with np.errstate(all="ignore"):
                value = odd[rng.integers(len(odd))]
                if array.dtype.kind == "f" or np.isfinite(value):
                    array[rng.integers(len(array))] = np.float64(value).astype(array.dtype)
            changes[name] = array[: rng.integers(len(array) + 1)] if rng.random() < 0.1 else array
        path = put(tmp_path, **changes)
        try:
            matrix = read(path)
        except DataError as error:
            assert str(error).startswith(str(path))
            continue
        num_read += 1
        matrix.check_format(full_check=True)
        assert np.isfinite(matrix.data).all()
    assert 20 < num_read < 280
    record_property("count", 300)
