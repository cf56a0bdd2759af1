"""What a site adds to every script: ~/.config/pipeline/site.toml, or the file that PIPELINE_SITE names.

modules = ["cuda/12.4"]                     loaded before anything runs
exports = {NCCL_SOCKET_IFNAME = "ib0"}      variables of the job
srun = ["--container-image=/images/torch.sqsh", "--cpu-bind=cores"]
python = "/usr/bin/python3"                 the interpreter of srun's tasks, such as the image's
"""

import os
import re
import shlex
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Site:
    modules: list[str] = field(default_factory=list)
    exports: dict[str, str] = field(default_factory=dict)
    srun: list[str] = field(default_factory=list)
    python: str = ""


def load() -> Site:
    """The site's file, or nothing where there is none. Raises UserError for one that is wrong."""
    named = os.environ.get("PIPELINE_SITE")
    path = Path(named or Path.home() / ".config" / "pipeline" / "site.toml")
    if not named and not path.exists():
        return Site()
    try:
        site = Site(**tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:  # no such file, not TOML, an unknown key
        raise UserError(
            f"cannot use the site file {path}: {error}; its keys are modules, exports, srun, python"
        ) from None
    for kind, values in ((list, site.modules), (list, site.srun), (dict, site.exports), (str, site.python)):
        words = values.values() if isinstance(values, dict) else values
        if not isinstance(values, kind) or not all(isinstance(word, str) for word in words):
            raise UserError(f"invalid value {values!r} in {path}: expected {kind.__name__} of strings")
    # How many tasks there are, and where, is what the scripts ask srun for themselves.
    wrong = [name for name in site.exports if not re.fullmatch(r"[A-Za-z_]\w*", name)]
    if wrong := wrong + [word for word in site.srun if not re.match(r"--(?!n(tasks|odes))\w", word)]:
        raise UserError(f"invalid {wrong[0]!r} in {path}: expected the name of a variable, or --OPTION=VALUE of srun")
    return site


def shell(site: Site) -> str:
    """The lines of bash that a script evaluates. `on_node` starts one process with srun's options."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in site.exports.items()]
    if site.modules:
        # The functions behind `module` use unset variables, and fail in between.
        load = f"module load {shlex.join(site.modules)}"
        lines += [
            "set +eu", "type module &>/dev/null || . /etc/profile.d/modules.sh || . /etc/profile.d/lmod.sh",
            f"{load} || {{ echo {shlex.quote(f'error: {load} failed')} >&2; exit 2; }}", "set -eu",
        ]  # fmt: skip
    if site.srun:
        one_task = 'srun --nodes=1 --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}"'
        lines += [f"site_srun=({shlex.join(site.srun)})", f"on_node=({one_task} {shlex.join(site.srun)})"]
    if site.python:
        lines.append(f"TASK_PYTHON={shlex.quote(site.python)}")
    return "".join(f"{line}\n" for line in lines)
