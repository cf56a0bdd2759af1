"""GPT's next-token logits, at the speed at which a machine can read the weights.

The arithmetic of `GPT`, with the keys and values of what was read before, and without what a model in training carries along:
for one token of GPT-2 124M modules cost 2 ms of 20 on two cores. Weights are laid out once, as the CPU reads them fastest.

Shapes: S samples, B rows (1 or S), T tokens, C = n_embd, H heads, D = C / H per head, V = vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.machine.device import memory
from pipeline.model.gpt2 import LAYER_NORM_EPSILON, Block
from pipeline.model.language_model import GPT, finite

Operation = Callable[[Tensor], Tensor]


class Decoder:
    """S continuations: `prefill` reads the text before them, each `step` one more token of every one.

    Keys and values have their memory from the start; of block_size tokens, `length` are filled. Raises UserError for more
    samples than any of it would hold, and where logits are not finite.
    """

    def __init__(self, model: GPT, samples: int, dtype: torch.dtype = torch.float32) -> None:
        config, transformer = model.config, model.transformer
        self.samples, self.block_size, self.length = samples, config.block_size, 0
        self.n_head, self.vocab_size = config.n_head, model.vocab_size
        self.embedding, self.positions = (
            table.weight.detach().to(dtype) for table in (transformer.wte, transformer.wpe)
        )
        cache = (2, samples, config.n_head, config.block_size, config.n_embd // config.n_head)
        needed, there = config.n_layer * math.prod(cache) * dtype.itemsize, memory(self.device)
        if needed > there:
            raise UserError(
                f"keys and values of {samples:,} samples at once want {needed / 1e9:,.0f} GB of memory, {self.device} has "
                f"{there / 1e9:,.0f} GB: take fewer"
            )
        self.layers = [Layer.of(cast(Block, block), self.embedding.new_zeros(cache)) for block in transformer.h]
        self.ln_f, self.lm_head = norm(transformer.ln_f, dtype), product(model.lm_head, dtype, samples)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Tensor:
        """Logits (S, V) after a text, ids (1, T) where the samples share it, else (S, T). What was before is forgotten."""
        self.length = 0
        logits = self._next_logits(ids)
        if len(ids) < self.samples:
            for layer in self.layers:
                layer.cache[:, 1:, :, : self.length] = layer.cache[:, :1, :, : self.length]
        return logits.expand(self.samples, -1)

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Logits (S, V) after one more token a sample, ids (S,). Needs `length` < block_size."""
        return self._next_logits(ids.unsqueeze(1))

    def _next_logits(self, ids: Tensor) -> Tensor:
        """Logits (B, V) after ids (B, T), which follow the `length` tokens in the first B rows of the cache."""
        B, T = ids.shape
        start, end = self.length, self.length + T
        x = F.embedding(ids, self.embedding) + self.positions[start:end]
        for layer in self.layers:
            heads = layer.c_attn(layer.ln_1(x)).view(B, T, 3 * self.n_head, -1).transpose(1, 2)
            query, key, value = heads.chunk(3, dim=1)
            keys, values = layer.cache[:, :B, :, :end]
            keys[:, :, start:], values[:, :, start:] = key, value
            y = F.scaled_dot_product_attention(query, keys, values, is_causal=T > 1)
            x = x + layer.attn_c_proj(y.transpose(1, 2).reshape(B, T, -1))
            x = x + layer.mlp_c_proj(F.gelu(layer.c_fc(layer.ln_2(x)), approximate="tanh"))
        self.length = end
        return finite(self.lm_head(self.ln_f(x[:, -1])))[:, : self.vocab_size].float()


@dataclass(frozen=True)
class Layer:
    """What a block does, and its keys and values: `cache` (2, S, H, block_size, D)."""

    ln_1: Operation
    c_attn: Operation
    attn_c_proj: Operation
    ln_2: Operation
    c_fc: Operation
    mlp_c_proj: Operation
    cache: Tensor

    @classmethod
    def of(cls, block: Block, cache: Tensor) -> "Layer":
        attn, mlp, dtype, samples = block.attn, block.mlp, cache.dtype, cache.size(1)
        return cls(
            norm(block.ln_1, dtype), product(attn.c_attn, dtype, samples), product(attn.c_proj, dtype, samples),
            norm(block.ln_2, dtype), product(mlp.c_fc, dtype, samples), product(mlp.c_proj, dtype, samples), cache,
        )  # fmt: skip


def norm(module: nn.LayerNorm, dtype: torch.dtype) -> Operation:
    weight, bias = in_dtype(module, dtype)
    return partial(
        F.layer_norm, normalized_shape=module.normalized_shape, weight=weight, bias=bias, eps=LAYER_NORM_EPSILON
    )


def product(linear: nn.Linear, dtype: torch.dtype, rows: int) -> Operation:
    """`linear`, its weight copied into the layout that is fastest for `rows` rows.

    Measured on two cores with AMX, GPT-2 124M, ms for all the products of one token, plain -> here: 17.4 -> 15.5 for one row in
    float32, 46 -> 25 for eight; 15.5 -> 10.5 for one row in bfloat16, 16.3 -> 10.8 for eight.
    """
    weight, bias = in_dtype(linear, dtype)
    if weight.device.type == "cpu" and dtype == torch.float32 and rows == 1:
        if linear.out_features > linear.in_features:
            weight = weight.t().contiguous().t()
        return partial(F.linear, weight=weight, bias=bias)
    if weight.device.type == "cpu" and _onednn_multiplies(dtype):
        return _packed(weight, bias, rows)
    return partial(F.linear, weight=weight, bias=bias)


def in_dtype(module: nn.Linear | nn.LayerNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, no copies where they have that type."""
    bias = module.bias
    return module.weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)


def _packed(weight: Tensor, bias: Tensor | None, rows: int) -> Operation:
    """A product by oneDNN's kernels, in whose own layout the weight is copied."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: multiply(x, packed, bias, "none", [], "")


@cache
def _onednn_multiplies(dtype: torch.dtype) -> bool:
    """Private operators: where a build of torch lacks one, or has it otherwise, the trial says "no" and nothing crashes."""
    ones = torch.ones(1, 16, dtype=dtype)
    try:
        fast = dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return fast and torch.equal(_packed(torch.eye(16, dtype=dtype), ones[0], 1)(ones), ones + 1)
    except (AttributeError, TypeError, RuntimeError):
        return False
