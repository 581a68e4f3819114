"""Time and memory of RL's parts, for rl_study.py."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from marval import masking, policy, sampling
from marval.algorithms import Batch, RewardGradient
from marval.config import RLConfig
from marval.costs import Work
from marval.diffusion import respace
from marval.matching import ScoreMatching, draw_noise, load_scores
from marval.networks import copy_network
from marval.pipeline import Pipeline
from marval.rewards import class_prompts
from marval.rng import ImageNoise, generator
from marval.scoring import Reward
from marval.update import autocast


def measured(update: Callable[[], None], repeats: int) -> dict[str, Any]:
    """Median seconds of an update, after a first one, and bytes at the peak of that."""
    with Work() as work:
        update()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        update()
        times.append(time.perf_counter() - start)
    return {"seconds_per_update": statistics.median(times), "bytes": work.peak}


def rollout_update(
    model: Pipeline, reward: Reward, config: RLConfig, chain: int, recompute: bool
) -> Callable[[], None]:
    """Rollout, reward, gradient of the head and Adam's step. A teacher draws each token in ``chain`` evaluations."""
    network, prompts = model.network, class_prompts(config.prompt, model.class_names)
    length, counts = network.config.num_tokens, masking.masked_counts(network.config.num_tokens, config.ar_steps)
    network.requires_grad_(False)
    network.head.requires_grad_(True)
    optimizer = torch.optim.Adam(network.head.parameters(), 1e-9)
    labels = torch.arange(config.batch) % len(prompts)
    asked = [prompts[label] for label in labels.tolist()]
    z = torch.randn(config.batch, length, network.config.token_dim, generator=generator(0))
    orders = torch.rand(config.batch, length, generator=generator(1)).argsort(1)

    def update() -> None:
        with autocast(config.precision, model.device):
            if model.student is None:  # ddim: as many evaluations as the ancestral chain, and no noise to draw again
                noise, schedule = ImageNoise(0, list(range(config.batch))), respace(model.schedule, chain)
                clamp = model.tokenizer.token_range
                draw = sampling.diffusion_chain(network.head, schedule, noise, "ddim", clamp=clamp)
            else:
                draw = model.token_sampler(model.sampling)
            tokens = sampling.last(sampling.unmask(
                network, draw, labels, orders, counts, z, guidance=model.sampling.guidance,
                needs_null=model.student is None, checkpoint_ar_steps=recompute,
            ))  # fmt: skip
        policy.reward_loss(reward(model.tokenizer.decode(tokens.float()), asked)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def anchor_update(student: Pipeline, folder: Path, config: RLConfig) -> Callable[[], None]:
    """What the GSIM term adds to an update of the student of a folder, half of whose tokens are hidden: contexts, an
    update of the auxiliary, and the student's gradient."""
    assert student.student is not None
    takes_guidance = student.student.guidance_range is not None
    student.network.requires_grad_(False)
    network = copy_network(student.network, "head", takes_guidance)
    teacher, auxiliary = load_scores(folder, student.network, takes_guidance)
    policy_config = dataclasses.replace(student.student, evaluations=1)
    matching = ScoreMatching(teacher, network, auxiliary, policy_config, config.gsim, student.schedule)
    optimizer = torch.optim.Adam(auxiliary.parameters(), 1e-9)
    length, dim, g = network.config.num_tokens, network.config.token_dim, generator(0)
    order = torch.rand(config.batch, length, generator=g).argsort(1)
    visible, masked = order[:, : length // 2].sort(1).values, order[:, length // 2 :]
    labels, w = torch.arange(config.batch) % network.config.num_classes, torch.full((config.batch, 1), 1.5)
    tokens = torch.randn(config.batch, length, dim, generator=g).clamp(-1, 1)

    def update() -> None:
        with autocast(config.precision, student.device):
            context = matching.context(tokens, visible, masked, labels, w)
            noise = draw_noise(*masked.shape, dim, config.gsim.auxiliary_t_range, g)
            loss, _ = matching.auxiliary_loss(context, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with autocast(config.precision, student.device):
            noise = draw_noise(*masked.shape, dim, config.gsim.t_range, g)
            loss, _ = matching.student_loss(context, noise)
        loss.backward()
        for head in (network.head, auxiliary):
            head.zero_grad()

    return update


def memory(student: Pipeline, reward: Reward, steps: int) -> dict[str, Any]:
    """Bytes that a rollout of 16 images in K steps keeps for its gradient, and at the peak of the update; float32."""
    network, count = student.network, 16
    length, dim = network.config.num_tokens, network.config.token_dim
    z, exploration = torch.randn(2, count, length, dim, generator=generator(0))
    orders = torch.rand(count, length, generator=generator(1)).argsort(1)
    labels, w = torch.arange(count) % network.config.num_classes, torch.full((count, 1), student.sampling.guidance)
    batch = Batch(labels, [""] * count, orders, z, w, exploration, frozenset(range(steps)))
    row: dict[str, Any] = {"tokens": count * length * dim * 4 * steps}
    network.requires_grad_(False)
    network.head.requires_grad_(True)
    for name, recompute in (("recomputed", True), ("stored", False)):
        config = RLConfig(ar_steps=steps, checkpoint_ar_steps=recompute)
        algorithm = RewardGradient(student, reward, config, network)
        with Work() as work:
            loss, rollout = algorithm.loss(batch)
            row[name] = work.alive
            loss.backward()
            row[f"{name}, peak of the update"] = work.peak
            del loss, rollout
        network.head.zero_grad()
    network.head.requires_grad_(False)
    return row
