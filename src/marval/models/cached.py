"""A backbone that recomputes only what changed since the last AR step, against cached keys and values.

Between two AR steps the states of most tokens hardly change. After a full pass, which fills the caches, a cheap one
computes only the tokens that were just revealed (encoder and decoder) and those that are drawn next (decoder); they
attend to the cached keys and values of all others, which are as old as the last full pass. This is the idea of LazyMAR
(arXiv 2503.12450) and MARche (arXiv 2506.12035) in its simplest form: an approximation, measured in
docs/performance.md.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from marval.models.mar import MAR, Block, gather_tokens


class _Cache:
    """Keys and values of one block, (B, heads, slots, E / heads) each."""

    def __init__(self, keys: Tensor, values: Tensor, slots: int):
        self.keys, self.values = (x.new_zeros(*x.shape[:2], slots, x.shape[3]) for x in (keys, values))

    def write(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        index = slots[:, None, :, None].expand_as(keys)
        self.keys.scatter_(2, index, keys)
        self.values.scatter_(2, index, values)


class CachedBackbone:
    """`MAR.condition` of the tokens to be drawn, for the AR steps of one batch in turn.

    Args:
        refresh_every: AR steps from one full pass to the next; 1 makes all of them full.
    """

    def __init__(self, network: MAR, refresh_every: int):
        self.network, self.refresh_every = network, refresh_every
        self.encoder: list[_Cache | None] = [None] * network.config.depth
        self.decoder: list[_Cache | None] = [None] * network.config.depth

    @torch.no_grad()
    def condition(self, tokens: Tensor, orders: Tensor, counts: list[int], k: int, labels: Tensor) -> Tensor:
        """Conditions (B', n, E) of the tokens that AR step k draws; to be called for k = 0, 1, 2 .. in turn.

        Args:
            tokens: (B, L, D), read at visible positions. orders: (B, L) positions in the order of being revealed.
            counts: masked tokens before each AR step and after the last.
            labels: (B',) classes, B' = B or 2 B: with two labels per image, the second half of the conditions is that
                of the second labels.
        """
        network, config = self.network, self.network.config
        if len(labels) > len(tokens):
            tokens, orders = tokens.repeat(2, 1, 1), orders.repeat(2, 1)
        full = k % self.refresh_every == 0
        buffer, slots = config.buffer_size, config.buffer_size + config.num_tokens
        num_visible, end = config.num_tokens - counts[k], config.num_tokens - counts[k + 1]
        first = 0 if full else config.num_tokens - counts[k - 1]
        visible, target = orders[:, first:num_visible], orders[:, num_visible:end]
        if full:
            x = network.embed_tokens(tokens, visible, labels)
            places = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        else:
            x = network.embed_seen(tokens, visible)
            places = (buffer + torch.arange(first, num_visible, device=x.device)).expand(len(x), -1)
        x = network.z_proj_ln(x)
        for i, block in enumerate(network.encoder_blocks):
            x = self._block(block, self.encoder, i, x, places, slots, buffer + num_visible)
        x = network.decoder_embed(network.encoder_norm(x))

        positions = network.decoder_pos_embed_learned
        if full:
            hidden = network.hide(x, visible)
            places = torch.arange(slots, device=x.device).expand(len(x), -1)
            at = buffer + target
        else:
            masked = network.mask_token.to(x.dtype).expand(len(x), target.shape[1], -1)
            places = buffer + torch.cat([visible, target], dim=1)
            hidden = torch.cat([x, masked], dim=1)
            at = torch.arange(visible.shape[1], places.shape[1], device=x.device).expand(len(x), -1)
        x = hidden + F.embedding(places, positions[0])
        for i, block in enumerate(network.decoder_blocks):
            rows = at if i == config.depth - 1 else None
            x = self._block(block, self.decoder, i, x, places, slots, slots, rows)
        return network.decoder_norm(x) + F.embedding(target, network.diffusion_pos_embed_learned[0])

    def _block(
        self, block: nn.Module, caches: list[_Cache | None], i: int, x: Tensor, places: Tensor, slots: int, count: int,
        at: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """One block for the rows x, which lie at ``places`` of the cache; they attend to its first ``count`` slots."""
        assert isinstance(block, Block)
        q, k, v = block.attn.split(block.norm1(x))
        cache = caches[i]
        if cache is None:
            cache = caches[i] = _Cache(k, v, slots)
        cache.write(k, v, places)
        if at is not None:
            x = gather_tokens(x, at)
            q = q.gather(2, at[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
        x = x + block.attn.join(q, cache.keys[:, :, :count], cache.values[:, :, :count])
        return x + block.mlp(block.norm2(x))
