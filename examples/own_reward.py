"""A reward of your own: bolder digits.

    marval rl digits --student runs/quickstart/student --reward examples/own_reward.py:ink --out runs/ink

`ink` pays for a brighter image up to a mean of 0.4, that of the boldest real digits. GSIM's term towards the
teacher (--anchor) keeps them so. Without the last line the reward is a black box: add --algorithm group.
"""

from torch import Tensor


def ink(images: Tensor, prompts: list[str]) -> Tensor:
    """Reward of each image, (B,).

    Args:
        images: (B, C, H, W) float in [0, 1].
        prompts: B strings, such as "a high-quality and harmonious picture of 3".
    """
    return images.mean(dim=(1, 2, 3)).clamp(max=0.4)


ink.differentiable = True
