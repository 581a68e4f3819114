"""Shared fixtures: the recorded reference data, and small networks with random weights."""

import os
from collections.abc import Callable
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each process of pytest-xdist, and for those that it starts
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from marval.config import MARConfig
from marval.models.mar import MAR


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ``shared`` beside the project, with golden tensors and data."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("needs the folder shared/ (golden tensors, data) beside the project")
    return path


@pytest.fixture(scope="session")
def tiny_mar() -> Callable[..., MAR]:
    """``tiny_mar(guidance_input=False, seed=0, **sizes)``: a 4x4-token MAR whose every weight is random, in eval mode.

    The zero-initialised layers are random too, so that no output is trivially zero.
    """

    def make(guidance_input: bool = False, seed: int = 0, **sizes: object) -> MAR:
        defaults = {"grid": 4, "token_dim": 4, "num_classes": 3, "width": 16, "depth": 1, "heads": 2, "buffer_size": 2}
        network = MAR(MARConfig(**{**defaults, "head_width": 24, "head_depth": 1, **sizes}), guidance_input)  # pyright: ignore
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim > 1:
                    parameter.copy_(noise / parameter.shape[-1] ** 0.5)
                else:
                    parameter.copy_(0.1 * noise + float("norm" in name and name.endswith("weight")))
        return network.eval()

    return make
