"""From TOML and the command line to a checked Config, without torch.

Precedence by example: `lr` defaults to 6e-4; a file with `lr = 3e-4` under `[optimizer]` wins over
that, and `optimizer.lr=1e-4` on the command line over both. Unknown keys are refused with the
nearest name, and all faults are reported together.

What follows from elsewhere has no key: the vocabulary comes with the dataset, the number of
accumulated micro-batches from `train.tokens_per_step` and the number of ranks.
"""

import json
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

from pipeline.config.faults import expected, inconsistencies, shown
from pipeline.config.keys import KEYS, SECTIONS, Config, WeightedDataset
from pipeline.config.other_names import did_you_mean, keys_for, preset_for, translated
from pipeline.errors import UserError

DEFAULT_CONFIG = "gpt2-124m"


def config_from_arguments(arguments: list[str]) -> Config:
    """The config of `[CONFIG] [section.key=value]...`, as every command about training takes it."""
    return load_config(*_split(arguments))


def _split(arguments: list[str]) -> tuple[str, list[str]]:
    named = bool(arguments) and "=" not in arguments[0]
    return arguments[0] if named else DEFAULT_CONFIG, arguments[named:]


def origins(arguments: list[str]) -> dict[str, str]:
    """Where the value of each key comes from: the command line, a file, or the defaults."""
    name, overrides = _split(arguments)
    path, given = find_config(name), {override.partition("=")[0].strip() for override in overrides}
    file = f"preset {path.stem}" if path in preset_files().values() else str(path)
    document = _read(path)
    # Without a name in the file, a run has the file's.
    document["run"] = {"name": path.stem} | document.get("run", {})
    written = {f"{section}.{key}" for section, keys in document.items() for key in keys}
    return {key: "command line" if key in given else file if key in written else "default" for key in KEYS}


def load_config(name_or_path: str, overrides: list[str]) -> Config:
    """The config of a preset's name or a TOML file's path, with `section.key=value` overrides on
    top.

    Raises UserError with every fault found.
    """
    path = find_config(name_or_path)
    document = _read(path)
    faults: list[str] = []
    for override in overrides:
        _apply_override(document, override, faults)
    # The run's folder needs a name: the file's, unless it is given.
    run = document.setdefault("run", {})
    if isinstance(run, dict) and not run.get("name"):
        run["name"] = path.stem
    return from_dict(document, faults)


def from_dict(document: dict[str, Any], faults: list[str] | None = None) -> Config:
    """A checked Config from nested dictionaries. Raises UserError with every fault, those passed in
    first.
    """
    faults = [] if faults is None else faults
    sections = {}
    for section, keys in document.items():
        if section in SECTIONS and isinstance(keys, dict):
            sections[section] = _section_from_dict(section, keys, faults)
        elif section in SECTIONS:
            faults.append(f"{section}={shown(keys)}: expected a section, [{section}] with keys under it")
        elif isinstance(keys, dict):
            faults += [f"unknown key {section}.{name}{did_you_mean(f'{section}.{name}')}" for name in keys]
        else:
            faults.append(f"{section} = {shown(keys)} is not under a [section]{did_you_mean(section)}")
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
    return json.dumps(value, ensure_ascii=False, default=_plain).replace("\x7f", "\\u007f")


def _plain(value: Any) -> Any:
    """A scalar or an array of numpy or torch as Python has it; of another kind, its text, which no
    key takes.
    """
    return value.tolist() if hasattr(value, "tolist") else str(value)


def find_config(name_or_path: str) -> Path:
    """The file of a config given as a path, or as the name of a preset. Raises UserError with the
    presets' names.
    """
    path, presets = Path(name_or_path), preset_files()
    # A file of the same name wins, so that a copy of a preset can be edited in place.
    if path.is_file() and path.suffix != ".py":
        return path
    if name_or_path.removesuffix(".toml") in presets:
        return presets[name_or_path.removesuffix(".toml")]
    meant = preset_for(name_or_path, presets)
    hint = f" (did you mean {meant}?)" if meant else ""
    if not path.is_file():
        known = ", ".join(presets)
        raise UserError(f"no config {name_or_path!r}{hint}: expected a TOML file or one of the presets {known}")
    names = translated(path.read_text(encoding="utf-8", errors="replace"))
    raise UserError(
        f"{path} is a Python config, as nanoGPT has them, which is not run{hint}: write its values as "
        f"section.key=value, or into a TOML file ({names})"
    )


def preset_files() -> dict[str, Path]:
    """The presets by name: `configs/` next to the packages in a checkout; inside this package in an
    installed wheel.
    """
    package = Path(__file__).parents[1]
    checkout = package.parent / "configs"
    folder = checkout if checkout.is_dir() else package / "configs"
    return {preset.stem: preset for preset in sorted(folder.glob("*.toml"), key=lambda preset: preset.stem)}


def override(name: str, value: Any) -> str:
    """`section.key=value` of a Python value, as the command line has it."""
    return f"{name}={value if isinstance(value, str | Path) else toml_value(value)}"


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors of Windows write a byte order mark
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _apply_override(document: dict[str, Any], override: str, faults: list[str]) -> None:
    name, equals, text = override.partition("=")
    section, dot, key_name = name.strip().partition(".")  # a line of TOML in quotes has spaces
    if not (equals and dot and key_name):
        hint = did_you_mean(name, "=" + text) if keys_for(name) else ", such as optimizer.lr=3e-4"
        faults.append(f"invalid override {override!r}: expected section.key=value{hint}")
        return
    keys = document.setdefault(section, {})
    if isinstance(keys, dict):
        # Text is taken as typed: the value of run.name=124 is not a number.
        entry = KEYS.get(f"{section}.{key_name}")
        keys[key_name] = text if entry is not None and entry.type is str else _parse_value(text)


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _section_from_dict(section: str, keys: dict[str, Any], faults: list[str]) -> Any:
    values = {}
    for key_name, value in keys.items():
        name = f"{section}.{key_name}"
        if name not in KEYS:
            faults.append(f"unknown key {name}{did_you_mean(name)}")
            continue
        try:
            values[key_name] = _coerce(value, KEYS[name].type)
        except TypeError:
            faults.append(f"{name}={shown(value)}: expected {expected(KEYS[name])}")
    return SECTIONS[section](**values)


def _coerce(value: Any, wanted: Any) -> Any:
    """`value` as `wanted`, without guessing: a bool is not a number, nor is text, but 1 is a
    float.
    """
    # Not isinstance: in Python a bool is an int.
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is wanted:
        return value
    if wanted == tuple[float, float] and isinstance(value, list | tuple) and len(value) == 2:
        return tuple(_coerce(part, float) for part in value)
    if wanted == tuple[str, ...] and isinstance(value, list | tuple):
        return tuple(_coerce(part, str) for part in value)
    if wanted == tuple[WeightedDataset, ...] and isinstance(value, list | tuple):
        return tuple(_weighted_dataset(entry) for entry in value)
    raise TypeError


def _weighted_dataset(entry: Any) -> WeightedDataset:
    types = get_type_hints(WeightedDataset)
    if not isinstance(entry, dict) or entry.keys() != types.keys():
        raise TypeError
    return WeightedDataset(**{name: _coerce(value, types[name]) for name, value in entry.items()})
