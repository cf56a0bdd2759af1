"""What a start runs on: the version of the code; and is every node of a SLURM job fit to train on? A few
seconds, on all ranks, before the first step.

A GPU that computes wrong numbers, or a link that lost half its speed, costs days if nobody looks.
"""

import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator

import torch

import pipeline
from pipeline import launch
from pipeline.errors import NodeFailed
from pipeline.files import hash_bytes
from pipeline.log import logger
from pipeline.machine import fitness
from pipeline.machine.ranks import World
from pipeline.machine.watch import Fault

DISK_BYTES = 1 << 20
# A GPU of the job is nobody else's.
LEAST_FREE = 0.8
# All-reduce below this part of the median node's is reported: a link or a switch is degraded.
SLOW = 0.5


def check_nodes(world: World) -> None:
    """Raises NodeFailed on rank 0, and ends the other ranks, if a node is not fit; the message names
    it. The log says how fast the nodes exchange gradients. Outside SLURM nothing is checked.
    """
    if "SLURM_STEP_ID" not in os.environ:
        return
    nodes = world.gather(launch.node_name())
    _refuse(world, nodes, "; ".join(faults_here(world)))
    within, across = (fitness.all_reduce_gb_per_s(world, groups) for groups in (nodes, ["all"] * world.size))
    _refuse(world, nodes, "" if within and across else "an all-reduce gives wrong sums")
    speeds = dict(zip(nodes, world.gather(within), strict=True))
    for node, speed in speeds.items():
        if speed < SLOW * statistics.median(speeds.values()) and world.is_first:
            logger.warning(
                "warning: node %s all-reduces %.2f GB/s, the median node more than twice as much", node, speed
            )
    if world.size > 1:
        logger.info(
            "node check: %d node(s) fit, all-reduce %.2f GB/s within, %.2f GB/s over all", len(speeds), within, across
        )


def _refuse(world: World, nodes: list[str], fault: str) -> None:
    """If any rank has a fault, every rank exits."""
    faults = {node: why for node, why in zip(nodes, world.gather(fault), strict=True) if why}
    if faults:
        error = NodeFailed("; ".join(f"node {node} failed its check: {why}" for node, why in faults.items()))
        world.leave_to(Fault.of(error))
        raise error


def faults_here(world: World) -> Iterator[str]:
    """What is wrong with this rank's device, or its node's memory or disk."""
    if world.device.type == "cuda":
        seen, asked = torch.cuda.device_count(), launch.gpus_here()
        if seen not in (1, asked):  # one: bound to this rank by --gpus-per-task
            yield f"{seen} GPU(s) where SLURM allocated {asked}"
        free, total = torch.cuda.mem_get_info(world.device)
        if free < LEAST_FREE * total:
            yield f"{world.device} has {free >> 20:,} of {total >> 20:,} MiB free: another process uses it"
    if not fitness.multiplies_right(world.device):
        yield f"a matrix product on {world.device} is wrong"
    if (available := fitness.available_bytes()) < fitness.LEAST_HOST_BYTES:
        yield f"{available >> 20:,} MiB of host memory available, expected {fitness.LEAST_HOST_BYTES >> 20} at least"
    try:
        with tempfile.TemporaryFile() as file:
            file.write(bytes(DISK_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        yield f"cannot write to {tempfile.gettempdir()}: {error.strerror}"


def code_version() -> str:
    """The release, the commit in a checkout, and a hash of the sources, which may differ from it."""
    sources = sorted(path for package in ("pipeline", "train") for path in (pipeline.HOME / package).rglob("*.py"))
    digest = hash_bytes(b"".join(path.read_bytes() for path in sources))[:12]
    try:
        command = ["git", "-C", str(pipeline.HOME), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # a container without git
        commit = ""
    return f"{pipeline.__version__} commit {commit or 'unknown'} sources {digest}"
