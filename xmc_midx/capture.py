"""Layer 5. A training step as a CUDA graph: recorded once for each shape of batch, then replayed by one call.

A step is some 300 kernels of a few microseconds each; asked for one by one, the host takes five times as long as the
GPU works (EXPERIMENTS.md, "On a GPU"). What is recorded must have static shapes and never look at the device. It reads
and writes the memory that it was recorded with: whatever replaces a tensor calls `forget`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch

from xmc_midx.device import is_out_of_memory
from xmc_midx.errors import ResourceError
from xmc_midx.types import Batch

__all__ = ["CapturedSteps"]

_SIGHTS = 4
"""Batches of a shape until it is worth a recording; the first ones compile kernels and fill an optimiser's state."""


class CapturedSteps:
    """`work(batch)` by graphs, on a GPU.

    Parameters
    ----------
    work : what a step does with a batch on the device; returns a tensor of numbers about it.
    batch_size : of the batches that are worth a graph; others are worked on as they come.
    generators : on the device, that `work` draws from.
    """

    def __init__(
        self, work: Callable[[Batch], torch.Tensor], batch_size: int, generators: Sequence[torch.Generator]
    ) -> None:
        self._work, self._batch_size, self._generators = work, batch_size, generators
        self._device = generators[0].device
        self._graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Batch, torch.Tensor]] = {}
        self._sights = Counter[tuple[int, ...]]()
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._memory = torch.cuda.graph_pool_handle()
        self._keeper: torch.cuda.CUDAGraph | None = None
        """Memory that no graph has any more is nobody's: the next recording could not ask for it."""

    def __call__(self, batch: Batch) -> torch.Tensor:
        """What `work` returns for a batch in pinned memory: on the device, and written over by the next call.

        Raises
        ------
        ResourceError : the step cannot be recorded.
        """
        shape = tuple(tensor.shape[0] for tensor in batch.tensors)
        self._sights[shape] += 1
        if self._sights[shape] < _SIGHTS or batch.num_instances != self._batch_size:
            with self._apart():
                return self._work(batch.to(self._device))
        if shape in self._graphs:
            graph, held, found = self._graphs[shape]
            for mine, given in zip(held.tensors, batch.tensors, strict=True):
                mine.copy_(given, non_blocking=True)
        else:
            graph, held, found = self._graphs[shape] = self._record(batch.to(self._device))
        graph.replay()
        return found

    def forget(self) -> None:
        """Record anew, what is met often enough."""
        self._graphs.clear()
        self._sights.clear()

    def _record(self, held: Batch) -> tuple[torch.cuda.CUDAGraph, Batch, torch.Tensor]:
        """The graph, the batch that it reads and what it finds. Nothing is computed yet."""
        # What steps used until now is free, but recordings have memory of their own.
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        try:
            if self._keeper is None:
                self._keeper, _ = self._recorded(lambda: torch.zeros(1, device=self._device))
            graph, found = self._recorded(lambda: self._work(held))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # Generators and memory are the recording's now: nothing can go on from here.
            raise ResourceError(
                f"A training step could not be recorded as a CUDA graph: {error}.",
                hint="Train anew with --set training.cuda_graphs=false, and please report it.",
            ) from error
        return graph, held, found

    def _recorded(self, work: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        with self._apart():
            for generator in self._generators:
                graph.register_generator_state(generator)
            # Other threads go on: one of them pins the next batch.
            graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
            try:
                found = work()
            except BaseException:
                # That a recording was cut short would hide what cut it.
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph, found

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """On a stream of our own, which recording needs, after all that was asked for before, and before what comes."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)
