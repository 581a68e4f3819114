"""GSIM in two dimensions: a 100-step teacher becomes a one-step student. Draws docs/images/toy_2d.png in a minute.

The data are two spiral arms (classes) of six Gaussians each, so the teacher's noise prediction has a closed form.
Student and auxiliary are small MLPs added to it: both start as the teacher, as in the method.

    python examples/toy_2d.py [FILE.png]
"""

import math
import sys
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn

from marval.diffusion import cosine_schedule, denoise_chain, guide, q_sample, respace
from marval.ema import EMA
from marval.gsim import auxiliary_loss, draw_timesteps, one_step, student_loss

SCHEDULE, T_INIT, LAMBDA, STEPS, BATCH, LR, STD = cosine_schedule(), 755, 0.0, 3000, 256, 1e-3, 0.1
ANGLES = 0.8 + torch.arange(6) * 0.85
ARM = (ANGLES / 4)[:, None] * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)
MEANS = torch.stack([ARM, -ARM])  # (classes, modes, 2)


def mixture_eps(x: Tensor, t: Tensor, means: Tensor) -> Tensor:
    """The exact noise prediction at x (B, 2), t (B,) for a mixture of N(means, STD^2 I), means (B or 1, M, 2)."""
    alpha, sigma = (table[t].float()[:, None] for table in (SCHEDULE.alpha, SCHEDULE.sigma))
    variance = (alpha * STD) ** 2 + sigma**2
    distance = (x[:, None] - alpha[:, None] * means).square().sum(-1)
    mean = (torch.softmax(-distance / (2 * variance), dim=1)[..., None] * means).sum(1)
    return sigma * (x - alpha * mean) / variance


def teacher(x: Tensor, t: Tensor, label: Tensor, w: float) -> Tensor:
    """Guided noise prediction; without a class, the mixture is that of both arms."""
    return guide(mixture_eps(x, t, MEANS[label]), mixture_eps(x, t, MEANS.reshape(1, -1, 2)), w)


class Denoiser(nn.Module):
    """The teacher's unguided noise prediction + an MLP of (x, t, class) that starts at zero."""

    def __init__(self, width: int = 128):
        super().__init__()
        layers = [nn.Linear(5, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(width, 2))
        nn.init.zeros_(self.mlp[-1].weight)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        level = torch.stack([SCHEDULE.alpha[t], SCHEDULE.sigma[t], 2.0 * label - 1], dim=1).float()
        return teacher(x, t, label, 1.0) + self.mlp(torch.cat([x, level], dim=1))


def generate(student: Denoiser, z: Tensor, label: Tensor) -> Tensor:
    """The student's points: one evaluation."""
    t = torch.full((len(z),), T_INIT)
    return one_step(lambda x: student(x, t, label), z, SCHEDULE, T_INIT)


def chain(z: Tensor, label: Tensor, w: float, g: torch.Generator) -> Tensor:
    """The teacher's points: 100 ancestral steps with the posterior's variance (v = -1)."""
    schedule = respace(SCHEDULE, 100)

    def network(x: Tensor, i: int) -> Tensor:
        return torch.cat([teacher(x, schedule.timesteps[i].expand(len(x)), label, w), -torch.ones_like(x)], dim=1)

    return denoise_chain(network, z, schedule, iter(torch.randn(100, *z.shape, generator=g)))


def distill(w: float) -> Denoiser:
    """The averaged student of the teacher at guidance scale w; one auxiliary update for each of the student."""
    g = torch.Generator().manual_seed(0)
    student, auxiliary = Denoiser(), Denoiser()
    average = EMA(student, 0.99)
    optimizers = [torch.optim.Adam(network.parameters(), LR, betas=(0.0, 0.999)) for network in (student, auxiliary)]
    decays = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS) for optimizer in optimizers]

    def draw(t_range: tuple[int, int]) -> tuple[Tensor, ...]:
        z, eps = torch.randn(2, BATCH, 2, generator=g)
        return z, eps, torch.randint(2, (BATCH,), generator=g), draw_timesteps((BATCH,), t_range, g)

    for _ in range(STEPS):
        z, eps, label, t = draw((0, 999))
        x_t = q_sample(SCHEDULE, generate(student, z, label).detach(), t, eps)
        update(auxiliary, optimizers[1], auxiliary_loss(auxiliary(x_t, t, label), eps).mean())
        z, eps, label, t = draw((20, 950))
        x_t = q_sample(SCHEDULE, generate(student, z, label), t, eps)
        loss = student_loss(teacher(x_t, t, label, w), auxiliary(x_t, t, label), eps, LAMBDA).mean()
        update(student, optimizers[0], loss)
        average.update(student)
        for decay in decays:
            decay.step()
    return average.averaged(student)


def update(network: Denoiser, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step of this network alone."""
    parameters = list(network.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| of two sets of points; 0 for equal distributions."""
    return float(2 * torch.cdist(a, b).mean() - torch.pdist(a).mean() - torch.pdist(b).mean())
