"""Linear layers on the CPU whose weights are stored once in the order in which oneDNN's kernels read them.

PyTorch's float32 linear layer rearranges its weights at every call, which is most of its time when the rows are few, as
in the diffusion head: it draws a handful of tokens at a time. PyTorch's compiler packs weights with the same two
operators when it freezes a model.
"""

from typing import Any

import torch
from torch import Tensor, nn

SMALLEST = 1 << 17
"""Entries of a weight from which packing pays; below, a call of oneDNN costs more than it saves."""
ROWS = 16
"""Rows that the packing expects; any number works."""


class PackedLinear(nn.Linear):
    """A `nn.Linear` that, without gradients and in float32 on the CPU, multiplies with a packed copy of its weight.

    The copy is made at the first call, and again after the weight was changed or replaced.
    """

    _packed: tuple[tuple[int, int], Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if torch.is_grad_enabled() or weight.device.type != "cpu" or not input.dtype == weight.dtype == torch.float32:
            return super().forward(input)
        mark = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        if self._packed is None or self._packed[0] != mark:
            self._packed = mark, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
        return torch.ops.mkldnn._linear_pointwise(input.contiguous(), self._packed[1], self.bias, "none", [], "")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_packed": None}  # it can be neither copied nor saved


def pack_linears(module: nn.Module, smallest: int = SMALLEST) -> None:
    """Turn every linear layer below the module whose weight has at least so many entries into a `PackedLinear`.

    It doubles their memory. Where PyTorch comes without oneDNN, nothing happens.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for layer in module.modules():
        if type(layer) is nn.Linear and layer.weight.numel() >= smallest:
            layer.__class__ = PackedLinear
