"""What the machine and its system are: versions, cores, limits, memory, clock, host name, GPUs. No
torch: an installation of it that is broken leaves these lines.
"""

import ctypes
import ipaddress
import os
import platform
import pwd
import re
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from math import inf
from pathlib import Path

import pipeline
from observe.doctor.findings import Finding, fail, judge, ok
from pipeline.machine.gpus import cores_here, peak_flops

LEAST_TORCH = (2, 9)
NEEDED = ("torch", "numpy", "safetensors", "xxhash", "click", "rich", "tiktoken", "tokenizers", "regex")
OPTIONAL = (
    "datasets", "pyarrow", "orjson", "zstandard", "gigatoken", "rensa", "s3fs", "warcio", "tensorboard", "transformers",
    "lm-eval", "gguf", "triton", "wandb", "trackio", "mlflow",
)  # fmt: skip
PROC, SYS = Path("/proc"), Path("/sys")
# What decides how fast a core multiplies matrices, the fastest first: in x86's flags, and ARM's.
FEATURES = ("amx_bf16", "avx512_bf16", "bf16", "avx512f", "avx2", "asimd")
BFLOAT16 = {"amx_bf16", "avx512_bf16", "bf16"}
# Docker's default is 64 MiB. NCCL takes about 10 MiB for each pair of ranks on a node.
LEAST_SHARED_BYTES = 1 << 30
LEAST_MEMORY_BYTES = 4 << 30
# A rank opens its shards, a socket for each rank that it talks to, and torch's libraries.
LIMITS = ("NOFILE", "NPROC", "MEMLOCK", "FSIZE", "AS", "CORE")
LEAST_FILES, LEAST_PROCESSES, LEAST_FILE_BYTES = 4096, 4096, 64 << 30
# Of NVIDIA's clocks_event_reasons: slowed by heat (0x20, 0x40), by the hardware (0x8), by the power supply (0x80).
SLOWED = 0xE8
GPU_COLUMNS = "index,name,driver_version,memory.used,memory.total,temperature.gpu,ecc.errors.uncorrected.volatile.total"
# Drivers before 535 call them throttle reasons.
GPU_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
GPU_LIMIT_S = 8.0
TIME_ERROR = 5  # of adjtimex(2): the clock is not synchronized


def text_of(path: Path) -> str:
    """Empty where the system does not have the file, or does not show it."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def cpu_features() -> set[str]:
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text_of(PROC / "cpuinfo"), re.MULTILINE)
    return set(line[1].split()) if line else set()


def control_files(*names: str) -> Iterator[str]:
    """The content of these files in the control groups of this process and those above, as version 1
    and version 2 have them.
    """
    for line in text_of(PROC / "self/cgroup").splitlines():
        controllers, path = line.split(":", 2)[1:]
        mount = SYS / "fs/cgroup" / controllers.removeprefix("name=")
        folder = mount / path.lstrip("/")
        for level in (folder, *folder.parents):
            if level.is_relative_to(mount):
                yield from (text_of(level / name).strip() for name in names if (level / name).is_file())


def throttled() -> int:
    """How often this process's cores were slowed by heat, or its control group was out of time; only
    a change means something.
    """
    by_heat = (SYS / "devices/system/cpu").glob("cpu*/thermal_throttle/core_throttle_count")
    by_quota = (re.search(r"nr_throttled (\d+)", stat) for stat in control_files("cpu.stat"))
    return sum(int(text_of(path) or 0) for path in by_heat) + sum(int(match[1]) for match in by_quota if match)


def versions() -> Iterator[Finding]:
    yield ok("python", f"{platform.python_version()} at {sys.executable}, {platform.system()} {platform.release()}")
    found = {}
    for name in (*NEEDED, *OPTIONAL):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    yield ok("pipeline", f"{pipeline.__version__} at {pipeline.HOME}")
    if missing := [name for name in NEEDED if name not in found]:
        yield fail("packages", f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    numbers = tuple(int(part) for part in re.findall(r"\d+", found.get("torch", "0"))[:2])
    if "torch" in found and numbers < LEAST_TORCH:
        yield fail("packages", f"torch {found['torch']}: expected 2.9 or newer", "pip install 'torch>=2.9'")
    absent = ", ".join(name for name in OPTIONAL if name not in found)
    listed = ", ".join(f"{name} {version}" for name, version in found.items())
    yield ok("packages", f"{listed}; optional ones not installed: {absent or 'none'}")


def compiler() -> Iterator[Finding]:
    """What torch.compile needs: on a GPU Triton builds a launcher in C for each kernel."""
    named = os.environ.get("CC", "")
    path = next(filter(None, map(shutil.which, [named] if named else ["gcc", "clang", "cc"])), None)
    header = Path(sysconfig.get_path("include"), "Python.h")
    faults = [
        (not path, f"no C compiler ({named or 'gcc, clang, cc'})", "apt install build-essential, or load the site's gcc module"),
        (not header.is_file(), f"{header} is missing", "apt install python3-dev, or set run.compile=off"),
    ]  # fmt: skip
    yield from judge("compiler", f"{path} and {header}: torch.compile can build", faults)


def cpu() -> Iterator[Finding]:
    flags, count = cpu_features(), cores_here()
    model = re.search(r"^model name\s*:\s*(.*)$", text_of(PROC / "cpuinfo"), re.MULTILINE)
    features = [name for name in FEATURES if name in flags]
    dtype = "bfloat16" if BFLOAT16 & flags else "float32"
    yield ok(
        "cpu", f"{model[1] if model else platform.machine()}, {count} of {os.cpu_count()} cores; "
        f"{', '.join(features) or 'no vector unit known'}: {dtype} on the CPU",
    )  # fmt: skip
    quotas = [quota for quota in map(_cores_of_quota, control_files("cpu.max", "cpu.cfs_quota_us")) if quota]
    load, most = os.getloadavg()[0], min([count, *quotas])
    governors = {text_of(path).strip() for path in (SYS / "devices/system/cpu").glob("cpu*/cpufreq/scaling_governor")}
    yield from judge(
        "cpu load", f"load average {load:.1f} on {count} cores, no quota below that",
        [(most < count, f"the container may use {most:.1f} of {count} cores (cgroup CPU quota)",
         "raise the quota (docker --cpus, SLURM --cpus-per-task), or set OMP_NUM_THREADS to it"),
        (load > count / 2, f"the machine is busy: load average {load:.1f} on {count} cores",
         "look with top for what else runs; speeds below are what it leaves"),
        ("powersave" in governors and "intel_pstate" not in text_of(SYS / "devices/system/cpu/cpu0/cpufreq/scaling_driver"),
         "the frequency governor is powersave: cores run slowly", "cpupower frequency-set -g performance")],
    )  # fmt: skip


def _cores_of_quota(text: str) -> float | None:
    """Of `200000 100000`, the quota and period of version 2, or `200000`: 2; None for no limit."""
    quota, _, period = text.partition(" ")
    return int(quota) / int(period or 100_000) if quota.isdigit() else None


def memory() -> Iterator[Finding]:
    sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB", text_of(PROC / "meminfo"), re.MULTILINE))
    total, available = (int(sizes[name]) << 10 for name in ("MemTotal", "MemAvailable"))
    limits = [int(text) for text in control_files("memory.max", "memory.limit_in_bytes") if text.isdigit()]
    used = [int(text) for text in control_files("memory.current", "memory.usage_in_bytes")]
    limit = min([total, *limits])
    left = min(available, limit - used[0]) if limit < total and used else available
    yield from judge(
        "memory", f"{left / 1e9:.1f} of {limit / 1e9:.1f} GB available",
        [(left < LEAST_MEMORY_BYTES, f"{left / 1e9:.1f} of {limit / 1e9:.1f} GB available",
         "end what uses it, or ask for more (SLURM --mem, docker --memory): a checkpoint is 12 bytes a parameter"),
        (limit < total / 2, f"a control group allows {limit / 1e9:.1f} of the machine's {total / 1e9:.1f} GB",
         "the kernel kills what uses more: raise SLURM --mem or docker --memory where that is too little")],
    )  # fmt: skip
    shared = shutil.disk_usage("/dev/shm")
    yield from judge(
        "shared memory", f"/dev/shm has {shared.free / 1e9:.1f} GB free",
        [(shared.free < LEAST_SHARED_BYTES, f"/dev/shm has {shared.free / 1e6:.0f} MB free, NCCL's ranks need 1 GB",
         "docker run --shm-size=8g (or --ipc=host), or mount -o remount,size=8g /dev/shm")],
    )  # fmt: skip


def limits() -> Iterator[Finding]:
    """ulimit, as a process started here has it."""
    soft = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[0] for name in LIMITS}

    def less(name: str, wanted: float) -> bool:
        return soft[name] != resource.RLIM_INFINITY and soft[name] < wanted

    found = {name: "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}" for name, value in soft.items()}
    yield from judge(
        "limits", ", ".join(f"{name} {value}" for name, value in found.items()),
        [(less("NOFILE", LEAST_FILES), f"{found['NOFILE']} open files", f"ulimit -n {LEAST_FILES} or more"),
        (less("NPROC", LEAST_PROCESSES), f"{found['NPROC']} processes", f"ulimit -u {LEAST_PROCESSES} or more"),
        (less("FSIZE", LEAST_FILE_BYTES), f"files up to {found['FSIZE']} bytes, checkpoints are larger", "ulimit -f unlimited"),
        (less("AS", inf), f"{found['AS']} bytes of address space: CUDA wants more", "ulimit -v unlimited"),
        (soft["CORE"] == resource.RLIM_INFINITY, "core dumps of any size: one of each rank fills the disk", "ulimit -c 0"),
        (less("MEMLOCK", inf) and (SYS / "class/infiniband").is_dir(),
         f"{found['MEMLOCK']} bytes of locked memory: InfiniBand needs more", "ulimit -l unlimited")],
    )  # fmt: skip


def clock() -> Iterator[Finding]:
    # A buffer larger than struct timex, all zero: it only asks.
    answer = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(1024))
    yield from judge(
        "clock", "synchronized" if answer >= 0 else "the kernel does not tell whether it is synchronized",
        [(answer == TIME_ERROR, "not synchronized by NTP: nodes will disagree about deadlines and file times",
         "start chrony or systemd-timesyncd")],
    )  # fmt: skip


def host_name() -> Iterator[Finding]:
    name = socket.gethostname()
    try:
        addresses = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None)})
    except OSError as error:
        advice = f"add a line for it to /etc/hosts, or set MASTER_ADDR and GLOO_SOCKET_IFNAME ({error.strerror})"
        yield fail("host name", f"{name} does not resolve: ranks cannot find each other", advice)
        return
    only_loopback = all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)
    yield from judge(
        "host name", f"{name} is {', '.join(addresses)}",
        [(only_loopback, f"{name} resolves to {', '.join(addresses)}: ranks of other nodes would connect to themselves",
         "for several nodes, map it to the node's address in /etc/hosts, or set MASTER_ADDR and GLOO_SOCKET_IFNAME")],
    )  # fmt: skip


def gpus() -> Iterator[Finding]:
    """As NVIDIA's driver reports them, with who holds them."""
    if shutil.which("nvidia-smi") is None:
        lost = (
            Path("/dev/nvidia0").exists(),
            "/dev/nvidia0 exists, but nvidia-smi does not",
            "install the driver's tools",
        )
        yield from judge("gpu", "no nvidia-smi on PATH, so no NVIDIA GPU: training runs on the CPU", [lost])
        return
    tables = (_nvidia_smi(f"--query-gpu={GPU_COLUMNS},{reasons}") for reasons in GPU_REASONS)
    first = next(tables)
    table = next(tables) if "not a valid field" in first.stdout + first.stderr else first
    for row in table.stdout.splitlines() if table.returncode == 0 else ():
        index, name, driver, used, total, celsius, errors, reasons = (part.strip() for part in row.split(","))
        found = f"{index}: {name}, driver {driver}, {used} of {total} MiB used, {celsius} C"
        mask = int(reasons, 16) if reasons.startswith("0x") else 0
        yield from judge(
            "gpu", found if peak_flops(name) else f"{found}; its peak FLOP/s are unknown, so no mfu",
            [(bool(mask & SLOWED), f"{found}: throttled (clock event reasons {reasons})",
             "check its cooling and power: nvidia-smi -q -d PERFORMANCE"),
            (errors.isdigit() and int(errors) > 0, f"{found}: {errors} uncorrected ECC errors",
             "nvidia-smi -r, or exclude the node and report it")],
        )  # fmt: skip
    if table.returncode or not table.stdout.strip():
        advice = "load the driver (modprobe nvidia), reboot after an update of it, or set run.device=cpu"
        yield fail("gpu", f"nvidia-smi: {(table.stdout + table.stderr).strip() or 'no GPU'}", advice)
        return
    holding = _nvidia_smi("--query-compute-apps=pid,process_name,used_memory").stdout.splitlines()
    holders = [f"process {row.strip()}{_owner(row.partition(',')[0])}" for row in holding]
    held = (bool(holders), f"held by {'; '.join(holders)}", "end it, or use another GPU (CUDA_VISIBLE_DEVICES)")
    yield from judge("gpu users", "no other process", [held])


def _nvidia_smi(query: str) -> "subprocess.CompletedProcess[str]":
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=GPU_LIMIT_S)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer within {GPU_LIMIT_S:.0f} s: the driver hangs")


def _owner(pid: str) -> str:
    """Whose process it is; empty where it is not visible, as in a container."""
    try:
        return f" of {pwd.getpwuid((PROC / pid).stat().st_uid).pw_name}"
    except (OSError, KeyError):
        return ""


CHECKS = (versions, compiler, cpu, memory, limits, clock, host_name, gpus)
