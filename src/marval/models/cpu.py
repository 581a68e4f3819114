"""Operations that are faster on a CPU than those which PyTorch takes there by itself.

Linear layers in float32 by oneDNN. PyTorch multiplies by MKL, which leaves AMD's AVX-512 unused: oneDNN is twice as
fast there. And PyTorch's linear layer rearranges its weights at every call, which is most of its time when the rows are
few, as in the diffusion head: it draws a handful of tokens at a time. For sampling, large weights can therefore also be
stored in the order in which oneDNN's kernels read them. PyTorch's compiler uses the same operators when it freezes a
model.

Attention under autocast to bfloat16, as in training, by plain products. The fused kernel multiplies without oneDNN: at
72 tokens it takes 7 times as long, forward and backward (AMD EPYC, docs/LOG.md, 2026-11-26).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import Parameter

PACKED = 1 << 17
"""Entries of a weight from which a packed copy of it pays."""
WORK = 3 << 19
"""Multiplications of a product from which a call of oneDNN pays; below, it costs more than it saves."""
ROWS = 16
"""Rows that the packing expects; any number works."""


def product(input: Tensor, weight: Tensor, bias: Tensor | None = None, then: str = "none") -> Tensor:
    """input (..., I) times weight (O, I), packed or with any strides, plus bias (O,): (..., O).

    Args:
        then: gelu, in the same kernel, or none.
    """
    return torch.ops.mkldnn._linear_pointwise(input.contiguous(), weight, bias, then, [], "none")


class _Linear(torch.autograd.Function):
    """`product` with its gradients."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        of_input, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(input if of_weight else None, weight if of_input else None)
        return product(input, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        input, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_input = None if weight is None else product(gradient, weight.t())
        of_weight = None
        if input is not None:  # the narrower of the two is copied into the order that oneDNN reads
            x = input.reshape(-1, input.shape[-1])
            narrow = x.shape[1] < rows.shape[1]
            of_weight = product(x.t(), rows.t()).t() if narrow else product(rows.t(), x.t())
        return of_input, of_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


class OneDNNLinear(nn.Linear):
    """A `nn.Linear` that multiplies by oneDNN in float32 on the CPU.

    Attributes:
        packs: whether a large weight is packed, at the first call without gradients. The copy is made again when the
            weight was replaced, or changed by an operation that counts its version; fused optimizers and FSDP count
            none, so networks that are trained must not pack.
    """

    packs = False
    _copy: tuple[tuple[int, int], Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:
        weight = self._weight_for(input)
        if weight is None:
            return super().forward(input)
        if torch.is_grad_enabled():
            return _Linear.apply(input, weight, self.bias)  # type: ignore[return-value]
        return product(input, weight, self.bias)

    def then_gelu(self, input: Tensor) -> Tensor:
        """GELU of `forward`, in the same kernel for sampling; training computes alike with and without gradients."""
        weight = self._weight_for(input) if self.packs and not torch.is_grad_enabled() else None
        return F.gelu(self(input)) if weight is None else product(input, weight, self.bias, "gelu")

    def _weight_for(self, input: Tensor) -> Tensor | None:
        """What oneDNN multiplies this input with, if it is worth while."""
        weight = self.weight
        exact = input.dtype == torch.float32 == weight.dtype and not torch.is_autocast_enabled("cpu")
        if not exact or type(weight) is not Parameter or weight.device.type != "cpu":
            return None
        if self.packs and weight.numel() >= PACKED and not torch.is_grad_enabled():
            return self._packed(weight)
        return weight if input.numel() * self.out_features >= WORK else None

    def _packed(self, weight: Tensor) -> Tensor:
        mark = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        if self._copy is None or self._copy[0] != mark:
            self._copy = mark, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
        return self._copy[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_copy": None}  # it can be neither copied nor saved


def use_onednn(module: nn.Module, pack: bool = False) -> None:
    """Turn every linear layer below the module into a `OneDNNLinear`; names and weights stay.

    Where PyTorch comes without oneDNN, nothing happens.

    Args:
        pack: for a network that is not trained: also pack large weights, which doubles their memory.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = OneDNNLinear
        if isinstance(layer, OneDNNLinear):
            layer.packs = pack


def attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Of (..., n, C) queries to (..., N, C) keys and values: (..., n, C).

    Under autocast to bfloat16 on the CPU scores are rounded to bfloat16 too, and gradients need n N of them.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or not torch.is_autocast_enabled("cpu"):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    weights = torch.softmax(q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1), dim=-1)
    return (F.dropout(weights, dropout) if dropout else weights) @ v
