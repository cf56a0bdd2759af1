"""Qwen3 in a Hugging Face folder: the model's parameters are under "model." there."""

import reprlib
from dataclasses import replace
from typing import Any

from pipeline.checkpoint.layout import Layout, Shapes, check_options, size_of
from pipeline.config.keys import ModelConfig
from pipeline.errors import UserError
from pipeline.model.constants import INIT_STD, RMS_NORM_EPSILON, swiglu_width

HEAD = "lm_head.weight"
# What config.json may say besides sizes; the first is what a missing one means.
_OPTIONS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",), "rms_norm_eps": (RMS_NORM_EPSILON,), "attention_bias": (False,),
    "use_sliding_window": (False,), "rope_scaling": (None,), "quantization_config": (None,),
    "tie_word_embeddings": (False, True),
}  # fmt: skip


class Qwen3Layout(Layout):
    """Qwen3ForCausalLM of transformers, which vLLM and llama.cpp know too."""

    model_type = "qwen3"
    vocabulary_rows = ("transformer.embed_tokens.weight", HEAD)

    def explicit(self, config: ModelConfig) -> ModelConfig:
        return replace(
            config, n_kv_head=config.kv_heads, head_dim=config.head_width, n_inner=swiglu_width(config), bias=False
        )

    def config_json(self, config: ModelConfig, vocab_size: int, end_of_text: int, dtype: str) -> dict[str, Any]:
        return {
            "architectures": ["Qwen3ForCausalLM"], "model_type": self.model_type,
            "vocab_size": vocab_size, "max_position_embeddings": config.block_size,
            "hidden_size": config.n_embd, "intermediate_size": swiglu_width(config), "num_hidden_layers": config.n_layer,
            "num_attention_heads": config.n_head, "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_width,  # 128 where it is missing
            "hidden_act": "silu", "rms_norm_eps": RMS_NORM_EPSILON, "initializer_range": INIT_STD,
            "attention_bias": False, "attention_dropout": config.dropout,
            # Before transformers 5, and in vLLM's older versions, at the top alone.
            "rope_theta": config.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
            "use_sliding_window": False, "sliding_window": None, "tie_word_embeddings": config.tie_weights,
            "bos_token_id": end_of_text, "eos_token_id": end_of_text, "dtype": dtype,
        }  # fmt: skip

    def model_config(self, document: dict[str, Any], path: str) -> tuple[ModelConfig, int]:
        check_options(document, _OPTIONS, path)
        if set(document.get("layer_types") or ()) - {"full_attention"}:
            raise UserError(f"{path} has other layer_types than 'full_attention': nothing else is implemented")
        names = (
            "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size",
            "max_position_embeddings", "vocab_size", "head_dim",
        )  # fmt: skip
        layers, heads, kv_heads, width, inner, block_size, rows, head_dim = (
            size_of({"head_dim": 128} | document, name, path) for name in names
        )
        if heads % kv_heads:
            raise UserError(
                f"{path} has num_attention_heads={heads}, which is not a multiple of num_key_value_heads={kv_heads}"
            )
        if head_dim % 2:
            raise UserError(f"{path} has head_dim={head_dim}: rotary positions expect an even number")
        config = ModelConfig(
            arch="qwen3", n_layer=layers, n_head=heads, n_kv_head=kv_heads, n_embd=width, head_dim=head_dim,
            n_inner=inner, block_size=block_size, rope_theta=_rope_theta(document, path), bias=False,
            tie_weights=document.get("tie_word_embeddings", False),
        )  # fmt: skip
        return config, rows

    def shapes(self, config: ModelConfig, vocab_rows: int) -> Shapes:
        width = config.n_embd
        shapes: Shapes = {"model.embed_tokens.weight": (vocab_rows, width)}
        for layer in range(config.n_layer):
            shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in _block_shapes(config).items()}
        shapes |= {"model.norm.weight": (width,)}
        return shapes if config.tie_weights else {**shapes, HEAD: (vocab_rows, width)}

    def stored_name(self, name: str) -> str:
        return name.replace("transformer.", "model.", 1)

    def is_ignored(self, config: ModelConfig, stored: str) -> bool:
        """Some files carry a tied head."""
        return config.tie_weights and stored == HEAD


def _rope_theta(document: dict[str, Any], path: str) -> float:
    """From where transformers 5 has it, or from where earlier versions had it."""
    rope = document.get("rope_parameters") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise UserError(f"{path} has rope_parameters={reprlib.repr(rope)}: only rope_type 'default' is implemented")
    theta = rope.get("rope_theta", document.get("rope_theta", 10_000.0))
    if not isinstance(theta, int | float) or isinstance(theta, bool) or not 0 < theta < float("inf"):
        raise UserError(f"{path} has rope_theta={reprlib.repr(theta)}, expected a number above 0")
    return float(theta)


def _block_shapes(config: ModelConfig) -> Shapes:
    width, inner, head = config.n_embd, swiglu_width(config), config.head_width
    queries, keys = config.n_head * head, config.kv_heads * head
    return {
        "input_layernorm": (width,), "post_attention_layernorm": (width,),
        "self_attn.q_proj": (queries, width), "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries), "self_attn.q_norm": (head,), "self_attn.k_norm": (head,),
        "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner),
    }  # fmt: skip
