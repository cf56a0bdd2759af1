"""Where files lie that do not come from the Hub: Hugging Face's cache keeps a folder for them."""

from pathlib import Path


def assets() -> Path:
    """It moves with HF_HOME and HF_ASSETS_CACHE, as all of the cache does; it may not exist yet."""
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "gpt-pipeline"
