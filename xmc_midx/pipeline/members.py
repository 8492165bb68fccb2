"""Layer 6. The models of a run: whose epochs run at once, and what follows them, one model after the other.

Before it: sessions and run directories; after it: `training`.

Much of a step has no work for a second thread, so that the epochs of two models, each by half of the threads, take less
time than those of one and then of the other by all (EXPERIMENTS.md, "Models at once"). What follows the epochs needs
what the first model has chosen, which finds labels and neighbours for all.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xmc_midx.config import Config
from xmc_midx.data.dataset import Split
from xmc_midx.errors import DataError, DivergedError, UsageError
from xmc_midx.pipeline.planning import models_at_once
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
    """All models of a run, each from where it stands, or anew: to their ends, or to the deadline.

    Parameters
    ----------
    first : the first model's, or the only one's.
    training : the training split.
    verify : whether the hashes of checkpoints are computed.

    Returns
    -------
    list : the further models that are finished, or that this call came to.
    """
    run, found, waiting = first.run_directory, list[Member](), list[int]()
    for number, path in enumerate(run.members, start=2):
        if path in run.finished_members:
            seconds = RunDirectory.open(path).provenance().seconds
            found.append(Member(finished=True, seconds=seconds or 0.0))
        else:
            waiting.append(number)
    at_once, is_begun = models_at_once(run.config, first.trainer.device), False
    while not is_begun or (waiting and first.finished and not _is_late(first)):
        group, errors = [] if is_begun else [first], list[Exception]()
        # Of a first one whose epochs are done nothing else has to wait.
        room = 0 if not is_begun and first.epochs_are_done else at_once - len(group)
        is_begun = True
        with ExitStack() as locks:
            for number in waiting[:room]:
                try:
                    group.append(locks.enter_context(_session(first, training, number, verify=verify)))
                except Exception as error:
                    first.reporter.message(f"model {number} of {1 + len(run.members)} waits: {error}")
                    errors.append(error)
            del waiting[:room]
            # A model that cannot go on keeps none of those beside it from their end.
            if group:
                errors += _train_group(group, first, at_once)
            found += (Member(finished=one.finished, seconds=one.seconds) for one in group if one is not first)
        if errors:
            for other in errors[1:]:
                errors[0].add_note(str(other))
            raise errors[0]
    return found


def _is_late(first: TrainingSession) -> bool:
    return first.deadline is not None and time.monotonic() >= first.deadline


@contextmanager
def _session(first: TrainingSession, training: Split, number: int, *, verify: bool) -> Iterator[TrainingSession]:
    """A further model's, its run directory locked."""
    from xmc_midx.session import TrainingSession

    run = first.run_directory
    path, num_models = run.members[number - 2], 1 + len(run.members)
    tree, seed = run.config.model_dump(), (run.config.training.seed + number - 1) % 2**63
    tree["training"] |= {"seed": seed, "ensemble_size": 1, "models_at_once": 1}
    provenance = {key: value for key, value in run.read_json("run.json").items() if key not in _OF_ITS_OWN}
    provenance["started"] = timestamp()
    is_there, config = (path / "config.yaml").exists(), Config.model_validate(tree)
    with ExitStack() as lock:
        with _says_what_to_remove(path, first):
            directory = _opened(path) if is_there else RunDirectory.create(path, config, provenance=provenance)
            session = TrainingSession(
                lock.enter_context(directory),
                training,
                _Progress(first.reporter, f"model {number} of {num_models}"),
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
def _says_what_to_remove(path: Path, first: TrainingSession) -> Iterator[None]:
    """Of a further model that cannot be trained."""
    try:
        yield
    except (DataError, UsageError, DivergedError) as error:
        own = f"{error.hint} " if isinstance(error, DivergedError) and error.hint else ""
        meanwhile = ", and until then the others predict" if first.run_directory.has_model else ""
        error.hint = f"{own}Remove {path}: --resume trains that model anew{meanwhile}."
        raise


# ------------------------------------------------------------------ a group


def _train_group(group: Sequence[TrainingSession], first: TrainingSession, at_once: int) -> list[Exception]:
    """The epochs of all of them at once, then what follows them; the errors of further models, when all is done."""
    errors = []
    for session, outcome in zip(group, _run_epochs(group, at_once), strict=True):
        if session is first:
            if outcome():
                session.conclude()
        else:
            try:
                with _says_what_to_remove(session.run_directory.path, first):
                    if outcome() and first.finished and not _is_late(first):
                        if session is not group[0]:
                            _show(session)
                        session.conclude()
            except Exception as error:
                errors.append(error)
        if first.run_directory.members:
            session.release()
    return errors


def _run_epochs(group: Sequence[TrainingSession], at_once: int) -> list[Callable[[], bool]]:
    """Of the first of the group in this thread, of the others beside it. An interruption, or an error of the first
    model, stops all; an error of a further one is its own outcome.

    Each has its share of the threads, also where fewer than `at_once` are left: torch's sums have other bits by other
    numbers of threads, and a training that goes on is to be the one that was not interrupted.

    Returns
    -------
    list : for each, what tells whether they are done, or raises why not.
    """
    import torch

    leader, *others = group
    num_threads, halted, starting = torch.get_num_threads(), threading.Event(), threading.Lock()
    if others:
        numbers, run = [str(_number(session)) for session in group], leader.first or leader.run_directory
        names = f"{', '.join(numbers[:-1])} and {numbers[-1]} of {1 + len(run.members)}"
        _show(leader, said=False)
        leader.reporter.message(f"models {names} at once; the progress is that of model {numbers[0]}")
    else:
        _show(leader)
    for session in group:
        session.halted, session.starting, session.num_at_once = halted, starting, len(group)

    def epochs_of(session: TrainingSession) -> bool:
        # A number of each thread's own.
        torch.set_num_threads(num_threads // at_once)
        return session.run_epochs()

    def beside(session: TrainingSession) -> bool:
        try:
            return epochs_of(session)
        except Exception as error:
            session.reporter.message(f"stopped: {error}")
            raise
        finally:
            # What follows the epochs of those before it would else be the peak of the training.
            session.put_aside()

    with ThreadPoolExecutor(max(1, len(others)), thread_name_prefix="beside") as pool:
        done, futures = Future[bool](), list[Future[bool]]()
        try:
            for session in others:
                futures.append(pool.submit(beside, session))
            try:
                done.set_result(epochs_of(leader))
            except Exception as error:
                if leader.first is None:
                    raise
                done.set_exception(error)
            if wait(futures, timeout=0).not_done:
                leader.reporter.start("waiting for the others", None)
            _wait(futures, halted)
        except BaseException as error:
            halted.set()
            _wait(futures, halted)
            for session, future in zip(others, futures, strict=False):
                if future.exception() is not None:
                    error.add_note(f"Model {_number(session)}: {future.exception()}")
            raise
        finally:
            torch.set_num_threads(num_threads)
    return [future.result for future in (done, *futures)]


def _wait(futures: Sequence[Future[bool]], halted: threading.Event) -> None:
    """Until all have ended: what interrupts this stops them first, and is raised then."""
    interruption: BaseException | None = None
    while True:
        try:
            # In pieces: on Windows nothing interrupts a longer wait.
            while wait(futures, timeout=1).not_done:
                pass
            break
        except BaseException as error:
            halted.set()
            interruption = error
    if interruption is not None:
        raise interruption


class _Progress:
    """The `Reporter` of a further model: shown or not; what is said while it is not, with its name."""

    def __init__(self, reporter: Reporter, name: str) -> None:
        self.reporter, self.name, self.is_shown = reporter, name, False

    def start(self, stage: str, total: int | None) -> None:
        if self.is_shown:
            self.reporter.start(stage, total)

    def step(self, advance: int = 1, **facts: float) -> None:
        if self.is_shown:
            self.reporter.step(advance, **facts)

    def epoch(self, stats: EpochStats) -> None:
        if self.is_shown:
            self.reporter.epoch(stats)

    def message(self, text: str) -> None:
        self.reporter.message(text if self.is_shown else f"{self.name}: {text}")


def _show(session: TrainingSession, *, said: bool = True) -> None:
    """From now on the progress is this model's; which it is, is said of a further one."""
    if isinstance(session.reporter, _Progress):
        session.reporter.is_shown = True
        if said:
            session.reporter.message(session.reporter.name)


def _number(session: TrainingSession) -> int:
    return 1 if session.first is None else int(session.run_directory.path.name)
