"""GPT-2 in a Hugging Face folder. Parameters have the same names in the model.

The folder has every bias: a model without biases is stored with zeros, which is the same function.
"""

import re
import reprlib
from dataclasses import replace
from typing import Any

from pipeline.checkpoint.layout import Layout, Shapes, check_options, size_of
from pipeline.config.keys import ModelConfig
from pipeline.errors import UserError
from pipeline.model.constants import INIT_STD, LAYER_NORM_EPSILON

HEAD = "lm_head.weight"
POSITIONS = "transformer.wpe.weight"
# What config.json may say besides sizes.
_OPTIONS: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "layer_norm_epsilon": (LAYER_NORM_EPSILON,),
    "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
    "quantization_config": (None,), "tie_word_embeddings": (True, False),
}  # fmt: skip


class GPT2Layout(Layout):
    """GPT2LMHeadModel of transformers, whose Conv1D stores projections as (in, out)."""

    model_type = "gpt2"
    vocabulary_rows = ("transformer.wte.weight", HEAD)
    position_rows = (POSITIONS,)
    transposed = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

    def explicit(self, config: ModelConfig) -> ModelConfig:
        return replace(config, n_kv_head=0, head_dim=0, n_inner=0, rope_theta=ModelConfig.rope_theta)

    def config_json(self, config: ModelConfig, vocab_size: int, end_of_text: int, dtype: str) -> dict[str, Any]:
        return {
            "architectures": ["GPT2LMHeadModel"], "model_type": self.model_type,
            "vocab_size": vocab_size, "n_positions": config.block_size,
            "n_embd": config.n_embd, "n_layer": config.n_layer, "n_head": config.n_head,
            "n_inner": None,  # stands for 4 n_embd
            "activation_function": "gelu_new",
            "embd_pdrop": config.dropout, "attn_pdrop": config.dropout, "resid_pdrop": config.dropout,
            "layer_norm_epsilon": LAYER_NORM_EPSILON, "initializer_range": INIT_STD,
            "tie_word_embeddings": config.tie_weights, "bos_token_id": end_of_text, "eos_token_id": end_of_text,
            "dtype": dtype,
        }  # fmt: skip

    def model_config(self, document: dict[str, Any], path: str) -> tuple[ModelConfig, int]:
        check_options(document, _OPTIONS, path)
        names = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
        layers, heads, width, block_size, rows = (size_of(document, name, path) for name in names)
        if width % heads:
            raise UserError(f"{path} has n_embd={width}, which is not a multiple of n_head={heads}")
        if document.get("n_inner") not in (None, 4 * width):
            raise UserError(f"{path} has n_inner={reprlib.repr(document['n_inner'])}, expected 4 n_embd = {4 * width}")
        tied = document.get("tie_word_embeddings", True)
        return ModelConfig(n_layer=layers, n_head=heads, n_embd=width, block_size=block_size, tie_weights=tied), rows

    def shapes(self, config: ModelConfig, vocab_rows: int) -> Shapes:
        width = config.n_embd
        shapes: Shapes = {"transformer.wte.weight": (vocab_rows, width), POSITIONS: (config.block_size, width)}
        for layer in range(config.n_layer):
            shapes |= {f"transformer.h.{layer}.{name}": shape for name, shape in _block_shapes(width).items()}
        shapes |= {"transformer.ln_f.weight": (width,), "transformer.ln_f.bias": (width,)}
        return shapes if config.tie_weights else {**shapes, HEAD: (vocab_rows, width)}

    def current_name(self, stored: str) -> str:
        """OpenAI's files leave the leading "transformer." out."""
        return f"transformer.{stored}" if re.match(r"(wte|wpe|h\.\d+|ln_f)\.", stored) else stored

    def is_trained(self, config: ModelConfig, stored: str) -> bool:
        return config.bias or not stored.endswith(".bias")

    def is_ignored(self, config: ModelConfig, stored: str) -> bool:
        """Old files carry the causal mask, and a tied head, as tensors."""
        return stored.endswith((".attn.bias", ".attn.masked_bias")) or (config.tie_weights and stored == HEAD)


def _block_shapes(width: int) -> Shapes:
    sizes = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
    sizes |= {"mlp.c_fc": (width, 4 * width), "mlp.c_proj": (4 * width, width)}
    shapes: Shapes = {f"{norm}.{name}": (width,) for norm in ("ln_1", "ln_2") for name in ("weight", "bias")}
    for name, (inputs, outputs) in sizes.items():
        shapes |= {f"{name}.weight": (inputs, outputs), f"{name}.bias": (outputs,)}
    return shapes
