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
from sample.options import SampleOptions, check_options, read_prompts

SEPARATOR = "\n---------------\n"


def run(options: SampleOptions) -> None:
    """Write every sample of every prompt to stdout. Raises UserError."""
    try:
        write_samples(options)
    except BrokenPipeError:
        # The reader, such as `head`, has exited: at exit, Python would print an error for stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_samples(options: SampleOptions) -> None:
    """`run`, for as long as stdout has a reader."""
    check_options(options)
    prompts = [] if options.interactive else read_prompts(options)
    folder = find_checkpoint(options.ckpt, options.run_dir)
    decoder, tokenizer = load(folder, options)
    encoded = [_encode(prompt, tokenizer) for prompt in prompts]
    # Logged, so that a text can be repeated.
    seed = int.from_bytes(os.urandom(4)) if options.seed is None else options.seed
    logger.info("seed %d", seed)
    writer = Writer(decoder, tokenizer, options)
    if options.interactive:
        converse(writer, seed)
    for prompt, ids in zip(prompts, encoded, strict=True):
        writer.write(prompt, ids, seed)


def load(folder: Path, options: SampleOptions) -> tuple[Decoder, Tokenizer]:
    """The decoder copies the weights into its layout; the model's are freed at the return."""
    device = pick_device(options.device)
    model, tokenizer = load_model(folder)
    dtype, why = pick_dtype(options.dtype, device, model.config.n_embd)
    logger.info(f"{folder} on {device} in {str(dtype).removeprefix('torch.')}: {why}")
    return Decoder(model.to(device), options.num_samples, dtype), tokenizer


def converse(writer: "Writer", seed: int) -> None:
    """Continue each line alone: the model was trained on documents, not on conversations."""
    if at_terminal():
        logger.info("each line is a new prompt, an empty line begins a document; Ctrl-C stops a sample, Ctrl-D exits")
    for number, line in enumerate(ask()):
        prompt = line or None
        if at_terminal():
            writer.separator = ""  # the sign of the next prompt separates samples
        try:
            writer.write(prompt, _encode(prompt, writer.tokenizer), (seed + number) % (1 << 63))
        except UserError as error:
            logger.error("error: %s", printable(str(error)))
        except KeyboardInterrupt:
            if not at_terminal():
                raise
            sys.stdout.write("\n")


def _encode(prompt: str | None, tokenizer: Tokenizer) -> list[int]:
    if prompt is None:
        return [tokenizer.end_of_text]
    end = tokenizer.decode_bytes([tokenizer.end_of_text]).decode(errors="replace")
    if end and end in prompt:
        logger.info("note: %s in a prompt is ordinary text; a sample without a prompt begins after that token", end)
    return encode_prompt(prompt, tokenizer)


class Writer:
    """Writes samples prompt by prompt: as text with lines between them, or as JSON objects."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, options: SampleOptions) -> None:
        self.decoder, self.tokenizer, self.options = decoder, tokenizer, options
        self.separator, self.window_was_noted = "", False

    def write(self, prompt: str | None, ids: list[int], seed: int) -> None:
        """Continue `ids`, the tokens of the prompt, or end-of-text without one."""
        options = self.options
        texts = [Continuation(self.tokenizer, ids if prompt else [], options.stop) for _ in range(options.num_samples)]
        steps = generate(
            self.decoder, ids, max_new_tokens=options.max_new_tokens, choice=options, seed=seed, scored=options.json
        )
        alone = options.num_samples == 1 and not options.json
        if alone:  # written as it grows; several grow together, so each is written when all are complete
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
        # After the text: a log line in the middle of it would split it on a terminal.
        self._note_window(len(ids), max(len(text.token_ids) for text in texts))

    def _begin(self, prompt: str | None) -> None:
        self._put(self.separator + (prompt or ""))
        self.separator = SEPARATOR

    def _put(self, text: str) -> None:
        """Exactly, into a file or a pipe. For a terminal, control characters are escaped."""
        sys.stdout.write(printable(text, keep=LAYOUT) if sys.stdout.isatty() else text)
        sys.stdout.flush()

    def _put_object(self, prompt: str | None, text: Continuation) -> None:
        found = {name: getattr(text, name) for name in ("text", "token_ids", "log_probabilities", "finish_reason")}
        sys.stdout.write(json.dumps({"prompt": prompt or "", **found}) + "\n")
        sys.stdout.flush()

    def _note_window(self, prompt: int, drawn: int) -> None:
        """Log, once, that a text exceeded the context. The last token drawn was never read."""
        block_size = self.decoder.block_size
        if prompt + max(0, drawn - 1) > block_size and not self.window_was_noted:
            self.window_was_noted = True
            logger.info(
                f"note: a text of {prompt + drawn} tokens is longer than the model's context of {block_size}: its last tokens "
                f"were predicted from only the {max(1, block_size // 2)} to {block_size} tokens before them"
            )
