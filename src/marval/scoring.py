"""One call of a reward: images and prompts in, checked numbers and gradients out, or what is wrong with the reward."""

import contextlib
import math
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


class Reward(Protocol):
    """Higher is better. A differentiable reward carries gradients to the images.

    An attribute ``name``, where there is one, stands in error messages.
    """

    differentiable: bool

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor: ...


class BaseReward:
    """A `Reward` with a name for messages."""

    name: str = ""
    differentiable: bool
    takes_first: bool = False
    """Whether a call takes a third argument: the number of the first image, for messages."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        raise NotImplementedError


class RewardError(ValueError):
    """What is wrong with a reward or with one of its values."""


@contextlib.contextmanager
def during(what: str) -> Iterator[None]:
    """Say in a `RewardError` when it was raised."""
    try:
        yield
    except RewardError as error:
        raise RewardError(f"{what}: {error}") from error


def name_of(reward: Reward) -> str:
    """Its name, for messages."""
    return getattr(reward, "name", "") or type(reward).__name__


def score(reward: Reward, images: Tensor, prompts: list[str], first: int = 0) -> Tensor:
    """Rewards (B,) float32 of a batch, on its device, with their graph. Booleans and integers 0 and 1 become floats.

    The reward gets a copy, so that what it does to its images stays with it.

    Args:
        first: number of the first image, for messages.

    Raises:
        RewardError: the reward raised something, or its result is not a floating-point tensor of shape (B,), finite in
            float32, or the images want a gradient and a differentiable reward has none, or later, in the backward
            pass, one that fails or is not finite; names the reward and the first such image. Running out of memory is
            raised as it is.
    """
    name = name_of(reward)
    if len(prompts) != len(images):
        raise RewardError(f"reward {name!r} got {len(prompts)} prompts for {len(images)} images")
    with_gradient = reward.differentiable and images.requires_grad and torch.is_grad_enabled()
    leaf = images.detach().requires_grad_(with_gradient)
    try:
        call: Any = reward
        number = [first] if getattr(reward, "takes_first", False) else []
        rewards: Any = call(leaf.clone(), prompts, *number)
    except (RewardError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise RewardError(_failure(reward, images, prompts, first, error)) from error
    wanted = f"it must return a floating-point tensor of shape ({len(images)},), one number per image"
    if not isinstance(rewards, Tensor):
        raise RewardError(f"reward {name!r}: the reward returned a {type(rewards).__name__}: {wanted}")
    if rewards.shape == (len(images),) and not (rewards.is_floating_point() or rewards.is_complex()):
        rewards = rewards.float() if ((rewards == 0) | (rewards == 1)).all() else rewards
    if rewards.shape != (len(images),) or not rewards.is_floating_point():
        found = f"{rewards.dtype} of shape {tuple(rewards.shape)}"
        raise RewardError(f"reward {name!r}: the reward returned {found}: {wanted}")
    single = rewards.to(images.device, torch.float32)
    if not single.isfinite().all():
        bad = int((~single.isfinite()).nonzero()[0])
        value = rewards[bad].item()
        wanted = "it must be within float32" if math.isfinite(value) else "it must be finite"
        raise RewardError(f"reward {name!r}: the reward of image {first + bad} ({prompts[bad]!r}) is {value}: {wanted}")
    if not with_gradient:
        return single
    if not single.requires_grad:
        raise no_gradient(reward, "its result carries no gradient to the images")
    return _GradientOfReward.apply(images, (reward, leaf, single, prompts, first))


class _GradientOfReward(torch.autograd.Function):
    """Passes the reward's gradient on. Errors and non-finite values in the reward's backward pass become a
    `RewardError` that names the image."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, scored: tuple[Reward, Tensor, Tensor, list[str], int]) -> Tensor:
        ctx.scored = scored
        return scored[2].detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        reward, leaf, rewards, prompts, first = ctx.scored
        try:
            (found,) = torch.autograd.grad(rewards, leaf, gradient, allow_unused=True)
        except (RewardError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            what = _failure(reward, leaf, prompts, first, error, gradient=True)
            raise RewardError(what) from error
        if found is None:
            raise no_gradient(reward, "its result carries no gradient to the images")
        if not (finite := found.flatten(1).isfinite().all(1)).all():
            bad = int((~finite).nonzero()[0])
            raise no_gradient(reward, f"its gradient in image {first + bad} ({prompts[bad]!r}) is not finite")
        return found, None


def no_gradient(reward: Reward, what: str) -> RewardError:
    """Error for a reward that calls itself differentiable but teaches nothing; ``what``: the rest of that sentence."""
    return RewardError(f"reward {name_of(reward)!r} calls itself differentiable but {what}")


def _failure(
    reward: Reward, images: Tensor, prompts: list[str], first: int, error: Exception, gradient: bool = False
) -> str:
    """Message for a failed reward: tries the images one by one to name the one at fault; else says that only the batch
    fails.

    Args:
        first: number of the first image. gradient: the backward pass failed, so it is tried too.
    """
    where = f"the whole batch of {len(images)}, but on no image alone"
    for i, prompt in enumerate(prompts):
        image = images[i : i + 1].detach().requires_grad_(gradient)
        try:
            with torch.set_grad_enabled(gradient):
                value = reward(image.clone(), [prompt])
                if gradient:
                    torch.autograd.grad(value.sum(), image)
        except Exception as alone:
            error, where = alone, f"image {first + i} ({prompt!r})"
            break
    last = traceback.extract_tb(error.__traceback__)[-1]
    reason = f"{type(error).__name__}: {' '.join(str(error).split())} ({Path(last.filename).name}, line {last.lineno})"
    what = "calls itself differentiable but its gradient fails" if gradient else "fails"
    return f"reward {name_of(reward)!r} {what} on {where}: {reason}"
