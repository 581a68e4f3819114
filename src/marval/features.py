"""Networks that turn images into features for the metrics, by the name that `--features` takes.

`inception`                    FID's InceptionV3, as torch-fidelity implements it (extra `eval`)
a folder                       a classifier of `marval train-classifier`
`mobilenet_v2*.npz`            ImageNet MobileNetV2
`resnet*.th`                   a CIFAR-10 ResNet
`path/to/file.py:function`     yours: images float NCHW in [0, 1] -> features (B, F), or (features, logits (B, C))
"""

import importlib
import importlib.util
import io
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from marval import imagenet
from marval.checkpoint import sha256
from marval.models.classifier import Classifier
from marval.models.vision import PublishedClassifier
from marval.shipped import classifier_folder
from marval.tokenizers import to_float
from marval.user_code import import_function

BATCH = 50
"""Images that a network sees at a time. Fixed, so that no setting changes the rounding of its features."""
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d"
"""First digits of the weight file's checksum, which are part of its name."""


@dataclass(frozen=True)
class Features:
    """Features of a batch of images, float32: pooled (B, F), a spatial map (B, S) or None, logits (B, C) or None."""

    pooled: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None

    def parts(self) -> dict[str, Tensor]:
        """Those of the features that there are, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class FeatureNetwork:
    """A network, and what must be said beside its numbers.

    Attributes:
        name, preprocessing: for the protocol. digest: start of the SHA-256 of the weights.
        class_names: what its logits stand for; None if it does not classify.
        device: where it runs. run: uint8 NHWC images on that device -> `Features`.
    """

    name: str
    preprocessing: str
    digest: str
    class_names: list[str] | None
    device: torch.device
    run: Callable[[Tensor], Features]

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> Features:
        """Features, on the CPU, of uint8 NHWC images.

        Raises:
            ValueError: a feature is not finite, or images of this shape do not suit the network.
        """
        parts: list[dict[str, Tensor]] = []
        for start in range(0, len(images), BATCH):
            batch = torch.from_numpy(images[start : start + BATCH]).to(self.device)
            parts.append({name: value.float() for name, value in self.run(batch).parts().items()})
        result = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
        for name, value in result.items():
            if not value.isfinite().all():
                raise ValueError(f"the {name} features of {self.name} are not finite")
        return Features(**result)

    def class_indices(self, model_names: Sequence[str]) -> np.ndarray | None:
        """Index of each of a model's classes among the network's, int64; None if it does not know them all."""
        if self.class_names is None:
            return None
        indices = imagenet.class_indices(self.class_names, model_names)
        return None if indices is None else np.array(indices, dtype=np.int64)


def load_features(spec: str, device: torch.device | str = "cpu", inception_weights: str = "") -> FeatureNetwork:
    """A feature network by name (see the top of this module).

    Args:
        inception_weights: file of Inception's weights, for ``inception`` only; see `inception_features`.

    Raises:
        ValueError: unknown name, a missing or damaged file, or weights that do not fit; one line.
    """
    device, path = torch.device(device), Path(spec)
    if inception_weights and spec != "inception":
        raise ValueError(f"--inception-weights goes with --features inception, not with {spec!r}")
    if spec == "inception":
        return inception_features(inception_weights, device)
    if ".py:" in spec:
        return user_features(spec, device)
    if path.suffix in (".npz", ".th"):
        return published_features(path, device)
    path = classifier_folder(path)
    if not path.is_dir():
        known = (
            "inception, a folder of marval train-classifier, mobilenet_v2*.npz, resnet*.th, path/to/file.py:function"
        )
        raise ValueError(f"no feature network {spec!r}: choose {known}")
    network = Classifier.load(path, device)
    return classifier_features(network, sha256(path / "model.safetensors")[:16])


def _rgb(images: Tensor) -> Tensor:
    """Images NHWC with one or three channels -> with three."""
    return images.expand(*images.shape[:3], 3)


# ---- a classifier of marval


def classifier_features(network: Classifier, digest: str = "") -> FeatureNetwork:
    """Penultimate features and logits of a classifier."""
    device, config = network.head.weight.device, network.config

    def run(images: Tensor) -> Features:
        pooled = network.features(to_float(_rgb(images) if config.channels == 3 else images))
        return Features(pooled, None, network.head(pooled))

    name = f"penultimate layer of a {config.arch} classifier ({network.provenance.get('data')})"
    return FeatureNetwork(name, "pixels in [0, 1], no resize", digest, network.class_names, device, run)


# ---- FID's Inception


def _inception_module() -> Any:
    """torch-fidelity's module of the network.

    The package imports torchvision, which its InceptionV3 does not need; where that is missing, as with the CPU
    builds of PyTorch (pip install --no-deps torch-fidelity), the module is loaded without the package around it.
    """
    name = "torch_fidelity.feature_extractor_inceptionv3"
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None or spec.submodule_search_locations is None:
        remedy = "pip install 'marval[eval]' (without torchvision: pip install --no-deps torch-fidelity)"
        raise ValueError(f"--features inception needs torch-fidelity: {remedy}")
    if importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module(name)
    package = types.ModuleType("torch_fidelity")
    package.__path__ = list(spec.submodule_search_locations)
    before = set(sys.modules)
    sys.modules["torch_fidelity"] = package
    try:
        return importlib.import_module(name)
    finally:
        for added in set(sys.modules) - before:
            if added.split(".")[0] == "torch_fidelity":
                del sys.modules[added]


def inception_weights_file(given: str = "") -> Path:
    """The file of FID's InceptionV3 weights: the given one, or that in PyTorch's hub cache, or a download into it.

    It holds the weights of TensorFlow's `classify_image_graph_def.pb` of 2015-12-05 (Apache-2.0), on which FID and
    Inception Score are defined, as tensors for PyTorch; torch-fidelity publishes it as
    `weights-inception-2015-12-05-6726825d.pth`, pytorch-fid the same bytes as `pt_inception-2015-12-05-6726825d.pth`.
    The end of the name is the start of its SHA-256.

    Raises:
        ValueError: no such file, another checksum, or a failed download.
    """
    path = Path(given)
    if not given:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        names = [f"{start}-2015-12-05-{INCEPTION_SHA256}.pth" for start in ("weights-inception", "pt_inception")]
        path = next((folder / name for name in names if (folder / name).exists()), folder / names[0])
        if not path.exists():
            print(f"downloading FID's InceptionV3 (91 MB), {INCEPTION_URL}, to {path}", flush=True)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(INCEPTION_URL, str(path), INCEPTION_SHA256, progress=False)
            except (OSError, RuntimeError) as error:
                reason = f"{error}".splitlines()[0]
                raise ValueError(
                    f"cannot download {INCEPTION_URL} ({reason}): get the file and name it with --inception-weights"
                ) from None
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the file {Path(INCEPTION_URL).name} with --inception-weights")
    if not (found := sha256(path)[:16]).startswith(INCEPTION_SHA256):
        raise ValueError(f"{path} is not FID's InceptionV3: its SHA-256 begins {found[:8]}, not {INCEPTION_SHA256}")
    return path


def inception_features(weights: str, device: torch.device) -> FeatureNetwork:
    """FID's InceptionV3 (torch-fidelity): 2,048 pooled features, 1,008 logits without bias, and sFID's features.

    The latter are the first 7 channels of the 17x17 map after the first convolution of block mixed_6, 2,023 numbers in
    the order of ADM's files (row, column, channel), so that their ``mu_s`` and ``sigma_s`` apply.

    Args:
        weights: see `inception_weights_file`.
    """
    module = _inception_module()
    path = inception_weights_file(weights)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        verified = io.BytesIO()
        torch.save(tensors, verified)  # torch-fidelity unpickles anything, and gets tensors only
        verified.seek(0)
        layers = ["2048", "logits_unbiased"]
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", layers, verified)
    except Exception as error:  # whatever torch.load raises on a file that is none
        raise ValueError(f"{path} does not hold InceptionV3's tensors: {f'{error}'.splitlines()[0]}") from None
    network.to(device)
    maps: list[Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda *call: maps.append(call[2][:, :7]))

    def run(images: Tensor) -> Features:
        maps.clear()
        pooled, logits = network(_rgb(images).permute(0, 3, 1, 2).contiguous())
        return Features(pooled, maps[0].permute(0, 2, 3, 1).flatten(1), logits)

    return FeatureNetwork(
        f"InceptionV3 of FID (torch-fidelity, weights {INCEPTION_SHA256})",
        "uint8, bilinear to 299x299 as TensorFlow 1, then (x - 128) / 128", sha256(path)[:16], None, device, run,
    )  # fmt: skip


# ---- published classifiers


def published_features(path: Path, device: torch.device) -> FeatureNetwork:
    """Features and logits of a published classifier, see `PublishedClassifier`."""
    network = PublishedClassifier.load(path).to(device)

    def run(images: Tensor) -> Features:
        spatial, pooled, logits = network.outputs(to_float(images))
        return Features(pooled, spatial, logits)

    return FeatureNetwork(network.name, network.preprocessing, sha256(path)[:16], network.class_names, device, run)


# ---- a user's function


def user_features(spec: str, device: torch.device) -> FeatureNetwork:
    """``path/to/file.py:function``: images float NCHW in [0, 1] on ``device`` -> features, or (features, logits)."""
    function = import_function(spec, "feature", "images")

    def run(images: Tensor) -> Features:
        out: Any = function(to_float(images))
        pair: tuple[Any, Any] = out if isinstance(out, tuple) and len(out) == 2 else (out, None)
        features, logits = pair
        for what, value in (("features", features), ("logits", logits)):
            if value is not None and not (isinstance(value, Tensor) and value.ndim == 2 and len(value) == len(images)):
                found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{spec} gave {what} {found} for {len(images)} images: it must be a tensor (B, n)")
        return Features(features, None, logits)

    digest = sha256(Path(spec.rpartition(":")[0]))[:16]
    return FeatureNetwork(spec, "pixels in [0, 1], no resize", digest, None, device, run)
