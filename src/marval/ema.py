"""Exponential moving average of a network's parameters, by name."""

from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from marval.distributed import like, template, whole_copy

Network = TypeVar("Network", bound=nn.Module)


class EMA(Generic[Network]):
    """Averages with decay min(decay, (1 + n) / (10 + n)) after n updates, so that short runs forget their start.

    Args:
        module: may be sharded; then give ``blank``, its `template` from before.
    """

    def __init__(self, module: Network, decay: float, blank: Network | None = None):
        self.decay = decay
        self.num_updates = 0
        self.blank = blank or template(module)
        self.average = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: Network) -> None:
        """Move the average towards the module's parameters."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        current = dict(module.named_parameters())
        average = get_ema_multi_avg_fn(decay)
        average(list(self.average.values()), [current[name] for name in self.average], self.num_updates)  # type: ignore[arg-type]

    def averaged(self) -> Network:
        """A copy of the module with the averaged parameters, whole, in eval mode."""
        return whole_copy(self.blank, self.average)

    def state_dict(self) -> dict[str, int | dict[str, Tensor]]:
        return {"num_updates": self.num_updates, "average": self.average}

    def load_state_dict(self, state: dict) -> None:
        self.num_updates = state["num_updates"]
        for name, value in self.average.items():
            value.copy_(like(state["average"][name], value))
