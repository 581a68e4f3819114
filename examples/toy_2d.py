"""GSIM in two dimensions: a 100-step teacher becomes a one-step student. Draws docs/images/toy_2d.png.

The data are four Gaussians, so the teacher's noise prediction has a closed form. Student and auxiliary are small MLPs
added to it: both start as the teacher, as in the method. The pseudo-Huber radius is 0.3, not 1e-5: see docs/LOG.md.

    python examples/toy_2d.py [FILE.png]
"""

import math
import sys
from functools import partial
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn

from marval.diffusion import cosine_schedule, denoise_chain, q_sample, respace
from marval.ema import EMA
from marval.gsim import auxiliary_loss, draw_timesteps, one_step, pseudo_huber, student_loss

matplotlib.use("agg")
import matplotlib.pyplot as plt

SCHEDULE, T_INIT, STD = cosine_schedule(), 755, 0.12
LAMBDA, STEPS, BATCH, LR, AUXILIARY_LR, R = 0.0, 2800, 256, 1e-3, 3e-3, 0.3
ANGLES = torch.arange(4) * math.pi / 2
MEANS = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)


def teacher(x: Tensor, t: Tensor) -> Tensor:
    """The exact noise prediction at x (B, 2), t (B,) for the mixture of N(MEANS, STD^2 I)."""
    alpha, sigma = (table[t].float()[:, None] for table in (SCHEDULE.alpha, SCHEDULE.sigma))
    variance = (alpha * STD) ** 2 + sigma**2
    distance = (x[:, None] - alpha[:, None] * MEANS).square().sum(-1)
    return sigma * (x - alpha * torch.softmax(-distance / (2 * variance), dim=1) @ MEANS) / variance


class Denoiser(nn.Module):
    """The teacher's noise prediction + an MLP of (x, t) that starts at zero."""

    def __init__(self, width: int = 128):
        super().__init__()
        hidden = [nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        self.mlp = nn.Sequential(nn.Linear(5, width), nn.SiLU(), *hidden, nn.Linear(width, 2))
        for parameter in self.mlp[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = SCHEDULE.alpha[t], SCHEDULE.sigma[t]
        level = torch.stack([alpha, sigma, (sigma / alpha).log() / 3], dim=1).float()
        return teacher(x, t) + self.mlp(torch.cat([x, level], dim=1))


def generate(student: Denoiser, z: Tensor) -> Tensor:
    """The student's points: one evaluation."""
    return one_step(lambda x: student(x, torch.full((len(x),), T_INIT)), z, SCHEDULE, T_INIT)


def chain(z: Tensor, g: torch.Generator) -> Tensor:
    """The teacher's points: 100 ancestral steps with the posterior's variance (v = -1)."""
    schedule = respace(SCHEDULE, 100)

    def network(x: Tensor, i: int) -> Tensor:
        return torch.cat([teacher(x, schedule.timesteps[i].expand(len(x))), -torch.ones_like(x)], dim=1)

    return denoise_chain(network, z, schedule, iter(torch.randn(100, *z.shape, generator=g)))


def distill(g: torch.Generator) -> Denoiser:
    """The averaged student; the auxiliary is updated once for each update of it."""
    student, auxiliary = Denoiser(), Denoiser()
    average = EMA(student, 0.99)
    learning = ((auxiliary, AUXILIARY_LR, (0, 999)), (student, LR, (20, 950)))
    optimizers = [torch.optim.Adam(network.parameters(), lr, betas=(0.0, 0.999)) for network, lr, _ in learning]
    decays = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS) for optimizer in optimizers]
    for _ in range(STEPS):
        for (network, _, t_range), optimizer, decay in zip(learning, optimizers, decays, strict=True):
            z, eps = torch.randn(2, BATCH, 2, generator=g)
            t = draw_timesteps((BATCH,), t_range, g)
            x0 = generate(student, z)
            if network is auxiliary:
                loss = auxiliary_loss(auxiliary(q_sample(SCHEDULE, x0.detach(), t, eps), t), eps)
            else:
                x_t = q_sample(SCHEDULE, x0, t, eps)
                loss = student_loss(teacher(x_t, t), auxiliary(x_t, t), eps, LAMBDA, partial(pseudo_huber, r=R))
            parameters = list(network.parameters())
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss.mean(), parameters), strict=True):
                parameter.grad = gradient
            optimizer.step()
            decay.step()
        average.update(student)
    return average.averaged()


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| of two sets of points; 0 for equal distributions."""
    return float(2 * torch.cdist(a, b).mean() - torch.pdist(a).mean() - torch.pdist(b).mean())


def main(file: Path) -> None:
    torch.manual_seed(0)
    student, g = distill(torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    z, noise, other = torch.randn(3, 4000, 2, generator=g)
    data, held_out = (MEANS[torch.randint(4, (4000,), generator=g)] + STD * n for n in (noise, other))
    with torch.no_grad():
        panels = {"data": data, "teacher, 100 steps": chain(z, g), "student before, 1 step": generate(Denoiser(), z)}
        panels["student after GSIM, 1 step"] = generate(student, z)
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.8), layout="constrained")
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        axis.scatter(*points.T, s=2, linewidths=0)
        axis.set(title=f"{title}\nenergy distance {energy_distance(points, held_out):.4f}", aspect="equal")
        axis.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), xticks=[], yticks=[])
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs/images/toy_2d.png")
