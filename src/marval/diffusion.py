"""The inner diffusion process of MAR: noise schedule, conversions, reverse steps and denoising loss.

Conventions, everywhere in marval:

* ``x_t = alpha_t x0 + sigma_t eps`` with ``alpha_t = sqrt(alpha_bar_t)``, ``sigma_t = sqrt(1 - alpha_bar_t)``,
  and integer timesteps ``t`` in [0, 999]; t = 999 is almost pure noise (alpha_bar 2.4e-9).
* Tensors are ``(..., D)`` tokens; ``t`` is an integer tensor of the leading shape, or one Python int for all.
* The network predicts the noise; the score is ``-eps / sigma_t``.
* Guidance scale w: ``eps = eps_null + w (eps_cond - eps_null)``, so w = 1 is no guidance.

Pure functions on tensors (Ho et al. 2020; Nichol & Dhariwal 2021; Song et al. 2021; MAR, arXiv 2406.11838).
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


class Schedule:
    """Tables of a discrete diffusion process, float64, one entry per step.

    Attributes (each of shape (T,)): ``betas``, ``alpha_bar``, ``alpha_bar_prev``, ``alpha``, ``sigma``,
    ``posterior_variance``, ``posterior_log_variance`` (clipped: the entry of step 0, which is log 0, is replaced by
    that of step 1), ``log_betas``, ``posterior_x0``, ``posterior_xt`` (coefficients of the posterior mean) and the
    integer ``timesteps`` that the network is told at each step (0..T-1 unless respaced).
    """

    def __init__(self, betas: Tensor, timesteps: Tensor | None = None):
        self.betas = betas.double()
        self.timesteps = torch.arange(len(betas)) if timesteps is None else timesteps
        self.alpha_bar = torch.cumprod(1 - self.betas, dim=0)
        self.alpha_bar_prev = torch.cat([self.alpha_bar.new_ones(1), self.alpha_bar[:-1]])
        self.alpha = self.alpha_bar.sqrt()
        self.sigma = (1 - self.alpha_bar).sqrt()
        self.log_betas = self.betas.log()
        self.posterior_variance = self.betas * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)
        first_positive = self.posterior_variance[1:2] if len(betas) > 1 else self.betas[:1]
        self.posterior_log_variance = torch.cat([first_positive, self.posterior_variance[1:]]).log()
        self.posterior_x0 = self.betas * self.alpha_bar_prev.sqrt() / (1 - self.alpha_bar)
        self.posterior_xt = (1 - self.alpha_bar_prev) * (1 - self.betas).sqrt() / (1 - self.alpha_bar)

        self._copies: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def __len__(self) -> int:
        return len(self.betas)

    def at(self, name: str, t: Tensor | int, x: Tensor) -> Any:
        """Entries of the table at ``t``, as x (..., D) is: a float, or a tensor that broadcasts against x.

        A device gets a table once: each copy would wait for all that a GPU has to do.
        """
        if isinstance(t, int):
            return float(getattr(self, name)[t])
        key = name, x.device, x.dtype
        if key not in self._copies:
            self._copies[key] = getattr(self, name).to(x.device, x.dtype)
        return self._copies[key][t].unsqueeze(-1)


def cosine_schedule(num_steps: int = 1000, max_beta: float = 0.999) -> Schedule:
    """Cosine schedule: alpha_bar(s) = cos^2(pi/2 (s + 0.008) / 1.008) (Nichol & Dhariwal 2021, eq. 17)."""
    alpha_bar = [math.cos((i / num_steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(num_steps + 1)]
    betas = [min(1 - after / before, max_beta) for before, after in itertools.pairwise(alpha_bar)]
    return Schedule(torch.tensor(betas, dtype=torch.float64))


@functools.lru_cache(maxsize=64)  # schedules are never changed
def respace(schedule: Schedule, num_steps: int) -> Schedule:
    """The same process observed at ``num_steps`` evenly spaced timesteps, first and last included.

    With one step the single timestep is 0, as in MAR; a one-step *student* has its own path (`marval.gsim`).

    Raises:
        ValueError: ``num_steps`` is not in [1, len(schedule)].
    """
    if not 1 <= num_steps <= len(schedule):
        raise ValueError(f"the number of denoising steps must be in [1, {len(schedule)}], got {num_steps}")
    stride = (len(schedule) - 1) / (num_steps - 1) if num_steps > 1 else 1.0
    timesteps = torch.tensor([round(i * stride) for i in range(num_steps)])
    alpha_bar = schedule.alpha_bar[timesteps]
    return Schedule(1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]]), timesteps)


def q_sample(schedule: Schedule, x0: Tensor, t: Tensor | int, eps: Tensor) -> Tensor:
    """x_t = alpha_t x0 + sigma_t eps."""
    return schedule.at("alpha", t, x0) * x0 + schedule.at("sigma", t, x0) * eps


def x0_from_eps(schedule: Schedule, x_t: Tensor, t: Tensor | int, eps: Tensor) -> Tensor:
    """x0 = (x_t - sigma_t eps) / alpha_t. Multiplies an error of eps by sigma/alpha: 2e4 at t = 999."""
    return (x_t - schedule.at("sigma", t, x_t) * eps) / schedule.at("alpha", t, x_t)


def eps_from_x0(schedule: Schedule, x_t: Tensor, t: Tensor | int, x0: Tensor) -> Tensor:
    """eps = (x_t - alpha_t x0) / sigma_t."""
    return (x_t - schedule.at("alpha", t, x_t) * x0) / schedule.at("sigma", t, x_t)


def score_from_eps(schedule: Schedule, eps: Tensor, t: Tensor | int) -> Tensor:
    """grad log p(x_t) = -eps / sigma_t."""
    return -eps / schedule.at("sigma", t, eps)


def eps_from_score(schedule: Schedule, score: Tensor, t: Tensor | int) -> Tensor:
    """eps = -sigma_t grad log p(x_t)."""
    return -score * schedule.at("sigma", t, score)


def guide(eps_cond: Tensor, eps_null: Tensor, w: Tensor | float) -> Tensor:
    """Classifier-free guidance, eps_null + w (eps_cond - eps_null); w = 1 is no guidance (Ho & Salimans 2022)."""
    return eps_null + w * (eps_cond - eps_null)


def posterior_mean(schedule: Schedule, x0: Tensor, x_t: Tensor, t: Tensor | int) -> Tensor:
    """Mean of q(x_{t-1} | x_t, x0) (Ho et al. 2020, eq. 7)."""
    return schedule.at("posterior_x0", t, x_t) * x0 + schedule.at("posterior_xt", t, x_t) * x_t


def learned_range_log_variance(schedule: Schedule, v: Tensor, t: Tensor | int) -> Tensor:
    """Log variance between the posterior's (v = -1) and beta_t (v = 1) (Nichol & Dhariwal 2021, eq. 15)."""
    upper, lower = schedule.at("log_betas", t, v), schedule.at("posterior_log_variance", t, v)
    return (upper - lower) / 2 * v + (upper + lower) / 2


def ancestral_step(
    schedule: Schedule, eps: Tensor, v: Tensor, x_t: Tensor, t: int, noise: Tensor, temperature: float = 1.0,
    clamp: tuple[float, float] | None = None,
) -> Tensor:  # fmt: skip
    """One draw of p(x_{t-1} | x_t); the last step (t = 0) returns the mean. ``temperature`` scales the noise.

    ``clamp`` bounds the x0 estimate: give it wherever the token range is known (pixels).
    """
    x0 = x0_from_eps(schedule, x_t, t, eps)
    if clamp is not None:
        x0 = x0.clamp(*clamp)
    mean = posterior_mean(schedule, x0, x_t, t)
    if t == 0:
        return mean
    std = torch.exp(0.5 * learned_range_log_variance(schedule, v, t))
    return torch.addcmul(mean, std, noise, value=temperature)


def ddim_step(schedule: Schedule, eps: Tensor, x_t: Tensor, t: int, clamp: tuple[float, float] | None = None) -> Tensor:
    """One deterministic DDIM step, eta = 0 (Song et al. 2021, eq. 12)."""
    x0 = x0_from_eps(schedule, x_t, t, eps)
    if clamp is not None:
        x0 = x0.clamp(*clamp)
        eps = eps_from_x0(schedule, x_t, t, x0)
    alpha_bar_prev = float(schedule.alpha_bar_prev[t])
    return math.sqrt(alpha_bar_prev) * x0 + math.sqrt(1 - alpha_bar_prev) * eps


def denoise_chain(
    network: Callable[[Tensor, int], Tensor], x_init: Tensor, schedule: Schedule, noises: Iterator[Tensor] | None,
    temperature: float = 1.0, clamp: tuple[float, float] | None = None,
) -> Tensor:  # fmt: skip
    """The inner chain: from pure noise to a token through every step of ``schedule``, from the last to the first.

    Args:
        network: ``(x_t (..., D), step index) -> (..., 2 D)``: noise prediction ++ variance interpolation.
            Guidance is a closure's business.
        x_init: standard normal noise (..., D).
        noises: one tensor like ``x_init`` per step, in the order of execution, for ancestral sampling; None for DDIM.
        temperature: scale of the noise that each ancestral step adds.
        clamp: (low, high) of the tokens where known.
    """
    x = x_init
    for t in reversed(range(len(schedule))):
        eps, v = network(x, t).chunk(2, dim=-1)
        if noises is None:
            x = ddim_step(schedule, eps, x, t, clamp)
        else:
            x = ancestral_step(schedule, eps, v, x, t, next(noises), temperature, clamp)
    return x


def _normal_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """KL(N(mean1, var1) || N(mean2, var2)), element by element, in nats."""
    return 0.5 * (
        -1 + log_var2 - log_var1 + torch.exp(log_var1 - log_var2) + (mean1 - mean2) ** 2 * torch.exp(-log_var2)
    )


def _discretised_gaussian_nll(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """-log of a Gaussian's mass in a bin of width 2/255 around x (Ho et al. 2020, eq. 13), tanh approximation."""

    def cdf(value: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    above = cdf((x - mean + 1 / 255) * torch.exp(-log_scale))
    below = cdf((x - mean - 1 / 255) * torch.exp(-log_scale))
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return -mass.clamp(min=1e-12).log()


def denoising_loss(
    schedule: Schedule, head_out: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor]:
    """MAR's training loss of each token, in two terms: MSE of the noise, and a variational bound. Minimise the sum.

    The bound (in bits per dimension; the decoder's negative log-likelihood at t = 0) trains the variance only: the
    mean it sees is detached (Nichol & Dhariwal 2021, L_hybrid).

    Args:
        head_out: (..., 2 D) network output at (x_t, t).
        x0, x_t, eps: (..., D); ``x_t = q_sample(schedule, x0, t, eps)``.
        t: (...) integer timesteps.

    Returns:
        (mse, vb), each of shape (...), averaged over D, unreduced otherwise.
    """
    eps_hat, v = head_out.chunk(2, dim=-1)
    mse = (eps - eps_hat).square().mean(-1)
    log_variance = learned_range_log_variance(schedule, v, t)
    mean = posterior_mean(schedule, x0_from_eps(schedule, x_t, t, eps_hat.detach()), x_t, t)
    true_log_variance = schedule.at("posterior_log_variance", t, x_t)
    kl = _normal_kl(posterior_mean(schedule, x0, x_t, t), true_log_variance, mean, log_variance)
    nll = _discretised_gaussian_nll(x0, mean, 0.5 * log_variance)
    vb = torch.where(t == 0, nll.mean(-1), kl.mean(-1)) / math.log(2)
    return mse, vb
