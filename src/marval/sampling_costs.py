"""What drawing and decoding images costs: the AR loop of `marval.sampling` and the autoencoders, on the meta device."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from marval import masking
from marval.config import MARConfig, SamplingConfig, StudentConfig
from marval.costs import Cost, cost_of, mean_cost, zeros
from marval.diffusion import cosine_schedule, respace
from marval.distributed import World
from marval.importing import KL16
from marval.models.autoencoders import KL, TAESD
from marval.models.mar import MAR
from marval.reference import chunk_rows, num_chunks, rounds
from marval.sampling import TokenSampler, diffusion_chain, few_evaluations, last, unmask
from marval.update import autocast

Decoder = tuple[nn.Module, Callable[[Tensor], Tensor]]
"""A tokenizer's network, and its function tokens (B, L, D) -> images (B, C, H, W)."""


def frozen_network(sizes: MARConfig, guidance_input: bool = False) -> MAR:
    """A MAR on the meta device, without gradients, in eval mode."""
    with torch.device("meta"):
        return MAR(sizes, guidance_input).requires_grad_(False).eval()


def network_inputs(sizes: MARConfig, count: int, num_masked: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tokens (B, L, D), visible (B, L - N), masked (B, N) and labels (B,) of ``count`` images B."""
    positions = zeros(count, sizes.num_tokens, dtype=torch.long)
    visible, masked = positions.tensor_split([sizes.num_tokens - num_masked], dim=1)
    return (
        zeros(count, sizes.num_tokens, sizes.token_dim), visible, masked, zeros(count, dtype=torch.long)
    )  # fmt: skip


def drawing_cost(
    network: MAR, precision: str, sampling: SamplingConfig, student: StudentConfig | None, count: int
) -> Cost:
    """Tokens of ``count`` images at once, by a teacher's whole inner chain (``student`` is None) or by a student's few
    evaluations, without gradients."""
    noise: Any = SimpleNamespace(device="meta", randn=lambda *shape: zeros(count, *shape))
    if student is None:
        draw = diffusion_chain(network.head, respace(cosine_schedule(), sampling.head_steps), noise, "ddim")
    else:
        draw = few_evaluations(network.head, cosine_schedule(), student.timesteps(sampling.evaluations), noise)
    needs_null = student is None and sampling.guidance != 1
    return ar_loop_cost(network, precision, sampling.ar_steps, draw, count, needs_null)


def ar_loop_cost(
    network: MAR, precision: str, ar_steps: int, draw: TokenSampler, count: int, needs_null: bool = False
) -> Cost:
    """All AR steps for ``count`` images at once, without gradients.

    Args:
        needs_null: the backbone also runs without a class, for guidance.
    """
    sizes = network.config
    counts = masking.masked_counts(sizes.num_tokens, ar_steps)

    def step(k: int) -> None:
        tokens, _, _, labels = network_inputs(sizes, count, 1)
        orders = zeros(count, sizes.num_tokens, dtype=torch.long)
        w = 2.0 if needs_null else zeros(count, 1)
        with torch.no_grad(), autocast(precision, torch.device("cpu")):
            last(unmask(network, draw, labels, orders, counts[k : k + 2], tokens, guidance=w, needs_null=needs_null))

    cost = mean_cost(range(ar_steps), step)
    return Cost(ar_steps * cost.operations, cost.peak)


def images_in_rounds(count: int, processes: int) -> list[int]:
    """Images that every process draws in each round of an evaluation of ``count`` images: a whole chunk, or as many as
    the largest chunk of the others, which keeps the processes in step (`marval.reference`)."""
    world = World(0, processes, torch.device("cpu"))
    return [max(len(chunk_rows(i, count)) for i in group) for _, group in rounds(range(num_chunks(count)), world)]


def surplus_images(count: int, processes: int) -> int:
    """Images that all processes together draw beyond the ``count`` that an evaluation asks for."""
    return processes * sum(images_in_rounds(count, processes)) - count


def decoding_cost(decode: Callable[[Tensor], Any], sizes: MARConfig, count: int) -> Cost:
    """Whatever is made of the tokens of ``count`` images at once, without gradients.

    Args:
        decode: takes tokens (B, L, D).
    """

    def work() -> None:
        with torch.no_grad():
            decode(zeros(count, sizes.num_tokens, sizes.token_dim))

    return cost_of(work)


def decoder_of(sizes: MARConfig, pixels: bool) -> Decoder:
    """The autoencoder of tokens of these sizes: MAR's KL-16 for latents of 16 channels, the tiny TAEF2 for those of 32;
    else, or if the tokens are ``pixels``, patches are put together."""
    if sizes.token_dim == 32 and not pixels:
        tiny = TAESD(32, (1, 3, 3, 3), (3, 3, 3, 1), pool=True).to("meta").requires_grad_(False).eval()
        return tiny, lambda x: tiny.decode(x.transpose(1, 2).reshape(len(x), 32, sizes.grid, sizes.grid)).clamp(0, 1)
    if sizes.token_dim != 16 or pixels:
        channels = 3 if sizes.token_dim % 3 == 0 else 1
        side = sizes.grid * math.isqrt(sizes.token_dim // channels)
        return nn.Identity(), lambda tokens: tokens.reshape(len(tokens), channels, side, side).clamp(0, 1)
    kl = KL(KL16, "KL-16").to("meta").requires_grad_(False).eval()

    def decode(tokens: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return kl.decode(tokens.transpose(1, 2).reshape(len(tokens), 16, sizes.grid, sizes.grid))

    return kl, decode
