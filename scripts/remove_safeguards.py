"""Which tests fail where a safeguard is missing: removes them one at a time, as a Markdown table.

    python scripts/remove_safeguards.py [--only WORD]

Each case works on a copy of the project in a temporary directory: one place is changed, and the tests that are named
run. Before that, they must pass as they are. The exit code is 1 where a safeguard is missed by no test.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """A safeguard, the place where it stands, and the tests that should miss it."""

    name: str
    module: str
    """Under `xmc_midx/`."""
    old: str
    """Stands there once."""
    new: str
    tests: tuple[str, ...]
    """Files or node ids under `tests/`."""


CHECKPOINT, FAULTS = "test_checkpoint.py", "test_faults.py"
ORDER = f"{CHECKPOINT}::test_files_are_on_disk_before_the_rename_and_the_rename_before_the_pointers"
WHOLE = "test_formats.py::test_a_file_is_on_disk_before_it_takes_its_name_and_an_older_one_is_never_written_over"
REMOVALS = (
    Removal(
        name="fsync of tensors",
        module="tensorfile.py",
        old="        os.fsync(file.fileno())\n",
        new="",
        tests=(ORDER,),
    ),
    Removal(
        name="fsync of state, manifest, pointers",
        module="checkpoint.py",
        old="            _sync_all([*sealed, *staged.values()], beside)\n",
        new="",
        tests=(ORDER,),
    ),
    Removal(
        name="fsync of the directory of a renamed checkpoint",
        module="checkpoint.py",
        old="            sync_directory(self.directory)\n",
        new="",
        tests=(ORDER,),
    ),
    Removal(
        name="fsync of the directory of the pointers",
        module="checkpoint.py",
        old="            sync_directory(self.directory.parent)\n",
        new="            pass\n",
        tests=(ORDER,),
    ),
    Removal(
        name="fsync of a file that is written whole",
        module="data/files.py",
        old="            os.fsync(file.fileno())\n",
        new="",
        tests=(WHOLE,),
    ),
    Removal(
        name="rename of a checkpoint (copied instead)",
        module="checkpoint.py",
        old="            beside.rename(final)\n",
        new="            shutil.copytree(beside, final)\n            shutil.rmtree(beside)\n",
        tests=(ORDER,),
    ),
    Removal(
        name="rename of a pointer (written over instead)",
        module="checkpoint.py",
        old="            path.replace(self.directory.parent / name)\n",
        new="            (self.directory.parent / name).write_bytes(path.read_bytes())\n            path.unlink()\n",
        tests=(CHECKPOINT,),
    ),
    Removal(
        name="rename of a file that is written whole",
        module="data/files.py",
        old="        temporary.replace(path)\n",
        new="        path.write_bytes(temporary.read_bytes())\n",
        tests=(WHOLE,),
    ),
    Removal(
        name="`latest` last",
        module="session.py",
        old='["best", "latest"] if',
        new='["latest", "best"] if',
        tests=(f"{FAULTS}::test_latest_is_turned_last",),
    ),
    Removal(
        name="hash of a checkpoint",
        module="checkpoint.py",
        old='        if sha256_of(path / name) != files[name]["sha256"]:\n',
        new="        if False:\n",
        tests=(CHECKPOINT, f"{FAULTS}::test_every_damage_is_detected_and_the_checkpoint_before_it_is_taken"),
    ),
    Removal(
        name="hash of a finished model",
        module="rundir.py",
        old='(verify and sha256_of(path) != expected["sha256"])',
        new="False",
        tests=(f"{FAULTS}::test_each_of_200_flipped_bits_of_a_finished_model_is_found",),
    ),
    Removal(
        name="finite loss",
        module="trainer.py",
        old="        if not math.isfinite(value):\n",
        new="        if False:\n",
        tests=(f"{FAULTS}::test_a_poisoned_row_is_named_and_the_last_finite_checkpoint_stays",),
    ),
    Removal(
        name="finite gradient",
        module="trainer.py",
        old="        if not all(map(math.isfinite, gradients)):\n",
        new="        if False:\n",
        tests=(f"{FAULTS}::test_a_gradient_that_is_not_finite_stops_before_the_step",),
    ),
    Removal(
        name="finite model",
        module="session.py",
        old="        _require_finite(model, self.trainer.step)\n",
        new="",
        tests=(f"{FAULTS}::test_a_model_that_is_not_finite_is_never_saved",),
    ),
    Removal(
        name="lock",
        module="rundir.py",
        old="            lock.acquire(timeout=0)\n",
        new="            pass\n",
        tests=("test_pipeline.py::test_a_run_directory_that_is_in_use_says_so",),
    ),
    Removal(
        name="signals wait for the end of the step",
        module="session.py",
        old="        with deferred_signals() as self._signals:\n",
        new="        if True:\n",
        tests=(f"{FAULTS}::test_a_signal_finishes_the_step_saves_and_says_how_to_go_on",),
    ),
)


def run_tests(project: Path, tests: tuple[str, ...]) -> list[str]:
    """The names of those that fail; a set of parameters is named once."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=no", "-rfE"]
    done = subprocess.run(
        [*command, *(f"tests/{test}" for test in tests)],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project)},
        check=False,
        capture_output=True,
        text=True,
    )
    failed = re.findall(r"^(?:FAILED|ERROR) tests/(\S+?\.py(?:::\w+)?)", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1) or bool(failed) != (done.returncode == 1):
        sys.exit(f"pytest did not run: {done.stdout}{done.stderr}")
    return list(dict.fromkeys(failed))


def copy_project(target: Path) -> Path:
    for name in ("xmc_midx", "tests", "pyproject.toml", "datasets.yaml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)
    return target


def remove(project: Path, removal: Removal) -> None:
    path = project / "xmc_midx" / removal.module
    text = path.read_text(encoding="utf-8")
    if text.count(removal.old) != 1:
        sys.exit(f"{removal.module}: {removal.old!r} stands there {text.count(removal.old)} times, expected once.")
    path.write_text(text.replace(removal.old, removal.new), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="safeguards whose names contain this")
    arguments = parser.parse_args()
    chosen = [removal for removal in REMOVALS if arguments.only in removal.name]
    missed = 0
    with tempfile.TemporaryDirectory() as directory:
        sound = copy_project(Path(directory) / "sound")
        broken = run_tests(sound, tuple(dict.fromkeys(test for removal in chosen for test in removal.tests)))
        if broken:
            sys.exit(f"These fail before anything is removed: {', '.join(broken)}")
        print("| removed | in | tests that fail |")
        print("| --- | --- | --- |")
        for number, removal in enumerate(chosen):
            project = copy_project(Path(directory) / str(number))
            remove(project, removal)
            failed = run_tests(project, removal.tests)
            missed += not failed
            names = ", ".join(f"`{name.partition('::')[2] or name}`" for name in failed) or "**none**"
            print(f"| {removal.name} | `{removal.module}` | {names} |", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
