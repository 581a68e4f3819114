"""Train a MAR teacher: mask tokens, condition the rest, denoise the masked ones (MAR, arXiv 2406.11838)."""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from marval import masking, rng
from marval.config import TrainConfig
from marval.data import batch_indices, image_grid, load_dataset, random_shift, save_png
from marval.diffusion import cosine_schedule, denoising_loss, q_sample
from marval.distributed import connect
from marval.ema import EMA
from marval.models.mar import MAR
from marval.pipeline import Pipeline
from marval.run import Run, Update, autocast, warmup_then_cosine
from marval.sampling import gather_tokens
from marval.tokenizers import PixelTokenizer, to_float


def build_teacher(config: TrainConfig, image_shape: tuple[int, ...], class_names: list[str]) -> Pipeline:
    """A freshly initialised teacher for images (H, W, C)."""
    tokenizer = PixelTokenizer(image_size=image_shape[0], channels=image_shape[2], patch_size=config.patch_size)
    sizes = {"grid": tokenizer.grid, "token_dim": tokenizer.token_dim, "num_classes": len(class_names)}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        network = MAR(dataclasses.replace(config.model, **sizes))
    return Pipeline(network, tokenizer, class_names, config.sampling)


def draw_masks(count: int, length: int, num_masked: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random positions, different for each image: visible (B, V), ascending, and masked (B, num_masked)."""
    orders = torch.rand(count, length, generator=generator, device=generator.device).argsort(dim=1)
    return orders[:, num_masked:].sort(dim=1).values, orders[:, :num_masked]


def save_sample_grid(run: Run, model: Pipeline, step: int, rows: int = 4) -> None:
    """samples/step-*.png: up to ten classes in columns, always the same seeds."""
    classes = list(range(min(10, len(model.class_names))))
    images = model.sample(classes, num_images=rows * len(classes), seed=run.config.seed)
    (run.out / "samples").mkdir(exist_ok=True)
    grid = image_grid(images, columns=len(classes), scale=max(1, 64 // images.shape[1]))
    save_png(run.out / "samples" / f"step-{step:06d}.png", grid)


def train(config: TrainConfig, out: Path, resume: bool = False) -> Pipeline:
    """Run `marval train`: returns the averaged model, which is also saved in ``out``."""
    world = connect(config.device)
    rows = world.rows(config.batch)
    data = load_dataset(config.data, "train", config.image_size)
    model = build_teacher(config, data.images.shape[1:], data.class_names).to(world.device)
    model.settings()
    network, tokenizer, length = model.network, model.tokenizer, model.network.config.num_tokens
    images = torch.from_numpy(data.images)
    labels = torch.from_numpy(data.labels)
    schedule = cosine_schedule()
    matrices = [p for name, p in network.named_parameters() if p.ndim > 1 and "embed_learned" not in name]
    vectors = [p for name, p in network.named_parameters() if p.ndim <= 1 or "embed_learned" in name]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.lr, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    update = Update("teacher", network, optimizer, config.clip_grad, world)
    ema = EMA(network, config.ema)
    run = Run(out, "train", config, resume, world)
    start = run.restore({"network": network, "ema": ema, "optimizer": optimizer}, {})

    def averaged() -> Pipeline:
        provenance = {"verb": "train", "data": data.source, "data_licence": data.licence}
        return Pipeline(ema.averaged(network), tokenizer, data.class_names, config.sampling, None, provenance)

    progress = run.progress(start)
    for step in progress:
        # ---- draw: the numbers of the whole batch, then this process's rows
        g = rng.generator(config.seed, 1, step, device=world.device)
        host = rng.generator(config.seed, 2, step)
        index = torch.from_numpy(batch_indices(len(data), config.batch, step, config.seed))
        pixels = random_shift(to_float(images[index]), config.shift, host)[rows].to(world.device)
        dropped = torch.rand(config.batch, generator=g, device=world.device) < config.class_drop
        label = torch.where(dropped, network.config.num_classes, labels[index].to(world.device))[rows]
        share = float(torch.rand((), generator=host))
        if config.mask_ratios == "training":
            num_masked = masking.training_masked_count(length, share)
        else:
            num_masked = masking.inference_masked_count(length, config.sampling.ar_steps, share)
        visible, masked = (x[rows] for x in draw_masks(config.batch, length, num_masked, g))
        shape = (config.batch, num_masked, config.head_batch_mul)
        t = torch.randint(0, len(schedule), shape, generator=g, device=world.device)[rows]
        eps = torch.randn(*shape, tokenizer.token_dim, generator=g, device=world.device)[rows]
        rng.seed_dropout(config.seed, 3, step, world.rank)

        # ---- update
        network.train()
        tokens = tokenizer.encode(pixels)
        with autocast(config, world.device):
            condition = gather_tokens(network.condition(tokens, visible, label), masked)
            x0 = gather_tokens(tokens, masked).unsqueeze(2).expand_as(eps)
            x_t = q_sample(schedule, x0, t, eps)
            head_out = network.head(x_t, t, condition.unsqueeze(2))
        mse, vb = denoising_loss(schedule, head_out, x0, x_t, t, eps)
        loss = (mse + vb).mean()
        lr_factor = warmup_then_cosine(step, config.steps, config.warmup, config.decay)
        grad_norm = update.apply(loss, update.gradients(loss), step, lr_factor)
        ema.update(network)

        # ---- log, save, look
        done = step + 1
        if run.is_due(config.log_every, done):
            means = world.mean(torch.stack([loss.detach(), mse.detach().mean(), vb.detach().mean()])).tolist()
            values = dict(zip(("loss", "mse", "vb"), means, strict=True))
            progress.show(run.log(done, **values, grad_norm=grad_norm, lr=config.lr * lr_factor))
        if world.is_main and run.is_due(config.save_every, done):
            averaged().save(out)
        if world.is_main and run.is_due(config.sample_every, done):
            save_sample_grid(run, averaged(), done)
        if run.is_due(config.save_every, done):
            run.save(done)  # last: a killed run repeats what the checkpoint does not know
    return averaged().to(world.device)
