"""DATA in another format: equal when it is read back, there as a whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from xmc_midx.cli import app
from xmc_midx.data import convert as module
from xmc_midx.data.convert import convert
from xmc_midx.data.dataset import load_dataset
from xmc_midx.data.formats import write_xmc
from xmc_midx.data.vocabulary import Vocabulary
from xmc_midx.errors import DataError, UsageError

FORMATS = ("xmc", "pair", "svmlight", "npz")


@pytest.fixture
def directory(tmp_path: Path, random_rows: Callable[..., csr_matrix]) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    for seed, (name, size) in enumerate((("train", 200), ("test", 90))):
        features, labels = random_rows(size, 40, seed=seed).tolil(), random_rows(size, 9, seed=seed + 2).tolil()
        features[0, 39] = labels[0, 8] = 1.0
        write_xmc(path / f"{name}.txt", csr_matrix(features), csr_matrix(labels))
    (path / "Y.txt").write_text("".join(f"näme {i}\n" for i in range(9)), encoding="utf-8")
    (path / "filter_labels_test.txt").write_text("0 3\n5 1\n")
    tokens = tuple(f"word{i}" for i in range(40))
    Vocabulary(tokens=tokens, idf=np.linspace(1, 2, 40, dtype=np.float32)).save(path / "vocabulary.txt")
    return path


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("back", FORMATS)
def test_there_and_back_is_the_same_data(directory: Path, tmp_path: Path, form: str, back: str) -> None:
    convert(directory, output=tmp_path / "there", format=form)  # type: ignore[arg-type]
    convert(tmp_path / "there", output=tmp_path / "back", format=back)  # type: ignore[arg-type]
    first, last = load_dataset(directory), load_dataset(tmp_path / "back")
    assert last.fingerprint() == first.fingerprint()
    assert last.label_names == first.label_names is not None
    assert last.vocabulary is not None and first.vocabulary is not None
    assert last.vocabulary.tokens == first.vocabulary.tokens
    ignored, expected = last.split("test").ignored, first.split("test").ignored
    assert ignored is not None and expected is not None and (ignored != expected).nnz == 0
    assert last.split("test").source.format == back
    assert {path.name for path in tmp_path.iterdir()} == {"data", "there", "back"}


def test_svmlight_is_refused_where_it_would_lose_a_size(directory: Path, tmp_path: Path) -> None:
    text = (directory / "train.txt").read_bytes().replace(b"200 40 9", b"200 40 10", 1)
    (directory / "train.txt").write_bytes(text)
    (directory / "test.txt").unlink()
    (directory / "Y.txt").unlink()
    with pytest.raises(DataError, match="data: the last of its 10 labels never occurs, and svmlight does not state"):
        convert(directory, output=tmp_path / "out", format="svmlight")
    assert not (tmp_path / "out").exists()


def test_nothing_is_replaced_and_nothing_is_left_of_a_failure(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="is there already, expected a new directory"):
        convert(directory, output=directory, format="npz")
    (tmp_path / "empty").mkdir()
    assert convert(directory, output=tmp_path / "empty", format="npz").files == (
        "X.trn.npz",
        "X.tst.npz",
        "Y.trn.npz",
        "Y.tst.npz",
        "filter_labels_test.txt",
        "labels.txt",
        "vocabulary.txt",
    )

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_lines", fail)
    assert app.run(["convert", str(directory), str(tmp_path / "out"), "--format", "pair"]) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"data", "empty"}


def test_the_command_line_says_what_it_wrote(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(directory), str(tmp_path / "out"), "--format"]
    assert app.run([*words, "npy"]) == 2
    assert "--format npy: expected xmc, pair, svmlight or npz." in capsys.readouterr().err
    assert app.run([*words, "pair", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["format"] == "pair"
    assert set(document["files"]) == {path.name for path in (tmp_path / "out").iterdir()}
    assert app.run(["check", str(tmp_path / "out")]) == 0
