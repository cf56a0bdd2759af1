"""Where the ranks of srun's step meet: rank 0 listens on a port, and the others find out which. No torch.

The ports that may be taken are the same on every rank. Rank 0 listens on the first that is free, and
keeps the socket: torch's store continues on it, so no other program can take the port in between.
The others try one after the other. A listener counts only if it answers with the step's key: another
job, or any other program of the node, may hold the first ports.
"""

import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

from pipeline import launch
from pipeline.errors import UserError
from pipeline.launch import Placement
from pipeline.log import logger

# The kernel assigns ports from 32768 on to outgoing connections.
FIRST_PORT, PORTS, PORTS_PER_JOB = 20000, 12000, 16
# How many are tried. The distance is prime, so that the second of a job is not the first of the next.
TRIES, DISTANCE = 8, 1009
# Nodes may start minutes apart, because of a prolog or of a disk that is slow to load Python. Rank 0
# waits longer: a rank that cannot reach it reports that itself.
REACH_S, WELCOME_S = 120.0, 1800.0
RETRY_S = 0.5
# For one message of the handshake.
ANSWER_S = 5.0
# Equal for the tasks of one step; srun's own port tells apart two clusters that both have this job.
KEY = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "SLURM_LAUNCH_NODE_IPADDR", "SLURM_STEP_LAUNCHER_PORT")


@dataclass(frozen=True)
class Meeting:
    """The address at which the ranks meet; rank 0 has the socket that listens there."""

    host: str
    port: int
    listener: socket.socket | None = None


@cache
def meeting() -> Meeting:
    """This process's meeting, for which all ranks of the step come once. Raises UserError."""
    return meet(launch.placement())


def check_nodes() -> None:
    """Raises a UserError that names a node of srun's step which cannot resolve, or reach, the first
    one. Before torch is imported, so that nodes are here soon: torch would wait for half an hour,
    then name neither node.
    """
    if launch.placement().by_srun:
        meeting()


def meet(place: Placement, *, reach_s: float = REACH_S, welcome_s: float = WELCOME_S) -> Meeting:
    """Wait for all ranks. Raises a UserError that names the node, or the ranks, that fail to come."""
    host = os.environ.get("MASTER_ADDR") or launch.first_host(os.environ["SLURM_STEP_NODELIST"])
    ports = candidate_ports()
    try:
        socket.getaddrinfo(host, ports[0], type=socket.SOCK_STREAM)
    except OSError as error:
        if place.rank == 0:
            # srun exits with the highest code of its tasks: 143 for one that SIGTERM ends while it
            # starts, so the others get the time for that.
            time.sleep(4 * RETRY_S)
        launch.wait_for_turn()  # the first node may not know its name either
        raise UserError(
            f"node {launch.node_name()} cannot resolve {host!r}, where the ranks meet ({error.strerror}): "
            "set MASTER_ADDR to an address of the first node that every node reaches"
        ) from None
    if place.rank:
        return Meeting(host, _find(host, ports, rank=place.rank, patience_s=reach_s))
    listener = _listen(ports)
    port: int = listener.getsockname()[1]
    logger.info("waiting for %d ranks of srun at %s:%d", place.size, host, port)
    _welcome(listener, set(range(1, place.size)), welcome_s)
    return Meeting(host, port, listener)


def candidate_ports() -> list[int]:
    """The ports to try, in order: the user's, or those of this start and step of the job, because the
    last one may still hold its own.
    """
    if port := os.environ.get("MASTER_PORT"):
        return [int(port)]
    job, step, start = (int(os.environ.get(name) or 0) for name in KEY[:3])
    first = job * PORTS_PER_JOB + step + start
    return [FIRST_PORT + (first + number * DISTANCE) % PORTS for number in range(TRIES)]


def _key() -> bytes:
    return "pipeline {}\n".format(" ".join(os.environ.get(name, "-") for name in KEY)).encode()


def _listen(ports: list[int]) -> socket.socket:
    """A socket that listens on the first free port, for IPv4 and IPv6."""
    dual_stack = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual_stack else socket.AF_INET
    for port in ports:
        try:
            return socket.create_server(("", port), family=family, dualstack_ipv6=dual_stack, backlog=1024)
        except OSError as error:
            why = os.strerror(error.errno or 0)
            logger.info("port %d of node %s is unavailable (%s)", port, launch.node_name(), why)
    listed = ", ".join(map(str, ports))
    raise UserError(f"port {listed} of node {launch.node_name()} is unavailable: set MASTER_PORT to a free one")


def _welcome(listener: socket.socket, missing: set[int], patience_s: float) -> None:
    """Answer until all of these ranks have come."""
    deadline = time.monotonic() + patience_s
    while missing:
        listener.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            ranks = ", ".join(map(str, sorted(missing)))
            raise UserError(
                f"rank {ranks} did not start within {patience_s:.0f} s: see what its node reports"
            ) from None
        connection.settimeout(ANSWER_S)
        # Suppressed: a port scan, or a rank of another job.
        with suppress(OSError, ValueError), connection, connection.makefile("rwb") as stream:
            if stream.readline(1024) == _key():
                rank = int(stream.readline(1024))
                stream.write(_key())
                stream.flush()
                # The guest has the answer, and closes first: the side that does so keeps the port
                # busy for a while.
                if stream.read() == b"here\n":
                    missing.discard(rank)
    listener.settimeout(None)


def _find(host: str, ports: list[int], *, rank: int, patience_s: float) -> int:
    """The port on which rank 0 of this step answers, retrying for so long."""
    deadline = time.monotonic() + patience_s
    while True:
        reasons = []
        for port in ports:
            try:
                _knock(host, port, rank)
                return port
            except OSError as error:
                reasons.append(str(error))
        if time.monotonic() + RETRY_S > deadline:
            launch.outlive_others()
            raise UserError(
                f"node {launch.node_name()} cannot reach {host}:{ports[0]}, where the ranks meet ({reasons[0]}): set MASTER_ADDR "
                "to an address of the first node in a network that all nodes share, and open the nodes' ports to each other"
            )
        time.sleep(RETRY_S)


def _knock(host: str, port: int, rank: int) -> None:
    """Raises OSError unless rank 0 of this step listens there."""
    connection = socket.create_connection((host, port), timeout=ANSWER_S)
    with connection, connection.makefile("rwb") as stream:
        stream.write(_key() + b"%d\n" % rank)
        stream.flush()
        if stream.readline(1024) != _key():
            raise OSError("another program listens there")
        stream.write(b"here\n")
        stream.flush()
