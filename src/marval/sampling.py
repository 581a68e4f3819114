"""The outer autoregressive loop: reveal the tokens of an image in any order, in K steps.

One loop, `unmask`, serves the teacher (`diffusion_chain`) and the student (`few_evaluations`), generation and
inpainting, sampling and differentiable rollouts. How a token is drawn is a `TokenSampler`:

    sampler(condition (B, N, E), null condition (B, N, E) or None, z (B, N, D), w) -> tokens (B, N, D)
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from marval import diffusion, gsim
from marval.diffusion import Schedule
from marval.graphs import Call, plainly
from marval.masking import linear_guidance, sorted_within_steps
from marval.models.cached import CachedBackbone
from marval.models.head import DiffusionHead
from marval.models.mar import MAR, gather_tokens
from marval.rng import ImageNoise

Clamp = tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class TokenSampler:
    """How an AR step draws its tokens, in two parts, of which CUDA graphs record the second."""

    kind: Hashable
    """Samplers of one kind launch the same kernels on the same shapes."""
    prepare: Callable[[Tensor, float | Tensor], list[Tensor]]
    """``prepare(z, w)``: what needs no condition, such as random numbers and embedded timesteps."""
    evaluate: Callable[..., Tensor]
    """``evaluate(condition, null, z, *prepared)``: the tokens."""
    own_graph: bool = False
    """Long: recorded once for all AR steps that draw equally many tokens, not with the backbone of each."""

    def __call__(self, condition: Tensor, null: Tensor | None, z: Tensor, w: float | Tensor) -> Tensor:
        return self.evaluate(condition, null, z, *self.prepare(z, w))


def diffusion_chain(
    head: DiffusionHead, schedule: Schedule, noise: ImageNoise, solver: Literal["ancestral", "ddim"] = "ancestral",
    temperature: float = 1.0, clamp: Clamp = None,
) -> TokenSampler:  # fmt: skip
    """The teacher's sampler: the inner chain over every step of ``schedule`` (respace it for fewer).

    Without gradients it embeds the timesteps once: after an update of the head make a new one.
    """
    embedded: list[Tensor] = []

    def prepare(z: Tensor, w: float | Tensor) -> list[Tensor]:
        times = embedded[0] if embedded and not torch.is_grad_enabled() else None
        if times is None:
            times = head.embed_scalars(schedule.timesteps.to(noise.device))
            if not torch.is_grad_enabled():
                embedded.append(times)
        numbers = [noise.randn(len(schedule), *z.shape[1:])] if solver == "ancestral" else []
        return [times, as_tensor(w, z), *numbers]

    def evaluate(
        condition: Tensor, null: Tensor | None, z: Tensor, times: Tensor, w: Tensor, noises: Tensor | None = None
    ) -> Tensor:
        conditions = head.embed_condition(condition if null is None else torch.cat([condition, null]))

        def network(x: Tensor, i: int) -> Tensor:
            if null is None:
                return head.denoise(x, times[i] + conditions)
            out, out_null = head.denoise(torch.cat([x, x]), times[i] + conditions).chunk(2)
            eps, v = out.chunk(2, dim=-1)
            return torch.cat([diffusion.guide(eps, out_null.chunk(2, dim=-1)[0], w), v], dim=-1)

        steps = None if noises is None else iter(noises.unbind(1))
        return diffusion.denoise_chain(network, z, schedule, steps, temperature, clamp)

    return TokenSampler(("chain", temperature), prepare, evaluate, own_graph=True)


def few_evaluations(
    head: DiffusionHead, schedule: Schedule, timesteps: tuple[int, ...], noise: ImageNoise | None = None,
    temperature: float = 1.0, clamp: Clamp = None, call: Call = plainly,
) -> TokenSampler:  # fmt: skip
    """The student's sampler: an evaluation of the head at each timestep, mostly one alone (`gsim.one_step`). Guidance
    is baked in, or an input.

    In inference mode timesteps and guidance are embedded once per scale: after an update of the head make a new one.

    Args:
        timesteps: of `StudentConfig.timesteps`.
        noise: for all evaluations but the first.
        call: how timesteps and guidance are embedded: plainly, or from a CUDA graph.
    """
    times = [torch.full((), t, device=head.input_proj.weight.device) for t in timesteps]  # no copy: graphs allow none
    embedded: dict[float, Tensor] = {}

    def embed(times: list[Tensor], w: Tensor) -> Tensor:
        return torch.stack([head.embed_scalars(t, w) for t in times])

    def prepare(z: Tensor, w: float | Tensor) -> list[Tensor]:
        scale = None if isinstance(w, Tensor) or not torch.is_inference_mode_enabled() else float(w)
        scalars = None if scale is None else embedded.get(scale)
        if scalars is None:
            scalars = call(("scalars",), embed, times, as_tensor(w, z))
            if scale is not None:
                embedded[scale] = scalars
        if len(timesteps) == 1:
            return [scalars]
        assert noise is not None
        return [scalars, noise.randn(len(timesteps) - 1, *z.shape[1:])]

    def evaluate(
        condition: Tensor, null: Tensor | None, z: Tensor, scalars: Tensor, later: Tensor | None = None
    ) -> Tensor:
        conditions, x0 = head.embed_condition(condition), 0.0
        noises = (z,) if later is None else (z, *later.unbind(1))
        for t, scalar, z in zip(timesteps, scalars, noises, strict=True):
            y = scalar + conditions
            x0 = gsim.one_step(lambda x, y=y: head.denoise(x, y).chunk(2, -1)[0], temperature * z, schedule, t, x0)
        assert isinstance(x0, Tensor)
        return x0 if clamp is None else x0.clamp(*clamp)

    return TokenSampler(("student", timesteps, temperature), prepare, evaluate)


def as_tensor(w: float | Tensor, like: Tensor) -> Tensor:
    """A number as a tensor (), without waiting for the device; a tensor as it is."""
    return w if isinstance(w, Tensor) else like.new_full((), w, dtype=torch.float32)


def student_tokens(
    head: DiffusionHead, schedule: Schedule, t_init: int, condition: Tensor, z: Tensor, w: Tensor
) -> Tensor:
    """g(z, c): one-step tokens (..., D) at conditions (..., E), unclamped. ``w`` is read by a guidance-input head."""
    return few_evaluations(head, schedule, (t_init,))(condition, None, z, w)


def unmask(
    network: MAR, draw: TokenSampler, labels: Tensor, orders: Tensor, counts: list[int], z: Tensor, *,
    guidance: float | Tensor = 1.0, guidance_schedule: Literal["constant", "linear"] = "constant",
    needs_null: bool = False, tokens: Tensor | None = None, grad_ar_steps: Collection[int] | None = None,
    checkpoint_ar_steps: bool = False, refresh_every: int = 1, call: Call = plainly,
) -> Iterator[Tensor]:  # fmt: skip
    """The AR loop. Yields the tokens (B, L, D) after each step; the last is the image.

    Args:
        labels: (B,) classes; num_classes for none.
        orders: (B, L) positions in the order in which they are revealed.
        counts: masked tokens before each step and after the last (`masking.masked_counts`).
        z: (B, L, D) initial noise of every position.
        guidance: scale w; with the linear schedule, the final one. For a student also (B, 1), one per image.
        needs_null: the draw combines two conditions: also run the backbone with the null class (unless w = 1).
        tokens: (B, L, D) known tokens where counts[0] < L (inpainting); they must come first in the orders.
        grad_ar_steps: if gradients are enabled, only these steps carry them, counted from 0: what the others draw is
            constant; None for all.
        checkpoint_ar_steps: store only each step's tokens and recompute the rest in the backward pass.
        refresh_every: AR steps between full passes of the backbone (`CachedBackbone`); 1: all are full, and exact.
        call: how an AR step without gradients is called: plainly, or from CUDA graphs.
    """
    length, num_classes = network.config.num_tokens, network.config.num_classes
    if tokens is None:
        tokens = torch.zeros_like(z)
    doubled = needs_null and guidance != 1
    both_labels = torch.cat([labels, torch.full_like(labels, num_classes)]) if doubled else labels
    with_grad = torch.is_grad_enabled()

    orders = sorted_within_steps(orders, counts)
    cached = CachedBackbone(network, refresh_every) if refresh_every > 1 else None

    def conditions(tokens: Tensor, orders: Tensor, labels: Tensor, first: int, end: int) -> list[Tensor]:
        """Of the positions orders[:, first:end], (B, n, E); guided, also those without a class."""
        if doubled:
            tokens, orders = tokens.repeat(2, 1, 1), orders.repeat(2, 1)
        both = network.condition(tokens, orders[:, :first], labels, orders[:, first:end])
        return list(both.chunk(2)) if doubled else [both]

    for k, (masked, masked_after) in enumerate(itertools.pairwise(counts)):
        first, end = length - masked, length - masked_after
        w = linear_guidance(guidance, masked_after, length) if guidance_schedule == "linear" else guidance

        def step(
            tokens: Tensor, orders: Tensor, z: Tensor, labels: Tensor, first: int, end: int,
            prepared: list[Tensor] | None, call: Call = plainly, k: int = k, w: float | Tensor = w,
        ) -> Tensor:  # fmt: skip
            """Tokens (B, n, D) at the positions orders[:, first:end]."""
            if cached is None:
                both = call(("backbone", doubled), conditions, tokens, orders, labels, first, end)
            else:
                both = cached.condition(tokens, orders, counts, k, labels).chunk(2 if doubled else 1)
            condition, null = (*both, None)[:2]
            z = gather_tokens(z, orders[:, first:end])
            if prepared is None:  # a sharded network must run as a whole before its head does
                prepared = draw.prepare(z, w)
            return call(draw.kind, draw.evaluate, condition, null, z, *prepared).to(tokens.dtype)

        keep_grad = with_grad and (grad_ar_steps is None or k in grad_ar_steps)
        with torch.set_grad_enabled(keep_grad):
            prepared = None if call is plainly else draw.prepare(z[:, first:end], w)
            inputs = tokens, orders, z, both_labels, first, end, prepared
            if keep_grad and checkpoint_ar_steps:
                new = checkpoint(step, *inputs, use_reentrant=False, preserve_rng_state=False)
            elif draw.own_graph:
                new = step(*inputs, call)
            else:
                new = call(("AR step", draw.kind, doubled), step, *inputs)
        assert isinstance(new, Tensor)
        with torch.set_grad_enabled(with_grad):  # a step without gradient leaves those of the tokens before it
            tokens = tokens.scatter(1, orders[:, first:end, None].expand_as(new), new)
        yield tokens


def last(steps: Iterator[Tensor]) -> Tensor:
    """The final tokens of `unmask`."""
    return deque(steps, maxlen=1).pop()
