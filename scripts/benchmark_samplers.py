"""What a sampler costs: set-up and draws of a batch against the whole training step, over the number of labels.

    python scripts/benchmark_samplers.py [--samplers midx-pq,midx-rq] [--labels 10000,41218,1000000] [--dim 512]
        [--batch 512] [--draws 2048] [--steps 30] [--threads 2] [--json FILE]

The data is made up: rows of features with the shape of short documents (64 features an instance, Zipf's law over
88,279), labels of Zipf frequencies whose table is in clusters, as trained ones are. The parts are the tool's own:
encoder, label softmax, optimiser, products as in training. A step is encoder, sampler, loss,
gradients and the update of the touched rows. Figures are medians over the steps; `draw` is `sample_pool` alone, on the
queries of the same steps, called in turn with them, so that a busy spell of the machine meets both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from scipy.sparse import csr_matrix

from xmc_midx.build import build_encoder, build_softmax
from xmc_midx.config import Config, load_config
from xmc_midx.data.batches import BatchStream
from xmc_midx.device import keep_freed_memory
from xmc_midx.optim import RowAdam
from xmc_midx.recipe import DataShape, resolve

NUM_FEATURES, FEATURES_PER_INSTANCE, LABELS_PER_INSTANCE = 88_279, 64, 3
HEADS = ("sampler", "labels", "codewords", "refresh s", "draw ms", "us/draw", "step ms", "share %", "pool")


@dataclass(frozen=True)
class Cost:
    """Medians of one sampler at one number of labels."""

    sampler: str
    num_labels: int
    num_codewords: int
    refresh_seconds: float
    draw_milliseconds: float
    """Set-up and draws of a batch."""
    microseconds_per_draw: float
    step_milliseconds: float
    share: float
    """Of the step; the median over the steps of the ratio."""
    pool_size: float

    def cells(self) -> list[str]:
        return [
            self.sampler,
            f"{self.num_labels:,}",
            f"{self.num_codewords}" if self.sampler.startswith("midx") else "",
            f"{self.refresh_seconds:.2f}",
            f"{self.draw_milliseconds:.2f}",
            f"{self.microseconds_per_draw:.2f}",
            f"{self.step_milliseconds:.1f}",
            f"{100 * self.share:.1f}",
            f"{self.pool_size:,.0f}",
        ]


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    costs = []
    for num_labels in options.labels:
        for sampler in options.samplers:
            print(f"{sampler}, {num_labels:,} labels ...", file=sys.stderr, flush=True)
            costs.append(_measure(sampler, num_labels, options))
    rows = [list(HEADS), ["---", *["---:"] * (len(HEADS) - 1)], *(cost.cells() for cost in costs)]
    print("\n".join("| " + " | ".join(row) + " |" for row in rows))
    if options.json is not None:
        with open(options.json, "w", encoding="utf-8") as stream:  # noqa: PTH123
            json.dump([asdict(cost) for cost in costs], stream, indent=1)
    return 0


def _measure(sampler: str, num_labels: int, options: argparse.Namespace) -> Cost:
    config = _config(sampler, num_labels, options)
    rng = np.random.default_rng(0)
    stream, frequency_L = _instances(num_labels, options, rng)
    encoder = build_encoder(config, NUM_FEATURES)
    encoder.reset_parameters(torch.Generator().manual_seed(0))
    encoder.dropout.generator = torch.Generator().manual_seed(1)
    softmax = build_softmax(config, frequency_L, stream.num_instances, torch.device("cpu"))
    _fill_in_clusters(softmax.weight, rng)
    # All sampled labels are drawn, however few labels there are: with num_draws >= L there would be no sampler.
    started = time.perf_counter()
    softmax.refresh()
    refresh_seconds = time.perf_counter() - started
    optimizer = RowAdam([{"params": [*encoder.parameters(), *softmax.parameters()], "lr": 1e-3}])
    generator = torch.Generator().manual_seed(2)
    steps, draws, pools = [], [], []
    for batch in stream.epoch(1):
        started = time.perf_counter()
        query_BD = encoder(batch.features)
        softmax(query_BD, (batch.positives, batch.positive_offsets)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.append(time.perf_counter() - started)
        pools.append(softmax.pool_size)
        started = time.perf_counter()
        softmax.sampler.sample_pool(query_BD.detach(), options.draws, generator)
        draws.append(time.perf_counter() - started)
    steps, draws, pools = steps[3:], draws[3:], pools[3:]  # the first ones allocate
    draw = statistics.median(draws)
    return Cost(
        sampler=sampler,
        num_labels=num_labels,
        num_codewords=int(config.sampler.num_codewords),
        refresh_seconds=refresh_seconds,
        draw_milliseconds=1e3 * draw,
        microseconds_per_draw=1e6 * draw / options.draws,
        step_milliseconds=1e3 * statistics.median(steps),
        share=statistics.median(d / s for d, s in zip(draws, steps, strict=True)),
        pool_size=statistics.fmean(pools),
    )


def _config(sampler: str, num_labels: int, options: argparse.Namespace) -> Config:
    given = {
        "sampler.name": sampler,
        "sampler.num_draws": options.draws,
        "model.dim": options.dim,
        "training.batch_size": options.batch,
    }
    config = load_config(assignments=[*(f"{key}={value}" for key, value in given.items()), *options.set])
    num_instances = options.batch * (options.steps + 3)
    shape = DataShape(
        num_instances=num_instances,
        num_features=NUM_FEATURES,
        num_labels=num_labels,
        num_positives=num_instances * LABELS_PER_INSTANCE,
    )
    return resolve(config, shape)


def _instances(
    num_labels: int, options: argparse.Namespace, rng: np.random.Generator
) -> tuple[BatchStream, np.ndarray]:
    """Batches of Zipf features and Zipf labels, and the label frequencies of a collection of 3 L instances."""
    num_instances = options.batch * (options.steps + 3)

    def rows(num_columns: int, per_row: int) -> csr_matrix:
        # The inverse of a log-uniform law: rank r with a probability of about 1 / r.
        ranks = np.exp(rng.random((num_instances, per_row)) * np.log(num_columns)).astype(np.int64) - 1
        offsets = np.arange(num_instances + 1) * per_row
        values = np.full(ranks.size, per_row**-0.5, dtype=np.float32)
        matrix = csr_matrix((values, ranks.ravel(), offsets), shape=(num_instances, num_columns))
        matrix.sum_duplicates()
        return matrix

    features, labels = rows(NUM_FEATURES, FEATURES_PER_INSTANCE), rows(num_labels, LABELS_PER_INSTANCE)
    frequency_L = 9.0 * num_labels / np.log(num_labels) / np.arange(1, num_labels + 1)
    return BatchStream(features, labels, batch_size=options.batch, seed=0), frequency_L.astype(np.int64)


@torch.no_grad()
def _fill_in_clusters(weight_LD: torch.Tensor, rng: np.random.Generator) -> None:
    """Rows of length about 4 around a centre for every 32 labels, half of the square length within a cluster."""
    num_labels, dim = weight_LD.shape
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(max(1, num_labels // 32), dim, generator=generator).mul_((8 / dim) ** 0.5)
    weight_LD.normal_(0.0, (8 / dim) ** 0.5, generator=generator)
    for begin in range(0, num_labels, 1 << 18):
        part = weight_LD[begin : begin + (1 << 18)]
        part += centres[torch.from_numpy(rng.integers(0, centres.shape[0], part.shape[0]))]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(word) for word in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--samplers", type=lambda text: text.split(","), default=["midx-pq", "midx-rq"])
    parser.add_argument("--labels", type=numbers, default=[10_000, 41_218, 100_000, 1_000_000])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--draws", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in `xmc-midx train`")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
