"""Layer 5. The training loop: batches in, better encoder and label table out. Before it: softmax, optimiser; after
it: checkpoints.

The trainer knows nothing of files. Its whole state is `state_dict()`: loaded into a trainer of the same
configuration, training goes on as if it had never stopped, bit for bit on the CPU.

On a GPU a step has static shapes where the softmax allows it, and is a CUDA graph: the host only hands over the next
batch, and reads of a step while the next one runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from xmc_midx.capture import CapturedSteps
from xmc_midx.config import TrainingConfig
from xmc_midx.crash import crash_point
from xmc_midx.data.batches import BatchStream, made_ahead
from xmc_midx.device import has_kernels, release_freed_memory
from xmc_midx.encoder import SparseEncoder
from xmc_midx.errors import DivergedError
from xmc_midx.optim import RowAdam, add_to_rows
from xmc_midx.quantization import StoredTable
from xmc_midx.softmax import LabelSoftmax
from xmc_midx.types import Batch, EpochStats, Reporter

__all__ = ["Trainer"]

_START_POSITIVES = 1 << 16
"""Copies of queries at once, where the label rows start from the mean of their instances."""
_STORED_ROWS = 1 << 14
"""Of a stored table, at once."""


class Trainer:
    """Trains an encoder and a label softmax on a stream of batches.

    Parameters
    ----------
    encoder, softmax : on the device of training; the label table may lie elsewhere.
    stream : the batches; they are moved to the device one by one.
    config : resolved: no value is `"auto"`.
    refresh_every : steps between two refreshes of the sampler; None refreshes at the start of each epoch.
    static_shapes : whether steps have them where the softmax allows it; None: on a GPU, with `config.cuda_graphs`.
    """

    def __init__(
        self,
        encoder: SparseEncoder,
        softmax: LabelSoftmax,
        stream: BatchStream,
        config: TrainingConfig,
        *,
        refresh_every: int | None = None,
        static_shapes: bool | None = None,
    ) -> None:
        assert isinstance(config.epochs, int), "the configuration is resolved"
        self.encoder, self.softmax, self.stream = encoder, softmax, stream
        self.num_epochs, self.refresh_every = config.epochs, refresh_every
        self.device = softmax.bias.device
        self.optimizer = _optimizer(encoder, softmax, config)
        groups = self.optimizer.param_groups
        self._biases = [parameter for group in groups for parameter in group["params"] if parameter.dim() == 1]
        self.total_steps = self.num_epochs * stream.steps_per_epoch
        self.warmup_steps = max(1, round(config.warmup_fraction * self.total_steps))
        self.step = 0
        """Steps done since training began."""
        self._base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self._loss_sum, self._pool_sum = 0.0, 0.0
        encoder.dropout.generator = torch.Generator(self.device).manual_seed(config.seed + 1)
        on_gpu = has_kernels(self.device) and config.cuda_graphs is True
        self._static_shapes = on_gpu if static_shapes is None else static_shapes
        self._rates = torch.zeros(len(self._base_rates), device=self.device)
        """What the optimiser's groups read where steps have static shapes."""
        self._unread: _Unread | None = None
        self.graphs: CapturedSteps | None = None
        """None: steps are asked for piece by piece."""
        if on_gpu:
            generators = softmax.generator, encoder.dropout.generator
            self.graphs = CapturedSteps(self._static_step, stream.batch_size, generators)

    # ------------------------------------------------------------------ start

    def initialize(self, label_init: str, seed: int) -> None:
        """Start values: random features; each label at the mean of its encoded instances and at its log frequency."""
        self.encoder.reset_parameters(torch.Generator(self.device).manual_seed(seed))
        if label_init == "mean-instance":
            _start_from_mean_instances(self.encoder, self.softmax, self.stream)

    # ------------------------------------------------------------------- loop

    def run_epoch(self, reporter: Reporter, *, after_step: Callable[[], None] | None = None) -> EpochStats:
        """Train to the end of the current epoch, from wherever the trainer stands in it.

        Parameters
        ----------
        reporter : gets one `step` a batch with the running loss and instances/s.
        after_step : called after each step, for checkpoints inside an epoch.

        Raises
        ------
        DivergedError : the loss of a batch or a gradient is not finite; the step is not taken. With static shapes it is
            found after the next step, and the tables are of no use any more.
        """
        self.settle()
        epoch, first_step = divmod(self.step, self.stream.steps_per_epoch)
        if first_step == 0:
            self._loss_sum, self._pool_sum = 0.0, 0.0
        started = time.perf_counter()
        num_instances = 0
        self.encoder.train()
        sizes = self._sizes(epoch + 1)
        self.softmax.static_shapes = sizes is not None
        batches = self.stream.epoch(epoch + 1, first_step=first_step, sizes=sizes)
        if self.device.type == "cuda":
            batches = made_ahead(batch.pin_memory() for batch in batches)
        for batch in batches:
            if self._refresh_is_due():
                self.settle()
                if self.graphs is not None:
                    self.graphs.forget()
                crash_point("refresh.begun")
                self.softmax.refresh()
                if self.step % self.stream.steps_per_epoch == 0:
                    release_freed_memory()
                crash_point("refresh.done")
            self._set_rates()
            if sizes is None:
                self._train_step(batch.to(self.device))
            else:
                self._begin_step(batch)
            num_instances += batch.num_instances
            seconds = time.perf_counter() - started
            done = self.step - epoch * self.stream.steps_per_epoch - (self._unread is not None)
            facts = {"loss": self._loss_sum / done} if done else {}
            reporter.step(1, **facts, instances_per_second=num_instances / seconds)
            crash_point("step.done")
            if after_step is not None:
                after_step()
        self.settle()
        seconds = time.perf_counter() - started
        steps = self.stream.steps_per_epoch
        return EpochStats(
            epoch=epoch + 1,
            num_epochs=self.num_epochs,
            num_steps=self.step,
            loss=self._loss_sum / steps,
            instances_per_second=num_instances / max(seconds, 1e-9),
            learning_rate=float(self.optimizer.param_groups[-1]["lr"]),
            seconds=seconds,
            sampler={"pool_size": self._pool_sum / steps},
        )

    def _train_step(self, batch: Batch) -> None:
        loss, query_BD, grad_BD = self._gradients(batch)
        # Read together: each look at a number on a device waits for all that was asked of it before.
        sums = [loss, *(total.to(loss.dtype) for total in self._sums_of_gradients())]
        value, *gradients = map(float, torch.stack(sums).tolist())
        if not math.isfinite(value):
            raise _diverged(f"The loss became {value} at step {self.step + 1}", batch, query_BD)
        if not all(map(math.isfinite, gradients)):
            raise _diverged(f"A gradient is not finite at step {self.step + 1}", batch, query_BD)
        self._update(batch, grad_BD)
        self.step += 1
        self._loss_sum += value
        self._pool_sum += float(self.softmax.pool_size)

    def _begin_step(self, batch: Batch) -> None:
        """Ask for a step of static shapes, and read of the one before."""
        found = self._static_step(batch.to(self.device)) if self.graphs is None else self.graphs(batch)
        self.step += 1
        # A graph's next replay writes over what it found.
        numbers, copied = torch.empty(found.shape, pin_memory=found.is_cuda), None
        numbers.copy_(found, non_blocking=True)
        if found.is_cuda:
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(torch.cuda.current_stream(self.device))
        begun = _Unread(batch=batch, step=self.step, numbers=numbers, copied=copied)
        self.settle()
        self._unread = begun

    def _static_step(self, batch: Batch) -> torch.Tensor:
        """A step, without a look at the device: its loss, sums of gradients and labels in the pool."""
        loss, _, grad_BD = self._gradients(batch)
        found = [loss, *self._sums_of_gradients(), torch.as_tensor(self.softmax.pool_size)]
        numbers = torch.stack([number.to(loss.dtype) for number in found])
        self._update(batch, grad_BD)
        return numbers

    def _gradients(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The loss (), the queries (B, D), and the gradient (B, D) of what the encoder made of its table, which goes
        back no further; those of all other parameters are left with them."""
        with torch.no_grad():
            bag_BD = self.encoder.bags(batch.features)
        query_BD = self.encoder.layers(bag_BD.requires_grad_())
        loss = self.softmax(query_BD, (batch.positives, batch.positive_offsets))
        loss.backward()
        return loss.detach(), query_BD.detach(), bag_BD.grad

    def _update(self, batch: Batch, grad_BD: torch.Tensor | None) -> None:
        if grad_BD is not None:
            self.optimizer.step_bags(self.encoder.embedding, batch.features, grad_BD)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def settle(self) -> None:
        """Wait for the step that was begun last, and count it; a DivergedError where it was not finite."""
        if self._unread is None:
            return
        unread, self._unread = self._unread, None
        if unread.copied is not None:
            unread.copied.synchronize()
        loss, *gradients, pool_size = unread.numbers.tolist()
        if not all(map(math.isfinite, (loss, *gradients))):
            what = f"The loss became {loss}" if not math.isfinite(loss) else "A gradient is not finite"
            raise _diverged(f"{what} at step {unread.step}", unread.batch, None)
        self._loss_sum += loss
        self._pool_sum += pool_size

    def _sizes(self, epoch: int) -> tuple[int, int] | None:
        """Of the padded batches of an epoch; None where steps do not have static shapes."""
        if not self._static_shapes:
            return None
        sizes = self.stream.sizes(epoch)
        return sizes if self.softmax.allows_static_shapes(self.stream.batch_size, sizes[1]) else None

    def _sums_of_gradients(self) -> list[torch.Tensor]:
        """Finite where all gradients are. Of the biases alone, whose gradients are sums of what the tables' are made
        of: a sum is finite only where all its terms are, and the tables' own gradients take 2.5% of a step to look at.
        A product of finite numbers that overflows shows in the next loss, and before a checkpoint is saved."""
        gradients = [parameter.grad for parameter in self._biases if parameter.grad is not None]
        return [(gradient._values() if gradient.is_sparse else gradient).sum() for gradient in gradients]

    def _set_rates(self) -> None:
        """Linear warm-up, then linear decay to zero at the last step."""
        factor = min((self.step + 1) / self.warmup_steps, 1.0) * (1.0 - self.step / self.total_steps)
        rates: list[Any] = [base * factor for base in self._base_rates]
        if self.softmax.static_shapes:
            given = torch.tensor(rates)
            self._rates.copy_(given.pin_memory() if self._rates.is_cuda else given, non_blocking=True)
            rates = list(self._rates)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _refresh_is_due(self) -> bool:
        return self.step % (self.refresh_every or self.stream.steps_per_epoch) == 0

    # ------------------------------------------------------------------ state

    def model_tensors(self) -> dict[str, torch.Tensor]:
        """What a prediction needs."""
        tensors = {f"encoder.{name}": tensor for name, tensor in self.encoder.state_dict().items()}
        return tensors | {f"labels.{name}": table.detach() for name, table in self.softmax.named_parameters()}

    def training_tensors(self) -> dict[str, torch.Tensor]:
        """What training needs besides the model to go on: sampler, optimiser, random streams."""
        model = self.model_tensors()
        tensors = {f"labels.{name}": tensor for name, tensor in self.softmax.state_dict().items()}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in model}
        for index, entry in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in entry.items()}
        tensors["generator.dropout"] = self._dropout_generator().get_state()
        return tensors

    def counters(self) -> dict[str, float]:
        """The plain part of the state."""
        self.settle()
        return {"step": self.step, "loss_sum": self._loss_sum, "pool_sum": self._pool_sum}

    def load_model(self, model: dict[str, torch.Tensor]) -> None:
        """Restore what `model_tensors` returned, into the tables that are there; without the training tensors, the
        sampler is fitted anew."""
        if self.graphs is not None:
            self.graphs.forget()
        self.encoder.load_state_dict(_part(model, "encoder."))
        self.softmax.load_state_dict(_part(model, "labels."))

    def load_stored(self, stored: Mapping[str, np.ndarray]) -> None:
        """Put what `quantization.quantize` made of `model_tensors` in their place, part by part."""
        for name, tensor in self.model_tensors().items():
            if name in stored:
                tensor.copy_(torch.from_numpy(np.asarray(stored[name], dtype=np.float32)))
                continue
            table = StoredTable.take(stored, name)
            for begin in range(0, len(tensor), _STORED_ROWS):
                rows = slice(begin, begin + _STORED_ROWS)
                tensor[rows].copy_(torch.from_numpy(table.rows(rows)))

    def load(
        self, model: dict[str, torch.Tensor], training: dict[str, torch.Tensor], counters: dict[str, float]
    ) -> None:
        """Restore what `model_tensors`, `training_tensors` and `counters` returned."""
        self._unread = None
        self.load_model(model | training)
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in _part(training, "optimizer.").items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = tensor
        whole = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
        self._dropout_generator().set_state(training["generator.dropout"])
        self.step = int(counters["step"])
        self._loss_sum, self._pool_sum = float(counters["loss_sum"]), float(counters["pool_sum"])

    def take_model(self, model: dict[str, torch.Tensor]) -> None:
        """After `release_tables`: the parameters that `model_tensors` returned, for predictions. The tables are not
        copied; what may be kept longer is, and not with all of a mapped file."""
        for prefix, module in (("encoder.", self.encoder), ("labels.", self.softmax)):
            for name, parameter in module.named_parameters():
                is_table = parameter is self.encoder.embedding or parameter is self.softmax.weight
                parameter.data = model[f"{prefix}{name}"] if is_table else model[f"{prefix}{name}"].clone()

    def release_tables(self) -> None:
        """Give the tables, their optimiser and the sampler back. Nothing can be trained or saved any more."""
        self.optimizer.state.clear()
        self.softmax.sampler = None
        for parameter in (*self.encoder.parameters(), *self.softmax.parameters()):
            parameter.data = parameter.data.new_empty(0)

    def _dropout_generator(self) -> torch.Generator:
        generator = self.encoder.dropout.generator
        assert generator is not None
        return generator


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unread:
    """A step that the device may still be at."""

    batch: Batch
    step: int
    numbers: torch.Tensor
    """On the host: loss, sums of gradients, labels in the pool."""
    copied: torch.cuda.Event | None
    """When they are there; None: now."""


def _diverged(fact: str, batch: Batch, query_BD: torch.Tensor | None) -> DivergedError:
    """Names the instances whose queries are not finite; where all are, or none are known, the batch."""
    ids = batch.instance_ids
    if query_BD is not None:
        suspects = torch.nonzero(~torch.isfinite(query_BD.detach()).all(1)).flatten().cpu()
        ids = ids[suspects] if 0 < suspects.shape[0] < batch.num_instances else ids
    shown = ", ".join(str(i) for i in ids[:8].tolist()) + (", ..." if ids.shape[0] > 8 else "")
    return DivergedError(
        f"{fact}, on the training instances {shown} (row numbers from 0).",
        hint="Lower training.encoder_learning_rate and training.label_learning_rate; is the data finite?",
    )


def _optimizer(encoder: SparseEncoder, softmax: LabelSoftmax, config: TrainingConfig) -> RowAdam:
    assert not isinstance(config.encoder_learning_rate, str) and not isinstance(config.label_learning_rate, str)
    layers = [parameter for name, parameter in encoder.named_parameters() if name != "embedding"]
    groups = [
        {"params": [encoder.embedding], "lr": config.encoder_learning_rate, "moment": "sum"},
        {"params": layers, "lr": config.label_learning_rate / 2},
        {"params": [p for p in softmax.parameters() if p.requires_grad], "lr": config.label_learning_rate},
    ]
    return RowAdam(groups, padded=True)


@torch.no_grad()
def _start_from_mean_instances(encoder: SparseEncoder, softmax: LabelSoftmax, stream: BatchStream) -> None:
    # The table may lie elsewhere: what is added to it comes over.
    weight_LD, device = softmax.weight, softmax.bias.device
    weight_LD.zero_()
    counts_L = torch.zeros(weight_LD.shape[0], device=device)
    for rows, query_BD in encoder.encode(stream.features):
        labels = stream.labels[rows].tocoo()
        instances = torch.from_numpy(labels.row).long().to(device)
        label_ids, which, counts = torch.unique(
            torch.from_numpy(labels.col).long().to(device), return_inverse=True, return_counts=True
        )
        sums = query_BD.new_zeros(label_ids.shape[0], query_BD.shape[1])
        # A part at a time: of instances with many labels, the copies would be larger than the model.
        for part in torch.split(torch.arange(len(which), device=device), _START_POSITIVES):
            sums.index_add_(0, which[part], query_BD[instances[part]])
        add_to_rows(weight_LD, label_ids.to(weight_LD.device), sums.to(weight_LD.device), seed=rows.start)
        counts_L.index_add_(0, label_ids, counts.to(counts_L.dtype))
    weight_LD.div_(counts_L.clamp(min=1)[:, None].to(weight_LD.device))
    if softmax.bias.requires_grad:
        softmax.bias.copy_(torch.log(counts_L + 1.0))


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
