"""The outer autoregressive loop: reveal the tokens of an image in any order, in K steps.

One loop, `unmask`, serves the teacher (`diffusion_chain`) and the student (`few_evaluations`), generation and
inpainting, sampling and differentiable rollouts. How a token is drawn is a callable:

    draw(condition (B, N, E), null condition (B, N, E) or None, z (B, N, D), w) -> tokens (B, N, D)
"""

import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterator
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

DrawTokens = Callable[[Tensor, Tensor | None, Tensor, float | Tensor], Tensor]
Clamp = tuple[float, float] | None


def diffusion_chain(
    head: DiffusionHead, schedule: Schedule, noise: ImageNoise, solver: Literal["ancestral", "ddim"] = "ancestral",
    temperature: float = 1.0, clamp: Clamp = None, call: Call = plainly,
) -> DrawTokens:  # fmt: skip
    """The teacher's draw: the inner chain over every step of ``schedule`` (respace it for fewer).

    Without gradients it embeds the timesteps once: after an update of the head make a new one.
    """
    embedded_times: list[Tensor] = []  # at the first draw: a sharded network must have run as a whole before

    def draw(condition: Tensor, null: Tensor | None, z: Tensor, w: float | Tensor) -> Tensor:
        guided = null is not None

        def chain(c: Tensor, z: Tensor, times: Tensor, w: Tensor, noises: Tensor | None = None) -> Tensor:
            embedded = head.embed_condition(c)

            def network(x: Tensor, i: int) -> Tensor:
                if not guided:
                    return head.denoise(x, times[i] + embedded)
                out, out_null = head.denoise(torch.cat([x, x]), times[i] + embedded).chunk(2)
                eps, v = out.chunk(2, dim=-1)
                return torch.cat([diffusion.guide(eps, out_null.chunk(2, dim=-1)[0], w), v], dim=-1)

            steps = None if noises is None else iter(noises.unbind(1))
            return diffusion.denoise_chain(network, z, schedule, steps, temperature, clamp)

        if torch.is_grad_enabled() or not embedded_times:
            times = head.embed_scalars(schedule.timesteps.to(noise.device))
        else:
            times = embedded_times[0]
        if not torch.is_grad_enabled() and not embedded_times:
            embedded_times.append(times)
        inputs = [condition if null is None else torch.cat([condition, null]), z, times, as_tensor(w, z)]
        if solver == "ancestral":
            inputs.append(noise.randn(len(schedule), *z.shape[1:]))
        return call(("chain", guided, temperature), chain, *inputs)

    return draw


def few_evaluations(
    head: DiffusionHead, schedule: Schedule, timesteps: tuple[int, ...], noise: ImageNoise | None = None,
    temperature: float = 1.0, clamp: Clamp = None, call: Call = plainly,
) -> DrawTokens:  # fmt: skip
    """The student's draw: an evaluation of the head at each timestep, mostly one alone (`gsim.one_step`). Guidance is
    baked in, or an input.

    In inference mode timesteps and guidance are embedded once per scale: after an update of the head make a new one.

    Args:
        timesteps: of `StudentConfig.timesteps`.
        noise: for all evaluations but the first.
    """
    times = [torch.full((), t, device=head.input_proj.weight.device) for t in timesteps]  # no copy: graphs allow none
    embedded: dict[float, Tensor] = {}

    def embed(times: list[Tensor], w: Tensor) -> Tensor:
        return torch.stack([head.embed_scalars(t, w) for t in times])

    def draw(condition: Tensor, null: Tensor | None, z: Tensor, w: float | Tensor) -> Tensor:
        def evaluate(c: Tensor, scalars: Tensor, *noises: Tensor) -> Tensor:
            conditions, x0 = head.embed_condition(c), 0.0
            for t, scalar, z in zip(timesteps, scalars, noises, strict=True):
                y = scalar + conditions
                x0 = gsim.one_step(lambda x, y=y: head.denoise(x, y).chunk(2, -1)[0], temperature * z, schedule, t, x0)
            assert isinstance(x0, Tensor)
            return x0 if clamp is None else x0.clamp(*clamp)

        scale = None if isinstance(w, Tensor) or not torch.is_inference_mode_enabled() else float(w)
        scalars = None if scale is None else embedded.get(scale)
        if scalars is None:
            scalars = call(("scalars",), embed, times, as_tensor(w, z))
            if scale is not None:
                embedded[scale] = scalars
        noises = [z]
        if len(timesteps) > 1:
            assert noise is not None
            noises += noise.randn(len(timesteps) - 1, *z.shape[1:]).unbind(1)
        return call(("student", timesteps, temperature), evaluate, condition, scalars, *noises)

    return draw


def as_tensor(w: float | Tensor, like: Tensor) -> Tensor:
    """A number as a tensor (), without waiting for the device; a tensor as it is."""
    return w if isinstance(w, Tensor) else like.new_full((), w, dtype=torch.float32)


def student_tokens(
    head: DiffusionHead, schedule: Schedule, t_init: int, condition: Tensor, z: Tensor, w: Tensor
) -> Tensor:
    """g(z, c): one-step tokens (..., D) at conditions (..., E), unclamped. ``w`` is read by a guidance-input head."""
    return few_evaluations(head, schedule, (t_init,))(condition, None, z, w)


def unmask(
    network: MAR, draw: DrawTokens, labels: Tensor, orders: Tensor, counts: list[int], z: Tensor, *,
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
        call: how the backbone is called: plainly, or from CUDA graphs.
    """
    length, num_classes = network.config.num_tokens, network.config.num_classes
    if tokens is None:
        tokens = torch.zeros_like(z)
    doubled = needs_null and guidance != 1
    both_labels = torch.cat([labels, torch.full_like(labels, num_classes)]) if doubled else labels
    with_grad = torch.is_grad_enabled()

    orders = sorted_within_steps(orders, counts)
    cached = CachedBackbone(network, refresh_every) if refresh_every > 1 else None

    def backbone(tokens: Tensor, visible: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        if doubled:
            tokens, visible, target = tokens.repeat(2, 1, 1), visible.repeat(2, 1), target.repeat(2, 1)
        return network.condition(tokens, visible, labels, target)

    for k, (masked, masked_after) in enumerate(itertools.pairwise(counts)):
        visible, target = orders[:, : length - masked], orders[:, length - masked : length - masked_after]
        w = linear_guidance(guidance, masked_after, length) if guidance_schedule == "linear" else guidance

        def step(
            tokens: Tensor, visible: Tensor = visible, target: Tensor = target, w: float | Tensor = w, k: int = k
        ) -> Tensor:
            if cached is None:
                condition = call("backbone", backbone, tokens, visible, target, both_labels)
            else:
                condition = cached.condition(tokens, orders, counts, k, both_labels)
            condition, null = condition.chunk(2) if doubled else (condition, None)
            return draw(condition, null, gather_tokens(z, target), w).to(tokens.dtype)

        keep_grad = with_grad and (grad_ar_steps is None or k in grad_ar_steps)
        with torch.set_grad_enabled(keep_grad):
            if keep_grad and checkpoint_ar_steps:
                new = checkpoint(step, tokens, use_reentrant=False, preserve_rng_state=False)
            else:
                new = step(tokens)
        assert isinstance(new, Tensor)
        with torch.set_grad_enabled(with_grad):  # a step without gradient leaves those of the tokens before it
            tokens = tokens.scatter(1, target[..., None].expand_as(new), new)
        yield tokens


def last(steps: Iterator[Tensor]) -> Tensor:
    """The final tokens of `unmask`."""
    return deque(steps, maxlen=1).pop()
