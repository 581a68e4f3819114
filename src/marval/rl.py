"""MARVAL-RL: post-train the one-step student on rewards, anchored to its teacher (MARVAL, arXiv 2511.15190).

The student is the policy and an action is a whole image after all K AR steps. Two algorithms: the gradient of a
differentiable reward through the rollout, and a group-relative policy gradient for any black box (marval.policy).
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from marval import masking, policy, rng
from marval.checkpoint import save_tensors
from marval.config import RLConfig
from marval.distributed import World, connect, template
from marval.ema import EMA
from marval.matching import (
    ScoreMatching,
    averaged_network,
    copy_network,
    draw_noise,
    load_scores,
    own_part,
    shard_networks,
)
from marval.models.classifier import Classifier
from marval.models.mar import MAR
from marval.pipeline import Pipeline
from marval.rewards import Reward, check_reward, class_prompts, load_reward, score
from marval.run import Run, Update, add_weighted, autocast, prepare
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

    def __getitem__(self, rows: slice) -> "Batch":
        return Batch(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


@dataclass
class Rollout:
    """A batch, what the policy drew, and how it was scored; all without gradients."""

    batch: Batch
    images: Tensor
    """(B, C, H, W) in [0, 1]."""
    tokens: Tensor
    """(B, L, D) of the images."""
    rewards: Tensor
    """(B,)"""
    actions: Tensor | None = None
    """(B, L, D) tokens before clamping (algorithm group)."""
    log_prob: Tensor | None = None
    """(B, L) of the actions when they were drawn (algorithm group)."""


class RewardGradient:
    """Algorithm "gradient": minimise -min(R, hinge), backpropagated through the last AR steps of the rollout."""

    def __init__(self, model: Pipeline, reward: Reward, config: RLConfig):
        self.model, self.reward, self.config = model, reward, config
        self.counts = masking.masked_counts(model.network.config.num_tokens, config.ar_steps)

    def loss(self, batch: Batch) -> tuple[Tensor, Rollout]:
        """Roll out whole images; the loss keeps the graph."""
        steps = unmask(
            self.model.network, self.model.draw(self.model.sampling), batch.labels, batch.orders, self.counts, batch.z,
            guidance=batch.w,
            grad_ar_steps=range(self.config.ar_steps)[-self.config.grad_ar_steps :],
            checkpoint_ar_steps=self.config.checkpoint_ar_steps,
        )  # fmt: skip
        tokens = last(steps)
        with torch.autocast(batch.z.device.type, enabled=False):
            images = self.model.tokenizer.decode(tokens.float())
            rewards = score(self.reward, images, batch.prompts)
        rollout = Rollout(batch, images.detach(), tokens.detach(), rewards.detach())
        return policy.reward_loss(rewards, self.config.hinge).mean(), rollout

    def rollout(self, batch: Batch, update: Update, weight: float, last: bool) -> Rollout:
        """Roll out and backpropagate at once, so that the graph of one part at a time is in memory."""
        return update.backward(self.loss, batch, weight=weight, last=last)[1]

    def backward(self, rollout: Rollout, update: Update, weight: float, last: bool) -> None:
        """The gradient was added up in `rollout`."""


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

    def mean(self, network: MAR, batch: Batch, actions: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Positions drawn in AR step k, (B, n), and their means (B, n, D), given the actions before it."""
        assert self.model.student is not None
        length, masked, masked_after = batch.orders.shape[1], *self.counts[k : k + 2]
        visible = batch.orders[:, : length - masked].sort(dim=1).values
        target = batch.orders[:, length - masked : length - masked_after]
        z, t_init = gather_tokens(batch.z, target), self.model.student.t_init
        condition = gather_tokens(network.condition(self.bound(actions), visible, batch.labels), target)
        return target, student_tokens(network.head, self.model.schedule, t_init, condition, z, batch.w)

    def rollout(self, batch: Batch, update: Update, weight: float, last: bool) -> Rollout:
        """Only `draw`: the gradients come later, from `backward`."""
        return self.draw(batch)

    @torch.no_grad()
    def draw(self, batch: Batch) -> Rollout:
        """Draw the actions, and score the images that they make."""
        actions, log_prob = torch.zeros_like(batch.z), batch.z.new_zeros(batch.z.shape[:2])
        for k in range(self.config.ar_steps):
            with autocast(self.config, batch.z.device):
                target, mean = self.mean(self.model.network, batch, actions, k)
            action = mean + self.config.std * gather_tokens(batch.exploration, target)
            actions.scatter_(1, target[..., None].expand_as(action), action)
            log_prob.scatter_(1, target, policy.gaussian_log_prob(action, mean, self.config.std))
        tokens = self.bound(actions)
        images = self.model.tokenizer.decode(tokens)
        return Rollout(batch, images, tokens, score(self.reward, images, batch.prompts), actions, log_prob)

    def loss(self, rollout: Rollout, k: int) -> tuple[Tensor, None]:
        """AR step k's share of the mean loss per token."""
        assert rollout.actions is not None
        assert rollout.log_prob is not None
        target, mean = self.mean(self.model.network, rollout.batch, rollout.actions, k)
        log_prob = policy.gaussian_log_prob(gather_tokens(rollout.actions, target), mean, self.config.std)
        advantages = policy.group_advantages(rollout.rewards, self.config.group_size)
        old = rollout.log_prob.gather(1, target)
        loss = policy.clipped_policy_loss(log_prob, old, advantages, self.config.clip)
        if self.config.kl > 0:
            with torch.no_grad():
                _, reference = self.mean(self.reference, rollout.batch, rollout.actions, k)
            loss = loss + self.config.kl * policy.gaussian_kl(mean, reference, self.config.std)
        return loss.sum() / rollout.log_prob.numel(), None

    def backward(self, rollout: Rollout, update: Update, weight: float, last: bool) -> None:
        """Add up the gradient, one AR step at a time: memory does not grow with K."""
        for k in range(self.config.ar_steps):
            update.backward(self.loss, rollout, k, weight=weight, last=last and k == self.config.ar_steps - 1)


def held_out(
    model: Pipeline, reward: Reward, prompts: list[str], judge: Classifier | None, config: RLConfig, world: World
) -> dict[str, float]:
    """Mean reward, and the judge's accuracy and mean log-probability, over images of held-out seeds."""
    rows, _, weight = world.parts(config.eval_images)[0]
    labels = torch.arange(rows.start, rows.stop, device=world.device) % len(model.class_names)
    seed = config.seed + HELD_OUT_SEED
    batch = world.parts(config.batch, config.accumulate)[0].own.stop  # as many as an update decodes at once
    images = model.sample(labels.tolist(), seed=seed, first_image=rows.start, batch_size=batch)
    x = to_float(torch.from_numpy(images)).to(world.device)
    with torch.no_grad():
        values = {"reward_heldout": score(reward, x, [prompts[i] for i in labels.tolist()]).mean()}
        if judge is not None:
            log_prob = judge(x).log_softmax(1)
            values["accuracy_heldout"] = (log_prob.argmax(1) == labels).float().mean()
            values["judge_heldout"] = log_prob.gather(1, labels[:, None]).mean()
    return world.means({name: weight * value for name, value in values.items()})


def rl(config: RLConfig, student_folder: Path, out: Path, resume: bool = False) -> Pipeline:
    """Run `marval rl`: returns the averaged model with the best held-out score, which is also saved in ``out``."""
    world = connect(config.device, config.shard)
    group = config.group_size if config.algorithm == "group" else 1
    parts = world.parts(config.batch, config.accumulate, group)
    if config.eval_images < world.size:
        raise ValueError(f"eval_images {config.eval_images} must be at least the number of processes, {world.size}")
    base = Pipeline.load(student_folder, world.device)
    if base.student is None:
        raise ValueError(f"{student_folder} holds a teacher: RL starts from a student of `marval distill`")
    base.network.requires_grad_(False)
    guidance_range = base.student.guidance_range
    student = copy_network(base.network, config.trained, guidance_range is not None)
    sampling = dataclasses.replace(base.sampling, ar_steps=config.ar_steps)
    model = Pipeline(student, base.tokenizer, base.class_names, sampling, base.student)
    model.settings()
    model.require_images()
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
    judge = Classifier.load(config.judge, world.device).eval().requires_grad_(False) if config.judge else None

    blank = template(student)
    scores = []
    if config.anchor > 0:
        scores = load_scores(student_folder, base.network, guidance_range is not None)
    for network in (student, *scores[1:]):  # the auxiliary too
        prepare(network, config)
    student, *scores = shard_networks(world, base.network, student, *scores)
    model = Pipeline(student, base.tokenizer, base.class_names, sampling, base.student)
    part = own_part(student, base.network)
    optimizer = torch.optim.Adam(part.parameters(), config.gsim.lr, betas=(0.0, 0.999), fused=True)
    update = Update("student", part, optimizer, config, world)
    ema = EMA(part, config.ema, blank.head if config.trained == "head" else blank)
    stateful: dict[str, Any] = {"student": part, "optimizer": optimizer, "ema": ema}
    matching = auxiliary_update = None
    if config.anchor > 0:
        teacher, auxiliary = scores
        matching = ScoreMatching(teacher, student, auxiliary, base.student, config.gsim, model.schedule)
        auxiliary_part = own_part(auxiliary, base.network)
        auxiliary_optimizer = torch.optim.Adam(
            auxiliary_part.parameters(), config.gsim.auxiliary_lr, betas=(0.0, 0.999), fused=True
        )
        auxiliary_update = Update("auxiliary", auxiliary_part, auxiliary_optimizer, config, world)
        stateful |= {"auxiliary": auxiliary_part, "auxiliary_optimizer": auxiliary_optimizer}
    if config.algorithm == "gradient":
        algorithm = RewardGradient(model, reward, config)
    else:
        algorithm = GroupGradient(model, reward, config, base.network)
    folders = {"student": str(student_folder), "classifier": config.classifier, "judge": config.judge}
    run = Run(out, "rl", config, resume, world, {name: Path(path) for name, path in folders.items() if path})
    best: dict[str, Any] = {"score": -float("inf"), "step": 0, "misses": 0, "weights": None}
    start = run.restore(stateful, best)

    def averaged() -> Pipeline:
        provenance = base.provenance | {"verb": "rl", "reward": config.reward, "best_update": best["step"]}
        network = averaged_network(student, ema, blank)
        return Pipeline(network, model.tokenizer, model.class_names, sampling, base.student, provenance)

    def the_best() -> Pipeline:
        """The averaged model of the best evaluation."""
        result = averaged()
        own_part_of(result.network).load_state_dict(best["weights"])
        return result

    def own_part_of(network: MAR) -> nn.Module:
        return network.head if config.trained == "head" else network

    def evaluate(step: int) -> None:
        candidate = averaged()
        values = held_out(candidate, reward, prompts, judge, config, world)
        run.log(step, **values)
        value = values.get("judge_heldout", values["reward_heldout"])
        if value > best["score"]:
            weights = {name: v.cpu().clone() for name, v in own_part_of(candidate.network).state_dict().items()}
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
        # ---- draw: the numbers of the whole batch; each part takes its rows
        g = rng.generator(config.seed, 5, step, device=world.device)
        host = rng.generator(config.seed, 6, step)
        count = config.batch // group
        labels = torch.randint(num_classes, (count,), generator=g, device=world.device)
        orders = torch.rand(count, length, generator=g, device=world.device).argsort(dim=1)
        low, high = guidance_range or (base.student.guidance,) * 2
        w = low + (high - low) * torch.rand(count, 1, generator=g, device=world.device)
        labels, orders, w = (x.repeat_interleave(group, dim=0) for x in (labels, orders, w))
        z, exploration = torch.randn(2, config.batch, length, dim, generator=g, device=world.device)
        batch = Batch(labels, [prompts[i] for i in labels.tolist()], orders, z, w, exploration)
        masked_count = masking.inference_masked_count(length, config.ar_steps, float(torch.rand((), generator=host)))
        visible, masked = orders.tensor_split([length - masked_count], dim=1)
        visible = visible.sort(dim=1).values
        noise_shape = (config.batch, masked_count, dim)
        watched: dict[str, Tensor] = {}
        anchored = matching is not None

        # ---- roll out and score whole images
        rollouts = []
        for rows, _, weight in parts:
            rollout = algorithm.rollout(batch[rows], update, weight, last=not anchored and rows is parts[-1].rows)
            add_weighted(watched, weight, {"reward": rollout.rewards.mean()} | image_statistics(rollout.images))
            rollouts.append(rollout)

        # ---- anchor: GSIM towards the teacher, at a state that the rollouts passed through
        contexts = []
        if matching is not None and auxiliary_update is not None:
            for (rows, _, _), rollout in zip(parts, rollouts, strict=True):
                with torch.no_grad(), autocast(config, world.device):
                    tokens = rollout.tokens
                    contexts.append(matching.context(tokens, visible[rows], masked[rows], labels[rows], w[rows]))
            for _ in range(config.gsim.auxiliary_updates):
                z, t, eps = draw_noise(*noise_shape, config.gsim.auxiliary_t_range, g)
                for context, (rows, _, weight) in zip(contexts, parts, strict=True):
                    auxiliary_update.backward(
                        matching.auxiliary_loss, context, z[rows], t[rows], eps[rows], weight=weight,
                        last=context is contexts[-1],
                    )  # fmt: skip
                auxiliary_update.step(step)

        # ---- update the student
        grad_norm = torch.zeros(())
        for _ in range(config.inner_updates if config.algorithm == "group" else 1):
            for rollout, (_, _, weight) in zip(rollouts, parts, strict=True):
                algorithm.backward(rollout, update, weight, last=not anchored and rollout is rollouts[-1])
            if matching is not None:
                z, t, eps = draw_noise(*noise_shape, config.gsim.t_range, g)
                anchor_watched: dict[str, Tensor] = {}
                for context, (rows, _, weight) in zip(contexts, parts, strict=True):
                    _, values = update.backward(
                        matching.student_loss, context, z[rows], t[rows], eps[rows], weight=config.anchor * weight,
                        last=context is contexts[-1],
                    )  # fmt: skip
                    add_weighted(anchor_watched, weight, {"y": values["y"]})
                watched |= anchor_watched
            grad_norm = update.step(step)
            ema.update(part)

        # ---- log, evaluate, save, look
        done = step + 1
        if run.is_due(config.log_every, done):
            row = run.log(done, **world.means(watched), grad_norm=grad_norm)
            progress.show({name: row[name] for name in ("reward", "grad_norm", "saturated")})
        if run.is_due(config.eval_every, done):
            evaluate(done)
        stop = config.patience > 0 and best["misses"] >= config.patience
        save, look = stop or run.is_due(config.save_every, done), run.is_due(config.sample_every, done)
        if world.gathers and save:
            current, tensors = the_best(), matching.scores() if matching is not None else {}
            if world.is_main:
                if tensors:
                    save_tensors(out / "scores.safetensors", tensors)
                current.save(out)
            del current, tensors  # whole copies
        if world.gathers and look:
            current = averaged()
            if world.is_main:
                save_sample_grid(run, current, done)
            del current
        if save:
            run.save(done)  # last: a killed run repeats what the checkpoint does not know
        if stop:
            progress.stop(f"stopped: no better held-out score since update {best['step']}")
            break
    return the_best().to(world.device)
