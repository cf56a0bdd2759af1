"""Where the ranks of a step meet: nodes as threads, listeners that are not ours, and steps on a real two-node SLURM."""

import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta

import pytest
from slurm_cluster import TRAIN, Cluster, free_ports, status_of, write_config

from pipeline import launch
from pipeline.errors import UserError
from pipeline.launch import Placement
from pipeline.machine import meeting as meetings
from pipeline.machine.meeting import Meeting, candidate_ports, meet
from pipeline.machine.ranks import _srun_store


@pytest.fixture(autouse=True)
def _step(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_JOB_ID": "70", "SLURM_STEP_ID": "3", "SLURM_STEP_NODELIST": "n[1-2]"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    monkeypatch.setattr(launch, "outlive_others", lambda: None)


def place(rank: int, size: int) -> Placement:
    return Placement(rank, size, 0, 1, by_srun=True)


def gather(monkeypatch: pytest.MonkeyPatch, address: str, ranks: int = 3, **patience: float) -> list[Meeting | str]:
    """Where each rank comes to, or what it reports; the first rank starts last."""
    monkeypatch.setenv("MASTER_ADDR", address)

    def come(rank: int) -> Meeting | str:
        try:
            return meet(place(rank, ranks), **patience)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(ranks) as pool:
        found = list(pool.map(come, reversed(range(ranks))))
    for one in found:
        if isinstance(one, Meeting) and one.listener is not None:
            one.listener.close()
    return found[::-1]


def ports_of(found: list[Meeting | str]) -> list[int]:
    assert all(isinstance(one, Meeting) for one in found), found
    return [one.port for one in found if isinstance(one, Meeting)]


@pytest.fixture
def ports(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Three free ports, which the step may take."""
    found = free_ports(3)
    monkeypatch.setattr(meetings, "candidate_ports", lambda: found)
    return found


def test_ranks_that_start_in_any_order_find_each_other(monkeypatch: pytest.MonkeyPatch, ports: list[int]) -> None:
    assert ports_of(gather(monkeypatch, "127.0.0.1")) == ports[:1] * 3
    assert ports_of(gather(monkeypatch, "localhost", ranks=2)) == ports[:1] * 2


def test_the_ports_are_the_jobs_and_the_users_word_goes_before(monkeypatch: pytest.MonkeyPatch) -> None:
    first = candidate_ports()
    # Below 32768, where the kernel's begin, and others for each step and start.
    assert first[0] == 20000 + (70 * 16 + 3) % 12000 and len(set(first)) == 8
    assert all(20000 <= port < 32000 for port in first)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert candidate_ports()[0] == first[0] + 1
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert candidate_ports() == [29500]


def silent(connection: socket.socket) -> None:
    """Accepts, and never answers."""


def talkative(connection: socket.socket) -> None:
    connection.sendall(b"220 ready\r\n")


def echoing(connection: socket.socket) -> None:
    """As another job's rank 0 might: with a key that is not ours."""
    connection.sendall(b"pipeline 71 3 - - -\n")


def hanging_up(connection: socket.socket) -> None:
    connection.close()


@pytest.fixture(params=[silent, talkative, echoing, hanging_up], ids=lambda answer: answer.__name__)
def foreign(request: pytest.FixtureRequest, ports: list[int], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Listeners that are not ours on the first two ports."""
    monkeypatch.setattr(meetings, "ANSWER_S", 0.2)
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("", port))) for port in ports[:2]]
        kept: list[socket.socket] = []

        def serve(listener: socket.socket) -> None:
            while True:
                try:
                    kept.append(listener.accept()[0])
                    request.param(kept[-1])
                except OSError:
                    return

        for listener in taken:
            threading.Thread(target=serve, args=[listener], daemon=True).start()
        yield
        for listener in taken:
            listener.shutdown(socket.SHUT_RDWR)
        for connection in kept:
            connection.close()


def test_a_port_in_use_tries_the_next_and_a_listener_that_is_not_ours_is_not_taken_for_rank_0(
    monkeypatch: pytest.MonkeyPatch, ports: list[int], foreign: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pipeline")
    assert ports_of(gather(monkeypatch, "127.0.0.1")) == ports[2:] * 3
    assert f"port {ports[0]} of node n7 is unavailable (Address already in use)" in caplog.text


@pytest.mark.slow
def test_two_jobs_whose_ports_are_the_same_find_their_own(monkeypatch: pytest.MonkeyPatch, ports: list[int]) -> None:
    """As on two clusters of one machine, or where the numbers of jobs are 750 apart."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    mine = threading.local()
    monkeypatch.setattr(meetings, "_key", lambda: mine.key)

    def come(task: tuple[int, bytes]) -> Meeting:
        mine.key = task[1]
        return meet(place(task[0], 2))

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(come, [(1, b"a\n"), (1, b"b\n"), (0, b"a\n"), (0, b"b\n")]))
    assert {found[0].port, found[1].port} == set(ports[:2])
    assert (found[0].port, found[1].port) == (found[2].port, found[3].port)
    for one in found[2:]:
        assert one.listener is not None
        one.listener.close()


def test_a_stranger_at_rank_0s_port_is_not_counted(monkeypatch: pytest.MonkeyPatch, ports: list[int]) -> None:
    monkeypatch.setattr(meetings, "ANSWER_S", 0.2)

    def scan() -> None:
        for words in (
            b"",
            b"GET / HTTP/1.0\r\n\r\n",
            b"\xff" * 5000,
            meetings._key() + b"x\n",
            meetings._key() + b"1\n",
        ):
            while True:
                try:
                    with socket.create_connection(("127.0.0.1", ports[0]), timeout=1.0) as connection:
                        connection.sendall(words)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.01)

    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(meet, place(0, 2))
        pool.submit(scan).result()
        assert not first.done()
        assert pool.submit(meet, place(1, 2)).result().port == ports[0]
        listener = first.result().listener
        assert listener is not None
        listener.close()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_nodes_and_ranks_that_reach_each_other_by_ipv6_alone_meet(
    monkeypatch: pytest.MonkeyPatch, ports: list[int]
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "::1")

    def join(rank: int) -> object:
        return _srun_store(place(rank, 2), meet(place(rank, 2), reach_s=10.0, welcome_s=10.0), timedelta(seconds=60))

    with ThreadPoolExecutor(2) as pool:
        stores = list(pool.map(join, (1, 0)))
    stores[0].set("from", "rank 1")
    assert stores[1].get("from") == b"rank 1"


def test_the_port_is_held_until_the_store_takes_it(monkeypatch: pytest.MonkeyPatch, ports: list[int]) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with ThreadPoolExecutor(1) as pool:
        guest = pool.submit(meet, place(1, 2))
        first = meet(place(0, 2))
        with pytest.raises(OSError, match="in use"):
            socket.create_server(("", guest.result().port))
        assert first.listener is not None
        first.listener.close()


def test_a_node_that_cannot_be_reached_is_named_with_the_port(
    monkeypatch: pytest.MonkeyPatch, ports: list[int]
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UserError) as reached:
        meet(place(1, 2), reach_s=0.2)
    assert str(reached.value).startswith(f"node n7 cannot reach 127.0.0.1:{ports[0]}, where the ranks meet (")
    assert "refused" in str(reached.value) and "set MASTER_ADDR" in str(reached.value)


@pytest.mark.slow
def test_a_first_node_that_does_not_resolve_is_named_by_each(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fails)
    monkeypatch.setattr(launch, "wait_for_turn", lambda: None)
    for report in gather(monkeypatch, "a01", ranks=2):
        assert str(report).startswith(
            "node n7 cannot resolve 'a01', where the ranks meet (Name or service not known): set MASTER"
        )


def test_a_rank_that_never_comes_is_named(monkeypatch: pytest.MonkeyPatch, ports: list[int]) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UserError, match=r"^rank 1, 2 did not start within 0 s: see"):
        meet(place(0, 3), welcome_s=0.2)


def test_ports_that_are_all_taken_are_named(ports: list[int]) -> None:
    with ExitStack() as stack:
        for port in ports:
            stack.enter_context(socket.create_server(("", port)))
        with pytest.raises(UserError, match=rf"^port {ports[0]}, .* of node n7 is unavailable: set MASTER_PORT"):
            meetings._listen(ports)


def test_a_process_that_srun_did_not_start_meets_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meetings, "meet", lambda *_: pytest.fail("looked"))
    meetings.check_nodes()


@pytest.mark.slow
def test_a_job_whose_first_ports_are_taken_trains_on_the_next(cluster: Cluster) -> None:
    """Foreign listeners on the first ports of the next job."""
    config = write_config(cluster.folder, "crowded", steps=3)
    held = cluster.submit(TRAIN, "crowded.toml", nodes=2, options=["--hold"])
    first = 20000 + int(held) * 16 % 12000  # of step 0 in start 0
    with ExitStack() as stack:
        for number in range(2):
            stack.enter_context(socket.create_server(("", 20000 + (first - 20000 + number * 1009) % 12000)))
        cluster.call("scontrol", "release", held)
        assert cluster.wait(held)["JobState"] == "COMPLETED", cluster.log(held)
    assert status_of(config.run_dir) == ("done", 3)
    port = 20000 + (first - 20000 + 2 * 1009) % 12000
    assert re.search(rf"^waiting for 2 ranks of srun at 127.0.0.1:{port}$", cluster.log(held), flags=re.MULTILINE)
