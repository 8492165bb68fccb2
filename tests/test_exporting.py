"""Exports: each is loaded by what is not ours and must find what the model finds; damaged ones are refused."""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.sparse import csr_matrix

from xmc_midx.cli import app
from xmc_midx.config import load_config
from xmc_midx.data.dataset import load_dataset
from xmc_midx.data.vocabulary import Vocabulary
from xmc_midx.encoder import SparseEncoder
from xmc_midx.errors import DataError, ResourceError, UsageError
from xmc_midx.exporting import midx as midx_module
from xmc_midx.exporting import sealed
from xmc_midx.exporting.source import ExportSource, Queries, tune
from xmc_midx.pipeline import export, train

ROOT = Path(__file__).resolve().parents[1]
READER = ROOT / "scripts" / "read_midx.py"
L, F, D = 23, 40, 16
OPTIONS = (
    "model.dim=16",
    "training.epochs=2",
    "training.batch_size=32",
    "training.label_learning_rate=0.05",
    "training.encoder_learning_rate=0.2",
    "sampler.num_codewords=4",
    "data.validation_fraction=0.3",
)
MODELS = {
    "default": (),
    "residual layers": ("model.num_hidden_layers=2", "neighbors.enabled=false"),
    "weighted": ("data.weighting=tf-idf",),
    "plain layers, no relu, values as given": (
        "model.num_hidden_layers=1",
        "model.residual=false",
        "model.activation=none",
        "data.normalize=none",
        "training.encoder_learning_rate=0.02",
    ),
}


@pytest.fixture(scope="module")
def data(topic_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The topics with names and a vocabulary."""
    directory = tmp_path_factory.mktemp("named")
    for name in ("train.txt", "test.txt"):
        (directory / name).write_bytes((topic_dir / name).read_bytes())
    (directory / "labels.txt").write_text("".join(f"töpic {label}\n" for label in range(L)), encoding="utf-8")
    tokens = tuple(f"wörd{feature:02}" for feature in range(F))
    idf = np.linspace(1, 3, F, dtype=np.float32)
    Vocabulary(tokens=tokens, idf=idf).save(directory / "vocabulary.txt")
    return directory


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`runs(name)`: a run of one of `MODELS`, trained when it is first asked for. Read only."""
    directory, made = tmp_path_factory.mktemp("runs"), {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = directory / str(len(made))
            train(data, output=made[name], config=load_config(assignments=[*OPTIONS, *MODELS[name]]))
        return made[name]

    return get


@pytest.fixture(scope="module")
def run(runs: Callable[[str], Path]) -> Path:
    return runs("default")


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A midx export. Read only."""
    output = tmp_path_factory.mktemp("exports") / "midx"
    export(run, output=output)
    return output


def queries_of(run: Path, features: csr_matrix) -> tuple[ExportSource, Queries]:
    source = ExportSource.load(run)
    queries = Queries.build(source, features)
    assert queries is not None
    return source, queries


def rows(data: Path) -> csr_matrix:
    return load_dataset(data).split("test").features


def reader() -> SimpleNamespace:
    """The reader's functions, in this process."""
    return SimpleNamespace(**runpy.run_path(str(READER)))


def test_the_reader_makes_n_grams_as_the_vocabulary_says(tmp_path: Path, run: Path) -> None:
    tokens = ("big", "big tree", "house", "red big tree", "tree")
    vocabulary = Vocabulary(tokens=tokens, idf=np.linspace(1, 3, 5, dtype=np.float32), max_ngram=3)
    export(run, output=tmp_path / "out")
    vocabulary.save(tmp_path / "out" / "vocabulary.txt")
    sums = (tmp_path / "out" / "SHA256SUMS").read_text().splitlines()
    digest = hashlib.sha256((tmp_path / "out" / "vocabulary.txt").read_bytes()).hexdigest()
    lines = [f"{digest}  vocabulary.txt" if line.endswith("  vocabulary.txt") else line for line in sums]
    (tmp_path / "out" / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    model = reader().Model(tmp_path / "out")
    for text in ("Red big tree, BIG tree house", "house", "tree big"):
        row = model.read(text)
        expected = vocabulary.transform([text])
        assert sorted(row) == expected.indices.tolist() and row
        values = np.array([row[feature] for feature in sorted(row)])
        np.testing.assert_allclose(values / np.linalg.norm(values), expected.data, rtol=1e-5)


def test_an_export_says_what_its_model_lacks(run: Path, tmp_path: Path, capsys: Any) -> None:
    result = export(run, output=tmp_path / "api")
    assert result.validation is not None
    best = max(read_lines(run / "metrics.jsonl"), key=lambda line: (score_of(line["validation"]), line["step"]))
    assert dict(result.validation[0]) == best["validation"]
    assert dict(result.validation[1]) == json.loads((run / "interpolation.json").read_text())["validation"]
    assert app.run(["export", str(run), str(tmp_path / "cli")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    alone, whole = (f"{100 * metrics['P@1']:.2f}%" for metrics in result.validation)
    assert f"the model alone has a P@1 of {alone}, and predict" in shown and whole in shown
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    for text in ('{"step": 3, "validat', "[1]\n", '{"epoch": 1}\n'):
        (damaged / "metrics.jsonl").write_text(text)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert export(damaged, output=tmp_path / "out").validation is None, "no export needs the record of the epochs"


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def score_of(validation: dict[str, float]) -> float:
    return sum(validation[f"P@{k}"] for k in (1, 3, 5))


ALONE = """
import runpy, sys
for name in ("xmc_midx", "torch", "scipy", "safetensors", "sklearn", "numba", "faiss"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def read_alone(directory: Path, source: Path) -> tuple[int, list[list[tuple[int, float]]], str]:
    """What the reader prints in a process that can import NumPy and nothing of ours."""
    command = [sys.executable, "-I", "-c", ALONE, str(READER), str(directory), str(source)]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False, text=True, encoding="utf-8")
    pairs = [[pair.split(":") for pair in line.split()] for line in done.stdout.splitlines()]
    return done.returncode, [[(int(label), float(score)) for label, score in line] for line in pairs], done.stderr


# ------------------------------------------------------------------------------ midx


@pytest.mark.parametrize("name", MODELS)
def test_numpy_alone_predicts_what_the_model_alone_predicts(
    runs: Callable[[str], Path], data: Path, tmp_path: Path, name: str
) -> None:
    run = runs(name)
    result = export(run, output=tmp_path / "out")
    assert [one.name for one in result.measured] == ["midx", "exact"] and result.measured[0].recall_5 == 1.0
    version = json.loads((tmp_path / "out" / "export.json").read_text(encoding="utf-8"))["version"]
    assert version == (2 if name == "weighted" else 1)
    _, queries = queries_of(run, rows(data))
    lines = (data / "test.txt").read_bytes().partition(b"\n")[2]
    (tmp_path / "rows.txt").write_bytes(lines)
    code, found, errors = read_alone(tmp_path / "out", tmp_path / "rows.txt")
    assert (code, errors, len(found)) == (0, "", 150)
    table, bias = (tensor.double().numpy() for tensor in torch_tables(run))
    for row, answers in enumerate(found):
        logits = table @ queries.vectors[row].astype(np.float64) + bias
        assert [label for label, _ in answers] == queries.exact_ids[row].tolist()
        np.testing.assert_allclose([s for _, s in answers], logits[queries.exact_ids[row]], rtol=1e-4, atol=1e-4)
    text = (data / "test.txt").read_text()
    done = subprocess.run([sys.executable, READER, tmp_path / "out"], input=text, capture_output=True, text=True)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 150), "stdin, with its header"


def torch_tables(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    model = ExportSource.load(run).model
    return model.label_table, model.bias


def test_numpy_alone_reads_texts(exported: Path, run: Path, data: Path, tmp_path: Path) -> None:
    texts = ["WÖRD03, wörd04 wörd03!", "", "unknown words alone", "wörd11 17 wörd12_wörd13"]
    (tmp_path / "texts.txt").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    code, found, _ = read_alone(exported, tmp_path / "texts.txt")
    vocabulary = ExportSource.load(run).directory.vocabulary()
    assert vocabulary is not None and code == 0
    _, queries = queries_of(run, vocabulary.transform(texts))
    assert [[label for label, _ in answers] for answers in found] == queries.exact_ids.tolist()


def test_the_reader_passes_over_a_header(exported: Path, data: Path, tmp_path: Path) -> None:
    header, _, rest = (data / "test.txt").read_text().partition("\n")
    (tmp_path / "rows.txt").write_text(rest)
    expected = read_alone(exported, tmp_path / "rows.txt")
    assert len(header.split()) == 3 and len(expected[1]) == len(rest.splitlines())
    for numbers in (header, " ".join(header.split()[:2])):
        (tmp_path / "headed.txt").write_text(f"{numbers}\n{rest}")
        assert read_alone(exported, tmp_path / "headed.txt") == expected


def test_the_reader_is_a_filter_that_speaks_in_sentences(exported: Path, data: Path, tmp_path: Path) -> None:
    lines = (data / "test.txt").read_bytes().partition(b"\n")[2]
    (tmp_path / "many.txt").write_bytes(lines * 200)
    command = f"{sys.executable} {READER} {exported} {tmp_path / 'many.txt'} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert (done.stderr, len(done.stdout.splitlines())) == ("", 1)
    (tmp_path / "rows.txt").write_bytes(lines.splitlines()[0] + b"\n1 999999:1\n")
    code, found, errors = read_alone(exported, tmp_path / "rows.txt")
    assert (
        (code, len(found)) == (1, 1) and errors.startswith(f"{tmp_path / 'rows.txt'}:2: ") and "Traceback" not in errors
    )
    code, _, errors = read_alone(exported, tmp_path / "none.txt")
    assert code == 1 and "No such file" in errors and "Traceback" not in errors
    done = subprocess.run([sys.executable, READER, "--help"], capture_output=True, text=True, timeout=120)
    assert "read_midx.py OUT [INPUT]" in done.stderr


@pytest.mark.parametrize(
    ("num_labels", "dim", "num_candidates"), [(700, 12, 40), (700, 12, 1), (300, 1, 77), (1, 3, 1)]
)
def test_the_reader_and_the_measured_search_visit_the_same_labels(
    num_labels: int, dim: int, num_candidates: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(num_labels)
    path = tmp_path / "train.txt"
    lines = [f"{int(rng.zipf(1.3)) % num_labels} {i % 30}:1 {30 + i % 11}:0.5" for i in range(900)]
    path.write_text("\n".join([f"900 41 {num_labels}", *lines]) + "\n", encoding="utf-8")
    options = [f"model.dim={dim}", "training.epochs=1", "sampler.num_codewords=9", "sampler.num_draws=20"]
    train(path, output=tmp_path / "run", config=load_config(assignments=[*options, "data.validation_fraction=0"]))
    export(tmp_path / "run", output=tmp_path / "out")
    model = reader().Model(tmp_path / "out")
    source, queries = queries_of(tmp_path / "run", load_dataset(path).split().features[:60])
    index, num_rows = midx_module._build_index(source), source.num_rows
    postings, offsets = model.tensors["index.postings"], model.tensors["index.offsets"]
    assert sorted(postings.tolist()) == list(range(num_rows)) and offsets[-1] == num_rows <= num_labels
    found = midx_module._search(queries.vectors, index, source.table(), source.bias(), num_candidates)
    whole = midx_module._search(queries.vectors, index, source.table(), source.bias(), num_rows)
    np.testing.assert_array_equal(source.model.known_labels.labels_of(whole), queries.exact_ids)
    model.num_candidates = num_candidates
    for row in range(60):
        candidates = model.candidates(queries.vectors[row])
        assert len(candidates) >= min(num_candidates, num_rows) and len(np.unique(candidates)) == len(candidates)
        scores = source.table()[candidates] @ queries.vectors[row] + source.bias()[candidates]
        best = candidates[np.argsort(-scores, kind="stable")][:5]
        assert found[row][found[row] >= 0].tolist() == best.tolist()


def test_what_is_in_the_directory_is_all_there_is_to_know(exported: Path, run: Path, data: Path) -> None:
    document = json.loads((exported / "export.json").read_text(encoding="utf-8"))
    source = ExportSource.load(run)
    assert document["model"] == {
        "num_features": F,
        "num_labels": L,
        "num_label_rows": L,
        "dim": D,
        "num_hidden_layers": 0,
        "activation": "relu",
        "residual": True,
        "weighting": "none",
        "normalize": "l2",
        "num_train": 320,
    }
    assert document["interpolation"] == source.interpolation.as_dict()
    assert source.calibration is not None and document["calibration"] == source.calibration.as_dict()
    for name in ("labels.txt", "vocabulary.txt"):
        assert (exported / name).read_bytes() == (data / name).read_bytes()
    tensors = reader().Model(exported).tensors
    frequencies = load_dataset(data).label_frequencies()
    assert tensors["labels.frequencies"].tolist() == frequencies.tolist()
    assert (exported / "neighbors.safetensors").exists() == source.interpolation.needs_neighbors
    names = {path.name for path in exported.iterdir()}
    sums = (exported / "SHA256SUMS").read_text(encoding="utf-8")
    expected = "".join(
        f"{hashlib.sha256((exported / name).read_bytes()).hexdigest()}  {name}\n"
        for name in sorted(names - {"SHA256SUMS"})
    )
    assert sums == expected
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "--quiet", "--strict", "SHA256SUMS"], cwd=exported, check=True, timeout=60)
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in exported.iterdir()} == {0o666 & ~mask}


# --------------------------------------------------------------------------- damaged


@pytest.mark.parametrize("num_flips", [200, pytest.param(5000, marks=pytest.mark.soak)])
@pytest.mark.fault("R6")
def test_every_bit_flip_is_found(exported: Path, tmp_path: Path, num_flips: int, record_property: Any) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    model = reader().Model
    model(copy)
    rng = np.random.default_rng(0)
    files = sorted(copy.iterdir())
    found = 0
    for flip in range(num_flips):
        file = files[flip % len(files)]
        content = file.read_bytes()
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        try:
            model(copy)
        except (AttributeError, LookupError, OSError, TypeError, ValueError):
            found += 1
        file.write_bytes(content)
    record_property("count", num_flips)
    assert found == num_flips


@pytest.mark.fault("R6")
def test_every_flip_in_the_sums_is_found(exported: Path, tmp_path: Path) -> None:
    """That of their last byte too."""
    copy, model = tmp_path / "copy", reader().Model
    shutil.copytree(exported, copy)
    sums = (copy / "SHA256SUMS").read_bytes()
    for place in range(len(sums)):
        for bit in (0, 3, 5, 7):
            (copy / "SHA256SUMS").write_bytes(sums[:place] + bytes([sums[place] ^ 1 << bit]) + sums[place + 1 :])
            with pytest.raises((AttributeError, LookupError, OSError, TypeError, ValueError)):
                model(copy)


@pytest.mark.fault("R6")
def test_cut_missing_swapped_and_foreign_files_are_refused(exported: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("0:1\n")

    def damage(change: Callable[[Path], object]) -> str:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(exported, copy)
        change(copy)
        code, found, errors = read_alone(copy, tmp_path / "rows.txt")
        assert code == 1 and found == [] and "Traceback" not in errors
        return errors

    def reseal(copy: Path) -> None:
        names = sorted(path.name for path in copy.iterdir() if path.name != "SHA256SUMS")
        lines = [f"{hashlib.sha256((copy / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
        (copy / "SHA256SUMS").write_text("".join(lines))

    def cut(copy: Path) -> None:
        content = (copy / "model.safetensors").read_bytes()
        (copy / "model.safetensors").write_bytes(content[: len(content) // 2])

    def other_version(copy: Path) -> None:
        document = json.loads((copy / "export.json").read_text(encoding="utf-8"))
        (copy / "export.json").write_text(json.dumps(document | {"version": 5}))
        reseal(copy)

    assert "model.safetensors has another sha256" in damage(cut)
    assert "is no sound midx export" in damage(lambda copy: (copy / "model.safetensors").unlink())
    assert "is no sound midx export" in damage(lambda copy: (copy / "SHA256SUMS").unlink())
    assert "export.json has another sha256" in damage(lambda copy: (copy / "SHA256SUMS").write_text(""))
    assert "labels.txt has another" in damage(lambda copy: (copy / "labels.txt").write_text("other\n"))
    assert "of another kind or version" in damage(other_version)
    code, _, errors = read_alone(data, tmp_path / "rows.txt")
    assert code == 1 and "is no sound midx export" in errors


@pytest.mark.fault("R7")
def test_a_malicious_header_is_refused_quickly(exported: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    for content in ((2**60).to_bytes(8, "little") + b"{}", b"\x80\x04cos\nsystem\n", b""):
        (copy / "model.safetensors").write_bytes(content)
        names = sorted(path.name for path in copy.iterdir() if path.name != "SHA256SUMS")
        lines = [f"{hashlib.sha256((copy / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
        (copy / "SHA256SUMS").write_text("".join(lines))
        with pytest.raises((ValueError, LookupError, TypeError)):
            reader().Model(copy)


# ----------------------------------------------------------------------------- faiss


def test_stock_faiss_finds_label_ids(runs: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    run = runs("residual layers")
    result = export(run, output=tmp_path / "out", format="faiss")
    assert [one.name for one in result.measured] == ["hnsw", "ivf", "exact"]
    source, queries = queries_of(run, rows(data))
    extended = np.column_stack([queries.vectors, np.ones(150), np.zeros(150)]).astype(np.float32)
    document = json.loads((tmp_path / "out" / "export.json").read_text(encoding="utf-8"))
    assert document["kind"] == "faiss" and document["index"]["dim"] == D + 2
    for name in ("hnsw", "ivf"):
        index = faiss.read_index(str(tmp_path / "out" / f"{name}.faiss"))
        assert (index.ntotal, index.d, index.metric_type) == (L, D + 2, faiss.METRIC_INNER_PRODUCT)
        scores, labels = index.search(extended, 5)
        recall = next(one.recall_5 for one in result.measured if one.name == name)
        assert queries.recall(labels, 5) == pytest.approx(recall) and recall >= 0.99
        for row in range(150):
            kept = labels[row] >= 0
            logits = source.table()[labels[row][kept]] @ queries.vectors[row] + source.bias()[labels[row][kept]]
            np.testing.assert_allclose(scores[row][kept], logits, rtol=1e-4, atol=1e-4)
    # Equally long, or neither a graph nor lists find what they should among many labels (EXPERIMENTS.md, "Exports").
    lengths = np.linalg.norm(faiss.read_index(str(tmp_path / "out" / "hnsw.faiss")).reconstruct_n(0, L), axis=1)
    np.testing.assert_allclose(lengths, lengths.max(), rtol=1e-5)
    ivf = faiss.read_index(str(tmp_path / "out" / "ivf.faiss"))
    ivf.nprobe = ivf.nlist
    np.testing.assert_array_equal(ivf.search(extended, 5)[1], queries.exact_ids)


# ------------------------------------------------------------------------------ onnx


@pytest.mark.parametrize("name", MODELS)
def test_stock_onnxruntime_encodes_as_torch_does(
    runs: Callable[[str], Path], data: Path, tmp_path: Path, name: str
) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    run = runs(name)
    result = export(run, output=tmp_path / "out", format="onnx")
    assert [one.name for one in result.measured] == ["onnx encoder", "torch encoder"]
    assert result.measured[0].recall_5 is not None and result.measured[0].recall_5 > 0.999
    path = str(tmp_path / "out" / "encoder.onnx")
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    source = ExportSource.load(run)
    features = rows(data)  # rows 4 and 5 are empty
    empty = csr_matrix((3, F), dtype=np.float32)
    for part in (features, features[[4]], features[[5, 4, 3, 5]], features[[0, 5]], features[:1], empty, features[:0]):
        inputs = {
            "feature_ids": part.indices.astype(np.int64),
            "values": part.data.astype(np.float32),
            "offsets": part.indptr.astype(np.int64),
        }
        found = session.run(["queries"], inputs)[0]
        expected = (
            source.model.encode(source.model.scaling(part)).numpy() if part.shape[0] else np.empty((0, D), np.float32)
        )
        assert found.shape == expected.shape and found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_onnxruntimes_threads_do_not_change_a_bit(run: Path) -> None:
    """A scatter that adds loses some of what several threads add to one row, where rows are long and wide."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from xmc_midx.exporting.onnx import _build

    source = ExportSource.load(run)
    assert source.model.scaling.idf is None
    encoder = SparseEncoder(2000, 256)
    encoder.reset_parameters(torch.Generator().manual_seed(0))
    graph = _build(onnx, replace(source, model=replace(source.model, encoder=encoder)))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 4
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    part = sp.random(64, 2000, density=0.05, format="csr", dtype=np.float32, random_state=np.random.default_rng(0))
    inputs = {
        "feature_ids": part.indices.astype(np.int64),
        "values": part.data,
        "offsets": part.indptr.astype(np.int64),
    }
    first = session.run(["queries"], inputs)[0]
    for _ in range(100):
        np.testing.assert_array_equal(session.run(["queries"], inputs)[0], first)


def test_a_graph_that_computes_something_else_is_not_exported(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    from xmc_midx.exporting import onnx as onnx_module

    build = onnx_module._build

    def wrong(module: Any, source: ExportSource) -> Any:
        with torch.no_grad():
            source.model.encoder.bias += 0.1
            graph = build(module, source)
            source.model.encoder.bias -= 0.1
        return graph

    monkeypatch.setattr(onnx_module, "_build", wrong)
    with pytest.raises(DataError, match=r"onnxruntime's queries differ from torch's by 0\.1"):
        export(run, output=tmp_path / "out", format="onnx")
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------- the command


def test_the_command_prints_recall_bytes_and_times(run: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    assert app.run(["export", str(run), str(tmp_path / "a" / "out"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    directory = tmp_path / "a" / "out"
    assert document["files"] == {path.name: path.stat().st_size for path in directory.iterdir()}
    assert document["bytes"] == sum(document["files"].values())
    assert (document["format"], document["num_instances"], document["num_labels"]) == ("midx", 150, L)
    assert document["measured_on"] == str(data.resolve())
    first, last = document["measured"]
    assert first["name"] == "midx" and first["recall@1"] == first["recall@5"] == 1.0
    assert first["settings"] == {"num_candidates": L} and first["microseconds_per_query"] > 0
    assert last["name"] == "exact"
    assert app.run(["export", str(run), str(tmp_path / "b"), "--data", str(data / "train.txt")]) == 0
    shown = capsys.readouterr()
    assert shown.err == "" and "recall@1  recall@5  µs/query" in shown.out
    assert f"Over 320 instances of {data / 'train.txt'}, of the model alone" in shown.out
    # The same run, the same files.
    for name in ("model.safetensors", "labels.txt", "vocabulary.txt"):
        assert (tmp_path / "b" / name).read_bytes() == (directory / name).read_bytes()


def test_a_directory_that_is_not_empty_or_where_one_is_is_refused(
    run: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    assert app.run(["export", str(run), str(tmp_path / "full")]) == 2
    assert "is not empty" in capsys.readouterr().err
    (tmp_path / "file").write_text("mine")
    assert app.run(["export", str(run), str(tmp_path / "file")]) == 2
    (tmp_path / "empty").mkdir()
    assert app.run(["export", str(run), str(tmp_path / "empty")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]
    assert (tmp_path / "full" / "thesis.tex").read_text() == "mine"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for here in (".", str(tmp_path / "here")):
        assert app.run(["export", str(run.resolve()), here]) == 2
        assert "is the directory you are in" in capsys.readouterr().err


def test_a_test_split_of_nothing_leaves_the_training_rows_to_measure_on(
    run: Path, data: Path, tmp_path: Path, capsys: Any
) -> None:
    other = tmp_path / "data"
    shutil.copytree(data, other)
    (other / "test.txt").write_text(f"0 {F} {L}\n")
    assert app.run(["export", str(run), str(tmp_path / "out"), "--data", str(other)]) == 0
    shown = capsys.readouterr().out
    num_rows = load_dataset(data).split("train").num_instances
    assert f"Over {num_rows:,} instances" in shown and "Recall was not measured" not in shown


def test_data_that_is_gone_or_of_another_model(run: Path, tmp_path: Path, topic_dir: Path, capsys: Any) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    record = json.loads((moved / "run.json").read_text(encoding="utf-8"))
    (moved / "run.json").write_text(json.dumps(record | {"data": str(tmp_path / "nowhere")}), encoding="utf-8")
    assert app.run(["export", str(moved), str(tmp_path / "out")]) == 0
    assert "Recall was not measured" in capsys.readouterr().out
    assert reader().Model(tmp_path / "out").num_candidates == L
    assert app.run(["export", str(moved), str(tmp_path / "again"), "--data", str(topic_dir)]) == 0
    (tmp_path / "other.txt").write_text("1 7 23\n0 1:1\n")
    with pytest.raises(DataError, match="has 7 features; the model was trained with 40"):
        export(run, output=tmp_path / "x", data=tmp_path / "other.txt")
    with pytest.raises(DataError):
        export(run, output=tmp_path / "x", data=tmp_path / "nowhere")
    assert not (tmp_path / "x").exists()


def test_a_format_that_is_unknown_or_needs_more_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert app.run(["export", str(run), str(tmp_path / "out"), "--format", "npz"]) == 2
    with pytest.raises(UsageError, match="expected midx, faiss, onnx"):
        export(run, output=tmp_path / "out", format="npz")
    for package, form in (("faiss", "faiss"), ("onnxruntime", "onnx")):
        monkeypatch.setitem(sys.modules, package, None)
        assert app.run(["export", str(run), str(tmp_path / "out"), "--format", form]) == 2
        assert "pip install 'xmc-midx[export]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("R6")
def test_a_damaged_run_is_not_exported(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    model = copy / "model.safetensors"
    content = bytearray(model.read_bytes())
    content[-3] ^= 4
    model.write_bytes(content)
    with pytest.raises(DataError, match=r"is not what model\.json says"):
        export(copy, output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


# ------------------------------------------------------------------- complete or absent


def seal_and_die(path: str, point: str, number: int) -> None:
    from xmc_midx import crash
    from xmc_midx.signals import interrupt_on_signals

    interrupt_on_signals()
    crash.arm(point, number)
    with sealed.sealed_directory(Path(path)) as directory:
        (directory / "a.txt").write_text("a")


@pytest.mark.parametrize("point", ["export.written", "export.renamed"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.fault("R2")
def test_an_export_is_complete_or_absent(tmp_path: Path, point: str, number: int) -> None:
    out = tmp_path / "out"
    pid = os.fork()
    if pid == 0:
        try:
            seal_and_die(str(out), point, number)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    if point == "export.renamed":
        assert sorted(path.name for path in out.iterdir()) == ["SHA256SUMS", "a.txt"]
        return
    assert not out.exists()
    strays = list(tmp_path.iterdir())
    assert len(strays) == (1 if number == signal.SIGKILL else 0)
    with sealed.sealed_directory(out) as directory:
        (directory / "a.txt").write_text("a")
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "what the killed one left is gone"


@pytest.mark.fault("R4")
def test_a_full_disk_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for place in ("xmc_midx.exporting.midx.save_file", "xmc_midx.exporting.sealed.sync_file"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(ResourceError, match=r"No space left on device.*Free some space"):
                export(run, output=tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


def test_the_least_effort_that_finds_99_percent_is_taken(run: Path, data: Path) -> None:
    _, queries = queries_of(run, rows(data))

    def search_at(effort: int) -> Any:
        def search(vectors: np.ndarray) -> np.ndarray:
            found = queries.exact_ids.copy()
            found[effort:] = -1  # finds all of the first `effort` queries
            return found

        return search

    # 10, 16, 25, 38, 58, 88, 133, 200: the first that answers 149 of the 150.
    assert tune(queries, search_at, first=10, last=1000) == 200
    assert tune(queries, search_at, first=10, last=100) == 100
    assert tune(None, search_at, first=10, last=800) == 100
