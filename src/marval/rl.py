"""MARVAL-RL: post-train the one-step student on rewards, anchored to its teacher (MARVAL, arXiv 2511.15190).

The student is the policy and an action is a whole image after all K AR steps. Two algorithms: the gradient of a
differentiable reward through the rollout, and a group-relative policy gradient for any black box (marval.policy).
"""

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marval import masking, policy, rng
from marval.config import RLConfig
from marval.distributed import World, connect
from marval.ema import EMA
from marval.matching import ScoreMatching, copy_network, draw_noise, load_scores, own_part, with_part
from marval.models.classifier import Classifier
from marval.models.mar import MAR
from marval.pipeline import Pipeline
from marval.rewards import Reward, check_reward, class_prompts, load_reward, score
from marval.run import Run, Update, autocast
from marval.sampling import gather_tokens, last, student_tokens, unmask
from marval.tokenizers import to_float
from marval.train import save_sample_grid

HELD_OUT_SEED = 1_000_003
"""Added to the run's seed for held-out evaluations, whose images are neither trained on nor reported."""


def image_statistics(images: Tensor) -> dict[str, Tensor]:
    """Where reward hacking shows first: float NCHW in [0, 1] -> scalars.

    ``brightness`` (mean), ``contrast`` (standard deviation within an image), ``edge_density`` (mean absolute difference
    of neighbours), ``entropy`` (bits, of a 16-bin histogram of all values), ``saturated`` (share of values at 0 or 1).
    """
    share = torch.histc(images, bins=16, min=0, max=1) / images.numel()
    return {
        "brightness": images.mean(),
        "contrast": images.flatten(1).std(1).mean(),
        "edge_density": (images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()) / 2,
        "entropy": -(share * share.clamp(min=1e-12).log2()).sum(),
        "saturated": ((images < 0.002) | (images > 0.998)).float().mean(),
    }


@dataclass
class Batch:
    """What a batch of rollouts starts from."""

    labels: Tensor
    """(B,) classes."""
    prompts: list[str]
    """One per image."""
    orders: Tensor
    """(B, L) in the order of being revealed."""
    z: Tensor
    """(B, L, D) the student's noise."""
    w: Tensor
    """(B, 1) guidance scales, read by a student that takes them."""
    exploration: Tensor
    """(B, L, D) the policy's noise."""


class RewardGradient:
    """Algorithm "gradient": minimise -min(R, hinge), backpropagated through the last AR steps of the rollout."""

    def __init__(self, model: Pipeline, reward: Reward, config: RLConfig):
        self.model, self.reward, self.config = model, reward, config
        self.counts = masking.masked_counts(model.network.config.num_tokens, config.ar_steps)

    def rollout(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) and their tokens, both detached; keeps the graph of the rewards."""
        with autocast(self.config, batch.z.device):
            tokens = last(
                unmask(
                    self.model.network, self.model.draw(self.model.sampling), batch.labels, batch.orders, self.counts,
                    batch.z, guidance=batch.w, grad_ar_steps=self.config.grad_ar_steps,
                    checkpoint_ar_steps=self.config.checkpoint_ar_steps,
                )
            )  # fmt: skip
        images = self.model.tokenizer.decode(tokens.float())
        self.rewards = score(self.reward, images, batch.prompts)
        return images.detach(), tokens.detach()

    def gradients(self, update: Update) -> list[Tensor]:
        """Gradients of the mean loss."""
        return update.gradients(policy.reward_loss(self.rewards, self.config.hinge).mean())


class GroupGradient:
    """Algorithm "group": clipped policy gradient with advantages normalised within groups of one class and order.

    The policy is N(g(z, c), std^2 I) around each token of the student.
    """

    def __init__(self, model: Pipeline, reward: Reward, config: RLConfig, reference: MAR):
        self.model, self.reward, self.config, self.reference = model, reward, config, reference
        self.counts = masking.masked_counts(model.network.config.num_tokens, config.ar_steps)

    def bound(self, tokens: Tensor) -> Tensor:
        """Actions as backbone and decoder see them: clamped where the token range is known."""
        limits = self.model.tokenizer.token_range
        return tokens if limits is None else tokens.clamp(*limits)

    def means(self, network: MAR, batch: Batch, actions: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For each AR step, given the actions before it: positions drawn (B, n) and their means (B, n, D)."""
        assert self.model.student is not None
        length = batch.orders.shape[1]
        for masked, masked_after in itertools.pairwise(self.counts):
            visible = batch.orders[:, : length - masked].sort(dim=1).values
            target = batch.orders[:, length - masked : length - masked_after]
            z, t_init = gather_tokens(batch.z, target), self.model.student.t_init
            with autocast(self.config, z.device):
                condition = gather_tokens(network.condition(self.bound(actions), visible, batch.labels), target)
                mean = student_tokens(network.head, self.model.schedule, t_init, condition, z, batch.w)
            yield target, mean

    @torch.no_grad()
    def rollout(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) and their tokens; keeps the actions, their log-probabilities and advantages."""
        self.batch, self.actions = batch, torch.zeros_like(batch.z)
        self.log_prob = batch.z.new_zeros(batch.z.shape[:2])
        for target, mean in self.means(self.model.network, batch, self.actions):
            action = mean + self.config.std * gather_tokens(batch.exploration, target)
            self.actions.scatter_(1, target[..., None].expand_as(action), action)
            self.log_prob.scatter_(1, target, policy.gaussian_log_prob(action, mean, self.config.std))
        tokens = self.bound(self.actions)
        images = self.model.tokenizer.decode(tokens)
        self.rewards = score(self.reward, images, batch.prompts)
        self.advantages = policy.group_advantages(self.rewards, self.config.group_size)
        return images, tokens

    def gradients(self, update: Update) -> list[Tensor]:
        """Gradients of the mean loss per token, one AR step at a time: memory does not grow with K."""
        total = [torch.zeros_like(parameter) for parameter in update.parameters]
        references = itertools.repeat((None, None))
        if self.config.kl > 0:
            references = self.means(self.reference, self.batch, self.actions)
        steps = self.means(self.model.network, self.batch, self.actions)
        for (target, mean), (_, reference_mean) in zip(steps, references, strict=False):
            log_prob = policy.gaussian_log_prob(gather_tokens(self.actions, target), mean, self.config.std)
            old = self.log_prob.gather(1, target)
            loss = policy.clipped_policy_loss(log_prob, old, self.advantages, self.config.clip)
            if reference_mean is not None:
                loss = loss + self.config.kl * policy.gaussian_kl(mean, reference_mean, self.config.std)
            total = add(total, update.gradients(loss.sum() / self.log_prob.numel()))
        return total


def add(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    """Elementwise sums of two lists of gradients."""
    return [x + y for x, y in zip(a, b, strict=True)]


def held_out(
    model: Pipeline, reward: Reward, prompts: list[str], judge: Classifier | None, config: RLConfig, world: World
) -> dict[str, float]:
    """Mean reward, and the judge's accuracy and mean log-probability, over images of held-out seeds."""
    count = -(-config.eval_images // world.size)
    first = world.rank * count
    labels = torch.arange(first, first + count, device=world.device) % len(model.class_names)
    images = model.sample(labels.tolist(), seed=config.seed + HELD_OUT_SEED, first_image=first, batch_size=256)
    x = to_float(torch.from_numpy(images)).to(world.device)
    with torch.no_grad():
        values = {"reward_heldout": score(reward, x, [prompts[i] for i in labels.tolist()]).mean()}
        if judge is not None:
            log_prob = judge(x).log_softmax(1)
            values["accuracy_heldout"] = (log_prob.argmax(1) == labels).float().mean()
            values["judge_heldout"] = log_prob.gather(1, labels[:, None]).mean()
    return dict(zip(values, world.mean(torch.stack(list(values.values()))).tolist(), strict=True))


def rl(config: RLConfig, student_folder: Path, out: Path, resume: bool = False) -> Pipeline:
    """Run `marval rl`: returns the averaged model with the best held-out score, which is also saved in ``out``."""
    world = connect(config.device)
    rows = world.rows(config.batch)
    base = Pipeline.load(student_folder, world.device)
    if base.student is None:
        raise ValueError(f"{student_folder} holds a teacher: RL starts from a student of `marval distill`")
    base.network.requires_grad_(False)
    guidance_range = base.student.guidance_range
    student = copy_network(base.network, config.trained, guidance_range is not None)
    sampling = dataclasses.replace(base.sampling, ar_steps=config.ar_steps)
    model = Pipeline(student, base.tokenizer, base.class_names, sampling, base.student)
    model.settings()
    length, dim, num_classes = student.config.num_tokens, student.config.token_dim, student.config.num_classes
    prompts = class_prompts(config.prompt, model.class_names)
    reward = load_reward(
        config.reward, classifier=config.classifier, class_names=model.class_names, template=config.prompt,
        device=world.device,
    )  # fmt: skip
    probe = to_float(torch.from_numpy(model.sample(0, num_images=2))).to(world.device)
    check_reward(reward, probe, [prompts[0]] * 2)
    if config.algorithm == "gradient" and not reward.differentiable:
        raise ValueError(f"reward {config.reward!r} is not differentiable: use --algorithm group")
    group = config.group_size if config.algorithm == "group" else 1
    if config.batch // world.size % group:
        raise ValueError(f"batch {config.batch} over {world.size} processes splits groups of {group}")
    judge = Classifier.load(config.judge, world.device).eval().requires_grad_(False) if config.judge else None

    part = own_part(student, base.network)
    optimizer = torch.optim.Adam(part.parameters(), config.gsim.lr, betas=(0.0, 0.999), fused=True)
    update = Update("student", part, optimizer, config.clip_grad, world)
    ema = EMA(part, config.ema)
    stateful: dict[str, Any] = {"student": part, "optimizer": optimizer, "ema": ema}
    matching = auxiliary_update = None
    if config.anchor > 0:
        teacher, auxiliary = load_scores(student_folder, base.network, guidance_range is not None)
        matching = ScoreMatching(teacher, student, auxiliary, base.student, config.gsim, model.schedule)
        auxiliary_part = own_part(auxiliary, base.network)
        auxiliary_optimizer = torch.optim.Adam(
            auxiliary_part.parameters(), config.gsim.auxiliary_lr, betas=(0.0, 0.999), fused=True
        )
        auxiliary_update = Update("auxiliary", auxiliary_part, auxiliary_optimizer, config.clip_grad, world)
        stateful |= {"auxiliary": auxiliary_part, "auxiliary_optimizer": auxiliary_optimizer}
    if config.algorithm == "gradient":
        algorithm = RewardGradient(model, reward, config)
    else:
        algorithm = GroupGradient(model, reward, config, base.network)
    folders = {"student": str(student_folder), "classifier": config.classifier, "judge": config.judge}
    run = Run(out, "rl", config, resume, world, {name: Path(path) for name, path in folders.items() if path})
    best: dict[str, Any] = {"score": -float("inf"), "step": 0, "misses": 0, "weights": None}
    start = run.restore(stateful, best)

    def averaged(weights: dict[str, Tensor] | None = None) -> Pipeline:
        chosen = ema.averaged(part)
        if weights is not None:
            chosen.load_state_dict(weights)
        provenance = base.provenance | {"verb": "rl", "reward": config.reward, "best_update": best["step"]}
        network = with_part(student, chosen)
        return Pipeline(network, model.tokenizer, model.class_names, sampling, base.student, provenance)

    def evaluate(step: int) -> None:
        candidate = averaged()
        values = held_out(candidate, reward, prompts, judge, config, world)
        run.log(step, **values)
        value = values.get("judge_heldout", values["reward_heldout"])
        if value > best["score"]:
            weights = copy.deepcopy(own_part(candidate.network, base.network).state_dict())
            best.update(score=value, step=step, misses=0, weights=weights)
        else:
            best["misses"] += 1

    if start == 0:
        evaluate(0)
    progress = run.progress(start)
    done = start
    for step in progress:
        if config.patience > 0 and best["misses"] >= config.patience:  # a resumed run that had stopped
            break
        # ---- draw: the numbers of the whole batch, then this process's rows
        g = rng.generator(config.seed, 5, step, device=world.device)
        host = rng.generator(config.seed, 6, step)
        count = config.batch // group
        labels = torch.randint(num_classes, (count,), generator=g, device=world.device)
        orders = torch.rand(count, length, generator=g, device=world.device).argsort(dim=1)
        low, high = guidance_range or (base.student.guidance,) * 2
        w = low + (high - low) * torch.rand(count, 1, generator=g, device=world.device)
        labels, orders, w = (x.repeat_interleave(group, dim=0)[rows] for x in (labels, orders, w))
        z, exploration = torch.randn(2, config.batch, length, dim, generator=g, device=world.device)[:, rows]
        batch = Batch(labels, [prompts[i] for i in labels.tolist()], orders, z, w, exploration)
        masked_count = masking.inference_masked_count(length, config.ar_steps, float(torch.rand((), generator=host)))

        # ---- roll out and score whole images
        images, tokens = algorithm.rollout(batch)
        watched = {"reward": algorithm.rewards.detach().mean()} | image_statistics(images)

        # ---- anchor: GSIM towards the teacher, at a state that the rollout passed through
        context = None
        if matching is not None and auxiliary_update is not None:
            visible, masked = orders.tensor_split([length - masked_count], dim=1)
            with autocast(config, world.device):
                context = matching.context(tokens, visible.sort(dim=1).values, masked, labels, w)
            for _ in range(config.gsim.auxiliary_updates):
                noise = draw_noise(config.batch, masked_count, dim, config.gsim.auxiliary_t_range, g, rows)
                with autocast(config, world.device):
                    auxiliary_loss = matching.auxiliary_loss(context, *noise)
                auxiliary_update.apply(auxiliary_loss, auxiliary_update.gradients(auxiliary_loss), step)

        # ---- update the student
        for _ in range(config.inner_updates if config.algorithm == "group" else 1):
            gradients = algorithm.gradients(update)
            if matching is not None and context is not None:
                noise = draw_noise(config.batch, masked_count, dim, config.gsim.t_range, g, rows)
                with autocast(config, world.device):
                    anchor_loss, anchor_watched = matching.student_loss(context, *noise)
                gradients = add(gradients, update.gradients(config.anchor * anchor_loss))
                watched |= {"y": anchor_watched["y"]}
            watched |= {"grad_norm": update.apply(-watched["reward"], gradients, step)}
            ema.update(part)

        # ---- log, evaluate, save, look
        done = step + 1
        if run.is_due(config.log_every, done):
            row = run.log(done, **{name: world.mean(value) for name, value in watched.items()})
            progress.show({name: row[name] for name in ("reward", "grad_norm", "saturated")})
        if run.is_due(config.eval_every, done):
            evaluate(done)
        stop = config.patience > 0 and best["misses"] >= config.patience
        save = stop or run.is_due(config.save_every, done)
        if world.is_main and save:
            if matching is not None:
                matching.save_scores(out)
            averaged(best["weights"]).save(out)
        if world.is_main and run.is_due(config.sample_every, done):
            save_sample_grid(run, averaged(), done)
        if save:
            run.save(done)  # last: a killed run repeats what the checkpoint does not know
        if stop:
            progress.stop(f"stopped: no better held-out score since update {best['step']}")
            break
    return averaged(best["weights"]).to(world.device)
