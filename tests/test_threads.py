"""Claims about `xmc_midx.threads`: every row once, errors reach the caller, and nothing waits for ever."""

from __future__ import annotations

import multiprocessing
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from xmc_midx.threads import in_threads


def covered(num_rows: int) -> list[int]:
    seen: Counter[int] = Counter()
    lock = threading.Lock()

    def work(first: int, last: int) -> None:
        with lock:
            seen.update(range(first, last))

    in_threads(work, num_rows)
    assert set(seen.values()) <= {1}
    return sorted(seen)


@pytest.mark.parametrize("num_rows", [0, 1, 7, 8, 9, 1001])
def test_every_row_is_worked_on_once(num_threads: int, num_rows: int) -> None:
    assert covered(num_rows) == list(range(num_rows))


def test_work_within_work_stays_in_its_thread(num_threads: int) -> None:
    def work(first: int, last: int) -> None:
        mine = threading.get_ident()
        inner: list[int] = []
        in_threads(lambda a, b: inner.append(threading.get_ident()), 100)
        if num_threads > 1:
            assert inner == [mine]

    in_threads(work, 64)


def test_an_error_in_any_part_reaches_the_caller_and_the_next_call_works(num_threads: int) -> None:
    for wrong in (0, 63):

        def work(first: int, last: int, wrong: int = wrong) -> None:
            if first <= wrong < last:
                raise ValueError(f"row {wrong}")

        with pytest.raises(ValueError, match=f"row {wrong}"):
            in_threads(work, 64)
        assert covered(64) == list(range(64))


def test_callers_in_several_threads_all_come_to_an_end(num_threads: int) -> None:
    found = np.zeros((6, 500), dtype=np.int64)

    def caller(number: int) -> None:
        def work(first: int, last: int) -> None:
            found[number, first:last] += 1

        for _ in range(20):
            in_threads(work, 500)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(caller, range(6)))
    assert (found == 20).all()


def in_child(queue: multiprocessing.Queue[int]) -> None:
    queue.put(len(covered(100)))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        covered(100)
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=in_child, args=(queue,))
        child.start()
        assert queue.get(timeout=60) == 100
        child.join(timeout=60)
        assert child.exitcode == 0
    finally:
        torch.set_num_threads(before)
