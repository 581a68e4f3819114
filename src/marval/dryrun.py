"""What a run would need, found without memory or data: parameters, memory per process, operations, time.

The loops' own losses (`marval.train.teacher_loss`, `marval.matching.ScoreMatching`, `marval.sampling.unmask`) run
forward and backward through `marval.update.Update` on the meta device, at the sizes of the run (`marval.costs`).
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from marval import masking
from marval.algorithms import Batch, GroupGradient, RewardGradient, Rollout
from marval.config import (
    CurveConfig,
    DistillConfig,
    EvaluateConfig,
    MARConfig,
    RLConfig,
    RunConfig,
    SamplingConfig,
    StudentConfig,
    TrainConfig,
    check,
)
from marval.costs import Cost, cost_of, without_data
from marval.diffusion import cosine_schedule, respace
from marval.distributed import World
from marval.ema import EMA
from marval.features import BATCH
from marval.floor import H200, matmul_rate
from marval.importing import KL16
from marval.matching import Context, Noise, ScoreMatching
from marval.models.autoencoders import KL, TAESD
from marval.models.lora import adapt
from marval.models.mar import MAR
from marval.networks import copy_auxiliary, copy_network, own_part, with_head, with_part
from marval.recipes import IMAGENET_IMAGES
from marval.reward_costs import scorers
from marval.reward_files import listed
from marval.sampling import diffusion_chain, few_evaluations, last, unmask
from marval.train import teacher_loss
from marval.update import Update, autocast, prepare

Verb = Literal["train", "distill", "rl", "evaluate"]
GIB = 2**30
H200_SHARE: dict[Verb, float] = {"train": 0.33, "distill": 0.33, "rl": 0.22, "evaluate": 0.33}
"""Share of the rate of its matrix products in bf16 that a run reaches on an H200: measured for MAR-B
(docs/performance.md; distillation with one update per context), for evaluation a guess. RL waits for its launches: 11 %
with 16 images in a process, hence about twice that with the 32 of the recipes on eight GPUs."""
ALONE = World(0, 1, torch.device("cpu"))
DRAWN = 250
"""Images of an evaluation that a process draws at a time, at most."""
Decoder = tuple[nn.Module, Callable[[Tensor], Tensor]]
"""A tokenizer's network, and its function tokens (B, L, D) -> images (B, C, H, W)."""


def _frozen(model: MARConfig, guidance_input: bool = False) -> MAR:
    with torch.device("meta"):
        return MAR(model, guidance_input).requires_grad_(False).eval()


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="meta")


def _over(values: Sequence[int], work: Callable[[int], Any]) -> Cost:
    """Mean operations and largest memory of ``work(value)`` over all values: tried with the least, the middle and the
    largest, and a parabola for those between (operations are quadratic in the number of tokens)."""
    tried = sorted({min(values), sorted(values)[len(values) // 2], max(values)})
    costs = [cost_of(functools.partial(work, value)) for value in tried]
    parabola = np.polynomial.Polynomial.fit(tried, [cost.operations for cost in costs], len(tried) - 1)
    return Cost(float(parabola(np.array(values)).mean()), max(cost.peak for cost in costs))


def _over_masks(count: Callable[[float], int], work: Callable[[int], Any]) -> Cost:
    """`_over` the numbers of masked tokens that occur: ``count(u)`` for u uniform in [0, 1)."""
    return _over([count(i / 256) for i in range(256)], work)


def _bytes(tensors: Any) -> int:
    """Of all different storages in a nested structure."""
    storages = {leaf.untyped_storage()._cdata: leaf for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor)}
    return sum(leaf.untyped_storage().nbytes() for leaf in storages.values())


def _parameters(*modules: nn.Module) -> list[Tensor]:
    return list({id(p): p for module in modules for p in module.parameters()}.values())


def _count(*modules: nn.Module) -> int:
    return sum(p.numel() for p in _parameters(*modules))


@dataclasses.dataclass
class _Share:
    """What one process works through in one update."""

    rows: int
    """Images of this process."""
    part: int
    """Images of its largest part."""
    parts: int
    """Parts that are tried: one, or two, which shows what stays between them."""
    total: int
    """Images of all processes, whose random numbers every process draws."""


def _new_update(name: str, module: nn.Module, config: RunConfig) -> Update:
    return Update(name, module, torch.optim.Adam(module.parameters()), config, ALONE)


def _update(update: Update, share: _Share, function: Callable[..., Any], *args: Any) -> None:
    """Gradients of all parts, without the optimizer's step, which needs no more memory than it has."""
    update.loss = _zeros()
    for i in range(share.parts):
        update.backward(function, *args, weight=1 / share.parts, last=i == share.parts - 1)
    update.optimizer.zero_grad()


def _train(config: TrainConfig, model: MARConfig, share: _Share, decoder: Decoder) -> dict[str, Any]:
    network, schedule = _frozen(model).requires_grad_(True), cosine_schedule()
    dim, copies = model.token_dim, config.head_batch_mul
    prepare(network, config)
    network.train()
    update, ema = _new_update("teacher", network, config), EMA(network, config.ema)
    count = share.part

    def work(num_masked: int) -> None:
        t = _zeros(share.total, num_masked, copies, dtype=torch.long)
        eps = _zeros(share.total, num_masked, copies, dim)
        tokens, visible, masked, labels = _inputs(model, count, num_masked)
        _update(update, share, teacher_loss, network, schedule, tokens, visible, masked, labels, t[:count], eps[:count])

    ratio = functools.partial(masking.masked_count, config.mask_ratios, model.num_tokens, config.sampling.ar_steps)
    cost = _over_masks(ratio, work)
    helpers = {"autoencoder": decoder[0]} if config.eval_every else {}
    state = _state({"network": network}, [update], ema, cost, share.parts * count, helpers)
    sampling = dataclasses.replace(config.sampling, head_steps=config.eval_head_steps or config.sampling.head_steps)
    return _with_looks(state, config, _frozen(model), sampling, None, share, decoder[1])


def _distill(config: DistillConfig, model: MARConfig, share: _Share, decoder: Decoder) -> dict[str, Any]:
    teacher = _frozen(model)
    matching, updates, ema = _matching(teacher, config, config.student)
    ratio = functools.partial(masking.masked_count, config.mask_ratios, model.num_tokens, config.ar_steps)
    cost = _over_masks(ratio, _matching_work(matching, updates, config, model, share))
    if config.context_updates > 1:
        made, again = (
            _over_masks(
                ratio, lambda num_masked, again=again: _contexts(matching, config, model, share, num_masked, again)
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
        rolled = _ar_loop(matching.student, config, config.ar_steps, draw, share.part)
        per_update = config.rollout / config.context_updates / 2  # on average up to half the steps
        cost.operations += per_update * rolled.operations * share.parts
    state = _state(networks, updates, ema, cost, images, {"autoencoder": decoder[0]} if config.eval_every else {})
    sampling = SamplingConfig(ar_steps=config.ar_steps)
    return _with_looks(state, config, matching.student, sampling, config.student, share, decoder[1])


def _with_looks(
    state: dict[str, Any], config: CurveConfig, network: MAR, sampling: SamplingConfig, student: StudentConfig | None,
    share: _Share, decode: Callable[[Tensor], Tensor],
) -> dict[str, Any]:  # fmt: skip
    """The state of a run that also measures a copy of its averaged weights (`marval.curve`)."""
    if not config.eval_every:
        return state
    count, looks = min(DRAWN, share.part, config.eval_images), math.ceil(config.steps / config.eval_every)
    few = min(BATCH, count)
    drawn = _drawing(network, config, sampling, student, count)
    decoded = _decoding(decode, network.config, few)
    what = f"{looks:,} evaluations of {config.eval_images:,} images are counted, but for the network of the features"
    return {
        **state, "between": state["between"] + max(drawn.peak, decoded.peak), "notes": [*state["notes"], what],
        "looks": looks * config.eval_images * (drawn.operations / count + decoded.operations / few),
    }  # fmt: skip


def _rl(
    config: RLConfig, model: MARConfig, share: _Share, decoder: Decoder, student: StudentConfig, whole_teacher: bool
) -> dict[str, Any]:
    student = dataclasses.replace(student, evaluations=1)
    base = _frozen(model, student.guidance_range is not None)
    length, schedule, count = model.num_tokens, cosine_schedule(), share.part
    matching, updates, ema = _matching(base, config, student, whole_teacher)
    network, update = matching.student, updates[0]
    decode = decoder[1]
    reward, held_out = scorers([config.reward]), scorers(listed(config.held_out))
    draw = few_evaluations(network.head, schedule, (student.t_init,))

    counts = masking.masked_counts(length, config.ar_steps)

    def gradient_steps(k: int, n: int = 1) -> None:
        """AR steps k to k + n - 1 with gradients, as in `RewardGradient.loss`, where decoding follows."""

        def loss() -> tuple[Tensor, None]:
            _, _, _, labels = _inputs(model, count, 1)
            orders, z = _zeros(count, length, dtype=torch.long), _zeros(count, length, model.token_dim)
            start = z.clone().requires_grad_()  # tokens of earlier steps
            steps = unmask(
                network, draw, labels, orders, counts[k : k + n + 1], z, guidance=z[:, :1, 0], tokens=start,
                checkpoint_ar_steps=config.checkpoint_ar_steps,
            )  # fmt: skip
            return last(steps).sum(), None

        _update(update, dataclasses.replace(share, parts=1), loss)

    def score() -> None:
        tokens = _zeros(count, length, model.token_dim).requires_grad_()
        with torch.set_grad_enabled(config.algorithm == "gradient"):
            rewards = reward(decode(tokens))
        if rewards.requires_grad:
            rewards.sum().backward()

    scored, after = cost_of(score), 0
    steps = config.grad_ar_steps or config.ar_steps
    plain = _ar_loop(network, config, config.ar_steps, draw, count)
    operations, peak = scored.operations, scored.peak + _bytes(update.parameters)
    if config.algorithm == "group" or config.kl > 0:  # passes over the finished tokens, one AR step at a time
        again = _over(range(config.ar_steps), _policy_step(network, base, update, config, student, share))
        operations, after = operations + _passes(config) * steps * again.operations, again.peak
    if config.algorithm == "group":
        operations += plain.operations
    else:
        with_gradient = _over(range(config.ar_steps), gradient_steps)
        operations += steps * with_gradient.operations + (1 - steps / config.ar_steps) * plain.operations
        peak = max(peak, with_gradient.peak)
        peak += steps * count * length * model.token_dim * 4  # tokens kept between the steps
        if not config.checkpoint_ar_steps and steps > 1:  # and all that a step saves: what a second step adds to one
            two = _over(range(config.ar_steps - 1), lambda k: gradient_steps(k, 2))
            peak += (steps - 1) * (two.peak - with_gradient.peak)
    peak = max(peak, after)
    networks = {"base": base, "student": network}
    if config.anchor > 0:
        work = _matching_work(matching, updates, config, model, share)
        anchor = _over_masks(lambda u: masking.inference_masked_count(length, config.ar_steps, u), work)
        operations += anchor.operations / share.parts
        peak = max(peak, anchor.peak)
        networks |= {"teacher": matching.teacher, "auxiliary": with_part(matching.student, matching.auxiliary)}
    helpers = {"autoencoder": decoder[0], "reward": reward.networks, "held-out rewards": held_out.networks}
    cost = Cost(operations, peak)
    state = _state(networks, updates if config.anchor > 0 else updates[:1], ema, cost, count, helpers)
    looked = _decoding(decode, model, min(256, math.ceil(config.eval_images * share.rows / share.total)))

    def watch(tokens: Tensor) -> None:
        images = decode(tokens)
        reward(images)
        held_out(images)

    watched = _decoding(watch, model, count)
    looks = config.eval_images * (config.range_seeds + math.ceil(config.steps / config.eval_every))
    notes = [*reward.notes, *held_out.notes]
    if config.judge or config.features or config.classifier:
        notes.append("judge, classifier and the network of --features are not counted")
    if config.anchor > 0:
        how = "whole" if whole_teacher else "as a head on the student's backbone"
        notes.append(f"the student's teacher is counted {how}")
    return {
        **state, "between": max(state["between"], looked.peak, watched.peak), "notes": notes,
        "looks": looks * (plain.operations + watched.operations) / count,
    }  # fmt: skip


def _passes(config: DistillConfig | RLConfig) -> int:
    """Updates of the student per batch."""
    return config.inner_updates if isinstance(config, RLConfig) and config.algorithm == "group" else 1


def _policy_step(
    network: MAR, base: MAR, update: Update, config: RLConfig, student: StudentConfig, share: _Share
) -> Callable[[int], None]:
    """`step_loss` of the algorithm at AR step k: the policy gradient of a black box, the divergence to the base."""
    count, length, dim = share.part, network.config.num_tokens, network.config.token_dim
    if config.algorithm == "group":
        count = max(1, count // config.group_size) * config.group_size
    labels, orders, tokens = _zeros(count).long(), _zeros(count, length).long(), _zeros(count, length, dim)
    batch = Batch(labels, [""] * count, orders, tokens, _zeros(count, 1), tokens, frozenset())
    log_prob = _zeros(count, length)
    rollout = Rollout(batch, tokens, tokens, _zeros(count), tokens, log_prob)
    tokenizer = SimpleNamespace(token_range=None)
    model: Any = SimpleNamespace(network=network, student=student, schedule=cosine_schedule(), tokenizer=tokenizer)
    make = GroupGradient if config.algorithm == "group" else RewardGradient
    algorithm = make(model, lambda images, prompts: images.mean((1, 2, 3)), config, base)  # type: ignore[arg-type]
    return lambda k: _update(update, dataclasses.replace(share, parts=1), algorithm.step_loss, rollout, k)


def _evaluate(
    config: EvaluateConfig, model: MARConfig, share: _Share, decoder: Decoder, student: StudentConfig | None,
    stored: SamplingConfig | None,
) -> dict[str, Any]:  # fmt: skip
    network = _frozen(model, bool(student and student.guidance_range))
    default, costs = stored, []
    if default is None:  # as MAR
        default = SamplingConfig(ar_steps=min(64, model.num_tokens), guidance=1.0 if student else 3.0, head_steps=100)
    for given in config.settings():
        sampling = dataclasses.replace(default, **{name: value for name, value in given.items() if value is not None})
        check(student is not None or sampling.evaluations == 1, "--evaluations is for students")
        costs.append(_drawing(network, config, sampling, student, share.part))
    rewards = scorers(listed(config.rewards))
    decoded = _decoding(lambda tokens: rewards(decoder[1](tokens)), model, min(BATCH, share.part))
    operations = decoded.operations / min(BATCH, share.part) * share.part
    operations += statistics.mean(cost.operations for cost in costs)
    cost = Cost(operations, max(decoded.peak, *(cost.peak for cost in costs)))
    helpers = {"autoencoder": decoder[0], "rewards": rewards.networks}
    state = _state({"network": network}, [], None, cost, share.part, helpers)
    return {**state, "notes": ["the network of the features is not counted", *rewards.notes]}


def _inputs(model: MARConfig, count: int, num_masked: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tokens (B, L, D), visible (B, L - N), masked (B, N) and labels (B,)."""
    positions = _zeros(count, model.num_tokens, dtype=torch.long)
    visible, masked = positions.tensor_split([model.num_tokens - num_masked], dim=1)
    return (
        _zeros(count, model.num_tokens, model.token_dim), visible, masked, _zeros(count, dtype=torch.long)
    )  # fmt: skip


def _matching(
    base: MAR, config: DistillConfig | RLConfig, student_config: StudentConfig, whole_teacher: bool = False
) -> tuple[ScoreMatching, list[Update], EMA[Any]]:
    """Student and auxiliary of a frozen teacher, as `marval.distill` makes them; their updates; the average."""
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
        teacher = _frozen(base.config)
        teacher = teacher if whole_teacher else with_head(base, teacher.head)
    matching = ScoreMatching(teacher, student, auxiliary, student_config, config.gsim, cosine_schedule())
    updates = []
    for name, part in (("student", adapters or own_part(student, base)), ("auxiliary", auxiliary)):
        updates.append(_new_update(name, part, config))
    return matching, updates, EMA(updates[0].module, config.ema)


def _contexts(
    matching: ScoreMatching, config: DistillConfig | RLConfig, model: MARConfig, share: _Share, num_masked: int,
    again: bool = False,
) -> list[Context]:  # fmt: skip
    """Contexts of a process's parts, with so many masked tokens; or (``again``) only what a student that moves needs
    when it meets the same ones again."""
    tokens, visible, masked, labels = _inputs(model, share.part, num_masked)
    w, condition = _zeros(share.part, 1), _zeros(share.part, num_masked, model.width)
    with autocast(config.precision, ALONE.device):
        if again:
            context = Context(tokens, visible, masked, labels, w, condition, condition, condition)
            return [matching.refresh(context) for _ in range(share.parts)]
        return [matching.context(tokens, visible, masked, labels, w) for _ in range(share.parts)]


def _matching_work(
    matching: ScoreMatching, updates: list[Update], config: DistillConfig | RLConfig, model: MARConfig, share: _Share
) -> Callable[[int], None]:
    """Contexts, then the updates of the auxiliary and of the student, with so many masked tokens."""
    count, kept = share.part, math.ceil(share.rows / share.part)

    def work(num_masked: int) -> None:
        contexts = _contexts(matching, config, model, share, num_masked)
        kinds = 2 + (contexts[0].student_condition is not contexts[0].teacher_condition)  # of conditions
        shape = contexts[0].teacher_condition.shape
        others = _zeros(kept - share.parts, *shape, kinds)  # contexts of the parts not tried
        size = share.total, num_masked
        z = _zeros(*size, matching.student_config.evaluations, model.token_dim)
        evaluation, t = (_zeros(*size, dtype=torch.long) for _ in range(2))
        noise = Noise(z, evaluation, t, _zeros(*size, model.token_dim)).of(slice(count))
        for _ in range(config.gsim.auxiliary_updates):
            _update(updates[1], share, matching.auxiliary_loss, contexts[0], noise)
        for _ in range(_passes(config)):
            _update(updates[0], share, matching.student_loss, contexts[0], noise)
        del others

    return work


def _drawing(network: MAR, config: Any, sampling: SamplingConfig, student: StudentConfig | None, count: int) -> Cost:
    """Tokens of so many images from a teacher's whole inner chain, or from a student's few steps."""
    noise: Any = SimpleNamespace(device="meta", randn=lambda *shape: _zeros(count, *shape))
    if student is None:
        draw = diffusion_chain(network.head, respace(cosine_schedule(), sampling.head_steps), noise, "ddim")
    else:
        draw = few_evaluations(network.head, cosine_schedule(), student.timesteps(sampling.evaluations), noise)
    needs_null = student is None and sampling.guidance != 1
    return _ar_loop(network, config, sampling.ar_steps, draw, count, needs_null)


def _ar_loop(network: MAR, config: Any, ar_steps: int, draw: Any, count: int, needs_null: bool = False) -> Cost:
    """K AR steps without gradients."""
    model = network.config
    counts = masking.masked_counts(model.num_tokens, ar_steps)

    def step(k: int) -> None:
        tokens, _, _, labels = _inputs(model, count, 1)
        orders = _zeros(count, model.num_tokens, dtype=torch.long)
        w = 2.0 if needs_null else _zeros(count, 1)
        with torch.no_grad(), autocast(config.precision, ALONE.device):
            last(unmask(network, draw, labels, orders, counts[k : k + 2], tokens, guidance=w, needs_null=needs_null))

    cost = _over(range(ar_steps), step)
    return Cost(ar_steps * cost.operations, cost.peak)


def _decoding(decode: Callable[[Tensor], Any], model: MARConfig, count: int) -> Cost:
    """Of so many images at once, without gradients."""

    def work() -> None:
        with torch.no_grad():
            decode(_zeros(count, model.num_tokens, model.token_dim))

    return cost_of(work)


def _decoder(model: MARConfig, pixels: bool) -> Decoder:
    """MAR's KL-16 for latent tokens of 16 channels, the tiny autoencoder TAEF2 for those of 32; else patches of
    pixels."""
    if model.token_dim == 32 and not pixels:
        tiny = TAESD(32, (1, 3, 3, 3), (3, 3, 3, 1), pool=True).to("meta").requires_grad_(False).eval()
        return tiny, lambda x: tiny.decode(x.transpose(1, 2).reshape(len(x), 32, model.grid, model.grid)).clamp(0, 1)
    if model.token_dim != 16 or pixels:
        channels = 3 if model.token_dim % 3 == 0 else 1
        side = model.grid * math.isqrt(model.token_dim // channels)
        return nn.Identity(), lambda tokens: tokens.reshape(len(tokens), channels, side, side).clamp(0, 1)
    kl = KL(KL16, "KL-16").to("meta").requires_grad_(False).eval()

    def decode(tokens: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return kl.decode(tokens.transpose(1, 2).reshape(len(tokens), 16, model.grid, model.grid))

    return kl, decode


def _state(
    networks: dict[str, MAR], updates: list[Update], ema: EMA[Any] | None, cost: Cost, images: int,
    helpers: dict[str, nn.Module],
) -> dict[str, Any]:  # fmt: skip
    """Bytes of everything that lives through a run, and the cost of an update; helpers are never sharded."""
    trained = [p for update in updates for p in update.parameters]
    blocks = [m for n in networks.values() for m in [*n.encoder_blocks, *n.decoder_blocks, n.head]]
    # gradients of one network at a time; what the peak holds beside them is activations and temporaries
    gradients = max((_bytes(update.parameters) for update in updates), default=0)
    memory = {
        "weights": _bytes(_parameters(*networks.values())),
        "gradients": gradients,
        "optimizer": 2 * _bytes(trained),
        "average": _bytes(ema.average) if ema else 0,
        "activations": max(0, cost.peak - gradients),
        "frozen": _bytes([p for module in helpers.values() for p in module.parameters()]),
    }
    return {
        "parameters": {
            "total": _count(*networks.values()), "trained": sum(p.numel() for p in trained),
            "frozen": {name: _count(module) for name, module in helpers.items() if _count(module)},
        },
        "memory": memory,
        "all_gradients": _bytes(trained),
        "between": _bytes(ema.average) if ema else 0,  # a whole copy of the average, when it is saved
        "unit": max((sum(4 * p.numel() for p in block.parameters()) for block in blocks), default=0),
        "operations": cost.operations / images,
        "notes": [],
    }  # fmt: skip


def plan(
    verb: Verb, config: Any, model: MARConfig, processes: int = 1, *, student: StudentConfig | None = None,
    sampling: SamplingConfig | None = None, whole_teacher: bool = False, pixels: bool | None = None,
    images_per_epoch: int | None = None, this_machine: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """What a run with these settings needs; takes seconds and no memory worth mentioning.

    Args:
        config: TrainConfig, DistillConfig, RLConfig or EvaluateConfig, as the verb wants it.
        model: sizes of the MAR, with the data's grid, token_dim and num_classes.
        processes: of torchrun; with ``config.shard`` weights, gradients, optimizer and average are divided by it.
        student: of the model that `rl` starts from or `evaluate` measures; None there is a teacher (`rl`: the default).
        sampling: what the model that `evaluate` measures draws with unless the settings say otherwise.
        whole_teacher: the teacher of the student that `rl` starts from has a backbone of its own (distilled whole).
        pixels: the tokens are patches of pixels, as the tokenizer of a model's folder says. None: those of 16 channels
            are (grey 4x4 patches, as of the recipe fashion-mnist), but for ImageNet's 1,000 classes (imagenet256-*).
        images_per_epoch: training images; 1,281,167 by default if the classes are ImageNet's.
        this_machine: also measure this machine's rate of matrix products, for about a second.

    Returns:
        Plain JSON: ``parameters`` (counts), ``memory`` (bytes of one process; their ``total`` holds ``gradients`` and
        ``activations``, or what is needed ``between`` updates in their place, if that is more), ``batch``,
        ``steps``, ``images``, ``epochs``, ``operations`` (per image, and of the run), ``time`` (seconds per machine),
        ``notes``.

    Raises:
        ValueError: the batch is too small for the processes and parts.
    """
    if processes < 1:
        raise ValueError(f"the number of processes must be at least 1, got {processes}")
    on_cuda = getattr(config, "device", "auto") != "cpu"
    bf16 = config.precision == "bf16" or (config.precision == "auto" and on_cuda)
    settings = dataclasses.replace(config, precision="bf16" if bf16 else "float32")
    total, accumulate = _batch(verb, config, processes)
    rows = math.ceil(total / processes)
    if total < processes * accumulate:
        raise ValueError(f"batch {total} is too small for {processes} processes with {accumulate} parts each: raise it")
    share = _Share(rows, math.ceil(rows / accumulate), min(accumulate, 2), total)
    with without_data():
        if pixels is None:
            pixels = model.token_dim == 16 and model.num_classes != 1000
        decoder, still = _decoder(model, pixels), dataclasses.replace(model, dropout=0.0)
        if verb == "train":
            found = _train(settings, model, share, decoder)
        elif verb == "distill":
            found = _distill(settings, still, share, decoder)
        elif verb == "rl":
            found = _rl(settings, still, share, decoder, student or StudentConfig(), whole_teacher)
        else:
            found = _evaluate(settings, model, share, decoder, student, sampling)
    memory, sharded = found["memory"], bool(getattr(config, "shard", False)) and processes > 1
    if sharded:
        for name in ("weights", "gradients", "optimizer", "average"):
            memory[name] = math.ceil(memory[name] / processes)
        memory["gradients"] = math.ceil(found["all_gradients"] / processes)  # FSDP2 makes those of all networks at once
        memory["gathered"] = 3 * found["unit"]  # a block, the next one on its way, and a block's gradient
    working = memory["gradients"] + memory["activations"]
    memory["total"] = sum(memory.values()) - working + max(working, found["between"])
    if found["between"] > working:
        memory["between"] = found["between"]
    if verb == "evaluate":
        images = config.num_images * len(config.settings())
        steps = math.ceil(config.num_images / total) * len(config.settings())
    else:
        images, steps = config.steps * total, config.steps
    if images_per_epoch is None and getattr(config, "classes", "") == "imagenet":
        images_per_epoch = IMAGENET_IMAGES
    read = images / getattr(config, "context_updates", 1)
    operations = found["operations"] * images + found.get("looks", 0)  # at held-out images between updates
    rates = {"H200": H200_SHARE[verb] * H200[0] * processes}
    if this_machine:
        rates = {"this machine": machine_rate(), **rates}
    return {
        "verb": verb, "processes": processes, "sharded": sharded, "precision": settings.precision,
        "parameters": found["parameters"], "memory": memory,
        "batch": {"total": total, "process": rows, "part": share.part, "parts": accumulate},
        "steps": steps, "images": images,
        "epochs": read / images_per_epoch if images_per_epoch and verb != "evaluate" else None,
        "operations": {"image": found["operations"], "run": operations},
        "time": {name: {"rate": rate, "seconds": operations / rate} for name, rate in rates.items()},
        "notes": found["notes"],
    }  # fmt: skip


def _batch(verb: Verb, config: Any, processes: int) -> tuple[int, int]:
    """Images of all processes at a time, and parts of a process's share."""
    if verb == "evaluate":
        return min(config.num_images, min(DRAWN, config.batch) * processes), 1
    return config.batch, config.accumulate


def machine_rate() -> float:
    """Operations per second of matrix products here: bf16 on a CUDA GPU, float32 on the CPU; measured."""
    cuda = torch.cuda.is_available()
    return matmul_rate(torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32)


def _duration(seconds: float) -> str:
    for unit, name in ((365.25 * 86400, "years"), (86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.1f} seconds"


def table(plan: dict[str, Any]) -> str:
    """The plan as text."""
    memory, batch, operations, parameters = (plan[x] for x in ("memory", "batch", "operations", "parameters"))
    held = "split over the processes (FSDP2)" if plan["sharded"] else "whole in each process"
    meaning = {
        "weights": held,
        "gradients": "of one network at a time",
        "optimizer": "two moments per trained weight",
        "average": "of the trained weights, for evaluation",
        "activations": f"largest sum during an update of {batch['part']} images, temporaries included",
        "frozen": ", ".join(f"{name} {count / 1e6:,.0f} M" for name, count in parameters["frozen"].items()),
        "gathered": "two whole blocks and a block's gradient (estimate)",
        "between": "instead of gradients and activations, while images are drawn or an average is saved",
        "total": "without PyTorch's own needs and fragmentation: leave 10 % free",
    }
    processes = f"{plan['processes']} process{'es' if plan['processes'] > 1 else ''}"
    parts = f", in {batch['parts']} parts of {batch['part']}" if batch["parts"] > 1 else ""
    epochs = f" ({plan['epochs']:,.1f} epochs)" if plan["epochs"] else ""
    lines = [
        f"{plan['verb']}, {processes}, {plan['precision']}: planned on the meta device, nothing was read or allocated",
        f"  parameters   {parameters['total'] / 1e6:,.1f} M, {parameters['trained'] / 1e6:,.1f} M of them trained",
        f"  batch        {batch['total']:,} images, {batch['process']:,} per process{parts}",
        "  memory per process",
    ]
    lines += [f"    {name:<12}{size / GIB:8.2f} GiB  {meaning[name]}" for name, size in memory.items() if size]
    lines += [
        f"  steps        {plan['steps']:,}",
        f"  images       {plan['images']:,}{epochs}",
        f"  operations   {operations['image'] / 1e12:,.3f} T per image, {operations['run'] / 1e18:,.4g} E in all",
    ]
    for name, entry in plan["time"].items():
        if name == "H200":
            how = f"{processes} on H200, each at {H200_SHARE[plan['verb']]:.0%} of {H200[0] / 1e12:.0f} TFLOP/s"
        else:
            how = f"this machine alone at its measured {entry['rate'] / 1e12:.3g} TFLOP/s of matrix products"
        lines.append(f"  time         {_duration(entry['seconds'])} with {how}")
    return "\n".join([*lines, *(f"  note         {note}" for note in plan["notes"])])
