"""Run the fault-injection tests and print what was injected and what came of it, as a Markdown table.

python scripts/fault_table.py            # the figures of every test run
python scripts/fault_table.py --soak     # the long figures: an hour or more
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

FAULTS = {
    "R1": "kill -9 at a random moment of a training that saves every step, or of a prediction",
    "R2": "death at each named point of saves, refreshes, validations, files, outputs, exports",
    "R3": "SIGTERM, SIGINT and a second one, in step, validation, refresh, save, reading, prediction",
    "R4": "disk full at some byte of a save or an export, or before the first epoch",
    "R5": "resume against the uninterrupted run",
    "R6": "bit flips, cuts, missing and swapped files of a checkpoint, an output or an export",
    "R7": "malicious model, configuration and index files",
    "R8": "data files in each of 26 classes of damage, cut at every byte, fuzzed; text and matrices",
    "R9": "lines of 200 MB, rows of millions of features, streams of any length",
    "R10": "labels without instances, instances without labels or features, tiny data",
    "R11": "loss, gradient or weight that is not finite",
    "R12": "too little memory",
    "R13": "archives that reach outside, burst, lie about their sizes, or are cut or flipped at any byte",
    "R14": "downloads: resets, wrong lengths, quota and other pages, wrong hashes, no Range, kills, two at once",
    "R15": "two trainings in one run directory, two predictions into one file",
    "R16": "metrics of random cases against napkinXC and the plain definition",
    "R17": "draws against the law, estimates without bias",
    "R18": "closed streams, narrow or no terminal, locale, odd paths",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--soak", action="store_true", help="the long figures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        chosen = "fault and soak" if arguments.soak else "fault and not soak"
        command = [sys.executable, "-m", "pytest", "-m", chosen, f"--junitxml={report}", "-o", "junit_family=xunit1"]
        code = subprocess.run(command, check=False, stdout=sys.stderr).returncode
        cases = ElementTree.parse(report).getroot().iter("testcase")
        print_table(list(cases))
    return code


def print_table(cases: list[ElementTree.Element]) -> None:
    tests, injected, failed, seconds = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for case in cases:
        values = {entry.get("name"): entry.get("value") for entry in case.iter("property")}
        fault = values.get("fault")
        if fault is None or case.find("skipped") is not None:
            continue
        tests[fault] += 1
        injected[fault] += int(values.get("count") or 1)
        failed[fault] += case.find("failure") is not None or case.find("error") is not None
        seconds[fault] += float(case.get("time") or 0)
    print("| id | fault | tests | injected | failed | s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for fault, text in FAULTS.items():
        if tests[fault]:
            figures = f"{tests[fault]} | {injected[fault]:,} | {failed[fault]} | {seconds[fault]:.0f}"
            print(f"| {fault} | {text} | {figures} |")


if __name__ == "__main__":
    sys.exit(main())
