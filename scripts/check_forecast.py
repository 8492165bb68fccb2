"""How good `xmc-midx plan` is: its memory and time beside those of short trainings, as a Markdown table.

    python scripts/check_forecast.py DIRECTORY_OF_DATASETS [--epochs 1] [--only gnd-tib]

DIRECTORY_OF_DATASETS holds bibtex/, delicious/, debian-deps/, gnd-tib/ and yso-finna-en/. Each training reads the text
with an empty cache, which is the most that reading takes: with a full one the peak may be lower.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CASES = (
    ("bibtex",),
    ("delicious",),
    ("delicious", "model.dim=2048", "training.batch_size=1024"),
    ("debian-deps", "training.batch_size=512"),
    ("debian-deps", "model.dim=1024", "training.batch_size=1024", "neighbors.enabled=false"),
    ("gnd-tib", "training.batch_size=512"),
    ("gnd-tib", "model.dim=128", "training.batch_size=1024"),
    ("gnd-tib", "model.dim=1024", "training.batch_size=1024"),
    ("yso-finna-en", "training.batch_size=1024"),
    ("yso-finna-en", "model.dim=1024", "training.batch_size=1024", "neighbors.enabled=false"),
)


def run(command: str, data: Path, cache: str, *options: str) -> dict[str, Any]:
    words = [sys.executable, "-m", "xmc_midx", command, str(data), "--json", *options]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, env={**os.environ, "XMC_MIDX_CACHE": cache})
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--only", help="one data set")
    arguments = parser.parse_args()
    print("| data | options | forecast MB | peak MB | ratio | forecast s | s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, *options in CASES:
        if arguments.only not in (None, name):
            continue
        sets = [word for option in (*options, f"training.epochs={arguments.epochs}") for word in ("--set", option)]
        with tempfile.TemporaryDirectory() as directory:
            needs = run("plan", arguments.directory / name, f"{directory}/a", *sets)
            result = run("train", arguments.directory / name, f"{directory}/b", "--output", f"{directory}/run", *sets)
        forecast, peak = needs["memory_bytes"] / 1e6, result["peak_memory_bytes"] / 1e6
        figures = (
            f"{forecast:,.0f} | {peak:,.0f} | {forecast / peak:.2f} | {needs['seconds']:.0f} | {result['seconds']:.0f}"
        )
        print(f"| {name} | {' '.join(options) or 'defaults'} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
