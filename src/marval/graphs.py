"""CUDA graphs: the kernels of a function of tensors, recorded once for each shape and launched together.

At small batches a GPU waits for the launches: an AR step of MAR-B is several hundred kernels of a few microseconds, a
chain of 100 denoising steps several thousand.
"""

from collections.abc import Callable, Hashable
from typing import Protocol

import torch
from torch import Tensor

Function = Callable[..., Tensor]
WARM_UP = 2
"""Calls before the recording, in which libraries allocate their workspaces and compiled blocks are compiled."""


class Call(Protocol):
    """How a function of tensors is called: at once (`plainly`), or from a recorded graph (`Graphs`)."""

    def __call__(self, kind: Hashable, function: Function, *inputs: Tensor) -> Tensor: ...


def plainly(kind: Hashable, function: Function, *inputs: Tensor) -> Tensor:
    """``function(*inputs)``."""
    return function(*inputs)


class Graphs:
    """Calls functions on one CUDA device from graphs, which the first call of each kind and shape records.

    Functions of one ``kind`` must launch the same kernels on the same weights whenever the shapes of their inputs are
    the same, read no tensor but their inputs and those weights, and not wait for the device. The graphs hold the
    weights by address: change them in place or make a new `Graphs`. They share one pool of memory, and none is ever
    dropped: there is one for each batch size and number of visible tokens. Under autocast, whose copies of the weights
    do not last, functions are called plainly.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def __len__(self) -> int:
        return len(self._recorded)

    @torch.inference_mode()
    def __call__(self, kind: Hashable, function: Function, *inputs: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cuda"):
            return function(*inputs)
        key = (kind, *((x.shape, x.dtype) for x in inputs))
        with torch.cuda.device(self._device):
            if key not in self._recorded:
                self._recorded[key] = self._record(function, inputs)
            graph, buffers, out = self._recorded[key]
            for buffer, x in zip(buffers, inputs, strict=True):
                buffer.copy_(x)
            graph.replay()
            return out.clone()  # the next replay writes into `out`

    def _record(
        self, function: Function, inputs: tuple[Tensor, ...]
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        buffers = [x.clone(memory_format=torch.contiguous_format) for x in inputs]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP):
                function(*buffers)
        torch.cuda.current_stream().wait_stream(self._stream)
        pool = next(iter(self._recorded.values()))[0].pool() if self._recorded else None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
            out = function(*buffers)
        return graph, buffers, out
