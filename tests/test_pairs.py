"""Sparse text with a header of two numbers: what pyxclib writes is read, and what is written is what pyxclib writes."""

from __future__ import annotations

import gzip
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from xmc_midx.data.pairs import read_sparse, scan_pair, write_sparse
from xmc_midx.data.problems import ProblemList, raise_error
from xmc_midx.errors import DataError

MATRIX = csr_matrix(np.array([[0, 0.1, 1], [0, 0, 0], [1e-5, 0, -3e10], [0, 2.5, 0]], dtype=np.float32))
TEXT = b"4 3\n1:0.10000000149011612 2:1.0\n\n0:9.999999747378752e-06 2:-30000001024.0\n1:2.5\n"
"""`MATRIX` as pyxclib's `write_sparse_file` writes it, byte for byte: its commit 5d13086 and NumPy 2 wrote this."""


def assert_equal(found: csr_matrix, expected: csr_matrix) -> None:
    assert found.shape == expected.shape and found.dtype == np.float32
    assert found.indptr.tolist() == expected.indptr.tolist()
    assert found.indices.tolist() == expected.indices.tolist()
    assert found.data.tobytes() == expected.data.tobytes()


def test_the_bytes_are_those_of_pyxclib(tmp_path: Path) -> None:
    path = tmp_path / "trn_X_Xf.txt"
    write_sparse(path, MATRIX)
    assert path.read_bytes() == TEXT
    assert_equal(read_sparse(path), MATRIX)


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz"])
def test_what_is_written_is_read_back_equal(
    tmp_path: Path, random_rows: Callable[..., csr_matrix], suffix: str
) -> None:
    matrix = random_rows(5001, 317, density=0.01)
    matrix.data *= np.float32(10.0) ** np.random.default_rng(0).integers(-30, 30, matrix.nnz).astype(np.float32)
    path = tmp_path / f"x.txt{suffix}"
    write_sparse(path, matrix)
    assert_equal(read_sparse(path), matrix)


def test_pyxclib_itself_reads_and_writes_the_same(tmp_path: Path, random_rows: Callable[..., csr_matrix]) -> None:
    # Its modules warn when they are compiled, which the tests' settings turn into errors: a process of its own.
    if subprocess.run([sys.executable, "-c", "import xclib.data.data_utils"], capture_output=True).returncode:
        pytest.skip("pyxclib is not installed: pip install 'xclib @ git+https://github.com/kunaldahiya/pyxclib'")
    matrix = random_rows(301, 57, density=0.1, seed=1)
    ours, theirs, xmc = tmp_path / "ours.txt", tmp_path / "theirs.txt", tmp_path / "xmc.txt"
    write_sparse(ours, matrix)
    code = (
        "import sys, numpy as np\n"
        "from scipy.sparse import csr_matrix, load_npz, save_npz\n"
        "from xclib.data import data_utils\n"
        "found = data_utils.read_sparse_file(sys.argv[1])\n"
        "data_utils.write_sparse_file(found, sys.argv[2])\n"
        "save_npz(sys.argv[2] + '.npz', found)\n"
        "features, labels, *_ = data_utils.read_data(sys.argv[3])\n"
        "save_npz(sys.argv[3] + '.x.npz', features.astype(np.float32))\n"
        "save_npz(sys.argv[3] + '.y.npz', labels)\n"
    )
    from scipy.sparse import load_npz

    from xmc_midx.data.formats import write_xmc

    labels = csr_matrix(random_rows(301, 23, density=0.1, seed=2) > 0).astype(np.float32)
    write_xmc(xmc, matrix, labels)
    subprocess.run([sys.executable, "-c", code, str(ours), str(theirs), str(xmc)], check=True, capture_output=True)
    assert theirs.read_bytes() == ours.read_bytes()
    assert_equal(csr_matrix(load_npz(f"{theirs}.npz")), matrix)
    assert_equal(read_sparse(theirs), matrix)
    # scikit-learn, which reads XMC text for pyxclib, passes over a row with neither labels nor features.
    rows = np.flatnonzero(np.diff(matrix.indptr) + np.diff(labels.indptr))
    assert_equal(csr_matrix(load_npz(f"{xmc}.x.npz")), csr_matrix(matrix[rows]))
    found = csr_matrix(load_npz(f"{xmc}.y.npz"))[: len(rows)]
    assert (found != labels[rows]).nnz == 0


def put_pair(directory: Path, features: bytes, labels: bytes) -> tuple[Path, Path]:
    paths = directory / "trn_X_Xf.txt", directory / "trn_X_Y.txt"
    for path, text in zip(paths, (features, labels), strict=True):
        path.write_bytes(text)
    return paths


def test_labels_are_what_is_stored_and_not_zero(tmp_path: Path) -> None:
    found = ProblemList(10)
    scan = scan_pair(*put_pair(tmp_path, b"3 2\n0:1\n1:1\n\n", b"3 4\n3:1 0:1.0\n1:0.5 2:0\n\n"), found)
    assert scan is not None
    assert scan.labels.toarray().tolist() == [[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert scan.labels.nnz == 3 and scan.labels.has_canonical_format
    assert [str(problem) for problem in found.problems] == [
        f"{tmp_path}/trn_X_Y.txt:3: 2 labels have a value other than 1, which is read as 1, and 0 as no label; "
        "this is the first."
    ]
    with pytest.raises(DataError, match=r"trn_X_Y\.txt:4: 1 labels have a negative value, expected 1"):
        scan_pair(*put_pair(tmp_path, b"3 2\n0:1\n1:1\n\n", b"3 4\n3:1\n\n2:1 1:-1\n"), raise_error)


def test_files_of_other_numbers_of_rows_are_no_pair(tmp_path: Path) -> None:
    paths = put_pair(tmp_path, b"3 2\n0:1\n1:1\n\n", b"2 4\n3:1\n1:1\n")
    with pytest.raises(
        DataError, match=r"trn_X_Y\.txt:1: there are 2 rows of labels, expected 3 as of features in trn"
    ):
        scan_pair(*paths, raise_error)
    found = ProblemList(1)
    scan = scan_pair(*paths, found)
    assert scan is not None and scan.features.shape[0] == scan.labels.shape[0] == 2
    assert found.count(kind="rows") == 1
    # A file that is cut is one fault, not two.
    found = ProblemList(1)
    scan = scan_pair(*put_pair(tmp_path, b"3 2\n0:1\n1:1\n\n", b"3 4\n3:1\n1:1\n"), found)
    assert scan is not None and scan.features.shape[0] == scan.labels.shape[0] == 2
    assert [problem.text for problem in found.problems] == ["the file ends after 2 instances, the header says 3."]


def test_both_files_are_read_to_the_end_before_anyone_is_told(tmp_path: Path) -> None:
    found = ProblemList(10)
    assert scan_pair(*put_pair(tmp_path, b"1 2 3\n", b"1 4\n9:1"), found) is None
    assert [(Path(p.file).name, p.line, p.kind) for p in found.problems] == [
        ("trn_X_Xf.txt", 1, "header"),
        ("trn_X_Y.txt", 2, "label-range"),
        ("trn_X_Y.txt", 2, "final-newline"),
    ]


@pytest.mark.fault("R8")
def test_a_file_cut_at_every_byte_is_refused_or_has_its_rows(
    tmp_path: Path, record_property: Callable[[str, int], None]
) -> None:
    path = tmp_path / "x.txt"
    taken = []
    for size in range(len(TEXT)):
        path.write_bytes(TEXT[:size])
        try:
            matrix = read_sparse(path)
        except DataError:
            continue
        taken.append(size)
        assert matrix.shape == (4, 3)
        assert_equal(csr_matrix(matrix[:3]), csr_matrix(MATRIX[:3]))
    # Text has no checksum: a cut inside the last number can look whole.
    assert taken and taken[0] > len(TEXT) - len(b"1:2.5\n")
    packed = gzip.compress(TEXT)
    record_property("count", len(TEXT) + len(packed))
    for size in range(len(packed)):
        (tmp_path / "x.txt.gz").write_bytes(packed[:size])
        with pytest.raises(DataError):
            read_sparse(tmp_path / "x.txt.gz")


def test_a_value_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not finite"):
        write_sparse(tmp_path / "x.txt", csr_matrix([[np.inf]]))
    assert not list(tmp_path.iterdir())
