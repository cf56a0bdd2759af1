"""The loss of a model over a whole split: every token but the first, which nothing predicts, is scored exactly once.

    window k   reads    tokens [k stride, k stride + block_size)
               scores   of what follows each of them, all that no window before it has scored

With a stride of block_size the windows do not overlap: the first token of each is predicted from one token of context, the
last from block_size. A smaller stride gives every token at least block_size - stride tokens of context, where the split has
them, and costs block_size / stride times as much. The ranks take batches of windows in turn; sums are float64.

Bits per byte make vocabularies comparable: the nats of all tokens, in bits, by the UTF-8 bytes of the text. An end-of-text
token counts with its nats, since where a text ends is part of what is to be known, and with no bytes; every vocabulary has
as many of them, in the same places. The bytes of the very first token are counted though its nats are not: no matter in a
split of any size. A vocabulary that does not keep its text (word's <|unk|>) looks better than it is.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.dataset.shards import TokenReader
from pipeline.errors import UserError
from pipeline.log import ProgressReport
from pipeline.machine.device import autocast
from pipeline.machine.ranks import World
from pipeline.model.language_model import LanguageModel, document_numbers, finite


@dataclass(frozen=True)
class Scorer:
    """A model as it is scored: the type it computes in, the sequences it takes at once, the ranks that share the work."""

    model: LanguageModel
    dtype: torch.dtype
    batch_size: int
    world: World

    @property
    def block_size(self) -> int:
        return self.model.config.block_size

    def autocast(self) -> torch.autocast:
        return autocast(self.world.device, self.dtype)

    def logits(self, ids: Tensor, where: Tensor, documents: Tensor | None = None) -> Tensor:
        """(n, V), float32: the logits after those of `ids` (B, T) that `where` (B, T) marks, row by row."""
        with self.autocast():
            return finite(self.model.logits(ids, documents, where))


@dataclass(frozen=True)
class Score:
    """`loss`: nats per token, the mean over `tokens`. What another program's shards do not tell is None."""

    loss: float
    tokens: int
    documents: int | None
    bytes_per_token: float | None

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf  # float64 ends at exp(709.8)

    @property
    def bits_per_byte(self) -> float | None:
        return self.loss / math.log(2) / self.bytes_per_token if self.bytes_per_token else None


def mean_score(scores: list[Score], shares: list[float]) -> Score:
    """That of a mixture in which a token is from each source with its share: the loss training calls `val_loss`."""
    documents = [score.documents for score in scores if score.documents is not None]
    lengths = [score.bytes_per_token for score in scores if score.bytes_per_token is not None]
    return Score(
        loss=sum(share * score.loss for share, score in zip(shares, scores, strict=True)),
        tokens=sum(score.tokens for score in scores),
        documents=sum(documents) if len(documents) == len(scores) else None,
        bytes_per_token=float(np.dot(shares, lengths)) if len(lengths) == len(scores) else None,
    )


@torch.inference_mode()
def split_loss(scorer: Scorer, reader: TokenReader, stride: int, end_of_text: int | None = None) -> float:
    """Nats per token over every token of a split but its first; the same on every rank.

    With `end_of_text` attention stays inside documents, as in training with data.document_mask: what a window cuts off
    from the beginning of a document is not seen from its rest.
    """
    predicted = len(reader) - 1
    starts = range(0, max(1, predicted - scorer.block_size + stride), stride)
    world, size = scorer.world, scorer.batch_size
    total = 0.0
    with world.fail_together(), ProgressReport(f"score {reader.name}", len(starts), "windows") as progress:
        if predicted < 1:
            raise UserError(f"{reader.name} has {len(reader)} token(s): wanted 2 or more, of which one is predicted")
        for at in range(world.rank * size, len(starts), world.size * size):
            windows, scored = read_windows(reader, starts[at : at + size], scorer.block_size, stride)
            windows, scored = windows.to(world.device), scored.to(world.device)
            inputs, targets = windows[:, :-1], windows[:, 1:]
            documents = None if end_of_text is None else document_numbers(inputs, end_of_text)
            logits = scorer.logits(inputs, scored, documents)
            losses = F.cross_entropy(logits, targets[scored], reduction="none")
            total += float(losses.cpu().double().sum())
            progress.advance(len(windows) * world.size)
    return float(sum(world.gather(total))) / predicted


def read_windows(reader: TokenReader, starts: range, block_size: int, stride: int) -> tuple[Tensor, Tensor]:
    """Windows (B, block_size + 1), zeros behind the end of the split, and which targets (B, block_size) are theirs to score."""
    windows = np.zeros((len(starts), block_size + 1), dtype=np.int64)
    scored = np.zeros((len(starts), block_size), dtype=np.bool_)
    for row, start in enumerate(starts):
        ids = reader.read(start, min(start + block_size + 1, len(reader)))
        windows[row, : len(ids)] = ids
        # The window before reached `stride` targets less far than this one does.
        scored[row, block_size - stride if start else 0 : len(ids) - 1] = True
    return torch.from_numpy(windows), torch.from_numpy(scored)
