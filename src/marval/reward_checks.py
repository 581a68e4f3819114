"""Trials of a reward before any work starts: is it finite, has it a gradient, does it tell images apart?"""

import torch
from torch import Tensor

from marval.config import warn
from marval.rewards import CHUNK, WeightedSum
from marval.scoring import Reward, RewardError, name_of, no_gradient, score

PROBE = 8
"""Images that a reward sees at a time, with their gradient, while it is tried."""


def check_reward(reward: Reward, images: Tensor, prompts: list[str]) -> Tensor:
    """`score` of trial images, `PROBE` at a time, detached, so that a bad reward is found before any work starts.

    A black box may be the same for all of so few images (`check_varies`). A differentiable reward that teaches nothing
    about most of them, as a clamp or a classifier that is sure, is told of on stderr.

    Args:
        images: of the model to be trained, best of different classes.

    Raises:
        ValueError: as `score`, or a reward that calls itself differentiable has no gradient in the images, one that is
            zero everywhere (a constant, a rounded value) or too small to change it, or one that is not finite. Of a
            sum, each part is tried.
    """
    if isinstance(reward, WeightedSum):
        return reward.combine(torch.stack([check_reward(part, images, prompts) for part in reward.rewards]))
    values, reach = [], []
    for start in range(0, len(images), PROBE):
        some = images[start : start + PROBE].detach().requires_grad_(reward.differentiable)
        with torch.enable_grad():
            values.append(score(reward, some, prompts[start : start + PROBE], start))
        if reward.differentiable:
            (gradient,) = torch.autograd.grad(values[-1].sum(), some)
            reach.append(gradient.flatten(1).abs().sum(1))
    found = torch.cat(values).detach()
    if not reward.differentiable:
        return found
    # what an image's reward changes by if every value moves by 1, beside what float32 tells apart
    reached, least = torch.cat(reach), torch.finfo(torch.float32).eps * found.abs().max()
    taught = int((reached > least).sum())
    if taught == 0:
        size = "too small to change it" if reached.any() else "zero"
        constant = f": it is {found[0].item():g} for all of them" if bool((found == found[0]).all()) else ""
        raise no_gradient(reward, f"its gradient is {size} for all {len(found)} trial images{constant}")
    if 2 * taught < len(found):
        share = f"{taught} of {len(found)} trial images"
        warn(f"reward {name_of(reward)!r} has a gradient in only {share}: nothing is learned from the others")
    return found


def check_varies(reward: Reward, images: Tensor, prompts: list[str]) -> None:
    """For black boxes, which learn from differences alone; give many images, since a 0/1 reward may be 1 for most.

    Raises:
        ValueError: as `score`, or the reward is the same for all images.
    """
    starts = range(0, len(images), CHUNK)
    values = torch.cat([score(reward, images[i : i + CHUNK], prompts[i : i + CHUNK], i) for i in starts])
    if bool((values == values[0]).all()):
        always = f"is {values[0].item():g} for all {len(values)} images of the starting student"
        what = f"reward {name_of(reward)!r} {always}"
        raise RewardError(f"{what}: there is nothing to learn from it; give one that tells images apart")
