"""What hardware can do at best: peak FLOP/s, memory, bandwidths, from the table in gpus.toml. No torch."""

import os
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pipeline.errors import UserError

# Parts that share a name with a faster one: laptops run at what their power limit allows, a MIG
# slice has a fraction of its GPU, and these are other chips.
OTHER_PARTS = r"Laptop|Notebook|Mobile|Max-Q|\bMIG\b|RTX \d+ (D|Super)\b"
CPU = "cpu"
MOST_DEVICES = 1_000_000
# Of one CPU core, where nothing was measured: 8-lane float32 FMA twice a cycle at 2 GHz gives 64
# GFLOP/s; two channels of DDR4-3200 give 51 GB/s, which a machine's cores share.
CORE_FLOPS, CPU_BYTES_PER_S = 64e9, 40e9
# Below this width a CPU spends more on casting than bfloat16 saves: on two cores with AMX, width
# 128 ran 0.8 times as fast as float32 and width 384 ran 2 times as fast.
CPU_BFLOAT16_MIN_WIDTH = 256


@dataclass(frozen=True)
class Device:
    """One GPU, or one rank's part of the CPUs. Rates are peaks, per second; bytes go one way.

    `flops` are those of `dtype`; `link` goes to the devices of its node, `net` to other nodes, of
    which each has `node` devices.
    """

    kind: str
    flops: float
    bandwidth: float
    memory_bytes: float
    link: float
    net: float
    node: int
    dtype: str
    source: str

    @property
    def is_cpu(self) -> bool:
        return self.kind == CPU


@dataclass(frozen=True)
class Hardware:
    """So many devices, a rank each, in full nodes."""

    device: Device
    ranks: int

    @property
    def per_node(self) -> int:
        return min(self.device.node, self.ranks)

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.per_node)

    def __str__(self) -> str:
        return f"{self.device.kind}x{self.ranks}"


def hardware(name: str) -> Hardware:
    """`KIND` or `KINDxN`, such as h100x8, a100-40x16, 4090 or cpu. Raises UserError for an unknown one."""
    found = re.fullmatch(r"(.+?)(?:x([1-9]\d*))?", name.strip().lower())
    kind, count = (found[1], int(found[2] or 1)) if found else ("", 1)
    plain, _, size = kind.rpartition("-")
    if _table().get(plain, {}).get("gb") == int(size if size.isascii() and size.isdigit() else 0):
        kind = plain  # a100-80: the memory may be part of the name
    if (kind != CPU and kind not in _table()) or count > MOST_DEVICES:
        raise UserError(
            f"unknown hardware {name!r}: expected KIND or KINDxN with KIND one of {CPU}, {', '.join(_table())}"
        )
    return Hardware(_cpu(count) if kind == CPU else _device(kind), count)


def hardware_named(name: str, ranks: int) -> Hardware | None:
    """So many devices of a kind, or of torch's name of a device; None where that is unknown."""
    if name == CPU:
        return Hardware(_cpu(ranks), ranks)
    kind = name if name in _table() else kind_of(name)
    return Hardware(_device(kind), ranks) if kind else None


def hardware_here() -> Hardware:
    """The GPUs that NVIDIA's driver lists on this machine or, without known ones, its CPUs."""
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    name = files[0].read_text(encoding="utf-8", errors="replace").partition("\n")[0] if files else CPU
    return hardware_named(name, max(1, len(files))) or Hardware(_cpu(1), 1)


def kind_of(device_name: str) -> str | None:
    """The kind that torch's name of a GPU belongs to; None where it is unknown."""
    if re.search(OTHER_PARTS, device_name, re.IGNORECASE):
        return None
    return next((kind for kind, row in _table().items() if re.search(rf"\b{row['name']}\b", device_name)), None)


def peak_flops(device_name: str) -> float | None:
    """Peak dense 16-bit FLOP/s of a GPU by torch's name for it; None, and so no MFU, where it is
    unknown.
    """
    kind = kind_of(device_name)
    return _device(kind).flops if kind else None


def format_peak(device_name: str) -> str:
    """The peak that MFU is measured against, for the log."""
    kind = kind_of(device_name)
    known = "peak FLOP/s unknown, so no mfu"
    if kind:
        known = f"peak {_device(kind).flops / 1e12:,.1f} TFLOP/s, dense {_device(kind).dtype}"
    return f"device {device_name}: {known}"


def memory_here() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cores_here() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _table() -> dict[str, dict[str, str | float]]:
    return tomllib.loads(Path(__file__).with_name("gpus.toml").read_text(encoding="utf-8"))


def _device(kind: str) -> Device:
    row = _table()[kind]
    giga = {name: float(row[name]) * 1e9 for name in ("gb", "link_gb_s", "net_gb_s")}
    return Device(
        kind, flops=float(row["tflops"]) * 1e12, bandwidth=float(row["tb_per_s"]) * 1e12, memory_bytes=giga["gb"],
        link=giga["link_gb_s"], net=giga["net_gb_s"], node=int(row["node"]), dtype=str(row.get("dtype", "bfloat16")),
        source=str(row["source"]),
    )  # fmt: skip


def _cpu(ranks: int) -> Device:
    """A rank's part of this machine, which it shares with the others."""
    bandwidth = CPU_BYTES_PER_S / ranks
    return Device(
        CPU, flops=CORE_FLOPS * cores_here() / ranks, bandwidth=bandwidth, memory_bytes=memory_here() / ranks,
        link=bandwidth, net=bandwidth, node=ranks, dtype=_cpu_dtype(), source=f"{cores_here()} cores of this machine",
    )  # fmt: skip


def _cpu_dtype() -> str:
    """What torch multiplies fastest here, by the features that Linux lists."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "float32"
    return "bfloat16" if re.search(r"\b(avx512_bf16|amx_bf16|amx_tile)\b", flags) else "float32"
