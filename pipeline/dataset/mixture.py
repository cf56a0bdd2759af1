"""The datasets of a run -> batches, as a pure function of (seed, step): the whole state is the step
number.

    global sample i  --i modulo PERIOD-->  (source, that source's sample j)  --loader-->  window

Which source is next follows from i alone: a table of PERIOD turns, repeated forever, in which each
source has its share, spread evenly. So the shares hold in every batch and not only in the long run,
any sample is found in O(1), and each source goes through its epochs independently of the others. A
single dataset is a mixture of one.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config.keys import Config
from pipeline.dataset.shards import Manifest, TokenReader, load_manifest
from pipeline.dataset.windows import Loader, Samples, Windows
from pipeline.errors import UserError
from pipeline.files import dump_json, hash_bytes
from pipeline.vocabulary.specs import check_same_vocabulary

PERIOD = 10_000  # shares are exact to a hundredth of a percent


@dataclass(frozen=True)
class Source:
    """One dataset of a mixture. `turns`: how many of every PERIOD samples come from it."""

    name: str
    folder: Path
    manifest: Manifest
    turns: int
    loader: Loader

    @property
    def share(self) -> float:
        """The part of the samples that come from here, 0 to 1."""
        return self.turns / PERIOD


class Mixture:
    """The datasets a config names, each with its loader. Raises UserError where they cannot be
    mixed.

    `folders`: where copies of them are, if not where the config says.
    """

    def __init__(self, config: Config, folders: list[Path] | None = None) -> None:
        self.block_size = config.model.block_size
        turns = apportion([entry.weight for entry in config.datasets])
        self.sources = []
        folders = folders or [config.dataset_dir(entry.dataset) for entry in config.datasets]
        for number, (entry, folder, count) in enumerate(zip(config.datasets, folders, turns, strict=True)):
            manifest = load_manifest(folder)
            # Different seeds, so that no two sources go through their windows in the same order.
            loader = Loader(TokenReader(folder, manifest, "train"), self.block_size, config.run.seed + number)
            source = Source(entry.dataset, folder, manifest=manifest, turns=count, loader=loader)
            self.sources.append(source)
        check_compatible(self.sources)
        self._source_at, self._before = spread(turns)

    @property
    def tokenizer(self) -> dict[str, Any]:
        """The specification of the vocabulary that all sources share."""
        return self.sources[0].manifest.tokenizer

    @property
    def fingerprint(self) -> str:
        """Names the content: equal fingerprints mean the same tokens in every sample, given seed
        and block size.
        """
        if len(self.sources) == 1:
            return self.sources[0].manifest.fingerprint
        return hash_bytes(dump_json([[source.manifest.fingerprint, source.turns] for source in self.sources]))

    def __str__(self) -> str:
        if len(self.sources) == 1:
            return str(self.sources[0].folder)
        return " + ".join(f"{source.folder} ({source.share:.2%})" for source in self.sources)

    def batch(self, first_sample: int, samples: int) -> Windows:
        """Windows (samples, block_size + 1), int64, of the global samples from `first_sample` on."""
        sources, samples_within = self.locate(np.arange(first_sample, first_sample + samples))
        # Each source fills its rows in one call, as the permutation is computed for many samples at
        # a time.
        windows = np.empty((samples, self.block_size + 1), dtype=np.int64)
        for number, source in enumerate(self.sources):
            if (here := sources == number).any():
                windows[here] = source.loader.batch(samples_within[here])
        return windows

    def locate(self, samples: Samples) -> tuple[Samples, Samples]:
        """The number of each global sample's source, and which of that source's samples it is."""
        # Every period has the same turns: complete ones count by number, this one by what came before.
        periods, positions = np.divmod(samples, PERIOD)
        sources = self._source_at[positions]
        turns = np.array([source.turns for source in self.sources])
        return sources, periods * turns[sources] + self._before[sources, positions]

    def samples_of(self, samples: int) -> list[int]:
        """How many of the first `samples` global samples come from each source."""
        periods, position = divmod(samples, PERIOD)
        return [
            periods * source.turns + int(before[position])
            for source, before in zip(self.sources, self._before, strict=True)
        ]

    def progress(self, samples: int) -> dict[str, tuple[int, float]]:
        """For each source by name the tokens and the epochs that the first `samples` global samples
        take of it.
        """
        return {
            source.name: (count * self.block_size, count / source.loader.windows)
            for source, count in zip(self.sources, self.samples_of(samples), strict=True)
        }


def check_compatible(sources: list[Source]) -> None:
    """Raises UserError unless the datasets have one vocabulary, no two are the same, and each has a
    turn.
    """
    first = sources[0]
    first_with: dict[str, Path] = {}
    for source in sources:
        check_same_vocabulary(
            source.folder, source.manifest.tokenizer, of=first.folder, expected=first.manifest.tokenizer
        )
        same = first_with.setdefault(source.manifest.fingerprint, source.folder)
        if same is not source.folder:
            raise UserError(f"data.mixture has {same} and {source.folder}, which hold the same tokens: list it once")
        if not source.turns:
            raise UserError(f"data.mixture gives {source.name!r} less than one sample in {PERIOD:,}: raise its weight")


def apportion(weights: list[float]) -> list[int]:
    """PERIOD turns in proportion to `weights`; what rounding down leaves over goes to the largest
    remainders.
    """
    relative = np.array(weights) / max(weights)  # first, or the sum of huge weights would overflow
    exact = relative / relative.sum() * PERIOD
    turns = exact.astype(np.int64)
    left = PERIOD - int(turns.sum())
    turns[np.argsort(turns - exact, kind="stable")[:left]] += 1
    return [int(count) for count in turns]


def spread(turns: list[int]) -> tuple[Samples, npt.NDArray[np.int64]]:
    """The source at each position of a period, and how many turns each source had before:
    (PERIOD,), (sources, PERIOD).

    A source with n turns would best have them at the middles of n equal parts of the period;
    sorting by those times keeps every source within a few samples of its share between any two
    positions.
    """
    times = np.concatenate([(np.arange(count) + 0.5) / count for count in turns])
    sources = np.repeat(np.arange(len(turns)), turns)[np.argsort(times, kind="stable")]
    has_turn = sources == np.arange(len(turns))[:, None]
    return sources, np.cumsum(has_turn, axis=1) - has_turn
