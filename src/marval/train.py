"""Train a MAR teacher: mask tokens, condition the rest, denoise the masked ones (MAR, arXiv 2406.11838)."""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from marval import masking, rng
from marval.batches import batch_indices, batch_tokens
from marval.config import MARConfig, TrainConfig
from marval.curve import Curve, best_folder
from marval.data import ImageDataset, load_data
from marval.diffusion import Schedule, cosine_schedule, denoising_loss, q_sample
from marval.distributed import connect, template
from marval.ema import EMA
from marval.images import image_grid
from marval.latents import LatentDataset
from marval.models.mar import MAR, gather_tokens
from marval.pipeline import Pipeline
from marval.rng import Stream
from marval.run import Run
from marval.tokenizers import Tokenizer, load_tokenizer, recommended_head_width
from marval.update import Update, add_weighted, caller, prepare, warmup_then_cosine

SAMPLE_ROWS = 4
"""Images of each class in the grids of samples/."""


def tokenizer_for(config: TrainConfig, data: ImageDataset | LatentDataset) -> Tokenizer:
    """The tokenizer that the settings name, or the one that made the latents."""
    if isinstance(data, LatentDataset):
        return load_tokenizer(str(data.tokenizer_folder), data.image_size, config.patch_size)
    size, channels = data.images.shape[1], data.images.shape[3]
    return load_tokenizer(config.tokenizer, size, config.patch_size, channels)


def sizes(config: TrainConfig, tokenizer: Tokenizer, num_classes: int) -> MARConfig:
    """The network's sizes for the tokens of a tokenizer.

    Raises:
        ValueError: the settings ask for what data and patch size decide.
    """
    decided = {"grid": tokenizer.grid, "token_dim": tokenizer.token_dim, "num_classes": num_classes}
    for name, value in decided.items():
        if (given := getattr(config.model, name)) not in (value, getattr(MARConfig(), name)):
            flag = f"--model.{name.replace('_', '-')}"
            raise ValueError(f"model.{name} is {value} by data and patch size, not {given}: leave {flag} out")
    head_width = config.model.head_width
    if config.widen_head:
        head_width = head_width * recommended_head_width(tokenizer.token_dim) // recommended_head_width(16)
    return dataclasses.replace(config.model, **decided, head_width=head_width)


def build_teacher(config: TrainConfig, tokenizer: Tokenizer, class_names: list[str]) -> Pipeline:
    """A freshly initialised teacher for the tokens of a tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        network = MAR(sizes(config, tokenizer, len(class_names)))
    return Pipeline(network, tokenizer, class_names, config.sampling)


def adamw(network: MAR, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with betas (0.9, 0.95); vectors and the head have no weight decay, as in MAR's code."""
    decayed = {name for name, p in network.named_parameters() if p.ndim > 1 and not name.startswith("head.")}
    groups = [[p for name, p in network.named_parameters() if (name in decayed) == wanted] for wanted in (True, False)]
    return torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": config.weight_decay}, {"params": groups[1], "weight_decay": 0.0}],
        lr=config.lr, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip


def teacher_loss(
    network: MAR, schedule: Schedule, tokens: Tensor, visible: Tensor, masked: Tensor, labels: Tensor, t: Tensor,
    eps: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """MAR's training loss: noise prediction and variance of every masked token (arXiv 2406.11838, eq. 2).

    Args:
        tokens: (B, L, D). visible: (B, V), masked: (B, N) positions. labels: (B,). t: (B, N, M) timesteps of M noisy
            copies of each masked token. eps: (B, N, M, D).

    Returns:
        A scalar, and its two parts.
    """
    condition = gather_tokens(network.condition(tokens, visible, labels), masked)
    x0 = gather_tokens(tokens, masked).unsqueeze(2).expand_as(eps)
    x_t = q_sample(schedule, x0, t, eps)
    mse, vb = denoising_loss(schedule, network.head(x_t, t, condition.unsqueeze(2)), x0, x_t, t, eps)
    loss = (mse + vb).mean()
    return loss, {"loss": loss.detach(), "mse": mse.detach().mean(), "vb": vb.detach().mean()}


def save_sample_grid(run: Run, model: Pipeline, step: int) -> None:
    """samples/step-*.png: up to ten classes in columns, always the same seeds; none for a model of latents alone."""
    if not model.tokenizer.has_images:
        return
    classes = list(range(min(10, len(model.class_names))))
    count = SAMPLE_ROWS * len(classes)
    images = model.sample(classes, num_images=count, seed=run.config.seed, batch_size=count)
    run.show(step, image_grid(images, columns=len(classes), scale=max(1, 64 // images.shape[1])))


def train(config: TrainConfig, out: str | Path, resume: bool = False) -> Pipeline:
    """Run `marval train`: returns the averaged teacher of the last update, which is also saved in ``out``.

    If quality is measured (``eval_every``), the best lies in ``out/best``. With ``model.dropout``, every update seeds
    PyTorch's global generators; nothing else reads or sets them.

    Args:
        out: a new folder. resume: go on with the run in ``out``, if there is one.

    Raises:
        ValueError: settings, data or folder do not go together; before the first update.
        FloatingPointError: a loss or gradient is not finite; names the update.
    """
    out = Path(out)
    world = connect(config.device, config.shard)
    parts, call = world.parts(config.batch, config.accumulate), caller(config, world)
    data = load_data(config.data, "train", config.image_size, config.classes)
    tokenizer = tokenizer_for(config, data)
    if config.shift and isinstance(data, LatentDataset):
        raise ValueError(f"{data.source}, are latents, which cannot be shifted: leave --shift out")
    model = build_teacher(config, tokenizer, data.class_names).to(world.device)
    model.settings()
    curve = Curve(config, model, data, world, config.eval_head_steps)
    network, length = model.network, model.network.config.num_tokens
    labels_of_data = torch.from_numpy(data.labels)
    schedule = cosine_schedule()
    blank = template(network)
    prepare(network, config)
    world.shard(network)
    optimizer = adamw(network, config)
    update = Update("teacher", network, optimizer, config, world, call)
    ema = EMA(network, config.ema, blank)
    run = Run(out, "train", config, resume, world)
    start = run.restore({"network": network, "ema": ema, "optimizer": optimizer}, curve.state)
    curve.begin(run, start)

    def averaged() -> Pipeline:
        provenance = {"verb": "train", "data": data.source, "data_licence": data.licence}
        return Pipeline(ema.averaged(), tokenizer, data.class_names, config.sampling, None, provenance)

    def read(step: int) -> tuple[Tensor, Tensor]:
        """Tokens of this process's rows, and labels of the whole batch."""
        index = batch_indices(len(data), config.batch, step, config.seed)
        g = rng.generator(config.seed, Stream.DATA, step, device=world.device)
        own = batch_tokens(data, tokenizer, index, world.rows(config.batch), g, config.shift, config.flip)
        return own, rng.put(labels_of_data[index], world.device)

    dues = config.log_every, config.eval_every, config.save_every, config.sample_every
    progress = run.progress(start)
    for step, (own_tokens, labels) in zip(progress, run.read_ahead(read, start, data), strict=True):
        if curve.state["stop"]:  # a resumed run that had stopped
            progress.stop(f"stopped: {curve.state['stop']}")
            break
        # ---- draw: the numbers of the whole batch; each part takes its rows
        g = rng.generator(config.seed, Stream.TRAIN, step, device=world.device)
        host = rng.generator(config.seed, Stream.TRAIN_HOST, step)
        dropped = torch.rand(config.batch, generator=g, device=world.device) < config.class_drop
        labels = torch.where(dropped, network.config.num_classes, labels)
        share = float(torch.rand((), generator=host))
        num_masked = masking.masked_count(config.mask_ratios, length, config.sampling.ar_steps, share)
        visible, masked = masking.random_masks(config.batch, length, num_masked, g)
        shape = (config.batch, num_masked, config.head_batch_mul)
        t = torch.randint(0, len(schedule), shape, generator=g, device=world.device)
        eps = torch.randn(*shape, tokenizer.token_dim, generator=g, device=world.device)

        # ---- update
        network.train()
        watched: dict[str, Tensor] = {}
        for rows, own, weight in parts:
            if network.config.dropout:
                rng.seed_dropout(config.seed, step, rows.start)
            _, values = update.backward(
                teacher_loss, network, schedule, own_tokens[own], visible[rows], masked[rows], labels[rows], t[rows],
                eps[rows], weight=weight, last=rows is parts[-1].rows,
            )  # fmt: skip
            add_weighted(watched, weight, values)
        lr_factor = warmup_then_cosine(step, config.steps, config.warmup, config.decay)
        grad_norm = update.step(step, lr_factor)
        ema.update(network)

        # ---- log, evaluate, save, show
        done = step + 1
        if any(run.is_due(every, done) for every in dues):
            update.check()
        if run.is_due(config.log_every, done):
            progress.show(run.log(done, **world.means(watched), grad_norm=grad_norm, lr=config.lr * lr_factor))
        if run.is_due(config.eval_every, done):
            current = averaged()
            if curve.measure(current, done, run) and world.is_main:
                current.save(best_folder(out))  # at once: a run that dies leaves it
            del current  # a whole copy
        stop = bool(curve.state["stop"])
        save, show = stop or run.is_due(config.save_every, done), run.is_due(config.sample_every, done)
        if world.gathers and (save or show):
            current = averaged()
            if world.is_main and save:
                current.save(out)
            if world.is_main and show:
                save_sample_grid(run, current, done)
            del current  # a whole copy
        if save:
            run.save(done)  # last: a killed run repeats what the checkpoint does not know
        if stop:
            progress.stop(f"stopped: {curve.state['stop']}")
            break
    return averaged().to(world.device)
