"""A function whose kernels a GPU launches by itself, as one CUDA graph.

Of GPT-2 124M one token takes some 200 launches, about 2 ms of the host's time, and 0.1 ms of the GPU's to
read the weights.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from pipeline.errors import one_line
from pipeline.log import logger

Outputs = TypeVar("Outputs")
# Libraries allocate work space and choose kernels in the first calls, which no graph may contain.
WARM_UP_CALLS = 2


def captured(function: Callable[[Tensor], Outputs], example: Tensor) -> Callable[[Tensor], Outputs]:
    """`function`, for inputs like `example`; its outputs keep their memory, which the next call
    overwrites. Where capturing fails, the function itself: the log says why.
    """
    inputs = example.clone()
    try:
        graph, outputs = _capture(function, inputs)
    except (RuntimeError, ValueError) as error:  # ValueError: of a device that is no GPU
        # Where a kernel refused, what ends the capture raises again, and says only that it is invalid.
        cause = error.__context__ or error
        logger.warning("decoding without a CUDA graph, at a quarter of the speed: %s", one_line(cause))
        return function

    def replay(given: Tensor) -> Outputs:
        inputs.copy_(given)
        graph.replay()
        return outputs

    return replay


def _capture(function: Callable[[Tensor], Outputs], inputs: Tensor) -> tuple[torch.cuda.CUDAGraph, Outputs]:
    # The current stream as a context, as a capture that fails leaves its own one behind.
    with torch.cuda.device(inputs.device), torch.cuda.stream(torch.cuda.current_stream()):
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                function(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as those that pin batches and copy checkpoints, may go on.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = function(inputs)
    return graph, outputs
