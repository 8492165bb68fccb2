"""The command line: exit codes, streams, errors and output, against a pipeline that is made up here.

Child processes use this file as a module: `test_cli.install()` puts the made-up pipeline in place.
"""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
import types
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xmc_midx
from xmc_midx.cli import app, render
from xmc_midx.config import SAMPLER_NAMES, Config
from xmc_midx.errors import DataError, DivergedError, DownloadError, ResourceError, UsageError, XmcMidxError
from xmc_midx.types import EpochStats, MetricReport, SamplerDiagnosis, Spread, TopK

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("train", "evaluate", "predict", "export", "diagnose", "prepare", "check", "convert")
COMMANDS += ("plan", "datasets", "download", "demo")
ESCAPE = "\x1b"
METRICS = {f"{family}@{k}": 0.1 * k for family in ("P", "nDCG", "R", "PSP", "PSnDCG") for k in (1, 3, 5)}
REPORT = MetricReport(metrics=METRICS, num_instances=2515, num_without_labels=14, propensity_a=0.55, propensity_b=1.5)


# ------------------------------------------------------------------ a pipeline that is made up


@dataclass(frozen=True)
class FakeTraining:
    run: str
    finished: bool = True
    num_models: int = 1
    num_finished: int = 1
    epochs: int = 3
    seconds: float = 16.2
    best_epoch: int = 2
    best: str = "checkpoints/20"
    num_validation: int = 1234
    validation: dict[str, float] = field(default_factory=lambda: {"P@1": 0.5, "P@3": 0.4})
    test: MetricReport | None = None
    evaluate_on: str | None = "d"
    propensity: tuple[float, float] = (0.55, 1.5)
    model_bytes: int = 1_234_567
    peak_memory_bytes: int = 512_000_000
    loss: float = float("nan")

    def as_dict(self) -> dict[str, Any]:
        return {"run": self.run, "seconds": self.seconds, "best": self.best, "loss": self.loss}


HEAD = {"group": "head", "min_frequency": 101, "max_frequency": None, "num_labels": 1234, "num_true": 9}
HEAD |= {"num_hits": 5, "share_of_true": 0.25, "share_of_hits": 0.75, "recall": 0.5}


@dataclass(frozen=True)
class FakeEvaluation:
    report: MetricReport = REPORT
    propensity_source: str = "registry: Bibtex"
    seconds: float = 0.5
    num_without_predictions: int = 0
    most_predictions: int | None = None
    breakdown_by: str = "head-tail"
    breakdown: tuple[dict[str, Any], ...] = (HEAD, {**HEAD, "group": "unseen", "recall": None})

    def as_dict(self) -> dict[str, Any]:
        return {"metrics": dict(self.report.metrics), "num_instances": self.report.num_instances}


@dataclass(frozen=True)
class FakeChunk:
    first: int
    top: TopK
    input_sha256: str = "0"


@dataclass
class FakeStream:
    """One chunk an instance; the input is read when the first one is asked for, as in truth."""

    top: TopK
    label_names: tuple[str, ...] | None
    read: Any
    settings: dict[str, Any] = field(default_factory=lambda: {"model": "a"})
    next: int = 0

    def go_on(self, next_instance: int, input_sha256: str) -> None:
        self.next = next_instance

    def __iter__(self) -> Any:
        self.read()
        for row in range(self.next, len(self.top.label_ids)):
            one = slice(row, row + 1)
            yield FakeChunk(row, TopK(label_ids=self.top.label_ids[one], scores=self.top.scores[one]))


@dataclass(frozen=True)
class FakeDemo:
    training: FakeTraining
    evaluation: FakeEvaluation
    examples: list[tuple[str, list[tuple[str, float]]]]


KL = Spread(mean=3.25, p10=1.0, p90=123.4)
MIDX = SamplerDiagnosis(
    name="midx-pq",
    kl_from_softmax=KL,
    kl_to_softmax=Spread(mean=float("inf"), p10=2.0, p90=float("inf")),
    kl_bound=Spread(mean=1234.5, p10=1.0, p90=2.0),
    effective_share=Spread(mean=0.0212, p10=0.0, p90=0.5),
    log10_max_weight=Spread(mean=2.885, p10=2.0, p90=3.0),
    gradient_bias=0.2845,
    gradient_noise=0.06,
    gradient_deviation=0.337,
    gradient_error=0.4371,
    pool_size=12991.6,
    refresh_seconds=1234.5,
    draw_microseconds=12345.6,
    draw_share=1.0,
)
NO_DENSITY: dict[str, Any] = {"kl_from_softmax": None, "kl_to_softmax": None, "kl_bound": None}
NO_DENSITY |= {"effective_share": None, "log10_max_weight": None, "gradient_bias": float("nan")}


@dataclass(frozen=True)
class FakeDiagnosis:
    plot: str | None
    samplers: tuple[SamplerDiagnosis, ...] = (
        MIDX,
        replace(MIDX, name="quadratic-kernel", kl_bound=None, effective_share=Spread(mean=1e-6, p10=0.0, p90=1.0)),
        replace(MIDX, name="hard-negatives", **NO_DENSITY),
    )
    num_labels: int = 1_234_567
    num_instances: int = 1_256
    batch_size: int = 1_024
    estimator: str = "instance"
    num_draws: int = 2_048
    repeats: int = 32
    dropout: float = 0.6
    seconds: float = 83.0

    def as_dict(self) -> dict[str, Any]:
        return {"samplers": [asdict(one) for one in self.samplers], "num_draws": self.num_draws}


def fake_pipeline(calls: list[dict[str, Any]]) -> types.ModuleType:
    """A pipeline that notes its calls and does what an environment variable or an attribute asks for."""
    module = types.ModuleType("xmc_midx.pipeline")
    module.failure = None  # type: ignore[attr-defined]
    module.top = TopK(  # type: ignore[attr-defined]
        label_ids=np.array([[2, 0], [1, -1]]), scores=np.array([[3.25, 0.1], [-1.5, -np.inf]], np.float32)
    )
    module.names = ("zero", "öne", "t\two\x1b")  # type: ignore[attr-defined]

    def work(reporter: Any) -> None:
        pause = float(os.environ.get("FAKE_PAUSE", "0"))
        reporter.message("Using the CPU.")
        for epoch in (1, 2, 3):
            reporter.start(f"epoch {epoch}/3", 10)
            for _ in range(10):
                reporter.step(1, loss=2.5 / epoch, instances_per_second=12345.6)
                time.sleep(pause / 30)
            reporter.epoch(
                EpochStats(
                    epoch=epoch,
                    num_epochs=3,
                    num_steps=10 * epoch,
                    loss=2.5 / epoch,
                    instances_per_second=12345.6,
                    learning_rate=0.1,
                    seconds=1.5,
                    validation={"P@1": 0.5123},
                )
            )
        if module.failure is not None:
            raise module.failure

    def train(
        data: str, *, output: Path, config: Config, test: str | None, max_seconds: float | None, reporter: Any
    ) -> FakeTraining:
        calls.append({"name": "train", "data": data, "output": output, "config": config, "test": test})
        calls[-1] |= {} if max_seconds is None else {"max_seconds": max_seconds}
        output.mkdir(parents=True, exist_ok=True)
        (output / "config.yaml").write_text("new")
        work(reporter)
        (output / "latest").write_text("30\n")
        return FakeTraining(run=str(output), test=REPORT if test else None, finished=max_seconds is None)

    def resume(run: Path, *, reporter: Any, **options: Any) -> FakeTraining:
        calls.append({"name": "resume", "run": run, **options})
        work(reporter)
        return FakeTraining(run=str(run))

    def evaluate(run: str | None, *, reporter: Any, **options: Any) -> FakeEvaluation:
        calls.append({"name": "evaluate", "run": run, **options})
        if module.failure is not None:
            raise module.failure
        return FakeEvaluation()

    def predict_stream(run: str, *, input: Any, reporter: Any, **options: Any) -> FakeStream:
        calls.append({"name": "predict", "run": run, "input": input, **options})

        def read() -> None:
            if not isinstance(input, str):
                calls[-1]["content"] = input.read()
            if module.failure is not None:
                raise module.failure

        repeat = int(os.environ.get("FAKE_ROWS", "1"))
        top = TopK(
            label_ids=np.tile(module.top.label_ids, (repeat, 1)),
            scores=np.tile(module.top.scores, (repeat, 1)),
        )
        return FakeStream(top, module.names, read)

    def diagnose(run: str, *, reporter: Any, **options: Any) -> FakeDiagnosis:
        calls.append({"name": "diagnose", "run": run, **options})
        reporter.start("diagnose", 10)
        reporter.step(1)
        if module.failure is not None:
            raise module.failure
        return FakeDiagnosis(options["plot"])

    def demo(*, output: Path, reporter: Any) -> FakeDemo:
        calls.append({"name": "demo", "output": output})
        work(reporter)
        examples = [("A sentence about trees.", [("botany", 3.5), ("décor", -0.25)])]
        return FakeDemo(FakeTraining(run="demo"), FakeEvaluation(), examples)

    for function in (train, resume, evaluate, predict_stream, diagnose, demo):
        setattr(module, function.__name__, function)
    return module


def install() -> types.ModuleType:
    """Put the made-up pipeline in place of the true one, for a child process."""
    module = fake_pipeline([])
    sys.modules["xmc_midx.pipeline"] = module
    xmc_midx.pipeline = module  # type: ignore[attr-defined]
    return module


@pytest.fixture
def calls() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch, calls: list[dict[str, Any]]) -> Any:
    module = fake_pipeline(calls)
    monkeypatch.setitem(sys.modules, "xmc_midx.pipeline", module)
    monkeypatch.setattr(xmc_midx, "pipeline", module, raising=False)
    return module


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*words: str | Path) -> Ran:
        code = app.run([str(word) for word in words])
        out, err = capsys.readouterr()
        assert ESCAPE not in out + err, "no colour where there is no terminal"
        return Ran(code, out, err)

    return call


CHILD = "import test_cli; m = test_cli.install(); {setup}; from xmc_midx.cli.app import main; main()"


def child(*words: str, setup: str = "pass", **environment: str) -> dict[str, Any]:
    """Arguments of a child process that runs a command line with the made-up pipeline."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    base = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "FORCE_COLOR")}
    return {
        "args": [sys.executable, "-c", CHILD.format(setup=setup), *words],
        "env": {**base, "PYTHONPATH": paths, "TERM": "xterm-256color", **environment},
    }


def in_child(*words: str, setup: str = "pass", **environment: str) -> Ran:
    done = subprocess.run(**child(*words, setup=setup, **environment), capture_output=True, timeout=60, check=False)
    return Ran(done.returncode, done.stdout.decode(), done.stderr.decode())


def in_terminal(*words: str, columns: int, **environment: str) -> str:
    """What a terminal of a width receives from a command: stdout and stderr."""
    import fcntl
    import struct
    import termios

    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(**child(*words, **environment), stdin=side, stdout=side, stderr=side)
    os.close(side)
    received = b""
    try:
        while piece := os.read(main, 65536):
            received += piece
    except OSError:  # the other side is closed
        pass
    os.close(main)
    assert process.wait(timeout=60) == 0, received.decode()
    return received.decode().replace("\r\n", "\n")


# ------------------------------------------------------------------ start-up and help


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["evaluate", "--k"]])
def test_help_and_usage_errors_load_nothing_heavy(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "xmc_midx", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=False,
    )
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert {"typer", "xmc_midx"} <= loaded
    assert not loaded & {"torch", "scipy", "sklearn", "pandas", "numpy", "yaml", "rich", "faiss"}


def test_help_answers_at_once() -> None:
    def measure() -> float:
        """Seconds of the processor: what else it does is not counted."""
        started = os.times()
        subprocess.run([sys.executable, "-m", "xmc_midx", "--help"], capture_output=True, cwd=ROOT, check=True)
        ended = os.times()
        return ended.children_user + ended.children_system - started.children_user - started.children_system

    assert min(measure() for _ in range(3)) < 0.7


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_a_help_page_of_80_columns_with_an_example(command: str, cli: Any) -> None:
    for flag in ("--help", "-h"):
        page = cli(command, flag)
        assert page.code == 0
        assert f"Usage: xmc-midx {command}" in page.out
        assert f"    xmc-midx {command}" in page.out.partition("Example")[2]
        assert max(len(line) for line in page.out.splitlines()) <= 80
        assert not re.search(r"<str>|^Usage:.*[{}]", page.out)


def test_a_bare_call_shows_the_help(cli: Any) -> None:
    page = cli()
    assert page.code == 0
    assert all(re.search(rf"^  {command} ", page.out, re.M) for command in COMMANDS)


def test_version(cli: Any) -> None:
    assert cli("--version").out == f"xmc-midx {xmc_midx.__version__}\n"


def test_the_help_of_train_names_every_sampler(cli: Any) -> None:
    text = " ".join(cli("train", "--help").out.split())
    assert f": {', '.join(SAMPLER_NAMES).replace('midx-pq', 'midx-pq (default)')}." in text


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["--jsn"], "No such option: --jsn."),
        (["train", "x", "--output", "y", "--epoch", "3"], "No such option: --epoch. Did you mean --epochs?"),
        (["train"], "Missing argument 'DATA'. See xmc-midx train --help."),
        (["train", "x"], "Missing option '--output'"),
        (["train", "x", "--output"], "Option '--output' requires an argument."),
        (["train", "x", "y", "--output", "z"], "unexpected extra argument"),
        (["train", "x", "--output", "y", "--epochs", "many"], "training.epochs"),
        (["train", "x", "--output", "y", "--sampler", "midx"], "sampler.name"),
        (
            ["train", "x", "--output", "y", "--set", "training.epoch=3"],
            "training.epoch: unknown key. The keys of",
        ),
        (["train", "x", "--output", "y", "--set", "epochs"], "expected section.key=value"),
        (["train", "x", "--output", "y", "--config", "/nowhere.yaml"], "/nowhere.yaml: cannot be read"),
        (["train", "x", "--output", "y", "--resume", "--force"], "expected one of them"),
        (["evaluate", "r"], "Missing argument 'DATA'"),
        (["evaluate", "r", "d", "--k", "1,x"], "--k 1,x: expected whole numbers"),
        (["evaluate", "r", "d", "--k", "0"], "--k 0: expected"),
        (["evaluate", "r", "d", "--k", ""], "expected whole numbers"),
        (["evaluate", "r", "d", "--A", "x"], "'--A'"),
        (["evaluate", "r", "d", "--breakdown", "tenths"], "'tenths' is not one of 'head-tail', 'deciles'"),
        (["prepare", "t.tsv"], "Missing option '--out'"),
        (["prepare", "t.tsv", "--out", "d", "--min-df", "0"], "'--min-df'"),
        (["prepare", "t.tsv", "--out", "d", "--ngrams", "9"], "'--ngrams'"),
        (["prepare", "t.tsv", "--out", "d", "--label-kind", "numbers"], "'numbers' is not one of"),
        (["prepare", "t.tsv", "--out", "d", "--test-fraction", "2"], "Test fraction 2: expected a share"),
        (["prepare", "t.tsv", "--out", "d", "--delimiter", ";;"], "Delimiter ';;': expected one character"),
        (["prepare", "t.pdf", "--out", "d"], "the name does not say what it is"),
        (["evaluate", "-", "d"], "nothing to evaluate. Give a run directory or --predictions"),
        (["evaluate", "-", "d", "--predictions", "/nowhere"], "--predictions /nowhere: is no file"),
        (["diagnose", "r"], "Missing argument 'DATA'"),
        (["diagnose", "r", "d", "--num-draws", "0"], "'--num-draws'"),
        (["diagnose", "r", "d", "--instances", "x"], "'--instances'"),
        (["diagnose", "r", "d", "--repeats", "1"], "'--repeats'"),
        (["diagnose", "r", "d", "--seed", "-1"], "'--seed'"),
        (["predict", "r", "-", "--k", "0"], "'--k'"),
        (["predict", "r", "-", "--format", "csv"], "Invalid value for '--format': 'csv' is not one of 'tsv'"),
        (["predict", "r", "-", "--format", "npz"], "expected --output FILE"),
        (["predict", "r", "-", "--allow", "/nowhere"], "--allow /nowhere: is no file"),
        (["predict", "r", "-", "--output", "/"], "is a directory"),
        (["predict", "r", "-", "--shard", "2"], "expected I/N"),
        (["predict", "r", "-", "--resume"], "expected --output FILE with it"),
        (["predict", "r", "-", "--resume", "-o", "a.gz"], "not compressed"),
        (["predict", "r", "-", "--threshold", "nan"], "expected a number"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(
    words: list[str], expected: str, cli: Any, pipeline: Any, calls: Any
) -> None:
    shown = cli(*words)
    assert shown.code == 2
    assert shown.out == ""
    assert re.fullmatch(r"Error: \S.*[.?]\n", shown.err)
    assert expected in shown.err
    assert not calls

    document = cli(words[0], "--json", *words[1:])
    assert (document.code, document.err) == (2, "")
    assert set(document.document["error"]) == {"code", "message", "hint"}


@pytest.mark.parametrize(
    ("failure", "code"),
    [(UsageError, 2), (DataError, 3), (ResourceError, 4), (DownloadError, 5), (DivergedError, 6)],
)
def test_each_error_has_its_exit_code_and_its_document(
    failure: type[XmcMidxError], code: int, cli: Any, pipeline: Any
) -> None:
    pipeline.failure = failure("train.txt:7: 5 is\n6.", hint="Look again.")
    shown = cli("evaluate", "r", "d")
    assert (shown.code, shown.out) == (code, "")
    assert shown.err == "Error: train.txt:7: 5 is 6. Look again.\n"
    shown = cli("evaluate", "r", "d", "--json")
    assert shown.code == code
    assert shown.document == {
        "error": {"code": failure.code, "message": "train.txt:7: 5 is\n6.", "hint": "Look again."}
    }
    assert shown.err == ""


@pytest.mark.parametrize("words", [["--debug", "evaluate", "r", "d"], ["evaluate", "r", "--debug", "d"]])
def test_a_bug_is_one_line_and_a_traceback_with_debug(words: list[str], cli: Any, pipeline: Any) -> None:
    pipeline.failure = KeyError("x")
    shown = cli("evaluate", "r", "d")
    assert (shown.code, shown.out) == (1, "")
    assert re.fullmatch(r"Error: This is a bug in xmc-midx: KeyError: 'x'\. .*--debug.*\n", shown.err)
    shown = cli(*words)
    assert shown.code == 1
    assert "Traceback" in shown.err and "in evaluate" in shown.err


def test_debug_after_two_dashes_is_a_file_name(cli: Any, pipeline: Any, calls: Any) -> None:
    assert cli("evaluate", "r", "--", "--debug").code == 0
    assert calls[0]["data"] == "--debug"


@pytest.mark.parametrize(
    ("failure", "code", "expected"),
    [
        (MemoryError(), 4, "memory"),
        (PermissionError(13, "Permission denied", "/run"), 4, "/run: Permission denied"),
        (OSError(28, "No space left on device", "/run/x"), 4, "/run/x: No space left"),
        (KeyboardInterrupt(), 130, "Interrupted."),
        (app.Terminated(), 143, "Terminated."),
    ],
)
def test_what_the_machine_or_the_user_does_is_no_bug(
    failure: BaseException, code: int, expected: str, cli: Any, pipeline: Any
) -> None:
    pipeline.failure = failure
    shown = cli("evaluate", "r", "d")
    assert shown.code == code
    assert expected in shown.err and "bug" not in shown.err and shown.err.count("\n") == 1
    assert cli("evaluate", "r", "d", "--json").document["error"]["message"]


def test_control_characters_of_a_name_do_not_reach_the_terminal(cli: Any, pipeline: Any) -> None:
    pipeline.failure = DataError("a\x1b[31m\tb: is wrong.")
    assert cli("evaluate", "r", "d").err == "Error: a\\x1b[31m b: is wrong.\n"


# ------------------------------------------------------------------ signals and streams


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.fault("R3")
def test_a_signal_stops_training_with_a_way_to_go_on(number: int, code: int, tmp_path: Path) -> None:
    run = tmp_path / "my run"
    run.mkdir()
    (run / "latest").write_text("1\n")
    process = subprocess.Popen(
        **child("train", "d", "--output", str(run), FAKE_PAUSE="60"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    assert b"CPU" in process.stderr.readline()
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert out == b"" and b"Traceback" not in err
    assert f"Go on with: xmc-midx train d --output '{run}' --resume" in err.decode()


@pytest.mark.parametrize("words", [["predict", "r", "-"], ["evaluate", "r", "d"], ["--help"]])
@pytest.mark.fault("R18")
def test_a_reader_that_closes_the_pipe_is_no_error(words: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        **child(*words, FAKE_ROWS="20000"),
        stdin=subprocess.DEVNULL,
        stdout=write,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.fault("R18")
def test_closed_streams_and_a_full_device() -> None:
    arguments = child("predict", "r", "-", FAKE_ROWS="20000")
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *arguments["args"]]
    assert subprocess.run(command, env=arguments["env"], timeout=60, check=False).returncode == 0
    if Path("/dev/full").exists():
        command = ["sh", "-c", 'exec "$@" </dev/null >/dev/full', "sh", *arguments["args"]]
        done = subprocess.run(command, env=arguments["env"], stderr=subprocess.PIPE, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (4, b"Error: standard output: No space left on device.\n")


@pytest.mark.parametrize("locale", [{"LANG": "C", "LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}])
@pytest.mark.fault("R18")
def test_names_beyond_the_locale(locale: dict[str, str]) -> None:
    for words in (["predict", "r", "x"], ["predict", "r", "x", "--json"], ["demo"]):
        done = in_child(*words, **locale)
        assert done.code == 0, done.err
    assert (
        json.loads(in_child("predict", "r", "x", "--json", **locale).out)["predictions"][1]["labels"][0]["name"]
        == "öne"
    )


def test_progress_in_a_pipe_is_a_line_an_epoch(cli: Any, pipeline: Any, tmp_path: Path) -> None:
    err = cli("train", "d", "--output", tmp_path / "r").err
    assert err.splitlines() == [
        "Using the CPU.",
        "epoch 1/3  loss 2.5000  12,346 instances/s  validation P@1 51.23%  1.5 s",
        "epoch 2/3  loss 1.2500  12,346 instances/s  validation P@1 51.23%  1.5 s",
        "epoch 3/3  loss 0.8333  12,346 instances/s  validation P@1 51.23%  1.5 s",
    ]
    assert cli("train", "d", "--output", tmp_path / "r", "--json").err == ""


def test_a_terminal_gets_a_live_line_that_is_gone_at_the_end(tmp_path: Path) -> None:
    text = in_terminal("train", "d", "--output", str(tmp_path / "r"), columns=80, FAKE_PAUSE="1.5")
    assert ESCAPE in text and "━" in text
    assert re.search(r"loss 2\.500.*12,346/s.*left", text)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    progress = plain.partition("run  ")[0]
    assert max(len(line) for line in re.split(r"[\r\n]", progress)) <= 80
    for epoch in (1, 2, 3):
        assert f"epoch {epoch}/3  loss" in plain


@pytest.mark.parametrize(
    "environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"NO_COLOR": "1", "FORCE_COLOR": "1"}], ids=str
)
@pytest.mark.fault("R18")
def test_no_bars_and_no_colour_on_request(environment: dict[str, str], tmp_path: Path) -> None:
    text = in_terminal("train", "d", "--output", str(tmp_path / "r"), columns=80, **environment)
    assert ESCAPE not in text and "━" not in text
    assert "epoch 3/3" in text


@pytest.mark.parametrize(("columns", "command"), [(20, "train"), (20, "evaluate"), (20, "demo"), (1, "demo")])
@pytest.mark.fault("R18")
def test_a_narrow_terminal_is_survived(columns: int, command: str, tmp_path: Path) -> None:
    words = {"train": ["train", "d", "--output", str(tmp_path / "r")], "evaluate": ["evaluate", "r", "d"]}
    text = in_terminal(*words.get(command, [command]), columns=columns, FAKE_PAUSE="0.3")
    assert "Traceback" not in text and len(text) > 100


# ------------------------------------------------------------------ train


def test_a_flag_overrides_set_and_set_overrides_the_file(cli: Any, pipeline: Any, calls: Any, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("training: {epochs: 1, seed: 1}\nmodel: {dim: 8}\n")
    words = ["--config", file, "--set", "training.epochs=2", "--set", "training.seed=2", "--epochs", "3"]
    flags = ["--sampler", "uniform", "--estimator", "instance", "--num-draws", "7", "--batch-size", "auto"]
    assert cli("train", "d", "-o", tmp_path / "r", "--test", "t", "--device", "cuda:1", *words, *flags).code == 0
    call = calls[0]
    config = call["config"]
    assert (call["data"], call["output"], call["test"]) == ("d", tmp_path / "r", "t")
    assert (config.training.epochs, config.training.seed, config.model.dim) == (3, 2, 8)
    assert (config.sampler.name, config.sampler.estimator, config.sampler.num_draws) == (
        "uniform",
        "instance",
        7,
    )
    assert (config.training.batch_size, config.training.device) == ("auto", "cuda:1")


def test_the_summary_of_train(cli: Any, pipeline: Any, tmp_path: Path) -> None:
    run = tmp_path / "a run"
    text = cli("train", "d", "--output", run, "--test", "t").out
    for expected in (
        "3 epochs in 16.2 s",
        "best epoch",
        "1.2 MB",
        "512 MB",
        "Validation, 1,234 held-out instances, in %",
        "Test, in %",
    ):
        assert expected in text
    assert f"  xmc-midx evaluate '{run}' d\n" in text
    assert "A = 0.55, B = 1.5" in text and "2,515 instances" in text
    assert not re.search(r" $", text, re.M), "no blanks at the end of a line"
    assert str(run) in text.splitlines()[0], "a path is never cut"


def test_train_prints_exactly_one_document(cli: Any, pipeline: Any, tmp_path: Path) -> None:
    document = cli("train", "d", "--output", tmp_path / "r", "--json").document
    assert document == {"run": str(tmp_path / "r"), "seconds": 16.2, "best": "checkpoints/20", "loss": None}


def test_resume_takes_the_run_and_where_its_data_is(cli: Any, pipeline: Any, calls: Any) -> None:
    assert cli("train", "d", "--output", "r", "--resume").code == 0
    assert cli("train", "d", "--output", "r", "--resume", "--no-verify", "--max-time", "1h30m").code == 0
    assert calls == [
        {"name": "resume", "run": Path("r"), "data": "d", "max_seconds": None, "verify": True},
        {"name": "resume", "run": Path("r"), "data": "d", "max_seconds": 5400.0, "verify": False},
    ]


def test_resume_takes_the_command_that_began_the_run(cli: Any, pipeline: Any, calls: Any, tmp_path: Path) -> None:
    run = tmp_path / "r"
    run.mkdir()
    (run / "config.yaml").write_text("training: {epochs: 7, seed: 3}\nmodel: {dim: 12}\n")
    (run / "run.json").write_text(json.dumps({"test": str(tmp_path / "t.txt")}))
    (tmp_path / "same.yaml").write_text("training: {seed: 3, batch_size: auto}")
    (tmp_path / "other.yaml").write_text("training: {seed: 4}")
    same = ["--epochs", "7", "--set", "model.dim=12", "--config", tmp_path / "same.yaml", "--test", tmp_path / "t.txt"]
    assert cli("train", "d", "--output", run, "--resume", *same).code == 0
    for words, key in (
        (["--epochs", "8"], "training.epochs"),
        (["--set", "model.dim=13"], "model.dim"),
        (["--config", tmp_path / "other.yaml"], "training.seed"),
        (["--test", tmp_path / "u.txt"], "--test"),
    ):
        shown = cli("train", "d", "--output", run, "--resume", *words)
        assert shown.code == 2 and f"{key} cannot change it" in shown.err
    shown = cli("train", "d", "--output", tmp_path / "none", "--resume", "--epochs", "3")
    assert shown.code == 3 and "there is no such run directory" in shown.err
    assert [one["name"] for one in calls] == ["resume"]


def test_what_comes_next_is_what_can_be_done(cli: Any, pipeline: Any, tmp_path: Path, monkeypatch: Any) -> None:
    real = pipeline.train
    monkeypatch.setattr(pipeline, "train", lambda *words, **options: replace(real(*words, **options), evaluate_on=None))
    text = cli("train", "d", "--output", tmp_path / "r").out
    assert "evaluate" not in text and "  xmc-midx predict" in text


def test_no_output_is_one_of_the_inputs(cli: Any, pipeline: Any, calls: Any, tmp_path: Path) -> None:
    for name in ("in.txt", "al.txt"):
        (tmp_path / name).write_text("5:1\n")
    (tmp_path / "link").symlink_to("in.txt")
    source = tmp_path / "in.txt"
    for words, name in (
        ([source, "-o", source], "INPUT"),
        ([source, "-o", tmp_path / "link", "--resume"], "INPUT"),
        ([source, "--allow", tmp_path / "al.txt", "-o", tmp_path / "al.txt"], "--allow"),
        ([source, "--deny", tmp_path / "al.txt", "-o", tmp_path / "al.txt"], "--deny"),
    ):
        shown = cli("predict", "r", *words)
        assert shown.code == 2 and f"is the file of {name}, which would be lost" in shown.err
    assert source.read_text() == (tmp_path / "al.txt").read_text() == "5:1\n" and calls == []


@pytest.mark.parametrize(
    ("name", "begin"),
    [
        ("a.tsv", b"0\t1\t"),
        ("a.jsonl", b"{"),
        ("a.jsonl.gz", b"\x1f\x8b"),
        ("a.npz", b"PK"),
        ("a.txt", b"0\t1\t"),
    ],
)
def test_a_file_holds_what_its_name_says(name: str, begin: bytes, cli: Any, pipeline: Any, tmp_path: Path) -> None:
    assert cli("predict", "r", "i", "-o", tmp_path / name).code == 0
    assert (tmp_path / name).read_bytes().startswith(begin)
    shown = cli("predict", "r", "i", "-o", tmp_path / "b.npz.gz")
    assert shown.code == 2 and "is compressed already" in shown.err
    assert cli("predict", "r", "i", "-o", tmp_path / name, "--format", "xmc").code == 0
    assert not (tmp_path / name).read_bytes().startswith((b"PK", b"{", b"0\t"))


def test_a_dash_is_the_standard_stream(cli: Any, pipeline: Any, calls: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("predict", "r", "i", "-o", "-").out == cli("predict", "r", "i").out != ""
    assert [*tmp_path.iterdir()] == []
    assert cli("evaluate", "-", "d", "--predictions", "-").code == 0
    assert calls[-1]["predictions"] == "/dev/stdin"


def test_force_replaces_a_run_only_when_the_new_one_has_a_checkpoint(cli: Any, pipeline: Any, tmp_path: Path) -> None:
    run = tmp_path / "r"
    run.mkdir()
    (run / "config.yaml").write_text("old")
    (run / "run.json").write_text("{}")
    (run / "metrics.jsonl").write_text("old")
    pipeline.failure = DataError("No such dataset.")
    assert cli("train", "d", "--output", run, "--force").code == 3
    assert (run / "config.yaml").read_text() == "old" and (run / "metrics.jsonl").exists()
    pipeline.failure = None
    assert cli("train", "d", "--output", run, "--force").code == 0
    assert (run / "config.yaml").read_text() == "new" and not (run / "metrics.jsonl").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["r"], "nothing is left beside the run"


@pytest.mark.parametrize(
    ("text", "steps", "minutes"), [("500", 500, None), ("10m", None, 10), ("1h30m", None, 90), ("45s", None, 0.75)]
)
def test_the_interval_of_saves_is_in_steps_or_time(
    text: str, steps: int | None, minutes: float | None, cli: Any, pipeline: Any, calls: Any, tmp_path: Path
) -> None:
    assert cli("train", "d", "--output", tmp_path / "r", "--save-every", text).code == 0
    training = calls[0]["config"].training
    assert (training.save_every_steps, training.save_every_minutes) == (steps, minutes)


@pytest.mark.parametrize("text", ["", "0m", "5", "10 m", "m", "-3h", "1h!", "h1"])
def test_what_is_no_time_is_refused(text: str, cli: Any, pipeline: Any, calls: Any, tmp_path: Path) -> None:
    shown = cli("train", "d", "--output", tmp_path / "r", "--max-time", text)
    assert shown.code == 2 and "such as 90m" in shown.err and calls == []


def test_a_time_limit_ends_with_the_way_to_go_on(cli: Any, pipeline: Any, tmp_path: Path) -> None:
    shown = cli("train", "d", "--output", tmp_path / "r", "--max-time", "90m")
    assert shown.code == 0 and shown.out.splitlines()[-1] == f"  xmc-midx train d --output {tmp_path / 'r'} --resume"


def test_force_puts_an_old_run_back_that_a_killed_replacement_left_aside(
    cli: Any, pipeline: Any, tmp_path: Path
) -> None:
    (tmp_path / ".r.replaced").mkdir()
    (tmp_path / ".r.replaced" / "config.yaml").write_text("old")
    (tmp_path / "r").mkdir()
    pipeline.failure = DataError("No such dataset.")
    assert cli("train", "d", "--output", tmp_path / "r", "--force").code == 3
    assert (tmp_path / "r" / "config.yaml").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


@pytest.mark.parametrize("options", [(), ("--resume",)])
@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_what_a_killed_replacement_left_is_cleared_without_force_too(
    options: tuple[str, ...], has_checkpoint: bool, cli: Any, pipeline: Any, tmp_path: Path
) -> None:
    (tmp_path / ".r.replaced").mkdir()
    (tmp_path / ".r.replaced" / "config.yaml").write_text("old")
    (tmp_path / "r").mkdir()
    for name in ("config.yaml", "run.json", *(["latest"] if has_checkpoint else [])):
        (tmp_path / "r" / name).write_text("{}")
    pipeline.failure = DataError("No such dataset.")
    assert cli("train", "d", "--output", tmp_path / "r", *options).code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["r"]
    if options:  # else the stand-in for a training has written its own
        assert (tmp_path / "r" / "config.yaml").read_text() == ("{}" if has_checkpoint else "old")


def test_a_replacement_that_is_alive_is_left_alone(tmp_path: Path) -> None:
    from xmc_midx.cli.train import _place_for

    run = tmp_path / "r"
    run.mkdir()
    for name in ("config.yaml", "run.json"):
        (run / name).write_text("{}")
    with _place_for(run, force=True):
        assert [path.name for path in tmp_path.iterdir()] == [".r.replaced"]
        for force in (False, True):
            with pytest.raises(ResourceError, match="another training is using"):
                _place_for(run, force=force)
        assert [path.name for path in tmp_path.iterdir()] == [".r.replaced"]
    assert [path.name for path in tmp_path.iterdir()] == ["r"] and (run / "config.yaml").read_text() == "{}"


@pytest.mark.parametrize("beside", [[], ["config.yaml"], ["config.yaml", "run.json"]])
def test_force_deletes_nothing_that_is_not_of_a_run(beside: list[str], cli: Any, pipeline: Any, tmp_path: Path) -> None:
    """Other programs have a config.yaml too, and predictions may lie in a run directory."""
    for name in ["thesis.tex", *beside]:
        (tmp_path / name).write_text("years of work")
    shown = cli("train", "d", "--output", tmp_path, "--force")
    problem = "holds thesis.tex, which is not of the run" if len(beside) == 2 else "is not empty"
    assert shown.code == 2 and problem in " ".join(shown.err.split())
    assert {path.name for path in tmp_path.iterdir()} >= {"thesis.tex", *beside}
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_run_may_be_the_current_directory_and_a_link_leads_to_the_run(
    cli: Any, pipeline: Any, calls: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for _ in range(3):
        for name in ("config.yaml", "run.json"):
            (tmp_path / "real" / name).write_text("{}")
        assert cli("train", "d", "--output", tmp_path / "link", "--force").code == 0
        assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "latest").exists()
        assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}
    monkeypatch.chdir(tmp_path / "real")
    assert cli("train", "d", "--output", ".", "--resume").code == 0 and calls[-1]["run"] == Path()
    shown = cli("train", "d", "--output", ".", "--force")
    assert shown.code == 2 and "is the directory you are in" in shown.err
    assert (tmp_path / "real" / "latest").exists()
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path / "new")
    assert cli("train", "d", "--output", ".").code == 0


@pytest.mark.parametrize(
    "words",
    [("evaluate", "r", "d", "--predictions"), ("predict", "r", "i", "--allow"), ("predict", "r", "i", "--deny")],
)
def test_a_pipe_is_a_file_and_a_directory_is_none(
    words: tuple[str, ...], cli: Any, pipeline: Any, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert cli(*words, tmp_path / "pipe").code == 0
    for wrong in (tmp_path, tmp_path / "absent"):
        shown = cli(*words, wrong)
        assert shown.code == 2 and "is no file" in shown.err


# ------------------------------------------------------------------ evaluate


def test_no_metric_is_printed_without_its_definition(cli: Any, pipeline: Any) -> None:
    text = cli("evaluate", "r", "d").out
    lines = text.splitlines()
    assert lines[:3] == ["r on d, in %", "           @1     @3     @5", "P       10.00  30.00  50.00"]
    for family in ("P", "nDCG", "R", "PSP", "PSnDCG"):
        assert any(line.startswith(f"{family} ") for line in lines)
        assert any(line.startswith(f"{family}@k ") for line in lines)
    assert "A = 0.55, B = 1.5 (registry: Bibtex)" in text
    assert "Over 2,515 instances; the 14 without labels count as 0" in text
    assert re.search(r"^head +over 100 +1,234 +25\.00 +75\.00 +50\.00$", text, re.M)
    assert "Head labels have over 100 training instances" in text and "recall@5: hits of the group" in text


def test_the_breakdown_says_what_its_groups_are(cli: Any, pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decile = HEAD | {"group": "decile 1", "min_frequency": 57, "max_frequency": 1024}
    made_up = FakeEvaluation(breakdown_by="deciles", breakdown=(decile,))
    monkeypatch.setattr(pipeline, "evaluate", lambda run, **options: made_up)
    text = cli("evaluate", "r", "d", "--breakdown", "deciles").out
    assert re.search(r"^decile 1 +57 to 1,024 +1,234", text, re.M)
    assert "Decile 1 holds the most frequent labels" in text and "Head labels" not in text


def test_absent_propensities_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    report = MetricReport(metrics={"P@1": 1.0}, num_instances=1, num_without_labels=0)
    render.print_definitions(report.metrics, report=report)
    text = capsys.readouterr().out
    assert "no training split gave them" in text and "PSP@k" not in text and "without labels" not in text


def test_evaluate_passes_its_options_on(cli: Any, pipeline: Any, calls: Any, tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("1:2\n")
    cli(
        "evaluate",
        "-",
        "d",
        "--predictions",
        file,
        "--breakdown",
        "deciles",
        "--k",
        "5, 1,1",
        "--A",
        "0.5",
        "--B",
        "2",
        "--device",
        "cpu",
    )
    assert calls == [
        {
            "name": "evaluate",
            "run": None,
            "data": "d",
            "predictions": str(file),
            "breakdown": "deciles",
            "ks": (1, 5),
            "A": 0.5,
            "B": 2.0,
        }
        | {"device": "cpu", "verify": True}
    ]
    assert cli("evaluate", "r", "d", "--json").document == {"metrics": METRICS, "num_instances": 2515}


# ------------------------------------------------------------------ diagnose


def test_the_tables_of_diagnose_with_their_definitions(cli: Any, pipeline: Any) -> None:
    text = cli("diagnose", "r", "d").out
    assert re.search(r"^midx-pq +3\.25 +1\.00-123 +1,234 +inf +2\.12 +2\.9$", text, re.M)
    assert re.search(r"^quadratic-kernel +3\.25 +1\.00-123 +- +inf +1e-04 +2\.9$", text, re.M)
    assert re.search(r"^hard-negatives( +-)+$", text, re.M), "no density: nothing is defined"
    assert re.search(r"^midx-pq +12,992 +28\.4 +6\.00 +33\.7 +43\.7 +1,234\.5 +12,346 +100\.0$", text, re.M)
    assert re.search(r"^hard-negatives +12,992 +- +6\.00 ", text, re.M), "a bias that is no number is a dash"
    for expected in ("1,256 instances", "1,024 instances at 2,048 draws for each instance", "dropout 0.6", "in 1:23."):
        assert expected in text
    for head in ("KL", "at most", "ESS", "log10 w", "pool", "bias", "noise", "dev.", "error", "fit", "draw"):
        assert head in text.partition("\nP  ")[2], f"{head} is defined"
    assert "Figure" not in text
    assert cli("diagnose", "r", "d", "--plot", "x.png").out.endswith("Figure: x.png\n")


def test_a_run_that_draws_as_many_labels_as_there_are_is_told_so(
    cli: Any, pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "every label" not in cli("diagnose", "r", "d").out
    monkeypatch.setattr(pipeline, "diagnose", lambda *_, **__: FakeDiagnosis(None, num_labels=2048, estimator="pool"))
    assert "a pool holds every label" in cli("diagnose", "r", "d").out


def test_diagnose_fits_a_terminal_of_80_columns() -> None:
    text = in_terminal("diagnose", "r", "d", columns=80, NO_COLOR="1")
    assert max(len(line) for line in text.splitlines()) <= 80
    for head in ("log10 w", "draw %"):
        assert any(line.endswith(head) for line in text.splitlines()), "a table's head is one line"


def test_diagnose_passes_its_options_on_and_prints_one_document(cli: Any, pipeline: Any, calls: Any) -> None:
    words = ["--samplers", "midx-rq, rff", "--num-draws", "7", "--instances", "9", "--repeats", "5", "--dropout"]
    shown = cli("diagnose", "r", "d", *words, "--seed", "3", "--plot", "x.svg", "--device", "cpu", "--json")
    assert shown.code == 0 and shown.err == ""
    first, _, last = shown.document["samplers"]
    assert first["kl_from_softmax"] == {"mean": 3.25, "p10": 1.0, "p90": 123.4}
    assert first["kl_to_softmax"] == {"mean": None, "p10": 2.0, "p90": None}
    assert last["kl_bound"] is None and last["gradient_bias"] is None
    given = {"samplers": ["midx-rq", "rff"], "num_draws": 7, "num_instances": 9, "repeats": 5, "dropout": True}
    given |= {"seed": 3, "plot": "x.svg", "device": "cpu"}
    assert calls == [{"name": "diagnose", "run": "r", "data": "d", **given}]
    cli("diagnose", "r", "d")
    defaults = {"samplers": None, "num_draws": None, "num_instances": 256, "repeats": 32, "dropout": False}
    defaults |= {"seed": 0, "plot": None, "device": "auto"}
    assert calls[1] == {"name": "diagnose", "run": "r", "data": "d", **defaults}


# ------------------------------------------------------------------ predict


def test_tsv_is_one_label_a_line(cli: Any, pipeline: Any, calls: Any) -> None:
    out = cli("predict", "r", "rows.txt", "--k", "2", "--exact").out
    assert out == "0\t1\t2\t3.25\tt wo\\x1b\n0\t2\t0\t0.1\tzero\n1\t1\t1\t-1.5\töne\n"
    assert (calls[0]["run"], calls[0]["input"], calls[0]["k"]) == ("r", "rows.txt", 2)
    pipeline.names = None
    assert cli("predict", "r", "rows.txt").out == "0\t1\t2\t3.25\n0\t2\t0\t0.1\n1\t1\t1\t-1.5\n"


def test_the_other_formats(cli: Any, pipeline: Any, tmp_path: Path) -> None:
    assert cli("predict", "r", "x", "--format", "xmc").out == "2:3.25 0:0.1\n1:-1.5\n"
    lines = cli("predict", "r", "x", "--format", "jsonl").out.splitlines()
    second = {"instance": 1, "labels": [{"label": 1, "score": -1.5, "name": "öne"}]}
    assert [json.loads(line)["instance"] for line in lines] == [0, 1] and json.loads(lines[1]) == second
    assert cli("predict", "r", "x", "--json").document["predictions"][1] == second
    done = cli("predict", "r", "x", "--format", "npz", "--output", tmp_path / "p.npz", "--json")
    assert done.document == {"output": str(tmp_path / "p.npz"), "format": "npz", "num_instances": 2, "k": 5}
    with np.load(tmp_path / "p.npz") as arrays:
        assert np.array_equal(arrays["label_ids"], pipeline.top.label_ids)
        assert np.array_equal(arrays["scores"], pipeline.top.scores)


def test_json_and_a_format_exclude_each_other(cli: Any, pipeline: Any) -> None:
    shown = cli("predict", "r", "x", "--json", "--format", "xmc")
    assert shown.code == 2 and "--json and --format" in shown.document["error"]["message"]


def test_scores_read_back_to_the_same_float32(cli: Any, pipeline: Any) -> None:
    scores = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32) * 1e-3
    pipeline.top = TopK(label_ids=np.tile([0, 1], (50, 1)), scores=scores)
    words = cli("predict", "r", "x", "--format", "xmc").out.split()
    assert np.array_equal(np.array([word.partition(":")[2] for word in words], np.float32), scores.ravel())


def test_an_output_file_is_complete_or_absent(cli: Any, pipeline: Any, calls: Any, tmp_path: Path) -> None:
    file = tmp_path / "ü p.tsv"
    pipeline.failure = DataError("")
    assert cli("predict", "r", "x", "--output", file).code == 3
    assert list(tmp_path.iterdir()) == []
    pipeline.failure = None
    done = cli("predict", "r", "x", "--output", file)
    assert (done.code, done.out) == (0, "")
    assert file.read_text(encoding="utf-8").startswith("0\t1\t2\t3.25\t")
    assert list(tmp_path.iterdir()) == [file]
    before, pipeline.names = file.read_bytes(), ("zero", "one")  # label 2 has no name: a fault while writing
    assert cli("predict", "r", "x", "--output", file).code == 1
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
    calls.clear()
    shown = cli("predict", "r", "x", "--output", tmp_path / "absent" / "p.tsv")
    assert shown.code == 4 and "cannot be written" in shown.err
    assert not calls, "found out before the work"


def test_a_pipe_as_output_is_written_to(cli: Any, pipeline: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE)
    assert cli("predict", "r", "x", "--output", tmp_path / "pipe").code == 0
    assert reader.communicate(timeout=30)[0].startswith(b"0\t1\t2\t")
    assert (tmp_path / "pipe").is_fifo()


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Any:
    def give(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    return give


def test_stdin_is_handed_on_as_bytes_and_its_faults_are_shown(cli: Any, pipeline: Any, calls: Any, stdin: Any) -> None:
    stdin("first\r\n\nthïrd".encode())
    assert cli("predict", "r", "-", "--text").code == 0
    assert (calls[-1]["content"], calls[-1]["text"], calls[-1]["live"]) == ("first\r\n\nthïrd".encode(), True, True)
    pipeline.failure = DataError("standard input:3: is wrong.")
    stdin(b"")
    assert cli("predict", "r", "-").err == "Error: standard input:3: is wrong.\n"
    assert calls[-1]["text"] is None


def test_every_option_arrives(cli: Any, pipeline: Any, calls: Any, tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text("1\n")
    words = ["--scores", "probabilities", "--threshold", "0.5", "--shard", "2/8", "--no-verify", "--device", "cpu"]
    cli("predict", "r", file, "--text", "--allow", file, "--deny", file, "-o", tmp_path / "out", *words)
    expected = {"scores": "probabilities", "threshold": 0.5, "shard": (2, 8), "verify": False, "device": "cpu", "k": 5}
    expected |= {"allow": str(file), "deny": str(file), "text": True, "live": False}
    assert {name: calls[-1][name] for name in expected} == expected
    cli("predict", "r", file)
    expected = {"scores": "logits", "threshold": None, "shard": (1, 1), "verify": True, "allow": None, "live": True}
    assert {name: calls[-1][name] for name in expected} == expected


def test_resume_goes_on_from_the_partial_file(cli: Any, pipeline: Any, calls: Any, tmp_path: Path) -> None:
    from xmc_midx.data.resumable import ResumableFile

    out = tmp_path / "p.tsv"
    assert cli("predict", "r", "x", "-o", out).code == 0
    whole = out.read_bytes()
    settings = {"format": "tsv", "model": "a"}
    with pytest.raises(KeyboardInterrupt), ResumableFile.open(out, settings, resume=True) as file:
        file.write(whole[: whole.index(b"1\t1")] + b"half a l")
        file.mark(1, "0")
        file.write(b"ine")
        raise KeyboardInterrupt
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["p.tsv", "p.tsv.partial", "p.tsv.partial.json"]
    shown = cli("predict", "r", "x", "-o", out, "--resume", "--format", "jsonl")
    assert shown.code == 2 and "was begun with another format: 'tsv', now 'jsonl'" in shown.err
    # The mark covers the half line, so it stays: the file is gone on with at the mark, not looked at.
    done = cli("predict", "r", "x", "-o", out, "--resume")
    assert (done.code, done.err.splitlines()[0]) == (0, "Going on after 1 instances.")
    assert out.read_bytes() == whole.replace(b"1\t1\t1", b"half a l1\t1\t1")
    assert [path.name for path in tmp_path.iterdir()] == ["p.tsv"]


# ------------------------------------------------------------------ demo


def test_demo_ends_with_readable_predictions_and_what_to_try(cli: Any, pipeline: Any, calls: Any) -> None:
    text = cli("demo", "--output", "runs/my demo").out
    assert "A sentence about trees." in text
    assert re.search(r"3\.50 +botany\n +-0\.25 +décor\n", text)
    assert "| xmc-midx predict 'runs/my demo' -\n" in text
    document = cli("demo", "--json").document
    assert set(document) == {"training", "evaluation", "examples"}
    assert document["examples"][0]["labels"][1] == {"name": "décor", "score": -0.25}
    assert calls[0]["output"] == Path("runs/my demo")
    assert not calls[1]["output"].exists(), "not kept"


# ------------------------------------------------------------------ check and datasets


def test_check_shows_problems_as_a_compiler_does_and_exits_3(cli: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.txt"
    file.write_text("2 3 2\n0 1:1\n1 0:1\n")
    sound = cli("check", file)
    assert sound.code == 0 and sound.out.endswith("0 errors, 0 warnings.\n")
    assert re.search(r"^instances +2$", sound.out, re.M)
    file.write_text("3 3 2\n0 1:1\n5 0:1\n6 0:1\n")
    damaged = cli("check", file, "--limit", "1")
    assert (damaged.code, damaged.err) == (3, "")
    assert f"{file}:3: error: " in damaged.out and f"{file}:4:" not in damaged.out
    assert "... and 1 more of the kind" in damaged.out and "2 errors, " in damaged.out
    document = cli("check", file, "--json")
    assert document.code == 3
    assert document.document["ok"] is False
    assert [problem["line"] for problem in document.document["problems"] if problem["level"] == "error"] == [3, 4]


def test_check_of_nothing_is_an_error(cli: Any, tmp_path: Path) -> None:
    assert cli("check", tmp_path / "absent").code == 3
    assert cli("check", tmp_path / "absent", "--json").document["error"]["code"] == "data"


def test_datasets_lists_and_shows(cli: Any) -> None:
    listing = cli("datasets")
    assert listing.code == 0
    assert re.search(r"^Bibtex +4,880 +2,515 +1,836 +159 +0\.55 +1\.5", listing.out, re.M)
    assert max(len(line) for line in listing.out.splitlines()) <= 80
    entry = cli("datasets", "bibtex").out
    for expected in ("A = 0.55, B = 1.5", "licence", "cite", "homepage", "on disk"):
        assert expected in entry
    document = cli("datasets", "bibtex", "--json").document
    assert (document["name"], document["propensity_a"], document["num_labels"]) == ("Bibtex", 0.55, 159)
    assert len(cli("datasets", "--json").document["datasets"]) > 20
    unknown = cli("datasets", "bibtx")
    assert unknown.code == 2 and "Did you mean Bibtex?" in unknown.err


@pytest.mark.parametrize("words", [["datasets"], ["check", "/nowhere"]])
def test_datasets_and_check_need_no_torch(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "xmc_midx", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=False,
    )
    assert "xmc_midx.data" in done.stderr
    assert not re.search(r"\| +torch$", done.stderr, re.M)


# ------------------------------------------------------------------ figures


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "1.0 MB"),
        (123_456_789, "123 MB"),
        (5e15, "5000 TB"),
    ],
)
def test_sizes(value: float, text: str) -> None:
    assert render.size(int(value)) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (59.96, "1:00"), (3599.6, "1:00:00"), (3723, "1:02:03")],
)
def test_durations(value: float, text: str) -> None:
    assert render.duration(value) == text


def test_the_time_left_counts_the_epochs_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    live = render._LiveReporter()
    live.start("epoch 1/3", 10)
    live.step(5)
    now += 10.0
    assert live._parts(10, 5)[-1] == "left 0:50", "10 s of this epoch and 20 s of each of two"


def test_numpy_values_and_records_become_json(capsys: pytest.CaptureFixture[str]) -> None:
    stats = {"a": np.float32(0.5), "b": np.arange(2), "c": float("inf"), "d": Path("x"), "e": REPORT}
    render.print_json(stats)
    read = json.loads(capsys.readouterr().out)
    assert read == {"a": 0.5, "b": [0, 1], "c": None, "d": "x", "e": asdict(REPORT)}


def test_a_tilde_behind_an_equals_sign_is_the_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words: list[list[str]] = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(app, "_attempt", lambda given, debug: words.append(given) or 0)
    assert app.run(["train", "d", "--output=~/x", "--set=a.b=~/c", "--", "~/y"]) == 0
    assert words == [["train", "d", f"--output={tmp_path}/x", "--set=a.b=~/c", "--", "~/y"]]
