"""What the hardware can do: device, autocast type, memory, number of threads.

Each choice that `auto` makes is returned with its reason, because a default that depends on the
machine surprises people who cannot see why.
"""

import ctypes
import os
import re
import sys
import time
from collections.abc import Callable
from functools import cache

import torch

from pipeline import launch
from pipeline.errors import Failure, UserError, one_line
from pipeline.machine.gpus import CPU_BFLOAT16_MIN_WIDTH

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The trial of bfloat16: a few ms, long enough to time. By how much it must be faster, since a step also
# casts what it does not multiply. With AVX512-BF16 it was 1.4 to 1.9 times as fast at 384 columns.
TRIAL_ROWS, MOST_TRIAL_WIDTH, TRIALS, BFLOAT16_GAIN = 256, 768, 5, 1.25
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h

# What says so without a type of its own: torch's CPU allocator, Metal, cuBLAS, NCCL.
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED")
MOST_CAUSE_CHARACTERS = 120


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The torch device of a `run.device`. Raises UserError where the machine has no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdecimal())):
        raise UserError(f"unknown device {name!r}: expected auto, cpu, cuda, cuda:N or mps")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("device mps was requested, but this machine has no Metal GPU: use device cpu")
    if kind != "cuda":
        return torch.device(kind)
    if not torch.cuda.is_available():
        raise UserError(f"device {name} was requested, but torch {torch.__version__} sees no CUDA GPU: use device cpu")
    device = torch.device("cuda", int(index) if index else local_rank)
    if (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {device} was requested, but this machine has {torch.cuda.device_count()} CUDA GPU(s)")
    return device


def pick_dtype(name: str, device: torch.device, n_embd: int) -> tuple[torch.dtype, str]:
    """The autocast type of a `run.dtype`, and why. Raises UserError for float16 on anything but
    CUDA: it needs loss scaling, which works there only.
    """
    if name != "auto" and name not in DTYPES:
        raise UserError(f"invalid dtype {name!r}: expected auto, {', '.join(DTYPES)}")
    if name == "float16" and device.type != "cuda":
        raise UserError(f"dtype float16 works on CUDA only, found device {device.type}: use bfloat16 or float32")
    if name != "auto":
        return DTYPES[name], "as configured"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU multiplies bfloat16"
        return torch.float16, "the GPU has no bfloat16"
    if device.type != "cpu":
        return torch.float32, f"bfloat16 is not used on {device.type}"
    if n_embd < CPU_BFLOAT16_MIN_WIDTH:
        return torch.float32, f"a CPU model narrower than {CPU_BFLOAT16_MIN_WIDTH} is slower in bfloat16"
    # Flags of the CPU lie: it may emulate the instructions, and a virtual machine may hide them.
    float32_s, bfloat16_s = product_seconds(min(n_embd, MOST_TRIAL_WIDTH))
    figures = f"a product takes {bfloat16_s * 1e3:.2f} ms in bfloat16, {float32_s * 1e3:.2f} ms in float32"
    return (torch.bfloat16 if BFLOAT16_GAIN * bfloat16_s < float32_s else torch.float32), figures


@cache
def product_seconds(width: int) -> tuple[float, float]:
    """One thread's fastest time for a product of TRIAL_ROWS rows and a square weight, in float32 and
    in bfloat16 with the casts of autocast.
    """
    threads, tensors = torch.get_num_threads(), [torch.ones(count, width) for count in (TRIAL_ROWS, width)]
    seconds = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    torch.set_num_threads(1)
    try:
        # In turn, and by the time that the thread had a core: on a busy machine a run should find
        # what it found when it began. The first of each type makes its kernel.
        for turn in range(1 + TRIALS):
            for dtype in seconds:
                began = time.thread_time()
                rows, weight = (tensor.to(dtype) for tensor in tensors)
                rows @ weight
                if turn:
                    seconds[dtype] = min(seconds[dtype], time.thread_time() - began)
    finally:
        torch.set_num_threads(threads)
    return seconds[torch.float32], seconds[torch.bfloat16]


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one: else the kernel takes back large blocks, and
    clears every page of them when they are allocated anew.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        # Above 32 MB older versions refuse it.
        if not libc.mallopt(M_MMAP_THRESHOLD, 1 << 30):
            libc.mallopt(M_MMAP_THRESHOLD, 1 << 25)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Compute in `dtype` while weights stay float32. Disabled for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def to_host(values: torch.Tensor) -> Callable[[], list[float]]:
    """Begin to copy the values of a vector to the host; the call that is returned waits for them, and
    not for what a GPU was given to do since.
    """
    if values.device.type != "cuda":
        return values.tolist
    copied = values.to("cpu", non_blocking=True)  # into pinned memory
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record(torch.cuda.current_stream(values.device))

    def wait() -> list[float]:
        arrived.synchronize()
        return copied.tolist()

    return wait


def device_name(device: torch.device) -> str:
    """torch's name of a GPU, such as "NVIDIA H100 80GB HBM3"; of another device its type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def check_memory(device: torch.device, needed: int, what: str, remedy: str) -> None:
    """Raises UserError where `device` does not have the `needed` bytes in all. Call it before they
    are allocated: Linux grants memory that it does not have, and kills the process later.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # mps shares the machine's
    if needed > total:
        raise UserError(f"{what} need {needed / 1e9:,.0f} GB of memory, {device} has {total / 1e9:,.0f} GB: {remedy}")


def memory_failure(error: Exception, device: torch.device, remedy: str = "") -> UserError | None:
    """The line for an `error` that says the device, or the machine, is out of memory; None for others."""
    by_type = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if isinstance(error, Failure) or not (by_type or OUT_OF_MEMORY.search(str(error))):
        return None
    remedy = remedy or "use a smaller model, or parallel.strategy=fsdp on more GPUs"
    return UserError(f"{device} is out of memory ({one_line(error)[:MOST_CAUSE_CHARACTERS]}): {remedy}")


def share_threads(ranks_here: int) -> int:
    """Divide this machine's cores among its ranks; torchrun would set one thread each. Returns the
    number of threads.

    A task of srun takes what SLURM assigned to it, as it may be bound to that already. A single
    process keeps torch's default, which follows its core affinity and OMP_NUM_THREADS.
    """
    if ranks_here == 1:
        return torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = launch.cores_per_rank()
    threads = min(cores, given) if given else max(1, cores // ranks_here)
    torch.set_num_threads(threads)
    return threads
