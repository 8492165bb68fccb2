"""Steps of static shapes: what pads change (nothing), and the kernels and graphs that a GPU takes them by."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from torch.utils._python_dispatch import TorchDispatchMode

from tests.test_trainer import CUDA, make_config, make_trainer
from xmc_midx import forecast
from xmc_midx.capture import CapturedSteps
from xmc_midx.data.batches import BatchStream
from xmc_midx.device import has_kernels
from xmc_midx.errors import DivergedError, ResourceError
from xmc_midx.optim import RowAdam
from xmc_midx.padding import distinct_padded, distinct_sorted, owners, rounded_up
from xmc_midx.rows import _transposed, _transposed_padded
from xmc_midx.trainer import Trainer
from xmc_midx.types import Batch, SilentReporter

TopicMaker = Callable[..., tuple[csr_matrix, csr_matrix]]
DEVICES = ["cpu", CUDA]


@pytest.fixture(scope="module")
def data(topic_data: TopicMaker) -> tuple[csr_matrix, csr_matrix]:
    return topic_data(130)


# ------------------------------------------------------------------------------------------------------------ pads


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("count", "num_ids"), [(1, 1), (7, 3), (64, 1000), (501, 90)])
def test_distinct_ids_are_those_of_unique_and_then_pads(count: int, num_ids: int, device: str) -> None:
    for pads in (0, 1, 5):
        generator = torch.Generator().manual_seed(pads)
        ids = torch.cat([torch.randint(num_ids, (count,), generator=generator), torch.full((pads,), num_ids)])
        ids = ids[torch.randperm(count + pads, generator=generator)].to(device)
        rising, which = distinct_padded(ids, num_ids)
        expected = torch.unique(ids[ids < num_ids])
        assert rising.shape == ids.shape and torch.equal(rising[: len(expected)], expected)
        assert bool((rising[len(expected) :] == num_ids).all())
        assert torch.equal(rising[which], ids)
        places = distinct_sorted(torch.sort(ids).values, num_ids)[1]
        assert torch.equal(rising[places], torch.sort(ids).values)


def test_a_size_is_rounded_up_to_few_others() -> None:
    sizes = range(1, 5000)
    found = [rounded_up(size) for size in sizes]
    assert all(size <= new < 1.07 * size + 1 for size, new in zip(sizes, found, strict=True)) and len(set(found)) < 160
    assert found[:33] == [*range(1, 33), 34]


def test_the_owner_of_an_entry_is_its_row() -> None:
    assert owners(torch.tensor([0, 2, 2, 5]), 7).tolist() == [0, 0, 2, 2, 2, 3, 3]


def test_a_padded_batch_holds_the_batch_and_pads(data: tuple[csr_matrix, csr_matrix]) -> None:
    stream = BatchStream(*data, batch_size=32, seed=0)
    num_features, num_labels = data[0].shape[1], data[1].shape[1]
    for epoch in (1, 2):
        sizes = stream.sizes(epoch)
        largest = [0, 0]
        for plain, padded in zip(stream.epoch(epoch), stream.epoch(epoch, sizes=sizes), strict=True):
            for place, (mine, given, pad) in enumerate(
                [
                    (padded.features.feature_ids, plain.features.feature_ids, num_features),
                    (padded.features.values, plain.features.values, 0.0),
                    (padded.positives, plain.positives, num_labels),
                ]
            ):
                size = given.shape[0]
                assert torch.equal(mine[:size], given) and bool((mine[size:] == pad).all())
                assert mine.dtype == given.dtype and mine.shape[0] == sizes[place // 2]
                largest[place // 2] = max(largest[place // 2], size)
            assert torch.equal(padded.features.offsets, plain.features.offsets)
            assert torch.equal(padded.instance_ids, plain.instance_ids)
        assert all(size <= limit < 1.07 * size + 1 for size, limit in zip(largest, sizes, strict=True))


@pytest.mark.parametrize("pads", [0, 3])
def test_a_transpose_with_pads_is_the_transpose(pads: int) -> None:
    generator = torch.Generator().manual_seed(pads)
    ids = torch.randint(9, (40,), generator=generator)
    offsets = torch.tensor([0, 5, 5, 30, 40])
    row_ids, row_offsets, order, instance = _transposed(ids, offsets, 9)
    padded = torch.cat([ids, torch.full((pads,), 9)])
    found_ids, found_offsets, found_order, found_instance = _transposed_padded(padded, offsets, 9)
    count = len(row_ids)
    assert torch.equal(found_ids[:count], row_ids) and bool((found_ids[count:] == 9).all())
    assert torch.equal(found_offsets[: count + 1], row_offsets) and bool((found_offsets[count:] == 40).all())
    assert torch.equal(found_order[:40], order) and torch.equal(found_instance[:40], instance)


# ---------------------------------------------------------------------------------------------------------- training

SAMPLERS = {
    "midx-pq": ("sampler.name=midx-pq",),
    "midx-rq, coupled": ("sampler.name=midx-rq", "loss.decoupled=false"),
    "powerless": ("sampler.correction_power=0", "loss.weighting=sum"),
    "uniform": ("sampler.name=uniform",),
    "frequency": ("sampler.name=frequency",),
    "in-batch": ("sampler.name=in-batch",),
    "full": ("sampler.name=full",),
    "all drawn": ("sampler.num_draws=23",),
    "bfloat16": ("model.label_precision=bfloat16", "training.precision=float32"),
}


def train(data: tuple[csr_matrix, csr_matrix], static: bool, device: str, *options: str) -> tuple[Trainer, list[Any]]:
    """Three epochs; the steps of dynamic shapes take one pool for the whole batch and whole gradients too."""
    common = ("sampler.pool_instances=32", "sampler.gradient_negatives=all", "model.num_hidden_layers=1")
    trainer = make_trainer(data, *common, *options, device=device, static_shapes=static)
    return trainer, [trainer.run_epoch(SilentReporter()) for _ in range(3)]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_training_of_static_shapes_is_the_training(data: tuple[csr_matrix, csr_matrix], name: str) -> None:
    plain, expected = train(data, False, "cpu", *SAMPLERS[name])
    static, found = train(data, True, "cpu", *SAMPLERS[name])
    assert static.softmax.static_shapes and not plain.softmax.static_shapes
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=2e-5 if name != "bfloat16" else 2e-2)
        assert mine.sampler == pytest.approx(theirs.sampler, rel=0 if name != "bfloat16" else 0.05)
    for key, tensor in plain.model_tensors().items():
        tolerance = {"rtol": 1e-3, "atol": 1e-4} if name != "bfloat16" else {"rtol": 0.1, "atol": 0.1}
        torch.testing.assert_close(static.model_tensors()[key], tensor, **tolerance)


@pytest.mark.parametrize(
    "options", [("sampler.estimator=instance",), ("sampler.name=lsh",), ("sampler.positives=certain",)]
)
def test_what_has_no_static_shapes_trains_without_them(
    data: tuple[csr_matrix, csr_matrix], options: tuple[str, ...]
) -> None:
    trainer, stats = train(data, True, "cpu", *options)
    assert not trainer.softmax.static_shapes and stats[-1].loss < stats[0].loss


@pytest.mark.parametrize(
    "options",
    [*SAMPLERS.values(), ("sampler.estimator=instance",), ("sampler.name=lsh",), ("sampler.positives=certain",)],
)
def test_the_forecast_knows_which_steps_have_static_shapes(
    data: tuple[csr_matrix, csr_matrix], options: tuple[str, ...]
) -> None:
    allowed = make_trainer(data, *options).softmax.allows_static_shapes(32, 100)
    assert forecast._has_static_shapes(make_config(*options), data[1].shape[1]) == allowed
    assert not forecast._has_static_shapes(make_config(*options, "training.cuda_graphs=false"), data[1].shape[1])


def test_a_pool_that_is_read_in_chunks_has_no_static_shapes(
    data: tuple[csr_matrix, csr_matrix], monkeypatch: pytest.MonkeyPatch
) -> None:
    softmax = make_trainer(data, "sampler.name=full").softmax
    assert softmax.allows_static_shapes(32, 100)
    monkeypatch.setattr("xmc_midx.estimators._CHUNK_ELEMENTS", {"cpu": 32 * 23})
    assert not softmax.allows_static_shapes(32, 100)


def test_batches_without_positives_move_no_table(data: tuple[csr_matrix, csr_matrix]) -> None:
    nothing = csr_matrix(data[1].shape, dtype=np.float32)
    trainer = make_trainer((data[0], nothing), static_shapes=True)
    before = {name: tensor.clone() for name, tensor in trainer.model_tensors().items()}
    assert trainer.run_epoch(SilentReporter()).loss == 0.0 and trainer.softmax.static_shapes
    for name, tensor in trainer.model_tensors().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("every", [1, 2, 7])
def test_a_refresh_inside_an_epoch_follows_the_table(data: tuple[csr_matrix, csr_matrix], every: int) -> None:
    losses = []
    for static in (False, True):
        options = (f"sampler.refresh_every={every}", "sampler.pool_instances=32", "sampler.gradient_negatives=all")
        trainer = make_trainer(data, *options, static_shapes=static)
        losses.append([trainer.run_epoch(SilentReporter()).loss for _ in range(2)])
    assert losses[1] == pytest.approx(losses[0], rel=2e-5)


def test_a_state_may_be_loaded_while_a_step_is_unread(data: tuple[csr_matrix, csr_matrix]) -> None:
    """The unread step is not the loaded state's."""
    trainer = make_trainer(data, static_shapes=True)
    kept: list[Any] = []

    def stop() -> None:
        if trainer.step == 2:
            parts = trainer.model_tensors(), trainer.training_tensors()
            kept.extend({name: tensor.clone() for name, tensor in part.items()} for part in parts)
            kept.append(trainer.counters())
        if trainer.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.run_epoch(SilentReporter(), after_step=stop)
    assert trainer._unread is not None
    trainer.load(*kept)
    expected = make_trainer(data, static_shapes=True).run_epoch(SilentReporter()).loss
    assert trainer.run_epoch(SilentReporter()).loss == pytest.approx(expected, rel=1e-6)


def test_a_step_is_read_after_the_next_and_a_state_counts_it(data: tuple[csr_matrix, csr_matrix]) -> None:
    trainer = make_trainer(data, static_shapes=True)
    seen: list[float] = []

    class Losses(SilentReporter):
        def step(self, advance: int = 1, **facts: float) -> None:
            if "loss" in facts:
                seen.append(facts["loss"])

    sums = []
    epoch = trainer.run_epoch(Losses(), after_step=lambda: sums.append(trainer.counters()["loss_sum"]))
    assert len(sums) == 5 and all(np.diff(sums) > 0)
    assert epoch.loss == pytest.approx(sums[-1] / 5)
    # Of the steps before; nothing is known of the first while it runs.
    assert seen == pytest.approx([sums[done - 1] / done for done in range(1, 5)])


@pytest.mark.parametrize("device", DEVICES)
def test_a_loss_that_is_not_finite_is_found_one_step_later(data: tuple[csr_matrix, csr_matrix], device: str) -> None:
    trainer = make_trainer(data, static_shapes=True, device=device)
    batch = list(trainer.stream.epoch(1))[1]

    def spoil() -> None:
        if trainer.step == 1:
            with torch.no_grad():
                trainer.encoder.bias.fill_(torch.nan)

    first = ", ".join(map(str, batch.instance_ids[:8].tolist()))
    with pytest.raises(DivergedError, match=f"The loss became nan at step 2, on the training instances {first}"):
        trainer.run_epoch(SilentReporter(), after_step=spoil)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("at", [2, 7])
def test_a_training_of_static_shapes_goes_on_from_its_state(
    data: tuple[csr_matrix, csr_matrix], device: str, at: int
) -> None:
    precision = "bfloat16" if device == "cpu" else "float32"
    options = ("model.num_hidden_layers=1", f"model.label_precision={precision}", "training.precision=float32")
    whole = make_trainer(data, *options, static_shapes=True, device=device)
    kept: dict[str, Any] = {}

    def keep() -> None:
        if whole.step == at:
            parts = whole.model_tensors(), whole.training_tensors()
            kept["tensors"] = [{name: tensor.clone() for name, tensor in part.items()} for part in parts]
            kept["counters"] = whole.counters()

    stats = [whole.run_epoch(SilentReporter(), after_step=keep) for _ in range(3)]
    resumed = make_trainer(data, *options, static_shapes=True, device=device, initialize=False)
    resumed.load(*kept["tensors"], kept["counters"])
    again = [resumed.run_epoch(SilentReporter()) for _ in range(3 - at // 5)]
    # On a GPU sums of many terms come in any order.
    tolerance = 0.0 if device == "cpu" else 1e-3
    assert [one.loss for one in again] == pytest.approx([one.loss for one in stats[at // 5 :]], rel=tolerance)
    if device == "cpu":
        for key, tensor in whole.model_tensors().items():
            assert torch.equal(resumed.model_tensors()[key], tensor)


@pytest.mark.parametrize("refresh", ["epoch", "6"])
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA")
def test_a_training_by_graphs_learns_what_one_without_learns(topic_data: TopicMaker, name: str, refresh: str) -> None:
    """Fourteen batches an epoch, of which the fourth is recorded and the others after it are replays."""
    data = topic_data(450)
    options = (*SAMPLERS[name], "model.dropout=0", "training.precision=float32", f"sampler.refresh_every={refresh}")
    replays: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        replay = torch.cuda.CUDAGraph.replay
        patch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(id(graph)) or replay(graph))
        graphs, found = train(data, True, "cuda", *options)
    assert graphs.softmax.static_shapes and len(replays) >= 3 * (11 if refresh == "epoch" else 6)
    _, expected = train(data, False, "cuda", *options)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=2e-2 if name == "bfloat16" else 1e-3)


# ------------------------------------------------------------------------------------------------------------ graphs


class FakeGraph:
    """Records the last work that was asked for, and does it again; the memory is the same, as a graph's is.

    As torch does, it refuses memory that graphs had and none has any more, and hides what a recording failed of.
    """

    failure: ClassVar[BaseException | None] = None
    recording: ClassVar[list[FakeGraph]] = []
    alive: ClassVar[weakref.WeakSet[FakeGraph]] = weakref.WeakSet()
    used: ClassVar[set[Any]] = set()
    work: Callable[[], None]

    def __init__(self) -> None:
        self.generators: list[torch.Generator] = []
        self.pool: Any = None
        self.failed = False

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators.append(generator)

    def capture_begin(self, *, pool: Any, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local" and len(self.generators) == 1
        assert pool not in self.used or any(other.pool == pool for other in self.alive), "use_count > 0"
        self.pool = pool
        self.used.add(pool)
        self.alive.add(self)
        self.recording.append(self)

    def capture_end(self) -> None:
        self.recording.pop()
        if self.failed:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self) -> None:
        self.work()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> tuple[CapturedSteps, list[str]]:
    """Steps of batches of 32 that count positives, on a machine whose graphs are the fakes above; and how each was
    done."""
    log: list[str] = []

    def work(batch: Batch) -> torch.Tensor:
        found = torch.zeros(1)

        def count() -> None:
            found.copy_((batch.positives < 23).sum())

        if FakeGraph.recording:
            log.append("recorded")
            if FakeGraph.failure is not None:
                FakeGraph.recording[-1].failed = True
                raise FakeGraph.failure
            FakeGraph.recording[-1].work = count
        else:
            log.append("worked")
            count()
        return found

    stream = SimpleNamespace(wait_stream=lambda other: None)  # on a CPU all is in order
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    return CapturedSteps(work, 32, [torch.Generator()]), log


def test_steps_are_recorded_once_a_shape_and_replayed_on_each_batch(
    data: tuple[csr_matrix, csr_matrix], steps: tuple[CapturedSteps, list[str]]
) -> None:
    captured, log = steps
    stream = BatchStream(*data, batch_size=32, seed=0)
    sights = Counter[tuple[int, ...]]()
    for epoch in range(1, 7):
        sizes = stream.sizes(epoch)
        for larger in (0, 8):
            for batch in stream.epoch(epoch, sizes=(sizes[0] + larger, sizes[1] + larger)):
                before, shape = len(log), tuple(tensor.shape[0] for tensor in batch.tensors)
                assert float(captured(batch)) == float(batch.positive_offsets[-1])
                sights[shape] += 1
                # The last batch of an epoch is smaller, and not worth a graph.
                is_worked_on = sights[shape] < 4 or batch.num_instances < 32
                assert log[before:] == (["worked"] if is_worked_on else ["recorded"] if sights[shape] == 4 else [])
    many = [shape for shape, count in sights.items() if count >= 4 and shape[2] == 33]
    assert log.count("recorded") == len(captured._graphs) == len(many) >= 2
    captured.forget()
    # Nothing but the keeper has the memory now.
    assert not captured._graphs
    for _ in range(4):
        captured(next(stream.epoch(1, sizes=stream.sizes(1))))
    assert log[-4:] == ["worked"] * 3 + ["recorded"] and len(captured._graphs) == 1


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (RuntimeError("operation not permitted when stream is capturing"), ResourceError),
        (TypeError("no kernel for this"), ResourceError),
        (RuntimeError("CUDA out of memory"), RuntimeError),  # the command line knows what to do about memory
        (KeyboardInterrupt("stop"), KeyboardInterrupt),
    ],
)
def test_a_step_that_cannot_be_recorded_says_what_failed_and_what_to_do(
    data: tuple[csr_matrix, csr_matrix],
    steps: tuple[CapturedSteps, list[str]],
    failure: BaseException,
    expected: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    captured, log = steps
    monkeypatch.setattr(FakeGraph, "failure", failure)
    stream = BatchStream(*data, batch_size=32, seed=0)
    batch = next(stream.epoch(1, sizes=stream.sizes(1)))
    for _ in range(3):
        captured(batch)
    with pytest.raises(expected, match=str(failure)) as raised:
        captured(batch)
    assert ("training.cuda_graphs=false" in str(raised.value)) == (expected is ResourceError)
    assert log == ["worked"] * 3 + ["recorded"] and not captured._graphs and not FakeGraph.recording


# ----------------------------------------------------------------------------------------------------------- kernels


@pytest.fixture
def device() -> str:
    """Where kernels run: by Triton's interpreter on the CPU (conftest.py), else on the GPU."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    return "cuda"


@pytest.fixture
def kernels() -> ModuleType:
    pytest.importorskip("triton")
    return importlib.import_module("xmc_midx.triton_rows")


COMPILE = """
import warnings
warnings.simplefilter("ignore")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from xmc_midx import triton_rows

def compiled(kernel, constants, block, **types):
    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants)
    options = dict(num_warps=triton_rows._warps(block))
    for capability in (80, 90):
        yield len(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"])

bag = dict(ids="*i64", values="*fp32", offsets="*i64", table="*fp32", found="*fp32", dim="i32")
sizes = []
for block in (1, 64, 512):
    sizes += compiled(triton_rows._bag, dict(BLOCK=block, ENTRIES=triton_rows._ENTRIES), block, **bag)
rows = dict.fromkeys(["square", "second_moment", "count", "table_moment", "rate", "rounded"], "*fp32")
numbers = dict(num_rows="i32", dim="i32", beta2="fp32", log_beta2="fp32", eps="fp32")
for table, is_sum in (("*fp32", True), ("*fp32", False), ("*bf16", True), ("*bf16", False)):
    for block in (1, 64, 512):
        constants = dict(IS_SUM=is_sum, IS_ROUNDED=table == "*bf16", BLOCK=block) | (dict(dim=1) if block == 1 else {})
        types = dict(table=table, row_ids="*i64", grads=table, **rows, **numbers)
        sizes += compiled(triton_rows._step_rows, constants, block, **types)
print(min(sizes))
"""


def test_the_kernels_compile_for_a_gpu_that_is_not_there() -> None:
    """The interpreter takes more than the compiler does: names of Python in annotations, for one."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="here a GPU runs them")
def test_kernels_that_do_not_run_are_told_and_not_used(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_kernels(torch.device("cpu")) and not has_kernels(torch.device("cuda"))
    # torch says that there is a GPU, and then cannot reach it.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.warns(UserWarning, match="without Triton's kernels, which is slower: "):
        assert not has_kernels(torch.device("cuda:3"))
    assert not has_kernels(torch.device("cuda:3")), "told once"


@pytest.mark.parametrize(("dim", "longest"), [(1, 3), (19, 40), (128, 9), (700, 20)])
def test_a_bag_is_the_sum_of_its_rows(kernels: ModuleType, device: str, dim: int, longest: int) -> None:
    rng = np.random.default_rng(dim)
    counts = rng.integers(0, longest + 1, 23)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    ids, values = rng.integers(0, 50, offsets[-1] + 4), rng.normal(size=offsets[-1] + 4).astype(np.float32)
    ids[-4:] = 50  # pads are not read
    table = rng.normal(size=(50, dim)).astype(np.float32)
    given = [torch.from_numpy(array).to(device) for array in (ids, values, offsets, table)]
    found = kernels.bag(*given)
    exact = csr_matrix((values[:-4].astype(float), ids[:-4], offsets), shape=(23, 50)) @ table.astype(float)
    np.testing.assert_allclose(found.cpu().numpy(), exact, rtol=1e-5, atol=1e-5)


def gradients(shape: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rising row ids and pads, and their gradients, of three steps."""
    generator, steps = torch.Generator().manual_seed(0), []
    for pads in (0, 2, 5):
        row_ids = torch.sort(torch.randperm(shape[0], generator=generator)[:20]).values
        rows = torch.randn(20, *shape[1:], generator=generator)
        rows[3] = 0.0
        padding = torch.zeros(pads, *shape[1:])
        steps.append((torch.cat([row_ids, torch.full((pads,), shape[0])]), torch.cat([rows, padding])))
    return steps


def stepped(
    table: torch.Tensor, steps: list[tuple[torch.Tensor, torch.Tensor]], moment: str, rate: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    optimizer = RowAdam([table], lr=rate, moment=moment, padded=True)
    for row_ids, rows in steps:
        table.grad = torch.sparse_coo_tensor(row_ids[None], rows, table.shape, check_invariants=False)
        optimizer.step()
    return table.detach().float().cpu(), optimizer.state[table]


@pytest.mark.parametrize("moment", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(31,), (31, 1), (31, 19), (31, 600)])
def test_the_step_of_the_kernel_is_the_step(
    kernels: ModuleType, device: str, shape: tuple[int, ...], moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    steps = gradients(shape)
    expected, state = stepped(torch.nn.Parameter(start.clone()), steps, moment, 0.05)
    monkeypatch.setattr("xmc_midx.optim.has_kernels", lambda where: True)
    there = [(row_ids.to(device), rows.to(device)) for row_ids, rows in steps]
    rate = torch.tensor(0.05, device=device)
    found, own = stepped(torch.nn.Parameter(start.to(device)), there, moment, rate)
    # The correction of a first moment is 0.001, and 1 less what is known to 6e-8.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert own.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(own[name].cpu(), tensor, rtol=1e-5, atol=1e-7)
    untouched = set(range(31)) - {int(row) for row_ids, _ in steps for row in row_ids}
    assert untouched and all(torch.equal(found[row], start[row]) for row in untouched)


def test_the_kernel_rounds_a_bfloat16_table_to_neighbours_and_is_right_in_the_mean(
    kernels: ModuleType, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xmc_midx.optim.has_kernels", lambda where: True)
    shape, rate = (100, 130), torch.tensor(0.001, device=device)
    row_ids = torch.arange(shape[0], device=device)
    grads = torch.ones(shape, device=device)
    steps = [(row_ids, grads.bfloat16())] * 2
    table = torch.nn.Parameter(torch.ones(shape, device=device, dtype=torch.bfloat16))
    found, state = stepped(table, steps, "mean", rate)
    # A step of 0.001 below 1, where a place is 1/256: the mean of two of them is exact, one alone is lost or a place.
    assert set(found.unique().tolist()) <= {1 - place / 256 for place in range(3)}
    assert float(found.double().mean()) == pytest.approx(1 - 0.002, abs=5 * 0.002 / shape[0] ** 0.5 / shape[1] ** 0.5)
    assert float(state["rounded"]) == 2 and len({tuple(row) for row in found.tolist()}) == shape[0]
    bad = torch.nn.Parameter(torch.tensor([torch.inf, -torch.inf, torch.nan], device=device).bfloat16())
    ones = torch.ones(3, device=device).bfloat16()
    broken, _ = stepped(bad, [(torch.arange(3, device=device), ones)], "mean", rate)
    assert broken[0] == torch.inf and broken[1] == -torch.inf and bool(broken[2].isnan())


LOOKS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "item", "lift_fresh"}
"""Operations whose result, or its size, the host waits for; and numbers that it would send."""


class Operations(TorchDispatchMode):
    """Names and sizes of all that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[torch.Size, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tensors = [found] if isinstance(found, torch.Tensor) else found if isinstance(found, tuple | list) else []
        sizes = tuple(tensor.shape for tensor in tensors if isinstance(tensor, torch.Tensor))
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        self.seen.append(("masked_select" if by_mask else name, sizes))
        return found


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_step_never_looks_and_all_its_shapes_are_those_of_any_batch(
    kernels: ModuleType, data: tuple[csr_matrix, csr_matrix], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a CUDA graph asks for, seen on the CPU: the same operations on the same sizes, whatever the batch holds."""
    trainer = make_trainer(data, *SAMPLERS[name], "model.num_hidden_layers=1", static_shapes=True)
    trainer.run_epoch(SilentReporter())
    # What a kernel does is no operation of torch's, and looks at nothing.
    for module in ("optim", "rows"):
        monkeypatch.setattr(f"xmc_midx.{module}.has_kernels", lambda where: True)
    bags = lambda ids, values, offsets, table: table.new_ones(offsets.shape[0] - 1, table.shape[1])  # noqa: E731
    monkeypatch.setattr(kernels, "bag", bags)
    monkeypatch.setattr(kernels, "step_rows", lambda *arguments, **options: None)
    batches = list(trainer.stream.epoch(2, sizes=trainer.stream.sizes(2)))[:4]
    trainer.encoder.train()
    steps = []
    for batch in batches:
        with Operations() as operations:
            trainer._static_step(batch)
        steps.append(operations.seen)
    assert len(steps[0]) > 60 and all(step == steps[0] for step in steps[1:])
    names = {name for name, _ in steps[0]}
    assert not {name for name in names if name in LOOKS or "unique" in name}, names


def test_dynamic_shapes_are_seen_to_look(data: tuple[csr_matrix, csr_matrix]) -> None:
    trainer = make_trainer(data)
    with Operations() as operations:
        trainer._train_step(next(iter(trainer.stream.epoch(1))))
    assert "_local_scalar_dense" in {name for name, _ in operations.seen}


@pytest.mark.parametrize("num_hidden_layers", [0, 1])
def test_a_training_by_kernels_is_the_training(
    kernels: ModuleType,
    device: str,
    data: tuple[csr_matrix, csr_matrix],
    num_hidden_layers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of a GPU's step but the graph, also where there is no GPU."""
    options = (f"model.num_hidden_layers={num_hidden_layers}", "sampler.pool_instances=32", "model.dropout=0")
    options += ("sampler.gradient_negatives=all", "training.precision=float32")
    expected = make_trainer(data, *options).run_epoch(SilentReporter()).loss
    for module in ("optim", "rows"):
        monkeypatch.setattr(f"xmc_midx.{module}.has_kernels", lambda where: True)
    trainer = make_trainer(data, *options, device=device, static_shapes=True)
    assert trainer.run_epoch(SilentReporter()).loss == pytest.approx(expected, rel=1e-4 if device == "cpu" else 0.08)
