"""Arguments of `marval.pipeline.Pipeline.sample`, checked: a ValueError names what is wrong, and what to give."""

import dataclasses
import difflib
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from marval import masking
from marval.config import SamplingConfig, StudentConfig
from marval.diffusion import Schedule, respace
from marval.tokenizers import Tokenizer


def class_index(name: int | str, class_names: Sequence[str]) -> int:
    """A class by name (capitals do not matter) or index (of a string, last).

    Raises:
        ValueError: unknown class; suggests similar names.
    """
    if isinstance(name, str) and name in class_names:
        return class_names.index(name)
    lower = {known.lower(): index for index, known in enumerate(class_names)}
    if isinstance(name, str) and name.lower() in lower:
        return lower[name.lower()]
    index, number = -1, name.item() if isinstance(name, Tensor) else name
    if isinstance(number, numbers.Integral) or (isinstance(number, str) and number.strip().isdecimal()):
        index = int(number)
    if not 0 <= index < len(class_names):
        near = [class_names[lower[word]] for word in difflib.get_close_matches(str(name).lower(), lower, n=3)]
        meant = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
        some = "" if near else ", such as " + ", ".join(class_names[:12])
        indices = f"an index in [0, {len(class_names) - 1}]"
        raise ValueError(f"unknown class {name!r}{meant}: give {indices} or a name{some}")
    return index


def sampling_settings(
    defaults: SamplingConfig, given: dict[str, Any], student: StudentConfig | None, num_tokens: int, schedule: Schedule
) -> SamplingConfig:
    """The defaults of a teacher (``student is None``) or a student, with what is given and not None in their place.

    Args:
        num_tokens: L, the largest number of AR steps. schedule: whose length is the largest number of head steps.

    Raises:
        ValueError: a value is out of range, or this model cannot serve it.
    """
    given = {name: value for name, value in given.items() if value is not None}
    config = dataclasses.replace(defaults, **given)
    masking.masked_counts(num_tokens, config.ar_steps)
    respace(schedule, config.head_steps)
    if student is not None:
        if chain := [name for name in ("head_steps", "solver") if name in given]:
            raise ValueError(f"{chain[0]} is for teachers: a student takes evaluations")
        student.timesteps(config.evaluations)
        _check_guidance(config, student)
    elif config.evaluations > 1:
        raise ValueError(f"evaluations {config.evaluations} is for students: a teacher takes head_steps")
    elif config.solver == "ddim" and given.get("temperature", 1) != 1:
        raise ValueError(f"ddim adds no noise, so temperature {config.temperature} does nothing: leave it out")
    return config


def _check_guidance(config: SamplingConfig, student: StudentConfig) -> None:
    """Raises ValueError unless the student was distilled for this guidance."""
    if student.guidance_range is None:
        if config.guidance != student.guidance or config.guidance_schedule != "constant":
            raise ValueError(
                f"this student was distilled for a constant guidance of {student.guidance}, not for "
                f"{config.guidance} ({config.guidance_schedule}): distil with a guidance range to choose freely"
            )
        return
    low, high = student.guidance_range
    linear = config.guidance_schedule == "linear"
    scales = (1.0, config.guidance) if linear else (config.guidance,)
    if not low <= min(scales) <= max(scales) <= high:
        way = "1 to " * linear
        raise ValueError(f"this student serves guidance in [{low}, {high}], got {way}{config.guidance}")


def check_counts(seed: int, first_image: int, batch_size: int, num_images: int | None) -> None:
    """Raises ValueError for what is no integer or too small."""
    counts = {"seed": seed, "first_image": first_image, "batch_size": batch_size, "num_images": num_images}
    for name, count in counts.items():
        if count is not None and not isinstance(count, numbers.Integral):
            raise ValueError(f"{name} must be an integer, got {count!r}")
    if seed < 0 or first_image < 0:
        raise ValueError(f"seed and first_image must not be negative, got {seed} and {first_image}")
    if batch_size < 1:
        raise ValueError(f"the batch size must be at least 1, got {batch_size}")
    if num_images is not None and num_images < 1:
        raise ValueError(f"the number of images must be at least 1, got {num_images}")


def class_of_each(classes: Any, num_images: int | None, images: np.ndarray | None) -> list[Any]:
    """The class of each image as the user names it: one or several, repeated in turn up to the number of images.

    Args:
        num_images: how many; by default one for each of the ``images`` to inpaint, or else one per class.

    Raises:
        ValueError: no classes, no images, or more classes than images to inpaint.
    """
    if isinstance(classes, np.ndarray | Tensor) and not classes.ndim:
        classes = classes.item()
    given = list(classes) if isinstance(classes, Iterable) and not isinstance(classes, str) else [classes]
    if not given:
        raise ValueError("classes is empty: give at least one, or None for unconditional images")
    if num_images is None:
        num_images = len(given) if images is None else len(images)
        if num_images < len(given):
            raise ValueError(f"{len(given)} classes for {num_images} images to inpaint: give as many images")
    return [given[i % len(given)] for i in range(num_images)]


def given_orders(order: Any, num_tokens: int, num_images: int) -> Tensor:
    """Orders (num_images, L) from a permutation (L,), or from one for each image (num_images, L).

    Raises:
        ValueError: no permutations of the L positions, or not as many as images.
    """
    orders = masking.check_order(torch.as_tensor(order), num_tokens)
    if orders.ndim == 2 and len(orders) != num_images:
        raise ValueError(f"give one order, or one for each of the {num_images} images; got {len(orders)}")
    return orders.expand(num_images, -1)


def kept_tokens(images: np.ndarray | None, keep: Any, num_images: int, tokenizer: Tokenizer) -> Tensor:
    """Which tokens inpainting keeps, bool (num_images, L); none without ``images`` and ``keep``.

    Args:
        images: uint8 NHWC of the tokenizer's size. keep: booleans or 0 and 1, (grid, grid) or (num_images, grid, grid).

    Raises:
        ValueError: another type or shape, or only one of the two.
    """
    grid = tokenizer.grid
    if (images is None) != (keep is None):
        raise ValueError("inpainting needs both images and keep")
    if images is None:
        return torch.zeros(num_images, grid * grid, dtype=torch.bool)
    shape = (num_images, tokenizer.image_size, tokenizer.image_size, tokenizer.image_channels)
    if images.dtype != np.uint8 or images.shape != shape:
        raise ValueError(f"images must be uint8 NHWC {shape}; got {images.dtype} {images.shape}")
    kept = torch.as_tensor(keep)
    if not ((kept == 0) | (kept == 1)).all():
        raise ValueError("keep must be True or False for each token, not a share of it")
    kept = kept.bool().cpu()
    if tuple(kept.shape) not in ((grid, grid), (num_images, grid, grid)):
        raise ValueError(f"keep must be a ({grid}, {grid}) mask of tokens, or one per image; got {kept.shape}")
    return kept.reshape(-1, grid * grid).expand(num_images, -1)
