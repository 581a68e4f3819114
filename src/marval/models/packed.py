"""Linear layers on the CPU whose weights are stored once in the order in which oneDNN's kernels read them.

PyTorch's float32 linear layer rearranges its weights at every call, which is most of its time when the rows are few, as
in the diffusion head: it draws a handful of tokens at a time. PyTorch's compiler packs weights with the same two
operators when it freezes a model.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMALLEST = 1 << 17
"""Entries of a weight from which packing pays; below, a call of oneDNN costs more than it saves."""
ROWS = 16
"""Rows that the packing expects; any number works."""


class PackedLinear(nn.Module):
    """A `nn.Linear` for sampling, with the same parameters under the same names; they must not change afterwards."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), self._packed, self.bias, "none", [], "")


def pack_linears(module: nn.Module, smallest: int = SMALLEST) -> None:
    """Pack every float32 linear layer below the module whose weight has at least so many entries, in place.

    It doubles their memory. Where PyTorch comes without oneDNN, nothing happens.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.dtype == torch.float32 and child.weight.numel() >= smallest:
                setattr(parent, name, PackedLinear(child))
