"""Devices by name."""

import torch


def device_named(name: torch.device | str) -> torch.device:
    """``auto`` is cuda where there is a GPU, else cpu; anything else as PyTorch names it.

    Raises:
        ValueError: PyTorch knows no such device, or this machine has none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}: choose auto, cpu or cuda") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"device {str(name)!r} is not available: this PyTorch ({torch.__version__}) sees no CUDA GPU"
            )
        if (device.index or 0) >= (count := torch.cuda.device_count()):
            raise ValueError(f"device {str(name)!r} is not there: this machine has {count}")
    return device
