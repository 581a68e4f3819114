"""Latents on disk: reading, checks, splits, class names; and tokens of batches."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from small_codec import make_codec, write_latents

from marval import imagenet
from marval.batches import batch_tokens, random_shift
from marval.checkpoint import read_json, write_json
from marval.data import ImageDataset, load_data, load_dataset
from marval.latents import LatentDataset, class_labels, load_latents
from marval.rng import generator
from marval.tokenizers import LatentTokenizer, PixelTokenizer, Tokenizer, load_tokenizer, to_float

CODEC = LatentTokenizer(image_size=16, channels=2, patch_size=2, stride=4, scale=0.5, shift=0.25)


@pytest.fixture
def latents(tmp_path: Path) -> tuple[LatentDataset, np.ndarray]:
    """Ten images in shards of 4, 3, 0 and 3, with their moments."""
    moments = write_latents(tmp_path / "latents", [4, 3, 0, 3], ["a", "b"])
    data = load_data(str(tmp_path / "latents"))
    assert isinstance(data, LatentDataset)
    return data, moments


def test_moments_are_those_of_the_shards(latents: tuple[LatentDataset, np.ndarray]):
    data, moments = latents
    draw = np.random.default_rng(0)
    index, mirrored = draw.integers(0, 10, 50), draw.random(50) < 0.5
    found = data.moments(index, mirrored)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), moments[index, mirrored.astype(int)])
    assert (len(data), data.image_size, data.labels.dtype) == (10, 16, np.int64)
    assert data.labels.tolist() == [0, 1] * 5
    assert data.tokenizer_folder.parent == data.folders[0]
    assert all(isinstance(shard, np.memmap) for shard in data.shards if len(shard))
    data.verify()


def test_damage_is_found(latents: tuple[LatentDataset, np.ndarray]):
    data, _ = latents
    folder = data.folders[0]
    path = folder / "shard-00001.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"shard-00001.npy is damaged: .*--resume"):
        load_latents(folder).verify()
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"shard-00001.npy cannot be read .*--resume"):
        load_latents(folder)
    np.save(path, np.zeros((3, 2, 4, 4, 4), np.float32))
    with pytest.raises(ValueError, match=r"shard-00001.npy is float32 .* expected float16 \[3, 2, 4, 4, 4\]"):
        load_latents(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"shard-00001.npy cannot be read .*No such file"):
        load_latents(folder)
    index = read_json(folder / "index.json")
    write_json(folder / "index.json", {**index, "shards": None})
    with pytest.raises(ValueError, match=r"is not finished: run marval encode again with --resume"):
        load_latents(folder)
    write_json(folder / "index.json", {**index, "format": 0})
    with pytest.raises(ValueError, match=r"was not written by this version of marval encode"):
        load_latents(folder)


def test_splits(tmp_path: Path):
    single = tmp_path / "single"
    first = write_latents(single, [3], ["a", "b"])
    assert len(load_latents(single, "all")) == 3
    with pytest.raises(ValueError, match="holds one split: for test, encode"):
        load_latents(single, "test")
    root = tmp_path / "both"
    write_latents(root / "train", [3], ["a", "b"])
    with pytest.raises(ValueError, match=r"has no latents in test/ or val/"):
        load_data(str(root), "test")
    write_latents(root / "val", [2, 3], ["a", "b"])
    assert [len(load_latents(root, split)) for split in ("train", "test", "all")] == [3, 5, 8]
    both = load_latents(root, "all")
    np.testing.assert_array_equal(both.moments(np.array([2]), np.array([True]))[0], first[2, 1])
    assert both.labels.tolist() == [0, 1, 0, 0, 1, 0, 1, 0]
    write_json(root / "val" / "index.json", {**read_json(root / "val" / "index.json"), "tokenizer_sha256": "1"})
    with pytest.raises(ValueError, match="differ in tokenizer_sha256"):
        load_latents(root, "all")
    with pytest.raises(ValueError, match="latents of 16 px images: leave --image-size out"):
        load_data(str(root), image_size=32)


def test_imagenet_classes(tmp_path: Path):
    write_latents(tmp_path / "some", [4], ["n01484850", "n01440764"])
    data = load_latents(tmp_path / "some", classes="imagenet")
    assert data.labels.tolist() == [2, 0, 2, 0]
    assert data.class_names == imagenet.names()
    write_latents(tmp_path / "numbered", [4], ["0", "1"], numbered_classes=True)
    assert load_latents(tmp_path / "numbered", classes="imagenet").labels.tolist() == [0, 1, 0, 1]
    with pytest.raises(ValueError, match=r"class 'cat' of .* is not one of ImageNet's 1,000: name it by WordNet id"):
        class_labels(np.array([0]), ["cat"], "imagenet", "x")
    with pytest.raises(ValueError, match="unknown classes 'coco'"):
        class_labels(np.array([0]), ["cat"], "coco", "x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="class '0' of digits is not one"):
        load_data("digits", classes="imagenet")


def parts(data: ImageDataset | LatentDataset, tokenizer: Tokenizer, index: np.ndarray, *cuts: int, **options: object):
    """The batch's tokens as several processes make them."""
    ends = [0, *cuts, len(index)]
    rows = [slice(a, b) for a, b in itertools.pairwise(ends)]
    tokens = [batch_tokens(data, tokenizer, index, part, generator(3), **options) for part in rows]  # type: ignore[arg-type]
    return torch.cat(tokens)


def test_tokens_of_latents_are_posterior_samples(latents: tuple[LatentDataset, np.ndarray]):
    data, moments = latents
    index = np.arange(10).repeat(2)
    tokens = parts(data, CODEC, index, flip=True)
    for cuts in ((10,), (1, 7), (5, 10, 15)):
        assert parts(data, CODEC, index, *cuts, flip=True).equal(tokens)
    g = generator(3)
    mirrored = (torch.rand(20, generator=g) < 0.5).numpy()
    noise = torch.randn(20, 2, 4, 4, generator=g)
    assert 3 < mirrored.sum() < 17
    mean, logvar = torch.from_numpy(moments[index, mirrored.astype(int)]).float().chunk(2, 1)
    latent = (mean + (logvar / 2).exp() * noise - 0.25) * 0.5
    expected = torch.stack([latent[:, :, y : y + 2, x : x + 2].flatten(1) for y in (0, 2) for x in (0, 2)], 1)
    torch.testing.assert_close(tokens, expected)
    with pytest.raises(ValueError, match="are latents: they cannot be shifted"):
        parts(data, CODEC, index, shift=1)
    with pytest.raises(ValueError, match="are latents: give their tokenizer, not pixels"):
        parts(data, PixelTokenizer(image_size=16, channels=3, patch_size=2), index)


def test_tokens_of_images(tmp_path: Path):
    data, index = load_dataset("digits"), np.arange(40) * 7
    pixels = PixelTokenizer(image_size=8, channels=1, patch_size=2)
    images = to_float(torch.from_numpy(data.images[index]))
    assert parts(data, pixels, index, 13).equal(pixels.encode(images))
    assert parts(data, pixels, index, 5, 6, shift=2).equal(pixels.encode(random_shift(images, 2, generator(3))))
    flipped = parts(data, pixels, index, 20, flip=True)
    mirrored = torch.rand(40, generator=generator(3)) < 0.5
    assert flipped.equal(pixels.encode(torch.where(mirrored[:, None, None, None], images.flip(3), images)))
    both = parts(data, pixels, index, shift=2, flip=True)
    assert parts(data, pixels, index, 9, 30, shift=2, flip=True).equal(both)
    codec = load_tokenizer(str(make_codec(tmp_path / "codec")), 8, 1)
    expected = codec.encode(images.expand(-1, 3, -1, -1))  # grey images get three channels; its variance is e^-30
    torch.testing.assert_close(parts(data, codec, index), expected, atol=1e-5, rtol=0)
