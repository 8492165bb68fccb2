"""What a training step costs at any size, beside the least that this device could take; and P@1 over time.

    python scripts/benchmark_scale.py cost [--labels 100000,10000000] [--dim 64] [--draws 2048] [--device cpu|cuda]
    python scripts/benchmark_scale.py curve [--labels 100000] [--instances 100000] [--samplers midx-pq,uniform,full]
    ... [--like amazon-670k] [--set training.precision=bfloat16] [--json FILE] [--plot FILE.png]

The data is made up and can be learned: labels have Zipf frequencies, belong to topics and show features of their own
beside those of their topic; a third of an instance's features is noise. The parts are the tool's own: batches, encoder,
label softmax, optimiser, `Trainer`.

`cost` prints the floor first: the matrix products of a step at the speed measured here for one product of that shape,
and its rows at the speed of a plain gather, nothing else. Then the trainer's step by stage, medians; each line has a
process of its own, so that its memory is its own. Resident memory is given in all, and beyond what the process had
before the tables (libraries and data).

`curve` trains every sampler from the same start for the same epochs and scores held-out instances by a full scan as it
goes; the clock stands still meanwhile.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix

from xmc_midx.build import build_encoder, build_softmax
from xmc_midx.config import Config, load_config
from xmc_midx.data.batches import BatchStream
from xmc_midx.device import find_device, find_precision, keep_freed_memory, measure_speed, used_memory_bytes
from xmc_midx.forecast import Speed, gradient_negatives, step_floor
from xmc_midx.recipe import DataShape, resolve
from xmc_midx.slopes import rounds_slopes
from xmc_midx.topk import exact_topk
from xmc_midx.trainer import Trainer
from xmc_midx.types import SilentReporter

STAGES = ("batch", "encoder", "sampler", "gather", "loss", "backward", "optimiser", "rest")
LIKE = {
    "amazon-670k": {"instances": 490_449, "features": 135_909, "labels": [670_091], "per_instance": (76, 5.45)},
}
SKIPPED = 5
"""First steps, which allocate."""
NUM_TEST = 2000
OWN, SHARED = 8, 24
"""Features of a label, and of a topic."""


# ------------------------------------------------------------------------------------------------------- made-up data


@dataclass(frozen=True)
class Shape:
    """Of a made-up collection."""

    instances: int
    features: int
    labels: int
    features_per_instance: int
    labels_per_instance: float

    @property
    def topics(self) -> int:
        return max(1, round(math.sqrt(self.labels)))

    def frequencies(self, num_instances: int) -> np.ndarray:
        """(L,) int32: the labels' expected instances in so many, by label id."""
        share = 1.0 / np.log1p(self.labels) / np.arange(1.0, self.labels + 1.0)
        counts = np.empty(self.labels, dtype=np.int32)
        counts[_scattered(np.arange(self.labels), self.labels)] = share * num_instances * self.labels_per_instance
        return counts


def make_up(shape: Shape, num_instances: int, *, seed: int) -> tuple[csr_matrix, csr_matrix]:
    """(features, labels) of some instances; those of two seeds have no instance in common, but the same law.

    The first label of an instance has rank r with a probability of about 1 / r; the others are of its topic or, one in
    four, of any. A feature is the label's own (a third), its topic's (a third) or noise (a third).
    """
    rng = np.random.default_rng(seed)
    counts = 1 + rng.poisson(shape.labels_per_instance - 1.0, num_instances)
    row_Y = np.repeat(np.arange(num_instances), counts)
    rank_Y = _zipf(rng, shape.labels, row_Y.size)
    first = np.cumsum(counts) - counts
    topic_Y = (rank_Y % shape.topics)[first][row_Y]
    of_topic = rng.random(row_Y.size) < 0.75
    of_topic[first] = False
    place = _zipf(rng, max(1, shape.labels // shape.topics), row_Y.size)
    rank_Y = np.where(of_topic, np.minimum(topic_Y + shape.topics * place, shape.labels - 1), rank_Y)
    labels = _rows(row_Y, _scattered(rank_Y, shape.labels), (num_instances, shape.labels))

    width = shape.features_per_instance
    row = np.repeat(np.arange(num_instances), width)
    chosen = first[row] + (rng.random(row.size) * counts[row]).astype(np.int64)
    kind, number = rng.integers(3, size=row.size), rng.integers(OWN * SHARED, size=row.size)
    feature = np.where(
        kind == 0,
        _hashed(rank_Y[chosen] * OWN + number % OWN, shape.features),
        np.where(
            kind == 1,
            _hashed(-1 - (rank_Y[chosen] % shape.topics) * SHARED - number % SHARED, shape.features),
            _scattered(_zipf(rng, shape.features, row.size), shape.features),
        ),
    )
    features = _rows(row, feature, (num_instances, shape.features))
    lengths = np.sqrt(np.asarray(features.multiply(features).sum(axis=1)).ravel())
    features.data /= np.repeat(lengths.astype(np.float32), np.diff(features.indptr))
    return features, labels


def _zipf(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """Ranks from 0 with a probability of about 1 / (rank + 1): the inverse of a log-uniform law."""
    return np.exp(rng.random(size) * np.log1p(count)).astype(np.int64) - 1


def _scattered(rank: np.ndarray, count: int) -> np.ndarray:
    """One id for each rank, so that neighbours in frequency are no neighbours in memory."""
    step = next(n for n in range(round(0.618 * count) | 1, 2 * count + 3, 2) if math.gcd(n, count) == 1)
    return rank * step % count


def _hashed(number: np.ndarray, count: int) -> np.ndarray:
    """A feature for each number, the frequent features for more of them."""
    mixed = number.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    uniform = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return (uniform * count).astype(np.int64)


def _rows(row: np.ndarray, column: np.ndarray, size: tuple[int, int]) -> csr_matrix:
    """Distinct pairs with the value 1."""
    key = np.unique(row * size[1] + column)
    row, column = np.divmod(key, size[1])
    offsets = np.zeros(size[0] + 1, dtype=np.int64)
    np.cumsum(np.bincount(row, minlength=size[0]), out=offsets[1:])
    return csr_matrix((np.ones(key.size, dtype=np.float32), column.astype(np.int32), offsets), shape=size)


# --------------------------------------------------------------------------------------------------------------- cost


class StageClock:
    """Seconds of the calls that it wraps, without those of wrapped calls inside them."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict.fromkeys(STAGES, 0.0)
        self._inner: list[float] = []

    def wrap(self, owner: Any, name: str, stage: str) -> None:
        setattr(owner, name, self.timed(getattr(owner, name), stage))

    def timed(self, call: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def measured(*arguments: Any, **options: Any) -> Any:
            started = self.now()
            self._inner.append(0.0)
            try:
                return call(*arguments, **options)
            finally:
                seconds = self.now() - started
                self.seconds[stage] += seconds - self._inner.pop()
                if self._inner:
                    self._inner[-1] += seconds

        return measured

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class StepTimes(SilentReporter):
    """Seconds of each step of a trainer, by stage where there is a clock."""

    def __init__(self, device: torch.device, clock: StageClock | None = None) -> None:
        self.device, self.clock, self.steps = device, clock, list[dict[str, float]]()
        self._last: float | None = None

    def step(self, advance: int = 1, **facts: float) -> None:
        if self.device.type == "cuda" and self.clock is not None:
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._last is not None:
            parts = {"step": now - self._last}
            if self.clock is not None:
                known = sum(self.clock.seconds.values())
                parts |= self.clock.seconds | {"rest": parts["step"] - known}
                self.clock.seconds = dict.fromkeys(STAGES, 0.0)
            self.steps.append(parts)
        elif self.clock is not None:
            self.clock.seconds = dict.fromkeys(STAGES, 0.0)
        self._last = now


@dataclass(frozen=True)
class Cost:
    """One sampler at one number of labels; milliseconds and bytes."""

    sampler: str
    num_labels: int
    dim: int
    batch: int
    pool: float
    precision: str
    floor_products: float
    floor_rows: float
    step: float
    spread: tuple[float, float]
    """The quartiles of the steps."""
    stages: dict[str, float] = field(default_factory=dict)
    refresh: float = 0.0
    tables: int = 0
    """Both tables, biases and layers."""
    states: int = 0
    """Of the optimiser."""
    codes: int = 0
    """The sampler's codes and the labels in the order of their cells."""
    before: int = 0
    """Resident before the tables: libraries and data."""
    resident: int = 0
    """After the steps and a refresh."""
    peak: int = 0
    """The largest while tables, refreshes and steps were made."""

    @property
    def floor(self) -> float:
        return self.floor_products + self.floor_rows

    @property
    def share(self) -> float:
        return self.floor / self.step

    @property
    def sampler_share(self) -> float:
        return self.stages["sampler"] / sum(self.stages.values())

    @property
    def growth(self) -> float:
        """Peak over what the tables, codes and states take: 1 is nothing else."""
        return self.peak / (self.tables + self.states + self.codes)


def measure_cost(sampler: str, shape: Shape, options: argparse.Namespace) -> Cost:
    """Steps of the trainer on a window of a large collection: its label frequencies, a few of its instances."""
    torch.set_num_threads(options.threads)
    device = find_device(options.device)
    if device.type == "cpu":
        keep_freed_memory()
    window = options.batch * (options.steps + SKIPPED + 1)
    whole = max(shape.instances, round(3 * shape.labels / shape.labels_per_instance))
    config = _config(sampler, shape, options)
    stream = BatchStream(*make_up(shape, window, seed=0), batch_size=options.batch, seed=0)
    before = used_memory_bytes()
    _forget_peak()
    encoder = build_encoder(config, shape.features).to(device)
    frequencies = shape.frequencies(whole)
    softmax = build_softmax(config, frequencies, whole, device)
    del frequencies
    _fill_in_clusters(softmax.weight)
    trainer = Trainer(encoder, softmax, stream, config.training)
    encoder.reset_parameters(torch.Generator(device).manual_seed(0))
    started = time.perf_counter()
    softmax.refresh()
    refresh = time.perf_counter() - started
    plain = StepTimes(device)
    trainer.run_epoch(plain)
    resident = used_memory_bytes()
    pool = round(float(softmax.pool_size))
    clock = StageClock(device)
    # A clock cannot look into a graph: the stages are those of the same work, asked for piece by piece.
    trainer.graphs = None
    with _clocked(clock, trainer):
        staged = StepTimes(device, clock)
        trainer.run_epoch(staged)
    steps = [1e3 * parts["step"] for parts in plain.steps[SKIPPED:]]
    stages = {stage: 1e3 * statistics.median(parts[stage] for parts in staged.steps[SKIPPED:]) for stage in STAGES}
    precision = find_precision(config.training.precision, device, shape.labels)
    flops, rate = measure_speed(options.batch, pool, options.dim, precision, device)
    values = stream.features.nnz / stream.num_instances
    touched = statistics.fmean(np.unique(batch.features.feature_ids).size for batch in stream.epoch(1))
    speed = Speed(flops=flops, bytes=rate, rounds_slopes=rounds_slopes(device))
    negatives = gradient_negatives(config, pool, speed)
    floor = step_floor(
        options.batch, round(options.batch * values), round(touched), pool, negatives, options.dim, speed
    )
    states = trainer.optimizer.state.values()
    quartiles = statistics.quantiles(steps, n=4)
    return Cost(
        sampler=sampler,
        num_labels=shape.labels,
        dim=options.dim,
        batch=options.batch,
        pool=pool,
        precision=str(precision).removeprefix("torch."),
        floor_products=1e3 * floor[0],
        floor_rows=1e3 * floor[1],
        step=statistics.median(steps),
        spread=(quartiles[0], quartiles[2]),
        stages=stages,
        refresh=1e3 * refresh,
        tables=sum(p.nbytes for p in [*encoder.parameters(), *softmax.parameters()]),
        states=sum(tensor.nbytes for state in states for tensor in state.values()),
        codes=0 if softmax.sampler is None else _code_bytes(softmax.sampler),
        before=before,
        resident=resident if device.type == "cpu" else torch.cuda.memory_allocated(device),
        peak=_peak_memory() if device.type == "cpu" else torch.cuda.max_memory_allocated(device),
    )


@contextmanager
def _clocked(clock: StageClock, trainer: Trainer) -> Iterator[None]:
    """The parts of a trainer's step under a clock; `Tensor.backward` is put back at the end."""
    backward = torch.Tensor.backward
    if clock.device.type == "cpu":
        # For a GPU a thread makes them ahead, while the steps before are under way.
        clock.wrap(trainer.stream, "_batch", "batch")
    clock.wrap(trainer.encoder, "bags", "encoder")
    clock.wrap(trainer.encoder, "layers", "encoder")
    clock.wrap(trainer.softmax, "_pools", "sampler")
    clock.wrap(trainer.softmax, "_static_pool", "sampler")
    clock.wrap(trainer.softmax, "_rows", "gather")
    clock.wrap(trainer.softmax, "_pool_loss", "loss")
    clock.wrap(trainer.softmax, "_static_loss", "loss")
    clock.wrap(trainer.optimizer, "step", "optimiser")
    clock.wrap(trainer.optimizer, "step_bags", "optimiser")
    torch.Tensor.backward = clock.timed(backward, "backward")
    try:
        yield
    finally:
        torch.Tensor.backward = backward


def _code_bytes(sampler: Any) -> int:
    """The codes of all labels, and the labels of all cells."""
    if not hasattr(sampler, "codebook"):
        return 0
    codebook = sampler.codebook
    return codebook.codes1.nbytes + codebook.codes2.nbytes + sampler._order.labels.nbytes


@torch.no_grad()
def _fill_in_clusters(weight_LD: torch.Tensor) -> None:
    """Rows around centres, as trained tables have them; one block of random rows, around other centres each time."""
    num_labels, dim = weight_LD.shape
    generator = torch.Generator(weight_LD.device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": weight_LD.device}
    scale = math.sqrt(8 / dim)
    centres = torch.randn(max(1, min(num_labels // 32, 1 << 16)), dim, **options).mul_(scale)
    block = torch.randn(1 << 18, dim, **options).mul_(scale)
    for begin in range(0, num_labels, 1 << 18):
        part = weight_LD[begin : begin + (1 << 18)]
        chosen = torch.randint(centres.shape[0], (part.shape[0],), **options)
        part.copy_(centres[chosen].add_(block[: part.shape[0]]))


def _config(sampler: str, shape: Shape, options: argparse.Namespace) -> Config:
    given: dict[str, Any] = {
        "sampler.name": sampler,
        "sampler.num_draws": options.draws,
        "model.dim": options.dim,
        "training.batch_size": options.batch,
        "training.epochs": options.epochs,
        "training.device": options.device,
        "data.validation_fraction": 0,
    }
    config = load_config(assignments=[*(f"{key}={value}" for key, value in given.items()), *options.set])
    return resolve(
        config,
        DataShape(
            num_instances=shape.instances,
            num_features=shape.features,
            num_labels=shape.labels,
            num_positives=round(shape.instances * shape.labels_per_instance),
        ),
    )


def _forget_peak() -> None:
    """Let the kernel count the largest resident set anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_memory() -> int:
    """The largest resident set since `_forget_peak`; `resource` tells that of the whole life."""
    return 1024 * int(Path("/proc/self/status").read_text(encoding="ascii").partition("VmHWM:")[2].split()[0])


# -------------------------------------------------------------------------------------------------------------- curve


def measure_curve(sampler: str, shape: Shape, options: argparse.Namespace) -> list[dict[str, float]]:
    """P@1, P@5 and loss at the end of each epoch, with the seconds of training until then."""
    torch.set_num_threads(options.threads)
    device = find_device(options.device)
    if device.type == "cpu":
        keep_freed_memory()
    config = _config(sampler, shape, options)
    features, labels = make_up(shape, shape.instances, seed=0)
    held_out, truth = make_up(shape, NUM_TEST, seed=1)
    stream = BatchStream(features, labels, batch_size=options.batch, seed=0)
    frequencies = np.bincount(labels.indices, minlength=shape.labels)
    softmax = build_softmax(config, frequencies, shape.instances, device)
    trainer = Trainer(build_encoder(config, shape.features).to(device), softmax, stream, config.training)
    started = time.perf_counter()
    trainer.initialize("mean-instance", 0)
    start_seconds, trained, points = time.perf_counter() - started, 0.0, []
    for _ in range(trainer.num_epochs):
        stats = trainer.run_epoch(SilentReporter())
        trained += stats.seconds
        query_ND = torch.cat([query for _, query in trainer.encoder.encode(held_out)])
        top = exact_topk(query_ND, softmax.weight.detach(), softmax.bias.detach(), 5).label_ids
        hits = np.array(
            [np.isin(ids, truth.indices[truth.indptr[i] : truth.indptr[i + 1]]) for i, ids in enumerate(top)]
        )
        points.append(
            {
                "epoch": stats.epoch,
                "seconds": trained,
                "start_seconds": start_seconds,
                "P@1": float(hits[:, 0].mean()),
                "P@5": float(hits.mean()),
                "loss": stats.loss,
                "pool": stats.sampler["pool_size"],
                "instances_per_second": stats.instances_per_second,
            }
        )
        print(f"{sampler}: {points[-1]}", file=sys.stderr, flush=True)
    return points


# ------------------------------------------------------------------------------------------------------------- report


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    measure = measure_cost if options.what == "cost" else measure_curve
    results: list[Any] = []
    for num_labels in options.labels:
        shape = Shape(options.instances, options.features, num_labels, *options.per_instance)
        for sampler in options.samplers:
            print(f"{sampler}, {num_labels:,} labels ...", file=sys.stderr, flush=True)
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                result = pool.submit(measure, sampler, shape, options).result()
            results.append(result if options.what == "cost" else (sampler, num_labels, result))
    print(_cost_tables(results) if options.what == "cost" else _curve_table(results))
    if options.json is not None:
        options.json.write_text(json.dumps(_document(results, options), indent=1) + "\n", encoding="utf-8")
    if options.plot is not None:
        (_plot_costs if options.what == "cost" else _plot_curves)(results, options.plot)
    return 0


def _document(results: list[Any], options: argparse.Namespace) -> dict[str, Any]:
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    if options.what == "cost":
        return {"arguments": arguments, "costs": [asdict(cost) for cost in results]}
    curves = [{"sampler": name, "num_labels": number, "points": points} for name, number, points in results]
    return {"arguments": arguments, "curves": curves}


def _cost_tables(costs: list[Cost]) -> str:
    times = [
        [
            "sampler",
            "labels",
            "pool",
            "floor ms: products",
            "rows",
            "step ms (quartiles)",
            "floor / step",
            "instances/s",
            *(f"{stage} ms" for stage in STAGES),
            "sampler share %",
            "refresh s",
        ]
    ]
    sizes = [
        [
            "sampler",
            "labels",
            "tables",
            "states",
            "codes",
            "before",
            "resident",
            "peak",
            "peak / (t + s + c)",
            "(peak - before) / (t + s + c)",
        ]
    ]
    for cost in costs:
        name = [cost.sampler, f"{cost.num_labels:,}"]
        times.append(
            [
                *name,
                f"{cost.pool:,.0f}",
                f"{cost.floor_products:.2f}",
                f"{cost.floor_rows:.2f}",
                f"{cost.step:.2f} ({cost.spread[0]:.2f} to {cost.spread[1]:.2f})",
                f"{cost.share:.2f}",
                f"{1e3 * cost.batch / cost.step:,.0f}",
                *(f"{cost.stages[stage]:.2f}" for stage in STAGES),
                f"{100 * cost.sampler_share:.1f}",
                f"{cost.refresh / 1e3:.2f}",
            ]
        )
        known = cost.tables + cost.states + cost.codes
        sizes.append(
            [
                *name,
                *(
                    f"{size / 1e6:,.0f}"
                    for size in (cost.tables, cost.states, cost.codes, cost.before, cost.resident, cost.peak)
                ),
                f"{cost.growth:.2f}",
                f"{(cost.peak - cost.before) / known:.2f}",
            ]
        )
    return _markdown(times) + "\n\nMemory in MB:\n\n" + _markdown(sizes)


def _curve_table(curves: list[tuple[str, int, list[dict[str, float]]]]) -> str:
    rows = [["sampler", "labels", "epoch", "training s", "instances/s", "pool", "loss", "P@1 %", "P@5 %"]]
    for sampler, num_labels, points in curves:
        for point in points:
            rows.append(
                [
                    sampler,
                    f"{num_labels:,}",
                    f"{point['epoch']}",
                    f"{point['seconds']:.1f}",
                    f"{point['instances_per_second']:,.0f}",
                    f"{point['pool']:,.0f}",
                    f"{point['loss']:.3f}",
                    f"{100 * point['P@1']:.2f}",
                    f"{100 * point['P@5']:.2f}",
                ]
            )
    return _markdown(rows)


def _markdown(rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:]))


def _plot_costs(costs: list[Cost], path: Path) -> None:
    """The stages of a step as stacked bars, the floor as a line across each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.5 + 1.4 * len(costs), 4.5), layout="constrained")
    axes = figure.subplots()
    bottom = np.zeros(len(costs))
    for stage in STAGES:
        heights = np.array([cost.stages[stage] for cost in costs])
        axes.bar(range(len(costs)), heights, 0.6, bottom=bottom, label=stage)
        bottom += heights
    for place, cost in enumerate(costs):
        axes.plot([place - 0.4, place + 0.4], [cost.floor] * 2, color="black", label="floor" if place == 0 else None)
    axes.set_xticks(range(len(costs)), [f"{cost.sampler}\n{cost.num_labels:,}" for cost in costs])
    axes.set_ylabel("ms a step")
    axes.legend(fontsize="small")
    figure.savefig(path)


def _plot_curves(curves: list[tuple[str, int, list[dict[str, float]]]], path: Path) -> None:
    """P@1 over the seconds of training, on a logarithmic axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for sampler, num_labels, points in curves:
        seconds, hits = [point["seconds"] for point in points], [100 * point["P@1"] for point in points]
        axes.plot(seconds, hits, marker="o", markersize=3, label=f"{sampler}, {num_labels:,} labels")
    axes.set_xscale("log")
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("P@1 (%)")
    axes.legend(fontsize="small")
    figure.savefig(path)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [round(float(word)) for word in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "curve"))
    parser.add_argument("--like", choices=sorted(LIKE), help="a known collection's N, F, L and numbers an instance")
    parser.add_argument("--samplers", type=lambda text: text.split(","))
    parser.add_argument("--labels", type=numbers)
    parser.add_argument("--instances", type=int, help="of the collection")
    parser.add_argument("--features", type=int)
    parser.add_argument(
        "--per-instance",
        type=lambda text: (int(text.split(",")[0]), float(text.split(",")[1])),
        metavar="FEATURES,LABELS",
    )
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--draws", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=40, help="measured steps (cost)")
    parser.add_argument("--epochs", type=int, default=5, help="(curve)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in `xmc-midx train`")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    default: dict[str, Any] = {
        "instances": 100_000,
        "features": 135_909,
        "labels": [100_000],
        "per_instance": (76, 5.45),
    }
    for name, value in (default | LIKE.get(options.like, {})).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.samplers is None:
        options.samplers = ["midx-pq"] if options.what == "cost" else ["midx-pq", "uniform", "full"]
    if options.what == "cost":
        options.epochs = 2
    return options


if __name__ == "__main__":
    sys.exit(main())
