"""GSIM on contexts: what distillation and RL's anchor share.

A context is a set of visible tokens, a class and a guidance scale; it gives every masked token a condition: the
teacher's, and the student's where that has a backbone of its own. The auxiliary is a head on the student's conditions,
as the student's tokens depend on nothing else; or, at twice the passes of a backbone with gradients, a whole network.
"""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from marval import gsim
from marval.checkpoint import load_strictly, load_tensors
from marval.config import GSIMConfig, StudentConfig
from marval.diffusion import Schedule, guide, q_sample
from marval.distributed import World, is_sharded, whole, whole_copy
from marval.ema import EMA
from marval.models.head import DiffusionHead, SinusoidalMLP
from marval.models.mar import MAR, gather_tokens
from marval.sampling import student_tokens


def with_head(network: MAR, head: DiffusionHead) -> MAR:
    """A MAR that shares the backbone of ``network`` (the same parameters) and has its own head."""
    other = MAR.__new__(MAR)  # not copy.copy: a sharded module cannot be copied
    other.__dict__ = {**vars(network), "_modules": dict(network._modules)}
    other.head = head
    return other


def copy_head(network: MAR, guidance_input: bool, source_input: bool = False) -> DiffusionHead:
    """A trainable copy of the head. ``guidance_input`` adds the embedding of w, ``source_input`` that of the timestep
    at which a token was made; they start at zero: it computes the same."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        head = new_head(network, guidance_input, source_input)
    head.load_state_dict({**head.state_dict(), **network.head.state_dict()})
    return head.requires_grad_(True).to(network.fake_latent.device).eval()


def new_head(network: MAR, guidance_input: bool, source_input: bool = False) -> DiffusionHead:
    """A fresh head of the network's sizes."""
    config = network.config
    sizes = config.token_dim, config.width, config.head_width, config.head_depth
    return DiffusionHead(*sizes, guidance_input, source_input)


def copy_auxiliary(network: MAR, kind: str, guidance_input: bool, evaluations: int = 1) -> DiffusionHead | MAR:
    """A trainable copy of the teacher's head, or (``kind`` = network) of everything. Of a student of several
    evaluations, whose tokens have another distribution at each, it knows at which timestep one was made."""
    several = evaluations > 1
    if kind == "network":
        return copy_network(network, "all", guidance_input, several)
    return copy_head(network, guidance_input, several)


def copy_network(network: MAR, trained: str, guidance_input: bool, source_input: bool = False) -> MAR:
    """A trainable copy: of the head, on the shared backbone (``trained`` = head), or of everything (all)."""
    backbone = network if trained == "head" else copy.deepcopy(network).requires_grad_(True)
    return with_head(backbone, copy_head(network, guidance_input, source_input)).eval()


def own_part(network: MAR, base: MAR) -> nn.Module:
    """What a network does not share with ``base``: its head, or all of it."""
    return network.head if network.class_emb is base.class_emb else network


def with_part(network: MAR, part: nn.Module) -> MAR:
    """The network with its `own_part` replaced."""
    if isinstance(part, DiffusionHead):
        return with_head(network, part)
    assert isinstance(part, MAR)
    return part


def shard_networks(world: World, base: MAR, *networks: MAR) -> list[MAR]:
    """Split networks over the processes, if the world is sharded, with those that share the backbone of ``base``."""
    if not world.sharded:
        return list(networks)
    sharing = [network.class_emb is base.class_emb for network in networks]
    world.shard(base)
    for network, shares in zip(networks, sharing, strict=True):
        world.shard(network.head if shares else network)
    pairs = zip(networks, sharing, strict=True)
    return [with_head(base, network.head) if shares else network for network, shares in pairs]


def averaged_network(network: MAR, ema: EMA[Any], blank: MAR) -> MAR:
    """The network with the averages of its own part; whole, if it is sharded (then all processes must call)."""
    part = ema.averaged()
    if is_sharded(network.fake_latent) and not isinstance(part, MAR):
        head = {f"head.{name}": value for name, value in part.state_dict().items()}
        return whole_copy(blank, network.state_dict() | head)
    return with_part(network, part)


class Context(NamedTuple):
    """B images with V visible and N masked tokens each, and the conditions (B, N, E) of the masked ones."""

    tokens: Tensor
    visible: Tensor
    masked: Tensor
    labels: Tensor
    w: Tensor
    """(B, 1) guidance scales."""
    teacher_condition: Tensor
    null_condition: Tensor
    """The teacher's without a class."""
    student_condition: Tensor
    """Under the student's backbone, without gradient; the teacher's if they share it."""

    def condition(self, network: MAR) -> Tensor:
        """Conditions (B, N, E) of the masked tokens under a network."""
        return gather_tokens(network.condition(self.tokens, self.visible, self.labels), self.masked)


class Noise(NamedTuple):
    """Random numbers of an update, for B images with N masked tokens each."""

    z: Tensor
    """(B, N, S, D) for each of the student's S evaluations."""
    evaluation: Tensor
    """(B, N) index in [0, S) of the evaluation of the head whose token enters the losses; those before it carry no
    gradient. Half of the entries are 0: most images will be drawn with one evaluation."""
    t: Tensor
    """(B, N) timesteps."""
    eps: Tensor
    """(B, N, D) the noise of x_t."""

    def of(self, rows: slice) -> "Noise":
        """Of some images alone."""
        return Noise(*(x[rows] for x in self))


class ScoreMatching:
    """Losses of student and auxiliary against a frozen teacher (`marval.gsim`), averaged over the masked tokens."""

    def __init__(
        self, teacher: MAR, student: MAR, auxiliary: DiffusionHead | MAR, student_config: StudentConfig,
        config: GSIMConfig, schedule: Schedule,
    ):  # fmt: skip
        self.teacher, self.student, self.auxiliary = teacher, student, auxiliary
        self.auxiliary_head = auxiliary.head if isinstance(auxiliary, MAR) else auxiliary
        self.student_config, self.config, self.schedule = student_config, config, schedule
        self.distance = gsim.DISTANCES[config.distance]
        self.backbone_moves = any(p.requires_grad for p in student.backbone_parameters())

    def context(self, tokens: Tensor, visible: Tensor, masked: Tensor, labels: Tensor, w: Tensor) -> Context:
        """Masked tokens (B, N) given visible ones (B, V) and classes (B,), with their conditions."""
        null = torch.full_like(labels, self.teacher.config.num_classes)
        with torch.no_grad():
            both = self.teacher.condition(tokens.repeat(2, 1, 1), visible.repeat(2, 1), torch.cat([labels, null]))
            teacher, teacher_null = gather_tokens(both, masked.repeat(2, 1)).chunk(2)
            return self.refresh(Context(tokens, visible, masked, labels, w, teacher, teacher_null, teacher))

    def refresh(self, context: Context) -> Context:
        """The context with the student's conditions as they are now, if its backbone is not the teacher's."""
        if self.student.class_emb is self.teacher.class_emb:
            return context
        with torch.no_grad():
            return context._replace(student_condition=context.condition(self.student))

    def draw_guidance(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, 1) the fixed scale, or U[low, high] for a student that takes it as an input."""
        low, high = self.student_config.guidance_range or (self.student_config.guidance,) * 2
        return low + (high - low) * torch.rand(count, 1, generator=generator, device=generator.device)

    def generate(self, context: Context, noise: Noise, condition: Tensor) -> Tensor:
        """g(z, c): the student's tokens (B, N, D) at its conditions, each of its own ``noise.evaluation``."""
        times = self.student_config.timesteps(self.student_config.evaluations)
        if len(times) == 1:
            z = noise.z[:, :, 0]
            return student_tokens(self.student.head, self.schedule, times[0], condition, z, context.w)

        def evaluate(x0: Tensor, z: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            def network(x: Tensor) -> Tensor:
                return self.student.head(x, t, condition, context.w).chunk(2, dim=-1)[0]

            return gsim.one_step(network, z, self.schedule, t, x0)

        evaluation = noise.evaluation[..., None]
        with torch.no_grad():
            x0 = start = torch.zeros_like(noise.eps)
            for i, t in enumerate(times[:-1]):
                x0 = evaluate(x0, noise.z[:, :, i], torch.full_like(noise.t, t), condition.detach())
                start = torch.where(evaluation == i + 1, x0, start)
        z = noise.z.gather(2, evaluation[..., None].expand(-1, -1, 1, start.shape[-1]))[:, :, 0]
        return evaluate(start, z, self.student_timesteps(noise), condition)

    def student_timesteps(self, noise: Noise) -> Tensor:
        """(B, N) timestep at which the head makes the token that enters the losses."""
        config = self.student_config
        return config.t_init * (config.evaluations - noise.evaluation) // config.evaluations

    def eps_teacher(self, context: Context, x_t: Tensor, t: Tensor) -> Tensor:
        """Guided noise prediction of the teacher, (B, N, D)."""
        conditions = torch.cat([context.teacher_condition, context.null_condition])
        out = self.teacher.head(torch.cat([x_t, x_t]), torch.cat([t, t]), conditions)
        eps, eps_null = out.chunk(2, dim=-1)[0].chunk(2)
        return guide(eps, eps_null, context.w.unsqueeze(-1))

    def auxiliary_condition(self, context: Context) -> Tensor:
        """(B, N, E), from a backbone of its own if there is one."""
        return context.condition(self.auxiliary) if isinstance(self.auxiliary, MAR) else context.student_condition

    def eps_auxiliary(self, context: Context, x_t: Tensor, noise: Noise, condition: Tensor) -> Tensor:
        """Noise prediction of the auxiliary, unguided, (B, N, D)."""
        out = self.auxiliary_head(x_t, noise.t, condition, context.w, self.student_timesteps(noise))
        return out.chunk(2, dim=-1)[0]

    def auxiliary_loss(self, context: Context, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        """Denoising score matching on detached student samples: a scalar, and what to watch."""
        with torch.no_grad():
            x_t = q_sample(self.schedule, self.generate(context, noise, context.student_condition), noise.t, noise.eps)
        predicted = self.eps_auxiliary(context, x_t, noise, self.auxiliary_condition(context))
        loss = gsim.auxiliary_loss(predicted, noise.eps).mean()
        return loss, {"auxiliary_loss": loss.detach()}

    def student_loss(self, context: Context, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        """GSIM: the gradient flows through x_t into both head evaluations. A scalar, and what to watch."""
        with torch.no_grad():
            auxiliary_condition = self.auxiliary_condition(context)
        condition = context.student_condition
        if self.backbone_moves:  # the same numbers, with their gradient
            condition = context.condition(self.student)
        x0 = self.generate(context, noise, condition)
        x_t = q_sample(self.schedule, x0, noise.t, noise.eps)
        eps_teacher = self.eps_teacher(context, x_t, noise.t)
        eps_auxiliary = self.eps_auxiliary(context, x_t, noise, auxiliary_condition)
        loss = gsim.student_loss(eps_teacher, eps_auxiliary, noise.eps, self.config.lam, self.distance).mean()
        y = (eps_teacher - eps_auxiliary).detach().norm(dim=-1).mean()
        drawn = {"token_mean": x0.detach().mean(), "token_std": x0.detach().std()}
        return loss, {"student_loss": loss.detach(), "y": y, **drawn}

    def scores(self) -> dict[str, Tensor]:
        """What `load_scores` reads: the auxiliary's head, and what the teacher does not share with the student.

        RL's student has one evaluation: of several, the auxiliary's embedding of the first's timestep becomes part of a
        bias.
        """
        shared = self.teacher.class_emb is self.student.class_emb
        own = {n: x for n, x in self.teacher.state_dict().items() if n.startswith("head.") or not shared}
        tensors = {f"teacher.{name}": x for name, x in own.items()}
        tensors |= {f"{AUXILIARY}{name}": x for name, x in self.auxiliary_head.state_dict().items()}
        tensors = {name: whole(x).to("cpu", copy=True) for name, x in tensors.items()}
        if self.auxiliary_head.source_embed is not None:
            embed = SinusoidalMLP(self.student.config.head_width)
            prefix = f"{AUXILIARY}source_embed."
            own = {n.removeprefix(prefix): tensors.pop(n) for n in list(tensors) if n.startswith(prefix)}
            embed.load_state_dict(own)
            with torch.no_grad():
                tensors[f"{AUXILIARY}cond_embed.bias"] += embed(torch.tensor(self.student_config.t_init))
        return tensors


AUXILIARY = "auxiliary.head."
"""Prefix of its weights in scores.safetensors. An auxiliary's backbone is left out, also of files that hold one: its
head alone, on the student's conditions, has at most 3 % more loss (docs/LOG.md, 2026-11-26)."""


def load_scores(folder: Path, student: MAR, guidance_input: bool) -> tuple[MAR, DiffusionHead]:
    """Teacher (frozen) and auxiliary of a distilled student, from the student's folder.

    Raises:
        ValueError: the folder has no whole scores.safetensors, or it belongs to another model.
    """
    file, tensors = folder / "scores.safetensors", read_scores(folder)
    named, device = tensors["teacher"], student.fake_latent.device
    auxiliary = new_head(student, guidance_input)
    load_strictly(auxiliary, tensors["auxiliary"], f"{file} (auxiliary)")
    if all(name.startswith("head.") for name in named):
        head = new_head(student, False)
        load_strictly(head, {name.removeprefix("head."): x for name, x in named.items()}, f"{file} (teacher)")
        teacher = with_head(student, head)
    else:
        teacher = MAR(student.config)
        load_strictly(teacher, named, f"{file} (teacher)")
    teacher.eval().to(device)
    own_part(teacher, student).requires_grad_(False)
    return teacher, auxiliary.eval().to(device)


def read_scores(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Tensors of scores.safetensors: of the ``teacher``, and of the head of the ``auxiliary``.

    Raises:
        ValueError: the folder has no such file.
    """
    file = folder / "scores.safetensors"
    if not file.exists():
        raise ValueError(f"{file} does not exist: only a folder of `marval distill` or `marval rl` has it")
    tensors = load_tensors(file)
    return {
        part: {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        for part, prefix in (("teacher", "teacher."), ("auxiliary", AUXILIARY))
    }


def draw_noise(
    batch: int, num_masked: int, dim: int, t_range: tuple[int, int], generator: torch.Generator, evaluations: int = 1
) -> Noise:  # fmt: skip
    """The numbers of a whole batch."""
    on = {"generator": generator, "device": generator.device}
    z = torch.randn(batch, num_masked, evaluations, dim, **on)
    eps = torch.randn(batch, num_masked, dim, **on)
    t = gsim.draw_timesteps((batch, num_masked), t_range, generator)
    if evaluations == 1:
        return Noise(z, torch.zeros_like(t), t, eps)
    later = torch.randint(1, evaluations, (batch, num_masked), **on)
    return Noise(z, torch.where(torch.rand(batch, num_masked, **on) < 0.5, 0, later), t, eps)
