import pytest
import torch
from torch.autograd import gradcheck
from torch.distributions import Independent, Normal, kl_divergence
from torch.testing import assert_close

from marval import policy


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(mean, std):
    return Independent(Normal(mean, torch.full_like(mean, std)), 1)


@pytest.mark.parametrize("std", [0.05, 1.0, 3.0])
def test_log_prob_and_kl(std):
    x, mean, other = (randn(5, 7, 4, seed=s) for s in range(3))
    assert_close(policy.gaussian_log_prob(x, mean, std), gaussian(mean, std).log_prob(x))
    assert_close(policy.gaussian_kl(mean, other, std), kl_divergence(gaussian(mean, std), gaussian(other, std)))
    assert not policy.gaussian_kl(mean, mean, std).any()


def test_gradients():
    x, mean, other = (randn(3, 2, 4, seed=s).requires_grad_() for s in range(3))
    gradcheck(lambda a, b: policy.gaussian_log_prob(a, b, 0.3), (x, mean))
    gradcheck(lambda a, b: policy.gaussian_kl(a, b, 0.3), (mean, other))


def test_group_advantages():
    rounding = 20 + 1e-6 * randn(8, seed=2)
    rewards = torch.cat([3 + 5 * randn(8), 0.01 * randn(8, seed=1) - 100, torch.full((8,), 2.0), rounding]).double()
    assert policy.dead_groups(rewards, 8).tolist() == [False, False, True, True]
    advantages = policy.group_advantages(rewards, 8).view(4, 8)
    assert_close(advantages.mean(1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-9)
    assert_close(advantages.std(1)[:2], torch.ones(2, dtype=torch.float64), rtol=1e-6, atol=0)
    assert not advantages[2:].any()
    assert torch.equal(advantages[0].argsort(), rewards[:8].argsort())
    small = torch.cat([1e-7 * randn(8).abs(), torch.full((8,), 3e-7), torch.zeros(8)])  # of a reward with small units
    assert policy.dead_groups(small, 8).tolist() == [False, True, True]
    assert_close(policy.group_advantages(small, 8).view(3, 8)[0].std().item(), 1.0)


@pytest.mark.parametrize(("count", "size"), [(8, 3), (8, 1), (4, 8)])
def test_group_advantages_errors(count, size):
    with pytest.raises(ValueError, match=f"a batch of {count} images does not divide into groups of {size}"):
        policy.group_advantages(torch.zeros(count), size)


def test_hinge():
    rewards = torch.tensor([-1.0, 0.5, 2.0, 9.0], requires_grad=True)
    loss = policy.reward_loss(rewards, ceiling=1.0)
    assert loss.tolist() == [1.0, -0.5, -1.0, -1.0]
    assert torch.autograd.grad(loss.sum(), rewards)[0].tolist() == [-1, -1, 0, 0]
    assert torch.equal(policy.reward_loss(rewards), -rewards)
    assert torch.autograd.grad(policy.reward_loss(rewards).sum(), rewards)[0].tolist() == [-1] * 4


@pytest.mark.parametrize(
    ("ratio", "advantage", "trained"),
    [
        (1.3, 1.0, False),  # already much likelier, and good: enough
        (0.7, 1.0, True),  # good but less likely than before: pull back
        (0.7, -1.0, False),  # already much less likely, and bad: enough
        (1.3, -1.0, True),  # bad but likelier than before: push away
        (1.1, 1.0, True),
        (0.9, -1.0, True),
    ],
)
def test_clipping(ratio, advantage, trained):
    log_prob = torch.tensor([[ratio]]).log().requires_grad_()
    loss = policy.clipped_policy_loss(log_prob, torch.zeros(1, 1), torch.tensor([advantage]), clip=0.2)
    bounded = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
    assert loss.item() == pytest.approx(-bounded)
    (gradient,) = torch.autograd.grad(loss.sum(), log_prob)
    assert float(gradient) == pytest.approx(-ratio * advantage if trained else 0.0)


def test_reinforce_at_ratio_one():
    """Before any update the surrogate's gradient is -A grad log p, token by token."""
    x, mean = randn(6, 5, 3), randn(6, 5, 3, seed=1).requires_grad_()
    advantages = randn(6, seed=2)
    log_prob = policy.gaussian_log_prob(x, mean, 0.2)
    loss = policy.clipped_policy_loss(log_prob, log_prob.detach(), advantages, clip=0.2)
    assert loss.shape == (6, 5)
    reinforce = -(advantages[:, None] * log_prob)
    assert_close(*(torch.autograd.grad(f.sum(), mean, retain_graph=True)[0] for f in (loss, reinforce)))


def test_group_policy_gradient_improves_a_black_box_reward():
    """Two tokens of a one-step policy mean = W z + b; the reward is a count, without any gradient."""
    generator = torch.Generator().manual_seed(0)
    weight = (0.3 * torch.eye(2)).requires_grad_()
    bias = torch.zeros(2, requires_grad=True)
    optimiser = torch.optim.Adam([weight, bias], 0.03)
    averages = []
    for _ in range(150):
        z = torch.randn(64, 2, 2, generator=generator)
        with torch.no_grad():
            mean = z @ weight + bias
            x = mean + 0.3 * torch.randn(mean.shape, generator=generator)
            old = policy.gaussian_log_prob(x, mean, 0.3)
        rewards = (x > 0.8).float().mean((1, 2))
        advantages = policy.group_advantages(rewards, 16)
        averages.append(float(rewards.mean()))
        for _ in range(2):
            log_prob = policy.gaussian_log_prob(x, z @ weight + bias, 0.3)
            optimiser.zero_grad()
            policy.clipped_policy_loss(log_prob, old, advantages, 0.2).mean().backward()
            optimiser.step()
    assert averages[0] < 0.1
    assert sum(averages[-5:]) / 5 > 0.9


def test_gradient_steps():
    def chosen(*args, seed=0):
        return policy.gradient_steps(*args, torch.Generator().manual_seed(seed))

    assert chosen(8, 0, "last") == chosen(8, 0, "random") == frozenset(range(8))
    assert chosen(8, 3, "last") == {5, 6, 7}
    assert chosen(8, 3, "random") == chosen(8, 3, "random")
    several = {chosen(8, 3, "random", seed=seed) for seed in range(10)}
    assert len(several) > 5
    assert all(len(steps) == 3 and steps <= set(range(8)) for steps in several)
    assert frozenset.union(*several) == frozenset(range(8))
