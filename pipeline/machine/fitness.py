"""Whether a machine computes right, and how fast its ranks exchange gradients: what the check of a
job's nodes and `pipeline doctor` measure.
"""

import time
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.machine.ranks import World

# Rows of the matrices, and bytes of the all-reduce: large enough for a GPU to show its speed, small
# enough for a core to take no time.
ROWS = {"cuda": 4096, "cpu": 256}
REDUCED_BYTES = {"cuda": 64 << 20, "cpu": 1 << 20}
LEAST_HOST_BYTES = 512 << 20


def multiplies_right(device: torch.device) -> bool:
    """Whether a float32 matrix product on `device` is what the host computes."""
    rows = ROWS[device.type]
    # Integers small enough for any float type to add up exactly.
    left, right = torch.randint(-4, 5, (2, rows, rows), generator=torch.Generator().manual_seed(0)).float()
    # Of 64 rows on the host: all would take seconds.
    return torch.equal((left.to(device) @ right.to(device))[:64].cpu(), left[:64] @ right)


def available_bytes() -> int:
    """Host memory that programs can still get, as Linux estimates it."""
    with Path("/proc/meminfo").open(encoding="ascii") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def all_reduce_gb_per_s(world: World, groups: list[str]) -> float:
    """GB/s of an all-reduce among the ranks with this rank's name in `groups`, which has one for
    each rank, counted as NCCL's tests do: what each link carries. 0 if its sum is wrong.
    """
    own, names = groups[world.rank], dict.fromkeys(groups)
    size = groups.count(own)
    # Every rank has to create every group, in the same order. All ranks have theirs: NCCL would take hundreds
    # of MB of each GPU for a second one, until the run ends.
    made = {
        name: dist.new_group([rank for rank, other in enumerate(groups) if other == name])
        for name in names
        if len(names) > 1
    }
    if size == 1:
        return float("inf")
    values = torch.empty(REDUCED_BYTES[world.device.type] // 4, device=world.device)
    fastest_s, right = float("inf"), True
    for _ in range(3):  # the first one connects
        values.fill_(1.0)
        began = time.perf_counter()
        dist.all_reduce(values, group=made.get(own))
        right &= bool((values == size).all())  # waits for the device
        fastest_s = min(fastest_s, time.perf_counter() - began)
    return 2 * (size - 1) / size * values.nbytes / fastest_s / 1e9 if right else 0.0
