"""What other programs call our keys, presets and models (other_names.toml), for "did you mean"."""

import ast
import difflib
import tomllib
from collections.abc import Iterable
from pathlib import Path

from pipeline.config.keys import KEYS

_TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
NANOGPT: dict[str, str] = _TABLES["nanogpt"]
OTHER_NAMES: dict[str, str] = NANOGPT | _TABLES["others"]
NOTES, PRESETS, HUB_MODELS = _TABLES["notes"], _TABLES["presets"], _TABLES["hub_models"]


def keys_for(name: str) -> list[str]:
    """Our keys for a name without a section, as any program writes it: `learning_rate`,
    `--max-steps`, `n_layer`.
    """
    if _plain(name) in OTHER_NAMES:
        return [OTHER_NAMES[_plain(name)]]
    return [key for key in KEYS if key.partition(".")[2] == _plain(name)]


def did_you_mean(name: str, value: str = "") -> str:
    """For an unknown `section.key`, or a key without a section: what was meant, with `value` where
    that can stay; else what there is.
    """
    section, dot, key = name.partition(".") if "." in name else ("", "", name)
    meant = keys_for(key) or difflib.get_close_matches(name, KEYS, n=1)
    if not meant:
        known = [known for known in KEYS if known.startswith(section + dot)] if dot else []
        return f" (expected one of {', '.join(known)})" if known else " (see pipeline train --help)"
    note = NOTES.get(_plain(key), "")
    return f" (did you mean {' or '.join(key + (value if not note else '') for key in meant)}{note and f': {note}'}?)"


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()


def preset_for(name: str, presets: Iterable[str]) -> str:
    """The preset that is meant by a CONFIG that does not exist, empty where none is near."""
    plain = Path(name).stem.lower().replace("_", "-").replace("gpt-2", "gpt2")
    close = [PRESETS[plain]] if plain in PRESETS else difflib.get_close_matches(plain, presets, n=1, cutoff=0.75)
    return close[0] if close else ""


def hub_hint(name: str) -> str:
    """For a checkpoint that does not exist: the Hub's model of that name."""
    return f" (did you mean {HUB_MODELS[name]}?)" if name in HUB_MODELS else ""


def translated(source: str) -> str:
    """The names that a Python config of nanoGPT assigns, each with our key. The file is parsed and
    never run.
    """
    try:
        statements = ast.parse(source).body
    except (SyntaxError, ValueError):
        statements = []
    targets = [target for node in statements if isinstance(node, ast.Assign) for target in node.targets]
    names = [target.id for target in targets if isinstance(target, ast.Name) and keys_for(target.id)]
    return ", ".join(f"{name} -> {keys_for(name)[0]}" for name in names or NANOGPT)
