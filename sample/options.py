"""What the user of `pipeline sample` chose, and the prompts."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config.keys import DTYPES
from pipeline.errors import UserError

STDIN = Path("-")
# Beyond these, float32 logits may overflow; long before, one token or a few have all probability.
MIN_TEMPERATURE = 1e-3
MIN_PENALTY, MAX_PENALTY = 0.01, 100


@dataclass(frozen=True)
class Choice:
    """How a token is chosen. Temperature 0 takes the likeliest; top_k 0, top_p 1, min_p 0 and
    repetition_penalty 1 are off.
    """

    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, kw_only=True)
class SampleOptions(Choice):
    """The options of `pipeline sample`; without a prompt a sample begins a new document."""

    ckpt: str = "latest"
    prompts: list[str] = field(default_factory=list)
    prompt_files: list[Path] = field(default_factory=list)
    interactive: bool = False
    num_samples: int = 1
    max_new_tokens: int = 200
    stop: list[str] = field(default_factory=list)
    seed: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    json: bool = False
    run_dir: Path | None = None


def check_options(options: SampleOptions) -> None:
    """Raises UserError with all options that are invalid whatever the checkpoint."""
    temperature_fits = options.temperature == 0 or MIN_TEMPERATURE <= options.temperature < float("inf")
    penalty_fits = MIN_PENALTY <= options.repetition_penalty <= MAX_PENALTY
    ranges = {
        "num_samples": (options.num_samples >= 1, "1 or more"),
        "max_new_tokens": (options.max_new_tokens >= 1, "1 or more"),
        "temperature": (temperature_fits, f"0 (the likeliest token), or at least {MIN_TEMPERATURE}"),
        "top_k": (options.top_k >= 0, "0 (off) or more"),
        "top_p": (0 < options.top_p <= 1, "more than 0 and at most 1 (off)"),
        "min_p": (0 <= options.min_p <= 1, "0 (off) to 1"),
        "repetition_penalty": (penalty_fits, f"{MIN_PENALTY} to {MAX_PENALTY}; 1 is off, and 1.2 is a lot"),
        "seed": (0 <= (options.seed or 0) < 1 << 63, "0 to 2**63 - 1"),
    }
    faults = [
        f"invalid --{name.replace('_', '-')} {getattr(options, name)}: expected {expected}"
        for name, (is_valid, expected) in ranges.items()
        if not is_valid
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
