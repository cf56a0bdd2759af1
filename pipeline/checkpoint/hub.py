"""Models of the Hugging Face Hub: hf:ORG/NAME[@REVISION] -> a folder in Hugging Face's cache, with a network or without.

Only a config, safetensors and the tokenizer's files cross from the Hub: neither programs nor pickles.
"""

import errno
import logging
import re
import sys
from pathlib import Path

from pipeline.errors import UserError, one_line
from pipeline.log import logger

FILES = (
    "config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
)  # fmt: skip
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
_NAME = re.compile(r"hf:(?P<repository>\w[\w.-]*(/\w[\w.-]*)?)(@(?P<revision>\w[\w./-]*))?")


def model_folder(name: str) -> Path:
    """Bring a model into the cache, where it is not there, and return its folder. Raises UserError where that fails."""
    parts = _NAME.fullmatch(name)
    if parts is None or ".." in name:
        raise UserError(f"{name!r} does not name a Hub model: wanted hf:ORG/NAME[@REVISION], such as hf:gpt2")
    repository, revision = parts["repository"], parts["revision"]
    try:
        return _snapshot(repository, revision, cached=False)
    except Exception as error:  # the Hub's, the network's and the cache's own
        cause = error.__cause__ or error
    if isinstance(cause, OSError) and cause.errno in DISK_IS_FULL:
        raise cause
    said = f"{type(cause).__name__}: {one_line(cause)[:200]}"
    try:
        folder = _snapshot(repository, revision, cached=True)
    except Exception:
        raise UserError(
            f"model {repository} is neither in the cache nor could it be fetched ({said}): "
            f"check its name and the network, or bring it here with: hf download {repository}"
        ) from None
    if not any(folder.glob("model*.safetensors")):
        raise UserError(f"model {repository} was not brought whole, its weights are missing ({said}): mend that first")
    logger.info("%s could not be fetched (%s); what the cache has is used", name, said)
    return folder


def _snapshot(repository: str, revision: str | None, cached: bool) -> Path:
    import huggingface_hub
    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # what failed in the end is in the error
    if not sys.stderr.isatty():
        disable_progress_bars()
    where = huggingface_hub.snapshot_download(
        repository, revision=revision, allow_patterns=list(FILES), local_files_only=cached
    )
    return Path(where)
