"""A tiny autoencoder, photographs of noise, and latents written by hand, for the tests of data and encoding."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from marval.checkpoint import save_tensors, sha256, write_json
from marval.models.autoencoders import CONFIG, TAESD, WEIGHTS


def make_codec(folder: Path, gain: float = 1.0) -> Path:
    """A TAESD of random weights, 4 channels, stride 4; its latents are multiplied by ``gain``."""
    folder.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = TAESD(4, (1, 1, 1), (1, 1, 1), 8, 8)
    tensors = {
        name.replace("encoder.", "encoder.layers.").replace("decoder.", "decoder.layers."): tensor
        for name, tensor in network.state_dict().items()
    }
    last = max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder"))
    for name in ("weight", "bias"):
        tensors[f"encoder.layers.{last}.{name}"] *= gain
    save_tensors(folder / WEIGHTS, tensors)
    config = {
        "_class_name": "AutoencoderTiny", "latent_channels": 4, "num_encoder_blocks": [1, 1, 1],
        "num_decoder_blocks": [1, 1, 1], "encoder_block_out_channels": [8] * 3, "decoder_block_out_channels": [8] * 3,
    }  # fmt: skip
    write_json(folder / CONFIG, config)
    return folder


def jpeg(seed: int, size: tuple[int, int] = (20, 24)) -> bytes:
    """A photograph of coloured noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, format="JPEG", quality=95)
    return file.getvalue()


def write_images(root: Path, names: list[str]) -> Path:
    """JPEG files, each with other noise."""
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg(seed))
    return root


def write_latents(folder: Path, counts: list[int], names: list[str], **changes: object) -> np.ndarray:
    """Random moments, which are returned, as latents of 2 channels, 4x4, of 16 px images labelled 0 1 0 1 .."""
    folder.mkdir(parents=True)
    moments = np.random.default_rng(len(names)).normal(size=(sum(counts), 2, 4, 4, 4)).astype(np.float16)
    shards = []
    for i, part in enumerate(np.split(moments, np.cumsum(counts)[:-1])):
        np.save(folder / f"shard-{i:05d}.npy", part)
        record = {"file": f"shard-{i:05d}.npy", "images": len(part), "bad": []}
        shards.append({**record, "sha256": sha256(folder / record["file"])})
    np.save(folder / "labels.npy", np.arange(sum(counts)) % len(names))
    index = {
        "format": 1, "source": "noise", "image_size": 16, "tokenizer_sha256": "0", "moments_shape": [4, 4, 4],
        "numbered_classes": False, "class_names": names, "num_images": sum(counts),
        "labels_sha256": sha256(folder / "labels.npy"), "shards": shards,
    }  # fmt: skip
    write_json(folder / "index.json", {**index, **changes})
    return moments
