"""Models of the Hugging Face Hub: hf:ORG/NAME[@REVISION] -> a folder in Hugging Face's cache, with a network or without.

Only a config, safetensors and the tokenizer's files cross from the Hub: neither programs nor pickles.
"""

import logging
import re
import sys
from pathlib import Path

from pipeline.errors import UserError
from pipeline.log import logger

FILES = (
    "config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
)  # fmt: skip
_NAME = re.compile(r"hf:(?P<repository>\w[\w.-]*(/\w[\w.-]*)?)(@(?P<revision>\w[\w./-]*))?")


def model_folder(name: str) -> Path:
    """Bring a model into the cache, where it is not there, and return its folder. Raises UserError where that fails."""
    parts = _NAME.fullmatch(name)
    if parts is None or ".." in name:
        raise UserError(f"{name!r} does not name a Hub model: wanted hf:ORG/NAME[@REVISION], such as hf:gpt2")
    repository, revision = parts["repository"], parts["revision"]
    try:
        folder = _snapshot(repository, revision, cached=False)
    except Exception as error:  # the Hub's, the network's and the cache's own; what is in the cache will do
        try:
            folder = _snapshot(repository, revision, cached=True)
        except Exception:
            cause = error.__cause__ or error
            said = " ".join(str(cause).split())[:200]
            raise UserError(
                f"model {repository} is neither in the cache nor could it be fetched ({type(cause).__name__}: {said}): "
                f"check its name and the network, or bring it here with: hf download {repository}"
            ) from None
        logger.info("%s: the Hub did not answer; what its cache has is used", name)
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
