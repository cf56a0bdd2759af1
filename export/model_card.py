"""The README.md of an exported model: what it is, what it was trained on, how to use it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from pipeline import __version__
from pipeline.budget import parameters
from pipeline.checkpoint.folder import Description
from pipeline.checkpoint.layouts import layout_of
from pipeline.config.keys import Config, DataConfig, RunConfig
from pipeline.config.load import from_dict, to_toml
from pipeline.dataset.shards import Manifest, read_manifest
from pipeline.errors import UserError
from pipeline.log import printable
from pipeline.model.language_model import LanguageModel
from pipeline.vocabulary.tokenizer import Tokenizer


def model_card(
    name: str, model: LanguageModel, tokenizer: Tokenizer, *, dtype: str, saved: Description | None, file: str
) -> str:
    """model_card.md filled in. `saved`: None for a foreign model; `file`: the GGUF's name or ""."""
    library, shape = "gguf" if file else "transformers", layout_of(model.config).explicit(model.config)
    data = ModelCardData(library_name=library, pipeline_tag="text-generation", tags=[shape.arch])
    facts: dict[str, Any] = {"name": name, "shape": shape, "tokenizer": tokenizer}
    facts |= {"parameters": parameters(model.config, tokenizer.vocab_size)}
    facts |= {"version": __version__, "show": printable, "code": _code, "number": "{:,}".format}
    if saved is not None:
        config = from_dict(saved.config)
        facts |= {"saved": saved, "config": _public(config), "toml": to_toml(_public(config)).rstrip()}
        facts |= {"manifest": _find_manifest(config, saved), "format_source": _format_source}
    return str(ModelCard.from_template(data, str(Path(__file__).with_suffix(".md")), dtype=dtype, file=file, **facts))


def _public(config: Config) -> Config:
    """Without folders of this machine, which are private."""
    mixture = tuple(replace(source, dataset=_leaf(source.dataset)) for source in config.data.mixture)
    data = replace(config.data, data_dir=DataConfig.data_dir, dataset=_leaf(config.data.dataset), mixture=mixture)
    model = replace(config.model, init_from=_leaf(config.model.init_from))
    return replace(config, run=replace(config.run, dir=RunConfig.dir), data=data, model=model)


def _find_manifest(config: Config, saved: Description) -> Manifest | None:
    """The unchanged dataset's, if it still exists; a mixture's fingerprint belongs to no folder."""
    try:
        manifest = read_manifest(config.dataset_dir(config.datasets[0].dataset))
    except UserError:
        return None
    return manifest if manifest.fingerprint == saved.dataset else None


def _format_source(source: dict[str, Any]) -> str:
    # Absolute paths tell about a machine, relative ones about the data.
    shown = {key: Path(value).name if str(value).startswith("/") else value for key, value in source.items()}
    return ", ".join(f"{key} {value}" for key, value in shown.items() if value is not None)


def _leaf(path: str) -> str:
    return path if path.startswith("hf:") else Path(path).name  # a model of the Hub is public


def _code(text: str) -> str:
    """Text of a file as Markdown that is shown and never interpreted."""
    return "`" + printable(text).replace("`", "'").replace("|", "/") + "`"
