import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from marval import diffusion as df

SCHEDULE = df.cosine_schedule()
EXTREMES = (0, 1, 755, 999)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ratio(t):
    return float(SCHEDULE.sigma[t] / SCHEDULE.alpha[t])


def test_schedule_at_the_extremes():
    assert len(SCHEDULE) == 1000
    assert float(SCHEDULE.alpha_bar[999]) == pytest.approx(2.4e-9, rel=0.05)
    assert [ratio(t) for t in (755, 950, 990)] == pytest.approx([2.5, 13, 71], rel=0.03)
    assert ratio(999) == pytest.approx(2e4, rel=0.05)
    assert bool((SCHEDULE.alpha_bar.diff() < 0).all())
    assert bool((SCHEDULE.betas <= 0.999).all())
    assert_close(SCHEDULE.alpha**2 + SCHEDULE.sigma**2, torch.ones(1000, dtype=torch.float64))
    assert SCHEDULE.posterior_log_variance[0] == SCHEDULE.posterior_log_variance[1]
    assert float(SCHEDULE.posterior_variance[0]) == 0


@pytest.mark.parametrize("num_steps", [1, 2, 10, 1000])
def test_respace(num_steps):
    schedule = df.respace(SCHEDULE, num_steps)
    assert len(schedule) == len(schedule.timesteps) == num_steps
    assert int(schedule.timesteps[0]) == 0
    assert int(schedule.timesteps[-1]) == (999 if num_steps > 1 else 0)
    assert_close(schedule.alpha_bar, SCHEDULE.alpha_bar[schedule.timesteps], rtol=1e-7, atol=0)
    assert bool(schedule.posterior_log_variance.isfinite().all())
    if num_steps == 1000:
        assert_close(schedule.betas, SCHEDULE.betas, rtol=1e-9, atol=0)


@pytest.mark.parametrize("num_steps", [-1, 0, 1001])
def test_respace_errors(num_steps):
    with pytest.raises(ValueError, match=rf"\[1, 1000\], got {num_steps}"):
        df.respace(SCHEDULE, num_steps)


@pytest.mark.parametrize("t", EXTREMES)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_round_trips(t, as_tensor):
    x0, eps = randn(5, 3), randn(5, 3, seed=1)
    at = torch.full((5,), t) if as_tensor else t
    x_t = df.q_sample(SCHEDULE, x0, at, eps)
    assert_close(x_t, SCHEDULE.alpha[t] * x0 + SCHEDULE.sigma[t] * eps)
    assert_close(df.x0_from_eps(SCHEDULE, x_t, at, eps), x0, rtol=1e-9, atol=1e-10)
    assert_close(df.eps_from_x0(SCHEDULE, x_t, at, x0), eps, rtol=1e-9, atol=1e-10)
    score = df.score_from_eps(SCHEDULE, eps, at)
    assert_close(score, -(x_t - SCHEDULE.alpha[t] * x0) / SCHEDULE.sigma[t] ** 2, rtol=1e-9, atol=1e-9)
    assert_close(df.eps_from_score(SCHEDULE, score, at), eps)


def test_mixed_timesteps_match_single_ones():
    x0, eps = randn(4, 3), randn(4, 3, seed=1)
    mixed = df.q_sample(SCHEDULE, x0, torch.tensor(EXTREMES), eps)
    assert_close(mixed, torch.stack([df.q_sample(SCHEDULE, x0[i], t, eps[i]) for i, t in enumerate(EXTREMES)]))


def test_guide():
    cond, null = randn(3), randn(3, seed=1)
    assert_close(df.guide(cond, null, 1.0), cond)
    assert torch.equal(df.guide(cond, null, 0.0), null)
    assert_close(df.guide(cond, null, 2.5), 2.5 * cond - 1.5 * null)


def test_learned_range_ends():
    t = torch.tensor(EXTREMES)
    ones = torch.ones(4, 2, dtype=torch.float64)
    assert_close(df.learned_range_log_variance(SCHEDULE, -ones, t)[:, 0], SCHEDULE.posterior_log_variance[t])
    assert_close(df.learned_range_log_variance(SCHEDULE, ones, t)[:, 0], SCHEDULE.betas[t].log())


@pytest.mark.parametrize("t", [1, 500, 999])
def test_posterior_is_bayes(t):
    """q(x_{t-1} | x_t, x0) is the product of q(x_t | x_{t-1}) and q(x_{t-1} | x0), two Gaussians in x_{t-1}."""
    x0, x_t = randn(4), randn(4, seed=1)
    beta, bar = SCHEDULE.betas[t], SCHEDULE.alpha_bar_prev[t]
    precision = (1 - beta) / beta + 1 / (1 - bar)
    mean = ((1 - beta).sqrt() / beta * x_t + bar.sqrt() / (1 - bar) * x0) / precision
    assert_close(df.posterior_mean(SCHEDULE, x0, x_t, t), mean, rtol=1e-9, atol=1e-12)
    assert_close(SCHEDULE.posterior_variance[t], 1 / precision, rtol=1e-9, atol=0)


MEAN, STD = torch.tensor([0.7, -1.2], dtype=torch.float64), torch.tensor([0.4, 1.5], dtype=torch.float64)


def gaussian_network(schedule, v):
    """The exact noise prediction for data N(MEAN, STD^2), with variance interpolation v."""

    def network(x, i):
        alpha, sigma = schedule.alpha[i], schedule.sigma[i]
        eps = sigma * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        return torch.cat([eps, torch.full_like(x, v)], dim=-1)

    return network


def test_ddim_maps_noise_to_the_data_distribution():
    """The probability flow of a Gaussian is z -> MEAN + STD z; fewer steps follow it less well."""
    z = randn(64, 2)
    errors = []
    for num_steps in (10, 100, 1000):
        schedule = df.respace(SCHEDULE, num_steps)
        x = df.denoise_chain(gaussian_network(schedule, 0.0), z, schedule, None)
        errors.append(float((x - MEAN - STD * z).abs().max()))
    assert errors[2] < 0.02
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("v", [-1.0, 0.0, 1.0])
def test_ancestral_chain_has_the_data_moments(v):
    count = 4000
    generator = torch.Generator().manual_seed(0)
    noises = (torch.randn(count, 2, generator=generator, dtype=torch.float64) for _ in range(1000))
    x = df.denoise_chain(gaussian_network(SCHEDULE, v), randn(count, 2, seed=3), SCHEDULE, noises)
    assert bool(((x.mean(0) - MEAN).abs() < 4.5 * STD / math.sqrt(count)).all())
    assert_close(x.std(0), STD, rtol=0.06, atol=0)


def test_temperature_scales_the_added_noise():
    eps, v, x, noise = (randn(5, 2, seed=s) for s in range(4))
    steps = [df.ancestral_step(SCHEDULE, eps, v, x, 400, noise, temperature) for temperature in (0.0, 0.5, 1.0)]
    assert_close(steps[0], df.posterior_mean(SCHEDULE, df.x0_from_eps(SCHEDULE, x, 400, eps), x, 400))
    assert_close(2 * (steps[1] - steps[0]), steps[2] - steps[0])
    std = (0.5 * df.learned_range_log_variance(SCHEDULE, v, 400)).exp()
    assert_close(steps[2] - steps[0], std * noise)
    assert torch.equal(*(df.ancestral_step(SCHEDULE, eps, v, x, 0, n, 1.0) for n in (noise, -noise)))


@pytest.mark.parametrize("solver", ["ancestral", "ddim"])
def test_clamp(solver):
    """A network that errs grossly: the result stays in range, and a range too wide to matter changes nothing."""
    schedule = df.respace(SCHEDULE, 10)

    def run(clamp):
        noises = None if solver == "ddim" else iter(randn(10, 64, 3, seed=1))
        return df.denoise_chain(
            lambda x, i: torch.cat([x.sin(), x.cos()], -1), randn(64, 3), schedule, noises, 1.0, clamp
        )

    assert float(run(None).abs().max()) > 10
    assert float(run((-1.0, 0.5)).min()) == -1
    assert float(run((-1.0, 0.5)).max()) == 0.5
    assert_close(run((-1e9, 1e9)), run(None), rtol=1e-6, atol=1e-6)


def test_clamped_ddim_step_stays_on_the_noise_line():
    """After clamping x0 the noise is re-derived, so that x_t = alpha x0 + sigma eps still holds."""
    x_t, eps = randn(50, 2), randn(50, 2, seed=1)
    x0 = df.x0_from_eps(SCHEDULE, x_t, 800, eps).clamp(-1, 1)
    expected = df.q_sample(SCHEDULE, x0, 799, df.eps_from_x0(SCHEDULE, x_t, 800, x0))
    assert_close(df.ddim_step(SCHEDULE, eps, x_t, 800, (-1, 1)), expected)


def loss_inputs(t, error=0.1):
    """x0 in (-1, 1), its x_t, the noise, and a head output that errs by about ``error``."""
    x0, eps = randn(len(t), 3).tanh() * 0.9, randn(len(t), 3, seed=1)
    head_out = torch.cat([eps + error * randn(len(t), 3, seed=2), randn(len(t), 3, seed=3)], -1)
    return head_out, x0, df.q_sample(SCHEDULE, x0, t, eps), eps


T = torch.tensor([0, 1, 20, 755, 999])


def test_bound_does_not_train_the_mean_nor_the_mse_the_variance():
    head_out, x0, x_t, eps = loss_inputs(T)
    head_out.requires_grad_()
    mse, vb = df.denoising_loss(SCHEDULE, head_out, x0, x_t, T, eps)
    for loss, trained, untouched in ((mse, slice(0, 3), slice(3, 6)), (vb, slice(3, 6), slice(0, 3))):
        (gradient,) = torch.autograd.grad(loss.sum(), head_out)
        assert bool((gradient[:, trained] != 0).all())
        assert not gradient[:, untouched].any()


def test_bound_is_the_kl_of_the_reverse_step_in_bits():
    t = torch.tensor([1, 20, 755, 999])
    head_out, x0, x_t, eps = loss_inputs(t)
    eps_hat, v = head_out.chunk(2, -1)
    _, vb = df.denoising_loss(SCHEDULE, head_out, x0, x_t, t, eps)
    mean = df.posterior_mean(SCHEDULE, df.x0_from_eps(SCHEDULE, x_t, t, eps_hat), x_t, t)
    model = Normal(mean, (0.5 * df.learned_range_log_variance(SCHEDULE, v, t)).exp())
    truth = Normal(df.posterior_mean(SCHEDULE, x0, x_t, t), SCHEDULE.posterior_variance[t].sqrt()[:, None])
    assert_close(vb, kl_divergence(truth, model).mean(-1) / math.log(2), rtol=1e-8, atol=1e-10)
    exact = torch.cat([eps, -torch.ones_like(eps)], -1)
    assert_close(df.denoising_loss(SCHEDULE, exact, x0, x_t, t, eps)[1], torch.zeros(4, dtype=torch.float64))


def test_bound_at_step_zero_is_the_discretised_likelihood():
    x0 = torch.tensor([[-1.0, 0.3, 1.0]], dtype=torch.float64)
    eps, t = torch.tensor([[0.4, -0.8, -0.5]], dtype=torch.float64), torch.tensor([0])
    x_t = df.q_sample(SCHEDULE, x0, t, eps)
    head_out = torch.cat([eps + 0.5, torch.zeros_like(eps)], -1)
    _, vb = df.denoising_loss(SCHEDULE, head_out, x0, x_t, t, eps)
    std = (0.5 * df.learned_range_log_variance(SCHEDULE, torch.zeros_like(eps), t)).exp()
    model = Normal(df.x0_from_eps(SCHEDULE, x_t, t, eps + 0.5), std)
    above, below = model.cdf(x0 + 1 / 255), model.cdf(x0 - 1 / 255)
    mass = torch.stack([above[0, 0], (above - below)[0, 1], 1 - below[0, 2]])
    assert_close(vb, -mass.log().mean()[None] / math.log(2), rtol=2e-3, atol=0)


def test_gradients():
    head_out, x0, x_t, eps = loss_inputs(T)
    for x in (head_out, x0, x_t, eps):
        x.requires_grad_()
    gradcheck(lambda h: df.denoising_loss(SCHEDULE, h, x0, x_t, T, eps)[0], head_out)
    v = head_out.detach()[:, 3:].requires_grad_()
    gradcheck(lambda v: df.denoising_loss(SCHEDULE, torch.cat([eps + 0.1, v], -1).clone(), x0, x_t, T, eps)[1], v)
    gradcheck(lambda x, e: df.q_sample(SCHEDULE, x, T, e), (x0, eps))
    gradcheck(lambda x, e: df.x0_from_eps(SCHEDULE, x, T[:4], e), (x_t[:4], eps[:4]))
    gradcheck(lambda x, y: df.eps_from_x0(SCHEDULE, x, T, y), (x_t, x0))
    gradcheck(lambda e, v, x: df.ancestral_step(SCHEDULE, e, v, x, 500, torch.ones_like(x)), (eps, v, x_t))
    gradcheck(lambda e, x: df.ddim_step(SCHEDULE, e, x, 500), (eps, x_t))


def test_a_schedule_first_read_without_gradients_trains():
    """It keeps what inference mode made, which must not be what a gradient saves."""
    schedule, x0 = df.cosine_schedule(), torch.randn(3, 4, requires_grad=True)
    t, eps = torch.tensor([0, 500, 999]), torch.randn(3, 4)
    with torch.inference_mode():
        first = df.q_sample(schedule, x0, t, eps)
    again = df.q_sample(schedule, x0, t, eps)
    again.sum().backward()
    assert torch.equal(first, again)
    assert_close(x0.grad, schedule.alpha[t].float()[:, None].expand(3, 4))
