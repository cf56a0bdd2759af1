"""The loss of a model over a complete split: every token but the first is scored exactly once.

    window k   reads    tokens [k stride, k stride + block_size)
               scores   the tokens after them, except those that an earlier window has scored

With a stride of block_size windows do not overlap: the first token of each is predicted from one
token of context, the last from block_size. A smaller stride gives every token at least
block_size - stride tokens of context, where the split has them, and costs block_size / stride times
as much. The ranks take batches of windows in turn; sums are float64.

Bits per byte make vocabularies comparable: the loss of all tokens, in bits, divided by the UTF-8
bytes of the text. An end-of-text token counts with its loss, since where a document ends has to be
predicted too, and with no bytes; every vocabulary has as many of them, in the same positions. The
bytes of the very first token count although its loss does not: a difference of at most one token in
a split. A vocabulary that loses text (`word` with <|unk|>) looks better than it is.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.dataset.shards import TokenReader
from pipeline.errors import UserError
from pipeline.log import ProgressReport
from pipeline.machine.device import autocast
from pipeline.machine.ranks import World
from pipeline.model.language_model import LanguageModel, document_numbers


@dataclass(frozen=True)
class Scorer:
    """A model, its autocast type, the sequences of a batch, and the ranks that share the work."""

    model: LanguageModel
    dtype: torch.dtype
    batch_size: int
    world: World

    @property
    def block_size(self) -> int:
        return self.model.config.block_size


@dataclass(frozen=True)
class Score:
    """`loss` is the mean over `tokens`, in nats. None: not recorded by another program's shards."""

    loss: float
    tokens: int
    documents: int | None = None
    bytes_per_token: float | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf  # float64 overflows at exp(709.8)

    @property
    def bits_per_byte(self) -> float | None:
        return self.loss / math.log(2) / self.bytes_per_token if self.bytes_per_token else None


def mean_score(scores: list[Score], weights: list[float]) -> Score:
    """The score of a mixture, with each dataset's weight: its loss is training's val_loss."""
    # Weighted as training mixes them, whatever the sizes of their splits.
    documents = [score.documents for score in scores if score.documents is not None]
    lengths = [score.bytes_per_token for score in scores if score.bytes_per_token is not None]
    return Score(
        loss=sum(weight * score.loss for weight, score in zip(weights, scores, strict=True)),
        tokens=sum(score.tokens for score in scores),
        documents=sum(documents) if len(documents) == len(scores) else None,
        bytes_per_token=float(np.dot(weights, lengths)) if len(lengths) == len(scores) else None,
    )


@torch.inference_mode()
def split_loss(scorer: Scorer, reader: TokenReader, stride: int, end_of_text: int | None = None) -> float:
    """Nats per token over every token of a split but its first; the same on every rank.

    With `end_of_text` attention stays inside documents, as in training with data.document_mask; a
    document's tokens in earlier windows are not seen either.
    """
    predicted = len(reader) - 1
    # The last window is the first that reaches the end; a split shorter than a window has one.
    starts = range(0, max(1, predicted - scorer.block_size + stride), stride)
    world, size = scorer.world, scorer.batch_size
    total = 0.0
    with world.fail_together(), ProgressReport(f"score {reader.name}", len(starts), "windows") as progress:
        if predicted < 1:
            raise UserError(
                f"{reader.name} has {len(reader)} token(s): expected at least 2, as the first is given; choose another split "
                "or dataset with --split or --data"
            )
        for at in range(world.rank * size, len(starts), world.size * size):
            windows, scored = read_windows(reader, starts[at : at + size], scorer.block_size, stride)
            windows, scored = windows.to(world.device), scored.to(world.device)
            inputs, targets = windows[:, :-1], windows[:, 1:]
            documents = None if end_of_text is None else document_numbers(inputs, end_of_text)
            with autocast(world.device, scorer.dtype):
                losses = scorer.model.token_losses(inputs, targets, documents, scored)
            total += float(losses.cpu().double().sum())
            progress.advance(len(windows) * world.size)
    return float(sum(world.gather(total))) / predicted


def read_windows(reader: TokenReader, starts: range, block_size: int, stride: int) -> tuple[Tensor, Tensor]:
    """Windows (B, block_size + 1), int64, padded with zeros, and which of their targets to score.

    The latter are (B, block_size), bool.
    """
    windows = np.zeros((len(starts), block_size + 1), dtype=np.int64)
    scored = np.zeros((len(starts), block_size), dtype=np.bool_)
    for row, start in enumerate(starts):
        ids = reader.read(start, min(start + block_size + 1, len(reader)))
        windows[row, : len(ids)] = ids
        # All but the last `stride` targets of a full window were scored by the one before it.
        scored[row, block_size - stride if start else 0 : len(ids) - 1] = True
    return torch.from_numpy(windows), torch.from_numpy(scored)
