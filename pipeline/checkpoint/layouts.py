"""Which layout an architecture has."""

import reprlib
from typing import Any

from pipeline.checkpoint.layout import Layout
from pipeline.checkpoint.layout_gpt2 import GPT2Layout
from pipeline.checkpoint.layout_qwen3 import Qwen3Layout
from pipeline.config.keys import ModelConfig
from pipeline.errors import UserError

# By `model.arch`.
LAYOUTS: dict[str, Layout] = {"gpt2": GPT2Layout(), "qwen3": Qwen3Layout()}


def layout_of(config: ModelConfig) -> Layout:
    return LAYOUTS[config.arch]


def layout_for(document: dict[str, Any], path: str) -> Layout:
    """The layout of the folder with this config.json. Raises UserError for a model that is not
    implemented.
    """
    found = document.get("model_type", "gpt2")  # OpenAI's first folders had none
    for layout in LAYOUTS.values():
        if layout.model_type == found:
            return layout
    expected = " or ".join(repr(layout.model_type) for layout in LAYOUTS.values())
    raise UserError(f"{path} has model_type={reprlib.repr(found)}, expected {expected}: nothing else is implemented")
