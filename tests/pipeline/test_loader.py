"""Windows are a pure function of (seed, sample): shards whose token is its own index make every claim a range check."""

from pathlib import Path

import numpy as np
import pytest
from conftest import write_shard

from pipeline.dataset.shards import Manifest, TokenReader
from pipeline.dataset.windows import Loader, check_length, evaluation_starts, permute, windows_at
from pipeline.errors import UserError


def counting_reader(folder: Path, tokens: int, shard_tokens: int = 10**9) -> TokenReader:
    """A split whose i-th token is i, so a window shows where it was read."""
    folder.mkdir(exist_ok=True)
    shard_tokens = min(shard_tokens, tokens)
    shards = [
        write_shard(folder, "train", number, np.arange(start, min(start + shard_tokens, tokens)))
        for number, start in enumerate(range(0, tokens, shard_tokens))
    ]
    splits = {"train": shards, "val": shards}
    tokenizer = {"name": "byte", "vocab_size": 65_536}
    return TokenReader(folder, Manifest(tokenizer, "uint16", splits, [], {}, {}, {}, "test"), "train")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
@pytest.mark.parametrize("key", [0, 12345, 2**64 - 1])
def test_permute_visits_every_index_once(size: int, key: int) -> None:
    assert sorted(permute(np.arange(size, dtype=np.uint64), size, key).tolist()) == list(range(size))


def test_permute_looks_random_and_depends_on_the_key() -> None:
    size = 10_000
    order = permute(np.arange(size, dtype=np.uint64), size, 1).astype(np.int64)
    other = permute(np.arange(size, dtype=np.uint64), size, 2).astype(np.int64)
    # For a random permutation: correlation about 0 +- 1/sqrt(size), about one fixed point, neighbours far apart.
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.05
    assert (order == np.arange(size)).sum() < 10 and (order == other).sum() < 10
    assert np.abs(np.diff(order)).mean() == pytest.approx(size / 3, rel=0.05)


def test_permute_needs_no_table_at_a_trillion() -> None:
    size = 10**12
    images = permute(np.arange(1000, dtype=np.uint64) + np.uint64(size - 1000), size, 3)
    assert len(set(images.tolist())) == 1000 and images.max() < size


def test_a_window_is_a_block_and_the_token_after_it(tmp_path: Path) -> None:
    windows = Loader(counting_reader(tmp_path, 1000), block_size=16, seed=1).batch(np.arange(8))
    assert windows.shape == (8, 17)
    assert (windows[:, 1:] == windows[:, :-1] + 1).all()


def test_windows_cross_shard_borders_unharmed(tmp_path: Path) -> None:
    whole = Loader(counting_reader(tmp_path / "whole", 1000), 16, seed=1)
    cut = Loader(counting_reader(tmp_path / "cut", 1000, shard_tokens=70), 16, seed=1)
    assert (whole.batch(np.arange(60)) == cut.batch(np.arange(60))).all()


def test_an_epoch_takes_every_window_once_and_the_next_one_in_another_order(tmp_path: Path) -> None:
    loader = Loader(counting_reader(tmp_path, 1000), block_size=16, seed=1)
    epochs = [
        loader.batch(np.arange(epoch * loader.windows, epoch * loader.windows + loader.windows))[:, 0].tolist()
        for epoch in range(3)
    ]
    for starts in epochs:
        gaps = np.diff(sorted(starts))
        assert len(starts) == loader.windows == 61 and (gaps == 16).all()
    assert epochs[0] != epochs[1] != epochs[2]
    assert len({min(starts) for starts in epochs}) > 1, "each epoch should cut the text at another offset"


def test_a_sample_is_the_same_however_it_is_asked_for(tmp_path: Path) -> None:
    loader = Loader(counting_reader(tmp_path, 500), block_size=8, seed=3)
    together = loader.batch(np.arange(200))
    for first, count in ((0, 1), (13, 7), (60, 65), (199, 1)):  # 61 windows: these cross epochs
        assert (loader.batch(np.arange(first, first + count)) == together[first : first + count]).all()


def test_another_seed_is_another_order(tmp_path: Path) -> None:
    reader = counting_reader(tmp_path, 1000)
    assert (Loader(reader, 16, seed=1).batch(np.arange(32)) != Loader(reader, 16, seed=2).batch(np.arange(32))).any()


def test_the_smallest_dataset_is_one_block_and_a_target(tmp_path: Path) -> None:
    assert Loader(counting_reader(tmp_path / "fits", 17), 16, seed=0).batch(np.arange(5, 6)).tolist() == [
        list(range(17))
    ]
    with pytest.raises(UserError, match=r"has 16 tokens, fewer than one block of 16.*lower model.block_size"):
        Loader(counting_reader(tmp_path / "short", 16), 16, seed=0)


def test_evaluation_windows_are_fixed_and_spread_over_the_split(tmp_path: Path) -> None:
    reader = counting_reader(tmp_path, 1000)
    assert evaluation_starts(reader, 16, windows=0) == list(range(0, 992, 16))
    some = evaluation_starts(reader, 16, windows=10)
    assert len(some) == 10 and some[0] == 0 and some[-1] > 850 and np.diff(some).min() > 80
    assert windows_at(reader, some, 16).tolist() == [list(range(start, start + 17)) for start in some]
    assert len(evaluation_starts(reader, 16, windows=10_000)) == 62


def test_a_val_split_below_one_block_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"split has 10 tokens.*--val-fraction.*eval.every_steps=0"):
        check_length(tmp_path, "val", 10, 16)
