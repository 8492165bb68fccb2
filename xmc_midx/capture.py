"""Layer 5. A training step as a CUDA graph: recorded once for each shape of batch, then replayed by one call.

A step is some 300 kernels of a few microseconds each; asked for one by one, the host takes five times as long as the
GPU works (EXPERIMENTS.md, "On a GPU"). What is recorded must have static shapes and never look at the device. It reads
and writes the memory that it was recorded with: whatever replaces a tensor calls `forget`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from xmc_midx.device import is_out_of_memory
from xmc_midx.errors import ResourceError
from xmc_midx.types import Batch

__all__ = ["CapturedSteps"]

_WARM_UP = 3
"""Steps before the first recording: they compile kernels, and make what an optimiser keeps."""


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
        self._graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Batch, torch.Tensor]] = {}
        self._device = generators[0].device
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._memory = torch.cuda.graph_pool_handle()
        self._num_done = 0
        self.enabled = True

    def __call__(self, batch: Batch) -> torch.Tensor:
        """What `work` returns for a batch in pinned memory: on the device, and written over by the next call.

        Raises
        ------
        ResourceError : the step cannot be recorded.
        """
        self._num_done += 1
        if not self.enabled or self._num_done <= _WARM_UP or batch.num_instances != self._batch_size:
            with self._apart():
                return self._work(batch.to(self._device))
        shape = tuple(tensor.shape[0] for tensor in batch.tensors)
        if shape in self._graphs:
            graph, held, found = self._graphs[shape]
            for mine, given in zip(held.tensors, batch.tensors, strict=True):
                mine.copy_(given, non_blocking=True)
        else:
            graph, held, found = self._graphs[shape] = self._record(batch.to(self._device))
        graph.replay()
        return found

    def forget(self) -> None:
        """Record anew."""
        self._graphs.clear()

    def _record(self, held: Batch) -> tuple[torch.cuda.CUDAGraph, Batch, torch.Tensor]:
        """The graph, the batch that it reads and what it finds. Nothing is computed yet."""
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        try:
            with self._apart():
                # Other threads go on: one of them pins the next batch.
                graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
                try:
                    found = self._work(held)
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            # Generators and memory are the recording's now: nothing can go on from here.
            raise ResourceError(
                f"A training step could not be recorded as a CUDA graph: {error}.",
                hint="Resume with --set training.cuda_graphs=false, and please report it.",
            ) from error
        return graph, held, found

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """On a stream of our own, which recording needs, after all that was asked for before, and before what comes."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)
