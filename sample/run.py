"""A checkpoint and prompts -> text on stdout."""

import codecs
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pipeline import checkpoint
from pipeline.device import DTYPES, pick_device, pick_dtype
from pipeline.errors import UserError
from pipeline.log import logger
from pipeline.tokenizer import Tokenizer
from sample.generate import Choice, generate

RUNS = Path("runs")
REPLACEMENT = "\ufffd".encode()
SEPARATOR = "\n---------------\n"
_RANGES = {
    "--num-samples": "wanted 1 or more",
    "--max-new-tokens": "wanted 1 or more",
    "--temperature": "wanted 0 (the likeliest token) or a positive number",
    "--top-k": "wanted 0 (off) or more",
    "--top-p": "wanted more than 0 and at most 1 (off)",
    "--seed": "wanted 0 to 2**63 - 1",
}


@dataclass(frozen=True)
class SampleOptions:
    """The options of `pipeline sample`; no prompt at all means the start of a document."""

    ckpt: str
    prompts: list[str] = field(default_factory=list)
    prompt_file: Path | None = None
    num_samples: int = 1
    max_new_tokens: int = 200
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    seed: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    json: bool = False
    run_dir: Path | None = None


def run(options: SampleOptions) -> None:
    """Write every sample of every prompt to stdout. Raises UserError."""
    try:
        write_samples(options)
    except BrokenPipeError:
        # The reader has seen enough; without this, Python complains once more while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_samples(options: SampleOptions) -> None:
    """`run`, for as long as somebody reads."""
    _check(options)
    prompts = _prompts(options)
    folder = checkpoint.resolve(options.ckpt, options.run_dir, RUNS)
    device = pick_device(options.device)
    model, tokenizer = checkpoint.load_model(folder)
    encoded = [_encode(prompt, tokenizer) for prompt in prompts]
    dtype, _ = pick_dtype(options.dtype, device, model.config.n_embd)
    model = model.to(device, dtype).eval()
    seed = int.from_bytes(os.urandom(4)) if options.seed is None else options.seed
    logger.info("%s on %s in %s, seed %d", folder, device, str(dtype).removeprefix("torch."), seed)
    generator = torch.Generator(device).manual_seed(seed)
    choice = Choice(options.temperature, options.top_k, options.top_p)
    for index, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
        steps = generate(model, ids, options.num_samples, options.max_new_tokens, choice, generator)
        # One sample is written as it grows; of several, which grow side by side, one is written after the other.
        alone = options.num_samples == 1
        samples = [(step[0] for step in steps)] if alone else [iter(tokens) for tokens in zip(*steps, strict=True)]
        for number, tokens in enumerate(samples):
            until_end = itertools.takewhile(lambda token: token != tokenizer.end_of_text, tokens)
            if options.json:
                _write_json(prompt, list(until_end), tokenizer)
            else:
                context = ids if prompt else []
                _write_text(prompt, added_text(context, until_end, tokenizer), separate=bool(index or number))


def _check(options: SampleOptions) -> None:
    limits = {
        "--num-samples": options.num_samples >= 1,
        "--max-new-tokens": options.max_new_tokens >= 1,
        "--temperature": 0 <= options.temperature < float("inf"),
        "--top-k": options.top_k >= 0,
        "--top-p": 0 < options.top_p <= 1,
        "--seed": 0 <= (options.seed or 0) < 1 << 63,
    }
    for name, fits in limits.items():
        if not fits:
            found = getattr(options, name[2:].replace("-", "_"))
            raise UserError(f"{name} {found} is out of range: {_RANGES[name]}")
    if options.dtype != "auto" and options.dtype not in DTYPES:
        raise UserError(f"--dtype {options.dtype!r} is not one of auto, {', '.join(DTYPES)}")


def _prompts(options: SampleOptions) -> list[str | None]:
    """The prompts asked for; None, the start of a document, where there is none."""
    prompts: list[str | None] = list(options.prompts)
    if options.prompt_file is not None:
        try:
            prompts.append(options.prompt_file.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt-file {options.prompt_file} cannot be read as UTF-8 text: {error}") from None
    return prompts or [None]


def _encode(prompt: str | None, tokenizer: Tokenizer) -> list[int]:
    if prompt is None:
        return [tokenizer.end_of_text]
    try:
        ids: list[int] = tokenizer.encode(prompt).tolist()
    except ValueError as error:
        raise UserError(f"the tokenizer refuses the prompt ({error}): give another") from None
    if not ids:
        raise UserError("the prompt has no tokens: give some text, or leave --prompt out to start a new document")
    return ids


def _write_json(prompt: str | None, tokens: list[int], tokenizer: Tokenizer) -> None:
    text = tokenizer.decode_bytes(tokens).decode("utf-8", errors="replace")
    sys.stdout.write(json.dumps({"prompt": prompt or "", "text": text, "token_ids": tokens}) + "\n")
    sys.stdout.flush()


def _write_text(prompt: str | None, added: Iterator[bytes], separate: bool) -> None:
    """Prompt and continuation, each token as it comes; a character is held back until its last byte is there."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    sys.stdout.write((SEPARATOR if separate else "") + (prompt or ""))
    for piece in added:
        sys.stdout.write(decoder.decode(piece))
        sys.stdout.flush()
    sys.stdout.write(decoder.decode(b"", final=True) + "\n")
    sys.stdout.flush()


def added_text(context: list[int], tokens: Iterator[int], tokenizer: Tokenizer) -> Iterator[bytes]:
    """What each of `tokens` adds to the text behind `context`: in some vocabularies the space depends on both sides.

    Hugging Face's decoders give U+FFFD for a character whose last byte is still to come; it waits for that.
    """
    shown, held = context[-1:], list[int]()
    for token in tokens:
        held.append(token)
        before, after = tokenizer.decode_bytes(shown), tokenizer.decode_bytes(shown + held)
        if not after.endswith(REPLACEMENT):
            yield after[len(before) :]
            shown, held = held, []
    yield tokenizer.decode_bytes(shown + held)[len(tokenizer.decode_bytes(shown)) :]
