"""A model as one GGUF file, the format of llama.cpp and programs built on it.

The format names a few pre-tokenizers only, of which ours has GPT-2's: byte-pair vocabularies with
that pattern are written, all others refused. Matrices are (out, in) as in torch, missing biases are
zeros; vectors and the position embedding stay float32, as in files of llama.cpp's converter.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf.quants import quantize

from pipeline.checkpoint.layouts import layout_of
from pipeline.config.keys import ModelConfig
from pipeline.errors import UserError
from pipeline.model.constants import LAYER_NORM_EPSILON, RMS_NORM_EPSILON
from pipeline.model.language_model import LanguageModel
from pipeline.vocabulary.huggingface_files import tokenizer_json
from pipeline.vocabulary.merges import PUBLISHED
from pipeline.vocabulary.tokenizer import Tokenizer
from pipeline.vocabulary.tokenizer_json import JsonTokenizer


@dataclass(frozen=True)
class Vocabulary:
    """`tokens`: by id, None for an unused one. `merges`: "left right", in order of rank.

    `special`: ids of special tokens.
    """

    tokens: list[str | None]
    merges: list[str]
    special: set[int]


def write(path: Path, model: LanguageModel, tokenizer: Tokenizer, *, name: str, dtype: torch.dtype) -> None:
    """Write model and vocabulary. Raises UserError for a vocabulary that GGUF cannot describe."""
    vocabulary = vocabulary_of(tokenizer)
    kind = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[str(dtype).removeprefix("torch.")]
    config = layout_of(model.config).explicit(model.config)
    writer = gguf.GGUFWriter(path, config.arch)
    writer.add_name(name)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    # GPT-2's multilayer perceptron is four times as wide as the model.
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    _OTHERS[config.arch](writer, config)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    _add_vocabulary(writer, vocabulary, tokenizer.end_of_text)
    _add_tensors(writer, model, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_gpt2(writer: Any, config: ModelConfig) -> None:
    writer.add_layer_norm_eps(LAYER_NORM_EPSILON)


def _add_qwen3(writer: Any, config: ModelConfig) -> None:
    writer.add_layer_norm_rms_eps(RMS_NORM_EPSILON)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)


# By `model.arch`, which llama.cpp calls the same: what only one of them has.
_OTHERS = {"gpt2": _add_gpt2, "qwen3": _add_qwen3}


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """Raises UserError unless GPT-2's pattern and the merges alone give the ids of every text."""
    # The tokenizer.json of any vocabulary shows whether its ids are those of merges alone.
    if not isinstance(tokenizer, JsonTokenizer):
        tokenizer = JsonTokenizer(tokenizer.name, tokenizer_json(tokenizer), tokenizer.end_of_text)
    pairs = tokenizer.document["model"].get("merges", ())
    found = tokenizer.merges
    # Each merge makes one token; llama.cpp would never find a token that no merge makes.
    if found is None or found.pattern != PUBLISHED["gpt2"].pattern or len(found.ranks) != 256 + len(pairs):
        raise UserError(
            f"GGUF has no name for the pre-tokenizer of the vocabulary {tokenizer.name}: expected a byte-pair vocabulary with "
            "GPT-2's pattern, such as gpt2 or bpe:N; export with --format safetensors"
        )
    tokens: list[str | None] = [None] * tokenizer.vocab_size
    for token, number in tokenizer.vocabulary().items():
        tokens[number] = token
    special = {int(entry["id"]) for entry in tokenizer.document.get("added_tokens", ())}
    return Vocabulary(tokens, [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs], special)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary, end_of_text: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    # Unused ids need a string too; llama.cpp's converter calls them [PAD<id>].
    writer.add_token_list([f"[PAD{i}]" if token is None else token for i, token in enumerate(vocabulary.tokens)])
    types = [gguf.TokenType.UNUSED if token is None else gguf.TokenType.NORMAL for token in vocabulary.tokens]
    for special in vocabulary.special:
        types[special] = gguf.TokenType.CONTROL
    writer.add_token_types(types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(end_of_text)
    writer.add_eos_token_id(end_of_text)
    # In training a document is preceded by end-of-text, but a prompt may begin anywhere.
    writer.add_add_bos_token(False)


def _add_tensors(writer: Any, model: LanguageModel, kind: str) -> None:
    layout = layout_of(model.config)
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == model.config.arch)
    names = gguf.get_tensor_name_map(arch, model.config.n_layer)
    parameters = {layout.stored_name(name): (name, value) for name, value in model.named_parameters()}
    for stored, shape in layout.shapes(model.config, model.vocab_size).items():
        name, parameter = parameters.get(stored, ("", None))
        tensor = torch.zeros(shape) if parameter is None else parameter.detach()
        # Rows that pad the vocabulary for the sake of matrix units are not part of it.
        if name in layout.vocabulary_rows:
            tensor = tensor[: model.vocab_size]
        half = tensor.ndim == 2 and name not in layout.position_rows
        stored_as = gguf.GGMLQuantizationType[kind if half else "F32"]
        data = quantize(tensor.float().contiguous().numpy(), stored_as)
        writer.add_tensor(names.get_name(stored, try_suffixes=(".weight", ".bias")), data, raw_dtype=stored_as)
