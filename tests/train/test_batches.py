"""The thread that reads ahead: the same batches in the same order, errors where they are due, and an end."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config

from pipeline.dataset.mixture import Mixture
from pipeline.errors import UserError
from train.data.batches import AHEAD, Prefetcher

CPU = torch.device("cpu")


class Recorder(Mixture):
    """Notes which batches are made, and on which thread."""

    def batch(self, first_sample: int, samples: int) -> torch.Tensor:
        self.made = [*getattr(self, "made", []), (first_sample, threading.current_thread())]
        return super().batch(first_sample, samples)


def test_batches_come_in_order_and_none_is_made_on_the_training_thread(tiny: Path) -> None:
    mixture = Recorder(tiny_config(tiny))
    batches = Prefetcher(mixture, size=2, stride=4, device=CPU)
    for first in range(0, 40, 4):
        assert (batches.batch(first) == Mixture.batch(mixture, first, 2)).all()
    batches.close()
    assert [first for first, _ in mixture.made] == list(range(0, 4 * len(mixture.made), 4)), "each is made once"
    assert 10 <= len(mixture.made) <= 10 + AHEAD
    assert threading.current_thread() not in {thread for _, thread in mixture.made}
    assert not any(thread.is_alive() for _, thread in mixture.made)


def test_another_sample_than_the_expected_one_is_served_too(tiny: Path) -> None:
    """A resume, a rewind, a window that is skipped."""
    mixture = Mixture(tiny_config(tiny))
    batches = Prefetcher(mixture, size=2, stride=2, device=CPU)
    for first in (0, 2, 0, 0, 2, 100, 102, 51, 4):
        assert (batches.batch(first) == mixture.batch(first, 2)).all()
    batches.close()


def test_an_error_is_raised_as_itself_when_its_batch_is_due_and_not_before(tiny: Path) -> None:
    config = tiny_config(tiny)
    mixture = Mixture(config)
    bad_sample = 10
    (start,) = mixture.sources[0].loader.starts(np.array([bad_sample]))
    path = tiny / "data/tiny" / mixture.sources[0].manifest.splits["train"][0].file
    ids = np.fromfile(path, dtype="<u2")
    ids[start] = 60_000
    ids.tofile(path)
    batches = Prefetcher(Mixture(config), size=1, stride=1, device=CPU)
    for first in range(bad_sample):
        batches.batch(first)
    with pytest.raises(UserError, match="holds id 60000, but its vocabulary has 257"):
        batches.batch(bad_sample)
    batches.batch(bad_sample + 1)
    batches.close()


def test_it_can_be_closed_unused_and_leaves_no_thread(tiny: Path) -> None:
    before = threading.active_count()
    batches = Prefetcher(Mixture(tiny_config(tiny)), size=2, stride=2, device=CPU)
    assert threading.active_count() == before, "nothing is read before somebody asks"
    batches.close()
    again = Prefetcher(Mixture(tiny_config(tiny)), size=2, stride=2, device=CPU)
    again.batch(0)
    again.close()
    assert threading.active_count() == before
