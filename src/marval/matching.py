"""GSIM on contexts: what distillation and RL's anchor share, and scores.safetensors, by which RL goes on from it.

A context is a set of visible tokens, a class and a guidance scale; it gives every masked token a condition: the
teacher's, and the student's where that has a backbone of its own. The auxiliary is a head on the student's conditions,
as the student's tokens depend on nothing else; or, at twice the passes of a backbone with gradients, a whole network.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from marval import gsim
from marval.checkpoint import load_strictly, load_tensors
from marval.config import GSIMConfig, StudentConfig
from marval.diffusion import Schedule, guide, q_sample
from marval.distributed import whole
from marval.models.head import DiffusionHead, SinusoidalMLP
from marval.models.mar import MAR, gather_tokens
from marval.networks import new_head, own_part, with_head
from marval.sampling import student_tokens

TEACHER = "teacher."
"""Prefix of the teacher's weights in scores.safetensors."""
AUXILIARY = "auxiliary.head."
"""Prefix of those of the auxiliary's head. A backbone of its own is left out, also of files that hold one: the head
alone, on the student's conditions, has at most 3 % more loss (docs/LOG.md, 2026-11-26)."""


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
        """Conditions (B, N, E) of the masked tokens under ``network``."""
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
        """The numbers of some images alone."""
        return Noise(*(x[rows] for x in self))


def draw_guidance(student: StudentConfig, count: int, generator: torch.Generator) -> Tensor:
    """Guidance scales (count, 1): the student's fixed one, or U[low, high] for a student that takes it as an input."""
    low, high = student.guidance_range or (student.guidance,) * 2
    return low + (high - low) * torch.rand(count, 1, generator=generator, device=generator.device)


def draw_noise(
    batch: int, num_masked: int, dim: int, t_range: tuple[int, int], generator: torch.Generator, evaluations: int = 1
) -> Noise:  # fmt: skip
    """The random numbers of a whole batch, for ``num_masked`` tokens of ``dim`` channels in each image.

    Args:
        t_range: the first and the last of the timesteps to draw from. evaluations: S of the student.
    """
    on = {"generator": generator, "device": generator.device}
    z = torch.randn(batch, num_masked, evaluations, dim, **on)
    eps = torch.randn(batch, num_masked, dim, **on)
    t = gsim.draw_timesteps((batch, num_masked), t_range, generator)
    if evaluations == 1:
        return Noise(z, torch.zeros_like(t), t, eps)
    later = torch.randint(1, evaluations, (batch, num_masked), **on)
    return Noise(z, torch.where(torch.rand(batch, num_masked, **on) < 0.5, 0, later), t, eps)


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
        """A context with its conditions: all tokens (B, L, D), positions visible (B, V) and masked (B, N), classes (B,)
        and guidance scales (B, 1)."""
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
        """Timesteps (B, N) at which the head makes the tokens that enter the losses."""
        config = self.student_config
        return config.t_init * (config.evaluations - noise.evaluation) // config.evaluations

    def eps_teacher(self, context: Context, x_t: Tensor, t: Tensor) -> Tensor:
        """The teacher's guided prediction of the noise in x_t, (B, N, D)."""
        conditions = torch.cat([context.teacher_condition, context.null_condition])
        out = self.teacher.head(torch.cat([x_t, x_t]), torch.cat([t, t]), conditions)
        eps, eps_null = out.chunk(2, dim=-1)[0].chunk(2)
        return guide(eps, eps_null, context.w.unsqueeze(-1))

    def auxiliary_condition(self, context: Context) -> Tensor:
        """The auxiliary's conditions (B, N, E): the student's, unless it has a backbone of its own."""
        return context.condition(self.auxiliary) if isinstance(self.auxiliary, MAR) else context.student_condition

    def eps_auxiliary(self, context: Context, x_t: Tensor, noise: Noise, condition: Tensor) -> Tensor:
        """The auxiliary's unguided prediction of the noise in x_t, (B, N, D)."""
        out = self.auxiliary_head(x_t, noise.t, condition, context.w, self.student_timesteps(noise))
        return out.chunk(2, dim=-1)[0]

    def auxiliary_loss(self, context: Context, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        """The auxiliary's loss, denoising score matching on detached samples of the student: a scalar, and what to
        watch."""
        with torch.no_grad():
            x_t = q_sample(self.schedule, self.generate(context, noise, context.student_condition), noise.t, noise.eps)
        predicted = self.eps_auxiliary(context, x_t, noise, self.auxiliary_condition(context))
        loss = gsim.auxiliary_loss(predicted, noise.eps).mean()
        return loss, {"auxiliary_loss": loss.detach()}

    def student_loss(self, context: Context, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        """GSIM's loss of the student, whose gradient flows through x_t into both predictions: a scalar, and what to
        watch."""
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
        """Tensors of scores.safetensors: the auxiliary's head, and what the teacher does not share with the student.

        RL's student has one evaluation: of several, the auxiliary's embedding of the first's timestep becomes part of a
        bias.
        """
        shared = self.teacher.class_emb is self.student.class_emb
        own = {n: x for n, x in self.teacher.state_dict().items() if n.startswith("head.") or not shared}
        tensors = {f"{TEACHER}{name}": x for name, x in own.items()}
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


def read_scores(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Tensors of a folder's scores.safetensors by name: of the ``teacher``, and of the head of the ``auxiliary``.

    Raises:
        ValueError: the folder has no such file.
    """
    file = folder / "scores.safetensors"
    if not file.exists():
        raise ValueError(f"{file} does not exist: only a folder of `marval distill` or `marval rl` has it")
    tensors = load_tensors(file)
    return {
        part: {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        for part, prefix in (("teacher", TEACHER), ("auxiliary", AUXILIARY))
    }


def load_scores(folder: Path, student: MAR, guidance_input: bool) -> tuple[MAR, DiffusionHead]:
    """The frozen teacher and the auxiliary of a distilled student, from its folder's scores.safetensors.

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
