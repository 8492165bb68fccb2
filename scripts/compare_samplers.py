"""Train every sampler with equal draws and seeds: quality, time and divergence, as mean and spread over the seeds.

    python scripts/compare_samplers.py DATA... [--samplers midx-pq,uniform,...] [--draws 128,512,2048] [--seeds 0,1,2]
        [--set section.key=value ...] [--work DIR] [--output report.md]

Each training runs in a process of its own (`xmc-midx train`), without neighbours: they would add the same labels to
every model. All else is the default of the dataset, the same for every sampler, but for what `--set` says. The full
softmax (`full`) takes no draws and is trained once a seed. After a training, `xmc-midx diagnose` measures the
divergence of its sampler from the softmax of the model that it trained.

Each run is a line in DIR/runs.jsonl, and one that stands there is not run again: a comparison that was stopped goes on,
and several calls with one DIR give one report.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from xmc_midx.config import SAMPLER_NAMES

METRICS = ("P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5")
DIVERGENCES = {"kl_from_softmax": "KL(Q,P)", "kl_to_softmax": "KL(P,Q)"}
NOTES = """\
Mean ± sample standard deviation over the seeds, metrics on the test split in %. Pool: labels that a batch is scored
against, its positives and the draws. Train s: the training alone. KL(Q,P) = sum Q log(Q/P) and KL(P,Q) = sum P log(P/Q)
in nats, the proposal Q of an instance against the softmax P of the trained model; in-batch and hard negatives have no
density. `full`: all labels at each step, no draws."""


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    options.work.mkdir(parents=True, exist_ok=True)
    log = options.work / "runs.jsonl"
    done = _read(log)
    failures = 0
    for wanted in _plan(options):
        if any(_key(run) == _key(wanted) for run in done):
            continue
        run = wanted | _run(wanted, options.work / "run")
        failures += "error" in run
        _say(
            f"{_title(wanted)}: " + (run.get("error") or f"P@1 {100 * run['test']['P@1']:.2f}, {run['seconds']:.0f} s")
        )
        if "error" not in run:
            done.append(run)
            with log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(run) + "\n")
        if options.output is not None:
            options.output.write_text(_report(done), encoding="utf-8")
    if options.output is None:
        sys.stdout.write(_report(done))
    return 1 if failures else 0


def _plan(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What identifies each training. Seeds are outermost: a comparison that is stopped has whole seeds."""
    for seed in options.seeds:
        for data in options.data:
            for draws in options.draws:
                for sampler in options.samplers:
                    # All labels, or the batch's own: the number of draws changes nothing.
                    num_draws = None if sampler in ("full", "in-batch") else draws
                    yield {
                        "data": data,
                        "sampler": sampler,
                        "num_draws": num_draws,
                        "seed": seed,
                        "set": sorted(options.set),
                    }


def _run(wanted: dict[str, Any], run: Path) -> dict[str, Any]:
    """Train, evaluate on the test split, diagnose -> figures, or `error`."""
    shutil.rmtree(run, ignore_errors=True)
    data, sampler = wanted["data"], wanted["sampler"]
    settings = [f"training.seed={wanted['seed']}", "neighbors.enabled=false", "ranker.enabled=false", *wanted["set"]]
    if wanted["num_draws"] is not None:
        settings.append(f"sampler.num_draws={wanted['num_draws']}")
    sets = [word for setting in settings for word in ("--set", setting)]
    try:
        trained = _call("train", data, "--output", str(run), "--sampler", sampler, *sets)
        figures = {
            "seconds": trained["seconds"],
            "validation": trained["validation"],
            "pool_size": json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["sampler"]["pool_size"],
            "test": _call("evaluate", str(run), data)["metrics"],
        }
        if sampler != "full":
            found = _call("diagnose", str(run), data, "--samplers", sampler, "--repeats", "2")["samplers"][0]
            figures |= {name: found[name] and found[name]["mean"] for name in DIVERGENCES}
    except CommandError as failure:
        return {"error": str(failure)}
    finally:
        shutil.rmtree(run, ignore_errors=True)
    return figures


class CommandError(Exception):
    """A command ended with an error."""


def _call(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "xmc_midx", *arguments, "--json"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    try:
        document: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise CommandError(f"xmc-midx {arguments[0]}: exit code {done.returncode}: {done.stderr[-300:]}") from None
    if "error" in document:
        raise CommandError(f"xmc-midx {arguments[0]}: {document['error']['message']}")
    return document


# ---------------------------------------------------------------------------------------------------------- reports


def _report(runs: list[dict[str, Any]]) -> str:
    """A table for each dataset, number of draws and `--set`; the runs without draws stand in each."""
    parts = []
    for data, settings in dict.fromkeys((run["data"], tuple(run["set"])) for run in runs):
        mine = [run for run in runs if (run["data"], tuple(run["set"])) == (data, settings)]
        for draws in sorted({run["num_draws"] for run in mine} - {None}) or [None]:
            rows = [run for run in mine if run["num_draws"] in (draws, None)]
            seeds = sorted({run["seed"] for run in rows})
            title = f"{Path(data).name}" + (f", {draws:,} draws a batch" if draws else "")
            setting = f" With {', '.join(settings)}." if settings else ""
            parts += [f"### {title}", f"Seeds {', '.join(map(str, seeds))}.{setting}", _table(rows)]
    return "\n\n".join([*parts, NOTES]) + "\n"


def _table(runs: list[dict[str, Any]]) -> str:
    """One row a sampler, the best P@1 first."""
    by_sampler = {name: [run for run in runs if run["sampler"] == name] for name in SAMPLER_NAMES}
    by_sampler = {name: mine for name, mine in by_sampler.items() if mine}
    names = sorted(by_sampler, key=lambda name: -statistics.fmean(run["test"]["P@1"] for run in by_sampler[name]))
    lines = [["sampler", *METRICS, *DIVERGENCES.values(), "pool", "train s"]]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    for name in names:
        mine = by_sampler[name]
        cells = [_mean([100 * run["test"][metric] for run in mine], 2) for metric in METRICS]
        cells += [_mean([run.get(key) for run in mine], 2) for key in DIVERGENCES]
        cells += [f"{statistics.fmean(run['pool_size'] for run in mine):,.0f}"]
        cells += [f"{statistics.median(run['seconds'] for run in mine):.0f}"]
        lines.append([name, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _mean(values: list[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.{digits}f}{spread}"


def _key(run: dict[str, Any]) -> tuple[Any, ...]:
    return (run["data"], run["sampler"], run["num_draws"], run["seed"], tuple(run["set"]))


def _title(run: dict[str, Any]) -> str:
    draws = "" if run["num_draws"] is None else f", {run['num_draws']} draws"
    return f"{Path(run['data']).name}, {run['sampler']}{draws}, seed {run['seed']}"


def _read(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------- command line


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def words(text: str) -> list[str]:
        return list(dict.fromkeys(text.split(",")))

    def numbers(text: str) -> list[int]:
        return [int(word) for word in words(text)]

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("data", nargs="+", metavar="DATA", help="dataset directory with both splits, or a known name")
    parser.add_argument("--samplers", type=words, default=list(SAMPLER_NAMES), help="default: all")
    parser.add_argument("--draws", type=numbers, default=[128, 512, 2048], help="a batch; default: 128,512,2048")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="default: 0,1,2")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="for every training; repeatable"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/compare-samplers"), help="default: %(default)s")
    parser.add_argument("--output", type=Path, metavar="MD", help="the tables; default: standard output")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.samplers if name not in SAMPLER_NAMES]:
        parser.error(f"--samplers {','.join(unknown)}: expected some of {','.join(SAMPLER_NAMES)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
