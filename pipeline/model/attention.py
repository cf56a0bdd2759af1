"""Causal attention of complete windows, as in training: over the window, or inside of its documents.

Documents are told apart by a mask (B, 1, T, T), which rules flash kernels out, or on a GPU by their
offsets in the batch, with which flash computes each document alone: attention then takes a third to a
sixth of the time. The scope of a batch is None, a mask or offsets.

Shapes: B sequences, T tokens, H heads of queries, K of keys and values, D per head, n offsets.
"""

import inspect
from functools import cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.keys import ModelConfig
from pipeline.model.architecture import document_mask

FLASH_CAPABILITY = (8, 0)  # Ampere
# Of a head; scaled_dot_product_attention pads others, and varlen_attn refuses them.
FLASH_WIDTH_MULTIPLE, MOST_FLASH_WIDTH = 8, 256


def document_offsets(ids: Tensor, end_of_text: int) -> Tensor:
    """(n,) int32, where each document begins in the B T tokens of ids (B, T), in order; an end-of-text
    token opens one, and so does a row. The rest of n, a power of two, is B T: what is compiled sees
    few different n. Call it on the host, where the number of documents is known without waiting.
    """
    begins = ids == end_of_text
    begins[:, 0] = True
    offsets = begins.flatten().nonzero().flatten().to(torch.int32)
    return F.pad(offsets, (0, (1 << len(offsets).bit_length()) - len(offsets)), value=ids.numel())


def takes_offsets(device: torch.device, model: ModelConfig) -> bool:
    """Whether attention under the current autocast takes offsets: a flash kernel, which has no dropout,
    no float32 and not every width of a head.
    """
    return (
        device.type == "cuda"
        and torch.is_autocast_enabled("cuda")
        and not model.dropout
        and model.head_width % FLASH_WIDTH_MULTIPLE == 0
        and model.head_width <= MOST_FLASH_WIDTH
        and torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY
        and _has_flash_of_documents()
    )


def positions_and_scope(ids: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The position of each token of ids (B, T) in its document, (T,) or (B, T), and the scope of its
    attention. `documents`: None, the number of each token's document (B, T), or offsets (n,).
    """
    if documents is None:
        return torch.arange(ids.size(1), device=ids.device), None
    if documents.ndim == 1:
        at = torch.arange(ids.numel(), dtype=documents.dtype, device=ids.device)
        document = torch.searchsorted(documents, at, right=True) - 1
        return (at - documents[document]).view_as(ids), documents
    mask = document_mask(documents)
    # The number of tokens that a token sees besides itself.
    return mask.sum(dim=3).squeeze(1) - 1, mask


def causal_attention(query: Tensor, key: Tensor, value: Tensor, *, scope: Tensor | None, dropout: float) -> Tensor:
    """(B, H, T, D) of query (B, H, T, D), key and value (B, K, T, D)."""
    grouped = key.size(1) < query.size(1)
    if scope is None or scope.ndim > 1:
        # Flash kernels know `is_causal` and skip half the work; with an explicit mask none is used.
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=scope, dropout_p=dropout, is_causal=scope is None, enable_gqa=grouped
        )
    # Not `_has_flash_of_documents` again: what is compiled traces all of it, with a warning about its cache.
    from torch.nn.attention.varlen import varlen_attn

    B, H, T, _ = query.shape
    if grouped:
        key, value = (part.repeat_interleave(H // part.size(1), dim=1) for part in (key, value))
    # Norms of queries and keys leave float32, which autocast casts back for torch's own functions only.
    query, key, value = (part.transpose(1, 2).flatten(0, 1).to(value.dtype) for part in (query, key, value))
    y = varlen_attn(query, key, value, cu_seq_q=scope, cu_seq_k=scope, max_q=T, max_k=T, window_size=(-1, 0))
    return cast(Tensor, y).view(B, T, H, -1).transpose(1, 2)


@cache
def _has_flash_of_documents() -> bool:
    """torch has it since 2.11, and before that with other parameters, or not at all."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "window_size" in inspect.signature(varlen_attn).parameters
