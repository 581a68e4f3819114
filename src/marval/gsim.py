"""Guided Score Implicit Matching: the inner diffusion chain distilled into one step (MARVAL, arXiv 2511.15190).

Three networks predict noise: the frozen teacher p, the auxiliary "fake score" phi, trained online on the student's
samples, and the student g, which is a noise predictor evaluated once. With

    x0 = g(z, c)        eps ~ N(0, I)        t ~ U{t_min .. t_max}        x_t = alpha_t x0 + sigma_t eps
    y  = eps_p^w(x_t, c) - eps_phi(x_t, c)

and d a distance with gradient d'(y), the losses of a token are

    student      L = -d'(y)^T (eps - eps_phi(x_t, c)) + lambda d(y)
    auxiliary    |eps - eps_phi(x_t, c)|^2                              on detached student samples

The student's gradient flows through x_t into both head evaluations. The condition c of each is its own backbone's, and
those of teacher and auxiliary carry no gradient; the auxiliary has the student's (`marval.matching`).
With the squared distance the student loss is SiD's (Zhou et al. 2024) at alpha = 1 - lambda / 2, in noise units.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from marval.diffusion import Schedule

Distance = Callable[[Tensor], tuple[Tensor, Tensor]]


def one_step(
    network: Callable[[Tensor], Tensor], z: Tensor, schedule: Schedule, t: Tensor | int, x0: Tensor | float = 0.0
) -> Tensor:
    """The student's token: x0 = (sigma/alpha) (z - eps_hat(sigma z, t)), one evaluation of the head.

    This is the x0 estimate of a noise predictor whose input is pure noise at the level of t, where sigma/alpha is
    moderate (0.5 at t = 300, 2.5 at 755); near t = 999 it would multiply any error by 2e4. A student of several
    evaluations starts the next from the token that it has, noised anew to a lower t: x0 + (sigma/alpha) (z -
    eps_hat(alpha x0 + sigma z)).

    Args:
        network: ``x (..., D) -> eps_hat (..., D)`` at the timestep t (one, or (...)) and the token's condition.
        z: standard normal (..., D).
        x0: (..., D) of the evaluation before.
    """
    alpha, sigma = schedule.at("alpha", t, z), schedule.at("sigma", t, z)
    return x0 + (sigma / alpha) * (z - network(alpha * x0 + sigma * z))


def pseudo_huber(y: Tensor, r: float = 1e-5) -> tuple[Tensor, Tensor]:
    """d = sqrt(|y|^2 + r^2) - r and its gradient y / sqrt(|y|^2 + r^2). y (..., D) -> (...), (..., D)."""
    root = (y.square().sum(-1, keepdim=True) + r * r).sqrt()
    return (root - r).squeeze(-1), y / root


def squared(y: Tensor) -> tuple[Tensor, Tensor]:
    """d = |y|^2 and its gradient 2 y. y (..., D) -> (...), (..., D)."""
    return y.square().sum(-1), 2 * y


DISTANCES: dict[str, Distance] = {"pseudo-huber": pseudo_huber, "squared": squared}


def student_loss(
    eps_teacher: Tensor, eps_auxiliary: Tensor, eps: Tensor, lam: float, distance: Distance = pseudo_huber
) -> Tensor:
    """GSIM's loss of each student token, L1 + lambda L2. Signed; it hovers near zero and is no stopping signal.

    Args:
        eps_teacher: (..., D) guided noise prediction of the teacher at (x_t, t).
        eps_auxiliary: (..., D) noise prediction of the auxiliary at (x_t, t).
        eps: (..., D) the noise that made x_t.
        lam: weight of L2. The paper uses 1; SiD's best range 1.0..1.2 of alpha is lambda 0..-0.4.

    Returns:
        (...) unreduced.
    """
    d, d_prime = distance(eps_teacher - eps_auxiliary)
    return lam * d - (d_prime * (eps - eps_auxiliary)).sum(-1)


def auxiliary_loss(eps_auxiliary: Tensor, eps: Tensor) -> Tensor:
    """|eps - eps_phi(x_t)|^2 of each token, (..., D) -> (...): denoising score matching on the student's samples."""
    return (eps - eps_auxiliary).square().sum(-1)


def draw_timesteps(shape: tuple[int, ...], t_range: tuple[int, int], generator: torch.Generator) -> Tensor:
    """t ~ U{t_min .. t_max}, both ends included."""
    return torch.randint(t_range[0], t_range[1] + 1, shape, generator=generator, device=generator.device)
