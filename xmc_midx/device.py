"""Layer 1. The machine: which device, which precision, how many threads, how much memory."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import torch

from xmc_midx.errors import ResourceError, UsageError
from xmc_midx.products import linear

__all__ = [
    "available_memory_bytes",
    "empty_table",
    "find_device",
    "find_precision",
    "has_kernels",
    "is_out_of_memory",
    "keep_freed_memory",
    "measure_speed",
    "multiplies_bfloat16",
    "peak_memory_bytes",
    "release_freed_memory",
    "used_memory_bytes",
    "without_autocast",
]


_HALVED_FROM = 4096
"""Labels from which a CPU trains in bfloat16: it is faster at 41,000 and level at 983 (EXPERIMENTS.md, "Precision")."""
_HUGE_PAGE, _HUGE_FROM = 2 << 20, 32 << 20
"""Bytes of a large page, and of the smallest table that asks for them."""


def find_device(name: str) -> torch.device:
    """`auto` (CUDA where there is one, else the CPU), `cpu`, `cuda` or `cuda:N` -> a device that is there.

    Raises
    ------
    UsageError : the name is none of these.
    ResourceError : there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"Device {name!r} is unknown; expected auto, cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"Device {name!r} is not supported; expected auto, cpu, cuda or cuda:N.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ResourceError(
            f"Device {name!r} is not there: torch sees {count} CUDA devices.", hint="Use --device auto."
        )
    return device


def find_precision(name: str, device: torch.device, num_labels: int) -> torch.dtype:
    """The dtype of the large matrix products.

    `auto` is bfloat16 where the device multiplies it fast, else float32; and float32 on a CPU where labels are few.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    is_large = device.type != "cpu" or num_labels >= _HALVED_FROM
    return torch.bfloat16 if is_large and multiplies_bfloat16(device) else torch.float32


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products of large tables are taken in bfloat16: on a CPU with AVX512-BF16 or AMX, where they have two to
    four times float32's rate, and on a GPU for which torch supports it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return probe is not None and bool(probe())


def has_kernels(device: torch.device) -> bool:
    """Whether `xmc_midx.triton_rows` works there: Triton is installed, has a compiler, and knows the GPU."""
    return device.type == "cuda" and _runs_kernels(device.index)


@functools.cache
def _runs_kernels(index: int | None) -> bool:
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return False
    try:
        from xmc_midx.triton_rows import bag, step_rows

        device = torch.device("cuda" if index is None else f"cuda:{index}")
        ids, offsets = torch.zeros(1, dtype=torch.int64, device=device), torch.tensor([0, 1], device=device)
        ones = torch.ones(1, 1, device=device)
        state = {name: torch.zeros(1, device=device) for name in ("second_moment", "count")} | {"rounded": ones[0, 0]}
        for table in (torch.ones(1, 1, device=device), torch.ones(1, 1, dtype=torch.bfloat16, device=device)):
            step_rows(table, ids, ones.to(table.dtype), ones[0], state, rate=ones[0, 0], beta2=0.9, eps=1e-8)
        return float(bag(ids, ones[0], offsets, ones)) == 1.0 and abs(float(table)) < 0.01
    except Exception as error:  # a compiler's, a driver's, a cache's
        warnings.warn(f"a GPU is used without Triton's kernels, which is slower: {error}", stacklevel=3)
        return False


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Leave an enclosing autocast for a while: whoever asks chooses the dtypes of its products itself."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def empty_table(
    *shape: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """`torch.empty(shape)`, for a table whose rows are read in no order: on Linux in pages of 2 MiB.

    With pages of 4 KiB each row of a table of gigabytes is a miss of the address cache too. The advice is taken where
    /sys/kernel/mm/transparent_hugepage/enabled says `madvise`, which is most systems' default.
    """
    table = torch.empty(*shape, device=device, dtype=dtype)
    if table.device.type == "cpu" and table.nbytes >= _HUGE_FROM and sys.platform.startswith("linux"):
        begin = -(-table.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        size = (table.data_ptr() + table.nbytes - begin) // _HUGE_PAGE * _HUGE_PAGE
        with suppress(OSError, AttributeError):
            madv_hugepage = 14
            ctypes.CDLL("libc.so.6").madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), madv_hugepage)
    return table


def keep_freed_memory() -> None:
    """Let the C library reuse freed blocks of up to 64 MiB instead of returning them to the kernel.

    By default glibc maps and unmaps every block over 32 MiB at most, and each new map is zeroed page by page: a third
    of a training step on gnd-tib (EXPERIMENTS.md, "Allocator"). Larger blocks, the tables themselves, are still
    returned: kept, they fragment the heap. Elsewhere than on glibc this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_threshold, 64 << 20)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
    except (OSError, AttributeError):  # musl and others: no such knob
        return


def release_freed_memory() -> None:
    """Give the blocks that `keep_freed_memory` kept back to the kernel: between two stages whose blocks differ in size.

    Without it the heap grows from epoch to epoch, as steps and validations cut up each other's free blocks.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def peak_memory_bytes() -> int:
    """The largest resident set of this process so far; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed: Python's, NumPy's, torch's on the CPU or on CUDA."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("allocate memory" in text or "out of memory" in text)


def used_memory_bytes() -> int:
    """The resident set of this process now; 0 where the system does not say."""
    return 1024 * _status("VmRSS")


def available_memory_bytes() -> int | None:
    """What this process can still get: of the machine, of its control group, of its limit; None where unknown."""
    limits = []
    with suppress(OSError, ValueError, IndexError):
        text = Path("/proc/meminfo").read_text(encoding="ascii").partition("MemAvailable:")[2]
        limits.append(1024 * int(text.split()[0]))
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        limits.append(limit - int((group / "memory.current").read_text(encoding="ascii")))
    with suppress(ImportError, ValueError):
        import resource

        address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
        if address_space != resource.RLIM_INFINITY:
            limits.append(address_space - 1024 * _status("VmSize"))
    return max(0, min(limits)) if limits else None


def measure_speed(
    num_rows: int, num_columns: int, dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[float, float]:
    """Operations a second of the products of a step, (rows, dim) x (dim, columns) and its two gradients, and bytes a
    second of rows gathered from a table.

    Takes about 0.2 s.
    """
    left = torch.ones(num_rows, dim, dtype=dtype, device=device)
    right = torch.ones(num_columns, dim, dtype=dtype, device=device)
    table = torch.ones(50_000, dim, device=device)
    rows = torch.randint(50_000, (10_000,), device=device, generator=torch.Generator(device).manual_seed(0))

    def seconds(work: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(5):
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - started)
        return best

    def products() -> None:
        logits = linear(left, right)
        torch.mm(logits, right), torch.mm(logits.T, left)

    gather = seconds(lambda: table.index_select(0, rows))
    return 3 * 2.0 * num_rows * num_columns * dim / seconds(products), 2.0 * 4 * rows.shape[0] * dim / gather


def _status(field: str) -> int:
    """A figure of this process in kB; 0 where the system does not say."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{os.getpid()}/status").read_text(encoding="ascii").partition(f"{field}:")[2].split()[0])
    return 0
