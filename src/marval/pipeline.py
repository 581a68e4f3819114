"""A model as users meet it: network, tokenizer, class names and sampling defaults, loaded from one folder."""

import dataclasses
import difflib
import functools
import numbers
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from marval import masking, sampling
from marval.checkpoint import load_strictly, load_tensors, read_json, read_raw_weights, save_tensors, write_json
from marval.config import MARConfig, SamplingConfig, StudentConfig, check, from_dict, to_dict
from marval.devices import device_named
from marval.diffusion import cosine_schedule, respace
from marval.graphs import Call, Graphs, plainly
from marval.models.autoencoders import CONFIG, link_autoencoder
from marval.models.cpu import use_onednn
from marval.models.mar import MAR
from marval.rng import ImageNoise
from marval.shipped import autoencoder_folder, model_folder
from marval.tokenizers import (
    NO_IMAGES,
    LatentTokenizer,
    Tokenizer,
    to_float,
    to_uint8,
    tokenizer_from_dict,
    tokenizer_to_dict,
)

FORMAT = 1
DECODED = 256
"""Images that an autoencoder decodes at a time: its maps are the largest tensors there are."""


def read_config(folder: Path) -> tuple[MARConfig, StudentConfig | None, dict[str, Any]]:
    """Sizes of the network of a model's folder, how it is evaluated if it is a student, and the whole config.json.

    Raises:
        ValueError: there is no config.json of marval; names the file.
    """
    file = folder / "config.json"
    config = read_json(file)
    if not isinstance(config, dict) or config.get("format") != FORMAT or "model" not in config:
        raise ValueError(f"{file} does not describe a marval model (format {FORMAT})")
    try:
        student = None if config["student"] is None else from_dict(StudentConfig, config["student"])
        return from_dict(MARConfig, config["model"]), student, config
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file}: {error}") from None


class Pipeline:
    """A MAR teacher (``student is None``) or a one-step student, ready to sample.

    Attributes:
        network: the `MAR`, in eval mode. tokenizer: images <-> tokens. class_names: one per class.
        student: how a student is evaluated. sampling: defaults of every `sample` argument.
        provenance: free JSON: recipe, data, licence of the data, numbers.
    """

    def __init__(
        self, network: MAR, tokenizer: Tokenizer, class_names: Sequence[str], sampling: SamplingConfig,
        student: StudentConfig | None = None, provenance: dict[str, Any] | None = None,
    ):  # fmt: skip
        self.network = network.eval()
        self.tokenizer = tokenizer
        self.class_names = list(class_names)
        self.sampling = sampling
        self.student = student
        self.provenance = provenance or {}
        self.schedule = cosine_schedule()
        self.call: Call = plainly

    @property
    def device(self) -> torch.device:
        return self.network.fake_latent.device

    def to(self, device: torch.device | str) -> "Pipeline":
        """Move the network and the tokenizer's autoencoder."""
        self.network.to(device)
        self.tokenizer.to(device)
        if isinstance(self.call, Graphs):  # they hold the weights by address
            self.call = Graphs(self.device) if self.device.type == "cuda" else plainly
        return self

    def accelerate(self, graphs: bool = False, compile: bool = False) -> "Pipeline":
        """Sample faster, with the same images up to rounding.

        On the CPU, linear layers multiply by oneDNN, and the weights of large ones are also stored as its kernels read
        them, which doubles the memory (`marval.models.cpu`): train a model before, not after. What the arguments ask
        for is prepared at the first call of each shape, in seconds to minutes, so it pays for many images; neither
        helps a cached backbone (``refresh_every``).

        Args:
            graphs: on CUDA, record each AR step, of a teacher in two parts, and the decoding, as CUDA graphs: at small
                batches the launches take longer than the work. Weights may change in place, but not be replaced.
            compile: compile the blocks of transformer and head (torch.compile; needs a C++ compiler). On the CPU this
                takes the place of oneDNN.

        Raises:
            ValueError: graphs without CUDA.
        """
        if graphs and self.device.type != "cuda":
            raise ValueError(f"CUDA graphs need a CUDA device, but the model is on {self.device}")
        if graphs:
            self.call = Graphs(self.device)
        if self.device.type == "cpu" and not compile:
            use_onednn(self.network, pack=True)
        if compile:
            self.network.compile_blocks()
        return self

    # ---- files

    @classmethod
    def load(
        cls, path: str | Path, device: torch.device | str = "cpu", weights: Literal["ema", "raw"] = "ema",
        dtype: Literal["float32", "bf16"] = "float32",
    ) -> "Pipeline":  # fmt: skip
        """A folder that marval wrote (train, distill, rl, import-mar, export), or a model that comes with it.

        Args:
            path: the folder, or a name such as ``fashion-mnist/student`` (`marval.shipped`).
            device: as PyTorch names it; or ``auto``: cuda where there is a GPU.
            weights: the average that model.safetensors holds; or, from a run's checkpoint.pt, what was trained, as it
                is after the last update.
            dtype: of the weights; bf16 is for sampling only, at half the memory.

        Raises:
            ValueError: something is missing, damaged or does not fit, or there is no such device; the message names
                the file and the tensor, or the device.
        """
        path = model_folder(path)
        device = device_named(device)
        check(weights in ("ema", "raw"), f"unknown weights {weights!r}: choose ema or raw")
        check(dtype in ("float32", "bf16"), f"unknown dtype {dtype!r}: choose float32 or bf16")
        sizes, student, config = read_config(path)
        try:
            with torch.device("meta"):  # the weights follow: none are drawn
                network = MAR(sizes, bool(student and student.guidance_range))
            folder = autoencoder_folder(path)
            tokenizer = tokenizer_from_dict(config["tokenizer"], folder if (folder / CONFIG).exists() else None)
            sampling_defaults = from_dict(SamplingConfig, config["sampling"])
            names = config["class_names"]
            check(
                (tokenizer.grid, tokenizer.token_dim) == (sizes.grid, sizes.token_dim),
                f"the tokenizer makes {tokenizer.grid}x{tokenizer.grid} tokens of {tokenizer.token_dim}, "
                f"the model takes {sizes.grid}x{sizes.grid} of {sizes.token_dim}",
            )
            check(len(names) == sizes.num_classes, f"{len(names)} class names for {sizes.num_classes} classes")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path / 'config.json'}: {error}") from None
        file, provenance = path / "model.safetensors", config.get("provenance") or {}
        if weights == "ema":
            tensors = load_tensors(file)
        else:
            tensors, file, provenance = read_raw_weights(path), path / "checkpoint.pt", provenance | {"weights": "raw"}
        load_strictly(network.to_empty(device="cpu"), tensors, str(file))
        if dtype == "bf16":
            network.to_bf16()
        return cls(network, tokenizer, names, sampling_defaults, student, provenance).to(device)

    def save(self, path: str | Path, half: bool = False) -> None:
        """Write ``config.json`` and ``model.safetensors`` into the folder, each atomically, and link the autoencoder's
        files, if there are any, into ``tokenizer`` below it. ``half`` stores the weights in float16.

        A model that is there is replaced. What else a run left there stays, such as the ``scores.safetensors`` from
        which RL goes on: save a model that you changed in a folder of its own.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        if isinstance(self.tokenizer, LatentTokenizer) and self.tokenizer.folder is not None:
            link_autoencoder(self.tokenizer.folder, path / "tokenizer")
        tensors = self.network.state_dict()
        save_tensors(path / "model.safetensors", {name: x.half() if half else x for name, x in tensors.items()})
        config = {
            "format": FORMAT,
            "model": to_dict(self.network.config),
            "student": None if self.student is None else to_dict(self.student),
            "tokenizer": tokenizer_to_dict(self.tokenizer),
            "sampling": to_dict(self.sampling),
            "class_names": self.class_names,
            "provenance": self.provenance,
        }
        write_json(path / "config.json", config)

    # ---- arguments

    def label(self, name: int | str | None) -> int:
        """A class by name (capitals do not matter) or index (of a string, last); None is "no class".

        Raises:
            ValueError: unknown class.
        """
        if name is None:
            return self.network.config.num_classes
        if isinstance(name, str) and name in self.class_names:
            return self.class_names.index(name)
        lower = {known.lower(): index for index, known in enumerate(self.class_names)}
        if isinstance(name, str) and name.lower() in lower:
            return lower[name.lower()]
        index, number = -1, name.item() if isinstance(name, Tensor) else name
        if isinstance(number, numbers.Integral) or (isinstance(number, str) and number.strip().isdecimal()):
            index = int(number)
        if not 0 <= index < len(self.class_names):
            near = [self.class_names[lower[word]] for word in difflib.get_close_matches(str(name).lower(), lower, n=3)]
            meant = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
            some = "" if near else ", such as " + ", ".join(self.class_names[:12])
            indices = f"an index in [0, {len(self.class_names) - 1}]"
            raise ValueError(f"unknown class {name!r}{meant}: give {indices} or a name{some}")
        return index

    def settings(self, **overrides: Any) -> SamplingConfig:
        """The sampling defaults with every override that is not None, checked against this model.

        Raises:
            ValueError: a value is out of range, or this model cannot serve it.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        config = dataclasses.replace(self.sampling, **given)
        masking.masked_counts(self.network.config.num_tokens, config.ar_steps)
        respace(self.schedule, config.head_steps)
        if self.student is not None:
            if chain := [name for name in ("head_steps", "solver") if name in given]:
                raise ValueError(f"{chain[0]} is for teachers: a student takes evaluations")
            self.student.timesteps(config.evaluations)
        elif config.evaluations > 1:
            raise ValueError(f"evaluations {config.evaluations} is for students: a teacher takes head_steps")
        elif config.solver == "ddim" and given.get("temperature", 1) != 1:
            raise ValueError(f"ddim adds no noise, so temperature {config.temperature} does nothing: leave it out")
        if config.refresh_every > 1 and self.call is not plainly:
            raise ValueError(f"refresh_every {config.refresh_every} does not work with CUDA graphs: use one of them")
        if self.student is not None:
            if self.student.guidance_range is None:
                if config.guidance != self.student.guidance or config.guidance_schedule != "constant":
                    raise ValueError(
                        f"this student was distilled for a constant guidance of {self.student.guidance}, not for "
                        f"{config.guidance} ({config.guidance_schedule}): distil with a guidance range to choose freely"
                    )
            else:
                low, high = self.student.guidance_range
                linear = config.guidance_schedule == "linear"
                scales = (1.0, config.guidance) if linear else (config.guidance,)
                if not low <= min(scales) <= max(scales) <= high:
                    way = "1 to " * linear
                    raise ValueError(f"this student serves guidance in [{low}, {high}], got {way}{config.guidance}")
        return config

    def require_images(self) -> None:
        """Raises ValueError if this model draws latents that it cannot decode."""
        if not self.tokenizer.has_images:
            raise ValueError(NO_IMAGES)

    # ---- sampling

    @torch.inference_mode()
    def sample(
        self, classes: Sequence[int | str | None] | int | str | None = None, *, num_images: int | None = None,
        seed: int = 0, first_image: int = 0, ar_steps: int | None = None, head_steps: int | None = None,
        solver: Literal["ancestral", "ddim"] | None = None, evaluations: int | None = None,
        guidance: float | None = None, guidance_schedule: Literal["constant", "linear"] | None = None,
        temperature: float | None = None,
        order: str | Sequence[int] | Tensor | None = None, refresh_every: int | None = None, batch_size: int = 64,
        images: np.ndarray | None = None, keep: np.ndarray | Tensor | None = None,
        each_ar_step: Callable[[list[int], Tensor, Tensor], object] | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Draw images. Every argument left out takes the model's default.

        Args:
            classes: class indices or names, repeated in turn up to ``num_images``; None is unconditional.
            num_images: how many; by default one per class given.
            seed: image i of a seed is the same in any batch size and on any number of processes.
            first_image: number of the first image of this call, so that a set can be drawn in parts; it shifts the
                seeds, not the classes.
            ar_steps: K, from 1 to the number of tokens.
            head_steps, solver: the teacher's inner chain: 1..1000 steps, ``ancestral`` or ``ddim``.
            evaluations: of a student's head per token; 1, or a number that divides those that it was distilled for.
            guidance: scale w >= 0, 1 is none. guidance_schedule: ``constant`` or ``linear``.
            temperature: scale of a student's input noise, or of what each ancestral step of a teacher's chain adds (not
                of the noise that it starts from); >= 0. DDIM adds none.
            order: ``random``, ``raster``, ``centre-out``, ``halton``, or a permutation (L,), or one per image
                (num_images, L), in the order in which tokens are revealed.
            refresh_every: AR steps from one full pass of the backbone to the next; 1 is exact.
            images, keep: inpainting. uint8 NHWC images, and a boolean mask (or 0 and 1) of the token grid, (grid, grid)
                or one per image (num_images, grid, grid): True tokens are kept, the others drawn. An autoencoder gives
                the kept tokens (the posterior's mode) and decodes them, so kept pixels are near the given ones.
            each_ar_step: called after each AR step of a batch with the numbers of its images in what is returned, their
                tokens so far (B, L, D), and the positions (B, V) of those that are kept or drawn (`to_images` decodes).

        Returns:
            uint8 NHWC (num_images, H, W, C).

        Raises:
            ValueError: an argument is out of range; the message names it.
            FloatingPointError: tokens came out that are not finite, which would be black pixels.
        """
        self.require_images()
        batches = self._token_batches(
            classes, num_images, seed, first_image, batch_size, order, images, keep,
            ar_steps=ar_steps, head_steps=head_steps, solver=solver, evaluations=evaluations, guidance=guidance,
            guidance_schedule=guidance_schedule, temperature=temperature, refresh_every=refresh_every,
            each_ar_step=each_ar_step,
        )  # fmt: skip
        parts = [(rows, self.to_images(tokens).cpu().numpy()) for rows, tokens in batches]
        return _in_order(parts)

    def to_images(self, tokens: Tensor, call: Call | None = None) -> Tensor:
        """Tokens (B, L, D) -> uint8 NHWC images, on their device. ``call``: in place of the model's own."""
        decode = functools.partial(
            call or self.call, "images", lambda some: to_uint8(self.tokenizer.decode(some))
        )  # fmt: skip
        return torch.cat([decode(some) for some in tokens.split(DECODED)])

    @torch.no_grad()
    def sample_tokens(
        self, classes: Sequence[int | str | None] | int | str | None = None, *, num_images: int | None = None,
        seed: int = 0, first_image: int = 0, batch_size: int = 64, order: str | Sequence[int] | Tensor | None = None,
        images: np.ndarray | None = None, keep: np.ndarray | Tensor | None = None, **settings: Any,
    ) -> Tensor:  # fmt: skip
        """As `sample`, without decoding: tokens (num_images, L, D) float32 on the CPU."""
        batches = self._token_batches(
            classes, num_images, seed, first_image, batch_size, order, images, keep, **settings
        )  # fmt: skip
        return torch.from_numpy(_in_order([(rows, tokens.float().cpu().numpy()) for rows, tokens in batches]))

    def _token_batches(
        self, classes: Any, num_images: int | None, seed: int, first_image: int, batch_size: int, order: Any,
        images: np.ndarray | None, keep: Any,
        each_ar_step: Callable[[list[int], Tensor, Tensor], object] | None = None, **overrides: Any,
    ):  # fmt: skip
        named_order = order if isinstance(order, str) else None
        config = self.settings(order=named_order, **overrides)
        counts = {"seed": seed, "first_image": first_image, "batch_size": batch_size, "num_images": num_images}
        for name, count in counts.items():
            if count is not None and not isinstance(count, numbers.Integral):
                raise ValueError(f"{name} must be an integer, got {count!r}")
        if seed < 0 or first_image < 0:
            raise ValueError(f"seed and first_image must not be negative, got {seed} and {first_image}")
        if batch_size < 1:
            raise ValueError(f"the batch size must be at least 1, got {batch_size}")
        if isinstance(classes, np.ndarray | Tensor) and not classes.ndim:
            classes = classes.item()
        given: list[Any] = (
            list(classes) if isinstance(classes, Iterable) and not isinstance(classes, str) else [classes]
        )
        if not given:
            raise ValueError("classes is empty: give at least one, or None for unconditional images")
        if num_images is None:
            num_images = len(given) if images is None else len(images)
            if num_images < len(given):
                raise ValueError(f"{len(given)} classes for {num_images} images to inpaint: give as many images")
        if num_images < 1:
            raise ValueError(f"the number of images must be at least 1, got {num_images}")
        labels = [self.label(given[i % len(given)]) for i in range(num_images)]
        orders = None if order is None or named_order else self._given_orders(order, num_images)
        known, kept = self._inpainting(images, keep, num_images, batch_size)

        kept_counts = kept.sum(1).tolist()
        for count in sorted(set(kept_counts)):  # static shapes: images with equally many known tokens go together
            rows = [i for i in range(num_images) if kept_counts[i] == count]
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                tokens = self.draw_batch(
                    config, torch.tensor([labels[i] for i in batch]),
                    ImageNoise(seed, [first_image + i for i in batch], self.device),
                    None if orders is None else orders[batch],
                    None if known is None else known[batch], kept[batch],
                    None if each_ar_step is None else functools.partial(each_ar_step, batch),
                )  # fmt: skip
                if not tokens.isfinite().all():
                    raise FloatingPointError(
                        f"tokens came out that are not finite (seed {seed}, image {first_image + batch[0]} and on): "
                        "if the weights are finite, draw in float32"
                    )
                yield batch, tokens

    def _given_orders(self, order: Any, num_images: int) -> Tensor:
        orders = masking.check_order(torch.as_tensor(order), self.network.config.num_tokens)
        if orders.ndim == 2 and len(orders) != num_images:
            raise ValueError(f"give one order, or one for each of the {num_images} images; got {len(orders)}")
        return orders.expand(num_images, -1)

    def _inpainting(
        self, images: np.ndarray | None, keep: Any, num_images: int, batch_size: int
    ) -> tuple[Tensor | None, Tensor]:
        grid, length = self.network.config.grid, self.network.config.num_tokens
        if (images is None) != (keep is None):
            raise ValueError("inpainting needs both images and keep")
        if images is None:
            return None, torch.zeros(num_images, length, dtype=torch.bool)
        images, size = np.asarray(images), self.tokenizer.image_size
        shape = (num_images, size, size, self.tokenizer.image_channels)
        if images.dtype != np.uint8 or images.shape != shape:
            raise ValueError(f"images must be uint8 NHWC {shape}; got {images.dtype} {images.shape}")
        kept = torch.as_tensor(keep)
        if not ((kept == 0) | (kept == 1)).all():
            raise ValueError("keep must be True or False for each token, not a share of it")
        kept = kept.bool().cpu()
        if tuple(kept.shape) not in ((grid, grid), (num_images, grid, grid)):
            raise ValueError(f"keep must be a ({grid}, {grid}) mask of tokens, or one per image; got {kept.shape}")
        parts = [
            self.tokenizer.encode(to_float(torch.from_numpy(images[start : start + batch_size])).to(self.device))
            for start in range(0, num_images, batch_size)
        ]
        known = torch.cat(parts)
        return known, kept.reshape(-1, length).expand(num_images, -1)

    def draw_batch(
        self, config: SamplingConfig, labels: Tensor, noise: ImageNoise, orders: Tensor | None = None,
        known: Tensor | None = None, kept: Tensor | None = None,
        each_ar_step: Callable[[Tensor, Tensor], object] | None = None,
    ) -> Tensor:  # fmt: skip
        """One batch of tokens (B, L, D).

        Args:
            labels: (B,) on any device. noise: of these images. orders: (B, L), else drawn or made by name.
            known, kept: tokens (B, L, D) and a mask (B, L) with equally many True in each row.
            each_ar_step: called after each with the tokens so far and the positions (B, V) that are not masked.
        """
        length, device = self.network.config.num_tokens, self.device
        orders = self.make_orders(config.order, noise) if orders is None else orders.to(device)
        num_known = 0
        if kept is not None and bool(kept.any()):
            num_known = int(kept[0].sum())
            known_first = torch.argsort(kept.to(device).gather(1, orders).int(), dim=1, descending=True, stable=True)
            orders = orders.gather(1, known_first)
        z = noise.randn(length, self.network.config.token_dim)
        if num_known == length:
            assert known is not None
            return known.to(device)
        to_draw = length - num_known
        counts = masking.masked_counts(to_draw, min(config.ar_steps, to_draw))
        steps = sampling.unmask(
            self.network, self.token_sampler(config, noise), labels.to(device), orders, counts, z,
            guidance=config.guidance, guidance_schedule=config.guidance_schedule, needs_null=self.student is None,
            tokens=None if known is None or num_known == 0 else known.to(device), refresh_every=config.refresh_every,
            call=self.call,
        )  # fmt: skip
        tokens = z
        for tokens, masked in zip(steps, counts[1:], strict=True):
            if each_ar_step is not None:
                each_ar_step(tokens, orders[:, : length - masked])
        return tokens

    def make_orders(self, order: str, noise: ImageNoise) -> Tensor:
        """(B, L) orders by name; random ones from each image's own generator."""
        grid, count = self.network.config.grid, len(noise.generators)
        if order == "random":
            return noise.permutation(grid * grid)
        if order == "halton":
            return masking.shifted(
                masking.halton_order(grid).to(self.device), grid, noise.permutation(grid * grid)[:, 0]
            )
        fixed = masking.raster_order(grid * grid) if order == "raster" else masking.centre_out_order(grid)
        return fixed.to(self.device).expand(count, -1)

    def token_sampler(self, config: SamplingConfig, noise: ImageNoise | None = None) -> sampling.TokenSampler:
        """How this model draws tokens: the inner chain of a teacher (needs ``noise``), or one evaluation of a student's
        head, or a few (which need it too)."""
        head, clamp = self.network.head, self.tokenizer.token_range
        if self.student is None:
            assert noise is not None
            schedule = respace(self.schedule, config.head_steps)
            return sampling.diffusion_chain(head, schedule, noise, config.solver, config.temperature, clamp)
        times = self.student.timesteps(config.evaluations)
        return sampling.few_evaluations(head, self.schedule, times, noise, config.temperature, clamp, self.call)


def _in_order(parts: list[tuple[list[int], np.ndarray]]) -> np.ndarray:
    """Rows of all parts, back in the order of their indices."""
    rows = np.concatenate([np.asarray(rows) for rows, _ in parts])
    return np.concatenate([values for _, values in parts])[np.argsort(rows)]


load = Pipeline.load
