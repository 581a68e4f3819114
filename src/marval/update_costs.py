"""Updates on the meta device, as the loops make them: `marval.update.Update` runs the loops' own losses forward and
backward, for the images that one process has of a batch."""

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from marval import masking
from marval.algorithms import Batch, GroupGradient, RewardGradient, Rollout
from marval.config import DistillConfig, RLConfig, RunConfig, StudentConfig
from marval.costs import Cost, bytes_of, cost_of, mean_cost, zeros
from marval.diffusion import cosine_schedule
from marval.distributed import World
from marval.ema import EMA
from marval.matching import Context, Noise, ScoreMatching
from marval.models.lora import adapt
from marval.models.mar import MAR
from marval.networks import copy_auxiliary, copy_network, own_part, with_head, with_part
from marval.reward_costs import Scorers
from marval.sampling import few_evaluations, last, unmask
from marval.sampling_costs import Decoder, frozen_network, network_inputs
from marval.update import Update, autocast, prepare

ALONE = World(0, 1, torch.device("cpu"))
"""The world of one process: a plan runs one of all processes, with its share of the images."""


@dataclasses.dataclass
class Share:
    """What one process works through at a time: in an update, or of an evaluation."""

    rows: int
    """Images of this process."""
    part: int
    """Images of its largest part (``accumulate``): so many pass a network at once."""
    parts: int
    """Parts that are tried: one, or two, which shows what stays between them."""
    total: int
    """Images of all processes, whose random numbers every process draws."""
    processes: int
    """Processes that the images are shared by."""


def mean_over_masks(count: Callable[[float], int], work: Callable[[int], Any]) -> Cost:
    """`mean_cost` over the numbers of masked tokens that occur: ``count(u)`` for u uniform in [0, 1)."""
    return mean_cost([count(i / 256) for i in range(256)], work)


def new_update(name: str, module: nn.Module, config: RunConfig) -> Update:
    """The update of a network, with Adam, in one process."""
    return Update(name, module, torch.optim.Adam(module.parameters()), config, ALONE)


def add_gradients(update: Update, share: Share, function: Callable[..., Any], *args: Any) -> None:
    """Add up the gradients of ``function(*args)`` for all parts, without the optimizer's step, which needs no more
    memory than it has."""
    update.loss = zeros()
    for i in range(share.parts):
        update.backward(function, *args, weight=1 / share.parts, last=i == share.parts - 1)
    update.optimizer.zero_grad()


# ---- distillation, and the anchor of RL


def score_matching(
    base: MAR, config: DistillConfig | RLConfig, student_config: StudentConfig, whole_teacher: bool = False
) -> tuple[ScoreMatching, list[Update], EMA[Any]]:
    """Student and auxiliary of a frozen teacher, as `marval.distill` makes them; their updates; the average.

    Args:
        base: the teacher, or in RL the student that the run starts from.
        whole_teacher: in RL the teacher has a backbone of its own.
    """
    guidance_input = student_config.guidance_range is not None
    with torch.device("meta"):
        student = copy_network(base, config.trained, guidance_input)
        kind = config.auxiliary if isinstance(config, DistillConfig) else "head"
        auxiliary = copy_auxiliary(base, kind, guidance_input, student_config.evaluations)
    adapters = None
    if isinstance(config, RLConfig) and config.trained == "lora":
        adapters = adapt(student, config.lora_rank)
    for network in (student, with_part(student, auxiliary)):
        prepare(network, config)
    teacher = base
    if isinstance(config, RLConfig):  # the base is the student's start; the teacher has a head, or all, of its own
        teacher = frozen_network(base.config)
        teacher = teacher if whole_teacher else with_head(base, teacher.head)
    matching = ScoreMatching(teacher, student, auxiliary, student_config, config.gsim, cosine_schedule())
    updates = []
    for name, part in (("student", adapters or own_part(student, base)), ("auxiliary", auxiliary)):
        updates.append(new_update(name, part, config))
    return matching, updates, EMA(updates[0].module, config.ema)


def make_contexts(
    matching: ScoreMatching, config: DistillConfig | RLConfig, share: Share, num_masked: int, again: bool = False
) -> list[Context]:
    """Contexts of a process's parts, with ``num_masked`` masked tokens in each image; or (``again``) only what a
    student that moves needs when it meets the same ones again."""
    sizes = matching.teacher.config
    tokens, visible, masked, labels = network_inputs(sizes, share.part, num_masked)
    w, condition = zeros(share.part, 1), zeros(share.part, num_masked, sizes.width)
    with autocast(config.precision, ALONE.device):
        if again:
            context = Context(tokens, visible, masked, labels, w, condition, condition, condition)
            return [matching.refresh(context) for _ in range(share.parts)]
        return [matching.context(tokens, visible, masked, labels, w) for _ in range(share.parts)]


def matching_work(
    matching: ScoreMatching, updates: list[Update], config: DistillConfig | RLConfig, share: Share
) -> Callable[[int], None]:
    """Function of the number of masked tokens: makes contexts, then the updates of the auxiliary and of the student."""
    count, kept = share.part, math.ceil(share.rows / share.part)
    token_dim = matching.teacher.config.token_dim

    def work(num_masked: int) -> None:
        contexts = make_contexts(matching, config, share, num_masked)
        kinds = 2 + (contexts[0].student_condition is not contexts[0].teacher_condition)  # of conditions
        shape = contexts[0].teacher_condition.shape
        others = zeros(kept - share.parts, *shape, kinds)  # contexts of the parts not tried
        size = share.total, num_masked
        z = zeros(*size, matching.student_config.evaluations, token_dim)
        evaluation, t = (zeros(*size, dtype=torch.long) for _ in range(2))
        noise = Noise(z, evaluation, t, zeros(*size, token_dim)).of(slice(count))
        for _ in range(config.gsim.auxiliary_updates):
            add_gradients(updates[1], share, matching.auxiliary_loss, contexts[0], noise)
        for _ in range(student_updates(config)):
            add_gradients(updates[0], share, matching.student_loss, contexts[0], noise)
        del others

    return work


def student_updates(config: DistillConfig | RLConfig) -> int:
    """Updates of the student per batch."""
    return config.inner_updates if isinstance(config, RLConfig) and config.algorithm == "group" else 1


# ---- RL


def rewarded_cost(
    config: RLConfig, network: MAR, base: MAR, update: Update, student: StudentConfig, share: Share, decoder: Decoder,
    reward: Scorers, plain: Cost,
) -> Cost:  # fmt: skip
    """Drawing the images of a part, rewarding them and the student's gradients, without the anchor.

    Args:
        plain: of the AR loop without gradients.
    """
    count, dim = share.part, network.config.token_dim
    length = network.config.num_tokens

    def score() -> None:
        tokens = zeros(count, length, dim).requires_grad_()
        with torch.set_grad_enabled(config.algorithm == "gradient"):
            rewards = reward(decoder[1](tokens))
        if rewards.requires_grad:
            rewards.sum().backward()

    scored, after = cost_of(score), 0
    steps = config.grad_ar_steps or config.ar_steps
    operations, peak = scored.operations, scored.peak + bytes_of(update.parameters)
    if config.algorithm == "group" or config.kl > 0:  # passes over the finished tokens, one AR step at a time
        again = mean_cost(range(config.ar_steps), policy_work(network, base, update, config, student, share))
        operations, after = operations + student_updates(config) * steps * again.operations, again.peak
    if config.algorithm == "group":
        operations += plain.operations
    else:
        work = reward_gradient_work(network, update, config, student, share)
        with_gradient = mean_cost(range(config.ar_steps), lambda k: work(k, 1))
        operations += steps * with_gradient.operations + (1 - steps / config.ar_steps) * plain.operations
        peak = max(peak, with_gradient.peak)
        peak += steps * count * length * dim * 4  # tokens kept between the steps
        if not config.checkpoint_ar_steps and steps > 1:  # and all that a step saves: what a second step adds to one
            two = mean_cost(range(config.ar_steps - 1), lambda k: work(k, 2))
            peak += (steps - 1) * (two.peak - with_gradient.peak)
    return Cost(operations, max(peak, after))


def reward_gradient_work(
    network: MAR, update: Update, config: RLConfig, student: StudentConfig, share: Share
) -> Callable[[int, int], None]:
    """Function of k and n: AR steps k to k + n - 1 with gradients, as in `RewardGradient.loss`, where decoding
    follows."""
    count, length, dim = share.part, network.config.num_tokens, network.config.token_dim
    counts = masking.masked_counts(length, config.ar_steps)
    draw = few_evaluations(network.head, cosine_schedule(), (student.t_init,))

    def work(k: int, n: int) -> None:
        def loss() -> tuple[Tensor, None]:
            _, _, _, labels = network_inputs(network.config, count, 1)
            orders, z = zeros(count, length, dtype=torch.long), zeros(count, length, dim)
            start = z.clone().requires_grad_()  # tokens of earlier steps
            steps = unmask(
                network, draw, labels, orders, counts[k : k + n + 1], z, guidance=z[:, :1, 0], tokens=start,
                checkpoint_ar_steps=config.checkpoint_ar_steps,
            )  # fmt: skip
            return last(steps).sum(), None

        add_gradients(update, dataclasses.replace(share, parts=1), loss)

    return work


def policy_work(
    network: MAR, base: MAR, update: Update, config: RLConfig, student: StudentConfig, share: Share
) -> Callable[[int], None]:
    """Function of k: the algorithm's `step_loss` at AR step k, which is the policy gradient of a black box, or the
    divergence to the base."""
    count, length, dim = share.part, network.config.num_tokens, network.config.token_dim
    if config.algorithm == "group":
        count = max(1, count // config.group_size) * config.group_size
    labels, orders, tokens = zeros(count).long(), zeros(count, length).long(), zeros(count, length, dim)
    batch = Batch(labels, [""] * count, orders, tokens, zeros(count, 1), tokens, frozenset())
    log_prob = zeros(count, length)
    rollout = Rollout(batch, tokens, tokens, zeros(count), tokens, log_prob)
    tokenizer = SimpleNamespace(token_range=None)
    model: Any = SimpleNamespace(network=network, student=student, schedule=cosine_schedule(), tokenizer=tokenizer)
    make = GroupGradient if config.algorithm == "group" else RewardGradient
    algorithm = make(model, lambda images, prompts: images.mean((1, 2, 3)), config, base)  # type: ignore[arg-type]
    return lambda k: add_gradients(update, dataclasses.replace(share, parts=1), algorithm.step_loss, rollout, k)
