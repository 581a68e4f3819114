"""Distil a teacher's inner chain into one step with GSIM (MARVAL, arXiv 2511.15190; equations in marval.gsim)."""

import dataclasses
from pathlib import Path

import torch

from marval import masking, rng
from marval.config import DistillConfig
from marval.data import ImageDataset, batch_indices, load_dataset
from marval.distributed import connect
from marval.ema import EMA
from marval.matching import ScoreMatching, copy_network, draw_noise, own_part, with_part
from marval.pipeline import Pipeline
from marval.run import Run, Update, autocast, warmup_then_cosine
from marval.sampling import gather_tokens, last, one_evaluation, unmask
from marval.tokenizers import PixelTokenizer, to_float
from marval.train import draw_masks, save_sample_grid


def make_student(teacher: Pipeline, config: DistillConfig) -> Pipeline:
    """The teacher as a one-step student before any training: the same weights, evaluated once."""
    guidance_input = config.student.guidance_range is not None
    network = copy_network(teacher.network, config.trained, guidance_input)
    sampling = dataclasses.replace(
        teacher.sampling, ar_steps=config.ar_steps, guidance=config.student.guidance, guidance_schedule="constant"
    )
    return Pipeline(network, teacher.tokenizer, teacher.class_names, sampling, config.student)


def check_data(data: ImageDataset, teacher: Pipeline) -> None:
    """Raises ValueError unless the images and classes are of the kind that the teacher was trained on."""
    teacher.require_images()
    assert isinstance(teacher.tokenizer, PixelTokenizer)
    size = teacher.tokenizer.image_size
    shape = (size, size, teacher.tokenizer.channels)
    if data.class_names != teacher.class_names or data.images.shape[1:] != shape:
        found = f"images {data.images.shape[1:]} of the classes {', '.join(data.class_names[:5])}"
        wanted = f"{shape} of {', '.join(teacher.class_names[:5])}"
        raise ValueError(f"{data.source} has {found}; the teacher {wanted}: give its own --data and --image-size")


def distill(config: DistillConfig, teacher_folder: Path, out: Path, resume: bool = False) -> Pipeline:
    """Run `marval distill`: returns the averaged student, which is also saved in ``out``."""
    world = connect(config.device)
    rows = world.rows(config.batch)
    teacher = Pipeline.load(teacher_folder, world.device)
    if teacher.student is not None:
        raise ValueError(f"{teacher_folder} holds a student: distillation starts from a teacher")
    teacher.network.requires_grad_(False)
    data = load_dataset(config.data, "train", config.image_size)
    check_data(data, teacher)
    model = make_student(teacher, config)
    model.settings()
    student, tokenizer, length = model.network, model.tokenizer, model.network.config.num_tokens
    auxiliary = copy_network(teacher.network, config.trained, config.student.guidance_range is not None)
    matching = ScoreMatching(teacher.network, student, auxiliary, config.student, config.gsim, model.schedule)
    student_part, auxiliary_part = own_part(student, teacher.network), own_part(auxiliary, teacher.network)
    adam = {"betas": (0.0, 0.999), "fused": True}
    student_optimizer = torch.optim.Adam(student_part.parameters(), config.gsim.lr, **adam)
    auxiliary_optimizer = torch.optim.Adam(auxiliary_part.parameters(), config.gsim.auxiliary_lr, **adam)
    student_update = Update("student", student_part, student_optimizer, config.clip_grad, world)
    auxiliary_update = Update("auxiliary", auxiliary_part, auxiliary_optimizer, config.clip_grad, world)
    ema = EMA(student_part, config.ema)
    run = Run(out, "distill", config, resume, world, {"teacher": teacher_folder})
    start = run.restore(
        {
            "student": student_part, "auxiliary": auxiliary_part, "ema": ema,
            "student_optimizer": student_optimizer, "auxiliary_optimizer": auxiliary_optimizer,
        },
        {},
    )  # fmt: skip
    tokens_of_data = tokenizer.encode(to_float(torch.from_numpy(data.images)))
    labels_of_data = torch.from_numpy(data.labels)
    counts = masking.masked_counts(length, config.ar_steps)
    draw_token = one_evaluation(student.head, model.schedule, config.student.t_init, clamp=tokenizer.token_range)

    def averaged() -> Pipeline:
        network = with_part(student, ema.averaged(student_part))
        provenance = {"verb": "distill", "data": data.source, "data_licence": data.licence}
        return Pipeline(network, tokenizer, data.class_names, model.sampling, config.student, provenance)

    progress = run.progress(start)
    for step in progress:
        # ---- draw: the numbers of the whole batch, then this process's rows
        g = rng.generator(config.seed, 3, step, device=world.device)
        host = rng.generator(config.seed, 4, step)
        index = torch.from_numpy(batch_indices(len(data), config.batch, step, config.seed))
        dropped = torch.rand(config.batch, generator=g, device=world.device) < config.class_drop
        labels = torch.where(dropped, student.config.num_classes, labels_of_data[index].to(world.device))[rows]
        is_rollout, share = torch.rand(2, generator=host).tolist()
        if config.mask_ratios == "training" and is_rollout >= config.rollout:
            num_masked = masking.training_masked_count(length, share)
        else:
            num_masked = masking.inference_masked_count(length, config.ar_steps, share)
        visible, masked = (x[rows] for x in draw_masks(config.batch, length, num_masked, g))
        w = matching.draw_guidance(config.batch, g)[rows]

        # ---- contexts: from data, or from the student's own rollout up to the same number of masked tokens
        tokens = tokens_of_data[index][rows].to(world.device)
        if is_rollout < config.rollout and num_masked < length:
            z = torch.randn(config.batch, *tokens.shape[1:], generator=g, device=world.device)[rows]
            orders = torch.cat([visible, masked], dim=1)
            shuffled = torch.rand(config.batch, visible.shape[1], generator=g, device=world.device)[rows].argsort(1)
            orders[:, : visible.shape[1]] = visible.gather(1, shuffled)
            upto = counts.index(num_masked) + 1
            with torch.no_grad(), autocast(config, world.device):
                tokens = last(unmask(student, draw_token, labels, orders, counts[:upto], z, guidance=w))
        with autocast(config, world.device):
            context = matching.context(tokens, visible, masked, labels, w)

        # ---- update the auxiliary, then the student
        lr_factor = warmup_then_cosine(step, config.steps, config.warmup, config.decay)
        auxiliary_loss = auxiliary_norm = torch.zeros((), device=world.device)
        for _ in range(config.gsim.auxiliary_updates):
            z, t, eps = draw_noise(config.batch, num_masked, tokens.shape[2], config.gsim.auxiliary_t_range, g, rows)
            with autocast(config, world.device):
                auxiliary_loss = matching.auxiliary_loss(context, z, t, eps)
            gradients = auxiliary_update.gradients(auxiliary_loss)
            auxiliary_norm = auxiliary_update.apply(auxiliary_loss, gradients, step, lr_factor)
        z, t, eps = draw_noise(config.batch, num_masked, tokens.shape[2], config.gsim.t_range, g, rows)
        with autocast(config, world.device):
            student_loss, watched = matching.student_loss(context, z, t, eps)
        student_norm = student_update.apply(student_loss, student_update.gradients(student_loss), step, lr_factor)
        ema.update(student_part)

        # ---- log, save, look
        done = step + 1
        if run.is_due(config.log_every, done):
            target = gather_tokens(tokens_of_data[index][rows].to(world.device), masked)
            values = {"student_loss": student_loss, "auxiliary_loss": auxiliary_loss, **watched}
            values |= {"data_mean": target.mean(), "data_std": target.std()}
            means = world.mean(torch.stack([value.detach() for value in values.values()])).tolist()
            row = run.log(
                done, **dict(zip(values, means, strict=True)), student_grad_norm=student_norm,
                auxiliary_grad_norm=auxiliary_norm, lr=config.gsim.lr * lr_factor,
            )  # fmt: skip
            progress.show({name: row[name] for name in ("student_loss", "auxiliary_loss", "y")})
        if world.is_main and run.is_due(config.save_every, done):
            matching.save_scores(out)
            averaged().save(out)
        if world.is_main and run.is_due(config.sample_every, done):
            save_sample_grid(run, averaged(), done)
        if run.is_due(config.save_every, done):
            run.save(done)  # last: a killed run repeats what the checkpoint does not know
    return averaged().to(world.device)
