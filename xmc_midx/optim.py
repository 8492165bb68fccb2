"""Layer 4. Optimisers that read and write only the rows a step touched.

A table's gradient arrives as a sparse tensor of rising rows (see `xmc_midx.rows`), or as the gradients of the bags that
were made of its rows; its second moment is one float a row, so the state is D times smaller than Adam's and a step
costs what its rows cost, whatever the size of the table.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from xmc_midx.compiled import compiled
from xmc_midx.device import empty_table, has_kernels
from xmc_midx.intrinsics import AHEAD, fetch_row
from xmc_midx.rows import bag_gradient, transpose
from xmc_midx.threads import in_threads
from xmc_midx.types import SparseRows

__all__ = ["RowAdam", "add_to_rows", "round_at_random"]


_PARALLEL = 500
"""Rows whose update is worth a second thread."""


class RowAdam(torch.optim.Optimizer):
    """Adam with one second moment a row and, on sparse gradients, no first moment.

    For row r, seen for the t-th time with gradient g of D coordinates:

    - `moment="mean"`: `v = beta2 v + (1 - beta2) mean(g^2)`, `row -= lr g / (sqrt(v / (1 - beta2^t)) + eps)`. The count
      t is the row's own, so that a tail label's first steps are not damped by the steps it did not take part in.
    - `moment="sum"`: `v += mean(g^2)`, `row -= lr g / (sqrt(v + V) + eps)`. V is the table's: the mean of a step's
      `mean(g^2)`, each weighted by itself, averaged over the steps before with the decay beta2 (at the first step: its
      own). Steps fall with the root of what a row has seen: a rare feature takes long steps, a common one short ones,
      and V bounds the first.

    A bfloat16 table is rounded at random (`round_at_random`); its moments are float32.

    Dense gradients (biases, hidden layers) get plain Adam. Source: ours, after Adam (arXiv 1412.6980) and
    Adagrad (Duchi et al. 2011).

    Parameters
    ----------
    params : parameters or parameter groups; groups may override every option.
    lr : step size, in parameter units.
    betas : decay of the first moment (dense gradients only) and of the second.
    eps : added to the root of the second moment.
    moment : `"mean"` or `"sum"`, of the squares of sparse gradients.
    padded : whether row ids of sparse gradients are known to be rising and distinct, but for pads at the end
        (`xmc_midx.padding`), which `gather_rows` and `bag_rows` see to. Then a step on a GPU never waits for it, and
        can be captured as a CUDA graph, with `lr` as a tensor () on the device.
    """

    # torch hides these from its compiler, and loads the compiler for that: 70 MB, and 2 s of every training.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        moment: str = "mean",
        padded: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "moment": moment, "padded": padded})
        for group in self.param_groups:
            if group["moment"] not in ("mean", "sum"):
                raise ValueError(f"moment {group['moment']!r}: expected 'mean' or 'sum'")
            if not (0.0 <= float(group["lr"]) < math.inf and 0.0 <= group["eps"] < math.inf):
                raise ValueError(f"lr {group['lr']}, eps {group['eps']}: expected numbers that are not negative")
            if not all(0.0 <= beta < 1.0 for beta in group["betas"]):
                raise ValueError(f"betas {group['betas']}: expected numbers in [0, 1)")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("padded", False)  # of a state that knows no pads yet

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """A step by the gradients that are there; a closure is called first, and its loss returned.

        Raises
        ------
        ValueError : a parameter that had dense gradients has row-sparse ones now, or the other way.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if self.state.get(parameter) and parameter.grad.is_sparse == ("first_moment" in self.state[parameter]):
                    raise ValueError("a parameter has dense gradients at one step and row-sparse ones at another")
                if parameter.grad.is_sparse:
                    self._step_rows(parameter, parameter.grad, group)
                else:
                    self._step_dense(parameter, group)
        return loss

    @torch.no_grad()
    def step_bags(self, parameter: torch.Tensor, rows: SparseRows, grad_BD: torch.Tensor) -> None:
        """A step of a table by the gradients of the bags that `bag_rows` made of it, as if they had gone back to it.

        On a CPU, with `moment="sum"`, the gradient of a row is summed, looked at and used while it is in the cache: it
        is never written.

        Parameters
        ----------
        parameter : (F, D), one of the optimiser's.
        rows : what the bags were made of.
        grad_BD : (B, D), of the parameter's dtype.
        """
        group = next(group for group in self.param_groups if any(parameter is other for other in group["params"]))
        state = self.state[parameter]
        device = parameter.device
        # (In tests, kernels run on the CPU.)
        fits = device.type == "cpu" and not has_kernels(device) and parameter.dtype == torch.float32
        fits = fits and parameter.is_contiguous() and group["moment"] == "sum"
        # V is not known before the first step that has a gradient.
        if not fits or "table_moment" not in state or float(state["table_moment"][1]) == 0.0:
            self._step_rows(parameter, bag_gradient(rows, grad_BD, parameter.shape), group)
            return
        row_ids, instances = transpose(rows, parameter.shape[0])
        # They rise: compiled code writes where they say.
        if len(row_ids) and not 0 <= int(row_ids[0]) <= int(row_ids[-1]) < parameter.shape[0]:
            raise IndexError(f"row ids {int(row_ids[0])} to {int(row_ids[-1])} of a table of {parameter.shape[0]} rows")
        square = grad_BD.new_empty(row_ids.shape[0])
        entries = instances.offsets.numpy(), instances.feature_ids.numpy(), instances.values.numpy()
        tables = parameter.detach().numpy(), state["second_moment"].numpy()
        arrays = (*tables, row_ids.numpy(), entries, grad_BD.contiguous().numpy(), square.numpy())
        scalars = (float(group["lr"]), group["eps"], float(_table_mean(state["table_moment"])))
        in_threads(lambda begin, end: _step_bags(*arrays, *scalars, begin, end), len(row_ids), least=_PARALLEL)
        self._table_moment(state, group["betas"][1], square)

    def _step_rows(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        by_kernel = has_kernels(parameter.device) and parameter.dtype in (torch.float32, torch.bfloat16)
        by_kernel = by_kernel and parameter.is_contiguous()
        row_ids, rows = _padded_rows(gradient, by_kernel) if group["padded"] else _rising_rows(gradient)
        wide = torch.promote_types(rows.dtype, torch.float32)
        # The mean square through the norm: one pass and no (U, D) temporary.
        norm = torch.linalg.vector_norm(rows, dim=1, dtype=wide) if rows.dim() > 1 else rows.to(wide)
        square = norm.square() / (rows.shape[1] if rows.dim() > 1 else 1)
        if by_kernel:
            self._step_by_kernel(parameter, group, row_ids, rows, square)
            return
        rows = rows.to(wide)
        root = self._root_of_sum if group["moment"] == "sum" else self._root_of_mean
        scale = root(parameter, group, row_ids, square).add_(group["eps"]).reciprocal_().mul_(-group["lr"])
        if parameter.dim() == 2 and parameter.dtype == rows.dtype and parameter.device.type == "cpu":
            arrays = (parameter.detach().numpy(), row_ids.numpy(), rows.numpy(), scale.numpy())
            in_threads(lambda begin, end: _add_scaled(*arrays, begin, end), len(row_ids), least=_PARALLEL)
        else:
            updates = rows * (scale[:, None] if rows.dim() > 1 else scale)
            add_to_rows(parameter, row_ids, updates, self._seed(parameter))

    def _step_by_kernel(
        self,
        parameter: torch.Tensor,
        group: dict[str, Any],
        row_ids: torch.Tensor,
        rows: torch.Tensor,
        square: torch.Tensor,
    ) -> None:
        from xmc_midx import triton_rows  # Triton comes with CUDA alone

        is_sum, rate = group["moment"] == "sum", group["lr"]
        state = self._row_state(parameter) if is_sum else self._row_state(parameter, "count")
        if parameter.dtype == torch.bfloat16:
            self._count(parameter, "rounded")
        triton_rows.step_rows(
            parameter.detach(),
            row_ids,
            rows,
            square,
            state,
            rate=rate if isinstance(rate, torch.Tensor) else torch.full((), rate, device=parameter.device),
            beta2=group["betas"][1],
            eps=group["eps"],
            table_moment=self._table_moment(state, group["betas"][1], square) if is_sum else None,
        )

    def _seed(self, parameter: torch.Tensor) -> int:
        """The table's steps so far: a resumed training rounds as the uninterrupted one does."""
        return int(self._count(parameter, "rounded")) if parameter.dtype == torch.bfloat16 else 0

    def _count(self, parameter: torch.Tensor, name: str) -> torch.Tensor:
        """The steps of a parameter, with this one: on a GPU whose kernels read it, else in the host's memory, where a
        look at it waits for nothing."""
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros((), device=parameter.device if has_kernels(parameter.device) else "cpu")
        return state[name].add_(1)  # type: ignore[no-any-return]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict()` returned."""
        inspect.unwrap(torch.optim.Optimizer.load_state_dict)(self, state_dict)
        # torch gives every state the parameter's dtype and device: bfloat16 would lose the moments, and where no
        # kernel reads a count, one on the device is one more wait for it at each step.
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, index in zip(group["params"], saved["params"], strict=True):
                for name, value in state_dict["state"].get(index, {}).items():
                    own = self.state[parameter][name]
                    on_host = value.dim() == 0 and not has_kernels(parameter.device)
                    self.state[parameter][name] = value.to("cpu" if on_host else own.device, copy=True)

    def _root_of_mean(
        self, parameter: torch.Tensor, group: dict[str, Any], row_ids: torch.Tensor, square: torch.Tensor
    ) -> torch.Tensor:
        state = self._row_state(parameter, "count")
        beta2 = group["betas"][1]
        moment = state["second_moment"][row_ids].mul_(beta2).add_(square, alpha=1 - beta2)
        count = state["count"][row_ids] + 1
        state["second_moment"][row_ids] = moment
        state["count"][row_ids] = count
        return (moment / (1 - torch.pow(beta2, count))).sqrt_()

    def _root_of_sum(
        self, parameter: torch.Tensor, group: dict[str, Any], row_ids: torch.Tensor, square: torch.Tensor
    ) -> torch.Tensor:
        state = self._row_state(parameter)
        table = self._table_moment(state, group["betas"][1], square)
        moment = state["second_moment"][row_ids].add_(square)
        state["second_moment"][row_ids] = moment
        return (moment + table).sqrt_()

    def _table_moment(self, state: dict[str, torch.Tensor], beta2: float, square: torch.Tensor) -> torch.Tensor:
        """V, (), which then learns from this step's squares: (U,), 0 for a pad."""
        if "table_moment" not in state:
            state["table_moment"] = square.new_zeros(2)
        before = state["table_moment"].clone()
        largest = square.amax() if square.numel() else square.sum()
        # Squares of squares leave float32's range; relative to the largest they do not.
        relative = square / largest.clamp(min=torch.finfo(square.dtype).tiny)
        state["table_moment"].mul_(beta2).add_(
            torch.stack([relative.square().sum() * largest, relative.sum()]), alpha=1 - beta2
        )
        return torch.where(before[1] > 0, _table_mean(before), _table_mean(state["table_moment"]))

    def _row_state(self, parameter: torch.Tensor, *more: str) -> dict[str, torch.Tensor]:
        """The state of a table: a second moment a row, and other floats a row.

        A count is exact to 2^24 steps, where the bias correction has long been 1.
        """
        state: dict[str, torch.Tensor] = self.state[parameter]
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        for name in ("second_moment", *more) if "second_moment" not in state else ():
            state[name] = empty_table(parameter.shape[0], device=parameter.device, dtype=dtype).zero_()
        return state

    def _step_dense(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["first_moment"] = torch.zeros_like(parameter)
            state["second_moment"] = torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        count = self._count(parameter, "count")
        first = state["first_moment"].mul_(beta1).add_(parameter.grad, alpha=1 - beta1)
        second = state["second_moment"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        if not has_kernels(parameter.device):
            denominator = (second / (1 - beta2 ** int(count))).sqrt_().add_(group["eps"])
            parameter.addcdiv_(first, denominator, value=-float(group["lr"]) / (1 - beta1 ** int(count)))
            return
        corrections = [1 - torch.pow(beta, count) for beta in (beta1, beta2)]
        denominator = (second / corrections[1]).sqrt_().add_(group["eps"])
        parameter.sub_((first / denominator).mul_(group["lr"] / corrections[0]))


def _table_mean(table_moment: torch.Tensor) -> torch.Tensor:
    """(), of the two sums of a table's moment."""
    return table_moment[0] / table_moment[1].clamp(min=torch.finfo(table_moment.dtype).tiny)


@compiled(fastmath={"reassoc", "contract"}, error_model="numpy")
def _step_bags(
    table: Any,
    moment: Any,
    row_ids: Any,
    entries: Any,
    grad_BD: Any,
    square: Any,
    rate: Any,
    eps: Any,
    table_moment: Any,
    begin: int,
    end: int,
) -> None:
    """The rows' gradients, sums of `value * grad_BD[instance]`, one after the other: mean squares and the step."""
    offsets, instances, values = entries
    dim = table.shape[1]
    sums = np.empty(dim, dtype=np.float32)
    for place in range(begin, end):
        fetch_row(table, row_ids[min(place + AHEAD, end - 1)])
        first, last = offsets[place], offsets[place + 1]
        factor, total = np.float32(1.0), sums
        if last == first + 1:
            factor, total = values[first], grad_BD[instances[first]]
        else:
            sums[:] = 0.0
            for entry in range(first, last):
                value, grad = values[entry], grad_BD[instances[entry]]
                for column in range(dim):
                    sums[column] += value * grad[column]
        norm = np.float32(0.0)
        for column in range(dim):
            norm += total[column] * total[column]
        row = row_ids[place]
        square[place] = factor * factor * norm / np.float32(dim)
        moment[row] += square[place]
        scale = -np.float32(rate) * factor / (np.sqrt(moment[row] + np.float32(table_moment)) + np.float32(eps))
        for column in range(dim):
            table[row, column] += scale * total[column]


@compiled(fastmath={"contract"})
def _add_scaled(table: Any, row_ids: Any, rows: Any, scale: Any, begin: int, end: int) -> None:
    """`table[row_ids] += scale * rows` in one pass, without the product in between."""
    for place in range(begin, end):
        fetch_row(table, row_ids[min(place + AHEAD, end - 1)])
        row, factor = row_ids[place], scale[place]
        for column in range(table.shape[1]):
            table[row, column] += factor * rows[place, column]


def add_to_rows(table: torch.Tensor, row_ids: torch.Tensor, updates: torch.Tensor, seed: int = 0) -> None:
    """`table[row_ids] += updates` for distinct ids; a bfloat16 table is rounded at random, by a seed of this call, one
    of another dtype than the updates' to the nearest."""
    if table.dtype == torch.bfloat16:
        generator = torch.Generator(table.device).manual_seed(seed)
        table[row_ids] = round_at_random(table[row_ids].float().add_(updates), generator)
    elif table.dtype == updates.dtype:
        table.index_add_(0, row_ids, updates)
    else:
        table[row_ids] = (table[row_ids].to(updates.dtype) + updates).to(table.dtype)


def round_at_random(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """float32 -> bfloat16: to one of the two neighbours, the nearer the likelier, so that the mean is the value.

    A step of Adam is often below half of the last place of a bfloat16 row (a 256th), and rounding to the nearest would
    lose it each time. Adds 16 random bits below the last place and cuts; infinities and NaN stay what they are.
    Source: Gupta et al. 2015 (arXiv 1502.02551).
    """
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    rounded = (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(torch.isfinite(values), rounded, values).bfloat16()


def _padded_rows(gradient: torch.Tensor, keep_pads: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rising row ids (U,) and their gradients of a sparse gradient, with the pads at its end or without them."""
    row_ids, rows = gradient._indices()[0], gradient._values()
    if keep_pads:
        return row_ids, rows
    num_rows = int(torch.searchsorted(row_ids, gradient.shape[0]))
    return row_ids[:num_rows], rows[:num_rows]


def _rising_rows(gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unique row ids (U,) and their gradients of a sparse gradient.

    Autograd keeps the order of the rows but drops the flag that says so; `coalesce()` would sort and copy what is
    sorted already (23 ms against 1 ms for 8,000 rows of 512).
    """
    row_ids = gradient._indices()[0]
    if gradient.is_coalesced() or bool((row_ids[1:] > row_ids[:-1]).all()):
        return row_ids, gradient._values()
    gradient = gradient.coalesce()
    return gradient.indices()[0], gradient.values()
