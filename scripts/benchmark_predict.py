"""How long does an answer take? Single instances, batches, a stream, in a warm process.

    python scripts/benchmark_predict.py RUN DATA [--instances 1000] [--threads 2]

Four ways, over the same test instances: `Predictor.predict` of one row and of one dictionary at a time (median, 90th
and 99th percentile), of all rows at once, and a line written to `xmc-midx predict RUN -` until its answer is read,
which adds the pipe, the parser and the printing. With probabilities too, where the run has a calibration.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from xmc_midx.data.dataset import load_dataset
from xmc_midx.predictor import Predictor


def percentiles(name: str, work: Callable[[int], object], count: int) -> None:
    for warm in range(20):
        work(warm)
    seconds = np.empty(count)
    for number in range(count):
        started = time.perf_counter()
        work(number)
        seconds[number] = time.perf_counter() - started
    half, most, nearly = 1e3 * np.percentile(seconds, [50, 90, 99])
    print(f"{name:34} {half:9.3f} {most:9.3f} {nearly:9.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("data")
    parser.add_argument("--instances", type=int, default=1000)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    predictor = Predictor.load(arguments.run)
    features = load_dataset(arguments.data).split("test").features
    count = min(arguments.instances, features.shape[0])
    single = [features[[row]] for row in range(count)]
    pairs = [dict(zip(row.indices.tolist(), row.data.tolist(), strict=True)) for row in single]
    lines = ["".join(f" {f}:{v}" for f, v in row.items()).encode() + b"\n" for row in pairs]
    print(f"{'one at a time, ms':34} {'median':>9} {'p90':>9} {'p99':>9}")
    percentiles("csr row", lambda n: predictor.predict(single[n % count]), count)
    percentiles("dictionary", lambda n: predictor.predict(pairs[n % count]), count)
    if predictor.calibration is not None:
        percentiles(
            "csr row, probabilities", lambda n: predictor.predict(single[n % count], scores="probabilities"), count
        )
    command = [sys.executable, "-m", "xmc_midx", "predict", arguments.run, "-", "--k", "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None and stdout is not None

        def ask(number: int) -> bytes:
            stdin.write(lines[number % count])
            stdin.flush()
            return stdout.readline()

        percentiles("line through `predict -`", ask, count)
        stdin.close()
    for scores in ("logits", "probabilities") if predictor.calibration is not None else ("logits",):
        best = float("inf")
        for _ in range(3):
            started = time.perf_counter()
            predictor.predict(features[:count], scores=scores)
            best = min(best, time.perf_counter() - started)
        print(f"batch of {count:,}, {scores}: {1e6 * best / count:,.0f} µs an instance")


if __name__ == "__main__":
    main()
