"""What the user of `pipeline sample` chose, and the prompts that were meant."""

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from pipeline.config.keys import DTYPES
from pipeline.errors import UserError

STDIN = Path("-")
# Beyond these a float32 may overflow, and all the probability is with one token, or a few, long before.
MIN_TEMPERATURE = 1e-3
MIN_PENALTY, MAX_PENALTY = 0.01, 100
_RANGES = {
    "--num-samples": "wanted 1 or more",
    "--max-new-tokens": "wanted 1 or more",
    "--temperature": f"wanted 0 (the likeliest token), or {MIN_TEMPERATURE} or more",
    "--top-k": "wanted 0 (off) or more",
    "--top-p": "wanted more than 0 and at most 1 (off)",
    "--min-p": "wanted 0 (off) to 1",
    "--repetition-penalty": f"wanted {MIN_PENALTY} to {MAX_PENALTY}; 1 is off, and 1.2 is a lot",
    "--seed": "wanted 0 to 2**63 - 1",
}


@dataclass(frozen=True)
class Choice:
    """How a token is drawn: temperature 0 takes the likeliest.

    top_k 0, top_p 1 and min_p 0 leave every token in; repetition_penalty 1 changes nothing.
    """

    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class SampleOptions:
    """The options of `pipeline sample`; no prompt at all means the start of a document."""

    ckpt: str
    prompts: list[str] = field(default_factory=list)
    prompt_files: list[Path] = field(default_factory=list)
    interactive: bool = False
    num_samples: int = 1
    max_new_tokens: int = 200
    temperature: float = Choice.temperature
    top_k: int = Choice.top_k
    top_p: float = Choice.top_p
    min_p: float = Choice.min_p
    repetition_penalty: float = Choice.repetition_penalty
    stop: list[str] = field(default_factory=list)
    seed: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    json: bool = False
    run_dir: Path | None = None

    @property
    def choice(self) -> Choice:
        return Choice(**{entry.name: getattr(self, entry.name) for entry in fields(Choice)})


def check(options: SampleOptions) -> None:
    """Raises UserError with everything that is wrong with the options themselves."""
    fits = {
        "--num-samples": options.num_samples >= 1,
        "--max-new-tokens": options.max_new_tokens >= 1,
        "--temperature": options.temperature == 0 or MIN_TEMPERATURE <= options.temperature < float("inf"),
        "--top-k": options.top_k >= 0,
        "--top-p": 0 < options.top_p <= 1,
        "--min-p": 0 <= options.min_p <= 1,
        "--repetition-penalty": MIN_PENALTY <= options.repetition_penalty <= MAX_PENALTY,
        "--seed": 0 <= (options.seed or 0) < 1 << 63,
    }
    faults = [
        f"{name} {getattr(options, name[2:].replace('-', '_'))} is out of range: {_RANGES[name]}"
        for name, within in fits.items()
        if not within
    ]
    if "" in options.stop:
        faults.append("--stop wants some text, found none")
    if options.dtype != "auto" and options.dtype not in DTYPES:
        faults.append(f"--dtype {options.dtype!r} is not one of auto, {', '.join(DTYPES)}")
    given = {"--prompt": options.prompts, "--prompt-file": options.prompt_files, "--json": options.json}
    if options.interactive and any(given.values()):
        unwanted = " and ".join(name for name, value in given.items() if value)
        faults.append(f"--interactive asks for its prompts and answers in text: leave {unwanted} out")
    if faults:
        raise UserError("; ".join(faults))


def read_prompts(options: SampleOptions) -> list[str | None]:
    """The prompts asked for; None, the start of a document, where there is none."""
    return [*options.prompts, *map(_read, options.prompt_files)] or [None]


def _read(path: Path) -> str:
    try:
        content = sys.stdin.buffer.read() if path == STDIN else path.read_bytes()
        return content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file {path} cannot be read as UTF-8 text: {error}") from None
