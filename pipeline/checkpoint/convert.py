"""A model's parameters <-> the tensors of its folder."""

from torch import Tensor
from torch.nn.functional import pad

from pipeline.checkpoint.layouts import layout_of
from pipeline.model.language_model import LanguageModel
from pipeline.model.sharding import whole


def to_folder(model: LanguageModel, name: str, tensor: Tensor) -> Tensor:
    """A parameter, or a tensor of its shape such as one of Adam's moments, as the folder stores it:
    complete, so all ranks must call this where it is sharded.
    """
    layout, tensor = layout_of(model.config), whole(tensor.detach())
    if name in layout.vocabulary_rows:
        tensor = tensor[: model.vocab_size]
    elif name.endswith(layout.transposed):
        tensor = tensor.t()
    # safetensors stores no strides.
    return tensor.contiguous()


def from_folder(model: LanguageModel, name: str, stored: Tensor) -> Tensor:
    """The inverse of `to_folder`, padding rows zero. Rows that the folder has beyond the model's
    vocabulary, or beyond its block size, are dropped.
    """
    layout = layout_of(model.config)
    if name in layout.vocabulary_rows:
        return pad(stored[: model.vocab_size], (0, 0, 0, model.padded_vocab_size - model.vocab_size))
    if name in layout.position_rows:
        return stored[: model.config.block_size]
    return stored.t() if name.endswith(layout.transposed) else stored
