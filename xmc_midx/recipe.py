"""Layer 3. What `"auto"` means: the configuration's open values, derived from the size and shape of the training data.

Each rule is a smooth function of the data, chosen on validation splits of several datasets (EXPERIMENTS.md); none
knows a dataset by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from xmc_midx.config import HOST_SAMPLERS, Config, DataConfig, SamplerConfig
from xmc_midx.errors import UsageError

__all__ = [
    "CELLS_FROM",
    "DataShape",
    "as_started",
    "auto_num_codewords",
    "auto_num_draws",
    "require_estimator",
    "resolve",
]

_TARGET_STEPS = 1000
"""Optimiser steps of a whole default training, whatever the number of instances: small sets repeat, large sets take
larger batches. Fewer epochs keep the batch: it costs no quality, and half of it twice the time."""


CELLS_FROM = 4096
"""Labels from which cells are built with a model (EXPERIMENTS.md, "Label index")."""


_GRADIENT_NEGATIVES = 32
"""Negatives in the gradient of an instance, where a pool has many (EXPERIMENTS.md, "Rounded slopes")."""
_ROUNDED_FROM = 512
"""Labels from which that pays."""


_ENOUGH_STEPS = 530
"""Of a training, below which sampled labels need larger ones (EXPERIMENTS.md, "Labels without instances")."""


_RIVALLED_OF = 240_000
"""Instances of which so many say enough: more of gnd-tib's 84,000 gain nothing, more of yso-finna-en's half a million
do (EXPERIMENTS.md, "What a single feature says")."""


_UNUSED_FEATURES = 0.1
"""Of the features, that no instance has: below it, a model has a row for every feature."""
_UNUSED_LABELS = 0.05
"""Of the labels, likewise."""
_SHARED_BATCH = 512
"""Instances of a batch up to which it is twice as large from `CELLS_FROM` labels on: a pool costs the same for few and
many (EXPERIMENTS.md, "Few instances, many labels")."""
_REFRESH_STEPS = 64
"""Steps between two rebuilds of the codebooks, at the least, from `CELLS_FROM` labels on: of a short epoch, a rebuild
would be a third (as above)."""


_TABLES_AT_ONCE = 1 << 30
"""Bytes of a model's two tables up to which another is trained beside it."""


@dataclass(frozen=True, slots=True)
class _Effort:
    """What a preset scales."""

    epochs: float
    """Of a model that is alone, in those after which it gains nothing."""
    epochs_of_each: float
    """Where there are several: two models of half are worth more than one of all (EXPERIMENTS.md, "Ensembles")."""
    dim: int
    """Of each model."""
    dim_of_few: int
    """The same where instances are no more than `ensembled`: the smallest sets gain, and it costs little
    (EXPERIMENTS.md, "Ensembles")."""
    num_draws: int
    """Where there are more labels than a pool holds, at most."""
    num_pairs: int
    """Instances of a batch times draws, at most (EXPERIMENTS.md, "Presets")."""
    pool_instances: int
    """Instances that share a pool: more of them are negatives of each other, at the price of larger products
    (EXPERIMENTS.md, "Groups")."""
    num_rivalled: int
    """Training instances whose rivals the linear ranker learns from, of `_RIVALLED_OF` or fewer; of more the same
    share."""
    ensemble_size: int
    """Models that predict together, at least (EXPERIMENTS.md, "Ensembles")."""
    ensembled: int
    """Of few instances, what is learned depends much on the seed and on which are held out: as many models as see so
    many instances in all."""
    most_models: int
    """But no more."""


_PRESETS = {
    "fast": _Effort(
        epochs=0.3,
        epochs_of_each=0.3,
        dim=256,
        dim_of_few=256,
        num_draws=512,
        num_pairs=1 << 19,
        pool_instances=512,
        num_rivalled=10_000,
        ensemble_size=1,
        ensembled=0,
        most_models=1,
    ),
    "default": _Effort(
        epochs=1.0,
        epochs_of_each=0.6,
        dim=384,
        dim_of_few=512,
        num_draws=2048,
        num_pairs=1 << 20,
        pool_instances=512,
        num_rivalled=30_000,
        ensemble_size=2,
        ensembled=1 << 13,
        most_models=5,
    ),
    "best": _Effort(
        epochs=1.2,
        epochs_of_each=0.6,
        dim=512,
        dim_of_few=512,
        num_draws=2048,
        num_pairs=1 << 21,
        pool_instances=1024,
        num_rivalled=60_000,
        ensemble_size=5,
        ensembled=1 << 17,
        most_models=10,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DataShape:
    """The facts that the rules look at."""

    num_instances: int
    num_features: int
    num_labels: int
    num_positives: int
    """Of all instances."""
    num_used_features: int | None = None
    """Features that some instance has; None: all."""
    num_used_labels: int | None = None
    """Labels likewise."""
    has_counts: bool = False
    """Whether the features' values are raw counts."""

    def of_rows(self, data: DataConfig) -> DataShape:
        """The same without the features and labels that get no row, where the configuration says which do."""
        features = self.num_features if data.unused_features == "keep" else self.used_features
        labels = self.num_labels if data.unused_labels == "keep" else self.used_labels
        # A table has a row at the least.
        return replace(self, num_features=max(1, features), num_labels=max(1, labels))

    @property
    def used_features(self) -> int:
        return self.num_features if self.num_used_features is None else self.num_used_features

    @property
    def used_labels(self) -> int:
        return self.num_labels if self.num_used_labels is None else self.num_used_labels


def resolve(config: Config, shape: DataShape) -> Config:
    """The configuration with every `"auto"` replaced; values that are given stay as they are.

    Raises
    ------
    UsageError : two values do not go together.
    """
    _refuse_what_does_not_go_together(config)
    tree = config.model_dump()
    effort = _PRESETS[config.training.preset]

    if tree["data"]["weighting"] == "auto":
        tree["data"]["weighting"] = "tf-idf" if shape.has_counts else "none"

    def derive(section: str, key: str, value: float | str) -> None:
        if tree[section][key] == "auto":
            tree[section][key] = value

    has_unused = shape.num_features - shape.used_features > _UNUSED_FEATURES * shape.num_features
    derive("data", "unused_features", "drop" if has_unused else "keep")
    has_unused = shape.num_labels - shape.used_labels > _UNUSED_LABELS * shape.num_labels
    derive("data", "unused_labels", "drop" if has_unused else "keep")
    shape = shape.of_rows(DataConfig.model_validate(tree["data"]))
    # About 25 passes over 5,000 instances, 10 over 90,000, 5 over half a million.
    passes = min(30.0, max(3.0, 25 * (5000 / max(shape.num_instances, 1)) ** (1 / 3)))
    of_few = effort.ensembled // max(shape.num_instances, 1)
    derive("training", "ensemble_size", min(effort.most_models, max(effort.ensemble_size, of_few)))
    share = effort.epochs if tree["training"]["ensemble_size"] == 1 else effort.epochs_of_each
    derive("training", "epochs", max(2, round(share * passes)))
    instances_a_step = shape.num_instances * passes / _TARGET_STEPS
    batch_size = min(1024, max(32, 2 ** round(math.log2(max(instances_a_step, 1)))))
    has_many_labels = shape.num_labels >= CELLS_FROM
    if has_many_labels:
        batch_size = max(batch_size, min(2 * batch_size, _SHARED_BATCH))
    derive("training", "batch_size", batch_size)
    num_epoch_steps = max(1, shape.num_instances // tree["training"]["batch_size"])
    is_short = has_many_labels and num_epoch_steps < _REFRESH_STEPS
    derive("sampler", "refresh_every", _REFRESH_STEPS if is_short else "epoch")
    # Steps fall with the root of a row's gradients so far (`RowAdam`, moment "sum"): one rate for rare and common rows.
    # How far a row gets grows with the root of its gradients, too: fewer passes need larger steps. And what is seen
    # twice is not learned by heart yet, what is seen ten times is (EXPERIMENTS.md, "Passes, dropout and rate").
    num_epochs = tree["training"]["epochs"]
    derive("training", "encoder_learning_rate", 0.36 / math.sqrt(num_epochs))
    derive("model", "dim", effort.dim_of_few if of_few else effort.dim)
    table_bytes = 4 * tree["model"]["dim"] * (shape.num_features + shape.num_labels)
    is_alone = tree["training"]["ensemble_size"] == 1 or table_bytes > _TABLES_AT_ONCE
    derive("training", "models_at_once", 1 if is_alone else 2)
    derive("model", "dropout", min(0.6, num_epochs / 20))
    # What the last step is fitted to is what is stored (EXPERIMENTS.md, "The saved model").
    derive("model", "storage", "int4" if has_many_labels else "int8")
    derive("data", "validation_fraction", _validation_fraction(shape.num_instances))
    derive("sampler", "num_codewords", auto_num_codewords(shape.num_labels))
    num_draws = 64
    if config.sampler.estimator == "pool":
        num_draws = auto_num_draws(shape.num_labels, effort.num_draws)
        if num_draws < shape.num_labels:
            num_draws = max(1, min(num_draws, effort.num_pairs // tree["training"]["batch_size"]))
    derive("sampler", "num_draws", num_draws)
    derive("sampler", "pool_instances", effort.pool_instances)
    is_rounded = shape.num_labels >= _ROUNDED_FROM and config.sampler.name != "full"
    derive("sampler", "gradient_negatives", _GRADIENT_NEGATIVES if is_rounded else "all")
    num_steps = num_epochs * shape.num_instances / tree["training"]["batch_size"]
    derive("training", "label_learning_rate", _label_learning_rate(_share_of_labels(tree, shape), num_steps))
    derive("training", "cuda_graphs", True)
    derive("ranker", "num_instances", round(effort.num_rivalled * max(1.0, shape.num_instances / _RIVALLED_OF)))
    return Config.model_validate(tree)


def require_estimator(sampler: SamplerConfig) -> None:
    """A UsageError where a sampler does not go with the estimator."""
    if sampler.name == "in-batch" and sampler.estimator != "pool":
        raise UsageError("sampler in-batch shares its negatives: it needs sampler.estimator=pool.")


def _refuse_what_does_not_go_together(config: Config) -> None:
    sampler = config.sampler
    require_estimator(sampler)
    if config.model.label_memory == "host" and sampler.name not in HOST_SAMPLERS:
        raise UsageError(
            f"model.label_memory=host: sampler {sampler.name} reads the label table at each step; expected "
            f"{', '.join(HOST_SAMPLERS)}."
        )


def as_started(config: Config) -> Config:
    """The configuration of a run that an older release may have started: what it did not know stays as it did it."""
    tree = config.model_dump()
    batch_size = tree["training"]["batch_size"]
    for section, key, before in (
        ("data", "weighting", "none"),
        ("data", "unused_features", "keep"),
        ("data", "unused_labels", "keep"),
        ("model", "storage", "int8"),
        ("sampler", "pool_instances", batch_size),
        ("sampler", "gradient_negatives", "all"),
        ("sampler", "refresh_every", "epoch"),
        ("training", "cuda_graphs", False),
        ("training", "ensemble_size", 1),
        ("training", "models_at_once", 1),
    ):
        if tree[section][key] == "auto":
            tree[section][key] = before
    return Config.model_validate(tree)


def auto_num_codewords(num_labels: int) -> int:
    """C from L: 1.25 sqrt(L), in 4..320.

    More codewords come nearer to the softmax (gnd-tib, KL(P||Q): 4.0 nats at 101, 3.4 at 256, 3.2 at 400), and the
    set-up of a batch costs O(C^2): at 320, 3 to 4% of a step.
    """
    return max(4, min(320, round(1.25 * math.sqrt(num_labels))))


def auto_num_draws(num_labels: int, most: int = 2048) -> int:
    """Draws for a batch: all labels where they are as few as two pools, else `most`."""
    return num_labels if num_labels <= 2 * most else most


def _validation_fraction(num_instances: int) -> float:
    """5% of small sets; at most 2,000 instances, whose P@1 has a standard error of one point."""
    return min(0.05, 2000 / max(num_instances, 1))


def _share_of_labels(tree: dict[str, dict[str, Any]], shape: DataShape) -> float:
    """Of all labels, those whose rows a step updates: positives and draws, repeated ones counted as often as they come,
    at most 1."""
    sampler, batch_size = tree["sampler"], tree["training"]["batch_size"]
    if sampler["name"] == "full":
        return 1.0
    num_draws: int = 0 if sampler["name"] == "in-batch" else sampler["num_draws"]
    if sampler["estimator"] != "pool":
        num_draws *= batch_size
    positives: float = batch_size * shape.num_positives / max(shape.num_instances, 1)
    return min(1.0, (num_draws + positives) / max(shape.num_labels, 1))


def _label_learning_rate(share: float, num_steps: float) -> float:
    """Rows that are updated at every step of a long training need small steps, rows that are met a few times need
    large ones: the rate falls with the root of a row's updates (EXPERIMENTS.md, "Label rates"). Where a part of the
    labels is sampled, less than 0.01 was no better; the bound falls to 0.001 where all of them are."""
    sampled = 1.0 - share * share
    rate = 4e-3 * math.sqrt(1000 / max(share * num_steps, 1.0))
    # Sampled labels need larger steps in a short training, or the tail is left behind; all labels do not: the exponent
    # is a half where few are drawn, nothing where all are.
    rate *= math.pow(max(1.0, _ENOUGH_STEPS / max(num_steps, 1.0)), sampled / 2)
    return min(2e-2, max(1e-3 + 9e-3 * sampled, rate))
