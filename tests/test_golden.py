"""Parity with the reference MAR and its KL-16, tensor by tensor, against shared/golden (see its README)."""

import argparse
import functools
import itertools
import json
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from marval import diffusion, sampling
from marval.checkpoint import load_strictly, read_mar_checkpoint
from marval.config import MARConfig
from marval.importing import import_kl16
from marval.masking import masked_counts
from marval.models.mar import MAR
from marval.tokenizers import LatentTokenizer, load_tokenizer, patchify, unpatchify

one_pass_close = functools.partial(assert_close, rtol=1e-4, atol=1e-6)
CONFIG = MARConfig(
    grid=4, token_dim=16, num_classes=5, width=32, depth=2, heads=4, buffer_size=4, head_width=48, head_depth=2
)
SCHEDULE = diffusion.cosine_schedule()


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    return shared / "golden" / "mar_tiny"


@pytest.fixture(scope="module")
def golden(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "golden.safetensors")


@pytest.fixture(scope="module")
def network(folder: Path) -> MAR:
    network = MAR(CONFIG).eval()
    load_strictly(network, read_mar_checkpoint(folder / "checkpoint-last.pth", "raw")[0], "golden")
    return network.requires_grad_(False)


@pytest.fixture(scope="module")
def visible(golden: dict[str, Tensor]) -> Tensor:
    """(B, V) visible positions, from the recorded mask."""
    return torch.stack([(row == 0).nonzero().squeeze(1) for row in golden["mask"]])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest error of a token (..., D) relative to its largest entry.

    The README's 2e-3 would not notice a wrong temperature or guidance: the chain's first step, at t = 999, multiplies
    everything by 2e4 and dwarfs them. Rounding makes 1e-6.
    """
    return float(((actual - expected).abs().amax(-1) / expected.abs().amax(-1)).max())


def test_patchify(golden):
    tokens = patchify(golden["latents"], 1)
    assert torch.equal(tokens, golden["tokens"])
    assert torch.equal(unpatchify(tokens, 1), golden["unpatchified"])


def test_orders_list_the_masked_tokens_first(golden, visible):
    num_masked = CONFIG.num_tokens - visible.shape[1]
    assert torch.equal(golden["orders"].flip(1)[:, :-num_masked].sort(1).values, visible)


def test_encoder_and_condition(golden, network, visible):
    encoded = network.encode(golden["tokens"], visible, golden["labels"])
    one_pass_close(encoded, golden["encoder_out"])
    one_pass_close(network.decode(encoded, visible), golden["condition"])


def test_null_condition(golden, network, visible):
    null = torch.full_like(golden["labels"], CONFIG.num_classes)
    one_pass_close(network.condition(golden["tokens"], visible, null), golden["condition_uncond"])


def test_head(golden, network):
    out = network.head(golden["head_x"], golden["head_t"], golden["condition"].flatten(0, 1))
    one_pass_close(out, golden["head_out"])


@pytest.mark.parametrize(
    ("ours", "recorded"),
    [
        ("betas", "betas"),
        ("alpha_bar", "alphas_cumprod"),
        ("posterior_variance", "posterior_variance"),
        ("posterior_log_variance", "posterior_log_variance_clipped"),
    ],
)
def test_schedule(golden, ours, recorded):
    assert_close(getattr(SCHEDULE, ours), golden[f"schedule_{recorded}"], rtol=1e-10, atol=1e-15)


def test_training_loss(golden, network):
    x0, t, eps = golden["tokens"].flatten(0, 1), golden["loss_t"], golden["loss_noise"]
    x_t = diffusion.q_sample(SCHEDULE, x0, t, eps)
    out = network.head(x_t, t, golden["condition"].flatten(0, 1))
    mse, vb = diffusion.denoising_loss(SCHEDULE, out, x0, x_t, t, eps)
    one_pass_close(mse, golden["loss_mse_per_token"])
    one_pass_close(vb, golden["loss_vb_per_token"])
    one_pass_close(mse + vb, golden["loss_loss_per_token"])
    mask = golden["mask"].flatten()
    one_pass_close((((mse + vb) * mask).sum() / mask.sum())[None], golden["loss_masked_mean"])


def test_respaced_chain(golden, network):
    schedule = diffusion.respace(SCHEDULE, 10)
    assert torch.equal(schedule.timesteps, golden["chain_timestep_map"])
    embedded = network.head.embed(schedule.timesteps[:, None], golden["chain_z"])
    out = diffusion.denoise_chain(
        lambda x, i: network.head.denoise(x, embedded[i]), golden["chain_init"], schedule,
        iter(golden["chain_noises"]), float(golden["chain_temperature"]),
    )  # fmt: skip
    assert relative_error(out, golden["chain_out"]) < 1e-5


class RecordedNoise:
    """Stands in for `ImageNoise`: hands out the recorded step noise, (T, 2 B N, D) per AR step, as (B, T, N, D)."""

    device = torch.device("cpu")

    def __init__(self, flat: Tensor, batch: int):
        self.flat, self.batch = flat, batch

    def randn(self, steps: int, tokens: int, dim: int) -> Tensor:
        half = self.batch * tokens
        block, self.flat = self.flat.split([steps * 2 * half * dim, len(self.flat) - steps * 2 * half * dim])
        return block.view(steps, 2 * half, dim)[:, :half].reshape(steps, self.batch, tokens, dim).transpose(0, 1)


def test_whole_generation(golden, network):
    """Six AR steps with linear guidance 2.5, ten denoising steps each, temperature 0.9, recorded noise."""
    orders, length, num_steps = golden["orders"].flip(1), CONFIG.num_tokens, 6
    batch = len(orders)
    counts = masked_counts(length, num_steps)
    z = torch.full((batch, length, CONFIG.token_dim), torch.nan)
    for k, (masked, after) in enumerate(itertools.pairwise(counts)):
        target = orders[:, length - masked : length - after].sort(1).values
        drawn = golden[f"sample_init_noise.{k:02}"].view(batch, -1, CONFIG.token_dim)
        z.scatter_(1, target[..., None].expand_as(drawn), drawn)
    noise = RecordedNoise(golden["sample_step_noise"], batch)
    draw = sampling.diffusion_chain(network.head, diffusion.respace(SCHEDULE, 10), noise, temperature=0.9)  # pyright: ignore
    steps = list(
        sampling.unmask(
            network, draw, golden["labels"], orders, counts, z, guidance=2.5, guidance_schedule="linear",
            needs_null=True,
        )
    )  # fmt: skip
    assert len(noise.flat) == 0
    assert relative_error(steps[-1], patchify(golden["sample_latents"], 1)) < 1e-5
    for k, tokens in enumerate(steps[:-1]):
        assert torch.equal((tokens == 0).all(-1), golden["sample_masks"][k])
    # The reference leaves one token marked after its last step, although it has drawn it.
    assert golden["sample_masks"][-1].sum(1).tolist() == [1] * batch
    assert bool((steps[-1] != 0).any(-1).all())


def test_checkpoint_ema_and_raw(folder):
    states = {}
    for weights in ("ema", "raw"):
        states[weights], arguments = read_mar_checkpoint(folder / "checkpoint-last.pth", weights)
        assert isinstance(arguments, argparse.Namespace)
        load_strictly(MAR(CONFIG), states[weights], weights)
    assert not torch.equal(states["ema"]["head.input_proj.weight"], states["raw"]["head.input_proj.weight"])


# ---- KL-16


@pytest.fixture(scope="module")
def kl16(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> LatentTokenizer:
    """The published layout, filled by the rule of the README, imported and loaded as a user would."""
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("kl16")
    state = {}
    shapes = json.loads((shared / "golden" / "kl16" / "keys.json").read_text())["state_dict_shapes"]
    for key, shape in shapes.items():
        r = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
        if r.ndim > 1:
            state[key] = r / r[0].numel() ** 0.5
        else:
            state[key] = 0.1 * r + float("norm" in key and key.endswith("weight"))
    torch.save({"model": state}, folder / "kl16.ckpt")
    message = import_kl16(folder / "kl16.ckpt", folder / "tokenizer")
    assert "66,456,019 parameters" in message
    (folder / "kl16.ckpt").unlink()
    tokenizer = load_tokenizer(str(folder / "tokenizer"), 64, 1)
    assert isinstance(tokenizer, LatentTokenizer)
    assert (tokenizer.channels, tokenizer.stride, tokenizer.scale, tokenizer.shift) == (16, 16, 0.2325, 0.0)
    return tokenizer


def test_kl16(shared, kl16):
    golden = load_file(shared / "golden" / "kl16" / "golden.safetensors")
    with torch.no_grad():
        moments = kl16.moments((golden["images"] + 1) / 2)
        images = kl16.decode(patchify(golden["posterior_mean"] * 0.2325, 1))
    assert_close(moments, golden["posterior_moments"], rtol=1e-4, atol=1e-5)
    assert_close(kl16.tokens(moments), patchify(golden["posterior_mean"] * 0.2325, 1), rtol=1e-4, atol=1e-5)
    assert_close(images, ((golden["decoded_mean"] + 1) / 2).clamp(0, 1), rtol=1e-4, atol=1e-5)
    assert float((golden["decoded_mean"].abs() < 1).float().mean()) > 0.2, "most of the golden images are clamped"
