"""Train and score xmc-midx and its peers side by side: same matrices, same metrics, one process after another.

    python scripts/benchmark_peers.py DATA... [--systems pecos,omikuji,omikuji-bonsai,napkinxc,xmc-midx] [--repeats 3]
        [--threads 2] [--peers-python PATH] [--work DIR] [--output report.md] [--json report.json]
        [--xmc-midx-args '--set training.epochs=20']

Run it with xmc-midx's interpreter. The peers need one of their own (libpecos pins numpy < 2): `--peers-python`, or the
script makes a virtual environment under `--work` and pip-installs the peers that were asked for into it.

The features are read and L2-normalised once, and every system gets those. A system trains in one process and predicts
in a second, from the model that the first has saved; a third scores its best five labels of each test instance with
`xmc_midx.metrics`. What they do is in `peers/stages.py`; here is who runs when, and the report. This process imports
the standard library alone, for the children's sake: Linux lets a child's peak memory begin at its parent's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = ROOT / "scripts" / "peers" / "stages.py"
TOP_K = 5
METRICS = ("P@1", "P@3", "P@5", "nDCG@5", "PSP@1", "PSP@3", "PSP@5")
FIGURES = ("train_seconds", "predict_seconds", "us_per_instance", "model_bytes", "peak_memory_bytes")
HEADS = ("system", *METRICS, "train s", "predict s", "predict us/instance", "model MB", "peak GB")
NOTES = """\
- Metrics in %, all by `xmc_midx.metrics` from the best five labels of each test instance.
- train s: without reading the data. xmc-midx (with its validation) and napkinXC save the model in that time; PECOS and
  Omikuji save afterwards (`save_seconds` in the JSON).
- predict: the test split with a loaded model, after one instance to warm up. Omikuji's Python binding takes one
  instance a call; making its input lists is not counted.
- model MB: files of the saved model, for xmc-midx the finished model, the training rows that neighbours need and the
  linear ranker. peak GB: largest resident set of the training process, libraries and data included. MB and GB are
  powers of ten.
- Take times from an idle machine alone. On a busy one OpenMP's spinning threads can multiply xmc-midx's training time;
  OMP_WAIT_POLICY and the like reach every system's processes, and are stated above where they are set.
- Seeds are 0, 1, ... over the repeats; Omikuji takes none."""


@dataclass(frozen=True)
class System:
    """One row of a table."""

    name: str
    title: str
    distribution: str
    """What pip installs."""
    arguments: tuple[str, ...] = ()
    """Of `xmc-midx train`, for xmc-midx alone."""

    @property
    def is_peer(self) -> bool:
        return self.distribution != "xmc-midx"


PEERS = (
    System("pecos", "PECOS XR-Linear", "libpecos"),
    System("omikuji", "Omikuji (Parabel, 3 trees)", "omikuji"),
    System("omikuji-bonsai", "Omikuji (Bonsai, 3 trees)", "omikuji"),
    System("napkinxc", "napkinXC PLT", "napkinxc"),
)


# ------------------------------------------------------------------------------------------ one child after another


class RunError(Exception):
    """A child failed; the message is a table's cell."""


@dataclass(frozen=True)
class Bench:
    """With what the children run."""

    peers_python: str
    threads: int

    def call(self, stage: str, request: dict, directory: Path, *, peer: bool = False) -> tuple[dict, int]:
        """A stage of `peers/stages.py` -> its result and peak memory in bytes."""
        directory.mkdir(parents=True, exist_ok=True)
        files = [directory / f"{stage}_request.json", directory / f"{stage}_result.json"]
        files[0].write_text(json.dumps(request))
        python = self.peers_python if peer else sys.executable
        peak = self.run([python, str(STAGES), stage, *map(str, files)], directory / stage, peer=peer)
        return json.loads(files[1].read_text()), peak

    def run(self, command: list[str], log: Path, *, peer: bool = False) -> int:
        """Wait for a command, its output in LOG.out and LOG.log; peak memory in bytes."""
        env = dict(os.environ)
        for library in ("OMP", "MKL", "OPENBLAS", "RAYON"):
            env[f"{library}_NUM_THREADS"] = str(self.threads)
        inherited = env.pop("PYTHONPATH", "")
        if not peer:
            env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), inherited)))
        out, err = log.with_suffix(".out"), log.with_suffix(".log")
        with out.open("wb") as stdout, err.open("wb") as stderr:
            try:
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=env)
            except OSError as error:
                raise RunError(f"{command[0]}: {error.strerror}") from None
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                process.kill()
                process.wait()
                raise
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RunError(explain_failure(process.returncode, out.read_text("utf-8", "replace"), err))
        return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def explain_failure(code: int, stdout: str, log: Path) -> str:
    """A signal's name or the exit code, and the last words: `train --json`'s error, or the last line of stderr."""
    reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    try:
        return f"{reason}: {json.loads(stdout)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
        lines = [line for line in lines if not line.startswith("note: run with")]  # Rust's last line says nothing
    return f"{reason}: {lines[-1][:300]}" if lines else reason


def run_system(bench: Bench, system: System, dataset: dict, data_dir: Path, seed: int) -> dict:
    """Train, predict and score once -> a record of raw figures; of a failure, `error` and what there was before it."""
    directory = data_dir / system.name
    record: dict = {"system": system.name, "title": system.title, "seed": seed, "source": hash_source()}
    function = system.name.partition("-")[0] if system.is_peer else "xmc_midx"
    request = {
        "system": system.name,
        "function": function,
        "work": str(data_dir),
        "model": str(directory / "model"),
        "predictions": str(directory / "predictions.txt"),
        "propensity": dataset["propensity"],
        "threads": bench.threads,
        "seed": seed,
        "k": TOP_K,
    }
    shutil.rmtree(directory, ignore_errors=True)
    try:
        if system.is_peer:
            (directory / "model").mkdir(parents=True)
            trained, peak = bench.call("train", request, directory, peer=True)
            files = [path for path in (directory / "model").rglob("*") if path.is_file()]
            record |= trained | {"model_bytes": sum(path.stat().st_size for path in files)}
        else:
            directory.mkdir(parents=True)
            sets = {"device": "cpu", "num_threads": bench.threads, "seed": seed}
            command = [sys.executable, "-m", "xmc_midx", "train", str(data_dir), "--output", request["model"], "--json"]
            command += [word for key, value in sets.items() for word in ("--set", f"training.{key}={value}")]
            peak = bench.run([*command, *system.arguments], directory / "train")
            trained = json.loads((directory / "train.out").read_text())
            record |= {"train_seconds": trained["seconds"], "model_bytes": trained["model_bytes"], "train": trained}
        record["peak_memory_bytes"] = peak
        record |= bench.call("predict", request, directory, peer=system.is_peer)[0]
        record["metrics"] = bench.call("score", request, directory)[0]["metrics"]
    except RunError as error:
        record["error"] = str(error)
    record["source_changed"] = hash_source() != record["source"]
    return record


def hash_source(package: Path = ROOT / "xmc_midx") -> str:
    """Of xmc-midx's code: a median over runs of two versions is no figure of either."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def make_peers(work: Path, distributions: list[str]) -> tuple[str, dict[str, str]]:
    """The interpreter of an environment under `work` with the peers, and why some of them are not in it."""
    venv = work / "peers"
    python, failures = venv / "bin" / "python", {}
    try:
        if not python.exists():
            say(f"Making an environment for the peers in {venv} ...")
            subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True, stdout=sys.stderr)
    except subprocess.CalledProcessError as error:
        return str(python), dict.fromkeys(distributions, f"no environment: {sys.executable} -m venv: {error}")
    # One by one, so that one without a build for this machine leaves the others; libpecos first, as it pins numpy.
    for distribution in sorted(distributions, key=lambda name: name != "libpecos"):
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "scipy", distribution]
        if subprocess.run(pip, stdout=sys.stderr).returncode:
            failures[distribution] = f"pip install {distribution} failed; its message is on stderr"
    return str(python), failures


# ---------------------------------------------------------------------------------------------------------- reports


def summarize(runs: list[dict]) -> dict:
    """The records of one system -> one row: the median of each figure over the runs that came to their end."""
    good = [run for run in runs if "error" not in run]
    row: dict = {"title": runs[0]["title"], "num_runs": len(good), "errors": [r["error"] for r in runs if "error" in r]}
    row["sources"] = sorted({run["source"] for run in good if "source" in run})
    row["one_source"] = len(row["sources"]) <= 1 and not any(run.get("source_changed") for run in good)
    if good:
        row |= {name: statistics.median(run["metrics"][name] for run in good) for name in METRICS}
        row |= {name: statistics.median(run[name] for run in good) for name in FIGURES}
        row["range"] = {"P@1": [pick(run["metrics"]["P@1"] for run in good) for pick in (min, max)]}
        row["range"]["train_seconds"] = [pick(run["train_seconds"] for run in good) for pick in (min, max)]
    return row


def markdown_table(rows: list[dict]) -> str:
    """Rows of `summarize`; a system without a run that came to its end says why in its second column."""
    lines = [HEADS, ("---", *["---:"] * (len(HEADS) - 1))]
    for row in rows:
        if not row["num_runs"]:
            lines.append((row["title"], f"failed: {row['errors'][0]}", *[""] * (len(HEADS) - 2)))
            continue
        seconds, predict_seconds, us, model, peak = (row[name] for name in FIGURES)
        figures = (
            f"{seconds:,.2f}",
            f"{predict_seconds:,.3f}",
            f"{us:,.1f}",
            f"{model / 1e6:,.1f}",
            f"{peak / 1e9:.2f}",
        )
        lines.append((row["title"], *(f"{100 * row[name]:.2f}" for name in METRICS), *figures))
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def markdown_report(report: dict) -> str:
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    parts = [
        "# xmc-midx and its peers",
        f"`{report['command']}`",
        f"{machine['cores']} cores, {machine['cpu']}, {machine['memory_bytes'] / 1e9:.0f} GB, {machine['system']}; "
        f"{report['threads']} threads; load average at the start {machine['load']:.1f}; {versions}."
        + "".join(f" {name}={value}." for name, value in machine["environment"].items()),
    ]
    for dataset in report["datasets"]:
        parts.append(f"## {dataset['name']}")
        if "error" in dataset:
            parts.append(f"Not read: {dataset['error']}")
            continue
        a, b = dataset["propensity"]
        parts.append(
            f"{dataset['num_train']:,} training and {dataset['num_test']:,} test instances, "
            f"{dataset['num_features']:,} features, {dataset['num_labels']:,} labels, "
            f"{dataset['labels_per_instance']:.1f} an instance; propensity A = {a}, B = {b} "
            f"({dataset['propensity_source']}). "
            + ("One run each." if report["repeats"] == 1 else f"Median of {report['repeats']} runs each.")
        )
        parts.append(markdown_table(dataset["rows"]))
        dropped, remarks = dataset["num_train_without_features"], []
        if dropped and any(row["title"].startswith("Omikuji") for row in dataset["rows"]):
            rows = "1 training row" if dropped == 1 else f"{dropped:,} training rows"
            remarks.append(f"- Omikuji refuses rows without features: it was trained without {rows}.")
        for row in dataset["rows"]:
            if row["num_runs"] and row["errors"]:
                remarks.append(
                    f"- {row['title']}: a run failed ({row['errors'][0]}), the median is of those before it."
                )
            if row["title"].startswith("xmc-midx") and not row["one_source"]:
                remarks.append(f"- **{row['title']}: the code of xmc-midx changed meanwhile; measure this row again.**")
            if row["num_runs"] > 1:
                (low, high), (least, most) = row["range"]["P@1"], row["range"]["train_seconds"]
                spread = f"P@1 {100 * low:.2f} to {100 * high:.2f}, train s {least:,.2f} to {most:,.2f}"
                remarks.append(f"- {row['title']}: over {row['num_runs']} runs {spread}.")
        parts += ["\n".join(remarks)] if remarks else []
    return "\n\n".join([*parts, "## How it was measured", NOTES]) + "\n"


def machine_facts() -> dict:
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists() and (match := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        cpu = match[1]
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu": cpu,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "load": os.getloadavg()[0],
        # Waiting threads that spin make OpenMP programs many times slower where others want the cores.
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if re.match("OMP_(WAIT|PROC|PLACES)|GOMP_|KMP_", name)
        },
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------- command line


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[System]]:
    names = [*(peer.name for peer in PEERS), "xmc-midx"]
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("data", nargs="+", metavar="DATA", help="dataset directory with both splits, or a known name")
    parser.add_argument("--systems", default=",".join(names), help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each system; the tables show medians")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--peers-python", metavar="PATH", help="interpreter with the peers; default: one under --work")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-peers"), help="default: %(default)s")
    parser.add_argument("--output", type=Path, metavar="MD", help="the tables; default: standard output")
    parser.add_argument("--json", type=Path, metavar="JSON", help="all raw figures")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="quality against training time (needs matplotlib)")
    parser.add_argument(
        "--xmc-midx-args",
        action="append",
        metavar="ARGS",
        help="arguments of `xmc-midx train` in one word; repeat it for a row each, '' is the defaults",
    )
    options = parser.parse_args(argv)
    wanted = list(dict.fromkeys(options.systems.split(",")))
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"--systems {','.join(unknown)}: expected some of {','.join(names)}")
    if min(options.repeats, options.threads) < 1:
        parser.error("--repeats and --threads: expected 1 or more")
    ours = [
        System(f"xmc-midx{f'-{n}' if n else ''}", f"xmc-midx {text}".strip(), "xmc-midx", tuple(shlex.split(text)))
        for n, text in enumerate(options.xmc_midx_args or [""])
    ]
    by_name = {peer.name: [peer] for peer in PEERS} | {"xmc-midx": ours}
    return options, [system for name in wanted for system in by_name[name]]


def main(argv: list[str] | None = None) -> int:
    options, systems = parse(argv)
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    words = sys.argv[1:] if argv is None else argv
    report: dict = {
        "command": shlex.join(["python", "scripts/benchmark_peers.py", *words]),
        "machine": machine_facts(),
        "threads": options.threads,
        "repeats": options.repeats,
        "versions": {},
        "datasets": [],
    }
    python, absent = options.peers_python or "", {}
    if not python and (wanted := sorted({system.distribution for system in systems if system.is_peer})):
        python, absent = make_peers(work, wanted)
    bench = Bench(python, options.threads)
    for number, data in enumerate(options.data):
        bench_dataset(bench, data, work / f"data-{number}", systems, absent, report, options)
    text = markdown_report(report)
    if options.output is None:
        print(text, end="")
    return 0 if any(row["num_runs"] for dataset in report["datasets"] for row in dataset.get("rows", ())) else 1


def bench_dataset(bench, data, data_dir, systems, absent, report, options) -> None:
    """All systems on one dataset; the report's files are written anew after each run, so that a stop keeps the rest."""
    shutil.rmtree(data_dir, ignore_errors=True)
    try:
        dataset = bench.call("prepare", {"data": data, "work": str(data_dir)}, data_dir)[0]
    except RunError as error:
        report["datasets"].append({"name": data, "error": str(error)})
        say(f"{data}: {error}")
        write_reports(report, options)
        return
    report["versions"] |= dataset.pop("versions")
    report["datasets"].append(dataset)
    runs: dict[str, list[dict]] = {system.name: [] for system in systems}
    # The systems take turns, so that a busy spell of the machine does not fall on one of them.
    for seed in range(options.repeats):
        for system in systems:
            earlier = runs[system.name]
            if any("error" in run for run in earlier):
                continue
            if system.distribution in absent:
                error = absent[system.distribution]
                run: dict = {"system": system.name, "title": system.title, "seed": seed, "error": error}
            else:
                run = run_system(bench, system, dataset, data_dir, seed)
            if found := run.get("versions", {}).get(system.distribution):
                report["versions"][system.distribution] = found
            earlier.append(run)
            dataset["runs"] = [run for records in runs.values() for run in records]
            dataset["rows"] = [summarize(records) for records in runs.values() if records]
            write_reports(report, options)
            say(f"{dataset['name']}  {system.title}  {seed + 1}/{options.repeats}: {describe(run)}")


def describe(run: dict) -> str:
    return run.get("error") or f"P@1 {100 * run['metrics']['P@1']:.2f}, trained in {run['train_seconds']:.1f} s"


def write_reports(report: dict, options: argparse.Namespace) -> None:
    if options.output is not None:
        options.output.write_text(markdown_report(report), encoding="utf-8")
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    if options.plot is not None:
        plot_report(report, options.plot)


def plot_report(report: dict, path: Path) -> None:
    """A panel for each dataset: P@1 against the seconds of training, a mark for each system."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    datasets = [dataset for dataset in report["datasets"] if any(row["num_runs"] for row in dataset.get("rows", ()))]
    if not datasets:
        return
    figure = Figure(figsize=(4.2 * len(datasets), 3.6), layout="constrained")
    panels = figure.subplots(1, len(datasets), squeeze=False)[0]
    titles = list(dict.fromkeys(row["title"] for dataset in datasets for row in dataset["rows"]))
    marks = {title: ("o" if title.startswith("xmc-midx") else "s", f"C{n}") for n, title in enumerate(titles)}
    for axes, dataset in zip(panels, datasets, strict=True):
        for row in dataset["rows"]:
            if row["num_runs"]:
                marker, color = marks[row["title"]]
                axes.scatter(
                    row["train_seconds"], 100 * row["P@1"], marker=marker, color=color, s=60, label=row["title"]
                )
        axes.set(title=f"{dataset['name']}: {dataset['num_labels']:,} labels", xlabel="training, s", xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter("")
        axes.margins(0.15)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("P@1, %")
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, it ends the child as well
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
