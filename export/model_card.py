"""The README.md of an exported model: what it is, what it was trained on and how, and how to use it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.checkpoint.folder import Description
from pipeline.config.keys import Config, DataConfig, RunConfig
from pipeline.config.load import from_dict, to_toml
from pipeline.dataset.shards import Manifest, read_manifest
from pipeline.errors import UserError
from pipeline.log import printable
from pipeline.model.language_model import LanguageModel
from pipeline.vocabulary.tokenizer import Tokenizer

LISTED_SOURCES = 20


def model_card(
    name: str, model: LanguageModel, tokenizer: Tokenizer, dtype: str, saved: Description | None, file: str
) -> str:
    """Markdown with the front matter that the Hub reads. `saved` is None for a model from elsewhere; `file` names the
    GGUF file, where the weights are in one.
    """
    front = [
        "---",
        f"library_name: {'gguf' if file else 'transformers'}",
        "pipeline_tag: text-generation",
        "tags:",
        "- gpt2",
        "---",
    ]
    parts = [*front, "", f"# {name}", "", *_about(model, saved), "", "## Model", "", *_model(model, tokenizer, dtype)]
    if saved is not None:
        config = from_dict(saved.config)
        parts += ["", "## Data", "", *_data(config, saved), "", "## Training", "", *_training(config, saved)]
    parts += ["", "## Use", "", *(_use_gguf(file, model.config.block_size) if file else _use(name, saved))]
    return "\n".join(parts) + "\n"


def _about(model: LanguageModel, saved: Description | None) -> list[str]:
    start = _start(from_dict(saved.config)) if saved else ""
    origin = f"trained further from the weights of {code(start)}" if start else "trained from random weights"
    about = f"A GPT-2 language model of {model.parameter_count():,} parameters"
    made = f", {origin} with gpt-pipeline {saved.program}" if saved else f", written by gpt-pipeline {__version__}"
    return [
        f"{about}{made}.",
        "It continues text in the manner of what it was trained on; it was not taught to follow instructions, and nothing "
        "filters what it writes.",
    ]


def _model(model: LanguageModel, tokenizer: Tokenizer, dtype: str) -> list[str]:
    config = model.config
    return _table(
        {
            "parameters": f"{model.parameter_count():,}",
            "layers": config.n_layer,
            "attention heads": config.n_head,
            "width": config.n_embd,
            "context": f"{config.block_size:,} tokens",
            "vocabulary": f"{code(tokenizer.name)}, {tokenizer.vocab_size:,} tokens; {tokenizer.end_of_text} ends a text",
            "biases": "yes" if config.bias else "none in training; stored as zeros",
            "output head": "the token embedding" if config.tie_weights else "a matrix of its own",
            "weights stored as": dtype,
        }
    )


def _data(config: Config, saved: Description) -> list[str]:
    lines = []
    total = sum(source.weight for source in config.datasets)
    for source in config.datasets:
        share = f", {source.weight / total:.1%} of the samples" if len(config.datasets) > 1 else ""
        lines.append(f"- {code(Path(source.dataset).name)}{share}")
    manifest = _manifest(config, saved)
    if manifest is None:
        return [*lines, "", f"The data's fingerprint is {code(saved.dataset)}."]
    documents = "" if manifest.is_foreign else f" of {manifest.count('train', 'documents'):,} documents"
    lines += ["", f"{manifest.count('train', 'tokens'):,} training tokens{documents}, made from:", ""]
    lines += [f"- {code(_in_words(source))}" for source in manifest.sources[:LISTED_SOURCES]]
    more = len(manifest.sources) - LISTED_SOURCES
    return [*lines, *([f"- and {more:,} more"] if more > 0 else []), "", f"Its fingerprint is {code(saved.dataset)}."]


def _manifest(config: Config, saved: Description) -> Manifest | None:
    """That of the dataset the model was trained on, where it still lies there; a mixture's fingerprint names no folder."""
    try:
        manifest = read_manifest(config.dataset_dir(config.datasets[0].dataset))
    except UserError:
        return None
    return manifest if manifest.fingerprint == saved.dataset else None


def _in_words(source: dict[str, Any]) -> str:
    shown = {key: Path(value).name if str(value).startswith("/") else value for key, value in source.items()}
    return ", ".join(f"{key} {value}" for key, value in shown.items() if value is not None)


def _training(config: Config, saved: Description) -> list[str]:
    loss = {} if saved.val_loss is None else {"validation loss": f"{saved.val_loss:.4f} nats a token"}
    figures = {
        "steps": f"{saved.step:,} of {config.train.max_steps:,}",
        "tokens seen": f"{saved.tokens:,}",
        **loss,
        "tokens a step": f"{config.train.tokens_per_step:,}",
        "optimizer": f"{config.optimizer.name}, learning rate {config.optimizer.lr:g} to {config.optimizer.min_lr:g}",
    }
    return [*_table(figures), "", "The whole config:", "", "```toml", to_toml(_public(config)).rstrip(), "```"]


def _public(config: Config) -> Config:
    """Without the places of a machine, which are nobody's business."""
    mixture = tuple(replace(source, dataset=Path(source.dataset).name) for source in config.data.mixture)
    data = replace(config.data, data_dir=DataConfig.data_dir, dataset=Path(config.data.dataset).name, mixture=mixture)
    model = replace(config.model, init_from=_start(config))
    return replace(config, run=replace(config.run, dir=RunConfig.dir), data=data, model=model)


def _start(config: Config) -> str:
    """model.init_from, of a folder its name alone."""
    start = config.model.init_from
    return start if start.startswith("hf:") else Path(start).name


def _use(name: str, saved: Description | None) -> list[str]:
    also = "the same figures and text" if saved else "the same text"
    return [
        "```python", "from transformers import pipeline", "",
        f'generate = pipeline("text-generation", model="{name}")  # the folder that this file is in',
        'print(generate("Once upon a time", max_new_tokens=100)[0]["generated_text"])', "```", "",
        f"or, for {also}, `pipeline sample --ckpt {name} --prompt 'Once upon a time'`.",
    ]  # fmt: skip


def _use_gguf(file: str, block_size: int) -> list[str]:
    # transformers does not read the context length of this architecture, and takes GPT-2's 1,024.
    positions = "" if block_size == 1024 else f", n_positions={block_size}"
    return [
        f"With llama.cpp: `llama-completion -m {file} -p 'Once upon a time'`; with transformers:", "",
        "```python", "from transformers import AutoModelForCausalLM", "",
        f'model = AutoModelForCausalLM.from_pretrained(".", gguf_file="{file}"{positions})', "```",
    ]  # fmt: skip


def _table(rows: dict[str, Any]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def code(text: str) -> str:
    """Text from a file as Markdown that is only shown."""
    return "`" + printable(text).replace("`", "'").replace("|", "/") + "`"
