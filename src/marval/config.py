"""Settings of networks and runs: frozen dataclasses, checked at construction, saved with every run as JSON."""

import dataclasses
import itertools
import math
import numbers as kinds
import os
import sys
import types
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin


def check(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds: user input, not invariants."""
    if not condition:
        raise ValueError(message)


def check_types(config: Any) -> None:
    """Raises ValueError unless every field of a dataclass has a value of its type.

    Types are those that settings have: bool, str (a path becomes one), int, float (also an integer), another dataclass,
    one of a Literal, a tuple of numbers, which may be given as a list and becomes a tuple, or one of these or None.
    """
    for field in dataclasses.fields(config):
        name = field.name
        value: Any = getattr(config, name)
        options = get_args(field.type) if get_origin(field.type) in (Union, types.UnionType) else (field.type,)
        if value is None and types.NoneType in options:
            continue
        kind: Any = options[0]
        if get_origin(kind) is Literal:
            known = get_args(kind)
            check(value in known, f"unknown {name} {value!r}: choose one of {', '.join(known)}")
        elif get_origin(kind) is tuple:
            if not isinstance(value, tuple | list) or len(value) != len(get_args(kind)):
                raise ValueError(f"{name} must be {len(get_args(kind))} numbers, got {value!r}")
            for part in value:
                _check_type(name, part, get_args(kind)[0])
            object.__setattr__(config, name, tuple(value))
        elif kind is str and isinstance(value, os.PathLike):
            object.__setattr__(config, name, os.fspath(value))
        else:
            _check_type(name, value, kind)


def _check_type(name: str, value: Any, kind: type) -> None:
    if kind is int:
        fits, wanted = isinstance(value, kinds.Integral) and not isinstance(value, bool), "an integer"
    elif kind is float:
        fits = isinstance(value, kinds.Real) and not isinstance(value, bool) and not math.isnan(value)
        wanted = "a number"
    else:
        fits, wanted = isinstance(value, kind), {bool: "True or False", str: "a string"}.get(kind, f"a {kind.__name__}")
    check(fits, f"{name} must be {wanted}, got {value!r}")


def say(text: str) -> None:
    """Print at once, from one of several processes only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def warn(what: str) -> None:
    """Print a warning to stderr, from one of several processes only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"marval: warning: {what}", file=sys.stderr, flush=True)


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass of settings as a dictionary, nested ones too; tuples stay, which JSON writes as lists."""
    return dataclasses.asdict(config)


def filled(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Saved settings completed by defaults, for runs of versions that lacked a setting.

    Args:
        values: as `to_dict` gives them, some missing. defaults: all of them; nested ones are completed one by one.
    """
    nested = {
        name: filled(values[name], default)
        for name, default in defaults.items() if isinstance(default, dict) and isinstance(values.get(name), dict)
    }  # fmt: skip
    return defaults | values | nested


def from_dict(cls: Any, values: dict[str, Any]) -> Any:
    """A dataclass of settings, none of them nested, from its JSON types. Raises ValueError on an unknown name."""
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := set(values) - known:
        raise ValueError(f"{cls.__name__} has no setting {sorted(unknown)[0]!r}")
    return cls(**values)


def numbers(text: str, kind: type, name: str) -> list[Any]:
    """Comma-separated numbers, such as the ``1.0,1.2,1.5`` of a sweep; an empty text is none."""
    try:
        return [kind(part) for part in text.split(",")] if text else []
    except ValueError:
        example = "1.0,1.2,1.5" if kind is float else "16,32,64"
        raise ValueError(f"{name} {text!r} must be numbers separated by commas, such as {example}") from None


@dataclass(frozen=True, kw_only=True)
class MARConfig:
    """Sizes of a MAR network (MAR, arXiv 2406.11838)."""

    grid: int = 16
    """Tokens per side; an image is L = grid * grid tokens."""
    token_dim: int = 16
    """Channels of a token, D."""
    num_classes: int = 1000
    """Number of classes; one more embedding stands for "no class"."""
    width: int = 768
    """Width of encoder and decoder."""
    depth: int = 12
    """Transformer blocks of the encoder, and as many of the decoder."""
    heads: int = 12
    """Attention heads per block."""
    buffer_size: int = 64
    """Copies of the class embedding in front of the encoder's tokens."""
    head_width: int = 1024
    """Width of the MLP diffusion head."""
    head_depth: int = 6
    """Residual blocks of the head."""
    dropout: float = 0.0
    """Dropout of attention and projections while training (MAR uses 0.1; distillation and RL always use 0)."""

    def __post_init__(self) -> None:
        check_types(self)
        for name, value in vars(self).items():
            check(name == "dropout" or value >= 1, f"model.{name} must be at least 1, got {value}")
        check(self.width % self.heads == 0, f"model.width {self.width} must be a multiple of model.heads {self.heads}")
        check(0 <= self.dropout < 1, f"model.dropout must be in [0, 1), got {self.dropout}")

    @property
    def num_tokens(self) -> int:
        return self.grid * self.grid


PRESETS = {
    "mar-b": MARConfig(),
    "mar-l": MARConfig(width=1024, depth=16, heads=16, head_width=1280, head_depth=8),
    "mar-h": MARConfig(width=1280, depth=20, heads=16, head_width=1536, head_depth=12),
}
"""The published ImageNet 256x256 models: 208, 479 and 943 million parameters."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """How a student is evaluated; stored with its weights."""

    t_init: int = 300
    """Timestep of the one evaluation of the head, or the first. On the cosine schedule sigma/alpha is 0.5 at 300 and
    2.5 at 755. Of one evaluation little depends on it: those from 100 to 755 differ by less than trainings do."""
    evaluations: int = 1
    """Most evaluations of the head per token that it is distilled for; it draws with any number that divides this one.
    Each but the first starts from the token before it, noised anew, at a timestep evenly below t_init: give them a
    higher one, 755. Rollouts, the curve of quality and RL draw with one."""
    guidance: float = 1.5
    """Guidance scale the student was distilled for; with a range, the default at sampling."""
    guidance_range: tuple[float, float] | None = None
    """If set, the student takes the guidance scale as an input and serves any value in the range."""

    def __post_init__(self) -> None:
        check_types(self)
        check(1 <= self.t_init <= 950, f"t_init must be in [1, 950], got {self.t_init}: beyond 950 rounding dominates")
        check(self.evaluations >= 1, f"the number of evaluations must be at least 1, got {self.evaluations}")
        check(self.evaluations <= self.t_init, f"{self.evaluations} evaluations do not fit below t_init {self.t_init}")
        check(self.guidance >= 0, f"guidance must not be negative, got {self.guidance}")
        if self.guidance_range is not None:
            low, high = self.guidance_range
            check(0 <= low <= high, f"guidance_range {low} {high} must be two scales of 0 or more, the lower one first")
            check(low <= self.guidance <= high, f"guidance {self.guidance} is outside guidance_range {low} {high}")

    @property
    def choices(self) -> tuple[int, ...]:
        """Numbers of evaluations that it can draw with, from 1 up."""
        return tuple(n for n in range(1, self.evaluations + 1) if self.evaluations % n == 0)

    def timesteps(self, evaluations: int) -> tuple[int, ...]:
        """Timesteps of each of ``evaluations`` head evaluations: equal steps from t_init down.

        Raises:
            ValueError: the student was not distilled for this number.
        """
        check(
            evaluations in self.choices,
            f"evaluations must be {' or '.join(map(str, self.choices))} for this student, got {evaluations} "
            "(marval distill --student.evaluations)",
        )
        return tuple(self.t_init * (evaluations - i) // evaluations for i in range(evaluations))


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How images are drawn unless the caller says otherwise; stored with a model's weights."""

    ar_steps: int = 8
    """AR steps K, from 1 to the number of tokens."""
    head_steps: int = 100
    """Denoising steps of a teacher's inner chain."""
    evaluations: int = 1
    """Evaluations of a student's head per token: 1, or a number that divides those that it was distilled for."""
    solver: Literal["ancestral", "ddim"] = "ancestral"
    """How the inner chain steps."""
    guidance: float = 1.5
    """Guidance scale w; 1 is no guidance."""
    guidance_schedule: Literal["constant", "linear"] = "constant"
    """Constant w, or w growing linearly with the share of revealed tokens, from 1."""
    temperature: float = 1.0
    """Scale of the noise in the inner chain; for a student, of its input noise."""
    order: Literal["random", "raster", "centre-out", "halton"] = "random"
    """Unmasking order: random, raster, centre-out or halton (evenly spread, for few AR steps)."""
    refresh_every: int = 1
    """AR steps from one full pass of the backbone to the next; in between, only new and next tokens are computed,
    against cached keys and values: faster, not exact (marval.models.cached). 1 is exact."""

    def __post_init__(self) -> None:
        check_types(self)
        check(self.ar_steps >= 1, f"the number of AR steps must be at least 1, got {self.ar_steps}")
        check(self.refresh_every >= 1, f"refresh_every must be at least 1, got {self.refresh_every}")
        check(self.head_steps >= 1, f"the number of denoising steps must be at least 1, got {self.head_steps}")
        check(self.evaluations >= 1, f"the number of evaluations must be at least 1, got {self.evaluations}")
        for name in ("guidance", "temperature"):
            value = getattr(self, name)
            check(math.isfinite(value), f"{name} must be finite, got {value}")
            check(value >= 0, f"{name} must not be negative, got {value}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What the three training loops share."""

    seed: int = 0
    """Every random number of the run derives from it."""
    steps: int = 1000
    """Updates."""
    batch: int = 64
    """Images per update, over all processes."""
    save_every: int = 500
    """Updates between checkpoints."""
    sample_every: int = 500
    """Updates between sample grids (samples/step-*.png); 0 for none."""
    log_every: int = 20
    """Updates between lines of metrics.jsonl."""
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """Where the numbers of metrics.jsonl and the sample grids also go. tensorboard: event files in the run's folder;
    wandb: Weights & Biases. Each needs the package of its name."""
    ema: float = 0.999
    """Decay of the weights' exponential moving average, which is what is evaluated and shipped."""
    clip_grad: float = 3.0
    """Largest norm of a network's gradient."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """bf16: autocast of the transformer and the head's blocks; norms, head output and losses stay float32.
    auto: bf16 on CUDA, float32 on the CPU."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    shard: bool = False
    """Split weights, gradients and optimizer states over the processes (FSDP2); otherwise each holds all (DDP)."""
    accumulate: int = 1
    """Parts in which each process works through its share of a batch, to save memory; the result is the same,
    but for dropout's numbers."""
    activation_checkpointing: bool = False
    """Recompute transformer blocks in the backward pass instead of storing their activations."""
    compile: bool = False
    """Compile the blocks of transformer and head (torch.compile; needs a C++ compiler)."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("steps", "batch", "save_every", "log_every", "accumulate"):
            check(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        check(self.sample_every >= 0, f"sample_every must not be negative, got {self.sample_every}")
        check(0 <= self.ema < 1, f"ema must be in [0, 1), got {self.ema}")
        check(self.clip_grad > 0, f"clip_grad must be positive, got {self.clip_grad}")
        check(self.seed >= 0, f"seed must not be negative, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class CurveConfig(RunConfig):
    """Settings that training and distillation share, the curve of quality among them (marval.curve)."""

    graphs: bool = False
    """Launch the kernels of an update as CUDA graphs, one for each number of masked tokens: small networks, which wait
    for the launches, train faster. For one process; each graph keeps the inputs of a whole batch."""
    eval_every: int = 0
    """Updates between evaluations of the averaged weights: FID, KID, precision and recall on fixed seeds; the best is
    kept in best/. 0 for none. Each costs what `marval evaluate` costs: a teacher draws with the whole chain."""
    eval_images: int = 2000
    """Images of an evaluation. The FID of few is too high, by about as much each time: compare within a curve."""
    features: str = ""
    """Network of FID and its kind, as marval evaluate takes it; evaluations need it."""
    reference: str = ""
    """What evaluations compare with, as marval evaluate takes it; if left out, the training images."""
    patience: int = 0
    """Stop after this many evaluations in a row without a lower FID; 0 for never. While the learning rate decays to
    zero the last updates help most: best with --no-decay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eval_every", "patience"):
            check(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        check(self.eval_images >= 2, f"eval_images must be at least 2 for a Frechet distance, got {self.eval_images}")
        for name, off in (("accumulate", 1), ("activation_checkpointing", False)):
            given = getattr(self, name)
            check(not self.graphs or given == off, f"graphs do not work with {name} {given}: use one of them")
        networks = "inception, a folder of marval train-classifier, or another that marval evaluate takes"
        check(
            not self.eval_every or bool(self.features),
            f"eval_every {self.eval_every} needs the network of FID: name it with --features ({networks})",
        )
        for name in ("features", "reference", "patience"):
            given = getattr(self, name)
            check(not given or self.eval_every > 0, f"{name} {given} is for evaluations: say how often, --eval-every")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(CurveConfig):
    """Training of a MAR teacher with the diffusion loss."""

    data: str = "digits"
    """`digits` (embedded), a folder with one sub-folder of images per class, an .npz of images, labels and class_names,
    or a folder of `marval encode`."""
    classes: Literal["folders", "imagenet"] = "folders"
    """The classes are the sub-folders, or ImageNet's 1,000, of which the sub-folders name some by WordNet id."""
    image_size: int | None = None
    """Centre-crop and scale the images of a folder to this size; None takes them as they are."""
    tokenizer: str = "pixels"
    """`pixels`, or an autoencoder: a folder (marval import-kl16, import-taesd, diffusers AutoencoderKL) or hub name.
    A folder of `marval encode` brings its own."""
    patch_size: int = 2
    """Side of the square patch, of pixels or of latents, that makes a token."""
    model: MARConfig = MARConfig()
    """The network; its grid, token_dim and num_classes are set from the data."""
    widen_head: bool = False
    """Widen the head in proportion to the square root of a token's channels beyond 16, as MAR's author advises."""
    lr: float = 1e-3
    """Peak learning rate of AdamW (betas 0.9, 0.95)."""
    weight_decay: float = 0.02
    """Decoupled weight decay of the backbone's matrices; vectors and the head have none, as in MAR."""
    warmup: int = 100
    """Updates of linear warm-up."""
    decay: bool = True
    """Let the learning rate decay to zero by a cosine; without, it stays constant, as MAR trains."""
    class_drop: float = 0.1
    """Probability of training an image without its class."""
    mask_ratios: Literal["training", "inference"] = "training"
    """Masked tokens: MAR's truncated normal on [0.7, 1], or what the K AR steps of `sampling` see."""
    head_batch_mul: int = 4
    """Diffusion timesteps per token and update (MAR's diffusion_batch_mul)."""
    shift: int = 0
    """Largest random translation of the training images, in pixels (replicated borders); 0 for none."""
    flip: bool = False
    """Mirror each training image left to right with probability 1/2."""
    sampling: SamplingConfig = SamplingConfig()
    """Defaults stored with the model, used for the sample grids."""
    eval_head_steps: int | None = None
    """Denoising steps per token in evaluations, whose time is nearly in proportion to them. None: those of `sampling`,
    so that the numbers are those of marval evaluate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.lr > 0, f"lr must be positive, got {self.lr}")
        check(0 <= self.class_drop < 1, f"class_drop must be in [0, 1), got {self.class_drop}")
        check(self.head_batch_mul >= 1, f"head_batch_mul must be at least 1, got {self.head_batch_mul}")
        check(self.shift >= 0, f"shift must not be negative, got {self.shift}")
        check(self.warmup >= 0, f"warmup must not be negative, got {self.warmup}")
        check(self.weight_decay >= 0, f"weight_decay must not be negative, got {self.weight_decay}")
        check(self.patch_size >= 1, f"patch_size must be at least 1, got {self.patch_size}")
        if self.eval_head_steps is not None:
            check(self.eval_head_steps >= 1, f"eval_head_steps must be at least 1, got {self.eval_head_steps}")


@dataclass(frozen=True, kw_only=True)
class GSIMConfig:
    """The GSIM objective (marval.gsim)."""

    lam: float = -0.4
    """Weight lambda of the distance term L2; the paper's is 1, SiD's best alpha 1.0 .. 1.2 is 0 .. -0.4. The higher it
    is, the narrower the student's draws: more precision, less recall (docs/results.md)."""
    distance: Literal["pseudo-huber", "squared"] = "pseudo-huber"
    """Distance between the two scores."""
    t_range: tuple[int, int] = (20, 950)
    """Timesteps of the student loss, both ends included."""
    auxiliary_t_range: tuple[int, int] = (0, 999)
    """Timesteps of the auxiliary loss, both ends included."""
    auxiliary_updates: int = 1
    """Auxiliary updates per student update."""
    lr: float = 2e-4
    """Student's learning rate, Adam with betas (0, 0.999); 0 lets only the auxiliary learn."""
    auxiliary_lr: float = 4e-4
    """Auxiliary's learning rate, Adam with betas (0, 0.999)."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("t_range", "auxiliary_t_range"):
            low, high = getattr(self, name)
            check(0 <= low <= high <= 999, f"{name} must satisfy 0 <= low <= high <= 999, got {low} {high}")
        check(self.auxiliary_updates >= 1, f"auxiliary_updates must be at least 1, got {self.auxiliary_updates}")
        check(self.lr >= 0, f"lr must not be negative, got {self.lr}")
        check(self.auxiliary_lr > 0, f"auxiliary_lr must be positive, got {self.auxiliary_lr}")


@dataclass(frozen=True, kw_only=True)
class DistillConfig(CurveConfig):
    """Distillation of a teacher into a one-step student."""

    data: str = "digits"
    """Images whose tokens give the contexts: `digits`, a folder with one sub-folder per class, an .npz, or a folder of
    `marval encode`."""
    classes: Literal["folders", "imagenet"] = "folders"
    """The classes are the sub-folders, or ImageNet's 1,000, of which the sub-folders name some by WordNet id."""
    image_size: int | None = None
    """Centre-crop and scale the images of a folder to this size; None takes them as they are."""
    flip: bool = False
    """Mirror each image left to right with probability 1/2."""
    class_drop: float = 0.1
    """Probability of a context without class, so that the student also serves unconditional images."""
    gsim: GSIMConfig = GSIMConfig()
    """The objective."""
    student: StudentConfig = StudentConfig()
    """How the student is evaluated: once or a few times, with one guidance or a range of scales as an input."""
    trained: Literal["head", "all"] = "all"
    """Train everything, or only the head, on the teacher's frozen backbone: contexts are then computed once for all
    three heads, but the head cannot see what guidance depends on (docs/method.md)."""
    auxiliary: Literal["head", "network"] = "head"
    """A head on the student's conditions; or, with trained all, a whole network: half as much work again, and in small
    pictures 5 % less FID."""
    mask_ratios: Literal["training", "inference", "tokens"] = "inference"
    """Masked tokens per context: the training distribution, or that of the K AR steps of sampling, each as likely as
    the other or (tokens) as often as it draws tokens, which late ones do most. Of 64 tokens CIFAR-10's student went on
    better (FID 10 % below its start's), of 16 digits' the same, of 64 latents of Imagenette worse."""
    rollout: float = 0.0
    """Share of updates whose contexts come from the student's own rollout instead of data."""
    context_updates: int = 1
    """Updates in a row on the same contexts, with new noise: 2 and more save passes through the teacher's backbone, the
    only one with trained head."""
    ar_steps: int = 8
    """AR steps K of inference mask ratios, of rollouts and of sampling."""
    warmup: int = 20
    """Updates of linear warm-up of both learning rates."""
    decay: bool = True
    """Let both learning rates decay to zero by a cosine; without, they stay constant."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.warmup >= 0, f"warmup must not be negative, got {self.warmup}")
        check(0 <= self.class_drop < 1, f"class_drop must be in [0, 1), got {self.class_drop}")
        check(
            self.auxiliary == "head" or self.trained == "all",
            "auxiliary network is for trained all: with trained head, whose backbone is frozen, give auxiliary head",
        )
        check(0 <= self.rollout <= 1, f"rollout must be in [0, 1], got {self.rollout}")
        n = self.context_updates
        check(n >= 1, f"context_updates must be at least 1, got {n}")
        fits = self.save_every % n == 0
        check(fits, f"save_every {self.save_every} must be a multiple of context_updates {n}, so that runs can resume")
        check(self.ar_steps >= 1, f"ar_steps must be at least 1, got {self.ar_steps}")


@dataclass(frozen=True, kw_only=True)
class RLConfig(RunConfig):
    """Reward post-training of a student."""

    reward: str = "classifier"
    """`classifier` (log-probability of the asked class), `reads-class` (1 if the classifier reads it, else 0),
    `pickscore:`, `clip:`, `hps:` or `imagereward:` and a folder or hub name, `aesthetic:CLIP:HEAD`, `brisque:FOLDER`,
    `path/to/file.py:function`: a callable (images float NCHW in [0, 1], prompts list[str]) -> (B,), also after
    `verifiable:` or `exact-match:`; or a sum, `0.7*REWARD + 0.3*REWARD`."""
    classifier: str = ""
    """Classifier that the built-in rewards use: a folder of marval train-classifier, one that comes with marval
    (`fashion-mnist/classifier`), a CIFAR-10 ResNet (.th) or ImageNet's MobileNetV2 (.npz)."""
    judge: str = ""
    """Another classifier, never trained on: its accuracy and log-probability of the class are watched."""
    held_out: str = ""
    """Rewards to watch and not to train on, comma-separated, each as `reward`."""
    features: str = ""
    """Network of FID, KID, precision and recall, as marval evaluate takes it; if left out, the judge, or else the
    classifier, unless the reward optimises it; without any, they are not measured."""
    reference: str = ""
    """What FID and its kind compare with: `digits`, a folder of images or an .npz, as marval evaluate takes it; if left
    out, images of the starting student on other seeds."""
    prompt: str = "a high-quality and harmonious picture of {class}"
    """Prompt of each image; {class} is replaced by the class name."""
    algorithm: Literal["gradient", "group"] = "gradient"
    """Backpropagate a differentiable reward through the rollout, or group-relative policy gradient for a black box."""
    trained: Literal["head", "all", "lora"] = "head"
    """Train the head, everything, or low-rank adapters of everything, merged into the weights that are saved."""
    lora_rank: int = 8
    """Rank of the adapters (trained lora)."""
    ar_steps: int = 8
    """AR steps K of a rollout."""
    grad_ar_steps: int = 0
    """AR steps whose tokens carry gradients; 0 for all."""
    grad_ar_choice: Literal["last", "random"] = "last"
    """Which AR steps carry gradients: the last ones, or others at random in each update."""
    checkpoint_ar_steps: bool = True
    """Store only the tokens of each AR step, and recompute the rest in the backward pass; without, store all."""
    group_size: int = 8
    """Images per group; a group shares class, order and the student's noise (algorithm group)."""
    std: float = 0.1
    """Exploration: standard deviation of the Gaussian around each token (algorithm group)."""
    clip: float = 0.2
    """Clipping of the probability ratio (algorithm group)."""
    inner_updates: int = 1
    """Updates per batch of rollouts (algorithm group)."""
    kl: float = 0.03
    """Weight of the divergence to the starting student, both as Gaussians of standard deviation `std`; 0 for none."""
    anchor: float = 1.0
    """Weight of the GSIM term towards the teacher; 0 switches it and its auxiliary off."""
    anchor_final: float | None = None
    """Weight of the GSIM term at the last update, linearly from `anchor`; None for a constant one."""
    hinge: float | None = None
    """Rewards above this value earn nothing more."""
    target: float | None = None
    """Stop when the reward on held-out seeds has reached this value, unless the model has collapsed."""
    select: Literal["auto", "reward", "judge", "held-out", "fid"] = "auto"
    """The score on held-out seeds that picks the best model and that `patience` watches: the reward, the judge's
    log-probability, the first of `held_out`, or FID. auto: the judge, else `held_out`, else the reward."""
    patience: int = 3
    """Stop after this many evaluations without a better score, or three with a collapsed model; 0: only at `target`."""
    eval_every: int = 10
    """Updates between held-out evaluations."""
    eval_images: int = 500
    """Images of a held-out evaluation."""
    range_seeds: int = 4
    """Sets of `eval_images` images of the starting student that give the range of every held-out number."""
    range_width: float = 3.0
    """A held-out number raises an alarm if it is further from the starting student's than this many spreads."""
    collapse: int = 5
    """A model with so many alarms at once, one of them no mere image statistic, or with less than half of the starting
    student's recall, counts as collapsed, and is never the best; 0 for never."""
    gsim: GSIMConfig = GSIMConfig(lr=1e-4, auxiliary_lr=2e-4)
    """The anchor's objective, and the learning rates of student and auxiliary."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.anchor >= 0 and self.kl >= 0, f"anchor and kl must not be negative: {self.anchor} {self.kl}")
        if self.anchor_final is not None:
            check(self.anchor_final >= 0, f"anchor_final must not be negative, got {self.anchor_final}")
            check(self.anchor > 0, f"anchor_final {self.anchor_final} needs an anchor above 0 to start from")
        check(self.std > 0, f"std must be positive, got {self.std}")
        for name in ("ar_steps", "eval_images", "eval_every"):
            check(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        check(self.patience >= 0, f"patience must not be negative, got {self.patience}")
        check(self.lora_rank >= 1, f"lora_rank must be at least 1, got {self.lora_rank}")
        check(self.range_seeds >= 2, f"range_seeds must be at least 2, got {self.range_seeds}")
        check(self.range_width > 0, f"range_width must be positive, got {self.range_width}")
        check(self.collapse >= 0, f"collapse must not be negative, got {self.collapse}")
        needs = {"judge": self.judge, "held-out": self.held_out, "fid": self.features or self.judge or self.classifier}
        flag = {"fid": "features", "held-out": "held-out"}.get(self.select, self.select)
        check(bool(needs.get(self.select, True)), f"select {self.select} needs --{flag}")
        check(self.clip > 0, f"clip must be positive, got {self.clip}")
        check(self.inner_updates >= 1, f"inner_updates must be at least 1, got {self.inner_updates}")
        check(0 <= self.grad_ar_steps <= self.ar_steps, f"grad_ar_steps {self.grad_ar_steps} must be in [0, ar_steps]")
        if self.algorithm == "group":
            check(self.group_size >= 2, f"group_size must be at least 2, got {self.group_size}")
            check(
                self.batch % self.group_size == 0,
                f"batch {self.batch} must be a multiple of group_size {self.group_size}",
            )

    def anchor_at(self, step: int) -> float:
        """The anchor's weight in update ``step``, counted from 0."""
        final = self.anchor if self.anchor_final is None else self.anchor_final
        return self.anchor + (final - self.anchor) * step / max(1, self.steps - 1)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How a model is measured. Several values of guidance, ar_steps, head_steps or evaluations: every combination is
    measured."""

    reference: str = ""
    """What the images are compared with: `digits`, a split of data to train on (`DATA:train`, `DATA:test`), a folder of
    images (also nested), an .npz of images (`images` or `arr_0`, uint8 NHWC), or an .npz of statistics: `mu` and
    `sigma`, as ADM's and MAR's files have, for sFID also `mu_s` and `sigma_s`; or what --save-reference wrote."""
    num_images: int = 5000
    """Images drawn, over all processes, of all classes in turn; 50,000 is the custom on ImageNet."""
    seed: int = 0
    """Image i of a seed is the same in any batch size and on any number of processes."""
    batch: int = 250
    """Images that a process draws at a time; at most 250 take effect."""
    features: str = ""
    """Network of the features: `inception` (FID's), a folder of marval train-classifier, a mobilenet_v2*.npz, a
    CIFAR-10 resnet*.th, or path/to/file.py:function. If left out, the `classifier` folder beside the model's."""
    inception_weights: str = ""
    """File of Inception's weights; if left out, it is looked for in PyTorch's hub cache, and else downloaded."""
    weights: Literal["ema", "raw"] = "ema"
    """The average that a run ships, or the weights as they were last trained."""
    guidance: str = ""
    """Guidance scales w, comma-separated; 1 is no guidance. The model's default if left out, as all below."""
    ar_steps: str = ""
    """Numbers of AR steps K, comma-separated."""
    head_steps: str = ""
    """Numbers of denoising steps of a teacher's inner chain, comma-separated."""
    evaluations: str = ""
    """Numbers of evaluations of a student's head per token, comma-separated."""
    guidance_schedule: Literal["constant", "linear"] | None = None
    """Constant w, or w growing linearly with the share of revealed tokens."""
    solver: Literal["ancestral", "ddim"] | None = None
    """How a teacher's inner chain steps."""
    temperature: float | None = None
    """Scale of the noise."""
    order: str | None = None
    """random, raster, centre-out or halton."""
    refresh_every: int | None = None
    """AR steps from one full pass of the backbone to the next; 1 is exact."""
    rewards: str = ""
    """Rewards to take the mean of, comma-separated, each as `--reward` of marval rl; `classifier` and `reads-class` ask
    the network of `features`."""
    prompt: str = "a high-quality and harmonious picture of {class}"
    """Prompt of each image for the rewards; {class} is replaced by the class name."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Precision of the drawing: bf16 by autocast; auto: bf16 on CUDA, float32 on the CPU. Features are always
    float32."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    shard: bool = False
    """Split the weights over the processes (FSDP2); otherwise each holds all."""

    def __post_init__(self) -> None:
        check_types(self)
        check(self.num_images >= 2, f"a Frechet distance needs at least 2 images, got {self.num_images}")
        check(self.seed >= 0, f"seed must not be negative, got {self.seed}")
        check(self.batch >= 1, f"the batch size must be at least 1, got {self.batch}")
        self.settings()

    def settings(self) -> list[dict[str, Any]]:
        """Arguments of `Pipeline.settings` for every combination, one per row of a sweep."""
        swept = {
            "guidance": numbers(self.guidance, float, "guidance"),
            "ar_steps": numbers(self.ar_steps, int, "ar_steps"),
            "head_steps": numbers(self.head_steps, int, "head_steps"),
            "evaluations": numbers(self.evaluations, int, "evaluations"),
        }
        names = ("guidance_schedule", "solver", "temperature", "order", "refresh_every")
        fixed = {name: getattr(self, name) for name in names}
        combinations = itertools.product(*(values or [None] for values in swept.values()))
        return [dict(zip(swept, values, strict=True)) | fixed for values in combinations]
