"""One optimizer step and what it computes with: precision, compiled blocks, CUDA graphs, learning rate."""

import contextlib
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from marval.config import CurveConfig, RunConfig
from marval.distributed import World, whole
from marval.graphs import Call, Graphs, plainly
from marval.models.cpu import use_onednn
from marval.models.mar import MAR

Rest = TypeVar("Rest")


def is_bf16(precision: str, device: torch.device) -> bool:
    """Whether matrix products are in bfloat16: with precision ``bf16``, and with ``auto`` on CUDA."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """A context in which matrix products are in bfloat16, or as they are; see `is_bf16`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=is_bf16(precision, device))


def prepare(network: MAR, config: RunConfig) -> None:
    """Switch on what the run asks of a network: activation checkpointing, compiled blocks. To be called before it is
    sharded.

    On the CPU, blocks that are not compiled multiply by oneDNN (`marval.models.cpu`).
    """
    network.activation_checkpointing = config.activation_checkpointing
    if config.compile:
        network.compile_blocks()
    elif network.fake_latent.device.type == "cpu":
        use_onednn(network)


def caller(config: CurveConfig, world: World) -> Call:
    """The way in which an update's functions are called: plainly or, if the run asks for it, from CUDA graphs.

    Raises:
        ValueError: graphs without CUDA, or on several processes.
    """
    if not config.graphs:
        return plainly
    if world.device.type != "cuda":
        raise ValueError(f"graphs need a CUDA device, but this run is on {world.device}: leave --graphs out")
    if world.size > 1:
        raise ValueError(f"graphs are for one process, not for {world.size}: leave --graphs out")
    return Graphs(world.device)


def add_weighted(sums: dict[str, Tensor], weight: float, values: dict[str, Tensor]) -> None:
    """Add weight times each value to the sum of its name."""
    for name, value in values.items():
        sums[name] = sums.get(name, torch.zeros_like(value.detach(), dtype=torch.float32)) + weight * value.detach()


def warmup_then_cosine(step: int, steps: int, warmup: int, decay: bool) -> float:
    """Factor of the learning rate in update ``step``: linear warm-up, then constant or (``decay``) cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) if decay else 1.0


class _Evaluate(nn.Module):
    """Holds a network and evaluates any function of it, so that DistributedDataParallel sees the forward pass."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


class Update:
    """Steps one network's optimizer: gradients of its own parameters, averaged over processes, checked and clipped.

    A loss may pass through other networks: they are left without gradients.

    Args:
        name: of the network, for messages. module: what is trained of it.
    """

    def __init__(
        self, name: str, module: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig, world: World,
        call: Call = plainly,
    ):  # fmt: skip
        self.name, self.module, self.optimizer, self.call = name, module, optimizer, call
        self.parameters = list(module.parameters())
        self.config, self.world = config, world
        self.base_lr = [group["lr"] for group in optimizer.param_groups]
        assert call is plainly or optimizer.defaults.get("fused"), "others do not read found_inf"
        self.unchecked: tuple[int, Tensor, torch.cuda.Event | None] | None = None
        self.evaluate: nn.Module = _Evaluate(module)
        if world.size > 1 and not world.sharded:
            self.evaluate = DistributedDataParallel(self.evaluate, gradient_as_bucket_view=True)
        self.loss: Tensor | None = None

    def backward(
        self, function: Callable[..., tuple[Tensor, Rest]], *args: Any, weight: float = 1.0, last: bool = True
    ) -> tuple[Tensor, Rest]:
        """Call ``function(*args)``, which returns a loss and anything else, and add up weight times its gradient.

        The function is called in the run's precision.

        Args:
            last: no other call follows before `step`: the processes exchange their sums.

        Returns:
            What the function returned, the loss detached.

        Raises:
            FloatingPointError: as `check`, of the last update.
        """
        first = self.loss is None
        if first:
            self.check()
            self.loss = torch.zeros((), device=self.world.device)

        def both_ways(*args: Any) -> tuple[Tensor, Rest]:
            if first:  # sharded networks get gradients from the losses of others
                self.zero_grad()
            with autocast(self.config.precision, self.world.device):
                loss, rest = self.evaluate(function, *args)
            (weight * loss).backward(inputs=None if self.world.sharded else self.parameters)
            return loss.detach(), rest

        distributed = isinstance(self.evaluate, DistributedDataParallel)
        with contextlib.nullcontext() if last or not distributed else self.evaluate.no_sync():  # type: ignore[operator]
            loss, rest = self.call((self.name, function, weight, first), both_ways, *args)
        assert self.loss is not None
        self.loss += weight * loss
        return loss, rest

    def zero_grad(self) -> None:
        """Forget all gradients; with graphs, which know their addresses, set them to zero."""
        if self.call is plainly:
            self.optimizer.zero_grad()
            return
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.zero_grad(set_to_none=False)

    def step(self, step: int, lr_factor: float = 1.0) -> Tensor:
        """Step the optimizer in update ``step``, counted from 0; returns the gradient's norm before clipping.

        With graphs nothing is waited for: a gradient that is not finite changes no weight, and the next `check` finds
        it.

        Raises:
            FloatingPointError: without graphs, as `check`.
        """
        assert self.loss is not None
        norm = self.call((self.name, "norm"), self._norm)
        good = torch.isfinite(norm + self.loss)
        if self.call is plainly:
            all_good = self.world.means({"good": good})["good"]  # all processes raise, or none
            self.unchecked = step, torch.tensor(all_good), None
            self.check()
        else:
            self.optimizer.found_inf = (~good).float()  # type: ignore[attr-defined] # read by fused optimizers
            event = torch.cuda.Event() if good.is_cuda else None
            self.unchecked = step, good.to("cpu", non_blocking=True), event
            if event is not None:
                event.record()
        clipping = torch.where(good, norm, math.inf)  # by NaN all would be NaN, and `check` could not tell which was
        nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip_grad, clipping)
        for group, lr in zip(self.optimizer.param_groups, self.base_lr, strict=True):
            group["lr"] = lr * lr_factor
        self.optimizer.step()
        if self.call is plainly:
            self.zero_grad()
        self.loss = None
        return norm

    def _norm(self) -> Tensor:
        return whole(nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))

    def check(self) -> None:
        """Raises FloatingPointError if loss or gradient of the last update were not finite; names the update, the
        network and the tensor."""
        if self.unchecked is None:
            return
        step, good, event = self.unchecked
        self.unchecked = None
        if event is not None:
            event.synchronize()
        if good < 1:
            gradients = {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}
            bad = [
                f"gradient of {name}" for name, gradient in gradients.items() if not whole(gradient).isfinite().all()
            ]
            what = (bad or ["loss"])[0]
            raise FloatingPointError(f"step {step + 1}: the {what} of the {self.name} is not finite")
