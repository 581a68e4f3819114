"""Networks made of networks: trainable copies, other heads on a shared backbone, what of them is trained, averages.

Student, teacher and auxiliary of a run may share a backbone (the same parameters) and differ in their heads alone.
"""

import copy
from typing import Any

import torch
from torch import nn

from marval.distributed import World, is_sharded, whole_copy
from marval.ema import EMA
from marval.models.head import DiffusionHead
from marval.models.mar import MAR


def with_head(network: MAR, head: DiffusionHead) -> MAR:
    """A MAR that shares the backbone of ``network`` (the same parameters) and has its own head."""
    other = MAR.__new__(MAR)  # not copy.copy: a sharded module cannot be copied
    other.__dict__ = {**vars(network), "_modules": dict(network._modules)}
    other.head = head
    return other


def new_head(network: MAR, guidance_input: bool, source_input: bool = False) -> DiffusionHead:
    """A freshly initialised head of the network's sizes; for the two inputs see `copy_head`."""
    config = network.config
    sizes = config.token_dim, config.width, config.head_width, config.head_depth
    return DiffusionHead(*sizes, guidance_input, source_input)


def copy_head(network: MAR, guidance_input: bool, source_input: bool = False) -> DiffusionHead:
    """A trainable copy of the network's head, which computes the same: what is added to it starts at zero.

    Args:
        guidance_input: add an embedding of w. source_input: add one of the timestep at which a token was made.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        head = new_head(network, guidance_input, source_input)
    head.load_state_dict({**head.state_dict(), **network.head.state_dict()})
    return head.requires_grad_(True).to(network.fake_latent.device).eval()


def copy_network(network: MAR, trained: str, guidance_input: bool, source_input: bool = False) -> MAR:
    """A trainable copy of a network, or (``trained`` = head) of its head alone, on the shared backbone."""
    backbone = network if trained == "head" else copy.deepcopy(network).requires_grad_(True)
    return with_head(backbone, copy_head(network, guidance_input, source_input)).eval()


def copy_auxiliary(network: MAR, kind: str, guidance_input: bool, evaluations: int = 1) -> DiffusionHead | MAR:
    """A trainable copy of the teacher's head, or (``kind`` = network) of all of it, as the auxiliary of a student.

    The tokens of a student of several evaluations have another distribution at each, so its auxiliary is told at which
    timestep one was made.
    """
    several = evaluations > 1
    if kind == "network":
        return copy_network(network, "all", guidance_input, several)
    return copy_head(network, guidance_input, several)


def own_part(network: MAR, base: MAR) -> nn.Module:
    """The part of a network that it does not share with ``base``: its head, or all of it."""
    return network.head if network.class_emb is base.class_emb else network


def with_part(network: MAR, part: nn.Module) -> MAR:
    """The network with its `own_part` replaced."""
    if isinstance(part, DiffusionHead):
        return with_head(network, part)
    assert isinstance(part, MAR)
    return part


def shard_networks(world: World, base: MAR, *networks: MAR) -> list[MAR]:
    """The networks, split over the processes if the world is sharded; some may share the backbone of ``base``, which is
    split as well."""
    if not world.sharded:
        return list(networks)
    sharing = [network.class_emb is base.class_emb for network in networks]
    world.shard(base)
    for network, shares in zip(networks, sharing, strict=True):
        world.shard(network.head if shares else network)
    pairs = zip(networks, sharing, strict=True)
    return [with_head(base, network.head) if shares else network for network, shares in pairs]


def averaged_network(network: MAR, ema: EMA[Any], blank: MAR) -> MAR:
    """The network with the averages of its own part; made whole, if it is sharded (then all processes must call).

    Args:
        blank: its `template` from before it was sharded.
    """
    part = ema.averaged()
    if is_sharded(network.fake_latent) and not isinstance(part, MAR):
        head = {f"head.{name}": value for name, value in part.state_dict().items()}
        return whole_copy(blank, network.state_dict() | head)
    return with_part(network, part)
