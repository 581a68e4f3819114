"""A model as users meet it: network, tokenizer, class names and sampling defaults, loaded from one folder."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from marval import arguments, masking, sampling
from marval.config import SamplingConfig, StudentConfig
from marval.devices import device_named
from marval.diffusion import cosine_schedule, respace
from marval.graphs import Call, Graphs, plainly
from marval.model_files import Model, read_model, write_model
from marval.models.cpu import use_onednn
from marval.models.mar import MAR
from marval.rng import ImageNoise
from marval.shipped import model_folder
from marval.tokenizers import NO_IMAGES, Tokenizer, to_float, to_uint8

DECODED = 256
"""Images that an autoencoder decodes at a time: its maps are the largest tensors there are."""


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
        path, device = model_folder(path), device_named(device)
        return cls(*read_model(path, weights, dtype)).to(device)

    def save(self, path: str | Path, half: bool = False) -> None:
        """Write ``config.json`` and ``model.safetensors`` into the folder, each atomically, and link the autoencoder's
        files, if there are any, into ``tokenizer`` below it. ``half`` stores the weights in float16.

        A model that is there is replaced. What else a run left there stays, such as the ``scores.safetensors`` from
        which RL goes on: save a model that you changed in a folder of its own.
        """
        model = Model(self.network, self.tokenizer, self.class_names, self.sampling, self.student, self.provenance)
        write_model(Path(path), model, half)

    # ---- arguments

    def label(self, name: int | str | None) -> int:
        """A class by name (capitals do not matter) or index (of a string, last); None is "no class".

        Raises:
            ValueError: unknown class.
        """
        return self.network.config.num_classes if name is None else arguments.class_index(name, self.class_names)

    def settings(self, **overrides: Any) -> SamplingConfig:
        """The sampling defaults with every override that is not None, checked against this model.

        Raises:
            ValueError: a value is out of range, or this model cannot serve it.
        """
        num_tokens = self.network.config.num_tokens
        config = arguments.sampling_settings(self.sampling, overrides, self.student, num_tokens, self.schedule)
        if config.refresh_every > 1 and self.call is not plainly:
            raise ValueError(f"refresh_every {config.refresh_every} does not work with CUDA graphs: use one of them")
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
        decode = functools.partial(call or self.call, "images", lambda some: to_uint8(self.tokenizer.decode(some)))
        return torch.cat([decode(some) for some in tokens.split(DECODED)])

    @torch.no_grad()  # not inference_mode as in `sample`: autograd refuses to work with a tensor made in that
    def sample_tokens(
        self, classes: Sequence[int | str | None] | int | str | None = None, *, num_images: int | None = None,
        seed: int = 0, first_image: int = 0, batch_size: int = 64, order: str | Sequence[int] | Tensor | None = None,
        images: np.ndarray | None = None, keep: np.ndarray | Tensor | None = None, **settings: Any,
    ) -> Tensor:  # fmt: skip
        """As `sample`, without decoding: tokens (num_images, L, D) float32 on the CPU."""
        batches = self._token_batches(
            classes, num_images, seed, first_image, batch_size, order, images, keep, **settings
        )
        return torch.from_numpy(_in_order([(rows, tokens.float().cpu().numpy()) for rows, tokens in batches]))

    def _token_batches(
        self, classes: Any, num_images: int | None, seed: int, first_image: int, batch_size: int, order: Any,
        images: np.ndarray | None, keep: Any,
        each_ar_step: Callable[[list[int], Tensor, Tensor], object] | None = None, **overrides: Any,
    ) -> Iterator[tuple[list[int], Tensor]]:  # fmt: skip
        """Check the arguments of `sample`; then, batch by batch, numbers of images and their tokens (B, L, D)."""
        config = self.settings(order=order if isinstance(order, str) else None, **overrides)
        arguments.check_counts(seed, first_image, batch_size, num_images)
        images = None if images is None else np.asarray(images)
        labels = [self.label(name) for name in arguments.class_of_each(classes, num_images, images)]
        num_images, orders = len(labels), None
        if order is not None and not isinstance(order, str):
            orders = arguments.given_orders(order, self.network.config.num_tokens, num_images)
        kept = arguments.kept_tokens(images, keep, num_images, self.tokenizer)
        known = None if images is None else self._encode(images, batch_size)

        for batch in _batches(kept.sum(1).tolist(), batch_size):
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

    def _encode(self, images: np.ndarray, batch_size: int) -> Tensor:
        """uint8 NHWC -> tokens (N, L, D) on the model's device, so many images at a time."""
        parts = (torch.from_numpy(images[start : start + batch_size]) for start in range(0, len(images), batch_size))
        return torch.cat([self.tokenizer.encode(to_float(part).to(self.device)) for part in parts])

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


def _batches(num_kept: list[int], size: int) -> Iterator[list[int]]:
    """Numbers of images, batch by batch; images of one batch keep equally many tokens, for shapes are static."""
    for count in sorted(set(num_kept)):
        rows = [i for i, kept in enumerate(num_kept) if kept == count]
        yield from (rows[start : start + size] for start in range(0, len(rows), size))


def _in_order(parts: list[tuple[list[int], np.ndarray]]) -> np.ndarray:
    """Rows of all parts, back in the order of their indices."""
    rows = np.concatenate([np.asarray(rows) for rows, _ in parts])
    return np.concatenate([values for _, values in parts])[np.argsort(rows)]


load = Pipeline.load
