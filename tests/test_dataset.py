"""DATA is found, read, described and checked; what does not fit together is refused in words that help."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from xmc_midx.data.check import check_dataset
from xmc_midx.data.dataset import load_dataset, load_split
from xmc_midx.data.registry import find_spec
from xmc_midx.errors import DataError
from xmc_midx.pipeline import train

TRAIN = b"5 4 6\n0,2 0:1 3:0.5\n 1:-2\n0 0:1 3:0.5\n\n3 2:1\n"
TEST = b"2 4 6\n1 3:0.5\n 0:1 3:0.5\n"
ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "toy"
    path.mkdir()
    (path / "train.txt").write_bytes(TRAIN)
    (path / "test.txt.gz").write_bytes(gzip.compress(TEST))
    (path / "labels.txt").write_text("a\nb\nc\nd\ne\nf\n")
    return path


# --- Finding and reading


def test_a_directory_is_its_splits_and_names(directory: Path) -> None:
    dataset = load_dataset(directory)
    assert (dataset.name, dataset.num_features, dataset.num_labels) == ("toy", 4, 6)
    assert dataset.label_names == ("a", "b", "c", "d", "e", "f")
    assert dataset.train is not None and dataset.test is not None
    assert dataset.train.features.shape == (5, 4)
    assert dataset.test.labels.toarray().tolist() == [[0, 1, 0, 0, 0, 0], [0] * 6]
    assert (dataset.vocabulary, dataset.spec) == (None, None)
    assert dataset.split() is dataset.train
    assert dataset.split("test") is dataset.test


def test_a_directory_may_lack_either_split(directory: Path) -> None:
    (directory / "train.txt").unlink()
    dataset = load_dataset(str(directory))
    assert dataset.train is None
    assert dataset.split() is dataset.test
    with pytest.raises(DataError, match=r"has no train split\. Is there a train\.txt\?"):
        dataset.label_frequencies()
    (directory / "test.txt.gz").unlink()
    with pytest.raises(DataError, match=r"toy: holds labels\.txt, expected train\.txt or test\.txt"):
        load_dataset(directory)


def test_a_file_is_a_training_split_and_test_another_file(directory: Path) -> None:
    dataset = load_dataset(directory / "train.txt", test=directory / "test.txt.gz")
    assert dataset.name == "train"
    assert dataset.train is not None and dataset.test is not None
    assert dataset.test.path == str(directory / "test.txt.gz")
    assert load_dataset(directory / "test.txt.gz").name == "test"
    assert load_split(directory / "test.txt.gz").num_instances == 2


def test_test_takes_the_place_of_the_directorys_own(directory: Path, tmp_path: Path) -> None:
    (directory / "test.txt.gz").write_bytes(b"damaged")
    other = tmp_path / "other.txt"
    other.write_bytes(TEST)
    dataset = load_dataset(directory, test=other)
    assert dataset.test is not None and dataset.test.path == str(other)
    with pytest.raises(DataError, match=r"no\.txt: no such file"):
        load_dataset(directory, test=tmp_path / "no.txt")


def test_what_is_not_there_is_an_error_with_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XMC_MIDX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for data, message in (
        ("wiki10", "wiki10: no such file, directory or data set of the registry. Did you mean Wiki10-31K?"),
        ("no/where", "no/where: no such file, directory or data set of the registry. `xmc-midx datasets` lists"),
        ("bibtex", f"Bibtex: is not on disk, expected in {tmp_path}/cache/Bibtex. `xmc-midx download Bibtex` fetches"),
        (tmp_path / "empty", f"{tmp_path}/empty: holds nothing, expected train.txt or test.txt"),
    ):
        with pytest.raises(DataError, match=re.escape(message)):
            load_dataset(data)


def test_a_name_of_the_registry_is_read_from_the_cache(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XMC_MIDX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(directory, tmp_path / "cache" / "EURLex-4K")
    dataset = load_dataset("eurlex-4k")
    assert dataset.name == "EURLex-4K"
    assert dataset.spec == find_spec("EURLex-4K")
    # A path that exists goes before a name.
    shutil.copytree(directory, tmp_path / "eurlex-4k")
    assert load_dataset("eurlex-4k").spec is None


def test_the_embedded_set_needs_no_download() -> None:
    if not find_spec("debtags").directory.is_dir():
        pytest.skip("the embedded data is not built yet")
    dataset = load_dataset("debtags")
    assert dataset.train is not None and dataset.test is not None
    assert dataset.vocabulary is not None and dataset.label_names is not None
    assert dataset.vocabulary.num_features == dataset.num_features


def test_two_variants_of_a_file_are_refused(directory: Path) -> None:
    for name in ("train.txt", "labels.txt"):
        extra = directory / f"{name}.gz"
        extra.write_bytes(b"")
        with pytest.raises(DataError, match=re.escape(f"toy: holds {name} and {name}.gz, expected one of them.")):
            load_dataset(directory)
        extra.unlink()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"2 5 6", r"test\.txt\.gz:1: the header says 5 features, expected 4 as in .*train\.txt\."),
        (b"2 4 7", r"test\.txt\.gz:1: the header says 7 labels, expected 6 as in .*train\.txt\."),
    ],
)
def test_splits_of_other_sizes_are_refused(directory: Path, header: bytes, message: str) -> None:
    (directory / "test.txt.gz").write_bytes(gzip.compress(TEST.replace(b"2 4 6", header)))
    with pytest.raises(DataError, match=message):
        load_dataset(directory)
    assert [problem.kind for problem in check_dataset(directory).problems if problem.level == "error"] == ["sizes"]


def test_names_and_instances_must_be_there(directory: Path) -> None:
    (directory / "labels.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"labels\.txt:2: the file holds 2 names, expected one for each of 6 labels"):
        load_dataset(directory)
    (directory / "labels.txt").unlink()
    (directory / "train.txt").write_bytes(b"0 4 6\n")
    with pytest.raises(DataError, match=r"train\.txt: holds 0 instances, expected some to train on"):
        load_dataset(directory)
    assert not check_dataset(directory).ok


def test_the_vocabulary_of_another_set_is_refused(directory: Path) -> None:
    vocabulary = pytest.importorskip("xmc_midx.data.vocabulary")
    for num_tokens in (4, 5):
        tokens = tuple(f"token{i}" for i in range(num_tokens))
        made = vocabulary.Vocabulary(tokens=tokens, idf=np.ones(num_tokens, dtype=np.float32))
        made.save(directory / "vocabulary.txt")
        if num_tokens == 4:
            found = load_dataset(directory).vocabulary
            assert found is not None and found.num_features == 4
            continue
        message = "vocabulary.txt: holds 5 features, expected 4 as the splits have."
        with pytest.raises(DataError, match=re.escape(message)):
            load_dataset(directory)
        problem = next(problem for problem in check_dataset(directory).problems if problem.level == "error")
        assert str(problem) == f"{directory}/{message}"


@pytest.mark.parametrize(
    ("name", "num_features", "num_labels", "num_seen", "mean_labels", "spec"),
    [("bibtex", 1836, 159, 159, 2.4, "Bibtex"), ("delicious", 500, 983, 983, 19.0, "Delicious")],
)
def test_real_data_is_what_its_readme_says(
    name: str, num_features: int, num_labels: int, num_seen: int, mean_labels: float, spec: str
) -> None:
    if not DATA.is_dir():
        pytest.skip(f"the shared data is not at {DATA}")
    dataset = load_dataset(DATA / name)
    assert (dataset.num_features, dataset.num_labels) == (num_features, num_labels)
    assert dataset.statistics().num_labels_with_positives == num_seen
    assert round(dataset.statistics().labels_per_instance, 1) == mean_labels
    assert dataset.label_names is not None and len(dataset.label_names) == num_labels
    assert dataset.spec is not None and dataset.spec.name == spec
    if name == "delicious":
        empty = [dataset.statistics(split).num_without_labels for split in ("train", "test")]
        assert sum(empty) == 14


# --- Figures


def test_statistics_count_what_is_there(directory: Path) -> None:
    statistics = load_dataset(directory).statistics()
    assert statistics.as_dict() == {
        "num_instances": 5,
        "num_features": 4,
        "num_labels": 6,
        "num_labels_with_positives": 3,
        "num_feature_values": 6,
        "num_positives": 4,
        "features_per_instance": 6 / 5,
        "labels_per_instance": 4 / 5,
        "instances_per_label": 4 / 6,
        "num_head_labels": 0,
        "num_torso_labels": 0,
        "num_tail_labels": 6,
        "tail_share": 1.0,
        "max_label_frequency": 2,
        "num_without_labels": 2,
        "num_without_features": 1,
    }
    assert load_dataset(directory).label_frequencies().tolist() == [2, 0, 1, 1, 0, 0]


def test_head_torso_and_tail_meet_at_5_and_100(tmp_path: Path) -> None:
    frequencies = [0, 1, 5, 6, 100, 101, 400]
    rows = [f"{label} 0:1\n" for label, number in enumerate(frequencies) for _ in range(number)]
    path = tmp_path / "train.txt"
    path.write_text(f"{len(rows)} 1 {len(frequencies)}\n{''.join(rows)}")
    dataset = load_dataset(path)
    assert dataset.label_frequencies().tolist() == frequencies
    assert dataset.label_frequencies().dtype == np.int64
    statistics = dataset.statistics()
    found = (statistics.num_tail_labels, statistics.num_torso_labels, statistics.num_head_labels)
    assert found == (3, 2, 2)
    assert statistics.tail_share == 3 / 7


def test_the_fingerprint_is_of_the_content_alone(directory: Path, tmp_path: Path) -> None:
    first = load_dataset(directory).fingerprint()
    same = tmp_path / "same"
    same.mkdir()
    (same / "train.txt.gz").write_bytes(gzip.compress(TRAIN.replace(b"0,2 0:1 3:0.5", b"2,0  3:.5 0:1e0")))
    (same / "test.txt").write_bytes(TEST)
    assert load_dataset(same).fingerprint() == first
    seen = {first, load_dataset(directory / "train.txt").fingerprint()}
    to_another_row = (b"\n 1:-2\n0 0:1", b"\n0 1:-2\n 0:1")
    for old, new in (
        (b"0.5", b"0.6"),
        (b"0,2", b"0,1"),
        (b"5 4 6", b"5 5 6"),
        (b"\n\n", b"\n1\n"),
        (b" 1:", b" 2:"),
        to_another_row,
    ):
        (directory / "train.txt").write_bytes(TRAIN.replace(old, new, 1))
        seen.add(load_dataset(directory / "train.txt").fingerprint())
    seen.add(load_dataset(directory / "test.txt.gz").fingerprint())
    assert len(seen) == 9


def test_a_huge_header_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes(b"1 2147483647 2147483647\n2147483646 2147483646:1\n")
    statistics = load_dataset(path).statistics()
    assert statistics.num_tail_labels == statistics.num_labels == 2**31 - 1
    report = check_dataset(path)
    assert report.counts["unseen-labels"] == 1
    assert report.counts["gaps"] == report.num_errors == 2, "a training refuses both"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (b"2 3 2\n 0:1\n 1:1\n", "no-positives"),
        (b"2 2000000000 2\n0 2:1 0:1\n1 1:1\n", "gaps"),
        (b"2 3 2000000000\n0 2:1 0:1\n1 1:1\n", "gaps"),
    ],
)
def test_what_a_training_refuses_is_an_error_of_a_check(text: bytes, kind: str, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_bytes(text)
    report = check_dataset(tmp_path)
    assert report.counts[kind] == report.num_errors == 1 and not report.ok
    with pytest.raises(DataError) as caught:
        train(tmp_path, output=tmp_path / "run")
    (problem,) = [problem for problem in report.problems if problem.level == "error"]
    assert caught.value.message == f"{problem.file}: {problem.text}"


# --- Checking


def test_a_check_lists_the_faults_of_all_files_and_describes_the_sound_ones(directory: Path) -> None:
    (directory / "train.txt").write_bytes(
        b"6 4 6\n9,x 0:1 0:2\n1 7:1 2:nan\n# note\n2,2 3:\n 1:1\n"  # five rows of six
    )
    (directory / "labels.txt").write_bytes(b"a\nb\xff\n")
    report = check_dataset(directory)
    train, labels = str(directory / "train.txt"), str(directory / "labels.txt")
    assert [(p.file, p.line, p.kind) for p in report.problems if p.level == "error"] == [
        (train, 2, "label-range"),
        (train, 2, "label-value"),
        (train, 2, "feature-duplicate"),
        (train, 3, "feature-range"),
        (train, 3, "value"),
        (train, 4, "comment"),
        (train, 5, "label-duplicate"),
        (train, 5, "value"),
        (train, 6, "rows"),
        (labels, 2, "encoding"),
        (labels, 2, "rows"),
    ]
    assert not report.ok
    assert report.num_errors == 11
    by_role = {file.role: file for file in report.files}
    assert (by_role["train"].num_errors, by_role["test"].num_errors, by_role["labels"].num_errors) == (9, 0, 2)
    assert by_role["test"].statistics is not None and by_role["test"].statistics.num_instances == 2
    assert by_role["train"].statistics is not None and by_role["train"].statistics.num_instances == 5
    # Nothing is said of the instances of a faulty file.
    assert {p.file for p in report.problems if p.level == "warning"} == {str(directory / "test.txt.gz")}
    assert (report.num_test_in_train, report.propensity) == (None, None)


def test_a_check_counts_all_and_keeps_some_of_each_kind(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes(b"100 4 6\n" + b"9 9:1 0:x\n" * 100)
    report = check_dataset(path, limit=3)
    assert report.counts["label-range"] == report.counts["feature-range"] == report.counts["value"] == 100
    assert report.num_errors == 300
    assert len([problem for problem in report.problems if problem.level == "error"]) == 9


def test_a_file_that_cannot_be_read_at_all_is_reported_beside_the_others(directory: Path) -> None:
    for text, kind in (
        (b"", "file"),
        (b"not gzip", "file"),
        (gzip.compress(b""), "header"),
        (b"\x1f\x8b", "compression"),
    ):
        (directory / "test.txt.gz").write_bytes(text)
        report = check_dataset(directory)
        assert [problem.kind for problem in report.problems if problem.level == "error"] == [kind]
        by_role = {file.role: file for file in report.files}
        assert by_role["test"].statistics is None
        assert by_role["train"].statistics is not None
        assert report.propensity is not None


def test_a_check_warns_of_what_a_careful_person_would_want_to_know(directory: Path) -> None:
    (directory / "train.txt").write_bytes(TRAIN[:-1])
    report = check_dataset(directory)
    train, test = directory / "train.txt", directory / "test.txt.gz"
    assert report.ok
    assert sorted(map(str, report.problems)) == sorted(
        [
            f"{train}:6: the last line has no newline.",
            f"{train}:3: 2 of 5 instances have no labels; this is the first.",
            f"{train}:5: 1 of 5 instances have no features; this is the first.",
            f"{train}:4: 1 instances have the features of an earlier one, 0 its labels as well; this is the first.",
            f"{train}: 3 of 6 labels have no training instance: nothing finds them.",
            f"{test}:3: 1 of 2 instances have no labels; this is the first.",
            f"{test}:3: 1 of 2 instances have the features of a training instance; this is the first.",
        ]
    )
    assert report.num_warnings == 7
    assert report.num_test_in_train == 1


def test_repeats_and_overlap_equal_a_count_by_hand(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = []
    for name, size in (("train", 400), ("test", 150)):
        lines = []
        for _ in range(size):
            ids = np.sort(rng.choice(6, size=rng.integers(0, 4), replace=False))
            pairs = " ".join(f"{i}:{rng.choice([0.5, 0.75])}" for i in ids)
            lines.append(f"{rng.integers(3)} {pairs}")
        (tmp_path / f"{name}.txt").write_text(f"{size} 6 3\n" + "".join(f"{line}\n" for line in lines))
        texts.append([line.split(" ", 1) for line in lines])
    train, test = texts
    report = check_dataset(tmp_path)
    known = {features for _, features in train if features}
    assert report.num_test_in_train == sum(features in known for _, features in test)
    with_features = [line for line in train if line[1]]
    num_again = len(with_features) - len(known)
    num_same = len(with_features) - len({tuple(line) for line in with_features})
    text = next(p.text for p in report.problems if p.kind == "duplicates")
    assert text.startswith(f"{num_again} instances have the features of an earlier one, {num_same} its labels")


@pytest.mark.parametrize(
    ("text", "guess"),
    [
        (b"2 3 2\n1 1:1 2:1\n2 3:1\n", {"feature ids seem to start from 1", "label ids seem to start from 1"}),
        (b"2 4 3\n1 1:1 2:1\n2 3:1\n", set()),  # too few ids for a guess
        (b"2 3 2\n0 1:1 2:1\n1 2:1\n", set()),
        (b"2 3 2\n0 0:1 2:1\n2 3:1\n", set()),
        (b"1 201 2\n0,1 " + b" ".join(b"%d:1" % i for i in range(1, 201)) + b"\n", {"feature ids may start from 1"}),
        (b"1 201 2\n0,1 " + b" ".join(b"%d:1" % i for i in range(1, 101)) + b"\n", set()),
    ],
)
def test_ids_that_start_from_1_are_suspected(tmp_path: Path, text: bytes, guess: set[str]) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes(text)
    found = [problem.text for problem in check_dataset(path).problems if problem.kind == "first-id"]
    assert {fact.removeprefix("the ").split(":")[0] for fact in found} == guess


def test_the_propensities_are_those_of_the_formula(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes(b"100 1 2\n" + b"0 0:1\n" * 90 + b"1 0:1\n" * 10)
    found = check_dataset(path).propensity
    assert found is not None
    scale = (np.log(100) - 1) * 2.5**0.55
    assert found.smallest == pytest.approx(1 + scale * (90 + 1.5) ** -0.55)
    assert found.largest == pytest.approx(1 + scale * (10 + 1.5) ** -0.55)


def test_a_report_is_plain_json(directory: Path) -> None:
    (directory / "train.txt").write_bytes(TRAIN.replace(b"3:0.5", b"9:0.5"))
    tree = check_dataset(directory).as_dict()
    assert json.loads(json.dumps(tree, allow_nan=False)) == json.loads(json.dumps(tree))
    assert set(tree) >= {"ok", "name", "files", "problems", "counts", "num_errors", "num_warnings"}
    assert tree["problems"][0]["line"] == 2
    assert tree["files"][1]["statistics"]["num_instances"] == 2


@pytest.mark.parametrize(
    "line",
    [
        "web,python\tA small web server",
        '{"text": "A small web server", "labels": ["web"]}',
        "A small web server",
        "w\u00f6rter ohne \u00fcberschrift",
    ],
)
def test_raw_text_is_sent_to_prepare(line: str, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(f"{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match="expected the header") as caught:
        load_dataset(tmp_path)
    assert caught.value.hint is not None and "xmc-midx prepare" in caught.value.hint
    (problem,) = [one for one in check_dataset(tmp_path).problems if one.level == "error"]
    assert problem.hint == caught.value.hint


def test_a_test_split_of_nothing_is_worth_a_warning(directory: Path) -> None:
    (directory / "test.txt.gz").write_bytes(gzip.compress(b"0 4 6\n"))
    report = check_dataset(directory)
    assert report.ok and report.counts["rows"] == 1
    (problem,) = [one for one in report.problems if one.kind == "rows"]
    assert problem.level == "warning" and "there is nothing to evaluate on" in problem.text


def test_check_warns_of_a_feature_that_drowns_the_others(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def written(name: str, num_features: int, constant: float | None) -> Path:
        rows = [{int(f): float(rng.random()) + 0.1 for f in rng.choice(20, 6, replace=False)} for _ in range(50)]
        for row in rows:
            row |= {} if constant is None else {30: constant}
        lines = [f"{rng.integers(3)} " + " ".join(f"{f}:{v:.3f}" for f, v in sorted(row.items())) for row in rows]
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.txt").write_text(f"50 {num_features} 3\n" + "\n".join(lines) + "\n")
        return tmp_path / name

    for name, num_features, constant, expected in (
        ("plain", 40, None, 0),
        ("hashed", 2**20, None, 0),
        ("mild", 40, 0.5, 0),
        ("unscaled", 40, 100.5, 1),
    ):
        report = check_dataset(written(name, num_features, constant))
        assert report.counts.get("dominant-feature", 0) == expected, name
        assert report.num_errors == 0
