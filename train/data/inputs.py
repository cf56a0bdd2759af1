"""From a batch of windows to what a model takes."""

import torch
from torch import Tensor

from pipeline.config.keys import Config
from pipeline.dataset.mixture import Mixture
from pipeline.model.language_model import document_numbers


def model_inputs(
    windows: Tensor, config: Config, mixture: Mixture, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inputs and targets (B, T) of windows (B, T + 1), which are the inputs one token later, and
    the document of each token (B, T), None where attention may cross documents.
    """
    windows = windows.to(device, non_blocking=True)
    inputs, targets = windows[:, :-1], windows[:, 1:]
    end_of_text = mixture.tokenizer["end_of_text"]
    return inputs, targets, document_numbers(inputs, end_of_text) if config.data.document_mask else None
