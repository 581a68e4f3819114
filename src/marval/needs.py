"""What a run of each verb needs, found on the meta device: parameters, memory of a process, operations.

The loops' own losses (`marval.train.teacher_loss`, `marval.matching.ScoreMatching`, `marval.sampling.unmask`) run
forward and backward at the sizes of the run, for the images of one process (`marval.update_costs`).
"""

import dataclasses
import functools
import math
import statistics
from typing import Any

import torch
from torch import Tensor, nn

from marval import masking
from marval.config import (
    CurveConfig,
    DistillConfig,
    EvaluateConfig,
    MARConfig,
    RLConfig,
    SamplingConfig,
    StudentConfig,
    TrainConfig,
    check,
)
from marval.costs import Cost, bytes_of, zeros
from marval.diffusion import cosine_schedule
from marval.ema import EMA
from marval.features import BATCH
from marval.models.mar import MAR
from marval.networks import with_part
from marval.reference import chunk_rows
from marval.reward_costs import scorers
from marval.reward_files import listed
from marval.sampling import few_evaluations
from marval.sampling_costs import (
    Decoder,
    ar_loop_cost,
    decoding_cost,
    drawing_cost,
    frozen_network,
    network_inputs,
    surplus_images,
)
from marval.train import teacher_loss
from marval.update import Update, prepare
from marval.update_costs import (
    Share,
    add_gradients,
    make_contexts,
    matching_work,
    mean_over_masks,
    new_update,
    rewarded_cost,
    score_matching,
)


@dataclasses.dataclass
class Needs:
    """What a run needs: bytes of one process that shards nothing, and operations of all processes together."""

    parameters: int
    """Parameters of all networks, without helpers."""
    trained: int
    """Parameters that are trained."""
    helpers: dict[str, int]
    """Parameters by name of what is never trained nor sharded: autoencoder, rewards."""
    memory: dict[str, int]
    """Bytes by kind: weights, gradients (of one network at a time), optimizer, average, activations, frozen."""
    all_gradients: int
    """Bytes of the gradients of all trained networks at once."""
    largest_block: int
    """Bytes of the largest part that FSDP2 gathers at a time: a block of a transformer, or a head."""
    between: int
    """Bytes at the peak between updates, when there are no gradients and activations: while images are drawn, or a
    whole copy of the average is saved."""
    operations: float
    """Operations for an image of a batch, or for an image that is drawn."""
    looks: float = 0.0
    """Operations of the whole run between its updates, at held-out images."""
    surplus: float = 0.0
    """Operations of the whole run for images that are drawn and thrown away (`images_in_rounds`)."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """What is not counted, or not known."""


def train_needs(config: TrainConfig, sizes: MARConfig, share: Share, decoder: Decoder) -> Needs:
    """Needs of `marval train`: a teacher, and the evaluations of its curve."""
    network, schedule = frozen_network(sizes).requires_grad_(True), cosine_schedule()
    dim, copies = sizes.token_dim, config.head_batch_mul
    prepare(network, config)
    network.train()
    update, ema = new_update("teacher", network, config), EMA(network, config.ema)
    count = share.part

    def work(num_masked: int) -> None:
        t = zeros(share.total, num_masked, copies, dtype=torch.long)
        eps = zeros(share.total, num_masked, copies, dim)
        tokens, visible, masked, labels = network_inputs(sizes, count, num_masked)
        add_gradients(
            update, share, teacher_loss, network, schedule, tokens, visible, masked, labels, t[:count], eps[:count]
        )  # fmt: skip

    ratio = functools.partial(masking.masked_count, config.mask_ratios, sizes.num_tokens, config.sampling.ar_steps)
    cost = mean_over_masks(ratio, work)
    helpers = {"autoencoder": decoder[0]} if config.eval_every else {}
    needs = needs_of({"network": network}, [update], ema, cost, share.parts * count, helpers)
    sampling = dataclasses.replace(config.sampling, head_steps=config.eval_head_steps or config.sampling.head_steps)
    add_looks(needs, config, frozen_network(sizes), sampling, None, share, decoder)
    return needs


def distill_needs(config: DistillConfig, sizes: MARConfig, share: Share, decoder: Decoder) -> Needs:
    """Needs of `marval distill`: teacher, student and auxiliary, rollouts, and the evaluations of its curve."""
    teacher = frozen_network(sizes)
    matching, updates, ema = score_matching(teacher, config, config.student)
    ratio = functools.partial(masking.masked_count, config.mask_ratios, sizes.num_tokens, config.ar_steps)
    cost = mean_over_masks(ratio, matching_work(matching, updates, config, share))
    if config.context_updates > 1:
        made, again = (
            mean_over_masks(
                ratio, lambda num_masked, again=again: make_contexts(matching, config, share, num_masked, again)
            )
            for again in (False, True)
        )
        cost.operations -= (1 - 1 / config.context_updates) * (made.operations - again.operations)
    networks = {
        "teacher": teacher,
        "student": matching.student,
        "auxiliary": with_part(matching.student, matching.auxiliary),
    }
    images = share.parts * share.part
    if config.rollout > 0:
        draw = few_evaluations(matching.student.head, matching.schedule, (config.student.t_init,))
        rolled = ar_loop_cost(matching.student, config.precision, config.ar_steps, draw, share.part)
        per_update = config.rollout / config.context_updates / 2  # on average up to half the steps
        cost.operations += per_update * rolled.operations * share.parts
    helpers = {"autoencoder": decoder[0]} if config.eval_every else {}
    needs = needs_of(networks, updates, ema, cost, images, helpers)
    add_looks(needs, config, matching.student, SamplingConfig(ar_steps=config.ar_steps), config.student, share, decoder)
    return needs


def add_looks(
    needs: Needs, config: CurveConfig, network: MAR, sampling: SamplingConfig, student: StudentConfig | None,
    share: Share, decoder: Decoder,
) -> None:  # fmt: skip
    """Add what it takes to measure a copy of a run's averaged weights every now and then (`marval.curve`)."""
    if not config.eval_every:
        return
    images, looks = config.eval_images, math.ceil(config.steps / config.eval_every)
    count = min(share.part, len(chunk_rows(0, images)))
    few = min(BATCH, count)
    drawn = drawing_cost(network, config.precision, sampling, student, count)
    decoded = decoding_cost(decoder[1], network.config, few)
    needs.notes.append(f"{looks:,} evaluations of {images:,} images are counted, but for the network of the features")
    needs.between += max(drawn.peak, decoded.peak)
    image = drawn.operations / count + decoded.operations / few
    needs.looks = looks * images * image
    needs.surplus = looks * surplus_images(images, share.processes) * image


def rl_needs(
    config: RLConfig, sizes: MARConfig, share: Share, decoder: Decoder, student: StudentConfig, whole_teacher: bool
) -> Needs:
    """Needs of `marval rl`: student, base, rewards, the teacher and auxiliary of the anchor, the looks of the monitor.

    Args:
        student: of the model that the run starts from. whole_teacher: its teacher has a backbone of its own.
    """
    student, decode = dataclasses.replace(student, evaluations=1), decoder[1]
    base = frozen_network(sizes, student.guidance_range is not None)
    matching, updates, ema = score_matching(base, config, student, whole_teacher)
    network, count = matching.student, share.part
    reward, held_out = scorers([config.reward]), scorers(listed(config.held_out))
    draw = few_evaluations(network.head, matching.schedule, (student.t_init,))
    plain = ar_loop_cost(network, config.precision, config.ar_steps, draw, count)
    cost = rewarded_cost(config, network, base, updates[0], student, share, decoder, reward, plain)
    networks = {"base": base, "student": network}
    if config.anchor > 0:
        work = matching_work(matching, updates, config, share)
        masked_count = functools.partial(masking.inference_masked_count, sizes.num_tokens, config.ar_steps)
        anchor = mean_over_masks(masked_count, work)
        cost = Cost(cost.operations + anchor.operations / share.parts, max(cost.peak, anchor.peak))
        networks |= {"teacher": matching.teacher, "auxiliary": with_part(matching.student, matching.auxiliary)}
    helpers = {"autoencoder": decoder[0], "reward": reward.networks, "held-out rewards": held_out.networks}
    needs = needs_of(networks, updates if config.anchor > 0 else updates[:1], ema, cost, count, helpers)
    looked = decoding_cost(decode, sizes, min(256, math.ceil(config.eval_images * share.rows / share.total)))

    def watch(tokens: Tensor) -> None:
        images = decode(tokens)
        reward(images)
        held_out(images)

    watched = decoding_cost(watch, sizes, count)
    needs.between = max(needs.between, looked.peak, watched.peak)
    looks = config.eval_images * (config.range_seeds + math.ceil(config.steps / config.eval_every))
    needs.looks = looks * (plain.operations + watched.operations) / count
    needs.notes += [*reward.notes, *held_out.notes]
    if config.judge or config.features or config.classifier:
        needs.notes.append("judge, classifier and the network of --features are not counted")
    if config.anchor > 0:
        how = "whole" if whole_teacher else "as a head on the student's backbone"
        needs.notes.append(f"the student's teacher is counted {how}")
    return needs


def evaluate_needs(
    config: EvaluateConfig, sizes: MARConfig, share: Share, decoder: Decoder, student: StudentConfig | None,
    stored: SamplingConfig | None,
) -> Needs:  # fmt: skip
    """Needs of `marval evaluate`: drawing, decoding and rewarding, on average over all combinations of the settings.

    Args:
        student: of the model, None if it is a teacher. stored: what the model draws with by itself; None as MAR.

    Raises:
        ValueError: several evaluations of a teacher's head.
    """
    network = frozen_network(sizes, bool(student and student.guidance_range))
    default, costs = stored, []
    if default is None:  # as MAR
        default = SamplingConfig(ar_steps=min(64, sizes.num_tokens), guidance=1.0 if student else 3.0, head_steps=100)
    for given in config.settings():
        sampling = dataclasses.replace(default, **{name: value for name, value in given.items() if value is not None})
        check(student is not None or sampling.evaluations == 1, "--evaluations is for students")
        costs.append(drawing_cost(network, config.precision, sampling, student, share.part))
    rewards = scorers(listed(config.rewards))
    few = min(BATCH, share.part)
    decoded = decoding_cost(lambda tokens: rewards(decoder[1](tokens)), sizes, few)
    operations = decoded.operations / few * share.part
    operations += statistics.mean(cost.operations for cost in costs)
    cost = Cost(operations, max(decoded.peak, *(cost.peak for cost in costs)))
    helpers = {"autoencoder": decoder[0], "rewards": rewards.networks}
    needs = needs_of({"network": network}, [], None, cost, share.part, helpers)
    needs.notes += ["the network of the features is not counted", *rewards.notes]
    surplus = len(costs) * surplus_images(config.num_images, share.processes)
    if surplus:
        needs.surplus = surplus * needs.operations
        whole = f"every process draws chunks of {len(chunk_rows(0, config.num_images))}"
        needs.notes.append(f"{surplus:,} images more are drawn and thrown away, as {whole}")
    return needs


def needs_of(
    networks: dict[str, MAR], updates: list[Update], ema: EMA[Any] | None, cost: Cost, images: int,
    helpers: dict[str, nn.Module],
) -> Needs:  # fmt: skip
    """Bytes of everything that lives through a run, and the cost of an update.

    Args:
        cost: of ``images`` images at once. helpers: frozen networks that are never sharded.
    """
    trained = [p for update in updates for p in update.parameters]
    weights = _parameters(*networks.values())
    blocks = [m for n in networks.values() for m in [*n.encoder_blocks, *n.decoder_blocks, n.head]]
    # gradients of one network at a time; what the peak holds beside them is activations and temporaries
    gradients = max((bytes_of(update.parameters) for update in updates), default=0)
    average = bytes_of(ema.average) if ema else 0
    counts = {name: sum(p.numel() for p in _parameters(module)) for name, module in helpers.items()}
    return Needs(
        parameters=sum(p.numel() for p in weights),
        trained=sum(p.numel() for p in trained),
        helpers={name: count for name, count in counts.items() if count},
        memory={
            "weights": bytes_of(weights),
            "gradients": gradients,
            "optimizer": 2 * bytes_of(trained),
            "average": average,
            "activations": max(0, cost.peak - gradients),
            "frozen": bytes_of([p for module in helpers.values() for p in module.parameters()]),
        },
        all_gradients=bytes_of(trained),
        largest_block=max((sum(4 * p.numel() for p in block.parameters()) for block in blocks), default=0),
        between=average,  # a whole copy of it, when it is saved
        operations=cost.operations / images,
    )


def _parameters(*modules: nn.Module) -> list[Tensor]:
    """All different parameters."""
    return list({id(p): p for module in modules for p in module.parameters()}.values())
