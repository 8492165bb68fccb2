"""Layer 6. The models of a run: which are trained at once, and which after the others.

Before it: sessions and run directories; after it: `training`.

Much of a step has no work for a second thread, so that the epochs of two models, each by half of the threads, take less
time than those of one and then the other by all (EXPERIMENTS.md, "Models at once"). What follows the epochs is done for
one model after the other: the first finds labels and neighbours for all.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xmc_midx.config import Config
from xmc_midx.data.dataset import Split
from xmc_midx.errors import DataError, DivergedError, UsageError
from xmc_midx.rundir import RunDirectory, timestamp
from xmc_midx.types import EpochStats, Reporter

if TYPE_CHECKING:
    from xmc_midx.session import TrainingSession

__all__ = ["Member", "train_models"]

_OF_ITS_OWN = "started", "finished", "seconds"
"""What `run.json` says of one training alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """The training of a further model of an ensemble."""

    finished: bool
    seconds: float


def train_models(first: TrainingSession, training: Split, *, verify: bool) -> list[Member]:
    """All models of a run, each from where it stands, or anew.

    Parameters
    ----------
    first : the first model's, or the only one's.
    training : the training split.
    verify : whether the hashes of checkpoints are computed.

    Returns
    -------
    list : the further models that are begun.
    """
    run, found = first.run_directory, list[Member]()
    num_models, at_once = 1 + len(run.members), _num_at_once(first)
    for begin in range(0, num_models, at_once):
        if begin and not first.finished:
            break
        with ExitStack() as locks:
            group = [first] if begin == 0 else []
            for index in range(max(begin, 1), min(begin + at_once, num_models)):
                path = run.members[index - 1]
                if path in run.finished_members:
                    seconds = RunDirectory.open(path).provenance().seconds
                    found.append(Member(finished=True, seconds=seconds or 0.0))
                elif not _is_over(first.deadline) or begin == 0:
                    group.append(locks.enter_context(_session(first, training, index, verify=verify)))
            if group:
                _train(group, first, at_once)
            found += (Member(finished=one.finished, seconds=one.seconds) for one in group if one is not first)
    return found


def _num_at_once(first: TrainingSession) -> int:
    """Models whose epochs run at once: no more than threads; on a GPU, which is busy with one, one."""
    import torch

    asked, size = first.config.training.models_at_once, first.config.training.ensemble_size
    assert isinstance(asked, int) and isinstance(size, int), "the configuration is resolved"
    return 1 if first.trainer.device.type != "cpu" else min(asked, size, torch.get_num_threads())


def _is_over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline


@contextmanager
def _session(first: TrainingSession, training: Split, index: int, *, verify: bool) -> Iterator[TrainingSession]:
    """A further model's, its run directory locked; the first has index 0."""
    from xmc_midx.session import TrainingSession

    run = first.run_directory
    path = run.members[index - 1]
    tree = run.config.model_dump()
    tree["training"] |= {"seed": (run.config.training.seed + index) % 2**63, "ensemble_size": 1, "models_at_once": 1}
    provenance = {key: value for key, value in run.read_json("run.json").items() if key not in _OF_ITS_OWN}
    provenance["started"] = timestamp()
    is_there, config = (path / "config.yaml").exists(), Config.model_validate(tree)
    with ExitStack() as lock:
        with _says_what_to_remove(path):
            directory = _opened(path) if is_there else RunDirectory.create(path, config, provenance=provenance)
            session = TrainingSession(
                lock.enter_context(directory),
                training,
                first.reporter,
                deadline=first.deadline,
                propensity=first.propensity,
                first=run,
            )
            if is_there:
                session.load(verify=verify)
        yield session


@contextmanager
def _opened(path: Path) -> Iterator[RunDirectory]:
    directory = RunDirectory.open(path)
    with RunDirectory.lock(path):
        yield directory


@contextmanager
def _says_what_to_remove(path: Path) -> Iterator[None]:
    """Of a further model that cannot be trained."""
    try:
        yield
    except (DataError, UsageError, DivergedError) as error:
        own = f"{error.hint} " if isinstance(error, DivergedError) and error.hint else ""
        error.hint = f"{own}Remove {path}: --resume trains that model anew, and until then the others predict."
        raise


# -------------------------------------------------------------------- at once


def _train(group: Sequence[TrainingSession], first: TrainingSession, at_once: int) -> None:
    """To their ends, or to the deadline: the epochs at once, what follows them one after the other.

    Parameters
    ----------
    group : those that are not finished of `at_once` models, which share the threads.
    """
    reporter, num_models = first.reporter, 1 + len(first.run_directory.members)
    for session, are_done in zip(group, _run_epochs(group, at_once, num_models), strict=True):
        with nullcontext() if session is first else _says_what_to_remove(session.run_directory.path):
            if are_done() and (session is first or first.finished):
                if session is not group[0]:
                    session.reporter = session.validator.reporter = reporter
                    reporter.message(_called(session, num_models))
                session.conclude()
        if num_models > 1:
            session.release()


def _run_epochs(group: Sequence[TrainingSession], at_once: int, num_models: int) -> list[Callable[[], bool]]:
    """Of the first of them in this thread, of the others beside it. What stops the first stops all.

    Returns
    -------
    list : for each, what tells whether they are done, or raises why not.
    """
    import torch

    leader, *others = group
    num_threads, halted = torch.get_num_threads(), threading.Event()
    if others:
        numbers = [str(_number(session)) for session in group]
        names = f"{', '.join(numbers[:-1])} and {numbers[-1]}"
        leader.reporter.message(f"models {names} of {num_models} at once; the progress is that of model {numbers[0]}")
    elif leader.first is not None:
        leader.reporter.message(_called(leader, num_models))
    for session in group:
        session.halted, session.num_at_once = halted, len(group)
    for session in others:
        session.reporter = session.validator.reporter = _Beside(leader.reporter, _called(session, num_models))

    def run(session: TrainingSession) -> bool:
        # Each thread has a number of threads of its own.
        torch.set_num_threads(max(1, num_threads // at_once))
        return session.run_epochs()

    with ThreadPoolExecutor(max(1, len(others)), thread_name_prefix="beside") as pool:
        beside = [pool.submit(run, session) for session in others]
        try:
            done = run(leader)
            wait(beside)
        except BaseException:
            halted.set()
            raise
        finally:
            torch.set_num_threads(num_threads)
    return [lambda: done, *(epochs.result for epochs in beside)]


def _called(session: TrainingSession, num_models: int) -> str:
    return f"model {_number(session)} of {num_models}"


def _number(session: TrainingSession) -> int:
    return 1 if session.first is None else int(session.run_directory.path.name)


class _Beside:
    """The `Reporter` of a model beside the one whose progress is shown: what it says, with its name."""

    def __init__(self, reporter: Reporter, name: str) -> None:
        self.reporter, self.name = reporter, name

    def start(self, stage: str, total: int | None) -> None:
        pass

    def step(self, advance: int = 1, **facts: float) -> None:
        pass

    def epoch(self, stats: EpochStats) -> None:
        pass

    def message(self, text: str) -> None:
        self.reporter.message(f"{self.name}: {text}")
