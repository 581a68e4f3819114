"""Named runs. Each docstring says what to expect, on what hardware, in what time.

The recipes of ImageNet 256x256 name data and tokenizer by placeholders (--data, --tokenizer; docs/imagenet.md). Their
expected times are those of `marval VERB RECIPE --dry-run --processes 8`: 8 H200 at the share of their rate that we
measured for MAR-B. We have not run them.

Those of small colour pictures come in two sizes: `cifar10`, `imagenette64` and `emoji` are meant for one modern GPU,
with --graphs (teachers of `cifar10` and `imagenette64` were run whole, in 5 and 4 minutes); the same with `-cpu` for
one CPU core. They save often and a teacher's checkpoint.pt takes 16 bytes per parameter, so a run can be cut into
pieces of a few minutes, on different machines: go on with --resume. The data of all recipes of small pictures, and
whole chains of runs: benchmarks/picture_models.py.
"""

import dataclasses
from typing import Any

from marval.config import (
    PRESETS,
    DistillConfig,
    EvaluateConfig,
    GSIMConfig,
    MARConfig,
    RLConfig,
    SamplingConfig,
    StudentConfig,
    TrainConfig,
)


def digits_teacher() -> TrainConfig:
    """8x8 handwritten digits as 16 tokens of 2x2 pixels: 96 wide, 2+2 blocks, head 6x64; 0.6 M parameters.

    FID (classifier features) 2.02 in 2.3 minutes (README, 2026-11-27; 2 CPU cores, nothing else running).
    """
    return TrainConfig(
        steps=1800, batch=64, lr=2e-3, ema=0.998, head_batch_mul=2, mask_ratios="inference", sample_every=900,
        model=MARConfig(width=96, depth=2, heads=4, buffer_size=4, head_width=64, head_depth=6),
        sampling=SamplingConfig(ar_steps=8, guidance=2.0, head_steps=100),
    )  # fmt: skip


def digits_student() -> DistillConfig:
    """One-step student of the digits teacher, for every guidance scale in 1..3: backbone and head.

    FID (classifier features) 1.60 at w = 2 in 1.4 minutes (README, 2026-11-27; 2 CPU cores).
    """
    return DistillConfig(
        steps=600, batch=64, ema=0.99, save_every=200, sample_every=300,
        student=StudentConfig(guidance=2.0, guidance_range=(1.0, 3.0)), gsim=GSIMConfig(lr=2e-4, auxiliary_lr=8e-4),
    )  # fmt: skip


def digits_aligned() -> RLConfig:
    """The digits student after RL on a classifier's log-probability of the asked digit.

    Reward -0.073 -> -0.044 in 0.7 minutes (README, 2026-11-27; 2 CPU cores).
    """
    return RLConfig(
        steps=60, batch=64, ema=0.9, save_every=20, sample_every=60, log_every=5,
        checkpoint_ar_steps=False,
    )  # fmt: skip


def fashion_mnist_teacher() -> TrainConfig:
    """Fashion-MNIST, 28x28 grey, as 49 tokens of 4x4 pixels: 128 wide, 2+2 blocks, head 6x192; 2.1 M parameters.

    FID (classifier features, 2,000 images, held-out data) 8.0, accuracy 89.7 %, in 71 minutes on one CPU core beside
    other work (2026-11-23; the card of ``fashion-mnist/teacher``).
    """
    return TrainConfig(
        data="data/fashion-mnist.npz", patch_size=4, steps=6000, batch=64, lr=2e-3, warmup=200, ema=0.999,
        precision="bf16", head_batch_mul=2, mask_ratios="inference", save_every=250, sample_every=1000,
        model=MARConfig(width=128, depth=2, heads=4, buffer_size=8, head_width=192, head_depth=6),
        sampling=SamplingConfig(ar_steps=16, guidance=1.5, head_steps=100),
    )  # fmt: skip


def fashion_mnist_student() -> DistillConfig:
    """One-step student of the Fashion-MNIST teacher, for every guidance scale in 1..3: backbone and head.

    The head alone would not see what guidance depends on (docs/LOG.md, 2026-11-25). FID (as the teacher's) 8.1,
    accuracy 91.7 %, in 38 minutes on one CPU core beside other work, with --compile (2026-11-25; the card of
    ``fashion-mnist/student``). With --auxiliary head 25 minutes, and FID 5 to 7 % higher (docs/LOG.md, 2026-11-26);
    from t_init 300 it is as good (docs/LOG.md, 2026-11-27).
    """
    return DistillConfig(
        data="data/fashion-mnist.npz", auxiliary="network", steps=3000, batch=64, ar_steps=16, ema=0.995,
        precision="bf16", save_every=100, sample_every=500,
        student=StudentConfig(t_init=755, guidance=1.5, guidance_range=(1.0, 3.0)),
        gsim=GSIMConfig(lr=3e-4, auxiliary_lr=6e-4),
    )  # fmt: skip


def fashion_mnist_aligned() -> RLConfig:
    """The Fashion-MNIST student after RL on a classifier's log-probability of the asked class, held by GSIM and KL.

    Held-out reward -0.276 -> -0.226, judge -0.247 -> -0.208, FID (judge's features, training split) 0.405 -> 0.386,
    in 15 minutes on one CPU core beside other work (2026-11-25; ``--reference data/fashion-mnist.npz:train``,
    classifier and judge as they come along). Without KL, FID rises from the start (docs/LOG.md).
    """
    return RLConfig(
        steps=60, batch=64, ar_steps=16, ema=0.9, precision="bf16", save_every=20, sample_every=60,
        log_every=5,
    )  # fmt: skip


def fashion_mnist_evaluation() -> EvaluateConfig:
    """10,000 images against the training split; features of `marval train-classifier` beside the model."""
    return EvaluateConfig(num_images=10_000, reference="data/fashion-mnist.npz:train")


def pictures_teacher(data: str, guidance: float, **changes: Any) -> TrainConfig:
    """Teachers of small colour pictures, 64 tokens, on one GPU: 256 wide, 3+3 blocks, head 8x256; 7.9 M parameters.

    The deeper the head and the shallower the backbone, the more one evaluation of the head saves against 100. Without
    --graphs an update waits for its launches.
    """
    config = TrainConfig(
        data=data, patch_size=4, flip=True, batch=256, lr=1e-3, warmup=1_000, ema=0.9995,
        head_batch_mul=2, mask_ratios="inference", save_every=1_000, sample_every=5_000, log_every=100,
        model=MARConfig(width=256, depth=3, heads=8, buffer_size=8, head_width=256, head_depth=8),
        sampling=SamplingConfig(ar_steps=16, guidance=guidance, head_steps=100),
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def pictures_teacher_on_cpu(config: TrainConfig, **changes: Any) -> TrainConfig:
    """The same on a CPU core: 128 wide, 2+2 blocks, head 6x192, 2.2 M parameters, few and small batches, bf16."""
    small = dataclasses.replace(config.model, width=128, depth=2, heads=4, head_width=192, head_depth=6)
    run = {"steps": 8_000, "batch": 64, "lr": 2e-3, "warmup": 200, "ema": 0.999, "head_batch_mul": 2, "model": small}
    often = {"save_every": 250, "sample_every": 1_000, "log_every": 20, "precision": "bf16"}
    return dataclasses.replace(config, **{**run, **often, **changes})


def pictures_student(data: str, guidance: float, highest: float = 3.0, t_init: int = 300) -> DistillConfig:
    """Their one-step students on one GPU, for every guidance scale from 1 to the highest: backbone and head. At the end
    of this range students follow their teachers less well (docs/LOG.md, 2026-11-26).

    The auxiliary is a whole network, which costs half as much work again: with a head alone Fashion-MNIST and emoji had
    5 to 7 % more FID, also after as much time (docs/LOG.md, 2026-11-26). At higher learning rates CIFAR-10's diverged.
    """
    return DistillConfig(
        data=data, flip=True, auxiliary="network", steps=5_000, batch=128, ar_steps=16, ema=0.998, warmup=100,
        save_every=500, sample_every=2_500, log_every=50,
        student=StudentConfig(t_init=t_init, guidance=guidance, guidance_range=(1.0, highest)),
    )  # fmt: skip


def pictures_student_on_cpu(data: str, guidance: float, highest: float = 3.0) -> DistillConfig:
    """The same on a CPU core, of fewer images at higher learning rates; from 755, as the students were made that come
    with marval or stand in docs/results.md."""
    return dataclasses.replace(
        pictures_student(data, guidance, highest, t_init=755), steps=4_500, batch=64, ema=0.995, warmup=20,
        save_every=100, sample_every=500, log_every=20, precision="bf16", gsim=GSIMConfig(lr=3e-4, auxiliary_lr=6e-4),
    )  # fmt: skip


def pictures_aligned() -> RLConfig:
    """A student of small pictures after RL on a classifier's log-probability of the asked class, held by GSIM and KL.

    The classifier (--classifier): a folder of `marval train-classifier`, or one that the data set has. Run on
    CIFAR-10 only, whose good student loses by it: see `cifar10_aligned`.
    """
    return RLConfig(
        steps=100, batch=128, ar_steps=16, ema=0.9, save_every=20, sample_every=50, log_every=5,
    )  # fmt: skip


def pictures_aligned_on_cpu() -> RLConfig:
    """The same on a CPU core, in fewer updates."""
    return dataclasses.replace(pictures_aligned(), steps=60, batch=64, sample_every=60, precision="bf16")


def cifar10_teacher() -> TrainConfig:
    """CIFAR-10, 32x32 colour, as 64 tokens of 4x4 pixels, on one GPU: `pictures_teacher`; 90 epochs.

    7.9 M parameters; 327 seconds on an H200 with --graphs, without sample grids (2026-11-26; docs/results.md). Most
    classes are recognised.
    """
    return pictures_teacher("data/cifar10.npz", guidance=3.0, steps=17_500)


def latents_teacher_on_cpu(config: TrainConfig, data: str, **changes: Any) -> TrainConfig:
    """A teacher of 32x32 pictures on a CPU core as 16 latents of the tiny autoencoder taef2: a quarter of the tokens.

    In the time that there is, 64 tokens of pixels became patchwork (docs/LOG.md).
    """
    config = pictures_teacher_on_cpu(config, data=data, tokenizer="runs/taef2", patch_size=1, **changes)
    model = dataclasses.replace(config.model, head_depth=8)
    return dataclasses.replace(config, model=model, sampling=dataclasses.replace(config.sampling, ar_steps=8))


def cifar10_cpu_teacher() -> TrainConfig:
    """CIFAR-10 on one CPU core (15 epochs): `latents_teacher_on_cpu`.

    40 minutes beside other work, with --compile (2026-11-25; docs/results.md). Planes, ships, cars and horses are
    recognised, smaller animals seldom. Of taef2's reconstructions (24 dB) 85 % are read right, of the images 92 %.
    """
    return latents_teacher_on_cpu(cifar10_teacher(), "data/cifar10-latents", steps=12_000)


def cifar10_student() -> DistillConfig:
    """One-step student of the `cifar10` teacher, on one GPU: `pictures_student`.

    120 seconds on an H200 with --graphs (2026-11-27; docs/LOG.md; the student of docs/results.md went on from it).
    t_init 755 has 2 and 6 % more FID (classifier, judge); lower ones were not tried.
    """
    return pictures_student("data/cifar10.npz", guidance=3.0, highest=4.0, t_init=600)


def latents_student_on_cpu(data: str, guidance: float, highest: float = 3.0) -> DistillConfig:
    """Their one-step students: `pictures_student_on_cpu`."""
    return dataclasses.replace(pictures_student_on_cpu(data, guidance, highest), ar_steps=8)


def cifar10_cpu_student() -> DistillConfig:
    """One-step student of the `cifar10-cpu` teacher: 33 minutes on one CPU core beside other work, with --compile
    (2026-11-26)."""
    return dataclasses.replace(latents_student_on_cpu("data/cifar10-latents", guidance=3.0, highest=4.0), steps=6_000)


def latents_aligned_on_cpu() -> RLConfig:
    """Their students after RL: `pictures_aligned_on_cpu`.

    Held-out reward, judge and FID (judge's features, training split, 500 images): emoji (2026-11-27) -0.411 -> -0.171,
    -0.510 -> -0.280, 6.3 -> 4.9 in 3 minutes; CIFAR-10 (2026-11-25, ``--classifier resnet20*.th --judge
    resnet56*.th``) -2.41 -> -1.28, -2.78 -> -1.61, 5.7 -> 4.4 in 8 minutes, both on one CPU core beside other work,
    with ``--reference NAME.npz:train``.
    """
    return dataclasses.replace(pictures_aligned_on_cpu(), ar_steps=8)


def cifar10_aligned() -> RLConfig:
    """`pictures_aligned` at a fifth of its rate, held more tightly: a student level with its teacher can gain little.

    Run so far on a CPU, with ``--batch 64 --precision bf16 --classifier resnet20*.th --judge resnet56*.th``: held-out
    reward -0.653 -> -0.609, judge -0.752 -> -0.718 after 40 updates, but nothing for the judge in the first 30, so
    without patience. At `pictures_aligned`'s rates both fall (docs/LOG.md, 2026-11-27, nineteenth session).
    """
    gsim = GSIMConfig(lr=2e-5, auxiliary_lr=1e-4)
    return dataclasses.replace(pictures_aligned(), steps=40, patience=0, kl=0.3, gsim=gsim)


def cifar10_evaluation() -> EvaluateConfig:
    """10,000 images against the training split; features of a classifier beside the model, or --features."""
    return EvaluateConfig(num_images=10_000, reference="data/cifar10.npz:train")


def imagenette64_teacher() -> TrainConfig:
    """Imagenette, 10 ImageNet classes, as 64 latents of the 64x64 photographs, on one GPU: 311 epochs.

    7.9 M parameters; 212 seconds on an H200 with --graphs, without sample grids (2026-11-26; docs/results.md).
    Churches, horns, trucks, pumps, golf balls and parachutes are recognised, most cassette players and dogs, fish and
    chain saws guessed; ImageNet's MobileNetV2 reads one in five, of the photographs two.

    Latents of the tiny autoencoder taef2 (32 channels, stride 8), because a token of 8x8 pixels has 192 numbers, too
    many for a head that is 192 wide, and 256 tokens of 4x4 pixels cost four times as much; its reconstructions lose
    little (26 dB, docs/imagenet.md). With dropout, as there are only 9,469 images.
    """
    config = pictures_teacher(
        "data/imagenette64-latents", guidance=2.5, tokenizer="runs/taef2", patch_size=1, steps=11_500
    )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.1))


def imagenette64_cpu_teacher() -> TrainConfig:
    """Imagenette on one CPU core (54 epochs): `imagenette64`, made smaller.

    71 minutes beside two other processes, with --compile (2026-11-25; docs/results.md). Churches, trucks, pumps, horns
    and parachutes are recognised, dogs and fish guessed; ImageNet's MobileNetV2 reads one in ten. Head 8x192, as
    teacher and student both wait for the autoencoder, which on a CPU takes as long as a small backbone.
    """
    config = pictures_teacher_on_cpu(imagenette64_teacher())
    return dataclasses.replace(config, model=dataclasses.replace(config.model, head_depth=8, dropout=0.0))


def imagenette64_student() -> DistillConfig:
    """One-step student of the `imagenette64` teacher, on one GPU: `pictures_student`.

    5.5 minutes on an H200 with --graphs, beside a second distillation, a training and evaluations (2026-11-27;
    docs/results.md). From t_init 600 FID is 13 % higher over the classifier and level over the judge.
    """
    data = "data/imagenette64-latents"
    return dataclasses.replace(pictures_student(data, guidance=2.5, highest=4.0, t_init=450), steps=5_500)


def imagenette64_cpu_student() -> DistillConfig:
    """One-step student of the `imagenette64-cpu` teacher, on one CPU core: 52 minutes, as its teacher's 71."""
    return dataclasses.replace(pictures_student_on_cpu("data/imagenette64-latents", guidance=2.5), steps=3_000)


def imagenette64_aligned() -> RLConfig:
    """`pictures_aligned` at a lower rate, held tightly: 9,469 photographs make a classifier that is easily pleased.

    Run on a CPU, with ``--batch 64 --precision bf16 --select fid --judge mobilenet_v2*.npz``: held-out reward -0.157 ->
    -0.144, judge -4.34 -> -4.28, FID (its features, training split, 500 images) 200.8 -> 199.7 after 20 updates; the
    next ten bring reward only (2026-11-27; 16 minutes on one core beside other work).
    """
    gsim = GSIMConfig(lr=4e-5, auxiliary_lr=2e-4)
    return dataclasses.replace(pictures_aligned(), steps=30, patience=0, kl=0.3, gsim=gsim)


def imagenette64_cpu_aligned() -> RLConfig:
    """`pictures_aligned_on_cpu`, held more tightly: 9,469 photographs make a classifier that is easily pleased.

    Held-out reward -0.276 -> -0.233, judge (``--judge mobilenet_v2*.npz``) -5.69 -> -5.56, FID (its features, training
    split, 500 images) 252 -> 249 after 30 of 60 updates, with ``--select fid``; 10 minutes on one CPU core beside other
    work (2026-11-26). With KL 0.03 the reward rises further, and FID over the classifier's features by 80 %.
    """
    return dataclasses.replace(pictures_aligned_on_cpu(), kl=0.3)


def imagenette64_evaluation() -> EvaluateConfig:
    """10,000 images against the training photographs; features of a classifier beside the model, or --features."""
    return EvaluateConfig(num_images=10_000, reference="data/imagenette64:train")


def emoji_teacher() -> TrainConfig:
    """Noto emoji (Apache-2.0), 32x32 colour, ten classes, 64 tokens of 4x4 pixels, on one GPU: 551 epochs.

    200 seconds on an H200 with --graphs, beside two distillations (2026-11-27); its images were not measured. Only
    1,857 pictures: few updates, dropout, and look whether the images are copies. Why these classes:
    benchmarks/prepare_data.py.
    """
    config = pictures_teacher("data/emoji.npz", guidance=1.5, steps=8_000, batch=128, warmup=500)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.1))


def emoji_cpu_teacher() -> TrainConfig:
    """Noto emoji on one CPU core (276 epochs): `latents_teacher_on_cpu`.

    31 minutes beside other work, with --compile (2026-11-25; the card of ``emoji/teacher``). Of taef2's reconstructions
    (21 dB) 96 % are read right, of the images 97 %.
    """
    return latents_teacher_on_cpu(emoji_teacher(), "data/emoji-latents")


def emoji_student() -> DistillConfig:
    """One-step student of the `emoji` teacher, on one GPU: `pictures_student`. Not run yet."""
    return pictures_student("data/emoji.npz", guidance=1.5)


def emoji_cpu_student() -> DistillConfig:
    """One-step student of the `emoji-cpu` teacher: 45 minutes on one CPU core beside other work, with --compile
    (2026-11-27; the card of ``emoji/student``).

    Lambda 0.5: its FID is 4 to 7 % lower than the teacher's and its recall 6 points; with -0.4 and 3,000
    updates (more did not help) FID is 3 to 6 % higher and recall 2 points (docs/LOG.md, 2026-11-27).
    """
    config = latents_student_on_cpu("data/emoji-latents", guidance=1.5)
    return dataclasses.replace(config, gsim=dataclasses.replace(config.gsim, lam=0.5))


def emoji_evaluation() -> EvaluateConfig:
    """10,000 images, equally many of each class, against the 1,857 training pictures, whose classes are uneven."""
    return EvaluateConfig(num_images=10_000, reference="data/emoji.npz:train")


IMAGENET_IMAGES = 1_281_167
"""Training images of ImageNet (ILSVRC 2012)."""


def updates(epochs: float, batch: int) -> int:
    """Updates that see every training image of ImageNet so many times."""
    return round(epochs * IMAGENET_IMAGES / batch)


def imagenet_teacher(preset: str, guidance: float) -> TrainConfig:
    """MAR as its authors train the models that they publish, on latents of KL-16 (arXiv 2406.11838 and its code).

    Theirs: batch 2048, 1e-4 per 256 images, constant after 100 epochs of warm-up, 800 epochs (their script's default is
    400), EMA 0.9999, weight decay 0.02, gradient norm 3, dropout and class dropping 0.1, 4 timesteps per token.
    """
    batch = 2048
    return TrainConfig(
        data="imagenet-latents", classes="imagenet", image_size=256, tokenizer="kl16", patch_size=1, flip=True,
        widen_head=True, model=MARConfig(**{**vars(PRESETS[preset]), "dropout": 0.1}),
        batch=batch, steps=updates(800, batch),
        lr=1e-4 * batch / 256, warmup=updates(100, batch), decay=False, ema=0.9999, weight_decay=0.02, clip_grad=3.0,
        class_drop=0.1, mask_ratios="training", head_batch_mul=4, save_every=2_500, sample_every=12_500, log_every=100,
        sampling=SamplingConfig(ar_steps=64, head_steps=100, guidance=guidance, guidance_schedule="linear"),
    )  # fmt: skip


def imagenet_student() -> DistillConfig:
    """One-step student of a public MAR, for every guidance scale in 1..3.5: its head, on the frozen backbone.

    The paper's (MARVAL, arXiv 2511.15190), as others report it: the updates of 30 epochs on 8 A800, w = 1.2. Ours,
    because the paper does not state it or our experiments differ: batch 256, learning rates, lambda -0.4, t_init 300
    (by small models), K = 64, the head alone (--trained all trains everything), four updates on the same contexts
    (which makes it 7.5 epochs; on small models about as good, update for update: docs/LOG.md, 2026-11-26), the guidance
    scale as an input of the student.
    """
    return DistillConfig(
        data="imagenet-latents", classes="imagenet", image_size=256, flip=True, batch=256, steps=updates(30, 256),
        context_updates=4,
        student=StudentConfig(guidance=1.2, guidance_range=(1.0, 3.5)), ar_steps=64, ema=0.9999, warmup=1_000,
        trained="head", gsim=GSIMConfig(lr=5e-6, auxiliary_lr=1e-5),
        save_every=2_500, sample_every=5_000, log_every=100,
    )  # fmt: skip


PICKSCORE = "pickscore:yuvalkirstain/PickScore_v1"
HELD_OUT = (
    "clip:openai/clip-vit-large-patch14,imagereward:THUDM/ImageReward,hps:xswu/HPSv2,"
    "aesthetic:openai/clip-vit-large-patch14:trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth"
)
"""Rewards that the ImageNet recipes measure and never train on, by their names on the hub. The aesthetic head is
LAION's of five layers, sac+logos+ava1-l14-linearMSE, as the code of DDPO takes it."""


def imagenet_aligned() -> RLConfig:
    """A student after RL on PickScore, watched by CLIP and ImageReward, which the paper reports, HPSv2.1 and aesthetic.

    The paper's: PickScore, this prompt, and, as others report it, 5 epochs on 8 A800. Ours: batch 256 in 4 parts,
    learning rates, K = 64, the head alone, the anchors towards teacher and student, the early stop on the first
    held-out reward. Give --features and --reference for FID and recall: no file of theirs has a name that everyone
    knows.
    """
    return RLConfig(
        reward=PICKSCORE, held_out=HELD_OUT, select="held-out",
        batch=256, accumulate=4, steps=updates(5, 256), ar_steps=64, ema=0.999, eval_every=100, eval_images=1_000,
        patience=25, gsim=GSIMConfig(lr=1e-6, auxiliary_lr=2e-6), save_every=500, sample_every=500, log_every=20,
    )  # fmt: skip


def imagenet_evaluation() -> EvaluateConfig:
    """FID-50k as ADM and MAR measure it: 50,000 images, 50 per class, Inception features, ADM's statistics; PickScore
    and the held-out rewards of `imagenet_aligned` (``--rewards ""`` for none).

    Guidance and AR steps are those of the model's folder unless given. Dry run: MAR-B teacher, K = 64, without rewards:
    6 minutes.
    """
    return EvaluateConfig(
        num_images=50_000, features="inception", reference="VIRTUAL_imagenet256_labeled.npz",
        rewards=f"{PICKSCORE},{HELD_OUT}",
    )  # fmt: skip


def imagenet256_b_teacher() -> TrainConfig:
    """MAR-B from scratch.

    The authors' model: FID 2.31, IS 281.7 (MAR's README, 256 AR steps, w = 2.9 linear). Dry run: 2.4 days.
    """
    return imagenet_teacher("mar-b", 2.9)


def imagenet256_l_teacher() -> TrainConfig:
    """MAR-L from scratch.

    The authors' model: FID 1.78, IS 296.0 (MAR's README, 256 AR steps, w = 3.0 linear). Dry run: 5.2 days.
    On 8 H200 with ``--accumulate 2``.
    """
    return imagenet_teacher("mar-l", 3.0)


def imagenet256_h_teacher() -> TrainConfig:
    """MAR-H from scratch.

    The authors' model: FID 1.55, IS 303.7 (MAR's README, 256 AR steps, w = 3.2 linear). Dry run: 10.4 days.
    On 8 H200 with ``--accumulate 4``.
    """
    return imagenet_teacher("mar-h", 3.2)


def imagenet256_b_student() -> DistillConfig:
    """`imagenet_student` of MAR-B. The paper's: FID 3.06, IS 220.2. Dry run: 0.87 hours."""
    return imagenet_student()


def imagenet256_l_student() -> DistillConfig:
    """`imagenet_student` of MAR-L. The paper's: FID 2.51, IS 247.1. Dry run: 1.8 hours."""
    return imagenet_student()


def imagenet256_h_student() -> DistillConfig:
    """`imagenet_student` of MAR-H. The paper's: FID 2.00, IS 256.3. Dry run: 3.8 hours."""
    return imagenet_student()


def imagenet256_b_aligned() -> RLConfig:
    """`imagenet_aligned` of the B student. We know of no number of the paper for B. Dry run: 23 hours."""
    return imagenet_aligned()


def imagenet256_l_aligned() -> RLConfig:
    """`imagenet_aligned` of the L student. We know of no number of the paper for L. Dry run: 2.2 days."""
    return imagenet_aligned()


def imagenet256_h_aligned() -> RLConfig:
    """`imagenet_aligned` of the H student.

    The paper's: CLIP 29.33 -> 29.78, ImageReward -0.107 -> -0.064. Dry run: 4.1 days.
    """
    return imagenet_aligned()


TRAIN = {
    "digits": digits_teacher,
    "fashion-mnist": fashion_mnist_teacher,
    "cifar10": cifar10_teacher,
    "cifar10-cpu": cifar10_cpu_teacher,
    "imagenette64": imagenette64_teacher,
    "imagenette64-cpu": imagenette64_cpu_teacher,
    "emoji": emoji_teacher,
    "emoji-cpu": emoji_cpu_teacher,
    "imagenet256-b": imagenet256_b_teacher,
    "imagenet256-l": imagenet256_l_teacher,
    "imagenet256-h": imagenet256_h_teacher,
}
DISTILL = {
    "digits": digits_student,
    "fashion-mnist": fashion_mnist_student,
    "cifar10": cifar10_student,
    "cifar10-cpu": cifar10_cpu_student,
    "imagenette64": imagenette64_student,
    "imagenette64-cpu": imagenette64_cpu_student,
    "emoji": emoji_student,
    "emoji-cpu": emoji_cpu_student,
    "imagenet256-b": imagenet256_b_student,
    "imagenet256-l": imagenet256_l_student,
    "imagenet256-h": imagenet256_h_student,
}
RL = {
    "digits": digits_aligned,
    "fashion-mnist": fashion_mnist_aligned,
    "cifar10": cifar10_aligned,
    "cifar10-cpu": latents_aligned_on_cpu,
    "imagenette64": imagenette64_aligned,
    "imagenette64-cpu": imagenette64_cpu_aligned,
    "emoji": pictures_aligned,
    "emoji-cpu": latents_aligned_on_cpu,
    "imagenet256-b": imagenet256_b_aligned,
    "imagenet256-l": imagenet256_l_aligned,
    "imagenet256-h": imagenet256_h_aligned,
}
EVALUATE = {
    "digits": EvaluateConfig,
    "fashion-mnist": fashion_mnist_evaluation,
    "cifar10": cifar10_evaluation,
    "cifar10-cpu": cifar10_evaluation,
    "imagenette64": imagenette64_evaluation,
    "imagenette64-cpu": imagenette64_evaluation,
    "emoji": emoji_evaluation,
    "emoji-cpu": emoji_evaluation,
    "imagenet256-b": imagenet_evaluation,
    "imagenet256-l": imagenet_evaluation,
    "imagenet256-h": imagenet_evaluation,
}


GRIDS = {
    "digits": (8, 1), "fashion-mnist": (28, 1), "cifar10": (32, 3), "cifar10-cpu": (4, 32), "imagenette64": (8, 32),
    "imagenette64-cpu": (8, 32), "emoji": (32, 3), "emoji-cpu": (4, 32),
}  # fmt: skip
"""Side and channels of what is cut into patches: pixels, or latents."""


def sizes(recipe: str, config: Any) -> MARConfig:
    """The network that a recipe makes, or starts from, for a plan without data or a model's folder (--dry-run).

    Raises:
        ValueError: images other than the recipe's, and the settings do not say of what size.
    """
    if recipe.startswith("imagenet256-"):
        return config.model if isinstance(config, TrainConfig) else PRESETS[f"mar-{recipe[-1]}"]
    made = TRAIN[recipe]()
    teacher = config if isinstance(config, TrainConfig) else made
    patch, (side, channels) = teacher.patch_size, GRIDS[recipe]
    if getattr(config, "data", made.data) != made.data:
        if config.image_size is None or teacher.tokenizer != "pixels":
            raise ValueError("a dry run reads no data: give --image-size and raw pixels, or the folder of a model")
        side, channels = config.image_size, 3
    return dataclasses.replace(teacher.model, grid=side // patch, token_dim=channels * patch**2, num_classes=10)
