"""Exponential moving average of a network's parameters, by name."""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

Network = TypeVar("Network", bound=nn.Module)


class EMA:
    """Averages with decay min(decay, (1 + n) / (10 + n)) after n updates, so that short runs forget their start."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.num_updates = 0
        self.average = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the module's parameters."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        current = dict(module.named_parameters())
        average = get_ema_multi_avg_fn(decay)
        average(list(self.average.values()), [current[name] for name in self.average], self.num_updates)  # type: ignore[arg-type]

    def averaged(self, module: Network) -> Network:
        """A copy of the module with the averaged parameters, in eval mode."""
        result = copy.deepcopy(module).eval()
        with torch.no_grad():
            for name, parameter in result.named_parameters():
                parameter.copy_(self.average[name])
        return result

    def state_dict(self) -> dict[str, int | dict[str, Tensor]]:
        return {"num_updates": self.num_updates, "average": self.average}

    def load_state_dict(self, state: dict) -> None:
        self.num_updates = state["num_updates"]
        for name, value in self.average.items():
            value.copy_(state["average"][name])
