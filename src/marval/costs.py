"""What a computation costs, found on the meta device, without memory or data: operations, and bytes at its peak.

Operations are those of `torch.utils.flop_counter` (matrix products, convolutions, attention; a multiplication and its
addition count as two). Bytes are the largest sum of the storages that are alive at the same time. The meta device has
no autocast: within `without_data` the functions that our networks call do what CUDA's does.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class _Autocast(torch.autocast):
    """The CPU's autocast, which stands for that of the meta device, which has none (see `without_data`)."""

    casts: ClassVar[dict[int, tuple[Tensor, Tensor]]] = {}

    def __init__(self, device_type: str, *args: Any, **kwargs: Any):
        super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)

    def __exit__(self, *args: Any) -> Any:
        result = super().__exit__(*args)
        if not torch.is_autocast_enabled("cpu"):
            self.casts.clear()
        return result


def _cast(x: Tensor) -> Tensor:
    """Cast x to bfloat16; trained weights are cast once in an autocast region, but anew where blocks are recomputed."""
    if not (x.is_leaf and x.requires_grad) or torch._C._current_graph_task_id() >= 0:
        return x.bfloat16()
    with torch.enable_grad():  # the cast serves calls with gradients after those without
        return _Autocast.casts.setdefault(id(x), (x, x.bfloat16()))[1]


@contextlib.contextmanager
def without_data() -> Iterator[None]:
    """Context in which linear layers, layer norms and attention do on the meta device what they do on CUDA.

    Under autocast linear layers and attention compute in bfloat16 and layer norms in float32; attention is one kernel,
    with dropout too.
    """
    linear, layer_norm = F.linear, F.layer_norm

    def autocasts() -> bool:
        return torch.is_autocast_enabled("cpu")

    def new_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not autocasts():
            return linear(x, weight, bias)
        return linear(_cast(x), _cast(weight), None if bias is None else _cast(bias))

    def new_layer_norm(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return layer_norm(x.float() if autocasts() else x, *args, **kwargs)

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: None = None, dropout_p: float = 0.0, **_: Any) -> Tensor:
        if autocasts():
            q, k, v = (x.bfloat16() for x in (q, k, v))
        if q.dtype == torch.bfloat16:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p)[0]
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, dropout_p)[0]

    with (
        patch.object(torch, "autocast", _Autocast), patch.object(F, "linear", new_linear),
        patch.object(F, "layer_norm", new_layer_norm), patch.object(F, "scaled_dot_product_attention", attention),
    ):  # fmt: skip
        yield


class Work(TorchDispatchMode):
    """Counter of operations, and of bytes of the storages made while it is on: alive now, and their largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.operations += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


@dataclass
class Cost:
    """Cost of a computation: operations, and peak bytes beyond what was allocated before."""

    operations: float
    peak: int


def cost_of(function: Callable[[], Any]) -> Cost:
    """Operations and peak of one call of the function."""
    with Work() as work:
        function()
    return Cost(work.operations, work.peak)


def mean_cost(values: Sequence[int], work: Callable[[int], Any]) -> Cost:
    """Mean operations and largest memory of ``work(value)`` over all values: tried with the least, the middle and the
    largest, and a parabola for those between (operations are quadratic in the number of tokens)."""
    tried = sorted({min(values), sorted(values)[len(values) // 2], max(values)})
    costs = [cost_of(functools.partial(work, value)) for value in tried]
    domain = [tried[0], max(tried[-1], tried[0] + 1)]  # numpy 1 divides by its width
    parabola = np.polynomial.Polynomial.fit(tried, [cost.operations for cost in costs], len(tried) - 1, domain)
    return Cost(float(parabola(np.array(values)).mean()), max(cost.peak for cost in costs))


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor on the meta device, which has a shape and no memory."""
    return torch.zeros(shape, dtype=dtype, device="meta")


def bytes_of(tensors: Any) -> int:
    """Bytes of all different storages in a nested structure of tensors."""
    storages = {leaf.untyped_storage()._cdata: leaf for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor)}
    return sum(leaf.untyped_storage().nbytes() for leaf in storages.values())
