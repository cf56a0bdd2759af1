"""What ranks tell each other when one of them is gone."""

import threading
import time

import pytest
from torch.distributed import HashStore

from pipeline.launch import Placement
from pipeline.machine import watch
from pipeline.machine.watch import Watch


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
