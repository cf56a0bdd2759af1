"""What the user of `pipeline sample` chose, and the prompts."""

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from pipeline.config.keys import DTYPES
from pipeline.errors import UserError

STDIN = Path("-")
# Beyond these, float32 logits may overflow; long before, one token or a few have all probability.
MIN_TEMPERATURE = 1e-3
MIN_PENALTY, MAX_PENALTY = 0.01, 100
_RANGES = {
    "--num-samples": "expected 1 or more",
    "--max-new-tokens": "expected 1 or more",
    "--temperature": f"expected 0 (the likeliest token), or at least {MIN_TEMPERATURE}",
    "--top-k": "expected 0 (off) or more",
    "--top-p": "expected more than 0 and at most 1 (off)",
    "--min-p": "expected 0 (off) to 1",
    "--repetition-penalty": f"expected {MIN_PENALTY} to {MAX_PENALTY}; 1 is off, and 1.2 is a lot",
    "--seed": "expected 0 to 2**63 - 1",
}


@dataclass(frozen=True)
class Choice:
    """How a token is chosen. Temperature 0 takes the likeliest; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off."""

    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class SampleOptions:
    """The options of `pipeline sample`; without a prompt a sample begins a new document."""

    ckpt: str = "latest"
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


def check_options(options: SampleOptions) -> None:
    """Raises UserError with all options that are invalid whatever the checkpoint."""
    is_valid = {
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
        f"invalid {name} {getattr(options, name[2:].replace('-', '_'))}: {_RANGES[name]}"
        for name, valid in is_valid.items()
        if not valid
    ]
    if "" in options.stop:
        faults.append("invalid --stop '': expected some text")
    if options.dtype != "auto" and options.dtype not in DTYPES:
        faults.append(f"invalid --dtype {options.dtype!r}: expected auto, {', '.join(DTYPES)}")
    given = {"--prompt": options.prompts, "--prompt-file": options.prompt_files, "--json": options.json}
    if options.interactive and any(given.values()):
        unwanted = " and ".join(name for name, value in given.items() if value)
        faults.append(f"--interactive reads prompts line by line and prints text: remove {unwanted}")
    if faults:
        raise UserError("; ".join(faults))


def read_prompts(options: SampleOptions) -> list[str | None]:
    """The prompts; a single None, the beginning of a document, if there is none."""
    return [*options.prompts, *map(_read, options.prompt_files)] or [None]


def _read(path: Path) -> str:
    try:
        content = sys.stdin.buffer.read() if path == STDIN else path.read_bytes()
        return content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file {path} cannot be read as UTF-8 text: {error}") from None
