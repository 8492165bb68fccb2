"""Layer 6. The further models of an ensemble, trained one after the other once the first is there.

Before it: sessions and run directories; after it: `training`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xmc_midx.config import Config
from xmc_midx.data.dataset import Split
from xmc_midx.errors import DataError, DivergedError, UsageError
from xmc_midx.rundir import RunDirectory, timestamp

if TYPE_CHECKING:
    from xmc_midx.session import TrainingSession

__all__ = ["Member", "train_members"]

_OF_ITS_OWN = "started", "finished", "seconds"
"""What `run.json` says of one training alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """The training of a further model of an ensemble."""

    finished: bool
    seconds: float


def train_members(first: TrainingSession, training: Split, *, verify: bool) -> list[Member]:
    """The further models of an ensemble, once the first is there: each from where it stands, or anew."""
    from xmc_midx.session import TrainingSession

    run, found = first.run_directory, list[Member]()
    if not first.finished or not run.members:
        return found
    first.release()
    for number, path in enumerate(run.members, start=2):
        if path in run.finished_members:
            found.append(Member(finished=True, seconds=RunDirectory.open(path).provenance().seconds or 0.0))
            continue
        if first.deadline is not None and time.monotonic() >= first.deadline:
            break
        tree = run.config.model_dump()
        tree["training"] |= {"seed": (run.config.training.seed + number - 1) % 2**63, "ensemble_size": 1}
        provenance = {key: value for key, value in run.read_json("run.json").items() if key not in _OF_ITS_OWN}
        provenance["started"] = timestamp()
        first.reporter.message(f"model {number} of {1 + len(run.members)}")
        is_there, config = (path / "config.yaml").exists(), Config.model_validate(tree)
        try:
            with _opened(path) if is_there else RunDirectory.create(path, config, provenance=provenance) as directory:
                session = TrainingSession(
                    directory,
                    training,
                    first.reporter,
                    deadline=first.deadline,
                    propensity=first.propensity,
                    first=run,
                )
                if is_there:
                    session.load(verify=verify)
                session.run()
        except (DataError, UsageError, DivergedError) as error:
            own = f"{error.hint} " if isinstance(error, DivergedError) and error.hint else ""
            error.hint = f"{own}Remove {path}: --resume trains that model anew, and until then the others predict."
            raise
        found.append(Member(finished=session.finished, seconds=session.seconds))
        if not session.finished:
            break
        session.release()
    return found


@contextmanager
def _opened(path: Path) -> Iterator[RunDirectory]:
    directory = RunDirectory.open(path)
    with RunDirectory.lock(path):
        yield directory
