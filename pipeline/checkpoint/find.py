"""What `--ckpt` means: a path; `latest`, `best` or `average` of a run; a model on the Hugging Face Hub.

Only a config, safetensors and the tokenizer's files are downloaded: neither programs nor pickles.
What the cache has is used where there is no network.
"""

import errno
import logging
import re
import sys
from pathlib import Path
from typing import Any

from pipeline.checkpoint.pointers import pointed_folder
from pipeline.config.keys import RunConfig
from pipeline.config.other_names import hub_hint
from pipeline.errors import UserError, one_line
from pipeline.log import logger
from pipeline.runs import LAST_BYTES, RunFolder, all_runs, newest_run

RUNS = Path(RunConfig.dir)  # where the names of OF_A_RUN look for runs
OF_A_RUN = ("latest", "best", "average")
HUB_FILES = (
    "config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
)  # fmt: skip
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
MOST_CAUSE_CHARACTERS = 200
_HUB_NAME = re.compile(r"hf:(?P<repository>\w[\w.-]*(/\w[\w.-]*)?)(@(?P<revision>\w[\w./-]*))?")


def find_checkpoint(ckpt: str, run_dir: Path | None, runs: Path = RUNS) -> Path:
    """The folder of a `--ckpt`: a path, hf:ORG/NAME, or `latest`, `best` or `average`, which may be made
    here, of `run_dir` or of the newest run under it, by default under `runs`. A run, by its name there
    or its folder, stands for its latest. Raises UserError where there is none.
    """
    for path in (runs / ckpt, Path(ckpt)):
        if ckpt not in OF_A_RUN and (path / "checkpoints").is_dir():
            ckpt, run_dir = "latest", path
    if ckpt not in OF_A_RUN:
        return find_model_folder(ckpt)
    if run_dir is None or not (run_dir / "checkpoints").is_dir():  # a folder of runs
        run_dir = newest_run(run_dir or runs) or run_dir
    folder = _folder_of(run_dir / "checkpoints", ckpt) if run_dir else None
    if folder is None:
        raise UserError(f"no checkpoint {ckpt} in {run_dir or runs}: train first, or name a folder with --ckpt PATH")
    if ckpt == "best" and run_dir is not None:
        _compare_best(RunFolder(run_dir), folder, runs)
    return folder


def _folder_of(checkpoints: Path, name: str) -> Path | None:
    if name == "average":
        from pipeline.checkpoint.average import average_folder  # it imports torch

        return average_folder(checkpoints)
    return pointed_folder(checkpoints, name)


def _compare_best(run: RunFolder, folder: Path, runs: Path) -> None:
    """Log which run `best` is of, and which one on the same data has a lower val loss."""
    best, data = run.summary(LAST_BYTES).best_val_loss, _data_of(run)
    logger.info("best of %s: %s%s", run.path, folder.name, "" if best is None else f", val loss {best:.4f}")
    losses = [
        (loss, other) for other in all_runs(runs) if (loss := other.summary(LAST_BYTES).best_val_loss) is not None
    ]
    better = [(loss, str(other.path)) for loss, other in losses if best and loss < best and _data_of(other) == data]
    if better:
        loss, path = min(better)
        count = f"{len(better)} other run(s) on the same data have a lower one"
        logger.info("%s, the lowest is %.4f: --ckpt best --run-dir %s", count, loss, path)


def _data_of(run: RunFolder) -> list[Any]:
    # Of all keys of the data only document_mask does not say which they are.
    return [run.read_config().get(f"data.{key}", run) for key in ("dataset", "data_dir", "mixture")]


def find_model_folder(name: str) -> Path:
    """The folder of a path or of hf:ORG/NAME[@REVISION], downloaded unless cached. Raises UserError
    where there is none.
    """
    if name.startswith("hf:"):
        return _hub_folder(name)
    if not Path(name).is_dir():
        raise UserError(
            f"no checkpoint at {name}{hub_hint(name)}: expected a folder, hf:ORG/NAME, latest, best or average"
        )
    return Path(name)


def _hub_folder(name: str) -> Path:
    parts = _HUB_NAME.fullmatch(name)
    if parts is None or ".." in name:
        raise UserError(f"invalid Hub model {name!r}: expected hf:ORG/NAME[@REVISION], such as hf:gpt2")
    repo, revision = parts["repository"], parts["revision"]
    try:
        return _snapshot(repo, revision, cached=False)
    except Exception as error:  # the Hub, the network and the cache each raise their own kinds
        cause = error.__cause__ or error
    # A full disk has nothing to do with the Hub: its own line says what to do.
    if isinstance(cause, OSError) and cause.errno in DISK_IS_FULL:
        raise cause
    reason = f"{type(cause).__name__}: {one_line(cause)[:MOST_CAUSE_CHARACTERS]}"
    try:
        folder = _snapshot(repo, revision, cached=True)
    except Exception:
        raise UserError(
            f"model {repo} is not in the cache and could not be downloaded ({reason}): "
            f"check its name and the network, or fetch it with: hf download {repo}"
        ) from None
    # An interrupted download leaves a snapshot with some of its files.
    if not any(folder.glob("model*.safetensors")):
        raise UserError(f"the download of {repo} is incomplete, its weights are missing ({reason}): fix that first")
    logger.info("%s could not be downloaded (%s); using the cached files", name, reason)
    return folder


def _snapshot(repo: str, revision: str | None, cached: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    # Its warnings about retries would repeat what the final error says.
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    if not sys.stderr.isatty():
        disable_progress_bars()
    folder = snapshot_download(repo, revision=revision, allow_patterns=list(HUB_FILES), local_files_only=cached)
    return Path(folder)
