"""MARVAL-RL: post-train the one-step student on rewards, anchored to its teacher (MARVAL, arXiv 2511.15190).

The student is the policy and an action is a whole image after all K AR steps. How the reward becomes a gradient:
marval.algorithms; how hacking is noticed: marval.monitor; which model is kept: marval.selection.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from marval import rng
from marval.algorithms import GroupGradient, RewardGradient, draw_batch, images_per_group
from marval.checkpoint import save_tensors
from marval.config import RLConfig
from marval.distributed import connect, template, whole, whole_copy
from marval.ema import EMA
from marval.matching import ScoreMatching, draw_noise, load_scores
from marval.models.lora import adapt
from marval.monitor import Monitor, class_in_turn, trial_size
from marval.networks import averaged_network, copy_network, own_part, shard_networks, with_head
from marval.pipeline import Pipeline
from marval.reference import check_reference
from marval.reward_checks import check_reward, check_varies
from marval.reward_files import check_classifier, check_files, code_of, listed
from marval.rewards import WeightedSum, calibrate, class_prompts, load_reward
from marval.rng import Stream
from marval.run import Run, check_folder
from marval.scoring import Reward, during
from marval.selection import Selection
from marval.shipped import model_folder
from marval.tokenizers import to_float
from marval.train import save_sample_grid
from marval.update import Update, add_weighted, autocast, prepare

CALIBRATION = 200
"""Images on which the parts of a weighted sum get mean 0 and deviation 1, and a black box must not be constant."""


def check_inputs(config: RLConfig, student_folder: Path, out: Path, resume: bool) -> dict[str, Path]:
    """Folders and files that the run starts from, as `Run` takes them; checks what can be checked without loading them.

    Raises:
        ValueError: the files of a reward or a network, or a reference, do not exist, or ``out`` cannot hold the run.
    """
    rewards = [config.reward, *listed(config.held_out)]
    for spec in rewards:
        check_files(spec, config.classifier)
    if config.judge:
        check_classifier(config.judge)
    if config.reference:
        check_reference(config.reference)
    folders = {"student": str(student_folder), "classifier": config.classifier, "judge": config.judge}
    inputs = {name: Path(path) for name, path in folders.items() if path} | code_of(rewards)
    check_folder(out, "rl", config, resume, inputs)
    return inputs


def prepare_reward(config: RLConfig, model: Pipeline, prompts: list[str], batch_size: int) -> Reward:
    """The reward that the settings name, tried on images of the starting student; a weighted sum is calibrated on them.

    Args:
        prompts: one per class. batch_size: of the drawing.

    Raises:
        ValueError: there is no such reward, it does not suit the algorithm, or it fails or teaches nothing on them.
    """

    def drawn(count: int) -> tuple[Tensor, list[str]]:
        """Images of the starting student, classes in turn, and their prompts; the same on all processes."""
        asked = [class_in_turn(i, count, len(prompts)) for i in range(count)]
        images = model.sample(asked, seed=config.seed, batch_size=batch_size)
        return to_float(torch.from_numpy(images)).to(model.device), [prompts[label] for label in asked]

    reward = load_reward(
        config.reward, classifier=config.classifier, class_names=model.class_names, template=config.prompt,
        device=model.device,
    )  # fmt: skip
    trial = check_reward(reward, *drawn(trial_size(len(prompts))))
    if config.algorithm == "group" and bool((trial == trial[0]).all()):
        check_varies(reward, *drawn(CALIBRATION))
    if config.algorithm == "gradient" and not reward.differentiable:
        raise ValueError(f"reward {config.reward!r} is not differentiable: use --algorithm group")
    return calibrate(reward, *drawn(CALIBRATION)) if isinstance(reward, WeightedSum) else reward


def warn_of_nothing_learned(step: int, row: dict[str, float]) -> None:
    """Say on stderr if no reward of the logged update ``step`` could teach anything."""
    if max(row.get("dead_groups", 0), row.get("above_hinge", 0)) <= 0.999:
        return
    what, look = "all rewards are above --hinge", "at it"
    if "dead_groups" in row:
        what, look = "the rewards of every group are equal", "at the reward, --std and --hinge"
    line = f"WARNING update {step}: {what}, so nothing is learned from them; look {look}"
    tqdm.write(line, file=sys.stderr)


def rl(config: RLConfig, student_folder: str | Path, out: str | Path, resume: bool = False) -> Pipeline:
    """Run `marval rl`: returns the averaged model with the best held-out score, which is also saved in ``out``.

    Args:
        student_folder: of `marval distill`, or the name of a student that comes with marval. out: a new folder.
        resume: go on with the run in ``out``, if there is one.

    Raises:
        ValueError: settings, reward, networks, student or folder do not go together; before the first update.
        RewardError, FloatingPointError: the reward or an update failed; says where the best model so far lies.
    """
    student_folder, out = model_folder(student_folder), Path(out)
    world = connect(config.device, config.shard)
    parts = world.parts(config.batch, config.accumulate, images_per_group(config))
    inputs = check_inputs(config, student_folder, out, resume)
    base = Pipeline.load(student_folder, world.device)
    if base.student is None:
        raise ValueError(f"{student_folder} holds a teacher: RL starts from a student of `marval distill`")
    if config.anchor > 0 and not (file := student_folder / "scores.safetensors").exists():
        made = "start from a folder of `marval distill`, or of `marval rl` with an anchor"
        raise ValueError(f"{file} does not exist, which --anchor {config.anchor:g} needs: {made}, or give --anchor 0")
    base.student = dataclasses.replace(base.student, evaluations=1)  # the policy; what comes out of RL has one, too
    base.network.requires_grad_(False)
    ranges = base.student.guidance_range is not None
    student = copy_network(base.network, "head" if config.trained == "head" else "all", ranges)
    sampling = dataclasses.replace(base.sampling, ar_steps=config.ar_steps, evaluations=1)
    model = Pipeline(student, base.tokenizer, base.class_names, sampling, base.student)
    model.settings()
    model.require_images()
    prompts, length = class_prompts(config.prompt, model.class_names), student.config.num_tokens
    reward = prepare_reward(config, model, prompts, parts[0].own.stop)  # no more at once than in an update
    selection = Selection(config, Monitor.make(config, model, reward, world))

    blank = template(student)
    adapters = adapt(student, config.lora_rank, config.seed) if config.trained == "lora" else None
    anchored = load_scores(student_folder, base.network, ranges) if config.anchor > 0 else None
    blank_part = template(adapters) if adapters else blank.head if config.trained == "head" else blank
    scoring = [anchored[0], with_head(student, anchored[1])] if anchored else []
    for network in (base.network, student, *scoring):
        prepare(network, config)
    student, *teachers = shard_networks(world, base.network, student, *([anchored[0]] if anchored else []))
    model = Pipeline(student, base.tokenizer, base.class_names, sampling, base.student)
    student_part = adapters or own_part(student, base.network)
    adam = {"betas": (0.0, 0.999), "fused": True}
    optimizer = torch.optim.Adam(student_part.parameters(), config.gsim.lr, **adam)
    student_update = Update("student", student_part, optimizer, config, world)
    ema: EMA[Any] = EMA(student_part, config.ema, blank_part)
    stateful: dict[str, Any] = {"student": student_part, "optimizer": optimizer, "ema": ema}
    matching = auxiliary_update = None
    if anchored:
        (teacher,), auxiliary = teachers, anchored[1]
        world.shard(auxiliary)
        matching = ScoreMatching(teacher, student, auxiliary, base.student, config.gsim, model.schedule)
        auxiliary_optimizer = torch.optim.Adam(auxiliary.parameters(), config.gsim.auxiliary_lr, **adam)
        auxiliary_update = Update("auxiliary", auxiliary, auxiliary_optimizer, config, world)
        stateful |= {"auxiliary": auxiliary, "auxiliary_optimizer": auxiliary_optimizer}
    algorithms = {"gradient": RewardGradient, "group": GroupGradient}
    algorithm = algorithms[config.algorithm](model, reward, config, base.network)
    unanchored = matching is None  # then the reward's or the KL's gradient is the last of an update
    run = Run(out, "rl", config, resume, world, inputs)
    start = run.restore(stateful, selection.state)
    selection.begin()

    def averaged() -> Pipeline:
        provenance = base.provenance | {"verb": "rl", "reward": config.reward}
        if adapters is None:
            network = averaged_network(student, ema, blank)
        else:
            tensors = {name: whole(tensor) for name, tensor in student.state_dict().items()}
            network = whole_copy(blank, ema.averaged().merged(tensors))
        return Pipeline(network, model.tokenizer, model.class_names, sampling, base.student, provenance)

    def evaluate(step: int) -> None:
        current = averaged()
        if selection.measure(current, step, run) and world.is_main:
            current.save(out)  # at once: a run that dies leaves it

    with selection.telling_where(out):
        if start == 0:
            evaluate(0)
        progress = run.progress(start)
        for step in progress:
            if selection.state["stop"]:  # a resumed run that had stopped
                progress.stop(f"stopped: {selection.state['stop']}")
                break
            # ---- draw: the numbers of the whole batch; each part takes its rows
            g = rng.generator(config.seed, Stream.RL, step, device=world.device)
            batch, num_masked = draw_batch(config, model, prompts, g, rng.generator(config.seed, Stream.RL_HOST, step))
            visible, masked = batch.orders.tensor_split([length - num_masked], dim=1)
            visible = visible.sort(dim=1).values
            noise_shape = (config.batch, num_masked, student.config.token_dim)

            # ---- roll out and score whole images
            rollouts, watched = [], {}
            for rows, _, weight in parts:
                with during(f"update {step + 1}"):
                    last = unanchored and rows is parts[-1].rows
                    rollouts.append(algorithm.rollout(batch[rows], student_update, weight, last))
                add_weighted(watched, weight, rollouts[-1].watched(config.hinge))

            # ---- update the auxiliary of the anchor, at a state that the rollouts passed through
            contexts = []
            if matching is not None and auxiliary_update is not None:
                with torch.no_grad(), autocast(config.precision, world.device):
                    for rollout, (rows, _, _) in zip(rollouts, parts, strict=True):
                        given = visible[rows], masked[rows], batch.labels[rows], batch.w[rows]
                        contexts.append(matching.context(rollout.tokens, *given))
                for _ in range(config.gsim.auxiliary_updates):
                    noise = draw_noise(*noise_shape, config.gsim.auxiliary_t_range, g)
                    for context, (rows, _, weight) in zip(contexts, parts, strict=True):
                        auxiliary_update.backward(
                            matching.auxiliary_loss, context, noise.of(rows), weight=weight,
                            last=context is contexts[-1],
                        )  # fmt: skip
                    auxiliary_update.step(step)

            # ---- update the student: by the reward, by the KL to its start, by GSIM towards its teacher
            grad_norm = torch.zeros(())
            for inner in range(config.inner_updates if config.algorithm == "group" else 1):
                if inner > 0 and matching is not None and matching.backbone_moves:
                    with autocast(config.precision, world.device):
                        contexts = [matching.refresh(context) for context in contexts]
                student_watched = {}
                for rollout, (_, _, weight) in zip(rollouts, parts, strict=True):
                    last = unanchored and rollout is rollouts[-1]
                    values = algorithm.backward(rollout, student_update, weight, last)
                    add_weighted(student_watched, weight, values)
                if matching is not None:
                    noise = draw_noise(*noise_shape, config.gsim.t_range, g)
                    for context, (rows, _, weight) in zip(contexts, parts, strict=True):
                        _, values = student_update.backward(
                            matching.student_loss, context, noise.of(rows), weight=config.anchor_at(step) * weight,
                            last=context is contexts[-1],
                        )  # fmt: skip
                        add_weighted(student_watched, weight, {"y": values["y"]})
                watched |= student_watched
                grad_norm = student_update.step(step)
                ema.update(student_part)

            # ---- log, evaluate, save, show
            done = step + 1
            if run.is_due(config.log_every, done):
                row = run.log(done, **world.means(watched), grad_norm=grad_norm)
                progress.show({name: row[name] for name in ("reward", "grad_norm", "clipped")})
                if world.is_main:
                    warn_of_nothing_learned(done, row)
            if run.is_due(config.eval_every, done):
                evaluate(done)
            stop = bool(selection.state["stop"])
            save, show = stop or run.is_due(config.save_every, done), run.is_due(config.sample_every, done)
            if world.gathers and save:
                current, scores = selection.best_of(averaged()), matching.scores() if matching is not None else {}
                if world.is_main:
                    if scores:
                        save_tensors(out / "scores.safetensors", scores)
                    current.save(out)
                del current, scores  # whole copies
            if world.gathers and show:
                current = averaged()
                if world.is_main:
                    save_sample_grid(run, current, done)
                del current  # a whole copy
            if save:
                run.save(done)  # last: a killed run repeats what the checkpoint does not know
            if stop:
                progress.stop(f"stopped: {selection.state['stop']}")
                break
    return selection.best_of(averaged()).to(world.device)
