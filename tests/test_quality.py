"""BRISQUE against a plain second implementation, and heads of embeddings in their published formats."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn

from marval.images import center_crop
from marval.models.quality import MODEL, RANGE, Brisque, aesthetic_head, brisque_features
from marval.reward_checks import check_reward
from marval.rewards import load_reward
from marval.tokenizers import to_float

VECTORS = np.random.default_rng(0).uniform(-1, 1, (5, 36))
ALPHA = np.array([1024.0, -1024.0, 3.5, -60.25, 77.0])
LOW, HIGH = np.full(36, -0.5), np.linspace(1, 4, 36)
RHO, GAMMA = -39.5, 0.05


def numbers(values: np.ndarray) -> str:
    """As OpenCV writes them: five in a line, `1024.` and `1.5e-02`."""
    texts = [f"{int(v)}." if v == int(v) else f"{v:.17e}" for v in values]
    return "[ " + ",\n             ".join(", ".join(texts[i : i + 5]) for i in range(0, len(texts), 5)) + " ]"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = "".join(f"      - {numbers(v)}\n" for v in VECTORS)
    (tmp_path / MODEL).write_text(
        "%YAML:1.0\n---\nopencv_ml_svm:\n   format: 3\n   svmType: EPS_SVR\n   kernel:\n      type: RBF\n"
        f"      gamma: {GAMMA:.16e}\n   C: 1024.\n   var_count: 36\n   sv_total: 5\n   support_vectors:\n{rows}"
        f"   decision_functions:\n      -\n         sv_count: 5\n         rho: {RHO:.16e}\n"
        f"         alpha: {numbers(ALPHA)}\n"
    )
    ranges = numbers(np.concatenate([LOW, HIGH]))
    (tmp_path / RANGE).write_text(f"%YAML:1.0\n---\nrange: !!opencv-matrix\n   rows: 2\n   data: {ranges}\n")
    return tmp_path


def fit(x: np.ndarray) -> tuple[float, float, float]:
    """Shape and both deviations of an asymmetric generalised Gaussian: Lasmar et al. 2009, the grid searched whole."""
    left, right = math.sqrt(np.mean(x[x < 0] ** 2)), math.sqrt(np.mean(x[x > 0] ** 2))
    ratio = left / right
    wanted = np.mean(np.abs(x)) ** 2 / np.mean(x**2) * (ratio**3 + 1) * (ratio + 1) / (ratio**2 + 1) ** 2
    grid = [0.2 + 0.001 * i for i in range(9800)]
    rho = [math.exp(2 * math.lgamma(2 / g) - math.lgamma(1 / g) - math.lgamma(3 / g)) for g in grid]
    return grid[int(np.argmin(np.abs(np.array(rho) - wanted)))], left, right


def cubic(x: np.ndarray, size: int) -> np.ndarray:
    """Rows resized as OpenCV's INTER_CUBIC does: a = -0.75, no antialiasing, borders repeated."""
    out = np.zeros((size, *x.shape[1:]))
    for i in range(size):
        place = (i + 0.5) * len(x) / size - 0.5
        for j in range(math.floor(place) - 1, math.floor(place) + 3):
            d, a = abs(place - j), -0.75
            weight = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4)
            out[i] += weight * x[min(max(j, 0), len(x) - 1)]
    return out


def features(grey: np.ndarray) -> list[float]:
    """Of integers 0 to 255 (H, W); Mittal et al. 2012, equations 1 to 13."""
    image, found = grey / 255, []
    window = np.exp(-(np.arange(-3, 4) ** 2) / (2 * (7 / 6) ** 2))
    window = np.outer(window, window) / window.sum() ** 2
    for scale in (1, 2):
        if scale == 2:
            image = cubic(cubic(image, image.shape[0] // 2).T, image.shape[1] // 2).T
        height, width = image.shape
        padded = np.pad(image, 3, mode="edge")
        normal = np.zeros_like(image)
        for i in range(height):
            for j in range(width):
                patch = padded[i : i + 7, j : j + 7]
                mean = (window * patch).sum()
                normal[i, j] = (image[i, j] - mean) / (math.sqrt(max((window * patch**2).sum() - mean**2, 0)) + 1 / 255)
        shape, left, right = fit(normal)
        found += [shape, (left**2 + right**2) / 2]
        for down, across in ((0, 1), (1, 0), (1, 1), (-1, 1)):
            products = np.zeros_like(normal)  # 0 where there is no neighbour
            for i in range(height):
                for j in range(width):
                    if 0 <= i + down < height and 0 <= j + across < width:
                        products[i, j] = normal[i, j] * normal[i + down, j + across]
            shape, left, right = fit(products)
            spread = math.gamma(2 / shape) / math.sqrt(math.gamma(1 / shape) * math.gamma(3 / shape))
            found += [shape, (right - left) * spread, left**2, right**2]
    return found


def images() -> Tensor:
    """Four grey images 26x22 in [0, 1] on 8-bit values: noise, a noisy ramp, waves, noise that is rarely dark."""
    rng, (y, x) = np.random.default_rng(1), np.mgrid[:26, :22]
    found = [rng.uniform(size=y.shape), x / 22 + 0.1 * rng.normal(size=y.shape), 0.5 + 0.4 * np.sin(x * y / 9)]
    found.append(rng.uniform(size=y.shape) ** 0.2)
    return torch.from_numpy(np.round(np.clip(np.stack(found), 0, 1) * 255) / 255)[:, None]


def test_features_equal_a_plain_implementation():
    found, flat = brisque_features(images())
    assert not flat.any()
    rows = [features((image[0] * 255).numpy().round()) for image in images()]
    torch.testing.assert_close(found, torch.tensor(rows, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_score_is_the_support_vector_machines(folder: Path):
    grey = images()
    found, expected = Brisque.load(folder)(grey), []
    for image in grey:
        x = 2 * (np.array(features((image[0] * 255).numpy().round())) - LOW) / (HIGH - LOW) - 1
        expected.append(sum(a * math.exp(-GAMMA * ((x - v) ** 2).sum()) for a, v in zip(ALPHA, VECTORS, strict=True)))
    expected = torch.tensor(expected) - RHO
    assert expected.clamp(1, 99).eq(expected).any()
    torch.testing.assert_close(found, expected.clamp(0, 100).float(), rtol=0, atol=1e-4)


def test_reward(folder: Path):
    names = {"class_names": ["cat", "dog"], "template": "a {class}", "classifier": "", "device": "cpu"}
    reward, grey = load_reward(f"brisque:{folder}", **names), images().float()
    assert not reward.differentiable
    brisque = Brisque.load(folder)
    torch.testing.assert_close(check_reward(reward, grey, ["a cat"] * 4), -brisque(grey))
    colour = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    luma = (colour * 255).round().mul(torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True) / 255
    torch.testing.assert_close(brisque(colour), brisque(luma))
    flat = torch.cat([torch.zeros(1, 1, 26, 22), grey[:1]])
    assert brisque(flat)[0] == 100
    torch.testing.assert_close(brisque(flat)[1], brisque(grey)[0])
    with pytest.raises(ValueError, match="sides of at least 8 pixels, got 7x9"):
        brisque(torch.rand(1, 1, 7, 9))
    for name in (MODEL, RANGE):
        text = (folder / name).read_text()
        (folder / name).write_text(text[:-20])
        with pytest.raises(ValueError, match=rf"reward 'brisque:.*{name} has no whole entry"):
            load_reward(f"brisque:{folder}", **names)
        (folder / name).unlink()
        with pytest.raises(ValueError, match=f"{name} is missing"):
            load_reward(f"brisque:{folder}", **names)
        (folder / name).write_text(text)
    (folder / RANGE).write_text("data: [ 1., 2. ]")
    with pytest.raises(ValueError, match="180 numbers of support vectors, 5 weights, 2 of ranges"):
        Brisque.load(folder)


def test_aesthetic_heads():
    """Against the modules of their authors, whose state dicts the published files are."""
    x = torch.nn.functional.normalize(torch.randn(3, 12, generator=torch.Generator().manual_seed(0)), dim=-1)
    sizes = [12, 1024, 128, 64, 16, 1]
    with torch.random.fork_rng(devices=[]):
        linears = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        single = nn.Linear(12, 1)
    plain, relu = nn.Sequential(), nn.Sequential()
    for i, linear in enumerate(linears):
        plain.extend([linear, *(nn.Dropout(0.2) for _ in range(i < 3))])
        relu.extend([linear, *(nn.ReLU() for _ in range(i < 4)), *(nn.Dropout(0.2) for _ in range(i < 3))])
    for layers in (plain, relu):
        head = aesthetic_head(nn.ModuleDict({"layers": layers}).state_dict(), "head.pth")
        torch.testing.assert_close(head(x), layers.eval()(x))
        assert not any(parameter.requires_grad for parameter in head.parameters())
    assert (plain(x) - relu(x)).abs().max() > 1e-3
    torch.testing.assert_close(aesthetic_head(single.state_dict(), "head.pth")(x), single(x))
    state = nn.ModuleDict({"layers": plain}).state_dict()
    with pytest.raises(ValueError, match=r"head.pth: tensor 'layers.7.bias' is missing"):
        aesthetic_head({k: v for k, v in state.items() if k != "layers.7.bias"}, "head.pth")
    with pytest.raises(
        ValueError, match=r"head.pth is no aesthetic head: tensor 'layers.0.weight' is missing \(found:"
    ):
        aesthetic_head({"a": torch.zeros(2)}, "head.pth")


def test_published_brisque_knows_noise_and_blur(shared: Path):
    """On photographs: OpenCV's published model puts clean ones near 20, noisy and blurred ones far above."""
    brisque = Brisque.load(shared / "data" / "weights")
    scores = []
    for file in sorted((shared / "data" / "imagenet_photos").glob("*/*.JPEG"))[:60:6]:
        photo = Image.open(file).convert("RGB")
        clean = np.asarray(center_crop(photo, 224))
        noisy = clean + np.random.default_rng(0).normal(0, 25, clean.shape)
        blurred = np.asarray(Image.fromarray(clean).filter(ImageFilter.GaussianBlur(3)))
        batch = np.stack([clean, np.clip(noisy, 0, 255).round().astype(np.uint8), blurred])
        scores.append(brisque(to_float(torch.from_numpy(batch))))
    clean, noisy, blurred = torch.stack(scores).mean(0).tolist()
    assert clean < 35
    assert noisy > clean + 15
    assert blurred > clean + 25
