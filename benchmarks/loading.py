"""Batches a second of windows of 257 tokens, 16 at a time, when nothing else is done: read ahead by training's prefetcher,
by the memory-mapped loop of a plain trainer, and by torch's DataLoader.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import HERE, Measurement, Options, Sides, main
from benchmarks.step import LARGE, training


class Windows(Dataset[torch.Tensor]):
    """The windows of a shard, one by one, as a tutorial has them."""

    def __init__(self, path: str, block_size: int) -> None:
        self.path, self.block_size = path, block_size
        self.ids = np.memmap(path, dtype=np.uint16, mode="r")

    def __len__(self) -> int:
        return (len(self.ids) - 1) // self.block_size

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.ids[index * self.block_size :][: self.block_size + 1].astype(np.int64))


@contextmanager
def sides(options: Options) -> Iterator[Sides]:
    with training(LARGE, options) as trainer:
        size, block_size = trainer.config.train.micro_batch_size, trainer.config.model.block_size
        count, path = 5 if options.tiny else 2000, str(trainer.mixture.sources[0].folder / "train_00000.bin")
        dataset = Windows(path, block_size)
        loader = DataLoader(dataset, batch_size=size, shuffle=True, num_workers=2, persistent_workers=True)

        def prefetched() -> dict[str, float]:
            began = time.perf_counter()
            for number in range(count):
                trainer.batches.batch(number * size)
            return {"speed": count / (time.perf_counter() - began)}

        def memmap_loop() -> dict[str, float]:
            began = time.perf_counter()
            for _ in range(count):
                starts = torch.randint(len(dataset.ids) - block_size - 1, (size,)).tolist()
                torch.stack([torch.from_numpy(dataset.ids[at : at + block_size].astype(np.int64)) for at in starts])
                torch.stack([torch.from_numpy(dataset.ids[at + 1 :][:block_size].astype(np.int64)) for at in starts])
            return {"speed": count / (time.perf_counter() - began)}

        def data_loader() -> dict[str, float]:
            began, done = time.perf_counter(), 0
            while done < count:
                for _ in loader:
                    done += 1
                    if done == count:
                        break
            return {"speed": count / (time.perf_counter() - began)}

        yield {HERE: prefetched, "plain memmap loop": memmap_loop, "torch DataLoader, 2 workers": data_loader}


MEASUREMENTS = [Measurement("loading.windows", "16 windows of 257 tokens", {"speed": "batches/s"}, sides)]

if __name__ == "__main__":
    main(MEASUREMENTS)
