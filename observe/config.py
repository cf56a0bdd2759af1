"""The resolved config: each value with where it comes from, what it means and what it may be."""

import sys
from collections.abc import Sequence

from observe.tables import print_json
from pipeline.config.faults import expected
from pipeline.config.keys import KEYS, SECTIONS
from pipeline.config.load import config_from_arguments, origins, to_dict, toml_value

VALUE_WIDTH = 36  # of most lines, so that what follows is aligned


def run(arguments: Sequence[str], as_json: bool) -> None:
    """Print the config of `pipeline train ARGUMENTS`: a TOML file, or an object by section.key. Raises
    UserError.
    """
    config, found = to_dict(config_from_arguments(list(arguments))), origins(list(arguments))
    if as_json:
        print_json({
            name: {
                "value": config[name.partition(".")[0]][entry.name], "origin": found[name],
                "meaning": entry.metadata["text"], "expected": expected(entry),
            }
            for name, entry in KEYS.items()
        })  # fmt: skip
        return
    for section in SECTIONS:
        lines = [
            f"{f'{key} = {toml_value(value)}':<{VALUE_WIDTH}}  # {found[name]}: {KEYS[name].metadata['text']}\n"
            for key, value in config[section].items()
            for name in [f"{section}.{key}"]
        ]
        sys.stdout.write(f"[{section}]\n{''.join(lines)}\n")
