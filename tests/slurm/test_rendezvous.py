"""Nodes that find each other before torchrun starts, and the one line about one that cannot."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from slurm_cluster import free_ports

from pipeline import rendezvous
from pipeline.errors import UserError


@pytest.fixture(autouse=True)
def node_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")


def test_nodes_that_begin_in_any_order_learn_their_own_addresses() -> None:
    endpoint = f"127.0.0.1:{free_ports(1)[0]}"
    with ThreadPoolExecutor(3) as nodes:  # the host is the last to begin
        found = list(nodes.map(lambda node: rendezvous.check(endpoint, node, 3), (2, 1, 0)))
    assert found == ["127.0.0.1"] * 3


def test_a_node_alone_waits_for_nobody_and_leaves_the_port_free() -> None:
    endpoint = f"localhost:{free_ports(1)[0]}"
    assert rendezvous.check(endpoint, 0, 1) in ("127.0.0.1", "::1")
    assert rendezvous.check(endpoint, 0, 1) in ("127.0.0.1", "::1")


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_nodes_that_reach_each_other_by_ipv6_alone_do_so() -> None:
    endpoint = f"::1:{free_ports(1)[0]}"
    with ThreadPoolExecutor(2) as nodes:
        found = list(nodes.map(lambda node: rendezvous.check(endpoint, node, 2, reach_s=10.0, welcome_s=10.0), (1, 0)))
    assert found == ["::1"] * 2


def test_a_host_that_does_not_resolve_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fails)
    with pytest.raises(UserError, match=r"^node n7 does not find the rendezvous host 'a01'.*RDZV_HOST"):
        rendezvous.check("a01:23456", 1, 2)


def test_a_host_that_cannot_be_reached_is_named_with_its_port() -> None:
    port = free_ports(1)[0]
    with pytest.raises(
        UserError, match=rf"^node n7 cannot reach the rendezvous host 127.0.0.1:{port} .*refused.*RDZV_HOST"
    ):
        rendezvous.check(f"127.0.0.1:{port}", 1, 2, reach_s=0.2)


def test_the_host_does_not_wait_for_ever_for_a_node_that_never_comes() -> None:
    assert rendezvous.check(f"127.0.0.1:{free_ports(1)[0]}", 0, 2, welcome_s=0.2) == "127.0.0.1"


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"^port {port} of node n7 .*in use"):
            rendezvous.check(f"127.0.0.1:{port}", 0, 2)
