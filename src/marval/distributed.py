"""Many processes, started by ``torchrun``: who am I, my share of a batch, sharded networks, whole states.

Each process holds everything (DistributedDataParallel averages the gradients, see `marval.update.Update`), or weights,
gradients, averages and optimizer states are split over the processes (FSDP2's ``fully_shard``, by one flag). What is
saved is whole in both cases, so that a run goes on with any number of processes, sharded or not.
"""

import atexit
import copy
import os
import socket
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from marval.devices import device_named
from marval.watch import Watch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Network = TypeVar("Network", bound=nn.Module)
_watch: Watch | None = None


class Part(NamedTuple):
    """Some rows of a global batch, for one forward and backward pass of one process."""

    rows: slice
    """Of the global batch."""
    own: slice
    """The same rows, counted from the first row of this process."""
    weight: float
    """Factor for the mean loss of these rows. Summed over parts and averaged over processes, the result is the batch
    mean."""


@dataclass(frozen=True)
class World:
    """This process among ``size``; rank 0 writes files and talks."""

    rank: int
    size: int
    device: torch.device
    sharded: bool = False
    """Networks given to `shard` are split over the processes."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def gathers(self) -> bool:
        """Whether this process is needed to make a network whole: to save it, say."""
        return self.is_main or self.sharded

    def rows(self, batch: int) -> slice:
        """This process's share of a global batch; shares differ by one row at most."""
        return slice(self.rank * batch // self.size, (self.rank + 1) * batch // self.size)

    def parts(self, batch: int, accumulate: int = 1, group: int = 1) -> list[Part]:
        """This process's share of a global batch, cut into ``accumulate`` parts; groups of rows stay together.

        Raises:
            ValueError: there is not a group for each part of each process.
        """
        groups = batch // group
        if groups < self.size * accumulate:
            what = f"batch {batch}" if group == 1 else f"batch {batch} in groups of {group}"
            raise ValueError(f"{what} is too small for {self.size} processes with {accumulate} parts each: raise it")
        share = self.rows(groups)
        count, parts = share.stop - share.start, []
        for i in range(accumulate):
            low, high = (i * count // accumulate) * group, ((i + 1) * count // accumulate) * group
            first = share.start * group
            rows = slice(first + low, first + high)
            parts.append(Part(rows, slice(low, high), self.size * (high - low) / batch))
        return parts

    def means(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Each scalar's mean over the processes."""
        if not values:
            return {}
        stacked = torch.stack([value.detach().float() for value in values.values()])
        if self.size > 1:
            dist.all_reduce(stacked)
            stacked /= self.size
        return dict(zip(values, stacked.tolist(), strict=True))

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Rows of all processes in rank order; each has equally many."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def shard(self, network: nn.Module) -> None:
        """Split a MAR, or a head alone, over the processes if this world is sharded: block by block, with FSDP2.

        A sharded network computes the same through `MAR.condition` and the head's `embed`, `denoise` and `forward`,
        which every process must call equally often. A head that is sharded already is left alone.
        """
        if not self.sharded:
            return
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

        # FSDP2 fears in-place operations on outputs that are views; there are none here
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(self.device.type, (self.size,))
        head = getattr(network, "head", network)
        for name in ("encoder_blocks", "decoder_blocks"):
            for block in getattr(network, name, ()):
                fully_shard(block, mesh=mesh, reshard_after_forward=True)
        for module, methods in (
            (head, ("embed", "embed_scalars", "embed_condition", "denoise")),
            (network, ("condition",)),
        ):
            if not isinstance(module, FSDPModule):
                fully_shard(module, mesh=mesh, reshard_after_forward=True)
                for method in methods:
                    register_fsdp_forward_method(module, method)


def is_sharded(tensor: Any) -> "TypeGuard[DTensor]":
    """Whether a tensor is split over the processes. Its class takes 0.7 s to import; only `World.shard` needs it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, whole; all processes must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def whole_state(state: Any, keep: bool = True) -> Any:
    """A nested state of dicts, lists, tensors and plain values with every sharded tensor whole, on the CPU.

    All processes must call it; those that do not ``keep`` it get None in place of sharded tensors.
    """
    if isinstance(state, Mapping):
        return {name: whole_state(value, keep) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(whole_state(value, keep) for value in state)
    if is_sharded(state):
        tensor = state.full_tensor()
        return tensor.cpu() if keep else None
    return state


def like(value: Tensor, target: Tensor) -> Tensor:
    """A whole tensor, sharded as the target is."""
    if not is_sharded(target):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)


@torch.no_grad()
def restore(target: Any, state: Any) -> None:
    """``target.load_state_dict`` of a whole state; the target may be sharded, then its tensors are cut one by one."""
    if isinstance(target, nn.Module):
        for name, value in target.state_dict().items():
            value.copy_(like(state[name], value))
        return
    if isinstance(target, torch.optim.Optimizer):
        parameters = [parameter for group in target.param_groups for parameter in group["params"]]
        for i, values in state["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == parameters[i].shape:
                    values[name] = like(value, parameters[i])
    target.load_state_dict(state)


def template(network: Network) -> Network:
    """The network without its weights, on the meta device; to be made before the network is sharded."""
    memo = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in network.parameters()}
    return copy.deepcopy(network, memo)  # type: ignore[arg-type]


def whole_copy(template: Network, tensors: Mapping[str, Tensor]) -> Network:
    """A network like the template, in eval mode, made of copies of tensors that may be sharded (then all must call)."""
    network = copy.deepcopy(template)
    network.load_state_dict({name: whole(tensor.detach().clone()) for name, tensor in tensors.items()}, assign=True)
    return network.eval()


def connect(device: str = "auto", shard: bool = False) -> World:
    """Join the other processes if ``torchrun`` started this one; pick the device.

    From then on a process that dies ends all others within a minute, with a message that names it.

    Raises:
        ValueError: CUDA is asked for and there is none, or there are fewer GPUs than processes.
    """
    global _watch
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = str(device_named(device))
    if device == "cuda":
        index, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if index >= count:
            raise ValueError(f"process {index} has no GPU: this machine has {count}; start fewer processes")
        device = f"cuda:{index}"
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device))
    elif device != "cpu":
        raise ValueError(f"unknown device {device!r}: choose auto, cpu or cuda")
    if shard and size == 1:
        raise ValueError("--shard splits a network over several processes: start them with torchrun, or leave it out")
    if size > 1 and ":" in device and "LOCAL_RANK" in os.environ and device != f"cuda:{os.environ['LOCAL_RANK']}":
        raise ValueError(f"device {device!r} is one GPU for {size} processes: say cuda, and each takes its own")
    if size > 1 and not dist.is_initialized():
        store, _, _ = next(rendezvous("env://"))
        own = store.clone()  # type: ignore[attr-defined]  # every TCP and file store has it
        _watch = Watch(PrefixStore("watch", own), rank, size, socket.gethostname())
        _watch.start()
        atexit.register(_watch.leave, None)
        cuda = device.startswith("cuda")
        # one process may write files alone for hours, or encode a last shard; the watch ends dead ones
        dist.init_process_group(
            "cuda:nccl,cpu:gloo" if cuda else "gloo", store=PrefixStore("group", store), rank=rank, world_size=size,
            timeout=timedelta(days=2), device_id=torch.device(device) if cuda else None,
        )  # fmt: skip
    return World(rank, size, torch.device(device), shard)


def disconnect(error: BaseException | None = None) -> bool:
    """Leave the process group that `connect` joined; an error is passed on to the others, and ends them.

    Returns whether there was one. PyTorch's caches may keep the group and its threads, which abort about one process
    in 300 while its interpreter ends: end with ``os._exit``, as the command line does.
    """
    global _watch
    if _watch is None:
        return False
    watch, _watch = _watch, None
    if error is None:
        watch.sign("done")
        dist.barrier()  # the store stays until all have signed
    elif type(error) is RuntimeError or isinstance(error, dist.DistError):
        watch.wait()  # perhaps another process's death: then the watch names it, and ends this one
    watch.leave(error)
    if error is None:
        dist.destroy_process_group()
    return True
