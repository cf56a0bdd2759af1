"""What `--ckpt` means: a path, a run, `latest`, `best`, or a model on the Hub."""

from pathlib import Path

from pipeline.checkpoint import hub
from pipeline.checkpoint.pointers import pointed_folder
from pipeline.config.keys import RunConfig
from pipeline.config.other_names import hub_hint
from pipeline.errors import UserError

RUNS = Path(RunConfig.dir)  # where `latest` and `best` are looked up


def find_checkpoint(ckpt: str, run_dir: Path | None, runs: Path = RUNS) -> Path:
    """The folder a `--ckpt` means: a path, hf:ORG/NAME, or `latest`/`best` of `run_dir`, by default of the newest run
    under `runs`.
    """
    if ckpt not in ("latest", "best"):
        return find_model_folder(ckpt)
    if run_dir is None:
        pointers = sorted(runs.glob("*/checkpoints/latest"), key=lambda pointer: pointer.stat().st_mtime)
        if not pointers:
            raise UserError(f"no checkpoint under {runs}/: train first, or name a folder with --ckpt PATH")
        run_dir = pointers[-1].parents[1]
    folder = pointed_folder(run_dir / "checkpoints", ckpt)
    if folder is None:
        raise UserError(f"{run_dir} has no checkpoint {ckpt}: train first, or name a folder with --ckpt PATH")
    return folder


def find_model_folder(name: str) -> Path:
    """The folder that hf:ORG/NAME[@REVISION] or a path names. Raises UserError where there is none."""
    if name.startswith("hf:"):
        return hub.model_folder(name)
    if not Path(name).is_dir():
        raise UserError(
            f"no checkpoint at {name}{hub_hint(name)}: expected a checkpoint folder, hf:ORG/NAME, latest or best"
        )
    return Path(name)
