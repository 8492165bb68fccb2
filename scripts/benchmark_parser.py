"""How fast XMC text is read, and in how much memory: xmc-midx, napkinXC and scikit-learn on the same file.

    python scripts/benchmark_parser.py FILE [--repeats 7] [--cores 1] [--json report.json]

FILE is uncompressed XMC text with its header. Each reading is a process of its own, bound to as many cores as asked
for; the readers take turns, so that a busy machine slows all of them. Every reader has read three lines before its
clock starts (numba's compiled code is loaded by then), and the file is in the page cache. Medians; the ratios are
within each turn. Memory is the largest resident set while reading less the resident set before it, beside the bytes of
the CSR matrices. Then the cache of parsed files: filling it, and opening it again in a new process.

scikit-learn gets the file without its header line, which it does not know.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
READERS = ("xmc-midx", "napkinXC", "scikit-learn")
SMALL = "3 5 4\n0,2 0:1 3:0.5\n 1:-2\n3 4:1.5e-2\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.file)))
        return
    figures = compare(arguments.file, arguments.repeats, arguments.cores)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------ the readers, in children


def readers() -> dict[str, Callable[[], Callable[[Path], list[Any]]]]:
    """Name -> a function that imports the reader and returns it. A reader gives the matrices it made."""

    def xmc_midx() -> Callable[[Path], list[Any]]:
        from xmc_midx.data import parser
        from xmc_midx.data.formats import read_xmc

        # Load the compiled code: short files do without it.
        assert parser.parse_chunk(b"0 1:2\n", parser.Rules(file="", num_features=5, num_labels=4))
        return lambda path: list(read_xmc(path))

    def cached() -> Callable[[Path], list[Any]]:
        from xmc_midx.data.dataset import load_split

        def read(path: Path) -> list[Any]:
            split = load_split(path)
            return [split.features, split.labels]

        return read

    def napkinxc() -> Callable[[Path], list[Any]]:
        from napkinxc.datasets import load_libsvm_file

        return lambda path: list(load_libsvm_file(str(path), labels_format="csr_matrix"))

    def scikit_learn() -> Callable[[Path], list[Any]]:
        import numpy as np
        from sklearn.datasets import load_svmlight_file

        def read(path: Path) -> list[Any]:
            with path.open("rb") as file:
                num_features = int(file.readline().split()[1])
                features, _ = load_svmlight_file(
                    file, multilabel=True, n_features=num_features, zero_based=True, dtype=np.float32
                )
            return [features]

        return read

    return {"xmc-midx": xmc_midx, "cached": cached, "napkinXC": napkinxc, "scikit-learn": scikit_learn}


def measure(name: str, path: Path) -> dict[str, float]:
    """Read `path` once, in this process."""
    read = readers()[name]()
    with tempfile.TemporaryDirectory() as directory:
        small = Path(directory) / "small.txt"
        small.write_text(SMALL, encoding="utf-8")
        read(small)
    reset_peak()
    before = memory("VmRSS")
    start, cpu_start = time.perf_counter(), time.process_time()
    matrices = read(path)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = memory("VmHWM")
    size = sum(part.nbytes for matrix in matrices for part in (matrix.data, matrix.indices, matrix.indptr))
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak - before, "csr_bytes": size}


def reset_peak() -> None:
    """Let the largest resident set begin anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def memory(field: str) -> int:
    """Bytes of a field of `/proc/self/status`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


# --------------------------------------------------------------------------------------------------- the parent


def compare(path: Path, repeats: int, cores: int) -> dict[str, Any]:
    size = path.stat().st_size
    chosen = sorted(os.sched_getaffinity(0))[-cores:]
    load = os.getloadavg()[0]
    print(f"{path.name}: {size / 1e6:.1f} MB; {len(chosen)} core(s), {repeats} turns; load average {load:.1f}")
    with tempfile.TemporaryDirectory() as cache:
        turns = [{name: child(name, path, chosen, cache) for name in READERS} for _ in range(repeats)]
        filling = child("cached", path, chosen, cache)
        opening = [child("cached", path, chosen, cache) for _ in range(repeats)]
    print(
        f"{'reader':14}{'MB/s':>8}{'lowest':>8}{'highest':>9}{'CPU s':>8}{'xmc-midx is':>13}{'peak MB':>9}{'/ CSR':>7}"
    )
    figures: dict[str, Any] = {"file": path.name, "bytes": size, "cores": len(chosen), "load_average": load}
    for name in READERS:
        mine = [turn[name] for turn in turns]
        rates = [size / 1e6 / run["seconds"] for run in mine]
        ratio = statistics.median(turn[name]["seconds"] / turn["xmc-midx"]["seconds"] for turn in turns)
        peak = statistics.median(run["peak_bytes"] for run in mine)
        csr = mine[0]["csr_bytes"]
        cpu = statistics.median(run["cpu_seconds"] for run in mine)
        rate = statistics.median(rates)
        print(
            f"{name:14}{rate:8.0f}{min(rates):8.0f}{max(rates):9.0f}{cpu:8.2f}{f'{ratio:.1f} x':>13}"
            f"{peak / 1e6:9.0f}{peak / csr:7.2f}"
        )
        figures[name] = {"mb_per_s": rate, "all_mb_per_s": rates, "ratio": ratio, "peak_bytes": peak, "csr_bytes": csr}
    seconds = statistics.median(run["seconds"] for run in opening)
    print(f"cache: filled in {filling['seconds']:.2f} s, reading included; opened again in {seconds:.3f} s")
    return {**figures, "cache_fill_seconds": filling["seconds"], "cache_open_seconds": seconds}


def child(name: str, path: Path, cores: list[int], cache: str) -> dict[str, float]:
    """`measure` in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores)), "XMC_MIDX_CACHE": cache}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--child", name, str(path)],
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


if __name__ == "__main__":
    main()
