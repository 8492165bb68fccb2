"""Claims about `xmc_midx.data.predictions` and `arrays`: every format says the same, and what is wrong is refused.

XMC text alone is in `test_formats.py`.
"""

from __future__ import annotations

import gzip
import io
import re
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csc_matrix, csr_matrix, save_npz

from xmc_midx.cli.answers import Format, NpzWriter, lines
from xmc_midx.data import predictions as module
from xmc_midx.data.predictions import read_predictions, write_predictions
from xmc_midx.errors import DataError, XmcMidxError
from xmc_midx.pipeline import evaluate
from xmc_midx.types import TopK

NUM_LABELS = 30


def random_top(seed: int, *, num_rows: int = 17, k: int = 5) -> TopK:
    """Ranked labels: ties, short and empty rows."""
    rng = np.random.default_rng(seed)
    ids, scores = np.full((num_rows, k), -1, dtype=np.int64), np.full((num_rows, k), -np.inf, dtype=np.float32)
    for row in range(num_rows):
        size = int(rng.integers(0, k + 1)) if row % 3 else k
        labels = rng.choice(NUM_LABELS, size, replace=False)
        values = (rng.integers(-3, 3, size) / 7).astype(np.float32)
        order = np.lexsort((labels, -values))
        ids[row, :size], scores[row, :size] = labels[order], values[order]
    return TopK(label_ids=ids, scores=scores)


def entries(top: TopK) -> list[tuple[int, int, int, float]]:
    """(instance, rank, label, score)."""
    return [
        (row, rank, int(label), float(score))
        for row, (ids, scores) in enumerate(zip(top.label_ids, top.scores, strict=True))
        for rank, (label, score) in enumerate(zip(ids, scores, strict=True), start=1)
        if label >= 0
    ]


def as_table(top: TopK, path: Path, columns: str, *, head: bool, seed: int | None = None) -> Path:
    """TSV with columns given by their initials, lines shuffled where there is a seed."""
    names = {"i": "instance", "r": "rank", "l": "label", "s": "score", "n": "name"}
    lines = [
        "\t".join({"i": f"{i}", "r": f"{r}", "l": f"{label}", "s": f"{s!r}", "n": "a:b c"}[c] for c in columns)
        for i, r, label, s in entries(top)
    ]
    if seed is not None:
        lines = np.random.default_rng(seed).permutation(lines).tolist()
    content = "".join(f"{line}\n" for line in [*(["\t".join(names[c] for c in columns)] if head else []), *lines])
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


def as_matrix(top: TopK, path: Path, *, seed: int = 0) -> Path:
    """What SciPy saves of a CSR matrix whose ids are in no order, as PECOS's are."""
    rng = np.random.default_rng(seed)
    rows = [[(label, score) for i, _, label, score in entries(top) if i == row] for row in range(len(top.label_ids))]
    rows = [[row[n] for n in rng.permutation(len(row))] for row in rows]
    pairs = [pair for row in rows for pair in row]
    matrix = csr_matrix(
        (
            np.array([score for _, score in pairs], dtype=np.float32),
            np.array([label for label, _ in pairs], dtype=np.int32),
            np.cumsum([0, *map(len, rows)]),
        ),
        shape=(len(rows), NUM_LABELS),
    )
    save_npz(path, matrix)
    return path


def as_predict_writes(top: TopK, path: Path, form: Format, names: list[str] | None = None) -> None:
    if form is Format.NPZ:
        writer = NpzWriter(path.parent, top.label_ids.shape[1])
        writer.add(top)
        with path.open("wb") as stream:
            writer.finish(stream)
        return
    text = "".join(lines(0, top, names, form)).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


WRITERS: dict[str, Callable[[TopK, Path], Path | None]] = {
    "ours.tsv": lambda top, path: as_predict_writes(top, path, Format.TSV),
    "named.tsv.gz": lambda top, path: as_predict_writes(top, path, Format.TSV, [f"x:{n}\t" for n in range(NUM_LABELS)]),
    "ours.jsonl": lambda top, path: as_predict_writes(top, path, Format.JSONL),
    "named.jsonl.gz": lambda top, path: as_predict_writes(
        top, path, Format.JSONL, [f"{n}\n" for n in range(NUM_LABELS)]
    ),
    "ours.xmc": lambda top, path: as_predict_writes(top, path, Format.XMC),
    "ours.npz": lambda top, path: as_predict_writes(top, path, Format.NPZ),
    "headed.txt.xz": lambda top, path: write_predictions(path, top, NUM_LABELS),
    "csr.npz": as_matrix,
    "three.tsv": lambda top, path: as_table(top, path, "ils", head=False, seed=1),
    "three.head": lambda top, path: as_table(top, path, "ils", head=True, seed=2),
    "four.tsv.gz": lambda top, path: as_table(top, path, "irls", head=False, seed=3),
    "five.tsv": lambda top, path: as_table(top, path, "irlsn", head=True),
    "other order": lambda top, path: as_table(top, path, "snlri", head=True, seed=4),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_is_read_back_to_the_same_ranking(name: str, tmp_path: Path) -> None:
    for seed in range(6):
        top = random_top(seed)
        WRITERS[name](top, tmp_path / name)
        found = read_predictions(tmp_path / name, NUM_LABELS, num_instances=17)
        np.testing.assert_array_equal(found.label_ids, top.label_ids)
        np.testing.assert_array_equal(found.scores, top.scores)
        best = read_predictions(tmp_path / name, NUM_LABELS, num_instances=17, k=2)
        np.testing.assert_array_equal(best.label_ids, top.label_ids[:, :2])


def test_every_format_gives_the_same_metrics(topic_dir: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    ids = np.stack([rng.choice(23, 5, replace=False) for _ in range(150)])
    scores = -np.sort(-rng.normal(size=(150, 5)).astype(np.float32), axis=1)
    top = TopK(label_ids=ids, scores=scores)
    reports = []
    for name, make in WRITERS.items():
        if name in ("csr.npz", "named.tsv.gz", "named.jsonl.gz", "headed.txt.xz"):
            continue  # made for 30 labels
        make(top, tmp_path / name)
        reports.append(evaluate(None, data=topic_dir, predictions=tmp_path / name).as_dict())
    rows = np.repeat(np.arange(150), 5)
    save_npz(tmp_path / "m.npz", csr_matrix((scores.ravel(), (rows, ids.ravel())), shape=(150, 23)))
    reports.append(evaluate(None, data=topic_dir, predictions=tmp_path / "m.npz").as_dict())
    assert len(reports) == 10 and reports[0]["metrics"]["P@5"] > 0
    assert all(report == reports[0] for report in reports)


def test_stated_ranks_win_where_scores_are_equal(tmp_path: Path) -> None:
    path = tmp_path / "p.tsv"
    path.write_text("0\t1\t7\t0.5\n0\t2\t3\t0.5\n0\t4\t1\t0.25\n")
    assert read_predictions(path, 9).label_ids.tolist() == [[7, 3, 1]]
    path.write_text("0\t7\t0.5\n0\t3\t0.5\n0\t1\t0.25\n")
    assert read_predictions(path, 9).label_ids.tolist() == [[3, 7, 1]]
    tied = {
        "label_ids": np.array([[7, 3, -1, 1], [2, -1, 8, 0]]),
        "scores": np.array([[0.5, 0.5, 0, 0.25], [0, 0, 0, 1]]),
    }
    np.savez(tmp_path / "p.npz", **tied)
    assert read_predictions(tmp_path / "p.npz", 9).label_ids.tolist() == [[7, 3, 1], [0, 2, 8]]


def test_instances_that_a_table_does_not_name_have_no_predictions(tmp_path: Path) -> None:
    path = tmp_path / "p.tsv"
    path.write_text("2\t7\t0.5\r\n0\t3\t1e-3")
    assert read_predictions(path, 9).label_ids.tolist() == [[3], [-1], [7]]
    assert read_predictions(path, 9, num_instances=5).label_ids.tolist() == [[3], [-1], [7], [-1], [-1]]
    path.write_text("instance\tlabel\tscore\n")
    assert read_predictions(path, 9, num_instances=2).label_ids.shape == (2, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0\t3\t1\n0\t9\t1\n", ":2: label 9 is outside 0..8. Are these the predictions of another data set?"),
        ("0\t3\t1\n2\t3\t1\n", ":2: instance 2 is outside 0..1. Instances count from 0."),
        ("0\t3\t1\n0\tx\t1\n", ":2: the label is 'x', expected a whole number."),
        ("0\t-1\t1\n", ":1: the label is '-1', expected a whole number."),
        (f"0\t{'9' * 5000}\t1\n", ":1: label 9999"),
        ("0\t3\tnan\n", ":1: the score 'nan' of label 3 is not finite in float32."),
        ("0\t3\t1e39\n", ":1: the score '1e39' of label 3 is not finite in float32."),
        ("0\t3\t\n", ":1: the score of label 3 is '', expected a number."),
        ("0\t3\t1\n0\t4\t1\n0\t3\t2\n", ":3: label 3 of instance 0 occurs twice, expected once."),
        ("0\t3\t1\n\n0\t4\t1\n", ":2: has 1 columns, expected 3 as the first line has."),
        ("0\t1\t3\t1\n0\t4\t1\n", ":2: has 3 columns, expected 4"),
        ("0\t1\t3\t1\n0\t1\t4\t1\n", ":2: rank 1 of instance 0 occurs twice, expected once."),
        ("0\t1\t3\t1\n0\t2\t4\t2\n", ":2: rank 2 of instance 0 has a higher score than the rank before it."),
        ("0\t1\t3\t1\tx\ty\n", ":1: has 6 columns, expected instance, label, score or instance, rank"),
        ("doc\tlabel\tscore\n0\t3\t1\n", ":1: has the columns 'doc', 'label', 'score', expected instance,"),
        ("label\tlabel\tscore\n", ":1: has the columns 'label', 'label', 'score', expected instance,"),
    ],
)
def test_a_table_that_is_wrong_is_refused_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.tsv"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_predictions(path, 9, num_instances=2)
    assert str(caught.value).startswith(f"{path}{message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("instance,label,score\n0,1,2\n", ":1: 'instance,label,score' is neither `label:score label:score ...` nor"),
        ("[[1, 2], [3]]", "--format xmc, tsv, jsonl or npz."),
        ("0,1\t2\n", "Separate the columns by tabs."),
    ],
)
def test_another_format_is_refused_with_those_that_are_read(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_predictions(path, 9, num_instances=2)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"instance": 0, "labels": [{"label": 9, "score": 1}]}', ":1: label 9 is outside 0..8. Are these"),
        ('{"instance": 0, "labels": [{"label": -1, "score": 1}]}', ":1: label -1 is outside 0..8. Are these"),
        ('{"instance": 2, "labels": []}', ":1: instance 2 is outside 0..1. Instances count from 0."),
        ('{"instance": true, "labels": []}', ":1: the instance is true, expected a whole number."),
        ('{"labels": []}', ":1: the instance is null, expected a whole number."),
        ('{"instance": 1.0, "labels": []}', ":1: the instance is the number 1.0, expected a whole number."),
        ('{"instance": 1}', ':1: "labels" is null, expected a list of objects.'),
        ('{"instance": 1, "labels": [7]}', ':1: "labels" holds the number 7, expected objects.'),
        ('{"instance": 1, "labels": [{"label": 7}]}', ":1: the score of label 7 is null, expected a number."),
        ('{"instance": 1, "labels": [{"label": 7, "score": NaN}]}', ":1: the score 'nan' of label 7 is not finite"),
        ('{"instance": 1, "labels": [{"label": 7, "score": 1e39}]}', ":1: the score '1e+39' of label 7 is not finite"),
        ('{"instance": 1, "labels": []}\n{"instance": 1, "labels": []}', ":2: instance 1 stands in line 1 too"),
        ('{"instance": 1, "labels": [{"label": 7, "score": 1}, {"label": 7, "score": 1}]}', ":1: label 7 occurs twice"),
        (
            '{"instance": 1, "labels": [{"label": 7, "score": 1}, {"label": 6, "score": 2}]}',
            ":1: rank 2 of instance 1 has a higher score than the rank before it.",
        ),
        ('{"instance": 1, "labels": []}\n\n{}', ":2: '' is not JSON, expected an object a line."),
        ('{"instance": 1, "labels": []}\n[1]', ":2: is a list, expected an object a line."),
        ('{"instance": 1, "labels": [', ':1: \'{"instance": 1, "labels": [\' is not JSON'),
        ('{"instance": 1, "labels": ' + 5000 * "[", ':1: \'{"instance": 1, "labels": [['),
        (f'{{"instance": {5000 * "9"}, "labels": []}}', ":1: "),
    ],
)
def test_json_lines_that_are_wrong_are_refused_with_their_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f"{text}\n")
    with pytest.raises(DataError) as caught:
        read_predictions(path, 9, num_instances=2)
    assert str(caught.value).startswith(f"{path}{message}")


def test_instances_in_json_lines_may_come_in_any_order_and_some_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"instance": 2, "labels": [{"label": 1, "score": 3}]}\n{"instance": 0, "labels": [], "x": [{}]}\n')
    assert read_predictions(path, 9).label_ids.tolist() == [[-1], [-1], [1]]
    assert read_predictions(path, 9, num_instances=4).label_ids.tolist() == [[-1], [-1], [1], [-1]]


GOOD = {
    "label_ids": np.array([[3, 1], [2, -1]]),
    "scores": np.array([[1.0, 0.5], [0.25, -np.inf]], dtype=np.float32),
}
MATRIX = {
    "format": np.array(b"csr"),
    "shape": np.array([2, 9]),
    "indptr": np.array([0, 2, 3]),
    "indices": np.array([3, 1, 2]),
    "data": np.array([1.0, 0.5, 0.25]),
}


@pytest.mark.parametrize("arrays", [GOOD, MATRIX, dict(reversed(MATRIX.items()))])
def test_arrays_that_are_right(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "p.npz", **arrays)
        assert read_predictions(tmp_path / "p.npz", 9, num_instances=2).label_ids.tolist() == [[3, 1], [2, -1]]
    # By its content, whatever it is called.
    (tmp_path / "p.npz").rename(tmp_path / "scores")
    assert read_predictions(tmp_path / "scores", 9).label_ids.tolist() == [[3, 1], [2, -1]]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (GOOD | {"label_ids": np.array([[3, 9], [2, -1]])}, "instance 0: label 9 is outside 0..8."),
        (GOOD | {"label_ids": np.array([[3, 1], [2, -2]])}, "instance 1: label -2 is outside 0..8."),
        (GOOD | {"label_ids": np.array([[3, 3], [2, -1]])}, "instance 0: label 3 occurs twice, expected once."),
        (GOOD | {"label_ids": np.array([[3, 1]])}, "the array 'label_ids' is 1 x 2 of int64, expected 2 x any of"),
        (GOOD | {"label_ids": np.array([[3.0, 1], [2, -1]])}, "is 2 x 2 of float64, expected 2 x any of integers."),
        (GOOD | {"scores": np.ones((2, 3))}, "the array 'scores' is 2 x 3 of float64, expected 2 x 2 of numbers."),
        (GOOD | {"scores": np.array([[np.nan, 0.5], [0.2, 0]])}, "the score nan of label 3 is not finite in float32."),
        (GOOD | {"scores": np.array([[1e39, 0.5], [0.2, 0]])}, "the score 1e+39 of label 3 is not finite in float32."),
        ({"scores": GOOD["scores"]}, "holds scores; expected label_ids and scores, or a CSR matrix of scores."),
        ({"data": np.ones(3)}, "holds data; expected label_ids and scores"),
        (MATRIX | {"format": np.array(b"csc")}, "holds a matrix of the format csc, expected csr."),
        (MATRIX | {"shape": np.array([2, 8])}, "holds a matrix of 2 x 8, expected 2 instances x 9 labels."),
        (MATRIX | {"shape": np.array([3, 9])}, "holds a matrix of 3 x 9, expected 2 instances x 9 labels."),
        (MATRIX | {"indptr": np.array([0, 3, 2])}, "its offsets do not rise from 0"),
        (MATRIX | {"indptr": np.array([0, 3])}, "the array 'indptr' is 2 of int64, expected 3 of integers."),
        (MATRIX | {"indices": np.array([3, 1])}, "the array 'indices' is 2 of int64, expected 3 of integers."),
        (MATRIX | {"indices": np.array([3, 3, 1])}, "instance 0: label 3 occurs twice"),
        (MATRIX | {"data": np.array([1, np.inf, 0.0])}, "instance 0: the score inf of label 1 is not finite"),
    ],
)
@pytest.mark.fault("R7")
def test_arrays_that_are_wrong_are_refused(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError) as caught:
        read_predictions(path, 9, num_instances=2)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return open, ("ran", "w")


def bomb(path: Path, header: bytes, *, body: bytes = b"") -> None:
    """An .npz whose `label_ids` states a header of its own."""
    content = io.BytesIO()
    np.lib.format.write_array(content, GOOD["scores"])
    text = header + b" " * (64 - (10 + len(header) + 1) % 64) + b"\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("label_ids.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body)
        archive.writestr("scores.npy", content.getvalue())


@pytest.mark.fault("R7")
def test_no_pickle_is_loaded_and_no_size_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "p.npz"
    np.savez(path, label_ids=np.array([[Evil(), 1], [2, 3]], dtype=object), scores=GOOD["scores"])
    with pytest.raises(DataError, match="of object, expected 2 x any of integers"):
        read_predictions(path, 9, num_instances=2)
    assert not (tmp_path / "ran").exists()
    for header, message in (
        (b"{'descr': '<i8', 'fortran_order': False, 'shape': (2, 1152921504606846976)}", "expected at most"),
        (b"{'descr': '<i8', 'fortran_order': False, 'shape': (2, 99999)}", "not as long as it states"),
        (b"{'descr': '<i8', 'fortran_order': False, 'shape': (2, -1)}", "damaged one"),
        (b"{'descr': '|O', 'fortran_order': False, 'shape': (2, 1)}", "of object"),
        (b"__import__('os').mkdir('ran')", "damaged one"),
    ):
        bomb(path, header)
        with pytest.raises(DataError, match=message):
            read_predictions(path, 9, num_instances=2)
    # 100 MB of zeros in 100 kB, behind an array of 32 bytes: read up to its end, not unpacked.
    bomb(path, b"{'descr': '<i8', 'fortran_order': False, 'shape': (2, 2)}", body=b"\0" * 100_000_000)
    tracemalloc.start()
    with pytest.raises(DataError, match="not as long as it states"):
        read_predictions(path, 9, num_instances=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no archive at all"])
def test_a_damaged_archive_is_said(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "p.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"is no \.npz file, or a damaged one"):
        read_predictions(path, 9)
    with pytest.raises(DataError, match=r"No such file"):
        read_predictions(tmp_path / "q.npz", 9)


def test_another_sparse_format_is_named(tmp_path: Path) -> None:
    save_npz(tmp_path / "p.npz", csc_matrix(np.eye(9, dtype=np.float32)))
    with pytest.raises(DataError, match=re.escape("of the format csc, expected csr. Save `matrix.tocsr()`.")):
        read_predictions(tmp_path / "p.npz", 9)


@pytest.mark.parametrize("name", ["ours.tsv", "ours.jsonl", "ours.npz", "csr.npz"])
def test_one_very_long_row_does_not_fill_the_memory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = random_top(0, num_rows=40, k=5)
    WRITERS[name](top, tmp_path / name)
    monkeypatch.setattr(module, "MAX_ENTRIES", 199)
    with pytest.raises(DataError, match="expected at most 199"):
        read_predictions(tmp_path / name, NUM_LABELS, num_instances=40)


@pytest.mark.parametrize("name", ["ours.tsv", "ours.jsonl", "ours.npz", "csr.npz"])
@pytest.mark.parametrize("num_files", [150, pytest.param(3_000, marks=pytest.mark.soak)])
@pytest.mark.fault("R8")
def test_fuzzed_files_are_read_or_refused(
    name: str, num_files: int, tmp_path: Path, record_property: Callable[..., None]
) -> None:
    rng = np.random.default_rng(4)
    path = tmp_path / name
    num_read = 0
    for case in range(num_files):
        WRITERS[name](random_top(case, num_rows=6, k=3), path)
        content = bytearray(path.read_bytes())
        place = int(rng.integers(len(content)))
        if rng.random() < 0.6:
            content[place] ^= 1 << int(rng.integers(8))
        else:
            del content[place : place + int(rng.integers(1, 9))]
        path.write_bytes(bytes(content))
        try:
            top = read_predictions(path, NUM_LABELS, num_instances=6)
        except XmcMidxError as error:
            assert str(path) in str(error)
            continue
        num_read += 1
        assert len(top.label_ids) == 6 and ((top.label_ids >= -1) & (top.label_ids < NUM_LABELS)).all()
        assert (np.isfinite(top.scores) == (top.label_ids >= 0)).all()
        assert (top.scores[:, 1:] <= top.scores[:, :-1]).all()
    assert num_read < 0.95 * num_files
    record_property("count", num_files)


@pytest.mark.parametrize(
    "text", ["0\t1\t0.5\n1\t0\t0.5\n", '{"instance": 0, "labels": []}\n{"instance": 1, "labels": []}\n']
)
def test_blank_lines_at_the_end_are_no_predictions(text: str, tmp_path: Path) -> None:
    path = tmp_path / "p"
    for end in ("", "\n", "\r\n \n"):
        path.write_bytes((text + end).encode())
        assert read_predictions(path, 3).label_ids.shape[0] == 2
    path.write_text(text.replace("\n", "\n\n"))
    with pytest.raises(DataError, match="p:2: "):
        read_predictions(path, 3)
    path.write_text("")
    with pytest.raises(DataError, match="p:1: the file ends after 0 instances"):
        read_predictions(path, 3, num_instances=2)
