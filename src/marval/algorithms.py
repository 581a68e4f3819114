"""The two algorithms of RL: the gradient of a differentiable reward through the rollout, and a group-relative policy
gradient for any black box. Mathematics: marval.policy. An action is a whole image after all K AR steps."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from marval import masking, policy
from marval.config import RLConfig
from marval.matching import draw_guidance
from marval.models.mar import MAR, gather_tokens
from marval.monitor import image_statistics
from marval.pipeline import Pipeline
from marval.sampling import last, student_tokens, unmask
from marval.scoring import Reward, score
from marval.update import Update, autocast


@dataclass
class Batch:
    """The random numbers from which a batch of B images of L tokens with D channels is rolled out."""

    labels: Tensor
    """(B,) classes."""
    prompts: list[str]
    """One per image."""
    orders: Tensor
    """(B, L) positions in the order of being revealed."""
    z: Tensor
    """(B, L, D) the student's noise, times the temperature."""
    w: Tensor
    """(B, 1) guidance scales, read by a student that takes them."""
    exploration: Tensor
    """(B, L, D) the policy's noise."""
    grad_steps: frozenset[int]
    """The AR steps whose tokens carry gradients."""
    first: int = 0
    """Number of the first image in the batch of an update, for messages."""

    def __getitem__(self, rows: slice) -> "Batch":
        names = ("labels", "prompts", "orders", "z", "w", "exploration")
        some = {name: getattr(self, name)[rows] for name in names}
        return dataclasses.replace(self, **some, first=self.first + rows.start)


def images_per_group(config: RLConfig) -> int:
    """How many consecutive images of a batch share class, order, guidance scale and the student's noise; 1 is none."""
    return config.group_size if config.algorithm == "group" else 1


def draw_batch(
    config: RLConfig, model: Pipeline, prompts: list[str], g: torch.Generator, host: torch.Generator
) -> tuple[Batch, int]:
    """The random numbers of an update's whole batch, and how many tokens are masked in the states of its anchor.

    Args:
        model: the student. prompts: one per class. g: of the numbers on its device. host: of those on the CPU.
    """
    assert model.student is not None
    sizes, group = model.network.config, images_per_group(config)
    count, length, device = config.batch // group, sizes.num_tokens, g.device
    labels = torch.randint(sizes.num_classes, (count,), generator=g, device=device)
    orders = torch.rand(count, length, generator=g, device=device).argsort(dim=1)
    w = draw_guidance(model.student, count, g)
    z, exploration = torch.randn(2, config.batch, length, sizes.token_dim, generator=g, device=device)
    z = z[::group] * model.sampling.temperature
    labels, orders, w, z = (x.repeat_interleave(group, dim=0) for x in (labels, orders, w, z))
    num_masked = masking.inference_masked_count(length, config.ar_steps, float(torch.rand((), generator=host)))
    grad_steps = policy.gradient_steps(config.ar_steps, config.grad_ar_steps, config.grad_ar_choice, host)
    return Batch(labels, [prompts[i] for i in labels.tolist()], orders, z, w, exploration, grad_steps), num_masked


@dataclass
class Rollout:
    """Images that the policy drew from a batch, and how they were scored; all without gradients."""

    batch: Batch
    images: Tensor
    """(B, C, H, W) in [0, 1]."""
    tokens: Tensor
    """(B, L, D) of the images."""
    rewards: Tensor
    """(B,)"""
    actions: Tensor
    """(B, L, D) tokens before clamping (algorithm group)."""
    log_prob: Tensor | None = None
    """(B, L) of the actions when they were drawn (algorithm group)."""

    def watched(self, hinge: float | None) -> dict[str, Tensor]:
        """What to watch: the mean reward, statistics of the images, and the share of rewards that are above a hinge."""
        values = {"reward": self.rewards.mean()} | image_statistics(self.images)
        return values if hinge is None else values | {"above_hinge": (self.rewards >= hinge).float().mean()}


class Algorithm:
    """What both algorithms share: a policy that draws each token from N(g(z, c), std^2 I), g being the student.

    Args:
        model: the student that is trained. reference: the starting student, to which the KL is taken.
    """

    def __init__(self, model: Pipeline, reward: Reward, config: RLConfig, reference: MAR):
        self.model, self.reward, self.config, self.reference = model, reward, config, reference
        self.counts = masking.masked_counts(model.network.config.num_tokens, config.ar_steps)

    def bound(self, tokens: Tensor) -> Tensor:
        """Tokens as backbone and decoder see them: clamped, where the tokenizer knows their range."""
        limits = self.model.tokenizer.token_range
        return tokens if limits is None else tokens.clamp(*limits)

    def condition(self, network: MAR, batch: Batch, actions: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Positions drawn in AR step k, (B, n), and their conditions (B, n, W), given the actions before it."""
        length, masked, masked_after = batch.orders.shape[1], *self.counts[k : k + 2]
        visible = batch.orders[:, : length - masked].sort(dim=1).values
        target = batch.orders[:, length - masked : length - masked_after]
        return target, gather_tokens(network.condition(self.bound(actions), visible, batch.labels), target)

    def mean(self, network: MAR, batch: Batch, target: Tensor, condition: Tensor) -> Tensor:
        """Means (B, n, D) of the policy at the positions ``target`` (B, n) with their conditions (B, n, W)."""
        assert self.model.student is not None
        z, t_init = gather_tokens(batch.z, target), self.model.student.t_init
        return student_tokens(network.head, self.model.schedule, t_init, condition, z, batch.w)

    def kl(self, rollout: Rollout, k: int, target: Tensor, condition: Tensor, mean: Tensor) -> Tensor:
        """KL of the policy in AR step k from that of the starting student, summed over tokens and images."""
        with torch.no_grad():
            if self.config.trained != "head":  # else the starting student's conditions are the same
                _, condition = self.condition(self.reference, rollout.batch, rollout.actions, k)
            reference = self.mean(self.reference, rollout.batch, target, condition)
        return policy.gaussian_kl(mean, reference, self.config.std).sum()

    def step_loss(self, rollout: Rollout, k: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The share that AR step k has in the mean loss per token, and what to watch."""
        raise NotImplementedError

    def steps(self, rollout: Rollout, update: Update, weight: float, last: bool) -> dict[str, Tensor]:
        """Add up the gradient of `step_loss`, one AR step at a time: memory does not grow with K.

        Returns:
            What to watch, per token of the steps that carry gradients. The loss is per token of the image: as the
            reward's gradient, that of n steps is not scaled up to that of all.
        """
        watched: dict[str, Tensor] = {}
        chosen = sorted(rollout.batch.grad_steps)
        for k in chosen:
            _, values = update.backward(self.step_loss, rollout, k, weight=weight, last=last and k == chosen[-1])
            for name, value in values.items():
                watched[name] = watched.get(name, torch.zeros_like(value)) + value
        share = sum(self.counts[k] - self.counts[k + 1] for k in chosen) / self.counts[0]
        return {name: value / share for name, value in watched.items()}


class RewardGradient(Algorithm):
    """Algorithm "gradient": minimise -min(R, hinge), backpropagated through AR steps of the rollout."""

    def loss(self, batch: Batch) -> tuple[Tensor, Rollout]:
        """Roll out whole images; returns minus their mean reward, with its graph, and the rollout."""
        plain = dataclasses.replace(self.model.sampling, temperature=1.0)  # it is in z
        steps = unmask(
            self.model.network, self.model.token_sampler(plain), batch.labels, batch.orders, self.counts, batch.z,
            guidance=batch.w, grad_ar_steps=batch.grad_steps, checkpoint_ar_steps=self.config.checkpoint_ar_steps,
        )  # fmt: skip
        tokens = last(steps)
        with torch.autocast(batch.z.device.type, enabled=False):
            images = self.model.tokenizer.decode(tokens.float())
            rewards = score(self.reward, images, batch.prompts, batch.first)
        rollout = Rollout(batch, images.detach(), tokens.detach(), rewards.detach(), tokens.detach())
        return policy.reward_loss(rewards, self.config.hinge).mean(), rollout

    def rollout(self, batch: Batch, update: Update, weight: float, last: bool) -> Rollout:
        """Roll out a part and backpropagate at once, so that the graph of one part at a time is in memory."""
        return update.backward(self.loss, batch, weight=weight, last=last and self.config.kl == 0)[1]

    def step_loss(self, rollout: Rollout, k: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted KL to the starting student in AR step k; the tokens that the policy sees are constant."""
        target, condition = self.condition(self.model.network, rollout.batch, rollout.actions, k)
        mean = self.mean(self.model.network, rollout.batch, target, condition)
        kl = self.kl(rollout, k, target, condition, mean) / rollout.tokens[..., 0].numel()
        return self.config.kl * kl, {"kl": kl.detach()}

    def backward(self, rollout: Rollout, update: Update, weight: float, last: bool) -> dict[str, Tensor]:
        """Add up the gradient of the KL; that of the reward was added up in `rollout`."""
        return self.steps(rollout, update, weight, last) if self.config.kl > 0 else {}


class GroupGradient(Algorithm):
    """Algorithm "group": clipped policy gradient with advantages normalised within groups of one class, order and z."""

    def rollout(self, batch: Batch, update: Update, weight: float, last: bool) -> Rollout:
        """Roll out a part by `explore`; the gradients come later, from `backward`."""
        return self.explore(batch)

    @torch.no_grad()
    def explore(self, batch: Batch) -> Rollout:
        """Draw actions around the student's tokens, and score the images that they make."""
        actions, log_prob = torch.zeros_like(batch.z), batch.z.new_zeros(batch.z.shape[:2])
        for k in range(self.config.ar_steps):
            with autocast(self.config.precision, batch.z.device):
                target, condition = self.condition(self.model.network, batch, actions, k)
                mean = self.mean(self.model.network, batch, target, condition)
            action = mean + self.config.std * gather_tokens(batch.exploration, target)
            actions.scatter_(1, target[..., None].expand_as(action), action)
            log_prob.scatter_(1, target, policy.gaussian_log_prob(action, mean, self.config.std))
        tokens = self.bound(actions)
        images = self.model.tokenizer.decode(tokens)
        return Rollout(batch, images, tokens, score(self.reward, images, batch.prompts, batch.first), actions, log_prob)

    def step_loss(self, rollout: Rollout, k: int) -> tuple[Tensor, dict[str, Tensor]]:
        """PPO's clipped loss in AR step k, and the weighted KL."""
        assert rollout.log_prob is not None
        target, condition = self.condition(self.model.network, rollout.batch, rollout.actions, k)
        mean = self.mean(self.model.network, rollout.batch, target, condition)
        log_prob = policy.gaussian_log_prob(gather_tokens(rollout.actions, target), mean, self.config.std)
        advantages = policy.group_advantages(policy.hinge(rollout.rewards, self.config.hinge), self.config.group_size)
        old = rollout.log_prob.gather(1, target)
        count = rollout.log_prob.numel()
        loss = policy.clipped_policy_loss(log_prob, old, advantages, self.config.clip).sum() / count
        if self.config.kl == 0:
            return loss, {}
        kl = self.kl(rollout, k, target, condition, mean) / count
        return loss + self.config.kl * kl, {"kl": kl.detach()}

    def backward(self, rollout: Rollout, update: Update, weight: float, last: bool) -> dict[str, Tensor]:
        """Add up the gradient, one AR step at a time; ``dead_groups`` is the share of groups that teach nothing."""
        rewards = policy.hinge(rollout.rewards, self.config.hinge)
        dead = policy.dead_groups(rewards, self.config.group_size).float().mean()
        return self.steps(rollout, update, weight, last) | {"dead_groups": dead}
