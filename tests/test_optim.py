"""RowAdam against a slow reference, row by row, and against torch's Adam."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from xmc_midx.optim import RowAdam, add_to_rows, round_at_random
from xmc_midx.rows import bag_rows, gather_rows
from xmc_midx.types import SparseRows

NUM_ROWS, DIM = 12, 5


def touched_rows(num_steps: int, *, seed: int = 0) -> list[torch.Tensor]:
    """Rising row ids of each step; row 7 is never touched, row 3 at every step."""
    rng = np.random.default_rng(seed)
    chosen = [rng.choice([0, 1, 2, 4, 5, 6, 8, 9, 10, 11], size=4, replace=False) for _ in range(num_steps)]
    return [torch.from_numpy(np.sort(np.append(ids, 3))) for ids in chosen]


def reference(
    start: np.ndarray, steps: list[tuple[list[int], np.ndarray]], rates: list[float], beta2: float
) -> np.ndarray:
    """The docstring of RowAdam in plain Python floats, a row at a time."""
    table = start.astype(np.float64).copy()
    moment = [0.0] * table.shape[0]
    count = [0] * table.shape[0]
    for (ids, gradients), rate in zip(steps, rates, strict=True):
        for row, gradient in zip(ids, gradients.astype(np.float64), strict=True):
            count[row] += 1
            moment[row] = beta2 * moment[row] + (1 - beta2) * float(np.mean(gradient**2))
            table[row] -= rate * gradient / (math.sqrt(moment[row] / (1 - beta2 ** count[row])) + 1e-8)
    return table


@pytest.mark.parametrize("shape", [(NUM_ROWS, DIM), (NUM_ROWS,)])
@pytest.mark.parametrize("beta2", [0.999, 0.9])
def test_rows_follow_the_formula_and_untouched_rows_keep_every_bit(shape: tuple[int, ...], beta2: float) -> None:
    generator = torch.Generator().manual_seed(0)
    table = nn.Parameter(torch.randn(shape, generator=generator))
    start = table.detach().clone()
    optimizer = RowAdam([table], betas=(0.5, beta2))
    steps, rates = [], []
    for step, ids in enumerate(touched_rows(9)):
        factor = torch.randn((5, *shape[1:]), generator=generator)
        rates.append(0.1 / (step + 1))
        optimizer.param_groups[0]["lr"] = rates[-1]
        (gather_rows(table, [ids])[0] * factor).sum().backward()
        steps.append((ids.tolist(), factor.numpy()))
        before = table.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        others = [row for row in range(NUM_ROWS) if row not in ids]
        assert torch.equal(table.detach()[others], before[others])
    assert torch.equal(table.detach()[7], start[7])
    np.testing.assert_allclose(table.detach().numpy(), reference(start.numpy(), steps, rates, beta2), atol=2e-6)


def test_summed_moments_follow_the_formula() -> None:
    generator = torch.Generator().manual_seed(1)
    table = nn.Parameter(torch.randn(NUM_ROWS, DIM, generator=generator))
    expected = table.detach().double().numpy().copy()
    optimizer = RowAdam([table], lr=0.1, betas=(0.9, 0.95), moment="sum")
    total, above, below = np.zeros(NUM_ROWS), 0.0, 0.0
    for step, ids in enumerate(touched_rows(8)):
        factor = torch.randn((5, DIM), generator=generator) * 10.0 ** (step % 3 - 1)
        (gather_rows(table, [ids])[0] * factor).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        square = (factor.double().numpy() ** 2).mean(1)
        share = square / square.max()
        before = above, below
        above, below = 0.95 * above + 0.05 * (share * square).sum(), 0.95 * below + 0.05 * share.sum()
        seen = before if step else (above, below)
        total[ids] += square
        expected[ids] -= 0.1 * factor.double().numpy() / np.sqrt(total[ids] + seen[0] / seen[1])[:, None]
    np.testing.assert_allclose(table.detach().numpy(), expected, atol=2e-6)


def bags(number: int, num_features: int, generator: torch.Generator) -> SparseRows:
    """Rows of all lengths, from none on, and pads; ids in no order, a few features in many rows and many in one."""
    counts = torch.randint(0, 12, (number,), generator=generator)
    counts[0], counts[-1] = 0, 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    common = torch.randint(0, 5, (int(offsets[-1]),), generator=generator)
    rare = torch.randint(0, num_features, common.shape, generator=generator)
    ids = torch.where(torch.rand(common.shape, generator=generator) < 0.3, common, rare)
    pads = torch.full((2,), num_features)
    values = torch.cat([torch.randn(ids.shape, generator=generator), torch.full((2,), 9.0)])
    return SparseRows(feature_ids=torch.cat([ids, pads]), values=values, offsets=offsets)


@pytest.mark.parametrize("moment", ["sum", "mean"])
@pytest.mark.parametrize(("dim", "dtype"), [(1, torch.float32), (37, torch.float32), (37, torch.float64)])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_step_by_bags_is_the_step_that_goes_back_to_the_table(
    moment: str, dim: int, dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    generator = torch.Generator().manual_seed(dim)
    start = torch.randn(1900, dim, generator=generator, dtype=dtype)
    tables = [nn.Parameter(start.clone()) for _ in range(2)]
    direct, usual = (RowAdam([{"params": [table], "moment": moment}], lr=0.1) for table in tables)
    for step in range(4):
        rows = bags(397, 1900, generator)
        grad = torch.randn(397, dim, generator=generator, dtype=dtype) * 10.0 ** (step % 3 - 1)
        bag_rows(tables[1], rows).backward(grad)
        usual.step()
        usual.zero_grad()
        # A view, as a gradient may be one.
        direct.step_bags(tables[0], rows, grad.T.contiguous().T)
        assert tables[0].grad is None
        torch.testing.assert_close(*tables, rtol=1e-5, atol=1e-5)
        untouched = torch.ones(1900, dtype=torch.bool)
        untouched[rows.feature_ids[:-2]] = False
        if step == 0:
            assert torch.equal(tables[0].detach()[untouched], start[untouched]) and untouched.sum() > 100
    assert (tables[0].detach() - start).abs().amax() > 0.1
    for name, value in usual.state[tables[1]].items():
        torch.testing.assert_close(direct.state[tables[0]][name], value, rtol=1e-5, atol=1e-9)


def test_a_step_by_bags_of_nothing_changes_nothing() -> None:
    table = nn.Parameter(torch.ones(5, 3))
    optimizer = RowAdam([table], moment="sum")
    nothing = torch.empty(0, dtype=torch.int64)
    empty = SparseRows(feature_ids=nothing, values=torch.empty(0), offsets=torch.zeros(3, dtype=torch.int64))
    for _ in range(2):
        optimizer.step_bags(table, empty, torch.ones(2, 3))
    assert torch.equal(table.detach(), torch.ones(5, 3))
    # The first gradient comes late: V is then its own.
    one = SparseRows(feature_ids=torch.tensor([2]), values=torch.tensor([0.5]), offsets=torch.tensor([0, 0, 1]))
    optimizer.step_bags(table, one, torch.ones(2, 3))
    twin = nn.Parameter(torch.ones(5, 3))
    bag_rows(twin, one).sum().backward()
    RowAdam([twin], moment="sum").step()
    torch.testing.assert_close(table, twin)


def test_a_step_by_bags_refuses_features_that_are_not_there() -> None:
    table = nn.Parameter(torch.ones(5, 3))
    optimizer = RowAdam([table], moment="sum")
    optimizer.step_bags(table, bags(9, 5, torch.Generator().manual_seed(0)), torch.ones(9, 3))
    for wrong in (-1, 5):
        ids = torch.tensor([1, wrong], dtype=torch.int64)
        rows = SparseRows(feature_ids=ids, values=torch.ones(2), offsets=torch.tensor([0, 1, 2]))
        with pytest.raises(IndexError, match=f"{wrong}.* 5 rows"):
            optimizer.step_bags(table, rows, torch.ones(2, 3))


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_summed_moments_do_not_know_the_unit_of_the_loss(scale: float) -> None:
    tables = [nn.Parameter(torch.ones(NUM_ROWS, DIM)) for _ in range(2)]
    for table, unit in zip(tables, (1.0, scale), strict=True):
        optimizer = RowAdam([table], lr=0.1, eps=0.0, moment="sum")
        generator = torch.Generator().manual_seed(2)
        for ids in touched_rows(6):
            factor = unit * torch.randn((5, DIM), generator=generator)
            (gather_rows(table, [ids])[0] * factor).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(*tables, rtol=1e-4, atol=1e-5)


def test_the_first_step_of_a_late_row_is_as_long_as_the_first_step_of_all() -> None:
    table = nn.Parameter(torch.zeros(2, 3))
    optimizer = RowAdam([table], lr=0.1)
    for _ in range(20):
        gather_rows(table, [torch.tensor([0])])[0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    (-gather_rows(table, [torch.tensor([1])])[0].sum()).backward()
    optimizer.step()
    torch.testing.assert_close(table.detach()[1], torch.full((3,), 0.1), atol=1e-6, rtol=0)


def test_an_uncoalesced_gradient_counts_a_repeated_row_once() -> None:
    start = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    tables = [nn.Parameter(start.clone()), nn.Parameter(start.clone())]
    rows = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
    tables[0].grad = torch.sparse_coo_tensor(torch.tensor([[2, 0, 2]]), rows, (4, 3), check_invariants=True)
    merged = torch.stack([rows[1], rows[0] + rows[2]])
    tables[1].grad = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), merged, (4, 3), check_invariants=True)
    for table in tables:
        RowAdam([table], lr=0.1).step()
    torch.testing.assert_close(tables[0], tables[1])
    assert torch.equal(tables[0].detach()[[1, 3]], start[[1, 3]])


def test_an_empty_gradient_changes_nothing() -> None:
    table = nn.Parameter(torch.ones(4, 3))
    optimizer = RowAdam([table], lr=0.1)
    gather_rows(table, [torch.empty(0, dtype=torch.int64)])[0].sum().backward()
    optimizer.step()
    assert torch.equal(table.detach(), torch.ones(4, 3))


def test_dense_gradients_get_plain_adam() -> None:
    start = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    ours, theirs, unused = (nn.Parameter(start.clone()) for _ in range(3))
    optimizers = [
        RowAdam([{"params": [ours, unused], "lr": 0.05}], betas=(0.8, 0.95), eps=1e-6),
        torch.optim.Adam([theirs], lr=0.05, betas=(0.8, 0.95), eps=1e-6),
    ]
    target = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    for _ in range(12):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (parameter - target).pow(4).sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert torch.equal(unused.detach(), start), "a parameter without gradient stays"


def make_model() -> tuple[nn.Parameter, nn.Parameter, RowAdam]:
    generator = torch.Generator().manual_seed(0)
    table = nn.Parameter(torch.randn(NUM_ROWS, DIM, generator=generator))
    dense = nn.Parameter(torch.randn(DIM, generator=generator))
    return table, dense, RowAdam([{"params": [table], "lr": 0.05}, {"params": [dense], "lr": 0.01}])


def train(table: nn.Parameter, dense: nn.Parameter, optimizer: RowAdam, steps: list[torch.Tensor]) -> None:
    for ids in steps:
        optimizer.zero_grad()
        (gather_rows(table, [ids])[0] @ dense).square().sum().backward()
        optimizer.step()


def test_a_restored_state_goes_on_bit_for_bit() -> None:
    steps = touched_rows(14)
    table, dense, optimizer = make_model()
    train(table, dense, optimizer, steps)
    first_table, first_dense, first = make_model()
    train(first_table, first_dense, first, steps[:6])
    second_table, second_dense, second = make_model()
    with torch.no_grad():
        second_table.copy_(first_table)
        second_dense.copy_(first_dense)
    second.load_state_dict(first.state_dict())
    train(second_table, second_dense, second, steps[6:])
    assert torch.equal(second_table, table) and torch.equal(second_dense, dense)
    for left, right in zip(
        optimizer.state_dict()["state"].values(), second.state_dict()["state"].values(), strict=True
    ):
        for name in left:
            assert left[name].dtype == right[name].dtype, name
            assert torch.equal(left[name], right[name]), name


def test_the_state_of_a_table_is_two_numbers_a_row() -> None:
    table, dense, optimizer = make_model()
    train(table, dense, optimizer, touched_rows(2))
    assert {name: tuple(tensor.shape) for name, tensor in optimizer.state[table].items()} == {
        "second_moment": (NUM_ROWS,),
        "count": (NUM_ROWS,),
    }


def test_two_tables_may_share_the_memory_of_their_gradients() -> None:
    first, second = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))
    ids = torch.tensor([1, 2])
    (gather_rows(first, [ids])[0] + gather_rows(second, [ids])[0]).square().sum().backward()
    RowAdam([first, second], lr=0.1).step()
    assert torch.equal(first, second)
    torch.testing.assert_close(first.detach()[1], torch.full((3,), 0.9))


# ------------------------------------------------------------------------------------------------- bfloat16 tables

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [1.0, -3.001, 1.00390625, 7.3e-12, -2.5e30, 1.99999, 0.0])
def test_random_rounding_goes_to_a_neighbour_and_is_right_in_the_mean(value: float, device: str) -> None:
    count = 200_000
    values = torch.full((count,), value, device=device)
    rounded = round_at_random(values, torch.Generator(device).manual_seed(0)).double().cpu()
    exact = float(values[0])
    near = float(torch.tensor(exact).bfloat16())
    gap = max(abs(exact) * 2.0**-7, 1e-45)
    assert (rounded - exact).abs().max() <= gap and near in rounded.tolist()
    assert abs(float(rounded.mean()) - exact) <= 4.5 * float(rounded.std()) / math.sqrt(count) + 1e-12 * abs(exact)
    if near == exact:
        assert bool((rounded == exact).all())


@pytest.mark.parametrize("device", DEVICES)
def test_random_rounding_keeps_what_is_not_finite(device: str) -> None:
    values = torch.tensor([math.inf, -math.inf, math.nan, torch.finfo(torch.float32).max], device=device)
    rounded = round_at_random(values, torch.Generator(device).manual_seed(0)).cpu()
    assert rounded[0] == math.inf and rounded[1] == -math.inf and rounded[2].isnan() and rounded[3] > 3e38


@pytest.mark.parametrize("device", DEVICES)
def test_steps_below_the_last_place_of_a_bfloat16_table_are_not_lost(device: str) -> None:
    table = torch.ones(2000, 8, dtype=torch.bfloat16, device=device)
    ids = torch.arange(2000, device=device)
    for step in range(50):
        add_to_rows(table, ids, torch.full((2000, 8), 2e-4, device=device), seed=step)
    # To the nearest, 1 + 2e-4 is 1 again. The standard error of the mean is about 4e-5.
    assert float(table.double().mean()) == pytest.approx(1.01, abs=3e-4)


def bfloat16_pair(moment: str) -> list[tuple[nn.Parameter, RowAdam]]:
    """A float32 table and its optimiser, and the same in bfloat16."""
    start = torch.randn(NUM_ROWS, DIM, generator=torch.Generator().manual_seed(3)).bfloat16()
    tables = [nn.Parameter(start.float()), nn.Parameter(start.clone())]
    return [(table, RowAdam([table], lr=0.02, moment=moment)) for table in tables]


def fit(table: nn.Parameter, optimizer: RowAdam, steps: list[torch.Tensor]) -> None:
    for ids in steps:
        optimizer.zero_grad()
        (gather_rows(table, [ids])[0].float() - 0.3).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("moment", ["mean", "sum"])
def test_a_bfloat16_table_learns_what_a_float32_table_learns(moment: str) -> None:
    results = []
    for table, optimizer in bfloat16_pair(moment):
        fit(table, optimizer, touched_rows(400))
        results.append(table.detach().float())
        assert optimizer.state[table]["second_moment"].dtype == torch.float32
    untouched = [7]
    assert torch.equal(results[0][untouched], results[1][untouched])
    # A bfloat16 between 0.5 and 1 has steps of 2^-8, and the rate never falls.
    assert float((results[0] - results[1]).abs().mean()) < 0.02


def test_a_restored_bfloat16_state_goes_on_bit_for_bit() -> None:
    steps = touched_rows(14)
    (_, _), (table, optimizer) = bfloat16_pair("mean")
    fit(table, optimizer, steps)
    (_, _), (first_table, first) = bfloat16_pair("mean")
    fit(first_table, first, steps[:6])
    (_, _), (second_table, second) = bfloat16_pair("mean")
    with torch.no_grad():
        second_table.copy_(first_table)
    second.load_state_dict(first.state_dict())
    assert second.state[second_table]["second_moment"].dtype == torch.float32
    fit(second_table, second, steps[6:])
    assert torch.equal(second_table, table)


def test_a_training_does_not_load_the_compiler(topic_dir: Path, tmp_path: Path) -> None:
    """70 MB and two seconds, which torch's own optimisers take as they begin."""
    words = [str(topic_dir), "--output", str(tmp_path / "run"), "--set", "training.epochs=1"]
    script = "import sys; from xmc_midx.cli.app import run; code = run(['train', *sys.argv[1:]])\n"
    script += "sys.exit(code or ('torch._dynamo' in sys.modules and 'the compiler is loaded'))"
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_closure_gives_its_loss_and_kinds_of_gradients_do_not_mix() -> None:
    table = nn.Parameter(torch.ones(5, 3))
    optimizer = RowAdam([table], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = table.square().sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 15.0 and optimizer.step() is None
    assert float(table.detach().max()) < 1.0
    rows = torch.sparse_coo_tensor([[1]], torch.ones(1, 3), (5, 3), check_invariants=True)
    for first, second in ((torch.ones(5, 3), rows), (rows, torch.ones(5, 3))):
        table = nn.Parameter(torch.ones(5, 3))
        optimizer = RowAdam([table], lr=0.1)
        table.grad = first
        optimizer.step()
        table.grad = second
        with pytest.raises(ValueError, match="dense gradients at one step and row-sparse ones at another"):
            optimizer.step()


@pytest.mark.parametrize("moment", ["mean", "sum"])
def test_a_half_precision_table_takes_row_sparse_steps(moment: str) -> None:
    table = torch.nn.Parameter(torch.ones(5, 3, dtype=torch.float16))
    optimizer = RowAdam([table], lr=0.5, moment=moment)
    table.grad = torch.sparse_coo_tensor(
        torch.tensor([[1, 4]]), torch.ones(2, 3, dtype=torch.float16), (5, 3), check_invariants=True
    )
    optimizer.step()
    assert table.dtype == torch.float16 and (table[[0, 2, 3]] == 1).all() and (table[[1, 4]] < 0.7).all()


@pytest.mark.parametrize(
    "options", [{"moment": "Sum"}, {"lr": -1.0}, {"lr": float("nan")}, {"eps": -1e-8}, {"betas": (0.9, 1.0)}]
)
def test_options_that_are_none_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        RowAdam([torch.nn.Parameter(torch.ones(2, 2))], **options)
    with pytest.raises(ValueError, match="expected"):
        RowAdam([{"params": [torch.nn.Parameter(torch.ones(2, 2))], **options}])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_small_updates_of_a_bfloat16_table_count_in_the_mean(dtype: torch.dtype) -> None:
    """A quarter of what separates 1 from the next number: rounded to the nearest, nothing would ever change."""
    table = torch.ones(2000, 4, dtype=torch.bfloat16)
    add_to_rows(table, torch.arange(2000), torch.full((2000, 4), 2.0**-9, dtype=dtype), seed=3)
    moved = (table > 1).float().mean()
    assert 0.2 < moved < 0.3 and set(table.unique().tolist()) == {1.0, 1.0 + 2.0**-7}
