"""The loss on the val split: the same windows at every evaluation, shared among the ranks."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.keys import Config
from pipeline.dataset.mixture import Mixture
from pipeline.dataset.shards import TokenReader
from pipeline.dataset.windows import evaluation_starts, windows_at
from pipeline.machine.device import autocast
from pipeline.machine.ranks import World
from pipeline.model.language_model import LanguageModel
from train.data.batches import model_inputs
from train.parallel import reshard, should_compile


@dataclass(frozen=True)
class ValLoss:
    """Mean nats per token of each source of the mixture, and `mean`: theirs, weighted by share."""

    mean: float
    by_source: list[float]


class Evaluation:
    """The loss on `eval.tokens` tokens, rounded up to whole windows, spread evenly over the val
    split of each source.
    """

    def __init__(self, config: Config, world: World, mixture: Mixture, dtype: torch.dtype) -> None:
        self.config, self.world, self.mixture, self.dtype = config, world, mixture, dtype
        self.compiled, _ = should_compile(config.run.compile, world.device)
        self.fault: Exception | None = None  # in reading the data, which other ranks may not have
        self.readers = [TokenReader(source.folder, source.manifest, "val") for source in mixture.sources]
        windows = math.ceil(config.eval.tokens / config.model.block_size)
        self.starts = [
            evaluation_starts(reader, config.model.block_size, windows) if config.eval.every_steps else []
            for reader in self.readers
        ]

    @torch.no_grad()
    def run(self, model: LanguageModel) -> ValLoss:
        """All ranks call it together, and all get the result."""
        size = self.config.train.micro_batch_size
        batches = [
            (source, starts[first : first + size])
            for source, starts in enumerate(self.starts)
            for first in range(0, len(starts), size)
        ]
        model.eval()
        totals = torch.zeros(len(self.readers), dtype=torch.float64)
        for first in range(0, len(batches), self.world.size):
            index = first + self.world.rank
            # Gathering sharded weights takes all ranks: one without a batch repeats another, and
            # counts it as 0.
            source, starts = batches[index % len(batches)]
            windows = self.read(source, starts)
            if self.compiled:  # for one size: a short batch would be compiled for again
                windows = F.pad(windows, (0, 0, 0, size - len(starts)))
            with autocast(self.world.device, self.dtype):
                ids, targets, documents = model_inputs(windows, self.config, self.mixture, self.world.device)
                loss = model(ids, targets[: len(starts)], documents).cpu()
            # Weighted by windows, as the last batch of a source may be a short one.
            totals[source] += loss * len(starts) if index < len(batches) else 0
            totals[source] += math.nan if self.fault else 0
        model.train()
        reshard(model)
        # Summed on the device, as NCCL needs it; mps has no float64.
        totals = totals.to(self.world.device, torch.float32 if self.world.device.type == "mps" else None)
        sums = self.world.sum(totals).tolist()
        losses = [total / len(starts) for total, starts in zip(sums, self.starts, strict=True)]
        shares = [source.share for source in self.mixture.sources]
        return ValLoss(sum(share * loss for share, loss in zip(shares, losses, strict=True)), losses)

    def read(self, source: int, starts: list[int]) -> Tensor:
        """Windows (len(starts), block_size + 1). Where they cannot be read, zeros: the other ranks
        expect this one in their collectives.
        """
        try:
            return torch.from_numpy(windows_at(self.readers[source], starts, self.config.model.block_size))
        except Exception as error:
            self.fault = error
            return torch.zeros(len(starts), self.config.model.block_size + 1, dtype=torch.long)
