"""The MAR network: an encoder over the visible tokens, a decoder over all positions, a condition for each token.

It knows no loss, sampler or tokenizer. Visible tokens are given as indices, as many for every image of a batch, so
that each shape is static: no boolean gathers, no device synchronisation. Blocks have timm's parameter names.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from marval.config import MARConfig
from marval.models.cpu import OneDNNLinear, attention
from marval.models.head import DiffusionHead


def gather_tokens(x: Tensor, positions: Tensor) -> Tensor:
    """Rows of x (B, L, C) at positions (B, N) -> (B, N, C)."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, N, E) -> queries, keys and values, each (B, heads, N, E / heads)."""
        batch, length, width = x.shape
        return self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)

    def join(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of (B, heads, n, E / heads) queries to N keys and values, projected: (B, n, E)."""
        x = attention(q, k, v, self.dropout if self.training else 0.0)
        x = self.proj(x.transpose(1, 2).flatten(2))
        return F.dropout(x, self.dropout) if self.training and self.dropout else x

    def forward(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        q, k, v = self.split(x)
        if at is not None:
            q = q.gather(2, at[:, None, :, None].expand(-1, self.heads, -1, q.shape[-1]))
        return self.join(q, k, v)


class MLP(nn.Module):
    """Linear - GELU - Linear, four times wider inside."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        drops = self.training and self.dropout
        x = self.fc1.then_gelu(x) if isinstance(self.fc1, OneDNNLinear) else F.gelu(self.fc1(x))
        x = self.fc2(F.dropout(x, self.dropout) if drops else x)
        return F.dropout(x, self.dropout) if drops else x


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, dropout)

    def forward(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        """(B, N, E) -> (B, N, E), or the rows ``at`` (B, n) of it alone: (B, n, E)."""
        rows = x if at is None else gather_tokens(x, at)
        x = rows + self.attn(self.norm1(x), at)
        return x + self.mlp(self.norm2(x))


class MAR(nn.Module):
    """Masked autoregressive model over L continuous tokens (MAR, arXiv 2406.11838).

    `condition` is the backbone; `head` (a `DiffusionHead`) draws or scores a token given its condition.
    ``guidance_input`` makes it a student whose head also takes the guidance scale.
    """

    def __init__(self, config: MARConfig, guidance_input: bool = False):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        """Recompute blocks in the backward pass instead of storing their activations."""
        width, length = config.width, config.num_tokens + config.buffer_size
        self.class_emb = nn.Embedding(config.num_classes, width)
        self.fake_latent = nn.Parameter(torch.empty(1, width))
        self.z_proj = nn.Linear(config.token_dim, width)
        self.z_proj_ln = nn.LayerNorm(width, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, length, width))
        self.encoder_blocks = nn.ModuleList([Block(width, config.heads, config.dropout) for _ in range(config.depth)])
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, length, width))
        self.decoder_blocks = nn.ModuleList([Block(width, config.heads, config.dropout) for _ in range(config.depth)])
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.empty(1, config.num_tokens, width))
        self._initialise()
        self.head = DiffusionHead(config.token_dim, width, config.head_width, config.head_depth, guidance_input)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for parameter in (
            self.class_emb.weight, self.fake_latent, self.mask_token, self.encoder_pos_embed_learned,
            self.decoder_pos_embed_learned, self.diffusion_pos_embed_learned,
        ):  # fmt: skip
            nn.init.normal_(parameter, std=0.02)

    def _blocks(self, blocks: nn.ModuleList, x: Tensor, at: Tensor | None = None) -> Tensor:
        """All blocks in turn; the last gives the rows ``at`` (B, n) only, if asked."""
        for i, block in enumerate(blocks):
            rows = at if i == len(blocks) - 1 else None
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rows, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = block(x, rows)
        return x

    def to_bf16(self) -> None:
        """Weights in bfloat16, for sampling; the head's output layer stays float32. Half the bytes, and no casts."""
        exact = self.head.final_layer.linear
        kept = [parameter.data for parameter in exact.parameters()]
        self.to(torch.bfloat16)
        for parameter, data in zip(exact.parameters(), kept, strict=True):
            parameter.data = data

    def compile_blocks(self) -> None:
        """Compile the blocks of encoder, decoder and head in place; names and weights stay."""
        for block in [*self.encoder_blocks, *self.decoder_blocks, *self.head.res_blocks]:
            block.compile(dynamic=True)  # the number of visible tokens changes from step to step

    def class_embedding(self, labels: Tensor) -> Tensor:
        """(B,) classes in [0, num_classes], where num_classes stands for "no class" -> (B, E)."""
        embedding = self.class_emb(labels.clamp(max=self.config.num_classes - 1))
        return torch.where((labels == self.config.num_classes)[:, None], self.fake_latent, embedding)

    def encode(self, tokens: Tensor, visible: Tensor, labels: Tensor) -> Tensor:
        """Encoder over buffer and visible tokens.

        Args:
            tokens: (B, L, D), read at visible positions only.
            visible: (B, V) int64 positions in any order, no repeats; V may be 0.
            labels: (B,) classes; num_classes for none.

        Returns:
            (B, buffer_size + V, E).
        """
        x = self.embed_tokens(tokens, visible, labels)
        return self.encoder_norm(self._blocks(self.encoder_blocks, self.z_proj_ln(x)))

    def embed_seen(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """Projected tokens (B, L, D) at positions (B, V), with their position embedding: (B, V, E)."""
        position = self.encoder_pos_embed_learned[0, self.config.buffer_size :]
        seen = gather_tokens(tokens, visible).to(self.z_proj.weight.dtype)
        return self.z_proj(seen) + F.embedding(visible, position)  # [visible] would have a nondeterministic gradient

    def embed_tokens(self, tokens: Tensor, visible: Tensor, labels: Tensor) -> Tensor:
        """The encoder's input: copies of the class embedding, then visible tokens. -> (B, buffer_size + V, E)."""
        classes = self.class_embedding(labels)[:, None] + self.encoder_pos_embed_learned[:, : self.config.buffer_size]
        return torch.cat([classes, self.embed_seen(tokens, visible)], dim=1)

    def decode(self, encoded: Tensor, visible: Tensor, target: Tensor | None = None) -> Tensor:
        """Decoder over all positions. (B, buffer_size + V, E) from `encode`, (B, V) -> conditions (B, L, E).

        With ``target`` (B, n), the conditions of these positions alone, (B, n, E), which saves most of the last block.
        """
        buffer = self.config.buffer_size
        x = self.hide(self.decoder_embed(encoded), visible) + self.decoder_pos_embed_learned
        if target is None:
            x = self.decoder_norm(self._blocks(self.decoder_blocks, x))
            return x[:, buffer:] + self.diffusion_pos_embed_learned
        x = self.decoder_norm(self._blocks(self.decoder_blocks, x, buffer + target))
        return x + F.embedding(target, self.diffusion_pos_embed_learned[0])

    def hide(self, x: Tensor, visible: Tensor) -> Tensor:
        """(B, buffer_size + V, E) -> (B, buffer_size + L, E): each token at its place, the mask token elsewhere."""
        buffer = self.config.buffer_size
        hidden = self.mask_token.to(x.dtype).expand(len(x), self.config.num_tokens, -1)
        hidden = hidden.scatter(1, visible[..., None].expand(-1, -1, x.shape[-1]), x[:, buffer:])
        return torch.cat([x[:, :buffer], hidden], dim=1)

    def condition(self, tokens: Tensor, visible: Tensor, labels: Tensor, target: Tensor | None = None) -> Tensor:
        """The condition c of every token given the visible ones: `decode` of `encode`. -> (B, L, E).

        With ``target`` (B, n), of these positions alone: (B, n, E).
        """
        return self.decode(self.encode(tokens, visible, labels), visible, target)

    def backbone_parameters(self) -> list[nn.Parameter]:
        """All parameters but the head's."""
        return [parameter for name, parameter in self.named_parameters() if not name.startswith("head.")]
