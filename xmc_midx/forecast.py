"""Layer 3. What a training will need: memory at its peak, disk, and time, from the data and a resolved configuration.

Memory on the CPU, each term in bytes, with F, L, D, C, B, N as in the shape legend (F and L without the features and
labels that get no row: `data.unused_features`, `data.unused_labels`), nnz the stored feature values, Y the positives,
`u` and `l` the rows of the two tables that an average batch touches, `g` its groups of instances and `p` the labels of
a group's pool:

- libraries, 375 MB: interpreter, torch, compiled code and products
- data, 0.5 x (8 (nnz + Y) + 8 N) of all splits: what reading them leaves, as the CSR matrices are mapped from the cache
  and given back; 1.7 x where nothing is held out
- training rows, 8 (nnz + Y): normalised, those that are not held out; where nothing is, 4 nnz
- tables, 4 (D + 1) (F + L): both, with the labels' bias; a bfloat16 label table half of its part
- optimiser, 4 F + 16 L: a second moment of each row, and of each label's row and bias a count
- sampler, 24 L + 28 C^2 + 8 C D: codes, places, cumulative mass, frequencies; codebooks
  (these four of each model that is trained at once: `training.models_at_once`; on a GPU one)
- the largest of four stages, as each gives back what it took; of models at once, one counts, as measured: what
  makes a stage large seldom comes at the same moment
  - start, 4 D (4 x 4096 + min(y, L) + min(y, 65536)), y = 4096 Y / N: the queries of a chunk, a sum for each of its
    labels, a query for each positive of a part
  - epoch, 12 u D + 16 (l + g p) D + 32 B p + 100 MB + 6 min(L, 4096) C + 4 D min(L, 1024 C) (on a GPU where that is
    below L) + 4 v L, 64 MB at most, + 8 L, v held-out instances, 4,096 at most: gathered rows, their gradients (on a
    CPU those of the features at the first step alone), logits, fragments; refresh; validation
  - label cells, from 4,096 labels: 4 D (22,000 + 4 x 4,096) + 440 L + 24 D^2 + 100 MB: queries of training instances,
    sketches, the directions, fragments
  - neighbours, 12 nnz + 164 F + 16 Y + 160 MB + 70 MB: the index, the shortlist (or 300 bytes for each label that is
    voted for, where that is more: instances with many labels), compiled code; and
    24 (Y + 50 R) + 50 MB for the linear ranker, R = `ranker.num_instances`, or N if less
  in the last two, on a CPU, the stored tables (`model.storage`) stand for tables, optimiser and sampler, of all models

u is exact in expectation: the sum over the features of 1 - (1 - share of the instances that have it)^B, and likewise l
and p (of B / g instances), plus the draws. On CUDA, tables, optimiser, sampler and epoch count on the device instead,
and the host keeps a copy of the tables for the checkpoint. Where steps have static shapes (`training.cuda_graphs`), u,
l and p are the values, positives and draws of an epoch's largest batch, repeats and all, g is 1, and what depends on
them counts twice. With `model.label_memory=host` the label table and its moments lie in the host's memory, shapes are
not static, and the time of the rows' way is not forecast. Where the terms come from: `session`, `validation`
and `finish` allocate them in this order; a change there is a change here. `scripts/check_forecast.py` measures how good
it is (EXPERIMENTS.md, "Forecast").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from xmc_midx.config import HOST_SAMPLERS, Config
from xmc_midx.recipe import CELLS_FROM, auto_num_codewords

__all__ = ["Forecast", "Speed", "TrainingData", "cheaper_options", "forecast", "gradient_negatives", "step_floor"]

_MB = 10**6
_LIBRARIES = 375 * _MB
_READING, _READING_ALL = 0.5, 1.7
_FRAGMENTS = 100 * _MB
_SHORTLIST_CHUNKS = 160 * _MB
_NEIGHBOR_CODE = 70 * _MB
_FEATURE_LEVELS = 164
_START_POSITIVES = 1 << 16
_MOST_VOTED, _CANDIDATE = 300, 300
"""Voted labels that a held-out instance brings to the fit of the last step, at most, and bytes of each."""
_STORED_BITS = {"int4": 4, "int8": 8, "float16": 16, "float32": 32}
"""Of a coordinate of the finished model's tables."""
_PAIR = 24
"""Bytes of a pair of an instance and a label that the linear ranker trains on."""
_FOUND = 12
"""Bytes of a neighbour that a held-out instance finds."""
_RANKER_BLOCKS = 50 * _MB
_RANKER_LABEL = 200
"""Bytes of a label's linear classifier on disk, packed: debian-deps 63, gnd-tib 94 to 115; of few labels, more."""
_CELL_QUERIES = 20_000, 2_000
_CELL_LABEL = 440
_ASSIGN_CHUNK = 4096
_POINTS_PER_CODEWORD = 1024
_ENCODE_CHUNK = 4096
_SCORES_AT_ONCE, _LOGITS_AT_ONCE_CUDA = 1 << 24, 1 << 25
_CLOCKED_SAVES = 500
"""Saves by the clock, at most, that are counted for `keep_checkpoints`: small models are saved more often than every
ten minutes, and take little."""
_LARGEST = 1.25
"""An epoch's largest batch, rounded up, over the mean one."""
_STEP_OVERHEAD = 4e-3
"""Seconds of a step that do no arithmetic."""
_FINISH, _FINISH_CELLS, _FINISH_LABEL, _FINISH_HELD_OUT = 1.5, 2.0, 6e-5, 1.2e-3
"""Seconds after the epochs (EXPERIMENTS.md, "Forecast"): of any training; of one with label cells, and of each label
there; of an instance that the last step is fitted on."""
_FINISH_RANKED, _FINISH_VALUE = 6e-5, 8e-7
"""Of an instance that the linear ranker is trained on, and of each of its values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """What the forecast looks at in the data."""

    num_instances: int
    """N of the training split."""
    feature_counts: NDArray[np.int64]
    """(F,) training instances that have a feature."""
    label_counts: NDArray[np.int64]
    """(L,) training instances of a label."""
    loaded_bytes: int
    """CSR bytes of all splits that are read."""

    @classmethod
    def of_shape(
        cls, num_instances: int, num_features: int, num_labels: int, *, values: float, positives: float
    ) -> TrainingData:
        """A collection that is not there, of so many values and positives an instance, both of Zipf frequencies."""

        def counts(number: int, per_instance: float) -> NDArray[np.int64]:
            share = 1.0 / np.arange(1.0, number + 1.0)
            share *= num_instances * per_instance / share.sum()
            return np.minimum(np.ceil(share), num_instances).astype(np.int64)

        features, labels = counts(num_features, values), counts(num_labels, positives)
        loaded = 8 * round(num_instances * (values + positives)) + 16 * num_instances
        return cls(num_instances=num_instances, feature_counts=features, label_counts=labels, loaded_bytes=loaded)

    @property
    def num_values(self) -> int:
        return int(self.feature_counts.sum())

    @property
    def num_positives(self) -> int:
        return int(self.label_counts.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Of this machine, measured."""

    flops: float
    """Multiplications and additions a second of a product of a step's size and precision."""
    bytes: float
    """Bytes a second of rows gathered from a table."""
    rounds_slopes: bool = False
    """Whether it computes the loss in float32 on the CPU, where a pool's slopes may be rounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Bytes at the peak of a training, by what they are for; bytes on disk; seconds."""

    host: Mapping[str, int]
    device: Mapping[str, int]
    """Empty where training runs on the CPU."""
    checkpoint_bytes: int
    disk_bytes: int
    """Of the run directory at its fullest: what is kept, and a checkpoint in writing."""
    seconds: float | None
    """Of the training without reading; None where no speed is known."""
    finish_seconds: float | None
    """What of them comes after the epochs, on two cores: label cells, ranker, last step."""
    step: Mapping[str, float]
    """Seconds of a step: `products` (matrix products), `rows` (bytes of the rows that it moves), `overhead` (operations
    that are neither); empty where no speed is known."""

    @property
    def bound(self) -> str | None:
        """The part of a step that takes longest."""
        return max(self.step, key=lambda part: self.step[part]) if self.step else None

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())


def forecast(config: Config, data: TrainingData, *, cuda: bool = False, speed: Speed | None = None) -> Forecast:
    """What training on `data` with a resolved configuration needs; the terms are those of the table above.

    Parameters
    ----------
    cuda : whether tables and steps are on a device of their own.
    speed : of the machine that trains; None forecasts no time.
    """
    model, sampler, training = config.model, config.sampler, config.training
    dim, batch, codewords = _number(model.dim), _number(training.batch_size), _number(sampler.num_codewords)
    data = _of_rows(config, data)
    num_features, num_labels = data.feature_counts.shape[0], data.label_counts.shape[0]
    label_bytes = 2 if model.label_precision == "bfloat16" else 4
    tables = (4 * dim + 4) * num_features + (label_bytes * dim + 4) * num_labels + 4 * model.num_hidden_layers * dim**2
    bits = 8 if model.storage == "int4" and dim % 2 else _STORED_BITS[model.storage]
    on_disk = dim * (num_features + num_labels) * bits // 8
    # Compiled code knows no half precision.
    stored = 2 * on_disk if model.storage == "float16" else on_disk
    optimizer = 4 * num_features + 16 * num_labels + 8 * model.num_hidden_layers * dim**2
    sampler_state = 24 * num_labels + 28 * codewords**2 + 8 * codewords * dim
    rows, labels, pool, groups = _rows_of_a_batch(config, data)
    draws = 0 if sampler.name == "in-batch" else _number(sampler.num_draws)
    of_batch = _LARGEST * batch / max(data.num_instances, 1)
    padded = int(draws + of_batch * data.num_positives) if pool < num_labels else pool
    is_static = cuda and _has_static_shapes(config, num_labels) and batch * (padded + 1) <= _LOGITS_AT_ONCE_CUDA
    if is_static:
        rows, groups, labels, pool = int(of_batch * data.num_values), 1, padded, padded
    logits = batch * min(pool, (_LOGITS_AT_ONCE_CUDA if cuda else _SCORES_AT_ONCE) // batch)
    epoch = 12 * rows * dim + 16 * (labels + groups * pool) * dim + 32 * logits
    # A graph has memory of its own, beside that of the batches that are worked on without one.
    epoch += epoch * is_static + _FRAGMENTS
    if sampler.name.startswith("midx"):
        epoch += 6 * min(num_labels, _ASSIGN_CHUNK) * codewords
        sample = min(num_labels, _POINTS_PER_CODEWORD * codewords)
        epoch += 4 * dim * sample // (2 if sampler.name == "midx-pq" else 1) if sample < num_labels or not cuda else 0
    held_out = round(_fraction(config) * data.num_instances)
    epoch += min(4 * min(held_out, _ENCODE_CHUNK) * num_labels, 4 * _SCORES_AT_ONCE) + 8 * num_labels
    kept = 1.0 - _fraction(config)
    size = _number(training.ensemble_size)
    at_once = 1 if cuda else min(size, _number(training.models_at_once))
    of_rows = 8 * kept * (data.num_values + data.num_positives) if held_out else 4 * data.num_values
    host = {
        "libraries": _LIBRARIES,
        "data": int((_READING if held_out else _READING_ALL) * data.loaded_bytes),
        "training rows": at_once * int(of_rows),
        "tables": at_once * tables,
    }
    device: dict[str, int] = {}
    (device if cuda else host).update({"optimiser": at_once * optimizer, "sampler": at_once * sampler_state})
    start = 0.0
    if model.label_init == "mean-instance":
        chunk = min(data.num_instances, _ENCODE_CHUNK)
        positives = chunk * data.num_positives / max(data.num_instances, 1)
        start = 4 * dim * (4 * chunk + min(positives, num_labels) + min(positives, _START_POSITIVES))
    neighbors = 0
    if config.neighbors.enabled and held_out:
        scores = min(4 * _SCORES_AT_ONCE, 4 * held_out * num_labels) * _SHORTLIST_CHUNKS // (64 * _MB)
        count = min(config.neighbors.count, data.num_instances)
        voted = min(count * data.num_positives / max(data.num_instances, 1), _MOST_VOTED, num_labels)
        neighbors = 12 * data.num_values + _FEATURE_LEVELS * num_features + 16 * data.num_positives + _NEIGHBOR_CODE
        # The fit of the last step comes when the scores of the shortlist are gone.
        neighbors += max(scores, round(_CANDIDATE * held_out * voted)) + _FOUND * count * held_out
    if config.ranker.enabled and held_out:
        rivals = min(data.num_instances, _number(config.ranker.num_instances)) * min(
            config.ranker.num_rivals, num_labels
        )
        neighbors += _PAIR * (data.num_positives + rivals) + _RANKER_BLOCKS
    if cuda:
        device |= {"tables": tables, "epoch": int(max(start, epoch))}
        host["neighbours"] = int(neighbors)
        if model.label_memory == "host":
            # The host has room for all tables already: it saves them.
            device["tables"] -= label_bytes * dim * num_labels
            device["optimiser"] -= 8 * num_labels
            host["optimiser"] = 8 * num_labels
    else:
        stages: dict[str, float] = {"start": start, "epoch": epoch, "neighbours": neighbors}
        if num_labels >= CELLS_FROM:
            queries = sum(_CELL_QUERIES) + 4 * min(data.num_instances, _ENCODE_CHUNK)
            stages["cells"] = 4 * dim * (queries + 6 * dim) + _CELL_LABEL * num_labels + _FRAGMENTS
        for stage in stages.keys() - {"start", "epoch"}:
            stages[stage] += stored - at_once * (tables + optimizer + sampler_state)
        largest = max(stages, key=lambda stage: stages[stage])
        host[largest] = int(stages[largest])
    checkpoint = tables + optimizer + 16 * num_labels + 4 * codewords * dim
    finished = on_disk + (_RANKER_LABEL * num_labels if config.ranker.enabled else 0)
    rows_kept = 2 * data.num_values + 4 * data.num_positives if config.neighbors.enabled else 0
    step = {} if speed is None else _step(config, data, rows + labels, pool, speed)
    steps = -(-data.num_instances * kept // batch)
    # No more are kept than are made.
    num_saves = _number(training.epochs) * (1 + steps // (training.save_every_steps or steps + 1)) + _CLOCKED_SAVES
    keep = min(training.keep_checkpoints, int(num_saves))
    seconds = finish = None
    if speed is not None:
        finish = size * _finish(config, data, held_out)
        # What is neither takes one thread of each model, and of those at once the same time.
        of_all = size * (step["products"] + step["rows"]) + -(-size // at_once) * step["overhead"]
        seconds = _number(training.epochs) * steps * of_all + finish
    return Forecast(
        host=host,
        device=device,
        checkpoint_bytes=checkpoint,
        disk_bytes=size * ((2 * keep + 1) * checkpoint + finished + 10 * _MB) + rows_kept,
        seconds=seconds,
        finish_seconds=finish,
        step=step,
    )


def cheaper_options(config: Config, data: TrainingData, *, cuda: bool = False) -> list[tuple[str, int]]:
    """Options that lower the peak, each with the bytes that it would then be; three at most, the most useful first."""
    dim, batch, draws = (
        _number(config.model.dim),
        _number(config.training.batch_size),
        _number(config.sampler.num_draws),
    )
    num_labels = _of_rows(config, data).label_counts.shape[0]
    codewords = auto_num_codewords(num_labels)
    trials: dict[str, dict[str, dict[str, int | bool | str]]] = {
        f"model.dim={max(1, dim // 4)}": {"model": {"dim": max(1, dim // 4)}},
        f"model.dim={max(1, dim // 2)}": {"model": {"dim": max(1, dim // 2)}},
        f"training.batch_size={max(1, batch // 4)}": {"training": {"batch_size": max(1, batch // 4)}},
        f"sampler.num_draws={max(1, draws // 4)}": {"sampler": {"num_draws": max(1, draws // 4)}},
        f"sampler.num_codewords={codewords}": {"sampler": {"num_codewords": codewords}},
        "model.label_precision=bfloat16": {"model": {"label_precision": "bfloat16"}},
        "model.label_init=random": {"model": {"label_init": "random"}},
        "neighbors.enabled=false": {"neighbors": {"enabled": False}},
        "ranker.enabled=false": {"ranker": {"enabled": False}},
    }
    if min(_number(config.training.models_at_once), _number(config.training.ensemble_size)) > 1 and not cuda:
        trials["training.models_at_once=1"] = {"training": {"models_at_once": 1}}
    if cuda and config.sampler.name in HOST_SAMPLERS:
        trials["model.label_memory=host"] = {"model": {"label_memory": "host"}}
    if cuda and _has_static_shapes(config, num_labels):
        trials["training.cuda_graphs=false"] = {"training": {"cuda_graphs": False}}

    def peak(settings: Config) -> int:
        result = forecast(settings, data, cuda=cuda)
        return result.device_bytes if cuda else result.host_bytes

    costs = []
    for name, change in trials.items():
        tree = config.model_dump()
        for section, values in change.items():
            tree[section] |= values
        costs.append((name, peak(Config.model_validate(tree))))
    now = peak(config)
    return sorted((cost for cost in costs if cost[1] < now), key=lambda cost: cost[1])[:3]


def _of_rows(config: Config, data: TrainingData) -> TrainingData:
    """Without the features and labels that get no row."""

    def kept(counts: NDArray[np.int64], unused: str) -> NDArray[np.int64]:
        return counts if unused == "keep" else counts[counts > 0]

    return replace(
        data,
        feature_counts=kept(data.feature_counts, config.data.unused_features),
        label_counts=kept(data.label_counts, config.data.unused_labels),
    )


def _has_static_shapes(config: Config, num_labels: int) -> bool:
    """As `LabelSoftmax.allows_static_shapes`, whatever the size."""
    sampler = config.sampler
    if config.training.cuda_graphs is not True or sampler.estimator != "pool" or config.model.label_memory == "host":
        return False
    is_all = sampler.name == "full" or (sampler.name != "in-batch" and _number(sampler.num_draws) >= num_labels)
    return is_all or (sampler.positives == "sampled" and sampler.name in HOST_SAMPLERS) or sampler.name == "in-batch"


def _rows_of_a_batch(config: Config, data: TrainingData) -> tuple[int, int, int, int]:
    """Features and labels that an average batch touches, labels that one of its instances is scored against, and groups
    of instances with a pool each."""
    batch, sampler = _number(config.training.batch_size), config.sampler

    def distinct(counts: NDArray[np.int64], instances: float) -> float:
        share = np.minimum(counts / max(data.num_instances, 1), 1.0)
        return float((1.0 - (1.0 - share) ** instances).sum())

    num_labels, rows = data.label_counts.shape[0], int(distinct(data.feature_counts, batch))
    if sampler.name == "full":
        return rows, num_labels, num_labels, 1
    draws = _number(sampler.num_draws) * (1 if sampler.estimator == "pool" else batch)
    labels = int(min(num_labels, draws + distinct(data.label_counts, batch)))
    if sampler.estimator != "pool" or sampler.positives != "sampled" or draws >= num_labels:
        return rows, labels, labels, 1
    groups = 1 if sampler.name == "in-batch" else -(-batch // _number(sampler.pool_instances))
    return rows, labels, int(min(num_labels, draws + distinct(data.label_counts, batch / groups))), groups


def gradient_negatives(config: Config, pool: int, speed: Speed) -> int:
    """Labels of a pool of so many that an instance's gradient is made of: all, or as many as the rounding of its slopes
    leaves, in a pool whose logits are kept whole."""
    given, is_pool = config.sampler.gradient_negatives, config.sampler.estimator == "pool"
    is_whole = _number(config.training.batch_size) * pool <= _SCORES_AT_ONCE
    return min(pool, _number(given)) if speed.rounds_slopes and given != "all" and is_pool and is_whole else pool


def step_floor(
    batch: int, values: int, rows: int, pool: int, negatives: int, dim: int, speed: Speed
) -> tuple[float, float]:
    """The least seconds of a step: of its products, and of the rows that it cannot but move.

    The logits are of the whole pool (B, P, D); the two products of the gradient take `negatives` labels of an instance.
    Each of the batch's `values` is a row read forward and one backward; the `rows` features and the `pool` labels that
    it touches are read and written once, and the pool's once more for the products. All that is above it is copies,
    sampling, and operations that are not products.
    """
    products = batch * (2.0 * pool + 4.0 * negatives) * dim
    return products / speed.flops, 4.0 * dim * (2 * values + 2 * rows + 3 * pool) / speed.bytes


def _step(config: Config, data: TrainingData, rows: int, pool: int, speed: Speed) -> dict[str, float]:
    """Seconds of a step: its products, the rows that it moves with their copies and gradients, what is neither."""
    dim, batch = _number(config.model.dim), _number(config.training.batch_size)
    values = batch * data.num_values / max(data.num_instances, 1)
    negatives = gradient_negatives(config, pool, speed)
    # A product with few of the rows is bound by their bytes.
    gathered = 2 * batch * negatives if negatives < pool else 0
    return {
        "products": batch * (2.0 * pool + 4.0 * (0 if gathered else pool)) * dim / speed.flops,
        "rows": 4.0 * dim * (2 * values + 6 * rows + gathered) / speed.bytes,
        "overhead": _STEP_OVERHEAD,
    }


def _finish(config: Config, data: TrainingData, held_out: int) -> float:
    """Seconds of what follows the epochs, on two cores that nothing else uses."""
    seconds, num_labels = _FINISH, data.label_counts.shape[0]
    if num_labels >= CELLS_FROM:
        seconds += _FINISH_CELLS + _FINISH_LABEL * num_labels
    if config.neighbors.enabled:
        seconds += _FINISH_HELD_OUT * held_out
    if config.ranker.enabled and held_out:
        ranked = min(data.num_instances, _number(config.ranker.num_instances))
        seconds += ranked * _FINISH_RANKED + _FINISH_VALUE * data.num_values * ranked / max(data.num_instances, 1)
    return seconds


def _number(value: int | str) -> int:
    assert not isinstance(value, str), "the configuration is resolved"
    return value


def _fraction(config: Config) -> float:
    assert not isinstance(config.data.validation_fraction, str), "the configuration is resolved"
    return config.data.validation_fraction
