"""The Hugging Face side of a model folder: config.json, weight layout, which vocabulary it has. No transformers needed.

Names are the same on both sides. What differs: GPT-2's projections are stored as (in, out), torch's Linear holds (out, in);
the folder has no padding rows; and it has every bias, so a model without biases is stored with zeros, which is the same
function.
"""

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
from torch import Tensor

from pipeline.config.keys import ModelConfig
from pipeline.errors import UserError
from pipeline.files import read_limited
from pipeline.log import logger
from pipeline.model.gpt2 import INIT_STD, LAYER_NORM_EPSILON
from pipeline.model.language_model import GPT
from pipeline.model.sharding import whole
from pipeline.vocabulary.byte_pair import BytePairTokenizer
from pipeline.vocabulary.huggingface_files import is_gpt2, open_folder
from pipeline.vocabulary.tokenizer import Tokenizer

CONFIG = "config.json"
MOST_CONFIG_BYTES = 1 << 20
GPT2_VOCAB_SIZE = 50257
# Vocabularies are padded to multiples of 64 to 1,024 for the sake of matrix units: GPT-2's 50,257 rows to 50,304.
MOST_PADDING_ROWS = 1023
Shapes = dict[str, tuple[int, ...]]

_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
VOCABULARY_ROWS = ("transformer.wte.weight", "lm_head.weight")
POSITIONS = "transformer.wpe.weight"
_GELU_TANH = ("gelu_new", "gelu_pytorch_tanh")
# What a config.json may say beside the sizes; the first value is what it means where it says nothing.
_OPTIONS: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": _GELU_TANH,
    "layer_norm_epsilon": (LAYER_NORM_EPSILON,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
    "tie_word_embeddings": (True, False),
}


def config_json(config: ModelConfig, vocab_size: int, end_of_text: int, dtype: str = "float32") -> dict[str, Any]:
    """config.json of a model folder that `AutoModelForCausalLM.from_pretrained` opens."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": vocab_size,
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
        "dtype": dtype,
    }


def model_config(document: dict[str, Any], path: str) -> tuple[ModelConfig, int]:
    """Our config and the rows of the vocabulary from a config.json. Raises UserError for what is not GPT-2 as trained here."""
    for name, values in _OPTIONS.items():
        found = document.get(name, values[0])
        if not any(found == value and type(found) is type(value) for value in values):
            wanted = " or ".join(map(repr, values))
            raise UserError(f"{path} has {name}={reprlib.repr(found)}, this program has {wanted} only")
    names = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    layers, heads, width, block_size, rows = (_size(document, name, path) for name in names)
    if width % heads:
        raise UserError(f"{path} has n_embd={width}, which is not a multiple of n_head={heads}")
    if document.get("n_inner") not in (None, 4 * width):
        raise UserError(f"{path} has n_inner={reprlib.repr(document['n_inner'])}, this program has 4 n_embd only")
    tied = document.get("tie_word_embeddings", True)
    return ModelConfig(n_layer=layers, n_head=heads, n_embd=width, block_size=block_size, tie_weights=tied), rows


def _size(document: dict[str, Any], name: str, path: str) -> int:
    size = document.get(name)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        found = f"{name}={reprlib.repr(size)}" if name in document else f"no {name}"
        raise UserError(f"{path} has {found}, wanted a whole number of 1 or more: it describes no GPT-2 model")
    return size


@dataclass(frozen=True)
class ModelFolder:
    """What a folder says of the model in it. `vocab_rows` may be more than the vocabulary: padding that is left out."""

    config: ModelConfig
    tokenizer: Tokenizer
    vocab_rows: int


def identify(folder: Path) -> ModelFolder:
    """The shape and the vocabulary of a Hugging Face GPT-2 folder. Raises UserError for another model, or none."""
    path = folder / CONFIG
    try:
        document = orjson.loads(read_limited(path, MOST_CONFIG_BYTES))
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path} is not a JSON object: it describes no GPT-2 model")
    config, rows = model_config(document, str(path))
    return ModelFolder(config, _tokenizer(folder, rows), rows)


def _tokenizer(folder: Path, rows: int) -> Tokenizer:
    tokenizer = open_folder(folder)
    if tokenizer is None:
        if rows != GPT2_VOCAB_SIZE:
            raise UserError(
                f"{folder} has {rows} tokens and neither tokenizer.json nor vocab.json and merges.txt: its vocabulary is "
                f"unknown; without them a folder is taken for GPT-2's at {GPT2_VOCAB_SIZE} tokens only"
            )
        return BytePairTokenizer("gpt2")
    padding = rows - tokenizer.vocab_size
    if not 0 <= padding <= MOST_PADDING_ROWS:
        raise UserError(
            f"{folder} has {rows} rows for the {tokenizer.vocab_size} tokens of its vocabulary: wanted as many, or up to "
            f"{MOST_PADDING_ROWS} more; the files are of different models"
        )
    if padding:
        logger.info(
            "%s: %d rows past the %d tokens of its vocabulary are left out", folder, padding, tokenizer.vocab_size
        )
    return BytePairTokenizer("gpt2") if is_gpt2(tokenizer) else tokenizer


def to_folder_layout(model: GPT, name: str, tensor: Tensor) -> Tensor:
    """A parameter, or a tensor of its shape such as one of Adam's moments, as the folder stores it: whole, so all
    ranks must ask where it is sharded.
    """
    tensor = whole(tensor.detach())
    if name in VOCABULARY_ROWS:
        tensor = tensor[: model.vocab_size]
    elif name.endswith(_TRANSPOSED):
        tensor = tensor.t()
    return tensor.contiguous()


def from_folder_layout(model: GPT, name: str, stored: Tensor) -> Tensor:
    """What `to_folder_layout` gave, back in the model's own layout, padding rows zero.

    Of a folder with more rows than the model has, for its vocabulary or for positions, the first are taken.
    """
    if name.endswith(_TRANSPOSED):
        return stored.t()
    if name in VOCABULARY_ROWS:
        padding = model.lm_head.out_features - model.vocab_size
        return torch.nn.functional.pad(stored[: model.vocab_size], (0, 0, 0, padding))
    return stored[: model.config.block_size] if name == POSITIONS else stored


def folder_shapes(config: ModelConfig, vocab_rows: int) -> Shapes:
    """Name and shape of every tensor in the folder's model.safetensors, biases always among them."""
    width = config.n_embd
    shapes: Shapes = {"transformer.wte.weight": (vocab_rows, width), POSITIONS: (config.block_size, width)}
    for layer in range(config.n_layer):
        shapes |= {f"transformer.h.{layer}.{name}": shape for name, shape in _block_shapes(width).items()}
    shapes |= {"transformer.ln_f.weight": (width,), "transformer.ln_f.bias": (width,)}
    return shapes if config.tie_weights else {**shapes, "lm_head.weight": (vocab_rows, width)}


def is_trained(config: ModelConfig, name: str) -> bool:
    """Whether the model has the folder's tensor `name`; a model without biases is stored with zeros."""
    return config.bias or not name.endswith(".bias")


def _block_shapes(width: int) -> Shapes:
    sizes = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
    sizes |= {"mlp.c_fc": (width, 4 * width), "mlp.c_proj": (4 * width, width)}
    shapes: Shapes = {f"{norm}.{name}": (width,) for norm in ("ln_1", "ln_2") for name in ("weight", "bias")}
    for name, (inputs, outputs) in sizes.items():
        shapes |= {f"{name}.weight": (inputs, outputs), f"{name}.bias": (outputs,)}
    return shapes
