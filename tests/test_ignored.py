"""Filter files: what is read of them, and that an evaluation neither predicts nor expects their pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from xmc_midx.data.ignored import read_ignored
from xmc_midx.data.problems import ProblemList
from xmc_midx.errors import DataError
from xmc_midx.metrics import evaluate_topk, without_ignored
from xmc_midx.types import TopK


def test_a_filter_file_is_pairs(tmp_path: Path) -> None:
    path = tmp_path / "filter_labels_test.txt"
    path.write_bytes(b"0 3\n2 1\r\n\n 2\t1 \n0 0\n0 3\n")
    assert read_ignored(path, 3, 4).toarray().tolist() == [[1, 0, 0, 1], [0] * 4, [0, 1, 0, 0]]
    for text in (b"", b"\n\n"):
        path.write_bytes(text)
        assert read_ignored(path, 3, 4).nnz == 0
    found = ProblemList(9)
    path.write_bytes(b"0 4\n3 0\n1 1\n0,1\n-1 0\n1 1 1\n")
    assert read_ignored(path, 3, 4, report=found).nnz == 1
    assert [(p.line, p.kind, p.text) for p in found.problems] == [
        (1, "pair-range", "label 4 is outside 0..3 (the split has 4 labels)."),
        (2, "pair-range", "instance 3 is outside 0..2 (the split has 3 instances)."),
        (4, "token", "'0,1' is not `instance label`."),
        (5, "token", "'-1 0' is not `instance label`."),
        (6, "token", "'1 1 1' is not `instance label`."),
    ]
    with pytest.raises(DataError, match=r"filter_labels_test\.txt:1: label 4 is outside 0\.\.3"):
        read_ignored(path, 3, 4)


def test_a_long_filter_file_is_read_as_by_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xmc_midx.data.files.CHUNK_BYTES", 1000)
    pairs = np.random.default_rng(0).integers(0, [500, 60], (3000, 2))
    path = tmp_path / "filter.txt.gz"
    np.savetxt(path, pairs, fmt="%d")
    expected = np.zeros((500, 60))
    expected[pairs[:, 0], pairs[:, 1]] = 1
    assert (read_ignored(path, 500, 60).toarray() == expected).all()


@pytest.mark.parametrize("seed", range(20))
def test_a_ranking_without_the_pairs_is_the_ranking_of_the_other_labels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_rows, num_labels, depth = (int(n) for n in rng.integers(1, [12, 15, 9]))
    depth = min(depth, num_labels)
    ids = np.stack([rng.permutation(num_labels)[:depth] for _ in range(num_rows)])
    ids[np.arange(depth) >= rng.integers(0, depth + 1, num_rows)[:, None]] = -1  # pads
    scores = np.where(ids < 0, -np.inf, -np.arange(depth)).astype(np.float32)
    labels, ignored = (rng.random((num_rows, num_labels)) < share for share in (0.4, 0.3))
    top, truth = without_ignored(
        TopK(label_ids=ids, scores=scores), csr_matrix(labels, dtype=np.float32), csr_matrix(ignored, dtype=np.float32)
    )
    for row in range(num_rows):
        left = [
            (int(i), float(s)) for i, s in zip(ids[row], scores[row], strict=True) if i >= 0 and not ignored[row, i]
        ]
        pads = [(-1, -np.inf)] * (depth - len(left))
        assert list(zip(top.label_ids[row].tolist(), top.scores[row].tolist(), strict=True)) == left + pads
    assert (truth.toarray() == (labels & ~ignored)).all()
    report = evaluate_topk(top, truth, ks=(1, 3))
    hits = [sum(int(truth[row, i]) for i in top.label_ids[row, :3] if i >= 0) for row in range(num_rows)]
    assert report.metrics["P@3"] == pytest.approx(np.mean(hits) / 3, abs=1e-12)


@pytest.mark.parametrize("mark", [-1.0, 0.5, 2.0])
def test_any_mark_but_0_passes_a_label_over(mark: float) -> None:
    top = TopK(label_ids=np.array([[0, 2]]), scores=np.array([[1.0, 0.0]], dtype=np.float32))
    ignored = csr_matrix((np.array([mark, 0.0]), np.array([0, 2]), np.array([0, 2])), shape=(1, 3))
    found, truth = without_ignored(top, csr_matrix([[1.0, 0.0, 1.0]]), ignored)
    assert truth.toarray().tolist() == [[0.0, 0.0, 1.0]] and found.label_ids.tolist() == [[2, -1]]


def test_pairs_of_other_sizes_are_refused_and_none_change_nothing() -> None:
    top = TopK(label_ids=np.array([[1]]), scores=np.array([[0.0]], dtype=np.float32))
    labels = csr_matrix([[0.0, 1.0]])
    assert without_ignored(top, labels, None) == (top, labels)
    with pytest.raises(DataError, match=r"The ignored labels are \(1, 3\), the true ones \(1, 2\)"):
        without_ignored(top, labels, csr_matrix((1, 3)))
