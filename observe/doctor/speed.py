"""What torch sees and how fast it is: matrix products against what such hardware should do, and an
all-reduce between two real ranks of torchrun.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import pipeline
from observe.doctor import system
from observe.doctor.findings import Finding, fail, judge
from pipeline.machine import fitness
from pipeline.machine.device import MOST_TRIAL_WIDTH, pick_device, pick_dtype
from pipeline.machine.gpus import cores_here, peak_flops

MEASURED_S = 1.0  # for each device, type and number of threads
ROWS = {"cuda": 8192, "cpu": 1024}
# FLOP a cycle of one core, of the slowest CPUs that have the feature: two 256-bit multiply-adds (AVX2, and
# AVX-512 on Zen 4); twice as many in bfloat16; a quarter of the 1,024 of Intel's AMX; two 128-bit ones on ARM.
FLOP_PER_CYCLE = {
    "float32": {"avx512f": 32, "avx2": 32, "asimd": 16},
    "bfloat16": {"amx_bf16": 256, "avx512_bf16": 64, "bf16": 32},
}
# Parts of those that a healthy machine passes: of a core's, of a GPU's peak, of what a core does
# alone when all compute (two hyperthreads share one unit), of the time that a thread gets.
LEAST_OF_CORE, LEAST_OF_GPU, LEAST_SHARED, LEAST_OF_TIME = 0.5, 0.5, 0.4, 0.9
LEAST_GB_PER_S = {"cpu": 0.2, "cuda": 5.0}  # PCIe 3 gives 10
RANKS_LIMIT_S = 75.0
OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
RANK = """
from pipeline import log
from pipeline.machine import fitness, ranks
log.configure()
world = ranks.start({device!r})
speed = fitness.all_reduce_gb_per_s(world, ["all"] * world.size)
if world.is_first:
    print("all-reduce", speed, flush=True)
ranks.stop()
"""


def examine() -> Iterator[Finding]:
    """What torch sees, right results, speed, and an all-reduce over gloo, and over NCCL on two GPUs."""
    device = pick_device("auto")
    dtype, why = pick_dtype("auto", device, n_embd=MOST_TRIAL_WIDTH)
    count = torch.cuda.device_count()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none"  # type: ignore[no-untyped-call]
    found = f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, NCCL {nccl}, {count} GPU(s)"
    yield from judge(
        "torch", f"{found}; run.device=auto is {device}, run.dtype=auto {str(dtype).removeprefix('torch.')}: {why}",
        [(not count and Path("/dev/nvidia0").exists(), f"{found}: it sees none of this machine's GPUs",
         "install a torch built for the driver's CUDA, and check CUDA_VISIBLE_DEVICES")],
    )  # fmt: skip
    for each in [torch.device("cpu"), *(torch.device("cuda", number) for number in range(count))]:
        if not fitness.multiplies_right(each):
            yield fail("matrix product", f"wrong on {each}", "do not train on it: exclude the node and report it")
    torch.set_num_threads(cores_here())
    yield from _cpu_speed(
        [torch.float32, dtype] if (dtype, device.type) == (torch.bfloat16, "cpu") else [torch.float32]
    )
    for number in range(count):
        yield from _gpu_speed(torch.device("cuda", number))
    for kind in ("cpu", "cuda") if count > 1 else ("cpu",):
        yield from _all_reduce(kind)


def _flops(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of the fastest of many matrix products, and CPU seconds by seconds that they all took."""
    rows = ROWS[device.type]
    left, right = torch.randn(2, rows, rows, device=device).to(dtype)
    started, began_cpu_s, fastest_s = time.perf_counter(), time.process_time(), float("inf")
    while time.perf_counter() - started < MEASURED_S or fastest_s == float("inf"):
        began = time.perf_counter()
        result = left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest_s = min(fastest_s, time.perf_counter() - began)
    del result
    return 2 * rows**3 / fastest_s, (time.process_time() - began_cpu_s) / (time.perf_counter() - started)


def _cpu_speed(dtypes: list[torch.dtype]) -> Iterator[Finding]:
    """Of one core, and of all together."""
    threads, throttled, flags = torch.get_num_threads(), system.throttled(), system.cpu_features()
    clock = re.search(r"^cpu MHz\s*:\s*([\d.]+)", system.text_of(system.PROC / "cpuinfo"), re.MULTILINE)
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        torch.set_num_threads(1)
        alone, share = _flops(torch.device("cpu"), dtype)
        torch.set_num_threads(threads)
        together, share_of_all = _flops(torch.device("cpu"), dtype) if threads > 1 else (alone, share)
        per_cycle = next((flop for feature, flop in FLOP_PER_CYCLE[name].items() if feature in flags), 0)
        expected = LEAST_OF_CORE * per_cycle * float(clock[1]) * 1e6 if clock else 0.0
        busy = min(share, share_of_all / threads)
        throttled, before = system.throttled(), throttled
        found = f"{name}: {alone / 1e9:,.0f} GFLOP/s a core, {together / 1e9:,.0f} on {threads} thread(s)"
        yield from judge(
            "cpu speed", f"{found}; expected {expected / 1e9:,.0f} a core or more",
            [(busy < LEAST_OF_TIME, f"{found}: busy, threads got {busy:.0%} of their cores' time", "see top for what else runs"),
            (throttled > before, f"{found}: throttled while it was measured", "check its cooling and CPU quota"),
            (alone < expected, f"{found}: a core of this kind does {expected / 1e9:,.0f} or more",
             "busy, throttled, or a virtual machine on an overcommitted host"),
            (busy >= LEAST_OF_TIME and together < LEAST_SHARED * threads * alone, f"{found}: cores slow each other down",
             "busy, or too little memory bandwidth or power for all: try fewer threads (OMP_NUM_THREADS)")],
        )  # fmt: skip


def _gpu_speed(device: torch.device) -> Iterator[Finding]:
    name = torch.cuda.get_device_name(device)
    speed, peak = _flops(device, torch.bfloat16)[0], peak_flops(name)
    known = f"peak {peak / 1e12:,.0f}" if peak else "peak unknown"
    found = f"{device} {name}: {speed / 1e12:,.0f} TFLOP/s in bfloat16, {known}"
    slow = (speed < LEAST_OF_GPU * (peak or 0), f"{found}: busy or throttled",
            "see nvidia-smi for its processes, temperature and power limit")  # fmt: skip
    yield from judge("gpu speed", found, [slow])


def _all_reduce(device: str) -> Iterator[Finding]:
    """Between two ranks that torchrun starts, as it starts a run's."""
    name = f"all-reduce ({device})"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python",
        sys.executable, "-c", RANK.format(device=device),
    ]  # fmt: skip
    # One thread: two ranks share the cores.
    paths = f"{pipeline.HOME}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    kept = {name: value for name, value in os.environ.items() if name not in OF_A_LAUNCHER}
    environment = kept | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True, errors="replace"
    )
    try:
        out, err = launcher.communicate(timeout=RANKS_LIMIT_S)
    except subprocess.TimeoutExpired:
        launcher.terminate()  # torchrun ends its ranks
        out, err = "", f"error: no result within {RANKS_LIMIT_S:.0f} s"
    if not (speed := re.search(r"^all-reduce (\S+)$", out, re.MULTILINE)):
        lines = [line for line in err.splitlines() if re.search(r"\berror\b|Error", line)] or ["no result"]
        advice = "check the host name and firewall; try GLOO_SOCKET_IFNAME=lo, or NCCL_DEBUG=INFO on GPUs"
        yield fail(name, f"two ranks cannot exchange gradients: {lines[0][:300]}", advice)
        return
    found, gb_per_s = f"two ranks, {float(speed[1]):.2f} GB/s", float(speed[1])
    if not gb_per_s:
        yield fail(name, "the sums of two ranks are wrong", "do not train on this machine: exclude and report it")
        return
    yield from judge(
        name, found, [(gb_per_s < LEAST_GB_PER_S[device], f"{found}: slow",
        "the machine is busy, or GPUs talk over the host: nvidia-smi topo -m, NCCL_P2P_DISABLE unset")],
    )  # fmt: skip
