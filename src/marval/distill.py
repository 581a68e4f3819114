"""Distil a teacher's inner chain into one step or a few: GSIM (MARVAL, arXiv 2511.15190; equations in marval.gsim)."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marval import masking, rng
from marval.batches import batch_indices, batch_tokens
from marval.checkpoint import save_tensors
from marval.config import DistillConfig, GSIMConfig
from marval.curve import Curve, best_folder
from marval.data import ImageDataset, load_data
from marval.distributed import connect, template
from marval.ema import EMA
from marval.latents import LatentDataset
from marval.matching import Context, ScoreMatching, draw_guidance, draw_noise, read_scores
from marval.models.autoencoders import autoencoder_digest
from marval.models.head import DiffusionHead
from marval.models.mar import MAR, gather_tokens
from marval.networks import averaged_network, copy_auxiliary, copy_network, own_part, shard_networks, with_part
from marval.pipeline import Pipeline
from marval.rng import Stream
from marval.run import Run
from marval.sampling import few_evaluations, last, unmask
from marval.shipped import model_folder
from marval.tokenizers import LatentTokenizer
from marval.train import save_sample_grid
from marval.update import Update, add_weighted, autocast, caller, prepare, warmup_then_cosine

DIVERGED = 3.0
"""Standard deviation of the student's tokens, over that of the data or of its own first tokens, beyond which a run is
stopped: adversaries that have lost each other do not come back (docs/LOG.md, 2026-11-26, fourteenth session)."""


def make_student(teacher: Pipeline, config: DistillConfig) -> Pipeline:
    """The teacher as a student before any training: the same weights, evaluated once, or a few times."""
    guidance_input = config.student.guidance_range is not None
    network = copy_network(teacher.network, config.trained, guidance_input)
    sampling = dataclasses.replace(
        teacher.sampling, ar_steps=config.ar_steps, guidance=config.student.guidance, guidance_schedule="constant"
    )
    return Pipeline(network, teacher.tokenizer, teacher.class_names, sampling, config.student)


def go_on_from(
    folder: Path, model: Pipeline, auxiliary: DiffusionHead | MAR, teacher: Pipeline, config: DistillConfig
) -> None:
    """Give the fresh student ``model`` the weights of a trained one, and the auxiliary its own, if the folder has them:
    those of the head, which of several evaluations knows the first; a backbone of its own starts as the student's.

    Raises:
        ValueError: the folder holds no student of this kind, or that of another teacher, as far as its scores tell.
    """
    begun = Pipeline.load(folder)
    if begun.student is None:
        raise ValueError(f"--start {folder} holds a teacher: give a folder of `marval distill`")
    names = ["t_init", "evaluations", "guidance_range"] + ["guidance"] * (config.student.guidance_range is None)
    for name in names:
        its, wanted = getattr(begun.student, name), getattr(config.student, name)
        if its != wanted:
            value = " ".join(map(str, its)) if isinstance(its, tuple) else its
            remedy = f"give its own, --student.{name.replace('_', '-')} {value}"
            raise ValueError(f"--start {folder} has {name} {its}, the run {wanted}: {remedy}")
    base, state = teacher.network.state_dict(), begun.network.state_dict()
    if begun.network.config != teacher.network.config or begun.class_names != teacher.class_names:
        raise ValueError(
            f"--start {folder} has other sizes or classes than the teacher: give a student of this teacher"
        )
    backbone = [name for name in state if not name.startswith("head.")]
    if config.trained == "head" and not all(torch.equal(state[name], base[name].cpu()) for name in backbone):
        what = "a backbone of its own, or one in half precision"
        raise ValueError(f"--start {folder} has {what}: give --trained all")
    model.network.load_state_dict(state)
    if not (folder / "scores.safetensors").exists():
        return
    scores = read_scores(folder)
    if any(not torch.equal(x, base[name].cpu()) for name, x in scores["teacher"].items()):
        raise ValueError(f"--start {folder} is a student of another teacher: give its own by --teacher")
    head = auxiliary
    if isinstance(auxiliary, MAR):
        auxiliary.load_state_dict(auxiliary.state_dict() | {name: state[name] for name in backbone})
        head = auxiliary.head
    head.load_state_dict(head.state_dict() | scores["auxiliary"])


def check_data(data: ImageDataset | LatentDataset, teacher: Pipeline) -> None:
    """Raises ValueError unless the images and classes are of the kind that the teacher was trained on."""
    tokenizer = teacher.tokenizer
    wanted = f"images of {tokenizer.image_size} pixels and {tokenizer.image_channels} channels"
    fits = False
    if isinstance(data, LatentDataset):
        shape = data.shards[0].shape[2:]
        found = f"latents {'x'.join(map(str, shape))} of images of {data.image_size} pixels"
        if isinstance(tokenizer, LatentTokenizer) and data.image_size == tokenizer.image_size:
            side = tokenizer.image_size // tokenizer.stride
            fits = shape == (2 * tokenizer.channels, side, side)
            if tokenizer.folder and autoencoder_digest(tokenizer.folder) != autoencoder_digest(data.tokenizer_folder):
                remedy = f"encode the images with --tokenizer {tokenizer.folder}"
                raise ValueError(f"{data.source}, are latents of another autoencoder than the teacher's: {remedy}")
    else:
        height, width, channels = data.images.shape[1:]
        found = f"images {height}x{width} with {channels} channels"
        fits = (height, width, channels) == (tokenizer.image_size, tokenizer.image_size, tokenizer.image_channels)
        if fits and not tokenizer.has_images:
            teacher.require_images()
    if data.class_names != teacher.class_names or not fits:
        found, wanted = (
            f"{what} of the classes {', '.join(names[:5])}"
            for what, names in ((found, data.class_names), (wanted, teacher.class_names))
        )
        raise ValueError(f"{data.source} has {found}; the teacher takes {wanted}: give its own --data and --image-size")


def check_divergence(step: int, row: dict[str, float], state: dict[str, Any], config: GSIMConfig) -> None:
    """Raises FloatingPointError if the student's tokens spread further than ``widest``, which the run's first row sets.

    Args:
        row: as logged after ``step`` updates. state: saved with the run; keeps ``widest``, so that a resumed run has
            the limit that it began with.
    """
    state.setdefault("widest", DIVERGED * max(row["image_std"], row["token_std"]))
    if row["token_std"] > state["widest"]:
        raise FloatingPointError(
            f"step {step}: the student has diverged: its tokens have a standard deviation of {row['token_std']:.3g}, "
            f"the data's is {row['image_std']:.3g}. Start again with more --gsim.auxiliary-updates, or with learning "
            f"rates below --gsim.lr {config.lr:g} and --gsim.auxiliary-lr {config.auxiliary_lr:g}"
        )


def distill(
    config: DistillConfig, teacher_folder: str | Path, out: str | Path, resume: bool = False,
    start_folder: str | Path | None = None,
) -> Pipeline:  # fmt: skip
    """Run `marval distill`: returns the averaged student of the last update, which is also saved in ``out``.

    If quality is measured (``eval_every``), the best lies in ``out/best``.

    Args:
        teacher_folder: of `marval train` or `import-mar`, or the name of a teacher that comes with marval. out: a new
            folder. resume: go on with the run in ``out``, if there is one.
        start_folder: a student of the same teacher to go on from, in place of the teacher's own weights. Without its
            scores.safetensors the auxiliary starts as the teacher; a short run at ``gsim.lr`` 0 lets it catch up.

    Raises:
        ValueError: settings, data, teacher, start or folder do not go together; before the first update.
        FloatingPointError: the student has diverged, or a loss or gradient is not finite; names the update.
    """
    teacher_folder, out = model_folder(teacher_folder), Path(out)
    start_folder = model_folder(start_folder) if start_folder else None
    world = connect(config.device, config.shard)
    parts, call = world.parts(config.batch, config.accumulate), caller(config, world)
    teacher = Pipeline.load(teacher_folder, world.device)
    if teacher.student is not None:
        raise ValueError(f"{teacher_folder} holds a student: distillation starts from a teacher")
    teacher.network.requires_grad_(False)
    data = load_data(config.data, "train", config.image_size, config.classes)
    check_data(data, teacher)
    model = make_student(teacher, config)
    model.settings()
    curve = Curve(config, model, data, world)
    tokenizer, length, num_classes = model.tokenizer, model.network.config.num_tokens, len(model.class_names)
    ranges, several = config.student.guidance_range is not None, config.student.evaluations
    auxiliary = copy_auxiliary(teacher.network, config.auxiliary, ranges, several)
    if start_folder:
        go_on_from(start_folder, model, auxiliary, teacher, config)
    blank = template(model.network)
    for network in (teacher.network, model.network, with_part(model.network, auxiliary)):
        prepare(network, config)
    (student,) = shard_networks(world, teacher.network, model.network)
    world.shard(auxiliary)
    matching = ScoreMatching(teacher.network, student, auxiliary, config.student, config.gsim, model.schedule)
    student_part = own_part(student, teacher.network)
    adam = {"betas": (0.0, 0.999), "fused": True}
    student_optimizer = torch.optim.Adam(student_part.parameters(), config.gsim.lr, **adam)
    auxiliary_optimizer = torch.optim.Adam(auxiliary.parameters(), config.gsim.auxiliary_lr, **adam)
    student_update = Update("student", student_part, student_optimizer, config, world, call)
    auxiliary_update = Update("auxiliary", auxiliary, auxiliary_optimizer, config, world, call)
    ema = EMA(student_part, config.ema, blank.head if config.trained == "head" else blank)
    inputs = {"teacher": teacher_folder} | ({"start": start_folder} if start_folder else {})
    run = Run(out, "distill", config, resume, world, inputs)
    start = run.restore(
        {
            "student": student_part, "auxiliary": auxiliary, "ema": ema,
            "student_optimizer": student_optimizer, "auxiliary_optimizer": auxiliary_optimizer,
        },
        curve.state,
    )  # fmt: skip
    curve.begin(run, start)
    labels_of_data = torch.from_numpy(data.labels)
    counts = masking.masked_counts(length, config.ar_steps)
    clamp = tokenizer.token_range

    def averaged() -> Pipeline:
        provenance = {"verb": "distill", "data": data.source, "data_licence": data.licence} | (
            {"teacher": teacher.provenance} if teacher.provenance else {}
        )
        network = averaged_network(student, ema, blank)
        return Pipeline(network, tokenizer, data.class_names, model.sampling, config.student, provenance)

    def keep(current: Pipeline, where: Path) -> None:
        """Save a model, and the scores with which RL goes on from it; all processes that make a network whole call."""
        scores = matching.scores() if world.gathers else {}
        if world.is_main:
            where.mkdir(exist_ok=True)
            save_tensors(where / "scores.safetensors", scores)
            current.save(where)

    def given(*context: Tensor) -> Context:
        with autocast(config.precision, world.device):
            return matching.context(*context)

    def refreshed(*context: Tensor) -> Context:
        with autocast(config.precision, world.device):
            return matching.refresh(Context(*context))

    def read(step: int) -> tuple[Tensor, Tensor]:
        """Tokens of this process's rows, and labels of the whole batch."""
        index = batch_indices(len(data), config.batch, step, config.seed)
        g = rng.generator(config.seed, Stream.DATA, step, device=world.device)
        own = batch_tokens(data, tokenizer, index, world.rows(config.batch), g, flip=config.flip)
        return own, rng.put(labels_of_data[index], world.device)

    def draw_contexts(
        own_tokens: Tensor, labels: Tensor, g: torch.Generator, host: torch.Generator
    ) -> tuple[list[Context], dict[str, Tensor]]:
        """One per part, from data or from the student's own rollout up to as many masked tokens; and what to watch.
        Numbers are drawn for the whole batch, of which each part takes its rows."""
        dropped = torch.rand(config.batch, generator=g, device=world.device) < config.class_drop
        labels = torch.where(dropped, num_classes, labels)
        chance, share = torch.rand(2, generator=host).tolist()
        rolls = chance < config.rollout
        ratios = "inference" if rolls and config.mask_ratios == "training" else config.mask_ratios
        num_masked = masking.masked_count(ratios, length, config.ar_steps, share)
        visible, masked = masking.random_masks(config.batch, length, num_masked, g)
        w = draw_guidance(config.student, config.batch, g)
        rolls = rolls and num_masked < length
        z, orders = torch.empty(0), torch.empty(0)
        if rolls:
            z = torch.randn(config.batch, length, tokenizer.token_dim, generator=g, device=world.device)
            shuffled = torch.rand(visible.shape, generator=g, device=world.device).argsort(1)
            orders = torch.cat([visible.gather(1, shuffled), masked], dim=1)
        contexts, watched = [], {}
        for rows, own, weight in parts:
            tokens = own_tokens[own]
            target = gather_tokens(tokens, masked[rows])
            spread = {"data_std": target.std(), "image_std": tokens.std()}
            add_weighted(watched, weight, {"data_mean": target.mean(), **spread})
            with torch.no_grad(), autocast(config.precision, world.device):
                if rolls:
                    upto = counts[: counts.index(num_masked) + 1]
                    draw = few_evaluations(student.head, model.schedule, (config.student.t_init,), clamp=clamp)
                    steps = unmask(student, draw, labels[rows], orders[rows], upto, z[rows], guidance=w[rows])
                    tokens = last(steps)
            contexts.append(call("context", given, tokens, visible[rows], masked[rows], labels[rows], w[rows]))
        return contexts, watched

    contexts, seen = [], {}
    batches = run.read_ahead(read, start, data, config.context_updates)
    dues = config.log_every, config.eval_every, config.save_every, config.sample_every
    progress = run.progress(start)
    for step in progress:
        if curve.state["stop"]:  # a resumed run that had stopped
            progress.stop(f"stopped: {curve.state['stop']}")
            break
        g = rng.generator(config.seed, Stream.DISTILL, step, device=world.device)
        if step % config.context_updates == 0:
            contexts = []  # the old ones make room
            contexts, seen = draw_contexts(*next(batches), g, rng.generator(config.seed, Stream.DISTILL_HOST, step))
        elif config.trained == "all":
            contexts = [call("conditions", refreshed, *context) for context in contexts]
        watched, noise_shape = dict(seen), (config.batch, contexts[0].masked.shape[1], tokenizer.token_dim)

        # ---- update the auxiliary, then the student
        lr_factor = warmup_then_cosine(step, config.steps, config.warmup, config.decay)
        auxiliary_norm, auxiliary_watched = torch.zeros(()), {}
        for _ in range(config.gsim.auxiliary_updates):
            noise = draw_noise(*noise_shape, config.gsim.auxiliary_t_range, g, config.student.evaluations)
            auxiliary_watched = {}
            for context, (rows, _, weight) in zip(contexts, parts, strict=True):
                _, values = auxiliary_update.backward(
                    matching.auxiliary_loss, context, noise.of(rows), weight=weight,
                    last=context is contexts[-1],
                )  # fmt: skip
                add_weighted(auxiliary_watched, weight, values)
            auxiliary_norm = auxiliary_update.step(step, lr_factor)
        watched |= auxiliary_watched
        noise = draw_noise(*noise_shape, config.gsim.t_range, g, config.student.evaluations)
        for context, (rows, _, weight) in zip(contexts, parts, strict=True):
            _, values = student_update.backward(
                matching.student_loss, context, noise.of(rows), weight=weight,
                last=context is contexts[-1],
            )  # fmt: skip
            add_weighted(watched, weight, values)
        student_norm = student_update.step(step, lr_factor)
        ema.update(student_part)

        # ---- log, evaluate, save, show
        done = step + 1
        if any(run.is_due(every, done) for every in dues):
            auxiliary_update.check()
            student_update.check()
        if run.is_due(config.log_every, done):
            row = run.log(
                done, **world.means(watched), student_grad_norm=student_norm, auxiliary_grad_norm=auxiliary_norm,
                lr=config.gsim.lr * lr_factor,
            )  # fmt: skip
            progress.show({name: row[name] for name in ("student_loss", "auxiliary_loss", "y")})
            check_divergence(done, row, curve.state, config.gsim)
        if run.is_due(config.eval_every, done):
            current = averaged()
            if curve.measure(current, done, run):
                keep(current, best_folder(out))  # at once: a run that dies leaves it
            del current  # a whole copy
        stop = bool(curve.state["stop"])
        save, show = stop or run.is_due(config.save_every, done), run.is_due(config.sample_every, done)
        if world.gathers and (save or show):
            current = averaged()
            if save:
                keep(current, out)
            if world.is_main and show:
                save_sample_grid(run, current, done)
            del current  # a whole copy
        if save:
            run.save(done)  # last: a killed run repeats what the checkpoint does not know
        if stop:
            progress.stop(f"stopped: {curve.state['stop']}")
            break
    return averaged().to(world.device)
