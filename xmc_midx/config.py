"""Layer 1. The configuration of a run: frozen records that refuse unknown keys.

`"auto"` marks what `xmc_midx.recipe` derives from the data; the resolved values are written to the run's `config.yaml`.
A configuration comes from a YAML file, from `section.key=value` assignments, or both, the assignments last.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from xmc_midx.errors import UsageError
from xmc_midx.paths import home_path

__all__ = [
    "Config",
    "DataConfig",
    "GivenConfig",
    "LossConfig",
    "ModelConfig",
    "NeighborsConfig",
    "RankerConfig",
    "SamplerConfig",
    "SamplerName",
    "TrainingConfig",
    "as_config",
    "changed_keys",
    "dump_config",
    "load_config",
]

Auto = Literal["auto"]
SamplerName = Literal[
    "midx-pq",
    "midx-rq",
    "uniform",
    "frequency",
    "in-batch",
    "quadratic-kernel",
    "rff",
    "lsh",
    "hard-negatives",
    "softmax",
    "full",
]
PositiveInt = Annotated[int, Field(ge=1)]
LearningRate = Annotated[float, Field(gt=0, le=1e30)]
"""Any step that float32 can still express: a rate beyond reason diverges, and says so."""
Fraction = Annotated[float, Field(ge=0, lt=1)]
_MAX_CHARACTERS = 1_000_000
"""Of a configuration file."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`yes` for a number would be 1."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and kind is not bool and bool not in get_args(kind):
            raise PydanticCustomError("bool", "Input should not be true or false")
        return value


class DataConfig(_Section):
    """How the feature rows are used."""

    weighting: Literal["none", "tf-idf"] | Auto = "auto"
    """`tf-idf`: a count v is 1 + ln v, times the idf of its feature; `none`: the values as given. By default, raw
    counts are weighted."""
    normalize: Literal["l2", "none"] = "l2"
    """Scale of each feature row; `none` uses the values as given."""
    unused_features: Literal["drop", "keep"] | Auto = "auto"
    """Features that no training instance has. `drop`: they have no row in the feature table, and no part in a
    prediction but in the length of its rows; `keep`: they have a random one. By default they are dropped where they are
    more than a tenth of all."""
    unused_labels: Literal["drop", "keep"] | Auto = "auto"
    """Labels that no training instance has. `drop`: they have no row in the label table and are never predicted;
    `keep`: they have one, which training only moves away from its queries. By default they are dropped where they are
    more than a twentieth of all."""
    validation_fraction: Fraction | Auto = "auto"
    """Share of the training rows held out to choose the best epoch; 0 trains on all rows and keeps the last epoch."""


class ModelConfig(_Section):
    """The encoder and the label table."""

    dim: PositiveInt | Auto = "auto"
    """Embedding size D."""
    num_hidden_layers: Annotated[int, Field(ge=0, le=8)] = 0
    """Square layers after the embedding bag."""
    activation: Literal["relu", "none"] = "relu"
    """After the bag and each layer."""
    residual: bool = True
    """Whether each hidden layer adds to its input."""
    dropout: Fraction | Auto = "auto"
    """Share of the query's coordinates dropped in training."""
    label_bias: bool = True
    """Whether each label has a bias beside its row."""
    label_init: Literal["mean-instance", "random"] = "mean-instance"
    """Start of the label table: the mean encoded instance of each label, or small random rows."""
    label_precision: Literal["float32", "bfloat16"] = "float32"
    """Of the label table while it is trained: bfloat16 takes half the memory, and each update is rounded at random, up
    or down with chances that leave its mean what it is."""
    label_memory: Literal["device", "host"] = "device"
    """Where the label table lies while it is trained on a GPU: `host` keeps it and its optimiser's state in the
    machine's memory, and moves the rows of each pool."""
    storage: Literal["int4", "int8", "float16", "float32"] | Auto = "auto"
    """Of the finished model's tables on the disk; int4 and int8 have a scale for each row, and up to 64 MiB a table is
    compressed without loss. int4 is for the two large ones, of an even `dim`; the others are int8 then."""


class SamplerConfig(_Section):
    """Where the negatives come from."""

    name: SamplerName = "midx-pq"
    """The proposal that negatives are drawn from; `full`: all labels, without draws."""
    estimator: Literal["pool", "instance"] = "pool"
    """`pool`: one set of labels for many instances; `instance`: own draws for each instance (the paper)."""
    num_draws: PositiveInt | Auto = "auto"
    """Labels drawn for a batch (`pool`) or for each instance (`instance`)."""
    pool_instances: PositiveInt | Auto = "auto"
    """Instances that share a pool, at most; a larger batch has several, with the same draws (but for
    `training.cuda_graphs`)."""
    gradient_negatives: PositiveInt | Literal["all"] | Auto = "auto"
    """Negatives that an instance's gradient is made of, in the mean and at most, drawn from its pool in proportion to
    their share in it; `all`: the whole pool. Pools of a training on the CPU draw them, others take all."""
    num_codewords: PositiveInt | Auto = "auto"
    """Codewords C in each of the two codebooks."""
    prior: Literal["uniform", "frequency", "bias"] = "frequency"
    """Query-free weight of a label inside its cell."""
    frequency_power: Annotated[float, Field(ge=0, le=2)] = 1.0
    """Power of the label frequency, for the prior and for the frequency sampler."""
    positives: Literal["sampled", "certain"] = "sampled"
    """What the positives of a batch are to a pool: a random sample of the labels, beside the draws; or labels that are
    there anyway, so that the draws alone estimate the others."""
    correction_power: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Power of the importance weights of a pool's labels: 1 estimates the full softmax without bias, 0 counts each
    label once."""
    refresh_every: PositiveInt | Literal["epoch"] | Auto = "auto"
    """Steps between two rebuilds of the codebooks, or once an epoch. By default an epoch, or 64 steps, from 4,096
    labels on, where an epoch has fewer."""
    refresh_iterations: Annotated[int, Field(ge=0, le=100)] = 2
    """Iterations of k-means in a rebuild; 0 keeps the codewords and only assigns the labels anew."""


class LossConfig(_Section):
    """The weights of the positives and the place of the other positives."""

    weighting: Literal["mean", "sum"] = "mean"
    """Weight of a positive: 1/|Y| of its instance, or 1."""
    decoupled: bool = True
    """Whether each positive meets the negatives alone, the instance's other positives masked."""


class TrainingConfig(_Section):
    """The loop: how long, how fast, on what."""

    preset: Literal["fast", "default", "best"] = "default"
    """How much time the values that are `auto` may cost: epochs, embedding size and draws."""
    epochs: PositiveInt | Auto = "auto"
    """Passes over the training rows."""
    batch_size: PositiveInt | Auto = "auto"
    """Instances of a step."""
    encoder_learning_rate: LearningRate | Auto = "auto"
    """Of the feature table, whose steps fall with the root of a row's gradients so far."""
    label_learning_rate: LearningRate | Auto = "auto"
    """Of the label table; the encoder's bias and layers take half of it."""
    warmup_fraction: Fraction = 0.05
    """Share of the steps in which the rates rise, before they fall to nothing."""
    patience: PositiveInt | None = None
    """Epochs without a better validation score before training stops; None runs all epochs and keeps the best."""
    save_every_steps: PositiveInt | None = None
    """Steps between two checkpoints inside an epoch; None: by the clock alone. The end of an epoch is saved too, but
    for models below 64 MiB, where saves would take more than half a percent of the time."""
    save_every_minutes: Annotated[float, Field(gt=0)] | None = 10
    """Minutes between two checkpoints inside an epoch; None: by the steps alone."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that are kept, with the best one that each of them knows. A model that is not finite is never
    saved, so the newest is the last finite one."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of start values, order, draws and held-out instances: the same seed, the same model (CPU)."""
    ensemble_size: Annotated[int, Field(ge=1, le=64)] | Auto = "auto"
    """Models, each from a seed of its own and with other instances held out, whose scores are averaged at
    prediction."""
    models_at_once: PositiveInt | Auto = "auto"
    """Models of an ensemble that run their epochs at once, each by its share of a CPU's threads (no more models than
    threads; on a GPU one): less time, more memory. `auto`: 2, unless their tables are large or memory is scarce."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the pool's products; `auto`: bfloat16 on a GPU that has it and, of 4,096 labels or more, on a CPU with
    AVX512-BF16 or AMX, else float32. That of the label table is `model.label_precision`."""
    cuda_graphs: bool | Auto = "auto"
    """On a GPU: whether a step has static shapes, where its sampler allows it, and is one CUDA graph. A batch then
    shares a pool, whatever `sampler.pool_instances`."""
    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads; None leaves torch's choice."""


class NeighborsConfig(_Section):
    """The nearest training instances, whose labels are added to the model's at prediction."""

    enabled: bool = True
    """Whether they may be used. Their weight is chosen on the validation instances, and is 0 where they do not help."""
    count: PositiveInt = 50
    """Neighbours of an instance."""


class RankerConfig(_Section):
    """The sparse linear classifiers, whose margins, and largest parts of them, are added to the model's scores at
    prediction."""

    enabled: bool = True
    """Whether they may be used; as with the neighbours, the validation instances decide."""
    num_instances: PositiveInt | Auto = "auto"
    """Training instances that say which labels the model confuses."""
    num_rivals: PositiveInt = 50
    """The model's best labels of each of them."""


class Config(_Section):
    """Everything a run depends on besides its data."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    sampler: SamplerConfig = SamplerConfig()
    loss: LossConfig = LossConfig()
    training: TrainingConfig = TrainingConfig()
    neighbors: NeighborsConfig = NeighborsConfig()
    ranker: RankerConfig = RankerConfig()


GivenConfig = Config | Mapping[str, Any] | str | Path
"""What `as_config` takes."""


def load_config(path: str | Path | None = None, *, assignments: Iterable[str] = ()) -> Config:
    """A configuration from a YAML file and `section.key=value` assignments.

    Parameters
    ----------
    path : YAML file with the sections of `Config`; None starts from the defaults.
    assignments : each `section.key=value`, the value read as YAML; they override the file, later ones earlier ones.

    Raises
    ------
    UsageError : the file cannot be read, a key is unknown or a value is out of its range; all faults in one message.
    """
    tree: dict[str, Any] = _read_yaml(home_path(path)) if path is not None else {}
    for assignment in assignments:
        _assign(tree, assignment)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UsageError(_explain(error), hint=_known_keys(error)) from None


def as_config(given: GivenConfig | None) -> Config:
    """What a caller gave: a `Config`, its tree as a dictionary, the path of a YAML file, or nothing.

    Raises
    ------
    UsageError : as of `load_config`; or it is something else.
    """
    if given is None:
        return Config()
    if isinstance(given, str | Path):
        return load_config(given)
    if isinstance(given, Mapping):
        try:
            return Config.model_validate(dict(given))
        except ValidationError as error:
            raise UsageError(_explain(error), hint=_known_keys(error)) from None
    if not isinstance(given, Config):
        raise UsageError(
            f"config is a {type(given).__name__}; expected a Config, a dictionary like "
            "{'training': {'epochs': 5}}, or the path of a YAML file."
        )
    return given


def changed_keys(base: Config, path: str | Path | None = None, *, assignments: Iterable[str] = ()) -> list[str]:
    """`section.key` of what a file and assignments, as of `load_config`, say otherwise than `base`, whose open values
    are resolved: `auto` says nothing."""
    tree = base.model_dump()
    given: dict[str, dict[str, Any]] = _read_yaml(home_path(path)) if path is not None else {}
    for assignment in assignments:
        _assign(given, assignment)
    for section, keys in given.items():
        tree.setdefault(section, {}).update(keys)
    try:
        found = Config.model_validate(tree).model_dump()
    except ValidationError as error:
        raise UsageError(_explain(error), hint=_known_keys(error)) from None
    before = base.model_dump()
    return [
        f"{section}.{key}"
        for section, keys in found.items()
        for key, value in keys.items()
        if value not in ("auto", before[section][key])
    ]


def dump_config(config: Config) -> str:
    """The configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MAX_CHARACTERS + 1)
        if len(text) > _MAX_CHARACTERS:
            raise UsageError(f"{path}: is larger than {_MAX_CHARACTERS:,} characters; expected a configuration.")
        tree = _parse(text)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is not YAML: {' '.join(str(error).split())}.") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not all(isinstance(v, Mapping) for v in tree.values()):
        raise UsageError(f"{path}: holds no sections; expected a mapping such as `training: {{epochs: 5}}`.")
    return {str(section): dict(keys) for section, keys in tree.items()}


class _Loader(yaml.SafeLoader):
    """A mapping has each key once: of two, YAML would take the second without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} occurs twice", node.start_mark)
        found: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return found


def _parse(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _assign(tree: dict[str, Any], assignment: str) -> None:
    name, separator, text = assignment.partition("=")
    section, dot, key = name.strip().partition(".")
    if not separator or not dot or not key:
        raise UsageError(f"--set {assignment}: expected section.key=value, such as training.epochs=5.")
    try:
        value = _parse(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UsageError(f"--set {assignment}: the value is not YAML.") from None
    if isinstance(value, str):
        value = _number(value)
    tree.setdefault(section, {})[key] = value


def _number(text: str) -> str | float:
    """YAML reads `1e-3` as a string; people mean the number."""
    try:
        return float(text)
    except ValueError:
        return text


def _explain(error: ValidationError) -> str:
    # Unions report one fault a member, with the member's name in the path: the key is the first two parts.
    faults: dict[str, list[Any]] = {}
    for fault in error.errors():
        faults.setdefault(".".join(str(part) for part in fault["loc"][:2]), []).append(fault)
    lines = []
    for key, members in faults.items():
        others = [fault for fault in members if fault.get("ctx", {}).get("expected") != "'auto'"]
        for fault in others or members:
            or_auto = ", or auto" if 0 < len(others) < len(members) else ""
            # Cut: a few lines of YAML with aliases can describe a value of any size.
            found = reprlib.repr(fault["input"])
            known = f"{fault['msg']}{or_auto}, found {found}"
            lines.append(f"{key}: {'unknown key' if fault['type'] == 'extra_forbidden' else known}")
    return "Configuration: " + "; ".join(dict.fromkeys(lines)) + "."


def _known_keys(error: ValidationError) -> str | None:
    hints = []
    for fault in error.errors():
        if fault["type"] != "extra_forbidden":
            continue
        section = str(fault["loc"][0])
        if len(fault["loc"]) == 1:
            hints.append(f"The sections are {', '.join(Config.model_fields)}.")
        else:
            model = Config.model_fields[section].annotation
            assert isinstance(model, type) and issubclass(model, _Section)
            hints.append(f"The keys of {section} are {', '.join(model.model_fields)}.")
    return " ".join(dict.fromkeys(hints)) or None


SAMPLER_NAMES: tuple[str, ...] = get_args(SamplerName)
HOST_SAMPLERS = ("midx-pq", "midx-rq", "uniform", "frequency", "in-batch")
"""Those that read the label table at a refresh alone, or never: it may lie in the host's memory."""
