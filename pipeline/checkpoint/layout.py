"""How models of one architecture are stored in a Hugging Face folder: config.json, tensor names,
shapes, transpositions. No torch.

A new architecture is a subclass of `Layout` in a file of its own and an entry in `LAYOUTS`
(layouts.py).
"""

import reprlib
from abc import ABC, abstractmethod
from typing import Any

from pipeline.config.keys import ModelConfig
from pipeline.errors import UserError

Shapes = dict[str, tuple[int, ...]]


class Layout(ABC):
    """Two names per tensor: `name` is the model's parameter, `stored` what the folder calls it."""

    model_type: str  # as config.json has it
    # Parameters with a row per token, of which the folder has no padding: the embedding, the head.
    vocabulary_rows: tuple[str, str]
    # Parameters with a row per position, where positions are learned.
    position_rows: tuple[str, ...] = ()
    # Endings of the parameters that the folder stores as (in, out), torch as (out, in).
    transposed: tuple[str, ...] = ()

    @abstractmethod
    def config_json(self, config: ModelConfig, vocab_size: int, end_of_text: int, dtype: str) -> dict[str, Any]:
        """config.json of a folder that `AutoModelForCausalLM.from_pretrained` opens."""

    @abstractmethod
    def model_config(self, document: dict[str, Any], path: str) -> tuple[ModelConfig, int]:
        """Our config and the rows of the vocabulary from a config.json. Raises UserError for what
        is not implemented here.
        """

    @abstractmethod
    def shapes(self, config: ModelConfig, vocab_rows: int) -> Shapes:
        """Stored name and shape of every tensor in the folder's model.safetensors."""

    def explicit(self, config: ModelConfig) -> ModelConfig:
        """The config with what its zeros stand for, and what the architecture ignores at one value: equal
        for equal models.
        """
        return config

    def stored_name(self, name: str) -> str:
        return name

    def current_name(self, stored: str) -> str:
        """Today's name of a tensor whose file may be older than the name."""
        return stored

    def is_trained(self, config: ModelConfig, stored: str) -> bool:
        """Whether the model has the tensor at all; the folder holds zeros for one that it has not."""
        return True

    def is_ignored(self, config: ModelConfig, stored: str) -> bool:
        """Whether a folder may hold the tensor although the model has no use for it."""
        return False


def size_of(document: dict[str, Any], name: str, path: str) -> int:
    """A size in a config.json that a stranger may have written. Raises UserError unless it is an
    integer above 0.
    """
    size = document.get(name)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        found = f"{name}={reprlib.repr(size)}" if name in document else f"no {name}"
        raise UserError(f"{path} has {found}, expected an integer of 1 or more")
    return size


def check_options(document: dict[str, Any], options: dict[str, tuple[Any, ...]], path: str) -> None:
    """Raises UserError for an option whose value is not implemented; the first of `options` is what
    a missing one means.
    """
    for name, values in options.items():
        found = document.get(name, values[0])
        # 1 == True == 1.0 in Python, but not to Hugging Face.
        if not any(found == value and type(found) is type(value) for value in values):
            known = " or ".join(map(repr, values))
            raise UserError(f"{path} has {name}={reprlib.repr(found)}, expected {known}: nothing else is implemented")
