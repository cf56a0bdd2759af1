"""The Hugging Face side of a checkpoint folder: config.json, weight layout, tokenizer files. No transformers needed.

Names are the same on both sides. What differs: GPT-2's projections are stored as (in, out), torch's Linear holds (out, in);
the folder has no padding rows; and it has every bias, so a model without biases is stored with zeros, which is the same
function.
"""

import json
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pipeline.byte_pairs import PUBLISHED, merges_of, published_for, symbols
from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.model import GPT, INIT_STD, LAYER_NORM_EPSILON
from pipeline.sharding import whole
from pipeline.tokenizer import (
    END_OF_TEXT,
    JSON_FILE,
    UNKNOWN,
    WORD_PATTERN,
    BytePairTokenizer,
    ByteTokenizer,
    CharTokenizer,
    JsonTokenizer,
    Tokenizer,
    WordTokenizer,
)

_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_VOCABULARY_ROWS = ("transformer.wte.weight", "lm_head.weight")
_GELU_TANH = ("gelu_new", "gelu_pytorch_tanh")


def config_json(model: GPT, end_of_text: int) -> dict[str, Any]:
    """config.json of a model folder that `AutoModelForCausalLM.from_pretrained` opens."""
    config = model.config
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": model.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "activation_function": "gelu_new",
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "layer_norm_epsilon": LAYER_NORM_EPSILON,
        "initializer_range": INIT_STD,
        "tie_word_embeddings": config.tie_weights,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": "float32",
    }


def model_config(document: dict[str, Any], folder: str) -> tuple[ModelConfig, int]:
    """Our config and the vocabulary size from a config.json. Raises UserError for what is not GPT-2 as trained here."""
    wanted = {
        "model_type": ("gpt2",),
        "activation_function": _GELU_TANH,
        "layer_norm_epsilon": (LAYER_NORM_EPSILON,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
    }
    for name, values in wanted.items():
        if document.get(name, values[0]) not in values:
            raise UserError(f"{folder}/config.json has {name}={document[name]!r}, this program has {values[0]!r} only")
    try:
        if document.get("n_inner") not in (None, 4 * int(document["n_embd"])):
            raise UserError(f"{folder}/config.json has n_inner={document['n_inner']}, this program has 4 n_embd only")
        config = ModelConfig(
            n_layer=int(document["n_layer"]),
            n_head=int(document["n_head"]),
            n_embd=int(document["n_embd"]),
            block_size=int(document["n_positions"]),
            tie_weights=bool(document.get("tie_word_embeddings", True)),
        )
        return config, int(document["vocab_size"])
    except KeyError as error:
        raise UserError(f"{folder}/config.json has no {error}: it does not describe a GPT-2 model") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder}/config.json does not describe a GPT-2 model: {error}") from None


def to_folder_layout(model: GPT, name: str, tensor: Tensor) -> Tensor:
    """A parameter, or a tensor of its shape such as one of Adam's moments, as the folder stores it: whole, so all
    ranks must ask where it is sharded.
    """
    tensor = whole(tensor.detach())
    if name in _VOCABULARY_ROWS:
        tensor = tensor[: model.vocab_size]
    elif name.endswith(_TRANSPOSED):
        tensor = tensor.t()
    return tensor.contiguous()


def from_folder_layout(model: GPT, name: str, stored: Tensor) -> Tensor:
    """What `to_folder_layout` gave, back in the model's own layout, padding rows zero."""
    if name.endswith(_TRANSPOSED):
        return stored.t()
    if name in _VOCABULARY_ROWS:
        padding = model.lm_head.out_features - model.vocab_size
        return torch.nn.functional.pad(stored, (0, 0, 0, padding))
    return stored


def folder_shapes(model: GPT) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the folder's model.safetensors."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        rows, *rest = parameter.shape
        if name in _VOCABULARY_ROWS:
            rows = model.vocab_size
        shapes[name] = (*rest, rows) if name.endswith(_TRANSPOSED) else (rows, *rest)
    return shapes


def zero_biases(model: GPT) -> dict[str, Tensor]:
    """The biases Hugging Face's GPT-2 has and a model with bias=false lacks."""
    if model.config.bias:
        return {}
    with_bias = [name for name, module in model.named_modules() if getattr(module, "bias", 0) is None]
    sizes = {"c_attn": 3, "c_fc": 4}
    return {
        f"{name}.bias": torch.zeros(sizes.get(name.rpartition(".")[2], 1) * model.config.n_embd)
        for name in with_bias
        if name != "lm_head"
    }


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """File name -> content of what `AutoTokenizer.from_pretrained` reads: text gives the same ids there. What differs is
    transformers' own: a special token written out in a text is found there, and `word` is joined by other rules.
    """
    end_of_text, about = END_OF_TEXT, {"unk_token": END_OF_TEXT}
    match tokenizer:
        case JsonTokenizer():
            content = tokenizer.content
            (end_of_text,) = (token for token, i in tokenizer.vocabulary().items() if i == tokenizer.end_of_text)
            about = {}  # a token that the file lacks would be added behind its vocabulary
        case BytePairTokenizer():
            content = _byte_pair_json(tokenizer)
        case ByteTokenizer():
            content = _byte_level_json(tokenizer, _byte_level(False), {bytes([byte]): byte for byte in range(256)})
        case CharTokenizer():
            content = _char_json(tokenizer)
        case WordTokenizer():
            content, about = _word_json(tokenizer), {"unk_token": UNKNOWN}
        case _:
            raise AssertionError(f"{tokenizer.name} has no form as a tokenizer.json")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        **about,
        "clean_up_tokenization_spaces": False,
    }
    return {JSON_FILE: content, "tokenizer_config.json": json.dumps(config).encode()}


@cache  # finding the merges of 100,256 ranks takes a second, and every checkpoint wants them
def _byte_pair_json(tokenizer: BytePairTokenizer) -> bytes:
    ranks = tokenizer.ranks()
    published = published_for(tokenizer.name, ranks)
    if published is PUBLISHED["gpt2"]:
        return _byte_level_json(tokenizer, _byte_level(True), ranks)
    cut = {"type": "Split", "pattern": {"Regex": published.plain}, "behavior": "Isolated", "invert": False}
    return _byte_level_json(tokenizer, {"type": "Sequence", "pretokenizers": [cut, _byte_level(False)]}, ranks)


def _byte_level_json(tokenizer: Tokenizer, pre_tokenizer: dict[str, Any], ranks: dict[bytes, int]) -> bytes:
    merges = merges_of(ranks)
    model = {
        "type": "BPE",
        # tiktoken takes a piece that is a token whole; that only differs for tokens which no merge makes.
        "ignore_merges": len(merges) + 256 < len(ranks),
        "vocab": {**{symbols(token): rank for token, rank in ranks.items()}, END_OF_TEXT: tokenizer.end_of_text},
        "merges": [[symbols(left), symbols(right)] for left, right in merges],
    }
    return _tokenizer_json(tokenizer, model, pre_tokenizer, _byte_level(True))


def _char_json(tokenizer: CharTokenizer) -> bytes:
    vocabulary = {character: i for i, character in enumerate((*tokenizer.characters, END_OF_TEXT))}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": ""}  # in no vocabulary: unknown ones are refused
    cut = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    return _tokenizer_json(tokenizer, model, cut, {"type": "Fuse"})


def _word_json(tokenizer: WordTokenizer) -> bytes:
    vocabulary = {word: i for i, word in enumerate((*tokenizer.words, UNKNOWN, END_OF_TEXT))}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": UNKNOWN}
    # Inverted, the pattern's words are what is kept and the spaces between them what is removed.
    cut = {"type": "Split", "pattern": {"Regex": WORD_PATTERN}, "behavior": "Removed", "invert": True}
    return _tokenizer_json(tokenizer, model, cut, {"type": "WordPiece", "prefix": "##", "cleanup": True})


def _tokenizer_json(
    tokenizer: Tokenizer, model: dict[str, Any], pre_tokenizer: dict[str, Any], decoder: dict[str, Any]
) -> bytes:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    end_of_text = {"id": tokenizer.end_of_text, "content": END_OF_TEXT, "special": True, **flags}
    document = {
        "version": "1.0",
        "added_tokens": [end_of_text],
        "pre_tokenizer": pre_tokenizer,
        "decoder": decoder,
        "model": model,
    }
    return json.dumps(document).encode()


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
