"""Recall against time of a search for the best labels: label cells, scans, faiss's IVF and HNSW, PECOS.

    python scripts/benchmark_search.py RUN DATA [--labels 1000000] [--queries 1000] [--threads 2]
        [--systems exact,cells,scan,ivf,hnsw] [--pecos WORK] [--plot docs/search.png] [--json report.json]

The queries are encoded test instances, the tables those of a trained RUN. With --labels a larger table is made from
them: a row is one of the run's plus half the difference of two others of its cell, so that it is clustered as a trained
one is, and biases go with the rows. Cells are fitted to training instances and tuned on others of them, so the figures
are held out. Each system answers all queries at once, in turns; the median of the passes counts. The share of the exact
five best labels that are found is its recall@5. `scan` reads all sketches in bytes, or all rows in bfloat16, and
computes exact logits of the best, as is done for many queries at once; left out where the CPU does not multiply these.

--pecos adds PECOS's predictor over its beam widths, by itself and after the others: from WORK, where
`benchmark_peers.py DATA --systems pecos --work WORK` has trained it. Its exact answer is its own model's, and its time
is that from features to labels; ours begin at the query (the encoder's few microseconds: `benchmark_predict.py`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark_peers import Bench
from scipy.sparse import csr_matrix, save_npz

from xmc_midx.cells import fit_cells
from xmc_midx.data.dataset import load_dataset
from xmc_midx.data.features import normalize_rows
from xmc_midx.device import multiplies_bfloat16
from xmc_midx.index import CellIndex, ExactIndex, ScanIndex, tune_effort
from xmc_midx.predictor import Predictor
from xmc_midx.quantization import StoredTable, quantize
from xmc_midx.sketches import MULTIPLIES_BYTES

K = 5
FITTED, TUNED = 20_000, 2_000
BEAMS = (1, 2, 5, 10, 20, 50)
"""PECOS's own is 10."""
Search = Callable[[torch.Tensor], np.ndarray]
"""Queries -> (B, K) label ids."""


def encode(predictor: Predictor, features: Any) -> torch.Tensor:
    return torch.cat([query for _, query in predictor.encoder.encode(predictor._features(features))])


def enlarge(index: CellIndex, num_labels: int) -> tuple[StoredTable, np.ndarray]:
    """A table of `num_labels` rows, from rows that share a cell."""
    rng = np.random.default_rng(0)
    cells = index.cells
    cell_of = np.repeat(np.arange(len(cells.offsets) - 1), np.diff(cells.offsets))
    parts: list[dict[str, np.ndarray]] = []
    biases = []
    for begin in range(0, num_labels, 1 << 15):
        places = rng.integers(0, index.num_labels, min(1 << 15, num_labels - begin))
        first, size = cells.offsets[cell_of[places]], np.diff(cells.offsets)[cell_of[places]]
        row, plus, minus = (
            cells.label_ids[place] for place in (places, *(first + rng.integers(0, size) for _ in range(2)))
        )
        codes, scales = index.table.codes, index.table.scales
        rows = [StoredTable(codes=codes[ids], scales=scales[ids]).rows() for ids in (row, plus, minus)]
        parts.append(quantize({"t": (rows[0] + 0.5 * (rows[1] - rows[2])).astype(np.float32)}))
        biases.append(index.bias_L[row] + 0.5 * (index.bias_L[plus] - index.bias_L[minus]))
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return StoredTable.take(arrays, "t"), np.concatenate(biases).astype(np.float32)


def faiss_searches(table: StoredTable, bias: np.ndarray, systems: list[str], threads: int) -> dict[str, Search]:
    """By inner product, over vectors that one more coordinate makes equally long (`exporting.faiss`)."""
    import faiss

    faiss.omp_set_num_threads(threads)
    vectors = np.column_stack([table.rows(), bias])
    squares = np.square(vectors, dtype=np.float64).sum(axis=1)
    vectors = np.column_stack([vectors, np.sqrt(squares.max() - squares)]).astype(np.float32)

    def search(index: Any, name: str, value: int) -> Search:
        def run(query_BD: torch.Tensor) -> np.ndarray:
            setattr(index.hnsw if name == "efSearch" else index, name, value)
            ones, zeros = np.ones((len(query_BD), 1)), np.zeros((len(query_BD), 1))
            return index.search(np.hstack([query_BD.numpy(), ones, zeros]).astype(np.float32), K)[1]

        return run

    found: dict[str, Search] = {}
    if "ivf" in systems:
        num_lists = round(4 * len(bias) ** 0.5)
        ivf = faiss.IndexIVFFlat(
            faiss.IndexFlatIP(vectors.shape[1]), vectors.shape[1], num_lists, faiss.METRIC_INNER_PRODUCT
        )
        ivf.own_fields = False
        ivf.train(vectors)
        ivf.add(vectors)
        found |= {f"IVF {num_lists}, {n} probed": search(ivf, "nprobe", n) for n in (4, 16, 64, 128) if n < num_lists}
    if "hnsw" in systems:
        hnsw = faiss.IndexHNSWFlat(vectors.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
        hnsw.hnsw.efConstruction = 200
        hnsw.add(vectors)
        found |= {f"HNSW 32, effort {n}": search(hnsw, "efSearch", n) for n in (32, 64, 128, 256, 512)}
    return found


def pecos_results(work: Path, features: csr_matrix, num_labels: int, threads: int) -> list[dict[str, Any]]:
    """PECOS's recall and time by beam width, in its own interpreter."""
    models = sorted(work.glob("data-*/pecos/model"))
    if not models:
        raise SystemExit(f"{work}: holds no PECOS model; expected what `benchmark_peers.py --work {work}` leaves.")
    bench = Bench(str(work / "peers" / "bin" / "python"), threads)
    with tempfile.TemporaryDirectory() as name:
        save_npz(Path(name) / "queries.npz", features)
        request = {
            "model": str(models[0]),
            "features": f"{name}/queries.npz",
            "threads": threads,
            "k": K,
            "beams": BEAMS,
        }
        found = bench.call("beams", request, Path(name), peer=True)[0]
    if found["num_labels"] != num_labels:
        raise SystemExit(f"{models[0]}: has {found['num_labels']} labels, expected {num_labels}: is it of other data?")
    results: list[dict[str, Any]] = found["results"]
    return results


def plot(report: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for kind in ("cells", "scan of sketches", "scan of rows", "IVF", "HNSW", "PECOS", "exact"):
        points = sorted((r["microseconds"], r["recall@5"]) for r in report["results"] if r["name"].startswith(kind))
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label="label cells" if kind == "cells" else kind)
    axes.set(xscale="log", xlabel="µs a query", ylabel="recall@5", title=f"{report['num_labels']:,} labels")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("data")
    parser.add_argument("--labels", type=int)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--systems", default="exact,cells,scan,ivf,hnsw")
    parser.add_argument("--pecos", type=Path, metavar="WORK")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.labels and arguments.pecos:
        parser.error("--pecos has its model's own labels: not with --labels")
    systems = arguments.systems.split(",")
    predictor = Predictor.load(arguments.run, device="cpu")
    index = predictor.index
    if not isinstance(index, CellIndex):
        raise SystemExit(f"{arguments.run}: has no label cells; expected a run of 4,096 labels or more.")
    dataset = load_dataset(arguments.data)
    rng = np.random.default_rng(0)
    training, test = dataset.split("train").features, dataset.split("test").features
    table, bias, cells, effort = index.table, index.bias_L, index.cells, index.effort
    if arguments.labels:
        order = rng.permutation(training.shape[0])
        fitted = encode(predictor, training[order[TUNED : TUNED + FITTED]])
        table, bias = enlarge(index, arguments.labels)
        started = time.perf_counter()
        cells = fit_cells(table, bias, fitted)
        effort = tune_effort(table, bias, cells, encode(predictor, training[order[:TUNED]]))
        print(f"cells: {time.perf_counter() - started:.0f} s to fit and tune")
    asked = test[np.sort(rng.permutation(test.shape[0])[: arguments.queries])]
    queries = encode(predictor, asked)
    exact = ExactIndex(torch.from_numpy(table.rows()), torch.from_numpy(bias))
    expected = exact.search(queries, K).label_ids
    searches: dict[str, Search] = {"exact": lambda query: exact.search(query, K).label_ids}
    if "cells" in systems:
        for share in (0.1, 0.25, 0.5, 1.0, 2.0):
            depth, width = max(1, round(share * effort.depth)), max(K, round(min(1.0, 2 * share) * effort.width))
            name = f"cells, {depth:,} sketches, {width} logits" + (" (tuned)" if share == 1 else "")
            searches[name] = lambda query, depth=depth, width=width: (  # type: ignore[misc]
                cells.search(query, table, bias, K, depth=depth, width=width).label_ids
            )
    if "scan" in systems and multiplies_bfloat16(torch.device("cpu")):
        rough = ScanIndex(exact.label_table_LD, exact.bias_L)
        searches["scan of rows"] = lambda query: rough.search(query, K).label_ids
    if "scan" in systems and MULTIPLIES_BYTES:
        for share in (0.25, 0.5, 1.0, 2.0):
            width = max(K, round(share * effort.scan_width))
            name = f"scan of sketches, {width} logits" + (" (tuned)" if share == 1 else "")
            options = {"depth": effort.depth, "width": effort.width, "scan_width": width}
            searches[name] = lambda query, options=options: (  # type: ignore[misc]
                cells.scan(query, table, bias, K, **options).label_ids
            )
    if {"ivf", "hnsw"} & set(systems):
        searches |= faiss_searches(table, bias, systems, arguments.threads)
    seconds: dict[str, list[float]] = {name: [] for name in searches}
    single: dict[str, list[float]] = {name: [] for name in searches}
    found = {name: search(queries) for name, search in searches.items()}
    for number in range(arguments.passes):
        for name, search in searches.items():
            started = time.perf_counter()
            search(queries)
            seconds[name].append(time.perf_counter() - started)
            # A scan is for many queries.
            for row in range(20 * number, 20 * number + 20) if not name.startswith("scan") else ():
                started = time.perf_counter()
                search(queries[row : row + 1])
                single[name].append(time.perf_counter() - started)
    report: dict[str, Any] = {"num_labels": len(bias), "dim": table.shape[1], "queries": len(queries), "results": []}
    for name in searches:
        recall = float((found[name][:, :, None] == expected[:, None, :]).any(axis=1).mean())
        us = 1e6 * statistics.median(seconds[name]) / len(queries)
        alone = 1e6 * statistics.median(single[name]) if single[name] else None
        report["results"].append({"name": name, "recall@5": recall, "microseconds": us, "microseconds_alone": alone})
    if arguments.pecos is not None:
        report["results"] += pecos_results(
            arguments.pecos, normalize_rows(asked), predictor.num_labels, arguments.threads
        )
    print(f"{'search':44} {'recall@5':>9} {'µs a query':>11} {'exact / it':>10} {'alone, µs':>10} {'exact / it':>10}")
    scan = report["results"][0]
    for row in report["results"]:
        line = f"{row['name']:44} {row['recall@5']:9.4f}"
        for figure, width in (("microseconds", 11), ("microseconds_alone", 10)):
            if row[figure] is not None:
                line += f" {row[figure]:{width}.0f} {scan[figure] / row[figure]:10.1f}"
        print(line)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.plot:
        plot(report, arguments.plot)


if __name__ == "__main__":
    main()
