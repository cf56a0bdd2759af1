"""Mixtures: whose turn it is follows from the sample's number alone, and the shares hold in every batch."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config, write_dataset, write_documents, write_llm_c, write_nanogpt

from pipeline.config.keys import Config, WeightedDataset
from pipeline.dataset.mixture import PERIOD, Mixture, apportion, spread
from pipeline.errors import UserError
from pipeline.machine.ranks import World
from train.run import assemble


def mixed_config(folder: Path, *weights: float, **sections: dict[str, object]) -> Config:
    """A config over data/s0, data/s1 ..., each twice as large as the one before."""
    for number in range(len(weights)):
        write_dataset(folder / "data" / f"s{number}", train_tokens=2000 << number, seed=number)
    config = tiny_config(folder, **sections)
    entries = tuple(WeightedDataset(f"s{number}", weight) for number, weight in enumerate(weights))
    return replace(config, data=replace(config.data, mixture=entries))


@pytest.mark.parametrize(
    "weights", [[1.0], [0.7, 0.3], [7.0, 3.0], [1.0, 1.0, 1.0], [0.9, 0.0999, 0.0001], [1e308, 1e308]]
)
def test_turns_are_the_weights_to_a_ten_thousandth(weights: list[float]) -> None:
    turns = apportion(weights)
    assert sum(turns) == PERIOD
    scaled = [weight / max(weights) for weight in weights]
    assert np.abs(np.array(turns) / PERIOD - np.array(scaled) / sum(scaled)).max() < 1 / PERIOD
    if weights == [0.7, 0.3]:
        assert turns == [7000, 3000]


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.3], [1, 1, 1], [0.9, 0.0999, 0.0001], [0.4, 0.25, 0.2, 0.1, 0.05]])
def test_shares_hold_in_any_period_and_nearly_so_in_any_batch(weights: list[float]) -> None:
    turns = apportion(weights)
    sources, before = spread(turns)
    own = np.tile(sources, 2) == np.arange(len(turns))[:, None]
    counts = np.concatenate([np.zeros((len(turns), 1)), np.cumsum(own, axis=1)], axis=1)
    assert (counts[:, PERIOD:] - counts[:, :-PERIOD] == np.array(turns)[:, None]).all()
    assert (before == counts[:, :PERIOD]).all()
    for length in (1, 8, 100, 512, 4097):
        expected = length * np.array(turns)[:, None] / PERIOD
        assert np.abs(counts[:, length:] - counts[:, :-length] - expected).max() < len(turns)


def test_each_source_is_gone_through_in_its_own_order_without_gaps(tmp_path: Path) -> None:
    mixture = Mixture(mixed_config(tmp_path, 0.5, 0.3, 0.2))
    sources, own = mixture.locate(np.arange(3 * PERIOD))
    for number, source in enumerate(mixture.sources):
        assert (own[sources == number] == np.arange(3 * source.turns)).all()
    for samples in (0, 1, 777, PERIOD, 2 * PERIOD + 12_3):
        assert mixture.samples_of(samples) == [int((sources[:samples] == number).sum()) for number in range(3)]


def test_a_batch_is_its_samples_however_they_are_asked_for(tmp_path: Path) -> None:
    mixture = Mixture(mixed_config(tmp_path, 0.6, 0.4))
    first = PERIOD - 20  # across a period's end
    together = mixture.batch(first, 40)
    assert (np.concatenate([mixture.batch(first + at, 1) for at in range(40)]) == together).all()
    sources, own = mixture.locate(np.arange(first, first + 40))
    for row, source, sample in zip(together, sources, own, strict=True):
        assert (mixture.sources[source].loader.batch(np.array([sample]))[0] == row).all()
    far = 10**15
    assert mixture.batch(far, 4).shape == (4, 17), "any step is as near as the first"


def test_an_epoch_of_each_source_takes_its_windows_once_and_the_next_in_another_order(tmp_path: Path) -> None:
    mixture = Mixture(mixed_config(tmp_path, 0.5, 0.5))
    orders = []
    for source in mixture.sources:
        windows = source.loader.windows
        epochs = [source.loader.starts(np.arange(epoch * windows, (epoch + 1) * windows)) for epoch in range(2)]
        assert all(len(set(starts)) == windows for starts in epochs)
        assert epochs[0] != epochs[1]
        orders.append(epochs[0])
    assert orders[0] != orders[1][: len(orders[0])], "each source has a key of its own"


def test_the_seed_changes_the_order_and_never_the_shares(tmp_path: Path) -> None:
    one = mixed_config(tmp_path, 0.6, 0.4)
    ours, other = Mixture(one), Mixture(replace(one, run=replace(one.run, seed=99)))
    assert (ours.locate(np.arange(100))[0] == other.locate(np.arange(100))[0]).all()
    assert not (ours.batch(0, 50) == other.batch(0, 50)).all()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_global_batch_is_the_same_on_every_number_of_ranks(tmp_path: Path, size: int) -> None:
    """Each rank's micro-batches, put in the places they have in the global batch."""
    config = mixed_config(tmp_path, 0.7, 0.3)
    wanted = torch.from_numpy(Mixture(config).batch(3 * 8, 8))
    found = torch.empty_like(wanted)
    for rank in range(size):
        world = World(rank, size, local_size=1, device=torch.device("cpu"))  # more would take threads from later tests
        trainer, _ = assemble(config, world, Mixture(config), (torch.float32, "as configured"))
        trainer.step = 3
        for number in range(trainer.accumulation):
            first = (number * size + rank) * 2
            found[first : first + 2] = trainer.micro_batch(number)
    assert (found == wanted).all()


def test_progress_is_tokens_and_epochs_of_each_source(tmp_path: Path) -> None:
    mixture = Mixture(mixed_config(tmp_path, 0.7, 0.3))
    progress = mixture.progress(1000)
    assert {name: tokens for name, (tokens, _) in progress.items()} == {"s0": 700 * 16, "s1": 300 * 16}
    assert progress["s0"][1] == pytest.approx(700 / mixture.sources[0].loader.windows)
    assert progress["s0"][1] > 5 and progress["s1"][1] < 2


def test_a_single_dataset_is_a_mixture_of_one(tmp_path: Path) -> None:
    mixed = Mixture(mixed_config(tmp_path, 1.0))
    alone = Mixture(tiny_config(tmp_path, data={"dataset": "s0"}))
    assert (mixed.batch(5, 20) == alone.batch(5, 20)).all()
    assert mixed.fingerprint == alone.fingerprint == alone.sources[0].manifest.fingerprint


def test_the_fingerprint_covers_every_source_and_weight(tmp_path: Path) -> None:
    found = [
        Mixture(mixed_config(tmp_path, *weights)).fingerprint
        for weights in ((0.7, 0.3), (7, 3), (0.6, 0.4), (0.7,), (0.4, 0.3, 0.3))
    ]
    assert found[0] == found[1], "the same shares are the same mixture"
    assert len(set(found)) == 4
    write_dataset(tmp_path / "data" / "s1", train_tokens=4000, seed=77)
    config = tiny_config(tmp_path, data={"mixture": [{"dataset": "s0", "weight": 7}, {"dataset": "s1", "weight": 3}]})
    assert Mixture(config).fingerprint != found[0], "another text under the same name"


def test_shards_of_other_programs_are_sources_too(tmp_path: Path) -> None:
    folders = [write_nanogpt(tmp_path / "ng"), write_llm_c(tmp_path / "lc")]
    entries = [{"dataset": str(folder), "weight": 1} for folder in folders]
    mixture = Mixture(tiny_config(tmp_path, data={"mixture": entries}))
    assert [source.manifest.program for source in mixture.sources] == ["nanoGPT", "llm.c"]
    assert mixture.batch(0, 4).max() < 50257


def test_sources_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    config = mixed_config(tmp_path, 0.5, 0.5)
    other = write_nanogpt(tmp_path / "other")

    def refused(*entries: tuple[str, float]) -> str:
        mixture = tuple(WeightedDataset(dataset, weight) for dataset, weight in entries)
        with pytest.raises(UserError) as caught:
            Mixture(replace(config, data=replace(config.data, mixture=mixture)))
        return str(caught.value)

    assert "other has the vocabulary gpt2 (50,257 tokens, end-of-text token 50256), but" in refused(
        ("s0", 1), (str(other), 1)
    )
    assert "hold the same tokens: list it once" in refused(("s0", 1), (str(tmp_path / "data/s0"), 1))
    assert "gives 's1' less than one sample in 10,000" in refused(("s0", 1), ("s1", 1e-5))
    assert "no dataset at" in refused(("s0", 1), ("nowhere", 1))
    write_documents(tmp_path / "data" / "short", {"train": [["ab"]], "val": [["cd"]]})
    assert "short's train split has 3 tokens, fewer than one block" in refused(("s0", 1), ("short", 1))
