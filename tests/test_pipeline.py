"""The whole chain on a small learnable dataset: train, evaluate, predict, resume, and what is refused."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.sparse import csr_matrix

from xmc_midx import checkpoint as checkpoint_module
from xmc_midx.checkpoint import CheckpointStore, map_model
from xmc_midx.config import SAMPLER_NAMES, Config, load_config
from xmc_midx.data import formats
from xmc_midx.data.dataset import load_dataset, load_split
from xmc_midx.data.features import IDF
from xmc_midx.errors import DataError, DivergedError, ResourceError, UsageError
from xmc_midx.metrics import evaluate_topk, without_ignored
from xmc_midx.pipeline import TrainResult, evaluate, export, plan, predict, resume, train
from xmc_midx.predictor import Predictor
from xmc_midx.quantization import dequantize
from xmc_midx.rundir import RunDirectory
from xmc_midx.session import TrainingSession
from xmc_midx.types import EpochStats, SilentReporter, TopK

OPTIONS = (
    "model.dim=16",
    "model.dropout=0.2",
    "training.epochs=4",
    "training.batch_size=32",
    "training.label_learning_rate=0.05",
    "training.encoder_learning_rate=0.2",
    "sampler.num_codewords=3",
    "sampler.num_draws=8",
    "sampler.pool_instances=16",
    "sampler.gradient_negatives=5",
    "data.validation_fraction=0.1",
    "neighbors.enabled=false",
    "ranker.enabled=false",
)
"""288 training instances of 320: 9 steps an epoch, 36 in all, each of two groups."""
STEPS, TOTAL = 9, 36


def make_config(*assignments: str) -> Config:
    return load_config(assignments=[*OPTIONS, *assignments])


class Interruption(BaseException):
    """Stands for a kill: nothing may catch it."""


class StopAfter(SilentReporter):
    """Interrupts a training at its n-th step, counted over the calls."""

    def __init__(self, num_steps: int) -> None:
        self.left = num_steps

    def step(self, advance: int = 1, **facts: float) -> None:
        if "loss" in facts:
            self.left -= 1
            if self.left == 0:
                raise Interruption


def model_bytes(run: Path, pointer: str = "latest") -> dict[str, bytes]:
    """The tensors of a checkpoint as they lie on disk."""
    path = CheckpointStore(run / "checkpoints").path_of(pointer)
    return {name: (path / name).read_bytes() for name in ("model.safetensors", "training.safetensors")}


def history(run: Path) -> list[dict[str, Any]]:
    """The epochs, without what the clock says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        {key: line[key] for key in ("epoch", "step", "loss", "learning_rate", "validation", "sampler")}
        for line in lines
    ]


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(topic_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A finished run with the default sampler. Read only."""
    output = tmp_path_factory.mktemp("runs") / "trained"
    return train(topic_dir, output=output, config=make_config(), test=topic_dir / "test.txt")


def write_xmc(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# -------------------------------------------------------------- train, evaluate, predict


@pytest.mark.parametrize("estimator", ["pool", "instance"])
@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_every_sampler_learns_far_more_than_the_label_frequencies(
    topic_dir: Path, tmp_path: Path, sampler: str, estimator: str
) -> None:
    config = make_config(f"sampler.name={sampler}", f"sampler.estimator={estimator}")
    if (sampler, estimator) == ("in-batch", "instance"):
        with pytest.raises(UsageError, match=r"sampler\.estimator=pool"):
            train(topic_dir, output=tmp_path / "run", config=config)
        return
    result = train(topic_dir, output=tmp_path / "run", config=config, test=topic_dir / "test.txt")
    report = evaluate(tmp_path / "run", data=topic_dir).report
    assert result.test is not None and result.test.metrics == report.metrics

    test = load_split(topic_dir / "test.txt")
    most_frequent = load_dataset(topic_dir).label_frequencies().argmax()
    baseline = test.labels[:, [most_frequent]].nnz / 150
    assert baseline < 0.25
    assert report.metrics["P@1"] > 0.85 and report.metrics["R@5"] > 0.85
    assert (report.num_instances, report.num_without_labels) == (150, 2)

    top = predict(tmp_path / "run", input=topic_dir / "test.txt", k=5).top
    assert top.label_ids.shape == (150, 5)
    hits = sum(int(label) in test.labels[[i]].indices for i, label in enumerate(top.label_ids[:, 0]))
    assert hits / 150 == pytest.approx(report.metrics["P@1"])


@pytest.mark.slow
def test_bibtex_comes_within_two_points_of_the_best_peer(shared_data: Path, tmp_path: Path) -> None:
    train(shared_data / "bibtex", output=tmp_path / "run", config=load_config(assignments=["training.epochs=12"]))
    metrics = evaluate(tmp_path / "run", data=shared_data / "bibtex").report.metrics
    # PECOS, Omikuji and napkinXC at their defaults: 63.2 to 64.3, 38.5 to 39.1, 28.1 to 28.6 (shared/data/README.md).
    assert metrics["P@1"] > 0.62 and metrics["P@3"] > 0.37 and metrics["P@5"] > 0.27


def test_the_result_describes_the_run(trained: TrainResult, topic_dir: Path) -> None:
    document = json.loads(json.dumps(trained.as_dict()))
    assert document["epochs"] == 4 and 1 <= document["best_epoch"] <= 4
    assert document["seconds"] > 0 and np.isfinite(document["loss"])
    assert set(document["validation"]) >= {"P@1", "P@3", "P@5"}
    assert document["test"]["propensity"] == {"A": 0.55, "B": 1.5}
    run = Path(document["run"])
    best = Path(document["best"])
    assert best.parent == run / "checkpoints" and best.is_dir()
    files = [run / "model.safetensors", run / "neighbors.safetensors"]
    assert document["model_bytes"] == sum(file.stat().st_size for file in files if file.exists())
    assert document["peak_memory_bytes"] > 2**20
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4] and [line["step"] for line in lines] == [9, 18, 27, 36]
    scores = [np.mean([line["validation"][f"P@{k}"] for k in (1, 3, 5)]) for line in lines]
    last_best = max(epoch for epoch, score in enumerate(scores, 1) if score == max(scores))
    assert document["best_epoch"] == last_best and best.name == str(9 * document["best_epoch"])
    assert document["validation"] == lines[document["best_epoch"] - 1]["validation"]
    provenance = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert provenance["fingerprint"] == load_dataset(topic_dir).fingerprint()
    assert load_config(run / "config.yaml") == trained.config


def test_a_run_directory_holds_no_pickle_and_nothing_left_over(trained: TrainResult) -> None:
    run = Path(trained.run)
    for path in run.rglob("*"):
        if not path.is_file():
            continue
        if path.suffix == ".safetensors":
            load_file(path)
        else:
            path.read_text(encoding="utf-8")
        assert not path.name.startswith(".") or path.name == ".lock"
        assert not path.read_bytes().startswith((b"\x80", b"PK"))


def test_predictions_of_a_file_score_like_the_model_that_made_them(
    trained: TrainResult, topic_dir: Path, tmp_path: Path
) -> None:
    top = predict(trained.run, input=topic_dir / "test.txt", k=5).top
    lines = [
        " ".join(f"{label}:{float(score)!r}" for label, score in zip(labels, scores, strict=True))
        for labels, scores in zip(top.label_ids, top.scores, strict=True)
    ]
    path = write_xmc(tmp_path / "predictions.txt", "\n".join(lines) + "\n")
    from_file = evaluate(None, data=topic_dir, predictions=path)
    from_model = evaluate(trained.run, data=topic_dir)
    assert from_file.report.metrics == pytest.approx(dict(from_model.report.metrics))
    assert (from_file.report.propensity_a, from_file.report.propensity_b) == (0.55, 1.5)
    deciles = evaluate(None, data=topic_dir, predictions=path, breakdown="deciles")
    assert deciles.report == from_file.report and deciles.as_dict()["breakdown_by"] == "deciles"
    assert [group["group"] for group in deciles.breakdown][::10] == ["decile 1", "unseen"]
    assert sum(group["num_hits"] for group in deciles.breakdown) == sum(g["num_hits"] for g in from_file.breakdown)
    with pytest.raises(UsageError, match="expected head-tail or deciles"):
        evaluate(None, data=topic_dir, predictions=path, breakdown="tenths")
    short = write_xmc(tmp_path / "short.txt", "\n".join(lines[:-1]) + "\n")
    with pytest.raises(DataError, match="the file ends after 149 instances, expected 150"):
        evaluate(None, data=topic_dir, predictions=short)
    with pytest.raises(UsageError, match="nothing to evaluate"):
        evaluate(None, data=topic_dir)


def test_given_propensities_are_used_and_named(trained: TrainResult, topic_dir: Path) -> None:
    default = evaluate(trained.run, data=topic_dir)
    given = evaluate(trained.run, data=topic_dir, A=0.6, B=2.6)
    assert (given.report.propensity_a, given.report.propensity_b, given.propensity_source) == (0.6, 2.6, "flags")
    assert default.propensity_source == "default"
    assert given.report.metrics["P@1"] == default.report.metrics["P@1"]
    assert given.report.metrics["PSP@1"] != default.report.metrics["PSP@1"]
    with pytest.raises(UsageError, match="go together"):
        evaluate(trained.run, data=topic_dir, A=0.6)


def test_propensities_count_all_training_instances_also_those_held_out(trained: TrainResult, topic_dir: Path) -> None:
    dataset = load_dataset(topic_dir)
    assert dataset.test is not None
    top = predict(trained.run, input=topic_dir / "test.txt", k=5).top
    expected = evaluate_topk(
        top,
        dataset.test.labels,
        ks=(1, 3, 5),
        label_frequencies=dataset.label_frequencies(),
        num_train=320,
        A=0.55,
        B=1.5,
    )
    assert evaluate(trained.run, data=topic_dir).report.metrics == pytest.approx(dict(expected.metrics))


def test_allowed_and_denied_labels_are_obeyed(trained: TrainResult, topic_dir: Path, tmp_path: Path) -> None:
    allow = write_xmc(tmp_path / "allow.txt", "3\n\n 7\n9\n")
    deny = write_xmc(tmp_path / "deny.txt", "7\n")
    top = predict(trained.run, input=topic_dir / "test.txt", k=4, allow=allow, deny=deny).top
    assert {tuple(sorted(row)) for row in top.label_ids.tolist()} == {(-1, -1, 3, 9)}
    top = predict(trained.run, input=topic_dir / "test.txt", k=23, deny=deny).top
    assert not (top.label_ids == 7).any()
    for text in ("3\n23\n", "-1\n", "three\n", "1.0\n", "²\n"):
        with pytest.raises(DataError, match=r"bad\.txt:\d"):
            predict(trained.run, input=topic_dir / "test.txt", allow=write_xmc(tmp_path / "bad.txt", text))


# ------------------------------------------------------------------------ determinism


def test_the_same_seed_gives_the_same_model_bit_for_bit_and_another_seed_another(
    topic_dir: Path, tmp_path: Path
) -> None:
    runs = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.manual_seed(len(runs))
        train(topic_dir, output=tmp_path / name, config=make_config(f"training.seed={seed}"))
        runs.append(tmp_path / name)
    for pointer in ("best", "latest"):
        first, again, other = (model_bytes(run, pointer) for run in runs)
        assert first == again
        assert first["model.safetensors"] != other["model.safetensors"]


def test_training_leaves_the_global_generators_alone(topic_dir: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    train(topic_dir, output=tmp_path / "run", config=make_config("model.num_hidden_layers=1", "training.epochs=1"))
    Predictor.load(tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002


@pytest.mark.parametrize("options", [(), ("model.num_hidden_layers=2", "model.residual=false", "data.normalize=none")])
def test_a_reloaded_model_predicts_like_the_one_in_memory(
    topic_dir: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    exact = ("data.validation_fraction=0", "model.storage=float32")
    train(topic_dir, output=tmp_path / "run", config=make_config(*options, *exact))
    directory = RunDirectory.open(tmp_path / "run")
    split = load_dataset(topic_dir).train
    assert split is not None
    with RunDirectory.lock(directory.path):
        session = TrainingSession(directory, split, SilentReporter())
        session.load()
    features = load_split(topic_dir / "test.txt").features
    loaded = Predictor.load(tmp_path / "run").predict(features, k=6)
    softmax = session.trainer.softmax
    rows = features.toarray()
    if "data.normalize=none" not in options:
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        rows = rows / np.where(length > 0, length, 1)
    encoder = session.trainer.encoder.eval()
    with torch.no_grad():
        hidden = encoder.activation(torch.from_numpy(rows.astype(np.float32)) @ encoder.embedding + encoder.bias)
        for layer in encoder.hidden:
            hidden = encoder.activation(layer(hidden)) + (hidden if encoder.residual else 0)
    expected = softmax.topk(hidden, 6)
    np.testing.assert_allclose(loaded.scores, expected.scores, atol=1e-4)
    assert (loaded.label_ids == expected.label_ids).mean() > 0.99, "but for ties"


@pytest.mark.parametrize("storage", ["int4", "int8", "float16"])
def test_a_stored_models_mean_logits_are_those_of_the_trained_one(
    topic_dir: Path, tmp_path: Path, storage: str
) -> None:
    train(topic_dir, output=tmp_path / "run", config=make_config("training.epochs=1", f"model.storage={storage}"))
    run = RunDirectory.open(tmp_path / "run")
    trained, stored = map_model(run, "latest")[0], dequantize(run.map_model())
    rows = load_split(topic_dir / "train.txt").features.toarray()
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)

    def mean_logits(model: Any, bias: Any) -> np.ndarray:
        queries = np.maximum(rows @ model["encoder.embedding"] + model["encoder.bias"], 0)
        return queries.mean(axis=0) @ model["labels.weight"].T + bias

    expected = mean_logits(trained, trained["labels.bias"])
    error, before = (np.abs(mean_logits(stored, model["labels.bias"]) - expected) for model in (stored, trained))
    assert before.max() > 0
    if storage == "float16":
        np.testing.assert_array_equal(stored["labels.bias"], trained["labels.bias"])
    else:
        # The held-out rows are not among those that are looked at.
        assert error.max() <= 0.2 * before.max()


# --------------------------------------------------------------------------- resuming


def interrupted(run: Path, data: Path, config: Config, stops: list[int]) -> None:
    """Train, stopping at the given numbers of steps, each counted from where the last start stood; then finish."""
    for turn, stop in enumerate(stops):
        with pytest.raises(Interruption):
            if turn == 0:
                train(data, output=run, config=config, reporter=StopAfter(stop))
            else:
                resume(run, reporter=StopAfter(stop))
    resume(run)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("sampler.name=midx-rq", "sampler.estimator=instance", "sampler.prior=bias", "sampler.refresh_every=5"),
        ("sampler.name=full", "training.precision=bfloat16", "model.num_hidden_layers=1"),
        ("sampler.name=uniform", "training.patience=1", "data.validation_fraction=0.3"),
        ("sampler.name=in-batch", "data.validation_fraction=0"),
        ("model.label_precision=bfloat16", "sampler.name=midx-rq"),
    ],
)
@pytest.mark.fault("R5")
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    topic_dir: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    config = make_config(*options, "training.save_every_steps=2")
    whole = train(topic_dir, output=tmp_path / "whole", config=config)
    for name, stops in (("early", [1]), ("middle", [13]), ("often", [4, 6, 1, 8])):
        interrupted(tmp_path / name, topic_dir, config, stops)
        for pointer in ("best", "latest"):
            assert model_bytes(tmp_path / name, pointer) == model_bytes(tmp_path / "whole", pointer), (name, pointer)
        assert history(tmp_path / name) == history(tmp_path / "whole")
        result = resume(tmp_path / name)
        assert (result.epochs, result.best_epoch, result.loss) == (whole.epochs, whole.best_epoch, whole.loss)
        assert result.validation == whole.validation


def test_a_bfloat16_label_table_is_kept_as_it_is_and_predicts_from_any_checkpoint(
    topic_dir: Path, tmp_path: Path
) -> None:
    run = Path(train(topic_dir, output=tmp_path / "run", config=make_config("model.label_precision=bfloat16")).run)
    table = load_file(CheckpointStore(run / "checkpoints").path_of("latest") / "model.safetensors")["labels.weight"]
    assert table.dtype == torch.bfloat16
    for checkpoint in ("best", "latest"):
        top = Predictor.load(run, checkpoint=checkpoint).predict(load_split(topic_dir / "test.txt").features, k=5)
        assert evaluate_topk(top, load_split(topic_dir / "test.txt").labels).metrics["P@1"] > 0.5


def test_resuming_a_finished_run_changes_nothing_and_returns_its_result(
    topic_dir: Path, tmp_path: Path, trained: TrainResult
) -> None:
    shutil.copytree(trained.run, tmp_path / "run")
    before = tree(tmp_path / "run")
    result = resume(tmp_path / "run")
    assert tree(tmp_path / "run") == before
    assert (result.epochs, result.best_epoch, result.loss) == (trained.epochs, trained.best_epoch, trained.loss)
    assert result.test is not None and trained.test is not None and result.test.metrics == trained.test.metrics


def assert_pointers_load(run: Path) -> None:
    store = CheckpointStore(run / "checkpoints")
    for pointer in ("latest", "best"):
        if store.step_of(pointer) is not None:
            store.load(pointer, ["model", "training"])


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """`kill_at(n)`: the n-th call from now to a step of the checkpoint's writing is the last; 0 lets all pass."""
    left, lock = [0], threading.Lock()

    def guarded(method: Callable[..., Any], after: bool) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            # Two threads write at once: each call has a number of its own.
            with lock:
                left[0] -= 1
                is_last = left[0] == 0
            if is_last and not after:
                raise Interruption
            result = method(*arguments, **options)
            if is_last:
                raise Interruption
            return result

        return call

    monkeypatch.setattr(CheckpointStore, "_turn", guarded(CheckpointStore._turn, after=False))
    monkeypatch.setattr(CheckpointStore, "prune", guarded(CheckpointStore.prune, after=False))
    monkeypatch.setattr(checkpoint_module, "write_tensors", guarded(checkpoint_module.write_tensors, after=True))
    for name in ("append_metrics", "write_metrics"):
        monkeypatch.setattr(RunDirectory, name, guarded(getattr(RunDirectory, name), after=False))

    def start(count: int) -> None:
        left[0] = count

    yield start
    left[0] = 0


@pytest.mark.fault("R2")
def test_a_kill_anywhere_in_a_save_leaves_pointers_that_load_and_the_same_result(
    topic_dir: Path, tmp_path: Path, kill_at: Callable[[int], None]
) -> None:
    config = make_config("training.epochs=2", "training.save_every_steps=6")
    kill_at(0)
    train(topic_dir, output=tmp_path / "whole", config=config)
    expected = {pointer: model_bytes(tmp_path / "whole", pointer) for pointer in ("best", "latest")}
    num_calls = 0
    for count in range(1, 60):
        run = tmp_path / f"run{count}"
        kill_at(count)
        try:
            train(topic_dir, output=run, config=config)
        except Interruption:
            assert_pointers_load(run)
        else:
            num_calls = count - 1
            break
        # Once more, in the first save after the resume.
        kill_at(1 + count % 6)
        try:
            resume(run)
        except Interruption:
            assert_pointers_load(run)
        kill_at(0)
        resume(run)
        for pointer in ("best", "latest"):
            assert model_bytes(run, pointer) == expected[pointer], (count, pointer)
        strays = [path.name for path in run.rglob(".*") if path.name != ".lock"]
        assert strays == []
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == [1, 2], count
        shutil.rmtree(run)
    # Four saves of two files, their pointers and a prune; a line of the history an epoch, all at start and end.
    assert num_calls == 20


def test_resuming_refuses_other_data(topic_dir: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(topic_dir, data)
    with pytest.raises(Interruption):
        train(data, output=tmp_path / "run", config=make_config("training.save_every_steps=2"), reporter=StopAfter(5))
    text = (data / "train.txt").read_text(encoding="utf-8")
    write_xmc(data / "train.txt", text.replace(":0.3", ":0.4", 1))
    assert text != (data / "train.txt").read_text(encoding="utf-8")
    with pytest.raises(DataError, match="is not the data"):
        resume(tmp_path / "run")


def test_resuming_what_is_no_run_is_refused(tmp_path: Path, topic_dir: Path) -> None:
    for path in (tmp_path / "absent", topic_dir):
        with pytest.raises(DataError):
            resume(path)
        with pytest.raises(DataError):
            Predictor.load(path)


# --------------------------------------------------------------------------- refusals


@pytest.mark.fault("R15")
def test_a_run_directory_that_is_in_use_says_so(topic_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with RunDirectory.lock(run), pytest.raises(ResourceError, match="another training is using") as caught:
        train(topic_dir, output=run, config=make_config())
    assert caught.value.exit_code == 4
    train(topic_dir, output=run, config=make_config("training.epochs=1"))
    with RunDirectory.lock(run), pytest.raises(ResourceError, match="another training is using"):
        resume(run)


def test_an_existing_run_and_a_directory_of_others_are_left_alone(
    topic_dir: Path, tmp_path: Path, trained: TrainResult
) -> None:
    before = tree(Path(trained.run))
    with pytest.raises(UsageError, match="holds a run already"):
        train(topic_dir, output=trained.run, config=make_config())
    assert tree(Path(trained.run)) == before
    other = tmp_path / "other"
    other.mkdir()
    write_xmc(other / "thesis.tex", "mine")
    with pytest.raises(UsageError, match=r"is not empty \(thesis\.tex"):
        train(topic_dir, output=other, config=make_config())
    assert tree(other) == {"thesis.tex": b"mine"}


@pytest.mark.parametrize("k", [0, -1, 24, 10**6])
def test_more_results_than_labels_or_none_are_refused(trained: TrainResult, topic_dir: Path, k: int) -> None:
    with pytest.raises(UsageError, match=f"k is {k}; expected 1 to 23"):
        predict(trained.run, input=topic_dir / "test.txt", k=k)
    with pytest.raises(UsageError):
        evaluate(trained.run, data=topic_dir, ks=(1, k))


@pytest.mark.parametrize("num_labels", [1, 3])
def test_the_defaults_work_with_fewer_than_five_labels(tmp_path: Path, num_labels: int) -> None:
    rng = np.random.default_rng(num_labels)
    for split, rows in (("train", 60), ("test", 20)):
        lines = [f"{rng.integers(num_labels)} {rng.integers(6)}:1.0" for _ in range(rows)]
        write_xmc(tmp_path / f"{split}.txt", f"{rows} 6 {num_labels}\n" + "\n".join(lines) + "\n")
    run = train(tmp_path, output=tmp_path / "run", config=make_config()).run
    top = predict(run, input=tmp_path / "test.txt").top
    assert top.label_ids.shape == (20, num_labels) and (np.sort(top.label_ids) == np.arange(num_labels)).all()
    metrics = evaluate(run, data=tmp_path).report.metrics
    assert metrics["P@5"] == pytest.approx(1 / 5), "each instance has one label, and all are among the five best"
    with pytest.raises(UsageError, match=f"k is 6; expected 1 to {num_labels}"):
        predict(run, input=tmp_path / "test.txt", k=6)


def test_feature_ids_with_huge_gaps_are_refused_before_the_memory_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "hashed.svm"
    path.write_text("".join(f"{row % 3} {row}:1.0 {2**30 - row}:0.5\n" for row in range(40)))
    with pytest.raises(DataError, match=r"1,073,741,825 features, .* but only 80 values\. Ids count from 0"):
        train(path, output=tmp_path / "run", config=make_config())


def test_data_that_has_moved_can_be_gone_on_with(topic_dir: Path, tmp_path: Path) -> None:
    place, moved = tmp_path / "here", tmp_path / "there"
    shutil.copytree(topic_dir, place)
    with pytest.raises(Interruption):
        train(place, output=tmp_path / "run", config=make_config(), reporter=StopAfter(2 * STEPS + 1))
    place.rename(moved)
    with pytest.raises(DataError, match="here"):
        resume(tmp_path / "run")
    other = tmp_path / "other"
    shutil.copytree(topic_dir, other)
    text = (other / "train.txt").read_text().replace(" 1:", " 2:", 1)
    (other / "train.txt").write_text(text)
    with pytest.raises(DataError):
        resume(tmp_path / "run", data=other)
    assert resume(tmp_path / "run", data=moved).epochs == 4


def test_label_ids_with_huge_gaps_are_refused_before_the_memory_is_gone(tmp_path: Path) -> None:
    lines = [f"{label} 0:1.0 1:0.5" for label in (0, 7, 1_499_999_999)] * 20
    write_xmc(tmp_path / "train.svm", "\n".join(lines) + "\n")
    with pytest.raises(
        DataError, match="has 1,500,000,000 labels, one more than the largest id, but only 60"
    ) as caught:
        train(tmp_path, output=tmp_path / "run", config=make_config())
    assert caught.value.hint is not None and "renumber" in caught.value.hint


def test_a_header_that_lies_is_asked_about(tmp_path: Path) -> None:
    write_xmc(tmp_path / "train.txt", "40 3 20000000\n" + "1 0:1.0\n" * 40)
    with pytest.raises(DataError, match="has 20,000,000 labels, its header says, but only 40") as caught:
        train(tmp_path, output=tmp_path / "run", config=make_config())
    assert caught.value.hint is not None and "Is it the header of this file?" in caught.value.hint


def test_a_test_file_without_instances_is_refused_before_the_training(
    topic_dir: Path, trained: TrainResult, tmp_path: Path
) -> None:
    empty = write_xmc(tmp_path / "empty.txt", "0 40 23\n")
    with pytest.raises(DataError, match=r"empty\.txt: holds 0 instances, expected some to evaluate on"):
        train(topic_dir, output=tmp_path / "run", config=make_config(), test=empty)
    assert not (tmp_path / "run").exists()
    # An older release began such runs: they end without a report.
    begun = tmp_path / "begun"
    shutil.copytree(trained.run, begun)
    fingerprint = load_dataset(topic_dir, test=empty).fingerprint()
    record = json.loads((begun / "run.json").read_text()) | {"test": str(empty), "fingerprint": fingerprint}
    (begun / "run.json").write_text(json.dumps(record))
    assert resume(begun).test is None


def test_what_a_caller_has_set_of_torch_changes_nothing_and_stays(
    topic_dir: Path, trained: TrainResult, tmp_path: Path
) -> None:
    expected = tree(Path(trained.run) / "checkpoints")
    before = torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(3)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            train(topic_dir, output=tmp_path / "run", config=make_config("training.num_threads=1"))
            assert torch.is_autocast_enabled("cpu")
        assert (torch.get_num_threads(), torch.get_default_dtype()) == (3, torch.float64)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(before)
    found = tree(tmp_path / "run" / "checkpoints")
    models = [name for name in expected if name.endswith("model.safetensors")]
    assert models and all(found[name] == expected[name] for name in models)


def test_the_ks_of_an_evaluation_are_whole_numbers(topic_dir: Path, trained: TrainResult) -> None:
    expected = evaluate(trained.run, data=topic_dir, ks=(1, 3)).report.metrics
    for ks in (np.array([3, 1]), iter([1, 3]), [1, 3]):
        assert evaluate(trained.run, data=topic_dir, ks=ks).report.metrics == expected
    for wrong in ([], 5, [0], [1.5]):
        with pytest.raises(UsageError, match="k = "):
            evaluate(trained.run, data=topic_dir, ks=wrong)  # type: ignore[arg-type]


def test_a_model_of_other_data_is_refused(trained: TrainResult, tmp_path: Path) -> None:
    other_features = write_xmc(tmp_path / "features.txt", "1 7 23\n2 0:1.0\n")
    with pytest.raises(DataError, match="7 features; the model was trained with 40"):
        predict(trained.run, input=other_features, k=1)
    other_labels = write_xmc(tmp_path / "labels.txt", "1 40 5\n2 0:1.0\n")
    with pytest.raises(DataError, match="5 labels; the model was trained with 23"):
        evaluate(trained.run, data=other_labels, ks=(1,))
    with pytest.raises(UsageError, match="no vocabulary"):
        predict(trained.run, input=["some words"], k=1)


def test_training_data_without_any_label_is_refused(tmp_path: Path) -> None:
    path = write_xmc(tmp_path / "train.txt", "2 3 2\n 0:1.0\n 1:1.0\n")
    with pytest.raises(DataError, match="no instance has a label"):
        train(path, output=tmp_path / "run", config=make_config())
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("rate", ["1e20", "1e30"])
@pytest.mark.fault("R11")
def test_a_divergent_training_stops_and_keeps_a_finite_checkpoint(topic_dir: Path, tmp_path: Path, rate: str) -> None:
    config = make_config(
        f"training.label_learning_rate={rate}",
        f"training.encoder_learning_rate={rate}",
        "training.save_every_steps=1",
        "training.warmup_fraction=0",
    )
    with pytest.raises(DivergedError) as caught:
        train(topic_dir, output=tmp_path / "run", config=config)
    assert caught.value.exit_code == 6 and "learning_rate" in str(caught.value)
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    if store.step_of("latest") is not None:
        for tensor in store.load("latest", ["model"]).parts["model"].values():
            assert torch.isfinite(tensor).all()


@pytest.mark.parametrize(
    "options",
    [
        ("sampler.name=in-batch", "sampler.estimator=instance"),
        ("model.label_memory=host", "sampler.name=lsh"),
    ],
)
def test_values_that_do_not_go_together_leave_nothing_behind(
    topic_dir: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError):
        train(topic_dir, output=tmp_path / "run", config=load_config(assignments=options))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError):
        plan(topic_dir, config=load_config(assignments=options))


def test_a_carriage_return_in_a_name_is_part_of_it(topic_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(topic_dir, tmp_path / "data")
    num_labels = load_dataset(topic_dir).num_labels
    names = [f"topic {label}" for label in range(num_labels)]
    names[4] = "to\rpic"
    (tmp_path / "data" / "labels.txt").write_bytes("".join(f"{name}\n" for name in names).encode())
    train(tmp_path / "data", output=tmp_path / "run", config=make_config("training.epochs=1"))
    predictor = Predictor.load(tmp_path / "run")
    assert predictor.label_names == tuple(names)
    (tmp_path / "allow.txt").write_bytes(b"to\rpic\n")
    found = predict(tmp_path / "run", input=topic_dir / "test.txt", k=1, allow=tmp_path / "allow.txt")
    assert set(np.unique(found.top.label_ids)) == {4}


def test_a_threshold_is_a_number(trained: TrainResult) -> None:
    with pytest.raises(UsageError, match="threshold is nan"):
        Predictor.load(trained.run).predict({0: 1.0}, threshold=float("nan"))


def test_more_neighbours_than_instances_are_all_of_them(topic_dir: Path, tmp_path: Path) -> None:
    config = make_config("neighbors.enabled=true", "neighbors.count=100000000000", "training.epochs=1")
    train(topic_dir, output=tmp_path / "run", config=config)
    assert json.loads((tmp_path / "run" / "interpolation.json").read_text())["count"] <= 320


def test_one_filter_line_of_very_many_pairs_costs_the_others_nothing(
    trained: TrainResult, topic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(topic_dir, tmp_path / "data")
    pairs = [(3, label) for label in range(22)] + [(7, 1), (9, 2), (9, 4)]
    (tmp_path / "data" / "filter_labels_test.txt").write_text("".join(f"{row} {label}\n" for row, label in pairs))
    asked: list[tuple[int, int]] = []
    original = Predictor.predict

    def noted(self: Predictor, instances: Any, k: int = 5, **options: Any) -> TopK:
        asked.append((instances.shape[0], k))
        return original(self, instances, k, **options)

    monkeypatch.setattr(Predictor, "predict", noted)
    found = evaluate(trained.run, data=tmp_path / "data").report
    assert sorted(asked) == [(1, 6), (1, 8), (1, 23), (147, 5)]
    split = load_dataset(tmp_path / "data").split("test")
    top = original(Predictor.load(trained.run), split.features, k=23)
    expected = evaluate_topk(*without_ignored(top, split.labels, split.ignored), ks=(1, 3, 5))
    assert found.metrics["P@5"] == pytest.approx(expected.metrics["P@5"], abs=1e-12)


def test_a_divergence_after_good_epochs_keeps_the_model_of_those(
    topic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xmc_midx.softmax import LabelSoftmax

    forward, calls = LabelSoftmax.forward, [0]

    def poisoned(self: LabelSoftmax, *arguments: Any) -> torch.Tensor:
        calls[0] += 1
        return forward(self, *arguments) * (float("nan") if calls[0] == 2 * STEPS + 3 else 1.0)

    monkeypatch.setattr(LabelSoftmax, "forward", poisoned)
    with pytest.raises(DivergedError, match="step 21"):
        train(topic_dir, output=tmp_path / "run", config=make_config())
    assert CheckpointStore(tmp_path / "run" / "checkpoints").step_of("latest") == 2 * STEPS
    assert evaluate(tmp_path / "run", data=topic_dir).report.metrics["P@1"] > 0.5


# ------------------------------------------------------------------------------- edges


def test_validation_instances_are_not_trained_on(topic_dir: Path, tmp_path: Path) -> None:
    split = load_dataset(topic_dir).train
    assert split is not None
    config = make_config("data.validation_fraction=0.25", "data.normalize=none")
    with RunDirectory.create(tmp_path / "run", config) as run:
        session = TrainingSession(run, split, SilentReporter())
    assert session.validator.held_out is not None
    held_out, labels = session.validator.held_out
    kept = session.trainer.stream
    assert held_out.shape[0] == labels.shape[0] == 80 and kept.num_instances == 240
    together = np.vstack([kept.features.toarray(), held_out.toarray()])
    own = np.vstack([kept.labels.toarray(), labels.toarray()])
    # Sorted rows of features and labels: all of the split, each once.
    both = np.hstack([together, own])
    everything = np.hstack([split.features.toarray(), split.labels.toarray()])
    np.testing.assert_array_equal(both[np.lexsort(both.T)], everything[np.lexsort(everything.T)])
    assert session.frequencies.tolist() == kept.labels.toarray().sum(0).tolist()


def test_another_seed_holds_out_other_instances(topic_dir: Path, tmp_path: Path) -> None:
    split = load_dataset(topic_dir).train
    assert split is not None
    chosen = []
    for seed in (0, 0, 1):
        config = make_config(f"training.seed={seed}")
        with RunDirectory.create(tmp_path / f"run{len(chosen)}", config) as run:
            held_out = TrainingSession(run, split, SilentReporter()).validator.held_out
        assert held_out is not None
        chosen.append(held_out[0].toarray().tolist())
    assert chosen[0] == chosen[1] != chosen[2]


TINY = {
    "one label": "4 2 1\n0 0:1.0\n0 1:1.0\n 0:1.0\n0 \n",
    "one instance": "1 2 3\n1 0:1.0\n",
    "one feature": "3 1 3\n0 0:1.0\n1 0:2.0\n2 0:0.5\n",
    "two labels, all on every instance": "3 2 2\n0,1 0:1.0\n0,1 1:1.0\n0,1 0:1.0 1:1.0\n",
    "no feature at all": "3 4 3\n0 \n1 \n0,2 \n",
}


@pytest.mark.parametrize("text", TINY.values(), ids=TINY)
@pytest.mark.parametrize(
    ("sampler", "estimator"),
    [("midx-pq", "pool"), ("midx-rq", "instance"), ("uniform", "instance"), ("in-batch", "pool"), ("full", "pool")],
)
@pytest.mark.fault("R10")
def test_the_smallest_data_trains_without_nan(tmp_path: Path, text: str, sampler: str, estimator: str) -> None:
    data = write_xmc(tmp_path / "tiny.txt", text)
    config = load_config(
        assignments=[
            "training.epochs=2",
            "model.dim=4",
            "sampler.num_draws=1",
            f"sampler.name={sampler}",
            f"sampler.estimator={estimator}",
        ]
    )
    result = train(data, output=tmp_path / "run", config=config, test=data)
    assert np.isfinite(result.loss) and result.test is not None
    assert all(0 <= value <= 1 for value in result.test.metrics.values())
    num_labels = int(text.split()[2])
    top = predict(tmp_path / "run", input=data, k=num_labels).top
    # Of three labels, an instance that is alone has one.
    known = [1] if text == TINY["one instance"] else list(range(num_labels))
    assert all(sorted(row[: len(known)]) == known for row in top.label_ids.tolist())
    assert (top.label_ids[:, len(known) :] == -1).all() and np.isfinite(top.scores[:, : len(known)]).all()


@pytest.mark.fault("R10")
def test_a_validation_split_of_instances_without_labels_does_no_harm(
    tmp_path: Path, topic_data: Callable[..., tuple[csr_matrix, csr_matrix]]
) -> None:
    features, labels = topic_data(40)
    lines = [f"{40} {features.shape[1]} {labels.shape[1]}"]
    for i in range(40):
        pairs = " ".join(f"{j}:{v}" for j, v in zip(features[[i]].indices, features[[i]].data, strict=True))
        own = ",".join(str(label) for label in labels[[i]].indices) if i % 2 else ""
        lines.append(f"{own} {pairs}")
    data = write_xmc(tmp_path / "train.txt", "\n".join(lines) + "\n")
    config = make_config("data.validation_fraction=0.05", "training.epochs=2")
    result = train(data, output=tmp_path / "run", config=config)
    assert all(np.isfinite(value) for value in result.validation.values())


def test_predicting_no_instances_gives_no_rows(trained: TrainResult, topic_dir: Path) -> None:
    predictor = Predictor.load(trained.run)
    features = load_split(topic_dir / "test.txt").features
    assert predictor.predict(features[:0], k=3).label_ids.shape == (0, 3)
    # A row does not depend on its company.
    alone = np.concatenate([predictor.predict(features[[i]], k=3).label_ids for i in (0, 4, 5)])
    np.testing.assert_array_equal(alone, predictor.predict(features[[0, 4, 5]], k=3).label_ids)


def test_what_the_neighbours_add_is_chosen_again_alike_after_a_kill(topic_dir: Path, tmp_path: Path) -> None:
    config = make_config("neighbors.enabled=true", "training.epochs=2", "data.validation_fraction=0.3")
    whole = train(topic_dir, output=tmp_path / "whole", config=config)
    choice = [name for name in tree(tmp_path / "whole") if "checkpoints" not in name and "neighbors" in name]
    choice.append("interpolation.json")
    for name, stop in (("early", 5), ("late", 14)):
        interrupted(tmp_path / name, topic_dir, config, [stop])
        for file in choice:
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
        assert resume(tmp_path / name).validation == whole.validation
    assert evaluate(tmp_path / "whole", data=topic_dir).report.metrics["P@1"] > 0.5


def test_raw_counts_are_weighted_by_default_as_if_they_had_come_weighted(
    topic_data: Callable[..., tuple[csr_matrix, csr_matrix]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = {}
    for name, num_instances, seed in (("train", 320, 0), ("test", 150, 1)):
        features, labels = topic_data(num_instances, seed=seed)
        counts = csr_matrix((np.ceil(3 * features.data), features.indices, features.indptr), shape=(num_instances, 90))
        splits[name] = counts, labels
    train_counts = splits["train"][0]
    idf = np.log(321 / (np.bincount(train_counts.indices, minlength=90) + 1)) + 1
    for name, (counts, labels) in splits.items():
        weights = (1 + np.log(counts.data)) * idf[counts.indices]
        weighted = csr_matrix((weights.astype(np.float32), counts.indices, counts.indptr), shape=counts.shape)
        for directory, rows in (("counts", counts), ("weighted", weighted)):
            (tmp_path / directory).mkdir(exist_ok=True)
            formats.write_xmc(tmp_path / directory / f"{name}.txt", rows, labels)
    found, tops = {}, {}
    options = ("neighbors.enabled=true", "ranker.enabled=true", "data.validation_fraction=0.2")
    for directory, weighting in (("counts", "tf-idf"), ("weighted", "none")):
        run = tmp_path / f"run-{directory}"
        train(tmp_path / directory, output=run, config=make_config(*options))
        assert RunDirectory.open(run).config.data.weighting == weighting
        assert plan(tmp_path / directory).config.data.weighting == weighting
        found[directory] = evaluate(run, data=tmp_path / directory).report.metrics
        predictor = Predictor.load(run)
        assert predictor.neighbors is not None
        tops[directory] = predictor.predict(load_dataset(tmp_path / directory).split("test").features, 3)
    # Values that differ in their last place: the same model, up to that.
    assert found["counts"] == pytest.approx(found["weighted"], abs=0.02) and found["counts"]["P@1"] > 0.5
    assert (tops["counts"].label_ids == tops["weighted"].label_ids).mean() > 0.97
    # A weighted model without its weights is damaged.
    whole = RunDirectory.map_model

    def without_idf(self: RunDirectory, **options: bool) -> dict[str, Any]:
        return {name: array for name, array in whole(self, **options).items() if name != IDF}

    monkeypatch.setattr(RunDirectory, "map_model", without_idf)
    for use in (Predictor.load, lambda run: export(run, output=tmp_path / "out")):
        with pytest.raises(DataError, match="is no checkpoint of this run"):
            use(tmp_path / "run-counts")


def test_a_run_that_is_not_finished_says_so(topic_dir: Path, tmp_path: Path) -> None:
    messages = list[str]()

    class Listener(SilentReporter):
        def message(self, text: str) -> None:
            messages.append(text)

    class Impatient(SilentReporter):
        def epoch(self, stats: EpochStats) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(topic_dir, output=tmp_path / "run", config=make_config("training.epochs=3"), reporter=Impatient())
    predict(tmp_path / "run", input=topic_dir / "test.txt", reporter=Listener())
    evaluate(tmp_path / "run", data=topic_dir, reporter=Listener())
    said = [text for text in messages if " is not finished: results are of the encoder alone" in text]
    assert len(said) == 2 and all("--resume` finishes it" in text for text in said)
    with pytest.raises(UsageError, match="its training has not ended"):
        predict(tmp_path / "run", input=topic_dir / "test.txt", scores="probabilities")
    messages.clear()
    resume(tmp_path / "run")
    predict(tmp_path / "run", input=topic_dir / "test.txt", reporter=Listener())
    assert not any("not finished" in text for text in messages)


@pytest.mark.parametrize(
    ("assignments", "says"),
    [
        ((), False),
        (("sampler.name=uniform",), True),
        (("sampler.name=uniform", "sampler.num_draws=5"), False),
        (("sampler.name=full",), False),
    ],
)
def test_where_all_labels_are_drawn_a_chosen_sampler_says_nothing(
    topic_dir: Path, tmp_path: Path, assignments: tuple[str, ...], says: bool
) -> None:
    messages = list[str]()

    class Listener(SilentReporter):
        def message(self, text: str) -> None:
            messages.append(text)

    config = load_config(assignments=("training.epochs=1", "training.ensemble_size=1", *assignments))
    result = train(topic_dir, output=tmp_path / "run", config=config, reporter=Listener())
    assert any("whatever the sampler" in text for text in messages) == says
    assert result.num_validation == result.as_dict()["num_validation"] > 0


def test_a_configuration_is_given_in_any_form(topic_dir: Path, tmp_path: Path) -> None:
    tree = {"training": {"epochs": 1, "ensemble_size": 1}, "model": {"dim": 8}}
    (tmp_path / "c.yaml").write_text(json.dumps(tree))
    for number, given in enumerate((tree, Config.model_validate(tree), tmp_path / "c.yaml", str(tmp_path / "c.yaml"))):
        result = train(topic_dir, output=tmp_path / f"run{number}", config=given)
        assert (result.config.training.epochs, result.config.model.dim) == (1, 8)
    with pytest.raises(UsageError, match=r"training\.epoch"):
        train(topic_dir, output=tmp_path / "none", config={"training": {"epoch": 1}})
    with pytest.raises(UsageError, match="config is a list; expected a Config, a dictionary"):
        train(topic_dir, output=tmp_path / "none", config=[1])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="data is a csr_matrix; expected a path") as caught:
        train(csr_matrix((2, 2)), output=tmp_path / "none")  # type: ignore[arg-type]
    assert "data=(X, Y)" in (caught.value.hint or "") and not (tmp_path / "none").exists()


def test_a_tilde_is_the_home_directory(topic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(topic_dir, tmp_path / "data")
    train("~/data", output="~/runs/a", config={"training": {"epochs": 1, "ensemble_size": 1}})
    assert (tmp_path / "runs" / "a" / "model.json").exists() and not (tmp_path / "~").exists()
    assert evaluate("~/runs/a", data="~/data").report.metrics["P@1"] > 0
    assert predict("~/runs/a", input="~/data/test.txt", k=1).top.label_ids.shape[1] == 1
    (tmp_path / "data" / "test.txt").unlink()
    with pytest.raises(DataError, match="has no test split to evaluate on"):
        evaluate("~/runs/a", data="~/data")
    with pytest.raises(DataError, match="~nobody"):
        load_dataset("~nobody")
