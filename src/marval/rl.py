"""MARVAL-RL: post-train the one-step student on rewards, anchored to its teacher (MARVAL, arXiv 2511.15190).

The student is the policy and an action is a whole image after all K AR steps. How the reward becomes a gradient:
marval.algorithms; how hacking is noticed: marval.monitor.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from marval import masking, policy, rng
from marval.algorithms import Batch, GroupGradient, RewardGradient
from marval.checkpoint import save_tensors
from marval.config import RLConfig, warn
from marval.curve import needs_features
from marval.distributed import connect, template, whole, whole_copy
from marval.ema import EMA
from marval.matching import ScoreMatching, draw_noise, load_scores
from marval.models.lora import adapt
from marval.models.mar import MAR
from marval.monitor import Monitor, class_in_turn, image_statistics, trial_size
from marval.networks import averaged_network, copy_network, own_part, shard_networks, with_head
from marval.pipeline import Pipeline
from marval.reward_files import check_classifier, check_files, code_of, listed
from marval.rewards import (
    RewardError,
    WeightedSum,
    calibrate,
    check_reward,
    check_varies,
    class_prompts,
    during,
    load_reward,
)
from marval.run import Run, check_folder
from marval.shipped import model_folder
from marval.tokenizers import to_float
from marval.train import save_sample_grid
from marval.update import Update, add_weighted, autocast, prepare

CALIBRATION = 200
"""Images on which the parts of a weighted sum get mean 0 and deviation 1, and a black box must not be constant."""
COLLAPSES = 3
"""Evaluations of a collapsed model in a row that stop a run, however patient it is."""


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
    best: dict[str, Any] = {"score": -float("inf"), "step": 0, "misses": 0, "collapsed": 0, "weights": None}
    best |= {"ranges": {}, "stop": "", "units": None}
    try:
        return align(config, student_folder, out, resume, best)
    except (RewardError, FloatingPointError) as error:
        if best["weights"] is None:
            raise
        raise type(error)(f"{error}; the best model so far, of update {best['step']}, is in {out}") from error


def align(config: RLConfig, student_folder: Path, out: Path, resume: bool, best: dict[str, Any]) -> Pipeline:
    """`rl`. What it knows of the best model is in ``best``."""
    world = connect(config.device, config.shard)
    group = config.group_size if config.algorithm == "group" else 1
    parts = world.parts(config.batch, config.accumulate, group)
    for spec in (config.reward, *listed(config.held_out)):
        check_files(spec, config.classifier)
    if config.judge:
        check_classifier(config.judge)
    if config.reference:
        needs_features(config.reference)
    folders = {"student": str(student_folder), "classifier": config.classifier, "judge": config.judge}
    inputs = {name: Path(path) for name, path in folders.items() if path}
    inputs |= code_of([config.reward, *listed(config.held_out)])
    check_folder(out, "rl", config, resume, inputs)
    base = Pipeline.load(student_folder, world.device)
    if base.student is None:
        raise ValueError(f"{student_folder} holds a teacher: RL starts from a student of `marval distill`")
    if config.anchor > 0 and not (file := student_folder / "scores.safetensors").exists():
        made = "start from a folder of `marval distill`, or of `marval rl` with an anchor"
        raise ValueError(f"{file} does not exist, which --anchor {config.anchor:g} needs: {made}, or give --anchor 0")
    base.student = dataclasses.replace(base.student, evaluations=1)  # the policy; what comes out of RL has one, too
    base.network.requires_grad_(False)
    guidance_range = base.student.guidance_range
    student = copy_network(base.network, "head" if config.trained == "head" else "all", guidance_range is not None)
    sampling = dataclasses.replace(base.sampling, ar_steps=config.ar_steps, evaluations=1)
    model = Pipeline(student, base.tokenizer, base.class_names, sampling, base.student)
    model.settings()
    model.require_images()
    length, dim, num_classes = student.config.num_tokens, student.config.token_dim, student.config.num_classes
    prompts = class_prompts(config.prompt, model.class_names)
    reward = load_reward(
        config.reward, classifier=config.classifier, class_names=model.class_names, template=config.prompt,
        device=world.device,
    )  # fmt: skip

    def drawn(count: int) -> tuple[Tensor, list[str]]:
        """Images of the starting student, classes in turn, and their prompts; the same on all processes. No more are
        decoded at once than in an update."""
        asked = [class_in_turn(i, count, num_classes) for i in range(count)]
        images = model.sample(asked, seed=config.seed, batch_size=parts[0].own.stop)
        return to_float(torch.from_numpy(images)).to(world.device), [prompts[label] for label in asked]

    trial = check_reward(reward, *drawn(trial_size(num_classes)))
    if config.algorithm == "group" and bool((trial == trial[0]).all()):
        check_varies(reward, *drawn(CALIBRATION))
    if config.algorithm == "gradient" and not reward.differentiable:
        raise ValueError(f"reward {config.reward!r} is not differentiable: use --algorithm group")
    if isinstance(reward, WeightedSum):
        reward = calibrate(reward, *drawn(CALIBRATION))
        best["units"] = [reward.means, reward.stds]
    monitor = Monitor.make(config, model, reward, world)

    blank = template(student)
    adapters = adapt(student, config.lora_rank, config.seed) if config.trained == "lora" else None
    anchored = None
    if config.anchor > 0:
        anchored = load_scores(student_folder, base.network, guidance_range is not None)
    blank_part = template(adapters) if adapters else blank.head if config.trained == "head" else blank
    scoring = [anchored[0], with_head(student, anchored[1])] if anchored else []
    for network in (base.network, student, *scoring):
        prepare(network, config)
    student, *teachers = shard_networks(world, base.network, student, *([anchored[0]] if anchored else []))
    model = Pipeline(student, base.tokenizer, base.class_names, sampling, base.student)
    part = adapters or own_part(student, base.network)
    optimizer = torch.optim.Adam(part.parameters(), config.gsim.lr, betas=(0.0, 0.999), fused=True)
    update = Update("student", part, optimizer, config, world)
    ema: EMA[Any] = EMA(part, config.ema, blank_part)
    stateful: dict[str, Any] = {"student": part, "optimizer": optimizer, "ema": ema}
    matching = auxiliary_update = None
    if anchored:
        (teacher,), auxiliary = teachers, anchored[1]
        world.shard(auxiliary)
        matching = ScoreMatching(teacher, student, auxiliary, base.student, config.gsim, model.schedule)
        auxiliary_optimizer = torch.optim.Adam(
            auxiliary.parameters(), config.gsim.auxiliary_lr, betas=(0.0, 0.999), fused=True
        )
        auxiliary_update = Update("auxiliary", auxiliary, auxiliary_optimizer, config, world)
        stateful |= {"auxiliary": auxiliary, "auxiliary_optimizer": auxiliary_optimizer}
    algorithms = {"gradient": RewardGradient, "group": GroupGradient}
    algorithm = algorithms[config.algorithm](model, reward, config, base.network)
    run = Run(out, "rl", config, resume, world, inputs)
    start = run.restore(stateful, best)
    if isinstance(reward, WeightedSum):
        reward.means, reward.stds = best["units"]
    if not monitor.independent:
        what = "nothing is watched that the reward does not optimise: hacking shows in image statistics alone"
        warn(f"{what}; add --held-out, --judge or --features that ask another network")

    def averaged() -> Pipeline:
        provenance = base.provenance | {"verb": "rl", "reward": config.reward, "best_update": best["step"]}
        if adapters is None:
            network = averaged_network(student, ema, blank)
        else:
            tensors = {name: whole(tensor) for name, tensor in student.state_dict().items()}
            network = whole_copy(blank, ema.averaged().merged(tensors))
        return Pipeline(network, model.tokenizer, model.class_names, sampling, base.student, provenance)

    def own_part_of(network: MAR) -> nn.Module:
        return network.head if config.trained == "head" else network

    def the_best() -> Pipeline:
        """The averaged model of the best evaluation."""
        result = averaged()
        own_part_of(result.network).load_state_dict(best["weights"])
        return result

    def evaluate(step: int) -> None:
        """Look at the averaged model; keep it if it is the best so far and has not collapsed; say whether to stop."""
        candidate = averaged()
        with during(f"evaluation of update {step}"):
            values = monitor.measure(candidate)
            if step == 0:
                best["ranges"] = monitor.ranges(candidate, values)
        alarms = monitor.alarms(values, best["ranges"])
        for name in alarms if world.is_main else ():
            tqdm.write(monitor.line(step, name, values[name], best["ranges"]), file=sys.stderr)
        stated = monitor.stated(best["ranges"]) if step == 0 else {}
        run.log(step, **values, alarms=len(alarms), **{f"alarm_{name}": far for name, far in alarms.items()}, **stated)
        score = monitor.criterion(values)
        collapsed = monitor.collapsed(alarms, values, best["ranges"])
        if score > best["score"] and not collapsed:
            weights = {name: v.cpu().clone() for name, v in own_part_of(candidate.network).state_dict().items()}
            best.update(score=score, step=step, misses=0, weights=weights)
            candidate.provenance["best_update"] = step
            if world.is_main:
                candidate.save(out)  # at once: a run that dies leaves it
        else:
            best["misses"] += 1
        best["collapsed"] = best["collapsed"] + 1 if collapsed else 0
        reached = config.target is not None and values["reward_heldout"] >= config.target
        if step > 0 and reached and not collapsed:
            what = f"held-out reward {values['reward_heldout']:.4g} has reached the target {config.target:g}"
            best["stop"] = f"{what}; best is update {best['step']}"
        elif 0 < min(config.patience, COLLAPSES) <= best["collapsed"]:
            best["stop"] = f"collapsed: {collapsed}; best is update {best['step']}"
        elif 0 < config.patience <= best["misses"]:
            best["stop"] = f"no better held-out score since update {best['step']}"

    if start == 0:
        evaluate(0)
    progress = run.progress(start)
    for step in progress:
        if best["stop"]:  # a resumed run that had stopped
            progress.stop(f"stopped: {best['stop']}")
            break
        # ---- draw: the numbers of the whole batch; each part takes its rows
        g = rng.generator(config.seed, 5, step, device=world.device)
        host = rng.generator(config.seed, 6, step)
        count = config.batch // group
        labels = torch.randint(num_classes, (count,), generator=g, device=world.device)
        orders = torch.rand(count, length, generator=g, device=world.device).argsort(dim=1)
        low, high = guidance_range or (base.student.guidance,) * 2
        w = low + (high - low) * torch.rand(count, 1, generator=g, device=world.device)
        z, exploration = torch.randn(2, config.batch, length, dim, generator=g, device=world.device)
        z = z[::group] * model.sampling.temperature
        labels, orders, w, z = (x.repeat_interleave(group, dim=0) for x in (labels, orders, w, z))
        masked_count = masking.inference_masked_count(length, config.ar_steps, float(torch.rand((), generator=host)))
        grad_steps = policy.gradient_steps(config.ar_steps, config.grad_ar_steps, config.grad_ar_choice, host)
        batch = Batch(labels, [prompts[i] for i in labels.tolist()], orders, z, w, exploration, grad_steps)
        visible, masked = orders.tensor_split([length - masked_count], dim=1)
        visible = visible.sort(dim=1).values
        noise_shape = (config.batch, masked_count, dim)
        watched: dict[str, Tensor] = {}
        anchor = config.anchor_at(step)

        # ---- roll out and score whole images
        rollouts = []
        for rows, _, weight in parts:
            with during(f"update {step + 1}"):
                rollout = algorithm.rollout(
                    batch[rows], update, weight, last=matching is None and rows is parts[-1].rows
                )
            add_weighted(watched, weight, {"reward": rollout.rewards.mean()} | image_statistics(rollout.images))
            if config.hinge is not None:
                add_weighted(watched, weight, {"above_hinge": (rollout.rewards >= config.hinge).float().mean()})
            rollouts.append(rollout)

        # ---- anchor: GSIM towards the teacher, at a state that the rollouts passed through
        contexts = []
        if matching is not None and auxiliary_update is not None:
            for (rows, _, _), rollout in zip(parts, rollouts, strict=True):
                with torch.no_grad(), autocast(config.precision, world.device):
                    tokens = rollout.tokens
                    contexts.append(matching.context(tokens, visible[rows], masked[rows], labels[rows], w[rows]))
            for _ in range(config.gsim.auxiliary_updates):
                noise = draw_noise(*noise_shape, config.gsim.auxiliary_t_range, g)
                for context, (rows, _, weight) in zip(contexts, parts, strict=True):
                    auxiliary_update.backward(
                        matching.auxiliary_loss, context, noise.of(rows), weight=weight,
                        last=context is contexts[-1],
                    )  # fmt: skip
                auxiliary_update.step(step)

        # ---- update the student
        grad_norm = torch.zeros(())
        for inner in range(config.inner_updates if config.algorithm == "group" else 1):
            if inner > 0 and matching is not None and matching.backbone_moves:
                with autocast(config.precision, world.device):
                    contexts = [matching.refresh(context) for context in contexts]
            update_watched: dict[str, Tensor] = {}
            for rollout, (_, _, weight) in zip(rollouts, parts, strict=True):
                values = algorithm.backward(rollout, update, weight, last=matching is None and rollout is rollouts[-1])
                add_weighted(update_watched, weight, values)
            if matching is not None:
                noise = draw_noise(*noise_shape, config.gsim.t_range, g)
                for context, (rows, _, weight) in zip(contexts, parts, strict=True):
                    _, values = update.backward(
                        matching.student_loss, context, noise.of(rows), weight=anchor * weight,
                        last=context is contexts[-1],
                    )  # fmt: skip
                    add_weighted(update_watched, weight, {"y": values["y"]})
            watched |= update_watched
            grad_norm = update.step(step)
            ema.update(part)

        # ---- log, evaluate, save, show
        done = step + 1
        if run.is_due(config.log_every, done):
            row = run.log(done, **world.means(watched), grad_norm=grad_norm)
            progress.show({name: row[name] for name in ("reward", "grad_norm", "clipped")})
            if max(row.get("dead_groups", 0), row.get("above_hinge", 0)) > 0.999 and world.is_main:
                what, look = "all rewards are above --hinge", "at it"
                if "dead_groups" in row:
                    what, look = "the rewards of every group are equal", "at the reward, --std and --hinge"
                line = f"WARNING update {done}: {what}, so nothing is learned from them; look {look}"
                tqdm.write(line, file=sys.stderr)
        if run.is_due(config.eval_every, done):
            evaluate(done)
        stop = bool(best["stop"])
        save, show = stop or run.is_due(config.save_every, done), run.is_due(config.sample_every, done)
        if world.gathers and save:
            current, tensors = the_best(), matching.scores() if matching is not None else {}
            if world.is_main:
                if tensors:
                    save_tensors(out / "scores.safetensors", tensors)
                current.save(out)
            del current, tensors  # whole copies
        if world.gathers and show:
            current = averaged()
            if world.is_main:
                save_sample_grid(run, current, done)
            del current
        if save:
            run.save(done)  # last: a killed run repeats what the checkpoint does not know
        if stop:
            progress.stop(f"stopped: {best['stop']}")
            break
    return the_best().to(world.device)
