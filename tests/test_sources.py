"""What a file, a pair or a directory is; that a split is the same in every format; filter files and maps beside it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from xmc_midx import pipeline
from xmc_midx.cli import app
from xmc_midx.config import load_config
from xmc_midx.data import cache, dataset
from xmc_midx.data.check import check_dataset
from xmc_midx.data.dataset import load_dataset, load_features, load_split
from xmc_midx.data.formats import write_xmc
from xmc_midx.data.npz import write_npz
from xmc_midx.data.pairs import write_sparse
from xmc_midx.data.sources import Source, source_of, stem_of
from xmc_midx.data.svmlight import write_svmlight
from xmc_midx.errors import DataError

FORMATS = ("xmc", "pair", "svmlight", "npz")
FEATURE_FILES = {"xmc": "{}.txt", "pair": "{}_X_Xf.txt", "svmlight": "{}.svm", "npz": "X.{}.npz"}


def feature_file(form: str, split: str) -> str:
    word = split if form in ("xmc", "svmlight") else {"train": "trn", "test": "tst"}[split]
    return FEATURE_FILES[form].format(word)


def write_split(directory: Path, form: str, split: str, features: csr_matrix, labels: csr_matrix) -> None:
    path = directory / feature_file(form, split)
    if form == "xmc":
        write_xmc(path, features, labels)
    elif form == "svmlight":
        write_svmlight(path, features, labels)
    elif form == "pair":
        write_sparse(path, features)
        write_sparse(path.with_name(path.name.replace("_X_Xf", "_X_Y")), labels)
    else:
        write_npz(path, features)
        write_npz(path.with_name(path.name.replace("X.", "Y.")), labels)


@pytest.fixture(scope="module")
def directories(
    tmp_path_factory: pytest.TempPathFactory, topic_data: Callable[..., tuple[csr_matrix, csr_matrix]]
) -> dict[str, Path]:
    """The same two splits in each format; all labels and features occur."""
    place = tmp_path_factory.mktemp("formats")
    paths = {}
    for form in FORMATS:
        paths[form] = place / form
        paths[form].mkdir()
        for split, number, seed in (("train", 320, 0), ("test", 150, 1)):
            features, labels = topic_data(number, seed=seed)
            labels = labels.tolil()
            labels[7, 22] = 1.0
            write_split(paths[form], form, split, features, csr_matrix(labels))
    return paths


# --- One split, four formats


def test_every_format_gives_the_same_matrices(directories: dict[str, Path]) -> None:
    fingerprints = {load_dataset(path).fingerprint() for path in directories.values()}
    assert len(fingerprints) == 1
    for form, path in directories.items():
        split = load_split(path / feature_file(form, "test"))
        assert split.source.format == form
        assert split.features.has_canonical_format and split.labels.has_canonical_format
        assert split.features.dtype == split.labels.dtype == np.float32
        assert (load_features(path / feature_file(form, "test"), 40) != split.features).nnz == 0


def test_every_format_trains_the_same_model_and_is_evaluated_and_predicted_alike(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    config = load_config(None, assignments=["training.epochs=1", "model.dim=8", "data.validation_fraction=0.1"])
    models, figures, answers = set(), set(), set()
    for form, path in directories.items():
        result = pipeline.train(path, output=tmp_path / form, config=config, test=path / feature_file(form, "test"))
        assert result.test is not None
        models.add((Path(result.best) / "model.safetensors").read_bytes())
        # A model of another format, a directory and a single file.
        for data in (path, path / feature_file(form, "test")):
            report = pipeline.evaluate(tmp_path / "xmc", data=data).report
            figures.add(json.dumps([dict(report.metrics), report.num_instances]))
        figures.add(json.dumps([dict(result.test.metrics), result.test.num_instances]))
        top = pipeline.predict(tmp_path / "xmc", input=path / feature_file(form, "test"), k=3).top
        answers.add((top.label_ids.tobytes(), top.scores.tobytes()))
    assert len(models) == len(figures) == len(answers) == 1


def test_a_check_says_the_same_of_every_format(directories: dict[str, Path]) -> None:
    found = []
    for form, path in directories.items():
        report = check_dataset(path)
        statistics = [file.statistics for file in report.files if file.statistics]
        # The first place of a kind: the row, from 0.
        places = sorted(
            (p.kind, p.text, p.row if form == "npz" else p.line and p.line - 2 + (form == "svmlight"))
            for p in report.problems
            if p.kind != "sizes"
        )
        assert [file.path for file in report.files if file.statistics] == [
            str(path / feature_file(form, split)) for split in ("train", "test")
        ]
        found.append((statistics, places, report.num_test_in_train, report.propensity))
    assert all(other == found[0] for other in found)
    assert {"no-labels", "no-features"} <= {kind for kind, _, _ in found[0][1]}


def test_a_pair_is_parsed_once_and_again_when_either_file_changes(
    directories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XMC_MIDX_NO_CACHE")
    monkeypatch.setenv("XMC_MIDX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SMALL_BYTES", 0)
    read: list[Source] = []
    real = dataset.read_source
    monkeypatch.setattr(dataset, "read_source", lambda source: (read.append(source), real(source))[1])
    for form in ("pair", "npz"):
        place = tmp_path / form
        shutil.copytree(directories[form], place)
        path = place / feature_file(form, "train")
        first = load_split(path)
        assert (load_split(path).labels != first.labels).nnz == 0
        assert len(read) == 1
        for half in first.source.paths:
            kept = half.read_bytes()
            half.write_bytes(kept + (b"\n" if form == "pair" else b""))
            if form == "npz":
                matrix = csr_matrix(first.features if half == path else first.labels, copy=True)
                matrix.data *= 2
                write_npz(half, matrix)
            load_split(path)
            half.write_bytes(kept)
        assert len(read) == 3
        read.clear()


# --- What the names mean


@pytest.mark.parametrize(
    ("features", "labels", "form"),
    [
        ("trn_X_Xf.txt", "trn_X_Y.txt", "pair"),
        ("train_X_Xf.txt.gz", "train_X_Y.txt", "pair"),
        ("my_X_Xf.txt", "my_X_Y.txt.xz", "pair"),
        ("X.trn.npz", "Y.trn.npz", "npz"),
        ("X.any.thing.npz", "Y.any.thing.npz", "npz"),
        ("X_train.npz", "Y_train.npz", "npz"),
        ("train_X.npz", "train_Y.npz", "npz"),
        ("trn_X_Xf.npz", "trn_X_Y.npz", "npz"),
        ("train.svm", "train.svm", "svmlight"),
        ("my.libsvm.bz2", "my.libsvm.bz2", "svmlight"),
        ("a.svmlight", "a.svmlight", "svmlight"),
        ("train.txt", "train.txt", "xmc"),
        ("anything.gz", "anything.gz", "xmc"),
    ],
)
def test_the_name_of_the_features_says_what_a_file_is(tmp_path: Path, features: str, labels: str, form: str) -> None:
    for name in (features, labels):
        (tmp_path / name).touch()
    source = source_of(tmp_path / features)
    assert stem_of(tmp_path / features) == re.sub(r"(\.(txt|svm|svmlight|libsvm|npz))?(\.(gz|bz2))?$", "", features)
    assert (source.format, source.features.name, source.labels.name) == (form, features, labels)
    if features != labels:
        with pytest.raises(DataError, match=r"holds labels alone\. Name the file of the features"):
            source_of(tmp_path / labels)
        (tmp_path / labels).unlink()
        with pytest.raises(DataError, match=r"holds features alone, expected their labels in .*_?Y.* beside it"):
            source_of(tmp_path / features)


def test_a_matrix_of_no_known_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.npz: is a matrix, expected a name that says which, such as X\.trn\.npz"):
        source_of(tmp_path / "a.npz")


def test_a_directory_is_read_in_one_format_and_check_names_the_others(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    for form in FORMATS:
        shutil.copytree(directories[form], tmp_path / "all", dirs_exist_ok=True)
    (tmp_path / "all" / "test.txt").unlink()
    found = load_dataset(tmp_path / "all")
    assert found.train is not None and found.test is not None
    assert (found.train.source.format, found.test.source.format) == ("xmc", "pair")
    report = check_dataset(tmp_path / "all")
    others = sorted((Path(p.file).name, p.text) for p in report.problems if p.kind == "unread")
    first, second = "the split is in train.txt.", "the split is in tst_X_Xf.txt and tst_X_Y.txt."
    assert others == [
        ("X.trn.npz", f"is not read: {first}"),
        ("X.tst.npz", f"is not read: {second}"),
        ("test.svm", f"is not read: {second}"),
        ("train.svm", f"is not read: {first}"),
        ("trn_X_Xf.txt", f"is not read: {first}"),
    ]
    assert report.ok


def test_half_a_pair_is_no_split_but_no_reason_to_pass_over_another(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    place = tmp_path / "half"
    shutil.copytree(directories["pair"], place)
    (place / "trn_X_Y.txt").unlink()
    with pytest.raises(DataError, match=r"trn_X_Xf\.txt: holds features alone, expected their labels in trn_X_Y\.txt"):
        load_dataset(place)
    shutil.copy(directories["svmlight"] / "train.svm", place)
    found = load_dataset(place)
    assert found.train is not None and found.train.source.format == "svmlight"
    assert load_features(place / "trn_X_Xf.txt", 40).shape == (320, 40)


def test_a_text_that_lost_its_header_is_told_what_a_file_without_one_is_called(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_bytes(b"0,2 0:1 3:0.5\n")
    with pytest.raises(DataError, match=r"train\.txt:1: the file starts with an instance, .* is called \.svm: its ids"):
        load_dataset(tmp_path)
    (tmp_path / "train.txt").rename(tmp_path / "train.svm")
    assert load_dataset(tmp_path).num_labels == 3


@pytest.mark.parametrize("form", ["pair", "npz"])
def test_splits_of_other_sizes_are_refused_where_the_size_stands(
    directories: dict[str, Path], tmp_path: Path, form: str
) -> None:
    shutil.copytree(directories[form], tmp_path / form)
    labels = source_of(tmp_path / form / feature_file(form, "test")).labels
    wider = csr_matrix((150, 24), dtype=np.float32)
    (write_sparse if form == "pair" else write_npz)(labels, wider)
    stated = ":1: the header says" if form == "pair" else ": the matrix has"
    first = load_split(tmp_path / form / feature_file(form, "train")).source.labels
    message = f"{labels}{stated} 24 labels, expected 23 as in {first}."
    with pytest.raises(DataError, match=re.escape(message)):
        load_dataset(tmp_path / form)
    assert [str(p) for p in check_dataset(tmp_path / form).problems if p.level == "error"] == [message]


@pytest.mark.fault("R9")
def test_a_line_without_end_is_refused_in_every_text(
    directories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xmc_midx.data.files.MAX_LINE_BYTES", 40_000)
    monkeypatch.setattr("xmc_midx.data.files.CHUNK_BYTES", 10_000)
    for form, name in (
        ("pair", "trn_X_Xf.txt"),
        ("pair", "tst_X_Y.txt"),
        ("svmlight", "train.svm"),
        ("xmc", "filter_labels_test.txt"),
    ):
        place = tmp_path / name
        shutil.copytree(directories[form], place)
        with (place / name).open("ab") as file:
            file.write(b" 1:1" * 15_000)
        with pytest.raises(DataError, match=rf"{re.escape(name)}:\d+: the line is longer than 40,000 bytes"):
            load_dataset(place)
        assert [p.kind for p in check_dataset(place).problems if p.level == "error"][-1] == "line-length"


# --- Label and feature maps


def test_label_maps_are_used_where_they_fit_and_pointed_out_where_not(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    place = tmp_path / "maps"
    shutil.copytree(directories["pair"], place)
    names = [f"name {i}" for i in range(23)]
    (place / "Y.txt").write_bytes("\n".join([*names, "one more", ""]).encode())
    (place / "Xf.txt").write_text("word\n" * 39)
    assert load_dataset(place).label_names is None
    (place / "Yf.txt").write_text("\n".join(names))
    assert load_dataset(place).label_names == tuple(names)
    report = check_dataset(place)
    assert report.ok
    maps = {Path(p.file).name: p.text for p in report.problems if p.kind == "map"}
    assert maps == {
        "Y.txt": "the file holds 24 names, expected one for each of 23 labels. It is not used.",
        "Xf.txt": "holds 39 lines, the splits have 40 features.",
    }
    (place / "Y.txt").write_bytes("\n".join(["Ä", *names[1:]]).encode("latin-1"))
    assert load_dataset(place).label_names == tuple(names)
    (place / "labels.txt").write_text("\n".join(reversed(names)))
    assert load_dataset(place).label_names == tuple(reversed(names))
    (place / "labels.txt").write_text("too few\n")
    with pytest.raises(DataError, match=r"labels\.txt:1: the file holds 1 names"):
        load_dataset(place)


# --- Filter files


def test_evaluation_passes_over_the_pairs_of_a_filter_file(
    directories: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "lf"
    shutil.copytree(directories["xmc"], place)
    test = load_dataset(place).split("test")
    num_rows, num_labels = test.labels.shape
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(num_rows, num_labels)).astype(np.float32)
    # A ranking that finds everything, behind one label of each instance that is passed over.
    passed = rng.integers(0, num_labels, num_rows)
    scores[test.labels.toarray() > 0] += 100
    scores[np.arange(num_rows), passed] = 1000
    lines = [" ".join(f"{label}:{score}" for label, score in enumerate(row)) for row in scores.tolist()]
    (tmp_path / "scores.txt").write_text("\n".join([*lines, ""]))
    before = pipeline.evaluate(None, data=place, predictions=tmp_path / "scores.txt")
    assert before.report.num_ignored == 0
    (place / "filter_labels_test.txt").write_text("".join(f"{i} {label}\n" for i, label in enumerate(passed)))
    (place / "filter_labels_train.txt").write_text("")
    truth = test.labels.toarray()
    truth[np.arange(num_rows), passed] = 0
    expected = np.mean(np.minimum(truth.sum(axis=1), 3) / 3)
    for data in (place, place / "test.txt"):
        after = pipeline.evaluate(None, data=data, predictions=tmp_path / "scores.txt")
        assert after.report.num_ignored == num_rows
        assert after.report.metrics["P@3"] == pytest.approx(expected, abs=1e-12)
        assert after.report.metrics["nDCG@5"] == pytest.approx(np.mean(truth.sum(axis=1) > 0), abs=1e-12)
    assert before.report.metrics["P@1"] < 0.5 < after.report.metrics["P@1"]
    assert app.run(["evaluate", "-", str(place), "--predictions", str(tmp_path / "scores.txt")]) == 0
    assert "150 pairs of a filter file are passed over." in " ".join(capsys.readouterr().out.split())
    report = check_dataset(place)
    shared = int((test.labels.toarray() != truth).sum())
    (problem,) = [p for p in report.problems if p.kind == "ignored"]
    assert problem.text.startswith(f"{shared} of its 150 pairs are positives") and report.ok
    assert [file.role for file in report.files] == ["train", "test", "ignored", "ignored"]
    (place / "filter_labels_test.txt").write_text("0 0\n150 0\n")
    assert app.run(["check", str(place)]) == 3
    with pytest.raises(DataError, match=r"filter_labels_test\.txt:2: instance 150 is outside 0\.\.149"):
        load_dataset(place)


def test_a_model_predicts_more_where_some_of_it_is_passed_over(directories: dict[str, Path], tmp_path: Path) -> None:
    place = tmp_path / "lf"
    shutil.copytree(directories["xmc"], place)
    config = load_config(None, assignments=["training.epochs=1", "model.dim=8"])
    pipeline.train(place, output=tmp_path / "run", config=config)
    full = pipeline.predict(tmp_path / "run", input=place / "test.txt", k=23).top.label_ids
    # The best label of the first 100 instances is passed over, and the second is to count.
    (place / "filter_labels_test.txt").write_text("".join(f"{i} {full[i, 0]}\n" for i in range(100)))
    truth = load_dataset(place).split("test").labels.toarray()
    hits = [truth[i, full[i, int(i < 100)]] for i in range(150)]
    assert sum(hits[:100]) > 10
    found = pipeline.evaluate(tmp_path / "run", data=place, ks=(1,)).report.metrics["P@1"]
    assert found == pytest.approx(np.mean(hits), abs=1e-12)
