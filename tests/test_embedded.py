"""Claims about the embedded dataset and the script that built it: small, whole, numbers only, learnable."""

from __future__ import annotations

import lzma
import re
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT, load_script

from xmc_midx.data.vocabulary import HEADER, Vocabulary

DEBTAGS = ROOT / "xmc_midx" / "data" / "embedded" / "debtags"
SPLITS = ("train", "test")


def lines_of(name):
    text = lzma.decompress((DEBTAGS / name).read_bytes()).decode("ascii" if "vocab" not in name else "utf-8")
    assert text.endswith("\n")
    return text[:-1].split("\n")


@pytest.fixture(scope="module")
def splits():
    """A parser of a few lines that shares nothing with the package's: split -> (N, F, L), labels, features."""
    parsed = {}
    for split in SPLITS:
        header, *lines = lines_of(f"{split}.txt.xz")
        labels, features = [], []
        for line in lines:
            first, *pairs = line.split(" ")
            labels.append([int(label) for label in first.split(",")])
            features.append([(int(f), float(v)) for f, v in (pair.split(":") for pair in pairs)])
        parsed[split] = tuple(map(int, header.split(" "))), labels, features
    return parsed


def test_all_files_together_are_below_three_megabytes():
    sizes = {path.name: path.stat().st_size for path in DEBTAGS.iterdir()}
    assert {f"{name}.txt.xz" for name in (*SPLITS, "labels", "vocabulary")} | {"README.md"} == set(sizes)
    assert sum(sizes.values()) < 3_000_000


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_is_what_its_header_says(splits, split):
    (num_instances, num_features, num_labels), labels, features = splits[split]
    assert len(labels) == num_instances
    for own_labels, own_features in zip(labels, features, strict=True):
        assert own_labels == sorted(set(own_labels)) and own_labels[0] >= 0 and own_labels[-1] < num_labels
        ids = [f for f, _ in own_features]
        assert ids == sorted(set(ids)) and (not ids or (ids[0] >= 0 and ids[-1] < num_features))
        assert all(0 < value <= 1 for _, value in own_features)


def test_rows_have_length_one_up_to_the_rounding_to_two_digits(splits):
    for _, _, features in splits.values():
        lengths = np.array([np.sqrt(sum(v * v for _, v in row)) for row in features if row])
        assert np.all(np.abs(lengths - 1) < 0.03)


def test_names_and_vocabulary_fit_the_headers(splits):
    (_, num_features, num_labels), _, _ = splits["train"]
    assert splits["test"][0][1:] == (num_features, num_labels)
    names = [line.split("\t") for line in lines_of("labels.txt.xz")]
    assert len(names) == num_labels and all(len(columns) == 2 for columns in names)
    assert len({tag for tag, _ in names}) == num_labels
    assert all(re.fullmatch(r"[a-z0-9-]+::[A-Za-z0-9+.:-]+", tag) for tag, _ in names)
    assert not any("TODO" in tag or tag.startswith("special::") for tag, _ in names)
    assert Vocabulary.load(DEBTAGS / "vocabulary.txt.xz").num_features == num_features


def test_there_is_no_prose_in_the_vocabulary():
    header, *lines = lines_of("vocabulary.txt.xz")
    assert header == HEADER
    assert all(re.fullmatch(r"[^\W_]{2,}\t[0-9.]+", line) for line in lines)


def test_every_label_is_learnable_and_the_splits_are_85_to_15(splits):
    (num_train, _, num_labels), labels, _ = splits["train"]
    counts = Counter(label for row in labels for label in row)
    assert min(counts[label] for label in range(num_labels)) >= 5
    num_test = splits["test"][0][0]
    assert 0.12 < num_test / (num_train + num_test) < 0.18


def test_train_and_test_share_next_to_no_instance(splits):
    """Families do not cross the split; a few short descriptions are alike all the same."""
    train = {tuple(row) for row in splits["train"][2]}
    shared = sum(tuple(row) in train for row in splits["test"][2])
    assert shared <= 0.005 * len(splits["test"][2])


def test_the_embedded_directory_loads_with_the_package_itself(splits):
    dataset = pytest.importorskip("xmc_midx.data.dataset").load_dataset(DEBTAGS)
    for split in SPLITS:
        (num_instances, num_features, num_labels), labels, features = splits[split]
        ours = getattr(dataset, split)
        assert ours.features.shape == (num_instances, num_features)
        assert ours.labels.shape == (num_instances, num_labels)
        assert ours.labels.nnz == sum(map(len, labels))
        assert ours.features.sum() == pytest.approx(sum(v for row in features for _, v in row), rel=1e-5)


@pytest.fixture(scope="module")
def script():
    return load_script("build_demo_data")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("role::program", {"role::program"}),
        (
            "implemented-in::{c,c++}, role::program,\nuse::viewing",
            {"implemented-in::c", "implemented-in::c++", "role::program", "use::viewing"},
        ),
        ("use::TODO, devel::lang:TODO, special::not-yet-tagged, x11::font", {"x11::font"}),
        ("works-with-format::xml:rss,role::plugin", {"works-with-format::xml:rss", "role::plugin"}),
        ("", set()),
    ],
)
def test_the_tag_field_is_read_in_all_its_forms(script, value, expected):
    assert script.parse_tags(value) == expected


def test_a_stanza_with_long_values_is_read(script):
    record = script.parse_record("Package: a\nDescription-en: short\n first: line\n .\n last\nTag: x::y,\n x::z")
    assert record == {"Package": "a", "Description-en": "short\nfirst: line\n.\nlast", "Tag": "x::y,\nx::z"}


def test_a_family_keeps_one_package_a_set_of_tags(script):
    def package(name, family, *tags):
        return script.Package(name=name, family=family, text=name, tags=frozenset(tags))

    chosen = script.select(
        [
            package("gcc-12-doc", "gcc-", "role::documentation"),
            package("gcc-11", "gcc-", "role::program"),
            package("gcc-12", "gcc-", "role::program"),
            package("g++-11", "gcc-", "role::program"),
            package("ed", "ed", "role::program"),
        ]
    )
    assert {p.name for p in chosen} == {"gcc-12-doc", "g++-11", "ed"}
