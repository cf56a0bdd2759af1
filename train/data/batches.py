"""A rank's batches: made ahead of the training thread, in another thread, then put on the device.

A rank's micro-batches begin at samples one stride apart, within a step as from step to step, so the
next one is known without the step. A request for another sample, such as the first after a resume,
drops what was made ahead.
"""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from pipeline.config.keys import Config
from pipeline.dataset.mixture import Mixture
from pipeline.model.attention import document_offsets, takes_offsets
from pipeline.model.language_model import document_numbers

AHEAD = 2  # one is waiting while the next is made


class Prefetcher:
    """A rank's view of the mixture: micro-batches of `size` samples, `stride` global samples apart."""

    def __init__(self, mixture: Mixture, size: int, stride: int, device: torch.device) -> None:
        self.mixture, self.size, self.stride, self.device = mixture, size, stride, device
        self.waited_s = 0.0
        # By default a thread would pin its memory through GPU 0.
        start = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        self._thread = ThreadPoolExecutor(1, "prefetch", *start)
        self._ahead: deque[tuple[int, Future[Tensor]]] = deque()

    def batch(self, first_sample: int) -> Tensor:
        """Windows (size, block_size + 1), in pinned memory for a GPU. An error in making them is
        raised here.
        """
        if not self._ahead or self._ahead[0][0] != first_sample:
            self._drop()
            self._request(first_sample)
        while len(self._ahead) <= AHEAD:
            self._request(self._ahead[-1][0] + self.stride)
        started = time.perf_counter()
        windows = self._ahead.popleft()[1].result()
        self.waited_s += time.perf_counter() - started
        return windows

    def close(self) -> None:
        """End the thread, after its current batch."""
        self._drop()
        self._thread.shutdown()

    def _request(self, first_sample: int) -> None:
        self._ahead.append((first_sample, self._thread.submit(self._make, first_sample)))

    def _drop(self) -> None:
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def _make(self, first_sample: int) -> Tensor:
        # NumPy makes the batch, as torch's threads are busy with training.
        windows = torch.from_numpy(self.mixture.batch(first_sample, self.size))
        # From pinned memory the copy does not wait for the device.
        return windows.pin_memory() if self.device.type == "cuda" else windows


def model_inputs(
    windows: Tensor, config: Config, mixture: Mixture, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inputs and targets (B, T) of windows (B, T + 1), which are the inputs one token later, and
    their documents as the model takes them, None where attention may cross them. Call it under the
    autocast of the forward pass.
    """
    on_host, windows = windows, windows.to(device, non_blocking=True)
    inputs, targets = windows[:, :-1], windows[:, 1:]
    if not config.data.document_mask:
        return inputs, targets, None
    end_of_text = mixture.tokenizer["end_of_text"]
    if takes_offsets(device, config.model):
        return inputs, targets, document_offsets(on_host[:, :-1], end_of_text).to(device, non_blocking=True)
    return inputs, targets, document_numbers(inputs, end_of_text)
