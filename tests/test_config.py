"""The configuration: what is refused and how, where a value comes from, and that a written one reads back."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from xmc_midx.config import SAMPLER_NAMES, Config, dump_config, load_config
from xmc_midx.errors import UsageError
from xmc_midx.recipe import DataShape, resolve

ROOT = Path(__file__).resolve().parents[1]


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(*assignments: str, path: Path | None = None) -> str:
    """The message of the error, which is one line and a usage error."""
    with pytest.raises(UsageError) as caught:
        load_config(path, assignments=assignments)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert "\n" not in message and "Traceback" not in message
    return message


# ------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("assignment", "key", "known"),
    [
        ("training.epoch=5", "training.epoch: unknown key", "epochs, batch_size"),
        ("model.Dim=5", "model.Dim: unknown key", "dim, num_hidden_layers"),
        ("sampler.draws=5", "sampler.draws: unknown key", "num_draws"),
        ("loss.weight=5", "loss.weight: unknown key", "weighting, decoupled"),
        ("data.normalise=l2", "data.normalise: unknown key", "weighting, normalize"),
        ("optimizer.rate=5", "optimizer: unknown key", "data, model, sampler, loss, training"),
        ("training.epochs.max=5", "training.epochs.max: unknown key", "epochs"),
    ],
)
def test_an_unknown_key_is_named_with_the_known_ones(assignment: str, key: str, known: str) -> None:
    message = refusal(assignment)
    assert key in message and known in message


@pytest.mark.parametrize(
    ("assignment", "key"),
    [
        ("training.epochs=0", "training.epochs"),
        ("training.epochs=-3", "training.epochs"),
        ("training.epochs=2.5", "training.epochs"),
        ("training.epochs=many", "training.epochs"),
        ("training.epochs=[1]", "training.epochs"),
        ("training.epochs=", "training.epochs"),
        ("training.seed=-1", "training.seed"),
        ("training.seed=9223372036854775808", "training.seed"),
        ("training.label_learning_rate=0", "training.label_learning_rate"),
        ("training.label_learning_rate=nan", "training.label_learning_rate"),
        ("training.label_learning_rate=inf", "training.label_learning_rate"),
        ("training.encoder_learning_rate=1e+300", "training.encoder_learning_rate"),
        ("training.precision=float16", "training.precision"),
        ("training.save_every_steps=0", "training.save_every_steps"),
        ("model.dropout=1", "model.dropout"),
        ("model.dropout=-0.1", "model.dropout"),
        ("model.dropout=nan", "model.dropout"),
        ("model.activation=gelu", "model.activation"),
        ("model.num_hidden_layers=9", "model.num_hidden_layers"),
        ("sampler.name=midx", "sampler.name"),
        ("sampler.prior=none", "sampler.prior"),
        ("sampler.frequency_power=3", "sampler.frequency_power"),
        ("data.validation_fraction=1.0", "data.validation_fraction"),
        ("loss.decoupled=perhaps", "loss.decoupled"),
        ("training.epochs=True", "training.epochs"),
        ("model.dropout=False", "model.dropout"),
        ("training.device=True", "training.device"),
    ],
)
def test_a_value_out_of_range_is_refused_by_key_and_value(assignment: str, key: str) -> None:
    message = refusal(assignment)
    assert f"{key}: " in message
    value = assignment.partition("=")[2]
    assert value in message


def test_a_refused_name_says_which_names_there_are() -> None:
    message = refusal("sampler.name=midx")
    assert all(f"'{name}'" in message for name in SAMPLER_NAMES)


def test_all_faults_are_in_one_message() -> None:
    message = refusal("training.epochs=0", "model.dimension=3", "sampler.name=best")
    assert all(key in message for key in ("training.epochs", "model.dimension", "sampler.name"))


@pytest.mark.parametrize("assignment", ["epochs=5", "training.epochs", "training.=5", "=5", "", "training.epochs:5"])
def test_an_assignment_without_section_key_or_value_is_refused(assignment: str) -> None:
    assert "expected section.key=value" in refusal(assignment)


def test_an_assignment_that_is_no_yaml_is_refused() -> None:
    assert "training.epochs=[1" in refusal("training.epochs=[1")
    # What PyYAML itself cannot make a value of.
    for value in ("2024-13-45", "!!int abc", "9" * 5000, "{a: 1, a: 2}"):
        assert "the value is not YAML" in refusal(f"training.seed={value}")


@pytest.mark.parametrize(
    "text",
    [
        b"training: [1, 2",
        b"training: 5",
        b"- training",
        b"just text",
        b"\xff\xfe\x00",
        b"a: \x00",
        b"training: !!python/object/apply:os.system ['true']",
        b"training: {epochs: !!python/name:os.system }",
        b"[" * 20_000,
        b"training: {1: 2}",
        b"training: {epochs: {a: b}}",
        b"1: {epochs: 5}",
        b"training: null",
        b"training: {epochs: 2024-13-45}",
        b"training: {epochs: 3}\ntraining: {seed: 3}",
        b"training: {epochs: 3, epochs: 4}",
    ],
)
def test_a_file_that_is_no_configuration_is_refused_in_one_line(tmp_path: Path, text: bytes) -> None:
    assert refusal(path=write(tmp_path, text))


def test_what_a_mapping_takes_from_another_may_be_overridden(tmp_path: Path) -> None:
    path = write(tmp_path, b"training: {<<: {epochs: 3, seed: 5}, epochs: 4}\n")
    training = load_config(path).training
    assert (training.epochs, training.seed) == (4, 5)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "absent.yaml" in refusal(path=tmp_path / "absent.yaml")
    assert str(tmp_path) in refusal(path=tmp_path)


# --------------------------------------------------------------------- where it comes from


def test_nothing_gives_the_defaults(tmp_path: Path) -> None:
    assert load_config() == Config() == load_config(write(tmp_path, "")) == load_config(write(tmp_path, "# none\n"))


def test_an_assignment_wins_over_the_file_and_a_later_one_over_an_earlier_one(tmp_path: Path) -> None:
    path = write(tmp_path, "training: {epochs: 7, batch_size: 64}\nmodel: {dim: 32}\n")
    config = load_config(path, assignments=["training.epochs=8", "training.epochs=9", "sampler.name=uniform"])
    assert (config.training.epochs, config.training.batch_size, config.model.dim) == (9, 64, 32)
    assert config.sampler.name == "uniform"
    assert load_config(path).training.epochs == 7


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("training.label_learning_rate=1e-3", 1e-3),
        ("training.label_learning_rate=2", 2.0),
        ("training.label_learning_rate=auto", "auto"),
        ("training.save_every_steps=null", None),
        ("training.device=cuda:1", "cuda:1"),
        ("loss.decoupled=false", False),
        ("sampler.refresh_every=epoch", "epoch"),
        ("sampler.refresh_every=50", 50),
        (" model.dim = 24", 24),
    ],
)
def test_values_are_read_as_people_write_them(assignment: str, value: object) -> None:
    section, _, key = assignment.partition("=")[0].strip().partition(".")
    assert getattr(getattr(load_config(assignments=[assignment]), section), key) == value


# -------------------------------------------------------------------------- round trip


@pytest.mark.parametrize(
    "assignments",
    [
        [],
        ["training.label_learning_rate=1e-3", "sampler.name=midx-rq", "training.patience=2", "data.normalize=none"],
        ["model.dropout=0.1", "sampler.refresh_every=7", "training.seed=9223372036854775807"],
    ],
)
def test_a_written_configuration_reads_back_equal(tmp_path: Path, assignments: list[str]) -> None:
    config = load_config(assignments=assignments)
    shape = DataShape(num_instances=1000, num_features=50, num_labels=20, num_positives=3000)
    for written in (config, resolve(config, shape)):
        assert load_config(write(tmp_path, dump_config(written))) == written


def test_the_written_form_is_plain_yaml() -> None:
    tree = yaml.safe_load(dump_config(Config()))
    assert list(tree) == list(Config.model_fields) and tree["training"]["epochs"] == "auto"


def test_a_configuration_is_frozen() -> None:
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.training.epochs = 3  # type: ignore[misc]


def test_more_threads_than_a_machine_can_start_are_refused() -> None:
    assert load_config(assignments=["training.num_threads=1024"]).training.num_threads == 1024
    for number in ("0", "1025", "100000"):
        with pytest.raises(UsageError, match="num_threads"):
            load_config(assignments=[f"training.num_threads={number}"])


def test_the_page_of_all_keys_is_what_the_source_says() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "document_config.py"))
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == script["page"](), "python scripts/document_config.py > docs/configuration.md"
    for section, info in Config.model_fields.items():
        assert info.annotation is not None and f"## {section}\n" in page
        assert all(f"| `{key}` |" in page for key in info.annotation.model_fields)
