"""The MLP diffusion head of MAR, and the one-step head that a student makes of it.

Parameter names follow the reference MAR (``diffloss.net.*`` of its checkpoints), so that import is a change of prefix.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SinusoidalMLP(nn.Module):
    """Embeds scalars: 256 sinusoids, then Linear - SiLU - Linear. (...,) -> (..., width)."""

    def __init__(self, width: int, num_frequencies: int = 128):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * num_frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.num_frequencies = num_frequencies

    def forward(self, values: Tensor) -> Tensor:
        exponents = torch.arange(self.num_frequencies, dtype=torch.float32, device=values.device) / self.num_frequencies
        angles = values[..., None].float() * torch.exp(-math.log(10000) * exponents)
        dtype = self.mlp[0].get_parameter("weight").dtype
        return self.mlp(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1).to(dtype))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x, 1 + scale)


class ResBlock(nn.Module):
    """x + gate * MLP(modulated LayerNorm(x)); shift, scale and gate are linear in h = SiLU(embedding)."""

    def __init__(self, width: int):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation[1](h).chunk(3, dim=-1)
        return torch.addcmul(x, gate, self.mlp(_modulate(self.in_ln(x), shift, scale)))


class FinalLayer(nn.Module):
    """Modulated LayerNorm and the output projection, always in float32."""

    def __init__(self, width: int, out_dim: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation[1](h).chunk(2, dim=-1)
        with torch.autocast(x.device.type, enabled=False):
            x = _modulate(self.norm_final(x.float()), shift.float(), scale.float())
            return F.linear(x, self.linear.weight.float(), self.linear.bias.float())


class DiffusionHead(nn.Module):
    """Denoises one token given its condition: noise prediction ++ variance interpolation.

    Args:
        token_dim: D. cond_dim: E, width of the backbone. width, depth: of the MLP.
        guidance_input: also take the guidance scale w (a student for every scale). The extra embedding starts at
            zero, so that a fresh student equals its teacher's head.
        source_input: also take the timestep at which a student of several evaluations made the token: an auxiliary that
            tells them apart (`marval.matching`). This extra embedding starts at zero, too.
    """

    def __init__(
        self, token_dim: int, cond_dim: int, width: int, depth: int, guidance_input: bool = False,
        source_input: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.time_embed = SinusoidalMLP(width)
        self.cond_embed = nn.Linear(cond_dim, width)
        self.guidance_embed = SinusoidalMLP(width) if guidance_input else None
        self.source_embed = SinusoidalMLP(width) if source_input else None
        self.input_proj = nn.Linear(token_dim, width)
        self.res_blocks = nn.ModuleList([ResBlock(width) for _ in range(depth)])
        self.final_layer = FinalLayer(width, 2 * token_dim)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.time_embed.mlp[0], self.time_embed.mlp[2]):
            nn.init.normal_(layer.get_parameter("weight"), std=0.02)
        zeroed = [block.get_submodule("adaLN_modulation.1") for block in self.res_blocks]
        zeroed += [self.final_layer.adaLN_modulation[1], self.final_layer.linear]
        if self.guidance_embed is not None:
            zeroed.append(self.guidance_embed.mlp[2])
        if self.source_embed is not None:
            zeroed.append(self.source_embed.mlp[2])
        for layer in zeroed:
            nn.init.zeros_(layer.get_parameter("weight"))

    def _scalars(self, t: Tensor, w: Tensor | None, source: Tensor | None = None) -> Tensor:
        y = self.time_embed(t)
        if self.guidance_embed is not None:
            if w is None:
                raise ValueError("this head takes the guidance scale as an input: give w")
            y = y + self.guidance_embed(100 * w)
        if self.source_embed is not None:
            assert source is not None
            y = y + self.source_embed(source)
        return y

    # A sharded head gathers its weights for each of the following, which therefore call none of each other.

    def embed(self, t: Tensor, c: Tensor, w: Tensor | None = None, source: Tensor | None = None) -> Tensor:
        """Sum of the embeddings of timestep t (...), condition c (..., E) and, if they are inputs, guidance w (...) and
        source (...)."""
        return self._scalars(t, w, source) + self.cond_embed(c)

    def embed_scalars(self, t: Tensor, w: Tensor | None = None) -> Tensor:
        """The part of `embed` without the condition: the same for all tokens, once per chain for all its steps."""
        return self._scalars(t, w)

    def embed_condition(self, c: Tensor) -> Tensor:
        """The part of `embed` that depends on the condition: once for all steps of a chain."""
        return self.cond_embed(c)

    def denoise(self, x: Tensor, y: Tensor) -> Tensor:
        """x (..., D), y (..., width) from `embed` -> (..., 2 D) float32."""
        x = self.input_proj(x.to(self.input_proj.weight.dtype))
        h = F.silu(y)  # the first layer of every adaLN_modulation, computed once
        for block in self.res_blocks:
            x = block(x, h)
        return self.final_layer(x, h)

    def forward(
        self, x: Tensor, t: Tensor, c: Tensor, w: Tensor | None = None, source: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """Noise prediction ++ variance interpolation.

        Args:
            x: (..., D) noisy tokens. t: (...) timesteps in [0, 999]. c: (..., E) conditions.
            w: (...) guidance scales, for a head with ``guidance_input``.
            source: (...) timesteps at which the student made the tokens, for a head with ``source_input``.

        Returns:
            (..., 2 D) float32.
        """
        return self.denoise(x, self.embed(t, c, w, source))
