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
    """Calls functions on CUDA from graphs, which the first call of each kind and shape records.

    Functions of one ``kind`` must launch the same kernels on the same weights whenever the shapes of their inputs are
    the same, read nothing that changes but their inputs, and not wait for the device. The graphs share one pool of
    memory, and hold the weights by address: change them in place or make a new `Graphs`.
    """

    def __init__(self) -> None:
        self._recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def __len__(self) -> int:
        return len(self._recorded)

    @torch.inference_mode()
    def __call__(self, kind: Hashable, function: Function, *inputs: Tensor) -> Tensor:
        key = (kind, *((x.shape, x.dtype) for x in inputs))
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
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                function(*buffers)
        torch.cuda.current_stream().wait_stream(side)
        pool = next(iter(self._recorded.values()))[0].pool() if self._recorded else None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            out = function(*buffers)
        return graph, buffers, out
