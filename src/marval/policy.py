"""Reward post-training of the one-step student as a policy: reward gradient, group-relative policy gradient, KL.

An action is a whole image after all K AR steps. Given its noise z and its condition c, each token is drawn from
N(g(z, c), std^2 I) around the student's token, so the log-probability of an image is an exact sum.
"""

import math
from typing import Literal

import torch
from torch import Tensor


def gradient_steps(
    ar_steps: int, count: int, choice: Literal["last", "random"], generator: torch.Generator
) -> frozenset[int]:
    """The AR steps whose tokens carry gradients: all (``count`` 0), the last ones (DRaFT-K) or random ones.

    The gradient of n steps is not scaled up to that of all.

    Args:
        generator: on the CPU, read only for random steps.
    """
    if count == 0:
        return frozenset(range(ar_steps))
    if choice == "random":
        return frozenset(torch.randperm(ar_steps, generator=generator)[:count].tolist())
    return frozenset(range(ar_steps - count, ar_steps))


def hinge(rewards: Tensor, ceiling: float | None) -> Tensor:
    """min(reward, ceiling): no gradient once an image's reward is good enough, a guard against reward hacking."""
    return rewards if ceiling is None else rewards.clamp(max=ceiling)


def reward_loss(rewards: Tensor, ceiling: float | None = None) -> Tensor:
    """-R of each image, for rewards differentiable through the rollout (DRaFT, Clark et al. 2023). (B,) -> (B,)."""
    return -hinge(rewards, ceiling)


def group_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """(r - mean) / std within each run of ``group_size`` consecutive images (GRPO, Shao et al. 2024).

    A group shares class, unmasking order and the student's noise, and differs in exploration alone; otherwise its
    advantages would mostly rank the luck of the noise. Sharing the noise too is ours. `dead_groups` get zeros.

    Raises:
        ValueError: the batch is not a multiple of ``group_size``, or ``group_size`` < 2.
    """
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"a batch of {len(rewards)} images does not divide into groups of {group_size} (>= 2)")
    groups = rewards.reshape(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    scaled = centred / groups.std(1, keepdim=True)
    return scaled.masked_fill(dead_groups(rewards, group_size)[:, None], 0).flatten()


def dead_groups(rewards: Tensor, group_size: int) -> Tensor:
    """Which groups differ by rounding alone and teach nothing, (groups,), bool: std <= 1e-5 max(|mean|, s), where s is
    1, or the largest of these rewards (those of one part of a batch) if that is smaller."""
    groups = rewards.reshape(-1, group_size)
    size = rewards.abs().max().clamp(max=1)
    return groups.std(1) <= 1e-5 * torch.maximum(groups.mean(1).abs(), size)


def gaussian_log_prob(x: Tensor, mean: Tensor, std: float) -> Tensor:
    """log N(x; mean, std^2 I) of each token, summed over D. (..., D) -> (...)."""
    constant = x.shape[-1] * (math.log(std) + 0.5 * math.log(2 * math.pi))
    return -0.5 * ((x - mean) / std).square().sum(-1) - constant


def gaussian_kl(mean: Tensor, reference_mean: Tensor, std: float) -> Tensor:
    """KL between two policies of equal std at the same (z, c): |mean - reference|^2 / (2 std^2). (..., D) -> (...)."""
    return (mean - reference_mean).square().sum(-1) / (2 * std * std)


def clipped_policy_loss(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's pessimistic surrogate of each token, -min(ratio A, clip(ratio) A) (Schulman et al. 2017, eq. 7).

    Args:
        log_prob, old_log_prob: (B, N) log-probability of each token under the policy now, and when it was drawn.
        advantages: (B,) one per image.
        clip: ratios outside [1 - clip, 1 + clip] earn nothing more.
    """
    ratio = torch.exp(log_prob - old_log_prob)
    advantages = advantages[:, None]
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
