"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): W + s B A in place of every matrix W.

They are PyTorch's own parametrisations: whatever reads a layer's ``weight``, in a call or directly, sees the sum, and
the network's code knows nothing of them. B starts at zero, so an adapted network computes what it did before.
"""

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from marval.models.head import SinusoidalMLP
from marval.models.mar import MAR

SCALE = 2.0
"""s, at every rank (the paper's alpha / r), so that the rank changes how much can be learned and hardly how fast."""


class LowRank(nn.Module):
    """weight (out, in) -> weight + SCALE B A, with B (out, r) and A (r, in), in the weight's precision."""

    def __init__(self, out_dim: int, in_dim: int, rank: int, generator: torch.Generator, device: torch.device):
        super().__init__()
        down = torch.randn(rank, in_dim, generator=generator) / math.sqrt(in_dim)
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(out_dim, rank, device=device))

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return weight + SCALE * (self.up @ self.down).to(weight.dtype)


class Adapters(nn.Module):
    """All adapters of a network, by the name of their layer with / for its dots: what is trained, averaged, saved."""

    def __init__(self, layers: Mapping[str, LowRank]):
        super().__init__()
        self.layers = nn.ModuleDict({name.replace(".", "/"): layer for name, layer in layers.items()})

    def merged(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """State dict of an adapted network, with whole tensors -> that of a plain one which computes the same.

        The sums are those of this object's adapters, which may be an average of the network's.
        """
        result = {name: tensor for name, tensor in tensors.items() if ".parametrizations." not in name}
        for name, layer in self.layers.items():
            name = name.replace("/", ".")
            original = tensors[f"{name}.parametrizations.weight.original"]
            with torch.no_grad():
                result[f"{name}.weight"] = cast(LowRank, layer)(original)
        return result


def adapt(network: MAR, rank: int, seed: int = 0) -> Adapters:
    """Freeze the network and give each linear layer of backbone and head an adapter, in place; but not those that embed
    the timestep, which a student never changes, and the guidance scale.

    Raises:
        ValueError: the rank is below 1.
    """
    if rank < 1:
        raise ValueError(f"the rank of adapters must be at least 1, got {rank}")
    network.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    embeds = [name for name, module in network.named_modules() if isinstance(module, SinusoidalMLP)]
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and not name.startswith(tuple(embeds)):
            out_dim, in_dim = module.weight.shape
            layer = LowRank(out_dim, in_dim, rank, generator, module.weight.device)
            parametrize.register_parametrization(module, "weight", layer)
            layers[name] = layer
    return Adapters(layers)
