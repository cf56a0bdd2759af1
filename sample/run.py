"""A checkpoint and prompts -> text on stdout."""

import json
import os
import sys
from pathlib import Path

from pipeline.checkpoint.find import find_checkpoint
from pipeline.checkpoint.load import load_model
from pipeline.errors import UserError
from pipeline.log import LAYOUT, logger, printable
from pipeline.machine.device import pick_device, pick_dtype
from pipeline.model.decoder import Decoder
from pipeline.vocabulary.tokenizer import Tokenizer, encode_prompt
from sample.continuation import Continuation, grow
from sample.generate import generate
from sample.interactive import ask, at_terminal
from sample.options import SampleOptions, check, read_prompts

SEPARATOR = "\n---------------\n"


def run(options: SampleOptions) -> None:
    """Write every sample of every prompt to stdout. Raises UserError."""
    try:
        write_samples(options)
    except BrokenPipeError:
        # The reader has seen enough; without this, Python complains once more while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_samples(options: SampleOptions) -> None:
    """`run`, for as long as somebody reads."""
    check(options)
    prompts = [] if options.interactive else read_prompts(options)
    folder = find_checkpoint(options.ckpt, options.run_dir)
    decoder, tokenizer = load(folder, options)
    encoded = [_encode(prompt, tokenizer) for prompt in prompts]
    seed = int.from_bytes(os.urandom(4)) if options.seed is None else options.seed
    logger.info("seed %d", seed)
    writer = Writer(decoder, tokenizer, options)
    if options.interactive:
        converse(writer, seed)
    for prompt, ids in zip(prompts, encoded, strict=True):
        writer.write(prompt, ids, seed)


def load(folder: Path, options: SampleOptions) -> tuple[Decoder, Tokenizer]:
    """The decoder holds weights of its own: those that were read are let go here."""
    device = pick_device(options.device)
    model, tokenizer = load_model(folder)
    dtype, why = pick_dtype(options.dtype, device, model.config.n_embd)
    logger.info("%s on %s in %s: %s", folder, device, str(dtype).removeprefix("torch."), why)
    return Decoder(model.to(device), options.num_samples, dtype), tokenizer


def converse(writer: "Writer", seed: int) -> None:
    """Answer line after line, each a prompt of its own: the model was trained on documents, not on conversations."""
    if at_terminal():
        logger.info("every line is a new prompt, an empty one begins a document; Ctrl-C stops a text, Ctrl-D leaves")
    for number, line in enumerate(ask()):
        prompt = line or None
        if at_terminal():
            writer.separator = ""  # the next sign sets texts apart
        try:
            writer.write(prompt, _encode(prompt, writer.tokenizer), (seed + number) % (1 << 63))
        except UserError as error:
            logger.error("error: %s", printable(str(error)))
        except KeyboardInterrupt:
            if not at_terminal():
                raise
            sys.stdout.write("\n")


def _encode(prompt: str | None, tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.end_of_text] if prompt is None else encode_prompt(prompt, tokenizer)


class Writer:
    """Writes the samples of one prompt after the other: as text, set apart by lines, or as JSON objects."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, options: SampleOptions) -> None:
        self.decoder, self.tokenizer, self.options = decoder, tokenizer, options
        self.separator = ""
        self.told_of_window = False

    def write(self, prompt: str | None, ids: list[int], seed: int) -> None:
        """What the model makes of `ids`, which are the prompt's, or end-of-text where there is none."""
        options = self.options
        texts = [Continuation(self.tokenizer, ids if prompt else [], options.stop) for _ in range(options.num_samples)]
        steps = generate(self.decoder, ids, options.max_new_tokens, options.choice, seed, scored=options.json)
        alone = options.num_samples == 1 and not options.json
        if alone:  # written as it grows; of several, which grow side by side, one is written after the other
            self._begin(prompt)
        shown = 0
        for _ in grow(texts, steps):
            if alone:
                self._put("".join(texts[0].pieces[shown:]))
                shown = len(texts[0].pieces)
        for text in texts:
            if options.json:
                self._put_object(prompt, text)
                continue
            if not alone:
                self._begin(prompt)
                self._put(text.text)
            self._put("\n")
        self._tell_of_window(len(ids), max(len(text.token_ids) for text in texts))

    def _begin(self, prompt: str | None) -> None:
        self._put(self.separator + (prompt or ""))
        self.separator = SEPARATOR

    def _put(self, text: str) -> None:
        """Exactly, into a file or a pipe. On a terminal nothing that a model writes is a command."""
        sys.stdout.write(printable(text, keep=LAYOUT) if sys.stdout.isatty() else text)
        sys.stdout.flush()

    def _put_object(self, prompt: str | None, text: Continuation) -> None:
        document = {
            "prompt": prompt or "",
            "text": text.text,
            "token_ids": text.token_ids,
            "log_probabilities": text.log_probabilities,
            "finish_reason": text.finish_reason,
        }
        sys.stdout.write(json.dumps(document) + "\n")
        sys.stdout.flush()

    def _tell_of_window(self, prompt: int, drawn: int) -> None:
        """Once a run, and after a text: in its middle the line would tear it. The last token drawn was not read again."""
        block_size = self.decoder.block_size
        if prompt + max(0, drawn - 1) > block_size and not self.told_of_window:
            self.told_of_window = True
            logger.info(
                "a text of %d tokens is longer than the model's context of %d: what it wrote last, it wrote seeing only the "
                "%d to %d tokens before it",
                prompt + drawn, block_size, max(1, block_size // 2), block_size,
            )  # fmt: skip
