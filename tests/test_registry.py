"""The registry states published facts, and finds a set by name and by sizes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from xmc_midx.data import registry
from xmc_midx.data.registry import DatasetSpec, cache_directory, find_spec, load_registry, match_spec
from xmc_midx.errors import DataError, UsageError

FACTS = Path(__file__).parents[2] / "shared" / "facts" / "benchmarks.tsv"


def facts() -> list[dict[str, str]]:
    if not FACTS.is_file():
        pytest.skip(f"the shared facts are not at {FACTS}")
    with FACTS.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_every_benchmark_is_there_with_the_facts_of_its_publisher() -> None:
    published = facts()
    assert len(published) == 25
    assert {spec.name for spec in load_registry() if not spec.embedded} == {row["name"] for row in published}
    for row in published:
        spec = find_spec(row["name"])
        sizes = (spec.num_features, spec.num_labels, spec.num_train, spec.num_test)
        columns = ("features", "labels", "train_instances", "test_instances")
        assert sizes == tuple(int(row[column]) for column in columns), spec.name
        assert (spec.propensity_a, spec.propensity_b) == (float(row["A"]), float(row["B"]))
        assert spec.labels_per_instance == float(row["labels_per_point"])
        assert spec.instances_per_label == float(row["points_per_label"])
        assert spec.drive is not None
        own_column, mirror_column = list(row)[-2:]
        assert [drive for drive in (spec.drive.bow, spec.drive.raw) if drive] == row[own_column].split(",")
        mirrors = [":".join([m.format, m.drive, m.folder, "+".join(m.train), "+".join(m.test)]) for m in spec.mirrors]
        assert ";".join(mirrors) == (row[mirror_column] or "")


def test_the_published_results_are_the_publishers() -> None:
    path = FACTS.with_name("published_results.tsv")
    if not path.is_file():
        pytest.skip(f"the published results are not at {path}")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    stated = [(spec.name, result) for spec in load_registry() for result in spec.results]
    assert len(stated) == len(rows) > 300
    for row in rows:
        name = row["dataset"].partition(" / ")[0]
        figures = [[row[f"{family}@{k}"] for k in (1, 3, 5)] for family in ("P", "PSP")]
        P, PSP = (tuple(None if text in ("", "-") else float(text) for text in texts) for texts in figures)
        expected = (name, registry.PublishedResult(method=row["Method"], P=P, PSP=PSP))  # type: ignore[arg-type]
        assert expected in stated


def test_the_repository_is_asked_before_its_mirrors_and_each_archive_once() -> None:
    for spec in load_registry():
        for kind in ("bow", "raw"):
            sources = spec.sources(kind)  # type: ignore[arg-type]
            own = getattr(spec.drive, kind, None)
            assert len({source.key for source in sources}) == len(sources)
            assert own is None or sources[0].drive == own
            assert bool(sources) or spec.embedded or kind == "raw"
    assert find_spec("LF-Amazon-131K").sources()[0].train == ("train.txt",)
    assert [source.format for source in find_spec("Wiki10-31K").sources()] == ["bow", "bow", "bow-v1"]
    assert [source.format for source in find_spec("Wiki10-31K").sources("bow-v1")] == ["bow-v1"]
    with pytest.raises(ValidationError, match="one of drive and url"):
        registry.Mirror(format="bow")


def test_every_entry_says_whom_to_cite() -> None:
    for spec in load_registry():
        assert spec.citation and spec.licence and spec.homepage.startswith("http"), spec.name
        if not spec.embedded:
            assert "The extreme classification repository" in spec.citation
            assert spec.licence == "not stated by the repository"


def test_names_are_unique_in_any_case_and_found_in_any_case() -> None:
    names = [spec.name for spec in load_registry()]
    assert len({name.lower() for name in names}) == len(names)
    assert find_spec("amazon-670k").name == find_spec("AMAZON-670K").name == "Amazon-670K"


def test_a_misspelt_name_gets_the_nearest_ones() -> None:
    with pytest.raises(UsageError, match="no such data set") as caught:
        find_spec("amazon670k")
    assert "Did you mean Amazon-670K" in str(caught.value.hint)
    with pytest.raises(UsageError, match="`xmc-midx datasets` lists the names"):
        find_spec("?")


def test_a_set_is_known_by_its_sizes_and_no_set_by_those_of_another() -> None:
    for spec in load_registry():
        if spec.num_features and spec.num_labels:
            assert match_spec(spec.num_features, spec.num_labels, spec.num_train) == spec
            assert match_spec(spec.num_features, spec.num_labels) == spec
            assert match_spec(spec.num_features + 1, spec.num_labels, spec.num_train) is None
            assert match_spec(spec.num_features, spec.num_labels, (spec.num_train or 0) + 1) is None


def test_an_unknown_key_or_a_wrong_value_is_refused() -> None:
    fields = {"name": "x", "description": "x", "homepage": "x", "licence": "x", "citation": "x"}
    DatasetSpec.model_validate(fields)
    for wrong in ({"num_labels": 0}, {"propensity_a": -1}, {"sizes": 3}):
        with pytest.raises(ValidationError):
            DatasetSpec.model_validate({**fields, **wrong})


def test_a_damaged_registry_is_an_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "__file__", str(tmp_path / "a" / "b" / "registry.py"))
    path = tmp_path / "a" / "b" / "datasets.yaml"
    path.parent.mkdir(parents=True)
    load_registry.cache_clear()
    try:
        with pytest.raises(DataError, match=r"datasets\.yaml: not found"):
            load_registry()
        for text in ("[", "- 1", "defaults: {}", "defaults: {}\ndatasets: [{name: x}]", "", "defaults: 1\ndatasets: 2"):
            path.write_text(text)
            with pytest.raises(DataError, match="is not a registry of data sets"):
                load_registry()
    finally:
        load_registry.cache_clear()


def test_the_cache_is_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("XMC_MIDX_CACHE", raising=False)
    assert cache_directory() == tmp_path / "xdg" / "xmc-midx"
    monkeypatch.setenv("XMC_MIDX_CACHE", str(tmp_path / "own"))
    assert find_spec("bibtex").directory == tmp_path / "own" / "Bibtex"
    monkeypatch.delenv("XMC_MIDX_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "xmc-midx"


def test_the_quick_loader_reads_what_the_safe_one_does_and_runs_nothing() -> None:
    text = (Path(__file__).parents[1] / "datasets.yaml").read_text(encoding="utf-8")
    assert registry._read_yaml(text) == yaml.safe_load(text)
    for tag in ("!!python/object/apply:os.getcwd []", "!!python/name:os.getcwd", "a: [", "&a [*b]"):
        with pytest.raises(yaml.YAMLError):
            registry._read_yaml(tag)
