"""What ranks tell each other when one of them is gone."""

import json
import threading
import time

import pytest
from torch.distributed import HashStore

from pipeline.launch import Placement
from pipeline.machine import watch
from pipeline.machine.watch import Watch


@pytest.mark.slow
def test_a_rank_that_calls_the_roll_itself_answers_those_called_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three ranks two lose the third, and both call the roll: neither may take the other one for lost."""
    monkeypatch.setattr(watch, "ANSWER_S", 2.0)
    store = HashStore()
    first, second = (Watch(Placement(rank, 3)) for rank in range(2))
    first._store = second._store = store
    found: list[str] = []
    caller = threading.Thread(target=lambda: found.append(first._call_roll(lost=True)))
    caller.start()
    while not store.check(["answer 1 0"]):
        time.sleep(0.01)
    second._call_roll(lost=True)
    caller.join()
    assert found == ["rank(s) 2 of 3 did not respond: stopped, killed, or the node is lost"]


@pytest.mark.slow
def test_a_rank_that_waits_for_answers_answers_those_called_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other order: this one's own roll is the first, and both wait at the same time for the third."""
    monkeypatch.setattr(watch, "ANSWER_S", 2.0)
    store = HashStore()
    first, second = (Watch(Placement(rank, 3)) for rank in range(2))
    first._store = second._store = store
    found: list[str] = []
    caller = threading.Thread(target=first._call_roll)
    caller.start()
    while not store.check(["answer 1 0"]):
        time.sleep(0.01)
    found.append(second._call_roll(lost=True))
    caller.join()
    assert found == ["rank(s) 2 of 3 did not respond: stopped, killed, or the node is lost"]


def answer(store: HashStore, rank: int, stack: str) -> None:
    doing = {"doing": "step 7", "limit_s": 5.0, "waits": True, "since": 0.0, "late": True}
    doing |= {"stack": stack, "collectives": f"of rank {rank}"}
    store.set(f"answer 1 {rank}", json.dumps(doing))


@pytest.mark.parametrize(
    ("stacks", "named"),
    [(["all_reduce"] * 3 + ["forward"], "; rank 3 of 4 is not where the others wait"), (["all_reduce"] * 4, "")],
)
def test_a_rank_that_computes_while_the_others_wait_is_named(
    stacks: list[str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, caller = HashStore(), Watch(Placement(0, 4))
    caller._store = store
    for rank, stack in enumerate(stacks):
        answer(store, rank, stack)
    monkeypatch.setattr(caller, "_answer", lambda roll: None)
    assert caller._call_roll() == f"all ranks have spent more than 5 s in step 7 (parallel.timeout_s){named}"


def test_what_nccl_has_not_finished_is_told_but_does_not_tell_ranks_apart(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a CPU: torch's function is there in builds with NCCL alone."""
    assert watch.active_collectives() == ""
    monkeypatch.setattr(watch.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(watch.dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(watch.distributed_c, "_dump_nccl_trace_json", lambda **_: b"all_reduce 7", raising=False)
    store, caller = HashStore(), Watch(Placement(0, 4))
    caller._store = store
    caller._answer(1)
    own = json.loads(store.get("answer 1 0"))
    assert own["collectives"] == "all_reduce 7" and "all_reduce 7" not in own["stack"]
    for rank in range(4):
        answer(store, rank, "forward" if rank == 3 else "all_reduce")
    monkeypatch.setattr(caller, "_answer", lambda roll: None)
    assert "rank 3 of 4 is not where the others wait" in caller._call_roll()
    told = [record.getMessage() for record in caplog.records]
    assert told == ["rank(s) 0, 1, 2, in step 7:\nall_reduceof rank 0", "rank(s) 3, in step 7:\nforwardof rank 3"]
