"""Text without a header: rows, sizes and comments, against scikit-learn and the strict reader."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.datasets import dump_svmlight_file, load_svmlight_file

from xmc_midx.data import files, table
from xmc_midx.data.check import check_dataset
from xmc_midx.data.convert import convert
from xmc_midx.data.dataset import load_dataset, load_features
from xmc_midx.data.parser import Rules, parse_chunk, parse_lines
from xmc_midx.data.problems import ProblemList, raise_error
from xmc_midx.data.svmlight import read_svmlight, scan_svmlight, write_svmlight
from xmc_midx.errors import DataError

TEXT = b"# made by hand\n0,2 0:1 3:0.5 # first\n\n#\n qid:3 1:-2\n3 4:1.5e-2\n"
FEATURES = [[1, 0, 0, 0.5, 0], [0, 0, 0, 0, 0], [0, -2, 0, 0, 0], [0, 0, 0, 0, np.float32(0.015)]]
LABELS = [[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]


def put(directory: Path, text: bytes, name: str = "train.svm") -> Path:
    path = directory / name
    path.write_bytes(text)
    return path


def test_comments_are_no_rows_and_blank_lines_are(tmp_path: Path) -> None:
    features, labels = read_svmlight(put(tmp_path, TEXT))
    assert features.toarray().tolist() == FEATURES
    assert labels.toarray().tolist() == LABELS


@pytest.mark.parametrize("chunk_bytes", [1, 7, 2**20])
def test_a_message_names_the_line_of_a_row_also_after_comments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", chunk_bytes)
    scan = scan_svmlight(put(tmp_path, TEXT), raise_error)
    assert scan is not None
    assert [scan.features_at.of(row)["line"] for row in range(4)] == [2, 3, 5, 6]
    report = check_dataset(tmp_path)
    lines = {problem.kind: problem.line for problem in report.problems}
    assert (lines["no-features"], lines["no-labels"]) == (3, 3)
    with pytest.raises(DataError, match=r"train\.svm:6: 'x' is not an integer"):
        read_svmlight(put(tmp_path, TEXT.replace(b"4:1.5", b"x:1.5")))


def test_scikit_learn_writes_what_is_read_and_reads_what_is_written(
    tmp_path: Path, random_rows: Callable[..., csr_matrix]
) -> None:
    features = random_rows(211, 30, density=0.2, seed=3)
    labels = csr_matrix(random_rows(211, 9, density=0.3, seed=4) > 0).astype(np.float32)
    path = tmp_path / "sklearn.svm"
    dump_svmlight_file(features, labels, str(path), multilabel=True, zero_based=True, comment="of a test")
    found = read_svmlight(path)
    for matrix, expected in zip(found, (features, labels), strict=True):
        assert (matrix != expected[:, : matrix.shape[1]]).nnz == 0
    own = tmp_path / "own.svm"
    write_svmlight(own, features, labels)
    theirs, targets = load_svmlight_file(str(own), multilabel=True, n_features=30, zero_based=True, dtype=np.float32)
    rows = np.flatnonzero(np.diff(features.indptr) + np.diff(labels.indptr))  # it drops a row without anything
    assert (theirs != features[rows]).nnz == 0
    assert [tuple(map(int, target)) for target in targets] == [tuple(labels[[row]].indices) for row in rows]


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz"])
def test_what_is_written_is_read_back_equal(
    tmp_path: Path, random_rows: Callable[..., csr_matrix], suffix: str
) -> None:
    features, labels = random_rows(5001, 301, density=0.01), csr_matrix(random_rows(5001, 50, density=0.03) > 0)
    path = tmp_path / f"train.svm{suffix}"
    write_svmlight(path, features, labels)
    again = read_svmlight(path)
    assert (again[0] != features).nnz == (again[1] != labels.astype(np.float32)).nnz == 0


# --- Sizes


def test_comments_and_query_ids_do_not_leave_a_chunk_to_the_slow_way(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"{i % 3}{' qid:7' if i % 2 else ''} {i % 5}:1 5:0.5{'  # a # b' if i % 4 < 2 else ''}" for i in range(40)]
    rules = Rules(file="f", num_features=6, num_labels=3, svmlight=True, num_features_source="", num_labels_source="")
    text = ("\n".join(lines) + "\n").encode()
    fast, slow = parse_chunk(text, rules), parse_lines(text, 1, rules, raise_error)
    assert fast is not None
    for field in dataclasses.fields(slow):
        np.testing.assert_array_equal(getattr(fast, field.name), getattr(slow, field.name))
    assert parse_chunk(b"# alone\n" + text, rules) is None, "a line of a comment is no row"


def test_an_empty_split_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("1 2 2\n0,1 0:1 1:1\n")
    (tmp_path / "test.txt").write_text("0 2 2\n")
    with pytest.raises(DataError, match="a split holds no instance"):
        convert(tmp_path, output=tmp_path / "out", format="svmlight")
    assert not (tmp_path / "out").exists()


def test_the_sizes_are_those_of_both_splits_together(tmp_path: Path) -> None:
    put(tmp_path, b"0 5:1\n1 2:1\n")
    put(tmp_path, b"7 1:1\n", "test.svm")
    dataset = load_dataset(tmp_path)
    assert (dataset.num_features, dataset.num_labels) == (6, 8)
    for split in (dataset.train, dataset.test):
        assert split is not None
        assert (split.features.shape[1], split.labels.shape[1]) == (6, 8)
    report = check_dataset(tmp_path)
    assert report.ok
    text = "nothing states the sizes: 6 features and 8 labels are what the largest ids make."
    assert [problem.text for problem in report.problems if problem.kind == "sizes"] == [text]
    assert all(file.statistics is None or file.statistics.num_labels == 8 for file in report.files)


def test_a_header_beside_it_goes_before_the_ids(tmp_path: Path) -> None:
    train = put(tmp_path, b"1 9 9\n0 1:1\n", "train.txt")
    test = put(tmp_path, b"3 4:1\n", "test.svm")
    dataset = load_dataset(tmp_path)
    assert dataset.test is not None and dataset.test.labels.shape == (1, 9)
    assert not [problem for problem in check_dataset(tmp_path).problems if problem.kind == "sizes"]
    put(tmp_path, b"3 9:1\n", "test.svm")
    message = rf"test\.svm: the largest id makes 10 features, expected at most 9 as in {train}\. Is it of the same"
    for data, other in ((tmp_path, None), (train, test)):
        with pytest.raises(DataError, match=message):
            load_dataset(data, test=other)
    assert [problem.kind for problem in check_dataset(tmp_path).problems if problem.level == "error"] == ["sizes"]


def test_a_model_gives_its_sizes_to_rows_that_do_not_state_theirs(tmp_path: Path) -> None:
    path = put(tmp_path, b"0 2:1\n")
    assert load_features(path, 9).shape == (1, 9)
    dataset = load_dataset(path, sizes=(7, 5))
    assert (dataset.num_features, dataset.num_labels) == (7, 5)
    with pytest.raises(DataError, match=r"the largest id makes 3 features, expected at most 2 as the model has"):
        load_features(path, 2)
    with pytest.raises(DataError, match=r"the largest id makes 1 labels, expected at most 0 as the model has"):
        load_dataset(path, sizes=(7, 0))


def test_ids_are_taken_as_they_are_and_ids_from_1_are_only_pointed_out(tmp_path: Path) -> None:
    put(tmp_path, b"".join(b"%d %d:1 %d:1\n" % (i % 3, i, i + 1) for i in range(1, 200)))
    dataset = load_dataset(tmp_path)
    assert dataset.num_features == 201
    assert dataset.train is not None and dataset.train.features.indices.min() == 1
    (problem,) = [problem for problem in check_dataset(tmp_path).problems if problem.kind == "first-id"]
    assert problem.text.startswith("the feature ids may start from 1")
    assert problem.hint == "Ids are taken as they are: feature 0 stays unused."


# --- Two ways, one result


def random_text(rng: random.Random) -> bytes:
    lines = []
    for _ in range(rng.randint(1, 12)):
        labels = ",".join(str(label) for label in rng.sample(range(9), rng.randint(0, 3)))
        pairs = " ".join(f"{i}:{rng.gauss(0, 1):.4g}" for i in rng.sample(range(20), rng.randint(0, 4)))
        lines.append(rng.choice(["", "", "", "#", "# x 1:2"]) or f"{labels} {pairs}" + rng.choice(["", "", " # y"]))
    text = "\n".join([*lines, ""]).encode()
    if rng.random() < 0.5:
        start = rng.randrange(len(text))
        text = text[:start] + rng.choice([b"#", b"\n", b"qid:1", b"-", b":", b"9999999999", b""]) + text[start + 1 :]
    return text


@pytest.mark.fault("R8")
@pytest.mark.parametrize("chunk_bytes", [5, 2**20])
def test_chunks_and_lines_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, record_property: Callable[[str, int], None]
) -> None:
    record_property("count", 300)
    monkeypatch.setattr(files, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(table, "SHORT_BYTES", 0)
    rng = random.Random(chunk_bytes)
    num_read = 0
    for _ in range(300):
        path = put(tmp_path, random_text(rng))
        outcomes = []
        for line_by_line in (False, True):
            found = ProblemList(3)
            scan = scan_svmlight(path, found, line_by_line=line_by_line)
            arrays = [] if scan is None else [scan.features.toarray().tolist(), scan.labels.toarray().tolist()]
            outcomes.append((arrays, scan and scan.features_at.comment_lines.tolist(), found.problems, found.counts))
        assert outcomes[0] == outcomes[1]
        lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
        num_rows = sum(1 for line in lines if b"#" not in line or line.split(b"#")[0].strip())
        if not found.count(level="error"):
            num_read += 1
            assert scan is not None and scan.features.shape[0] == num_rows
    assert 100 < num_read < 290
