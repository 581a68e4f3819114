"""GSIM against Gaussians, where the teacher's, the student's and the auxiliary's scores have closed forms."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from marval import gsim
from marval.diffusion import cosine_schedule, guide, q_sample, x0_from_eps

SCHEDULE = cosine_schedule()
T_INIT = 755


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian_eps(x_t, t, mean, std):
    """The optimal noise prediction at (x_t (..., D), t (...)) for data N(mean, std^2)."""
    alpha, sigma = SCHEDULE.alpha[t][..., None], SCHEDULE.sigma[t][..., None]
    return sigma * (x_t - alpha * mean) / (alpha**2 * std**2 + sigma**2)


class AffineStudent(torch.nn.Module):
    """A one-step student with an affine noise predictor eps_hat(x) = k x + m, so its tokens are Gaussian."""

    def __init__(self, dim):
        super().__init__()
        self.k = torch.nn.Parameter(torch.full((dim,), 0.7, dtype=torch.float64))
        self.m = torch.nn.Parameter(torch.zeros(dim, dtype=torch.float64))

    def forward(self, z):
        return gsim.one_step(lambda x: self.k * x + self.m, z, SCHEDULE, T_INIT)

    def moments(self):
        """Mean and standard deviation of its tokens."""
        mean = self.forward(torch.zeros_like(self.m))
        return mean, self.forward(torch.ones_like(self.m)) - mean


COND, NULL, STD = (torch.tensor(x, dtype=torch.float64) for x in ([0.8, -0.6], [0.2, 0.1], [0.5, 1.3]))


def train_student(*, w, lam, distance, online, steps, batch=256):
    """Trains the student by GSIM; the auxiliary is the student's exact score, or a Gaussian fitted online."""
    student = AffineStudent(2)
    auxiliary = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)  # mean, log std
    optimiser = torch.optim.Adam(student.parameters(), 0.03, betas=(0.0, 0.999))
    auxiliary_optimiser = torch.optim.Adam([auxiliary], 0.1, betas=(0.0, 0.999))
    generator = torch.Generator().manual_seed(0)

    def draw(t_range):
        z, eps = torch.randn(2, batch, 2, generator=generator, dtype=torch.float64)
        t = gsim.draw_timesteps((batch,), t_range, generator)
        x0 = student(z)
        return eps, t, x0

    for step in range(steps):
        decay = 1 - step / steps
        optimiser.param_groups[0]["lr"], auxiliary_optimiser.param_groups[0]["lr"] = 0.03 * decay, 0.1 * decay
        for _ in range(2 if online else 0):
            eps, t, x0 = draw((0, 999))
            eps_auxiliary = gaussian_eps(q_sample(SCHEDULE, x0.detach(), t, eps), t, auxiliary[0], auxiliary[1].exp())
            auxiliary_optimiser.zero_grad()
            gsim.auxiliary_loss(eps_auxiliary, eps).mean().backward()
            auxiliary_optimiser.step()
        eps, t, x0 = draw((20, 950))
        x_t = q_sample(SCHEDULE, x0, t, eps)
        eps_teacher = guide(gaussian_eps(x_t, t, COND, STD), gaussian_eps(x_t, t, NULL, STD), w)
        fitted = (auxiliary[0], auxiliary[1].exp()) if online else student.moments()
        eps_auxiliary = gaussian_eps(x_t, t, *(value.detach() for value in fitted))
        optimiser.zero_grad()
        gsim.student_loss(eps_teacher, eps_auxiliary, eps, lam, gsim.DISTANCES[distance]).mean().backward()
        optimiser.step()
    return [value.detach() for value in student.moments()]


@pytest.mark.parametrize("w", [1.0, 2.5])
@pytest.mark.parametrize("lam", [1.0, 0.0, -0.4])
@pytest.mark.parametrize("distance", sorted(gsim.DISTANCES))
def test_student_converges_to_the_guided_teacher(distance, lam, w):
    """With equal variances guidance moves the teacher's mean to null + w (cond - null) and nothing else."""
    mean, std = train_student(w=w, lam=lam, distance=distance, online=False, steps=400)
    assert_close(mean, NULL + w * (COND - NULL), rtol=0, atol=0.05)
    assert_close(std, STD, rtol=0.05, atol=0)


@pytest.mark.parametrize("lam", [1.0, -0.4])
def test_student_converges_with_an_auxiliary_trained_online(lam):
    mean, std = train_student(w=2.5, lam=lam, distance="pseudo-huber", online=True, steps=500)
    assert_close(mean, NULL + 2.5 * (COND - NULL), rtol=0, atol=0.07)
    assert_close(std, STD, rtol=0.07, atol=0)


@pytest.mark.parametrize("distance", [gsim.squared, partial(gsim.pseudo_huber, r=1.0)])
@pytest.mark.parametrize("t", [20, 400, 950])
def test_theorem(distance, t):
    """L1's gradient is that of E d(eps_p - eps_theta) through the student's score with its samples held fixed.

    Adding L2 (lambda = 1) adds the part through the samples: the whole gradient. Expectations by quadrature.
    """
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(60))
    z, eps = (grid.reshape(-1, 1) for grid in torch.meshgrid(nodes, nodes, indexing="ij"))
    weights = torch.outer(weights, weights).flatten() / weights.sum() ** 2
    at = torch.full((len(z),), t)
    moments = torch.tensor([0.9, 0.4], dtype=torch.float64, requires_grad=True)

    def gradient(loss):
        return torch.autograd.grad((weights * loss).sum(), moments, retain_graph=True)[0]

    x_t = q_sample(SCHEDULE, moments[0] + moments[1] * z, at, eps)

    def difference(x, parameters):
        return gaussian_eps(x, at, -0.3, 0.8) - gaussian_eps(x, at, *parameters)

    def ours(lam):
        auxiliary = gaussian_eps(x_t, at, *moments.detach())
        return gsim.student_loss(gaussian_eps(x_t, at, -0.3, 0.8), auxiliary, eps, lam, distance)

    through_score = gradient(distance(difference(x_t.detach(), moments))[0])
    assert_close(gradient(ours(0.0)), through_score, rtol=1e-5, atol=1e-9)
    assert_close(gradient(ours(1.0)), gradient(distance(difference(x_t, moments))[0]), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("lam", [1.0, 0.0, -0.4])
def test_squared_distance_is_sid(lam):
    """SiD's (1 - a) |f_p - f_phi|^2 + (f_p - f_phi)^T (f_phi - x0) at a = 1 - lambda / 2, in units of noise."""
    x0, eps, eps_p, eps_phi = (randn(7, 3, seed=s) for s in range(4))
    t = torch.tensor([20, 100, 300, 500, 755, 900, 950])
    x_t = q_sample(SCHEDULE, x0, t, eps)
    f_p, f_phi = x0_from_eps(SCHEDULE, x_t, t, eps_p), x0_from_eps(SCHEDULE, x_t, t, eps_phi)
    sid = (lam / 2) * (f_p - f_phi).square().sum(-1) + ((f_p - f_phi) * (f_phi - x0)).sum(-1)
    factor = 2 * (SCHEDULE.alpha[t] / SCHEDULE.sigma[t]) ** 2
    assert_close(gsim.student_loss(eps_p, eps_phi, eps, lam, gsim.squared), factor * sid)


@pytest.mark.parametrize("distance", gsim.DISTANCES.values())
def test_gradients(distance):
    eps_p, eps_phi, eps = (randn(4, 3, seed=s).requires_grad_() for s in range(3))
    gradcheck(lambda p, phi, e: gsim.student_loss(p, phi, e, 0.7, distance), (eps_p, eps_phi, eps))
    gradcheck(gsim.auxiliary_loss, (eps_phi, eps))
    gradcheck(distance, eps_p)
    d, d_prime = distance(eps_p)
    assert d.shape == (4,)
    assert_close(torch.autograd.grad(d.sum(), eps_p)[0], d_prime)


def test_pseudo_huber_limits():
    d, d_prime = gsim.pseudo_huber(torch.zeros(2, 3))
    assert not d.any()
    assert not d_prime.any()
    y = randn(100, 3)
    d, d_prime = gsim.pseudo_huber(y)
    assert_close(d, y.norm(dim=-1), rtol=1e-3, atol=1e-4)
    assert_close(d_prime.norm(dim=-1), torch.ones(100, dtype=torch.float64), rtol=1e-3, atol=0)
    assert_close(gsim.pseudo_huber(y, r=1e4)[0], y.square().sum(-1) / 2e4, rtol=1e-3, atol=1e-9)


def test_auxiliary_loss_is_least_for_the_true_score():
    x0, eps = 0.3 + 0.6 * randn(4000, 1), randn(4000, 1, seed=1)
    t = gsim.draw_timesteps((4000,), (0, 999), torch.Generator().manual_seed(2))
    x_t = q_sample(SCHEDULE, x0, t, eps)

    def loss(mean, std):
        return float(gsim.auxiliary_loss(gaussian_eps(x_t, t, mean, std), eps).mean())

    assert all(loss(0.3, 0.6) < loss(*other) for other in ((0.5, 0.6), (0.1, 0.6), (0.3, 0.8), (0.3, 0.4)))


def test_one_step_is_the_x0_estimate_of_pure_noise():
    z, at = randn(50, 2), torch.full((50,), T_INIT)
    alpha, sigma = SCHEDULE.alpha[T_INIT], SCHEDULE.sigma[T_INIT]
    calls = []

    def network(x):
        calls.append(x)
        return gaussian_eps(x, at, COND, STD)

    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    expected = COND + gain * (sigma * z - alpha * COND)  # E[x0 | x_t = sigma z]
    assert_close(gsim.one_step(network, z, SCHEDULE, T_INIT), expected)
    assert len(calls) == 1
    assert_close(calls[0], sigma * z)


@pytest.mark.parametrize("t_init", [20, 755, 950])
def test_one_step_of_a_point_mass_is_the_point(t_init):
    z = randn(50, 2).float()
    at = torch.full((50,), t_init)
    x0 = gsim.one_step(lambda x: gaussian_eps(x.double(), at, COND, 0.0).float(), z, SCHEDULE, t_init)
    assert_close(x0, COND.float().expand(50, 2), rtol=0, atol=2e-5)


def test_a_second_step_is_the_x0_estimate_of_the_token_noised_anew():
    z, x0, t = randn(50, 2), randn(50, 2), torch.tensor([20, 377, 755]).repeat(17)[:50]
    found = gsim.one_step(lambda x: gaussian_eps(x, t, COND, STD), z, SCHEDULE, t, x0)
    x_t = q_sample(SCHEDULE, x0, t, z)
    assert_close(found, x0_from_eps(SCHEDULE, x_t, t, gaussian_eps(x_t, t, COND, STD)))


def test_draw_timesteps_includes_both_ends():
    t = gsim.draw_timesteps((50, 100), (20, 23), torch.Generator().manual_seed(0))
    assert t.shape == (50, 100)
    values, counts = t.unique(return_counts=True)
    assert values.tolist() == [20, 21, 22, 23]
    assert_close(counts / 5000, torch.full((4,), 0.25), rtol=0, atol=0.03)
    assert gsim.draw_timesteps((3,), (999, 999), torch.Generator()).tolist() == [999] * 3
