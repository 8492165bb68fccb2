"""The stages of one system's benchmark, each a process that `scripts/benchmark_peers.py` starts.

    PYTHON scripts/peers/stages.py STAGE REQUEST.json RESULT.json

`prepare`, `score` and xmc-midx's `predict` run with xmc-midx's interpreter, the peers' stages with their own: the
standard library alone is imported up here. Not here: xmc-midx's training, which is the command `xmc-midx train`.

A request names files and settings; keys of all but `prepare`: `system`, `function` (that of the system below), `work`
(what `prepare` wrote), `model` (a directory), `predictions` (a file), `propensity` [A, B], `threads`, `seed`, `k`.
"""

from __future__ import annotations

import itertools
import json
import platform
import statistics
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# A pass over a small test split takes milliseconds: several, and their median.
MIN_PREDICT_SECONDS, MAX_PREDICT_PASSES = 1.0, 5
DISTRIBUTIONS = ("xmc-midx", "torch", "numpy", "scipy", "libpecos", "omikuji", "napkinxc")


def prepare(request: dict) -> dict:
    """DATA -> normalised features and labels of both splits, as npz and as XMC text."""
    from scipy.sparse import csr_matrix, save_npz

    from xmc_midx.data.dataset import load_dataset
    from xmc_midx.data.features import normalize_rows
    from xmc_midx.data.formats import write_xmc

    dataset, work = load_dataset(request["data"]), Path(request["work"])
    empty = 0
    for name in ("test", "train"):
        split = dataset.split(name)
        # A copy: ids and offsets are still the dataset's own, and may be read-only.
        features, labels = normalize_rows(split.features).copy(), csr_matrix(split.labels, dtype="float32")
        features.eliminate_zeros()
        save_npz(work / f"{name}_features.npz", features, compressed=False)
        save_npz(work / f"{name}_labels.npz", labels, compressed=False)
        write_xmc(work / f"{name}.txt", features, labels)
        kept = features.getnnz(axis=1) > 0
        if name == "train" and (empty := int((~kept).sum())):
            write_xmc(work / "train_omikuji.txt", features[kept], labels[kept])
    train, spec = dataset.statistics("train"), dataset.spec
    return {
        "name": dataset.name,
        "num_train": train.num_instances,
        "num_test": dataset.split("test").num_instances,
        "num_features": dataset.num_features,
        "num_labels": dataset.num_labels,
        "labels_per_instance": train.labels_per_instance,
        "num_train_without_features": empty,
        "propensity": [spec.propensity_a, spec.propensity_b] if spec else [0.55, 1.5],
        "propensity_source": f"registry: {spec.name}" if spec else "default",
    }


def score(request: dict) -> dict:
    """A predictions file -> metrics, as `xmc-midx evaluate - DATA --predictions FILE` computes them."""
    import numpy as np
    from scipy.sparse import load_npz

    from xmc_midx.data.predictions import read_predictions
    from xmc_midx.metrics import evaluate_topk

    work = Path(request["work"])
    train, test = load_npz(work / "train_labels.npz"), load_npz(work / "test_labels.npz")
    top = read_predictions(request["predictions"], test.shape[1], num_instances=test.shape[0])
    a, b = request["propensity"]
    frequencies = np.bincount(train.indices, minlength=train.shape[1])
    report = evaluate_topk(top, test, label_frequencies=frequencies, num_train=train.shape[0], A=a, B=b)
    return {"metrics": dict(report.metrics)}


def train_pecos(request: dict) -> dict:
    from pecos.xmc import Indexer, LabelEmbeddingFactory
    from pecos.xmc.xlinear.model import XLinearModel
    from scipy.sparse import load_npz

    threads, work = request["threads"], Path(request["work"])
    features, labels = load_npz(work / "train_features.npz"), load_npz(work / "train_labels.npz").tocsc()
    started = time.perf_counter()
    embedding = LabelEmbeddingFactory.create(labels, features, method="pifa", threads=threads)
    clusters = Indexer.gen(embedding, threads=threads, seed=request["seed"])
    model = XLinearModel.train(features, labels, C=clusters, threads=threads)
    trained = time.perf_counter()
    model.save(request["model"])
    return {"train_seconds": trained - started, "save_seconds": time.perf_counter() - trained}


def train_omikuji(request: dict) -> dict:
    # `Model.train_on_data` reads and trains in one call; these are its two halves.
    import omikuji
    from omikuji import ffi, lib

    settings, threads = omikuji.Model.default_hyper_param(), omikuji._ThreadPoolHandle(request["threads"])
    if request["system"] == "omikuji-bonsai":  # as Omikuji's documentation sets it up
        settings.cluster_balanced, settings.cluster_k, settings.max_depth = False, 100, 3
    path = Path(request["work"]) / "train_omikuji.txt"  # there where rows without features had to be dropped
    path = path if path.exists() else path.with_name("train.txt")
    dataset = lib.load_omikuji_data_set(ffi.new("char[]", str(path).encode()), threads.ptr)
    if dataset == ffi.NULL:
        raise RuntimeError("Omikuji cannot read the training file")
    dataset = ffi.gc(dataset, lib.free_omikuji_data_set)
    started = time.perf_counter()
    model = lib.train_omikuji_model(dataset, settings, threads.ptr)
    trained = time.perf_counter()
    if model == ffi.NULL:
        raise RuntimeError("Omikuji's training failed")
    omikuji.Model(model).save(request["model"])
    return {"train_seconds": trained - started, "save_seconds": time.perf_counter() - trained}


def train_napkinxc(request: dict) -> dict:
    from napkinxc.models import PLT
    from scipy.sparse import load_npz

    work = Path(request["work"])
    features, labels = load_npz(work / "train_features.npz"), load_npz(work / "train_labels.npz")
    started = time.perf_counter()
    PLT(request["model"], threads=request["threads"], seed=request["seed"]).fit(features, labels)
    return {"train_seconds": time.perf_counter() - started}


# A loader gives three functions: CSR rows -> the system's input (not timed), input -> output, output -> pairs by row.


def load_pecos(request: dict) -> tuple:
    from pecos.xmc.xlinear.model import XLinearModel

    model, threads, k = XLinearModel.load(request["model"], is_predict_only=True), request["threads"], request["k"]
    return (
        lambda rows: rows,
        lambda rows: model.predict(rows, only_topk=k, threads=threads),
        lambda answers: (zip(*row, strict=True) for row in csr_rows(answers)),
    )


def load_omikuji(request: dict) -> tuple:
    import omikuji

    model, k = omikuji.Model.load(request["model"]), request["k"]
    model.init_prediction_thread_pool(request["threads"])
    return (
        lambda rows: [list(zip(*row, strict=True)) for row in csr_rows(rows)],
        lambda rows: [model.predict(row, top_k=k) for row in rows],
        lambda answers: answers,
    )


def load_napkinxc(request: dict) -> tuple:
    from napkinxc.models import PLT

    model, k = PLT(request["model"], threads=request["threads"]), request["k"]
    model.load()
    return (lambda rows: rows, lambda rows: model.predict_proba(rows, top_k=k), lambda answers: answers)


def load_xmc_midx(request: dict) -> tuple:
    import torch

    from xmc_midx.predictor import Predictor
    from xmc_midx.rundir import RunDirectory

    torch.set_num_threads(request["threads"])
    device = RunDirectory.open(request["model"]).config.training.device
    predictor, k = Predictor.load(request["model"], device=device), request["k"]
    return (
        lambda rows: rows,
        lambda rows: predictor.predict(rows, k=k),
        lambda top: (zip(*row, strict=True) for row in zip(top.label_ids.tolist(), top.scores.tolist(), strict=True)),
    )


def csr_rows(matrix):
    for begin, end in itertools.pairwise(matrix.indptr.tolist()):
        yield matrix.indices[begin:end].tolist(), matrix.data[begin:end].tolist()


def predict(request: dict) -> dict:
    """The test split with a saved model -> predictions as `label:score ...` lines, and the time of a pass."""
    from scipy.sparse import load_npz

    features = load_npz(Path(request["work"]) / "test_features.npz")
    started = time.perf_counter()
    convert, answer, pairs = LOADERS[request["function"]](request)
    load_seconds = time.perf_counter() - started
    answer(convert(features[:1]))
    rows, passes = convert(features), []
    while not passes or (sum(passes) < MIN_PREDICT_SECONDS and len(passes) < MAX_PREDICT_PASSES):
        started = time.perf_counter()
        answers = answer(rows)
        passes.append(time.perf_counter() - started)
    with Path(request["predictions"]).open("w") as stream:
        stream.writelines(
            (" ".join(f"{label}:{float(value)!r}" for label, value in row if label >= 0) or " ") + "\n"
            for row in pairs(answers)
        )
    seconds = statistics.median(passes)
    return {
        "load_seconds": load_seconds,
        "predict_passes": passes,
        "predict_seconds": seconds,
        "us_per_instance": seconds / max(features.shape[0], 1) * 1e6,
    }


def beams(request: dict) -> dict:
    """PECOS over its beam widths, for `benchmark_search.py`: how many of its own best labels, which a beam of all
    clusters finds, a narrower one finds too, and its time."""
    from pecos.xmc.xlinear.model import XLinearModel
    from scipy.sparse import load_npz

    model, threads, k = XLinearModel.load(request["model"], is_predict_only=True), request["threads"], request["k"]
    features = load_npz(request["features"])

    def search(rows, beam):
        return model.predict(rows, only_topk=k, beam_size=beam, threads=threads)

    def timed(rows, beam):
        started = time.perf_counter()
        search(rows, beam)
        return time.perf_counter() - started

    exact = search(features, model.nr_labels)
    found = {"num_labels": model.nr_labels, "results": []}
    for beam in request["beams"]:
        hits = search(features, beam).astype(bool).multiply(exact.astype(bool)).nnz
        alone = [timed(features[row], beam) for row in range(min(60, features.shape[0]))]
        found["results"].append(
            {
                "name": f"PECOS, beam {beam}",
                f"recall@{k}": hits / max(exact.nnz, 1),
                "microseconds": 1e6 * statistics.median(timed(features, beam) for _ in range(3)) / features.shape[0],
                "microseconds_alone": 1e6 * statistics.median(alone),
            }
        )
    return found


LOADERS = {"pecos": load_pecos, "omikuji": load_omikuji, "napkinxc": load_napkinxc, "xmc_midx": load_xmc_midx}
TRAINERS = {"pecos": train_pecos, "omikuji": train_omikuji, "napkinxc": train_napkinxc}
STAGES = {
    "prepare": prepare,
    "train": lambda request: TRAINERS[request["function"]](request),
    "predict": predict,
    "score": score,
    "beams": beams,
}


def find_versions() -> dict[str, str]:
    """Of what is installed here; of xmc-midx, of what is imported, which may be a checkout."""
    versions = {"python": platform.python_version()}
    if "xmc_midx" in sys.modules:
        versions["xmc-midx"] = sys.modules["xmc_midx"].__version__
    for name in DISTRIBUTIONS:
        with suppress(PackageNotFoundError):
            versions.setdefault(name, version(name))
    return versions


if __name__ == "__main__":
    stage, request_file, result_file = sys.argv[1:]
    result = STAGES[stage](json.loads(Path(request_file).read_text()))
    Path(result_file).write_text(json.dumps(result | {"versions": find_versions()}))
