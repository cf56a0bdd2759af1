"""Before torchrun starts: can this node find, and reach, the host where the nodes of a job meet?

    python -m pipeline.rendezvous HOST:PORT     as one task a node of a SLURM step; the first node is the host

Prints the address under which the other nodes reach this one. torchrun itself waits ten minutes for a host that it cannot
reach, and then shows a traceback that names neither host nor node. Imports nothing large: nodes should be here soon.
"""

import os
import socket
import sys
import time

from pipeline import launch, log
from pipeline.errors import EXIT_USER, UserError

# Nodes may begin apart: a prolog, a disk that is slow to hand out Python. The host stays for those that begin last.
REACH_S = 120.0
WELCOME_S = REACH_S + 60.0
RETRY_S = 0.5


def check(endpoint: str, node: int, nodes: int, reach_s: float = REACH_S, welcome_s: float = WELCOME_S) -> str:
    """The address of this node, the `node`-th of `nodes`, on the way between it and the host. Raises UserError."""
    host, _, port = endpoint.rpartition(":")
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise UserError(
            f"node {launch.node_name()} does not find the rendezvous host {host!r} ({error.strerror}): set RDZV_HOST to "
            "a name or address of the job's first node that all its nodes find"
        ) from None
    own = str(found[0][4][0])
    return welcome(int(port), nodes - 1, welcome_s) or own if node == 0 else reach(host, int(port), reach_s)


def welcome(port: int, guests: int, patience_s: float) -> str:
    """Be there until so many nodes have come, at most so long; where they came to, empty where none did.

    One that cannot come says so itself, and ends the step; here it is only waited for.
    """
    deadline, came_to = time.monotonic() + patience_s, ""
    try:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        listener = socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise UserError(
            f"port {port} of node {launch.node_name()} is not to be had ({error.strerror}): submit again, each job has its own"
        ) from None
    with listener:
        for _ in range(guests):
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                break
            with connection:
                came_to = connection.getsockname()[0].removeprefix("::ffff:")
                connection.settimeout(RETRY_S)
                try:
                    connection.recv(1)  # the guest goes first: the side that does keeps the port busy for a while
                except OSError:
                    continue
    return came_to


def reach(host: str, port: int, patience_s: float) -> str:
    """Connect to the host, trying for so long; returns this node's address on that way."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.001)) as connection:
                return str(connection.getsockname()[0])
        except OSError as error:
            if time.monotonic() + RETRY_S > deadline:
                raise UserError(
                    f"node {launch.node_name()} cannot reach the rendezvous host {host}:{port} ({error}): set RDZV_HOST to "
                    "an address of the job's first node in the network that the nodes share, and let them reach each "
                    "other's ports"
                ) from None
        time.sleep(RETRY_S)


def main() -> None:
    log.configure()
    try:
        address = check(sys.argv[1], int(os.environ["SLURM_NODEID"]), int(os.environ["SLURM_JOB_NUM_NODES"]))
    except UserError as error:
        log.logger.error("error: %s", error)
        sys.exit(EXIT_USER)
    sys.stdout.write(f"{address}\n")


if __name__ == "__main__":
    main()
