"""The Hugging Face side of a checkpoint folder: config.json, weight layout, tokenizer files. No transformers needed.

Names are the same on both sides. What differs: GPT-2's projections are stored as (in, out), torch's Linear holds (out, in);
the folder has no padding rows; and it has every bias, so a model without biases is stored with zeros, which is the same
function.
"""

import json
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.model import GPT, INIT_STD, LAYER_NORM_EPSILON
from pipeline.tokenizer import END_OF_TEXT, BytePairTokenizer, Tokenizer

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
    """A parameter, or a tensor of its shape such as one of Adam's moments, as the folder stores it."""
    if name in _VOCABULARY_ROWS:
        tensor = tensor[: model.vocab_size]
    elif name.endswith(_TRANSPOSED):
        tensor = tensor.t()
    return tensor.detach().contiguous()


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
    """File name -> content of what `AutoTokenizer.from_pretrained` reads; empty for a vocabulary it has no form for."""
    if not isinstance(tokenizer, BytePairTokenizer) or tokenizer.name != "gpt2":
        return {}
    return _gpt2_files()


@cache
def _gpt2_files() -> dict[str, bytes]:
    tokenizer = BytePairTokenizer("gpt2")
    ranks = tokenizer.ranks()
    symbols = {token: "".join(map(_byte_symbols().__getitem__, token)) for token in ranks}
    merges = [[symbols[left], symbols[right]] for left, right in merges_of(ranks)]
    special = {"id": tokenizer.end_of_text, "content": END_OF_TEXT, "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    document = {
        "version": "1.0",
        "added_tokens": [{**special, **flags}],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {**{symbols[token]: rank for token, rank in ranks.items()}, END_OF_TEXT: tokenizer.end_of_text},
            "merges": merges,
        },
    }
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": json.dumps(document).encode(), "tokenizer_config.json": json.dumps(about).encode()}


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that made each token of two bytes or more, in rank order.

    A rank table keeps only results. Merging a token's bytes with the earlier ranks alone stops at the two halves that its
    own merge joined.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
            best = min(range(len(joined)), key=joined.__getitem__)
            assert joined[best] < rank, f"token {token!r} cannot be made from earlier merges"
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


@cache
def _byte_symbols() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: itself where printable, else the code points from 256 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
