"""A text that the model writes at each evaluation, where eval.sample_prompt is set."""

import textwrap
from dataclasses import dataclass, field
from typing import Protocol

import torch
import xxhash

from pipeline.config.keys import Config
from pipeline.errors import UserError
from pipeline.log import LAYOUT, logger, printable
from pipeline.machine.ranks import World
from pipeline.model.language_model import LanguageModel
from pipeline.vocabulary.tokenizer import Tokenizer, encode_prompt
from train.metrics.record import Metrics
from train.parallel import whole_model


class Preview(Protocol):
    """The model's continuation of a prompt. Stages do not import each other: the caller of
    `train.run.run` brings it.
    """

    def __call__(
        self, model: LanguageModel, dtype: torch.dtype, tokenizer: Tokenizer, prompt: list[int], seed: int
    ) -> str: ...


@dataclass
class Previews:
    """Shows continuations of eval.sample_prompt, where `preview` is given."""

    config: Config
    world: World
    tokenizer: Tokenizer
    dtype: torch.dtype
    preview: Preview | None
    prompt: list[int] = field(init=False)

    def __post_init__(self) -> None:
        """Raises UserError for a prompt that cannot be encoded, now and not at the first
        evaluation.
        """
        if not self.config.eval.sample_prompt:
            self.preview = None
            return
        try:
            self.prompt = encode_prompt(self.config.eval.sample_prompt, self.tokenizer)
        except UserError as error:
            raise UserError(f"eval.sample_prompt: {error}") from None

    def show(self, model: LanguageModel, step: int, metrics: Metrics) -> None:
        """Rank 0 logs one, for which all ranks hand in their shards. Training does not notice: the
        random numbers follow from seed and step, and are used for nothing else.
        """
        if self.preview is None:
            return
        full = whole_model(model, self.world)
        if full is not None:
            seed = xxhash.xxh3_64_intdigest(b"sample:%d:%d" % (self.config.run.seed, step))
            # A copy made of shards is on the CPU, where float32 always works.
            dtype = self.dtype if full is model else torch.float32
            try:
                continuation = self.preview(full, dtype, self.tokenizer, prompt=self.prompt, seed=seed)
                text = self.config.eval.sample_prompt + continuation
            except (UserError, torch.OutOfMemoryError) as error:  # no reason to end a run
                text = f"no sample: {error}"
            shown = printable(text, keep=LAYOUT)
            metrics.write_text("sample", shown, step)
            metrics.write_event("sample", step, text=text)
            logger.info("step %d: sample\n%s", step, textwrap.indent(shown, "    "))
