"""CUDA graphs: the kernels of a function of tensors, recorded once for each shape and launched together.

At small batches a GPU waits for the launches: an AR step of MAR-B is several hundred kernels of a few microseconds, a
chain of 100 denoising steps several thousand, an update of a small network a thousand and more.
"""

from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

Function = Callable[..., Any]
WARM_UP = 2
"""Calls before the recording, in which libraries allocate their workspaces and compiled blocks are compiled."""


class Call(Protocol):
    """How a function of tensors is called: at once (`plainly`), or from a recorded graph (`Graphs`)."""

    def __call__(self, kind: Hashable, function: Function, *inputs: Any) -> Any: ...


def plainly(kind: Hashable, function: Function, *inputs: Any) -> Any:
    """``function(*inputs)``."""
    return function(*inputs)


def key_of(kind: Hashable, leaves: list[Any], structure: TreeSpec) -> Hashable:
    """What the calls that one graph serves have in common: all but the values of their tensors."""
    parts = [(x.shape, x.dtype) if isinstance(x, Tensor) else (type(x), x) for x in leaves]
    return kind, structure, torch.is_grad_enabled(), *parts


class Graphs:
    """Calls functions on one CUDA device from graphs, which the first call of each kind and shape records.

    Inputs and results are tensors, or tuples, lists and dicts with tensors in them, and carry no gradients; inputs that
    are no tensors belong to the kind, and must be hashable. Functions of one ``kind`` must launch the same kernels on
    the same weights whenever the shapes of their inputs are the same, read no tensor but their inputs and those
    weights, draw random numbers on the GPU alone (dropout), and not wait for it. Where gradients are enabled, they may
    backpropagate, into gradients that exist and which they first set to zero: the first call computes several times.

    The graphs hold weights and gradients by address: change them in place or make a new `Graphs`. They share one pool
    of memory, but each has inputs and results of its own, and none is ever dropped: there is one for each batch size
    and number of visible tokens. Under autocast, whose copies of the weights do not last, functions are called plainly;
    they may switch it on themselves.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor], Any]] = {}

    def __len__(self) -> int:
        return len(self._recorded)

    def __call__(self, kind: Hashable, function: Function, *inputs: Any) -> Any:
        if torch.is_autocast_enabled("cuda"):
            return function(*inputs)
        leaves, structure = tree_flatten(inputs)
        given = [x.detach() for x in leaves if isinstance(x, Tensor)]
        key = key_of(kind, leaves, structure)
        with torch.cuda.device(self._device), torch.inference_mode(not torch.is_grad_enabled()):
            if key not in self._recorded:
                buffers = [x.clone(memory_format=torch.contiguous_format) for x in given]
                rest = iter(buffers)
                leaves = [next(rest) if isinstance(x, Tensor) else x for x in leaves]
                graph, out = self._record(function, tree_unflatten(leaves, structure))
                self._recorded[key] = graph, buffers, out
            graph, buffers, out = self._recorded[key]
            for dtype in {x.dtype for x in given}:
                pairs = [pair for pair in zip(buffers, given, strict=True) if pair[1].dtype == dtype]
                torch._foreach_copy_([to for to, _ in pairs], [x for _, x in pairs])  # pyright: ignore
            graph.replay()
            return tree_map_only(Tensor, lambda x: x.detach().clone(), out)  # the next replay writes into `out`

    def _record(self, function: Function, inputs: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
        before = torch.cuda.get_rng_state(self._device)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP):
                function(*inputs)
        torch.cuda.current_stream().wait_stream(self._stream)
        torch.cuda.set_rng_state(before, self._device)
        pool = next(iter(self._recorded.values()))[0].pool() if self._recorded else None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
            out = function(*inputs)
        return graph, out
