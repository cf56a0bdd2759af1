"""Every knob of training, on one page and without torch.

A config is TOML, parsed into frozen dataclasses. Precedence, told by example: `lr` is 6e-4 here; a file that says
`lr = 3e-4` under `[optimizer]` wins over that; `optimizer.lr=1e-4` on the command line wins over both. Unknown keys are
refused with the nearest name, and all faults are reported at once.

What a run learns from elsewhere has no key: the vocabulary comes with the dataset, the number of accumulated
micro-batches follows from `train.tokens_per_step` and the number of ranks.
"""

import difflib
import json
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

from pipeline.config.faults import inconsistencies
from pipeline.config.keys import SECTIONS, Config, WeightedDataset
from pipeline.errors import UserError

DEFAULT_CONFIG = "gpt2-124m"


def config_from_arguments(arguments: list[str]) -> Config:
    """The config of `[CONFIG] [section.key=value]...`, as every command that trains takes it."""
    name, overrides = DEFAULT_CONFIG, arguments
    if arguments and "=" not in arguments[0]:
        name, *overrides = arguments
    return load_config(name, overrides)


def load_config(name_or_path: str, overrides: list[str]) -> Config:
    """The config of a preset's name or a file's path, with `section.key=value` overrides on top.

    Raises UserError that lists every fault found.
    """
    path = find_config(name_or_path)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    faults: list[str] = []
    for override in overrides:
        _apply_override(document, override, faults)
    run = document.setdefault("run", {})
    if isinstance(run, dict) and not run.get("name"):
        run["name"] = path.stem
    return from_dict(document, faults)


def from_dict(document: dict[str, Any], faults: list[str] | None = None) -> Config:
    """A checked Config from nested dictionaries. Raises UserError with every fault, those passed in first."""
    faults = [] if faults is None else faults
    sections = {}
    for section, keys in document.items():
        if section not in SECTIONS:
            faults.append(f"unknown section [{section}]{_nearest(section, SECTIONS)}")
        elif not isinstance(keys, dict):
            faults.append(f"{section} is a section, found the value {keys!r}: write [{section}] and keys under it")
        else:
            sections[section] = _section_from_dict(section, keys, faults)
    config = Config(**sections)
    faults += inconsistencies(config)
    if faults:
        raise UserError("; ".join(faults))
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dictionaries that JSON can hold; `from_dict` turns them back into an equal Config."""
    document: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return document


def to_toml(config: Config) -> str:
    """The resolved config as TOML text, every key present."""
    sections = to_dict(config).items()
    return "\n".join(
        f"[{section}]\n" + "".join(f"{name} = {toml_value(value)}\n" for name, value in keys.items())
        for section, keys in sections
    )


def toml_value(value: Any) -> str:
    """What JSON can hold as TOML on one line: the scalars are the same."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {toml_value(part)}" for name, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    # Of what JSON leaves as it is, only the delete character is refused by TOML.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def find_config(name_or_path: str) -> Path:
    """The file of a config given as a path, or as the name of a preset. Raises UserError with the names there are."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    presets = {preset.stem: preset for preset in sorted(presets_dir().glob("*.toml"))}
    if name_or_path.removesuffix(".toml") in presets:
        return presets[name_or_path.removesuffix(".toml")]
    raise UserError(f"no config {name_or_path!r}: it is neither a file nor one of the presets {', '.join(presets)}")


def presets_dir() -> Path:
    """`configs/` beside the packages in a checkout; inside the package where the wheel is installed."""
    package = Path(__file__).parents[1]
    checkout = package.parent / "configs"
    return checkout if checkout.is_dir() else package / "configs"


def _apply_override(document: dict[str, Any], override: str, faults: list[str]) -> None:
    name, equals, text = override.partition("=")
    section, dot, key_name = name.partition(".")
    if not (equals and dot and key_name):
        faults.append(f"override {override!r} is not of the form section.key=value, such as optimizer.lr=3e-4")
        return
    keys = document.setdefault(section, {})
    if isinstance(keys, dict):
        is_text = section in SECTIONS and get_type_hints(SECTIONS[section]).get(key_name) is str
        keys[key_name] = text if is_text else _parse_value(text)


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _section_from_dict(section: str, keys: dict[str, Any], faults: list[str]) -> Any:
    kind = SECTIONS[section]
    types = get_type_hints(kind)
    values = {}
    for name, value in keys.items():
        if name not in types:
            faults.append(
                f"unknown key {section}.{name}{_nearest(f'{section}.{name}', [f'{section}.{key}' for key in types])}"
            )
            continue
        try:
            values[name] = _coerce(value, types[name])
        except TypeError:
            faults.append(f"{section}.{name} wants {_type_name(types[name])}, found {value!r}")
    return kind(**values)


def _coerce(value: Any, wanted: Any) -> Any:
    """`value` as `wanted`, without guessing: a bool is no number, text is no number, but 1 is a float."""
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if wanted in (bool, str, float) and isinstance(value, wanted):
        return value
    if wanted is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if wanted == tuple[float, float] and isinstance(value, list | tuple) and len(value) == 2:
        return tuple(_coerce(part, float) for part in value)
    if wanted == tuple[WeightedDataset, ...] and isinstance(value, list | tuple):
        return tuple(_weighted_dataset(entry) for entry in value)
    raise TypeError


def _weighted_dataset(entry: Any) -> WeightedDataset:
    types = get_type_hints(WeightedDataset)
    if not isinstance(entry, dict) or entry.keys() != types.keys():
        raise TypeError
    return WeightedDataset(**{name: _coerce(value, types[name]) for name, value in entry.items()})


def _type_name(wanted: Any) -> str:
    names: dict[Any, str] = {
        int: "a whole number", float: "a number", bool: "true or false", str: "text",
        tuple[float, float]: "two numbers, such as [0.9, 0.95]",
        tuple[WeightedDataset, ...]: 'datasets with weights, such as [{dataset = "a", weight = 0.7}]',
    }  # fmt: skip
    return names[wanted]


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else f" (there are: {', '.join(known)})"
