"""Matrices in memory as data: what they may be, what is said of those that are not, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import bsr_matrix, coo_array, coo_matrix, csc_matrix, csr_array, csr_matrix

from xmc_midx import Predictor, XmcDataset, evaluate, export, load_dataset, resume, train
from xmc_midx.data.check import check_dataset
from xmc_midx.errors import DataError, UsageError, XmcMidxError
from xmc_midx.pipeline import diagnose, plan

QUICK = {"training": {"epochs": 2, "ensemble_size": 1}, "model": {"dim": 8}}
X = np.array([[1, 0, 0, 0.5], [0, -2, 0, 0], [0, 0, 0, 0]], dtype=np.float32)
Y = np.array([[1, 0, 1], [0, 0, 0], [0, 0, 1]], dtype=np.float32)


def both(dataset: XmcDataset) -> tuple[tuple[csr_matrix, csr_matrix], tuple[csr_matrix, csr_matrix]]:
    train_split, test_split = dataset.split("train"), dataset.split("test")
    return (train_split.features, train_split.labels), (test_split.features, test_split.labels)


def with_wide_ids(matrix: csr_matrix) -> csr_matrix:
    """Whose ids and offsets are int64, as SciPy itself would not leave them."""
    matrix.indices, matrix.indptr = matrix.indices.astype(np.int64), matrix.indptr.astype(np.int64)
    return matrix


@pytest.mark.parametrize(
    "make",
    [
        np.asarray,
        lambda a: a.astype(np.float64),
        np.ndarray.tolist,
        csr_matrix,
        csc_matrix,
        coo_matrix,
        coo_array,
        csr_array,
        lambda a: csr_matrix(a.astype(np.float64)),
        lambda a: a.astype(np.float16),
        lambda a: with_wide_ids(csr_matrix(a)),
    ],
)
def test_takes_matrices_of_every_kind(make: Callable[[Any], Any]) -> None:
    dataset = load_dataset((make(X), make(Y)))
    split = dataset.split("train")
    assert split.features.dtype == split.labels.dtype == np.float32 and split.features.has_canonical_format
    assert (split.features.toarray() == X).all() and (split.labels.toarray() == Y).all()
    assert (dataset.num_features, dataset.num_labels, dataset.test) == (4, 3, None)
    expected = XmcDataset.from_matrices((csr_matrix(X), csr_matrix(Y)))
    assert dataset.fingerprint() == expected.fingerprint()


def test_labels_are_what_is_not_zero_and_repeated_entries_are_summed() -> None:
    stored = csr_matrix((np.array([2.0, 0.0, 1.0]), np.array([2, 1, 0]), np.array([0, 2, 2, 3])), (3, 3))
    twice = csr_matrix((np.array([1.0, 2.0, 4.0]), np.array([3, 0, 3]), np.array([0, 3, 3, 3])), (3, 4))
    split = load_dataset((twice, stored)).split()
    assert split.labels.toarray().tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert split.features.toarray()[0].tolist() == [2, 0, 0, 5]
    assert twice.indices.tolist() == [3, 0, 3] and stored.data.tolist() == [2, 0, 1]  # as they were
    split = load_dataset((X, Y.astype(bool))).split()
    assert (split.labels.toarray() == Y).all()


def odd_ids() -> csr_matrix:
    matrix = csr_matrix(X)
    matrix.indices[1] = 4
    return matrix


def odd_offsets(make: Callable[[Any], Any] = csr_matrix) -> Any:
    matrix = make(X)
    matrix.indptr[1] = 1000
    return matrix


def odd_rows(make: Callable[[Any], Any]) -> Any:
    """An id far beyond what there is."""
    matrix = make(X)
    (matrix.row if matrix.format == "coo" else matrix.indices)[0] = 10**6
    return matrix


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        ((X, Y[:2]), r"labels: there are 2 rows of labels, expected 3"),
        ((X,), r"are a tuple of 1; expected a pair"),
        ((X, Y, Y), r"are a tuple of 3; expected a pair"),
        ((X, [[0, 2], [], [2]]), r"labels are of 1 dimensions and object; expected a matrix of numbers"),
        ((X, Y[:, 0]), r"labels are of 1 dimensions and float32"),
        ((X.astype(str), Y), r"features are of 2 dimensions and <U32"),
        ((X.astype(complex), Y), r"features are of 2 dimensions and complex128"),
        ((X[:, :0], Y), r"features: a matrix of 3 x 0"),
        ((X, -Y), r"labels: row 0: 3 labels have a negative value"),
        ((np.where(X == -2, np.nan, X), Y), r"features: row 1: the value nan of feature id 1 is not finite"),
        (
            (np.where(X == -2, 1e300, X.astype(float)), Y),
            r"features: row 1: the value 1e\+300 of feature id 1 is beyond",
        ),
        ((odd_offsets(), Y), r"features: the matrix's offsets do not rise"),
        ((odd_offsets(csc_matrix), Y), r"features: the matrix's offsets do not rise"),
        ((odd_rows(csc_matrix), Y), r"features: the matrix holds ids from 0 to 1000000, expected 0 to 2"),
        ((odd_rows(coo_matrix), Y), r"features: the matrix holds ids from 0 to 1000000, expected 0 to 2"),
        ((odd_rows(lambda a: bsr_matrix(a, blocksize=(1, 2))), Y), r"ids from \d to 1000000, expected 0 to 1"),
        ((odd_ids(), Y), r"features: row 0: feature id 4 is outside 0..3"),
        ((X, Y * np.nan), r"labels: row 0: the value nan of label 0 is not finite"),
    ],
)
def test_says_what_is_wrong_with_them(pair: Any, says: str) -> None:
    with pytest.raises(XmcMidxError, match=says):
        load_dataset(pair)


def test_splits_and_names_fit_one_another() -> None:
    pair = X, Y
    with pytest.raises(DataError, match=r"test features: the matrix has 3 features, expected 4 as in features"):
        XmcDataset.from_matrices(pair, (X[:, :3], Y))
    with pytest.raises(DataError, match=r"test labels: the matrix has 2 labels"):
        XmcDataset.from_matrices(pair, (X, Y[:, :2]))
    with pytest.raises(DataError, match=r"2 label names, expected 3"):
        XmcDataset.from_matrices(pair, label_names=["a", "b"])
    with pytest.raises(DataError, match=r"The name of label 1 is 'b\\nc'; expected text of one line, without tabs"):
        XmcDataset.from_matrices(pair, label_names=["a", "b\nc", "d"])
    with pytest.raises(DataError, match=r"The name of label 0 is '\\ud800'"):
        XmcDataset.from_matrices(pair, label_names=["\ud800", "b", "c"])
    with pytest.raises(UsageError, match="no matrices"):
        XmcDataset.from_matrices(None)
    with pytest.raises(UsageError, match=r"data is a list; expected a path") as caught:
        load_dataset([X, Y])  # type: ignore[arg-type]
    assert "data=(X, Y)" in str(caught.value.hint)
    with pytest.raises(UsageError, match=r"data is a tuple; expected a path") as caught:
        check_dataset(pair)  # type: ignore[arg-type]
    assert caught.value.hint is None
    only_test = XmcDataset.from_matrices(None, pair, name="mine")
    with pytest.raises(DataError, match=r"^mine: has no train split"):
        only_test.split("train")


def test_a_training_of_matrices_is_that_of_their_files(topic_dir: Path, tmp_path: Path) -> None:
    dataset = load_dataset(topic_dir)
    pair, test_pair = both(dataset)
    before = [array.copy() for matrix in pair for array in (matrix.data, matrix.indices, matrix.indptr)]
    train(topic_dir, output=tmp_path / "file", config=QUICK)
    result = train(pair, output=tmp_path / "memory", config=QUICK)
    assert all(
        (a == b).all() for a, b in zip(before, [x for m in pair for x in (m.data, m.indices, m.indptr)], strict=True)
    )
    for name in ("model.safetensors", "interpolation.json", "ranker.safetensors", "neighbors.safetensors"):
        files = [tmp_path / run / name for run in ("file", "memory")]
        assert files[0].exists() == files[1].exists()
        assert not files[0].exists() or files[0].read_bytes() == files[1].read_bytes(), name
    assert result.finished and result.evaluate_on is None
    expected = evaluate(tmp_path / "file", data=topic_dir).report
    for given in (test_pair, XmcDataset.from_matrices(pair, test_pair), dataset):
        assert evaluate(tmp_path / "memory", data=given).report == expected
    with pytest.raises(DataError, match="data in memory has 3 labels; the model"):
        evaluate(tmp_path / "memory", data=(X, Y))


def test_a_run_of_matrices_is_resumed_with_them(topic_dir: Path, tmp_path: Path) -> None:
    pair, test_pair = both(load_dataset(topic_dir))
    run = tmp_path / "run"
    begun = train(pair, output=run, config=QUICK, max_seconds=0.0)
    assert not begun.finished
    with pytest.raises(DataError, match="was trained on data in memory") as caught:
        resume(run)
    assert "data=(X, Y)" in str(caught.value.hint)
    with pytest.raises(DataError, match=r"^data in memory: is not the data that"):
        resume(run, data=test_pair)
    with pytest.raises(UsageError, match=r"holds a run already, an unfinished one") as refused:
        train(pair, output=run, config=QUICK)
    assert f"xmc_midx.resume('{run}', data=(X, Y))" in str(refused.value.hint)
    assert resume(run, data=pair).finished
    train(topic_dir, output=tmp_path / "whole", config=QUICK)
    assert (run / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_matrices_go_with_a_test_file_names_plans_and_exports(topic_dir: Path, tmp_path: Path) -> None:
    given = load_dataset(topic_dir)
    pair, _ = both(given)
    names = [f"topic {label}" for label in range(given.num_labels)]
    dataset = XmcDataset.from_matrices(pair, label_names=names)
    result = train(dataset, output=tmp_path / "run", test=topic_dir / "test.txt", config=QUICK)
    for name, lines in (("train.svm", "0 1:1 5:2\n3 3:1\n"), ("wide.svm", "0 1:1 55:2\n22 3:1\n")):
        (tmp_path / name).write_text(lines)
    wider = load_dataset(load_dataset(tmp_path / "train.svm"), test=tmp_path / "wide.svm")
    assert (wider.num_features, wider.num_labels, wider.split("train").features.shape[1]) == (56, 23, 56)
    with pytest.raises(DataError, match=r"wide.svm: the largest id makes 56 features, expected at most 40"):
        load_dataset(dataset, test=tmp_path / "wide.svm")
    assert result.test is not None and result.evaluate_on == str(topic_dir / "test.txt")
    assert result.test == evaluate(tmp_path / "run", data=topic_dir).report
    with pytest.raises(DataError, match="no such file"):
        train(dataset, output=tmp_path / "none", test=tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match=r"^debtags: no such file"):  # a dataset's name, but no file
        train(dataset, output=tmp_path / "none", test="debtags")
    with pytest.raises(UsageError, match=r"test is a tuple; expected the path of a file"):
        train(pair, output=tmp_path / "none", test=pair)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"^data in memory: has no test split to evaluate on"):
        evaluate(tmp_path / "run", data=XmcDataset.from_matrices(pair))
    assert diagnose(tmp_path / "run", data=dataset, num_instances=20, repeats=2).data == "data in memory"
    assert list(Predictor.load(tmp_path / "run").label_names or ()) == names
    assert plan(pair).config == plan(replace(given, test=None)).config
    exported = export(tmp_path / "run", output=tmp_path / "midx", data=pair)
    assert exported.measured_on == "data in memory" and exported.num_instances > 0
    assert export(tmp_path / "run", output=tmp_path / "bare").measured_on is None
