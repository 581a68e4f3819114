"""Sampling as users meet it, on tiny networks with random weights and 8x8 images of 16 tokens."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import marval
from marval import masking, sampling
from marval.checkpoint import load_tensors, save_tensors
from marval.config import SamplingConfig, StudentConfig
from marval.diffusion import cosine_schedule, respace
from marval.pipeline import Pipeline
from marval.rng import ImageNoise, fill_rows, generator
from marval.tokenizers import PixelTokenizer

NAMES = ["ant", "bee", "cat"]
TOKENIZER = PixelTokenizer(image_size=8, channels=1, patch_size=2)
L = 16
KEEP = np.eye(4, dtype=bool)


@pytest.fixture
def make(tiny_mar):
    """``make(kind)``: a teacher, a student of fixed guidance 1.5, one that draws with 2 of 4 evaluations, or one of the
    guidance range [1, 3]."""

    def make(kind="teacher") -> Pipeline:
        few = kind == "few"
        defaults = SamplingConfig(ar_steps=4, head_steps=5, evaluations=2 if few else 1)
        student = None
        if kind != "teacher":
            range = (1.0, 3.0) if kind == "range" else None
            student = StudentConfig(guidance_range=range, evaluations=4 if few else 1)
        return Pipeline(tiny_mar(guidance_input=kind == "range"), TOKENIZER, NAMES, defaults, student, {"data": "none"})

    return make


KINDS = pytest.mark.parametrize("kind", ["teacher", "student", "few", "range"])


@pytest.mark.parametrize(
    ("kind", "solver"),
    [("teacher", "ancestral"), ("teacher", "ddim"), ("student", None), ("few", None), ("range", None)],
)
def test_images_do_not_depend_on_the_batch(make, kind, solver):
    model = make(kind)
    draws = [
        model.sample_tokens([0, "cat", None], num_images=7, seed=5, batch_size=batch_size, solver=solver)
        for batch_size in (1, 3, 64)
    ]
    assert draws[0].shape == (7, L, 4)
    assert float((draws[0][:1] - draws[0][1:]).abs().mean((1, 2)).min()) > 0.05
    for draw in draws[1:]:
        assert_close(draw, draws[0], rtol=0, atol=1e-3)
    assert_close(model.sample_tokens([0, 2], seed=5, solver=solver), draws[0][:2], rtol=0, atol=1e-3)
    assert float((model.sample_tokens([0, 2], seed=6, solver=solver) - draws[0][:2]).abs().mean()) > 0.05


def test_evaluations_of_a_student(make):
    """1, 2 or 4 of a student that was distilled for 4; the first is the same."""
    model = make("few")
    draws = {n: model.sample_tokens([0, 1], seed=3, ar_steps=1, evaluations=n) for n in (1, 2, 4)}
    assert float((draws[1] - draws[2]).abs().mean()) > 0.05
    assert float((draws[2] - draws[4]).abs().mean()) > 0.05
    assert torch.equal(draws[1], make("student").sample_tokens([0, 1], seed=3, ar_steps=1))
    assert StudentConfig(evaluations=4).timesteps(4) == (300, 225, 150, 75)
    assert StudentConfig(evaluations=4).timesteps(2) == (300, 150)
    for n in (3, 8):
        with pytest.raises(ValueError, match=f"evaluations must be 1 or 2 or 4 for this student, got {n}"):
            model.sample(0, evaluations=n)


@KINDS
def test_images(make, kind):
    model = make(kind)
    images = model.sample(["ant", 1, "2"], seed=3)
    assert images.shape == (3, 8, 8, 1)
    assert images.dtype == np.uint8
    assert images.std() > 10
    tokens = model.sample_tokens([0, 1, 2], seed=3)
    assert not tokens.is_inference()  # autograd takes them
    decoded = TOKENIZER.decode(tokens).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(images, 255 * decoded, atol=0.51)


@KINDS
def test_a_set_may_be_drawn_in_parts(make, kind):
    model = make(kind)
    part = model.sample_tokens(1, num_images=2, first_image=3, seed=5)
    assert_close(part, model.sample_tokens(1, num_images=5, seed=5)[3:], rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match=r"first_image must not be negative, got .*-2"):
        model.sample(1, first_image=-2)


def test_classes_may_be_numpy_integers(make):
    model = make("student")
    assert np.array_equal(model.sample(np.array([0, 2])), model.sample([0, 2]))  # pyright: ignore
    assert np.array_equal(model.sample(np.int64(2)), model.sample("cat"))  # pyright: ignore


@KINDS
def test_any_number_of_ar_steps(make, kind):
    model, passes = make(kind), []
    model.network.encoder_norm.register_forward_hook(lambda *_: passes.append(1))
    draws = []
    for k in range(1, L + 1):
        passes.clear()
        draws.append(model.sample_tokens(1, ar_steps=k, seed=2))
        assert len(passes) == k
        assert bool(draws[-1].isfinite().all())
        assert float(draws[-1].abs().max()) <= 1
    assert all(float((draws[a] - draws[b]).abs().max()) > 1e-3 for a, b in ((0, 3), (0, 15), (3, 15)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ar_steps": 17}, r"AR steps must be in \[1, 16\] for 16 tokens, got 17"),
        ({"ar_steps": 0}, "AR steps must be at least 1, got 0"),
        ({"head_steps": 0}, "denoising steps must be at least 1, got 0"),
        ({"head_steps": 1001}, r"denoising steps must be in \[1, 1000\], got 1001"),
        ({"evaluations": 0}, "number of evaluations must be at least 1, got 0"),
        ({"evaluations": 2}, "evaluations 2 is for students: a teacher takes head_steps"),
        ({"guidance": -0.5}, r"guidance must .* negative, got -0\.5"),
        ({"guidance": float("nan")}, "guidance .* got nan"),
        ({"guidance": float("inf")}, "guidance .* got inf"),
        ({"temperature": -1.0}, "temperature must not be negative, got -1.0"),
        ({"guidance": float("nan")}, "guidance must be a number, got nan"),
        ({"solver": "euler"}, "unknown solver 'euler'"),
        ({"guidance_schedule": "cosine"}, "unknown guidance_schedule 'cosine'"),
        ({"order": "spiral"}, "unknown order 'spiral'"),
        ({"order": [0] * L}, "position 0 occurs 16 times"),
        ({"order": list(range(15))}, "all 16 token positions, got 15"),
        ({"order": 3}, "order"),
        ({"order": torch.arange(L).expand(1, 1, L)}, "order"),
        ({"order": torch.arange(L).expand(3, L)}, "each of the 1 images; got 3"),
        ({"classes": 3}, r"unknown class 3: give an index in \[0, 2\] or a name, such as ant, bee, cat"),
        ({"classes": [0, "dog"]}, "unknown class 'dog': give .* or a name, such as ant, bee, cat"),
        ({"classes": "catt"}, r"unknown class 'catt' \(did you mean 'cat'\?\)"),
        ({"classes": [1.7]}, "unknown class 1.7"),
        ({"ar_steps": 2.5}, "ar_steps must be an integer, got 2.5"),
        ({"guidance": "2"}, "guidance must be a number, got '2'"),
        ({"classes": [0, 1], "images": np.zeros((1, 8, 8, 1), np.uint8), "keep": KEEP}, "2 classes for 1 images"),
        ({"classes": -1}, "unknown class -1"),
        ({"classes": []}, "classes is empty"),
        ({"num_images": 0}, "images must be at least 1, got 0"),
        ({"num_images": 4.0}, "num_images must be an integer, got 4.0"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
        ({"solver": "ddim", "temperature": 0.9}, "ddim adds no noise, so temperature 0.9 does nothing"),
        ({"batch_size": 0}, "batch size must be at least 1, got 0"),
        ({"seed": -1}, "seed .*must not be negative, got -1"),
        ({"images": np.zeros((1, 8, 8, 1), np.uint8)}, "both images and keep"),
        ({"images": np.zeros((1, 8, 8, 1)), "keep": KEEP}, "uint8 NHWC.* got float64"),
        ({"images": np.zeros((1, 8, 8, 1), np.uint8), "keep": np.zeros((8, 8))}, r"keep must be a \(4, 4\) mask"),
        ({"images": np.zeros((1, 8, 8, 1), np.uint8), "keep": np.full((4, 4), 0.3)}, "True or False for each token"),
        ({"images": np.zeros((2, 8, 8, 1), np.uint8), "keep": KEEP, "num_images": 3}, r"got uint8 \(2, 8, 8, 1\)"),
        ({"images": np.zeros((1, 12, 12, 1), np.uint8), "keep": KEEP}, r"got uint8 \(1, 12, 12, 1\)"),
        ({"images": np.zeros((1, 8, 8, 3), np.uint8), "keep": KEEP}, r"got uint8 \(1, 8, 8, 3\)"),
    ],
)
def test_errors_name_the_value(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make().sample(**arguments)


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_tokens_that_are_not_finite_are_no_black_images(make, kind):
    model = make(kind)
    with torch.no_grad():
        model.network.head.final_layer.linear.bias[0] = torch.nan
    for draw in (model.sample, model.sample_tokens):
        with pytest.raises(FloatingPointError, match=r"not finite \(seed 4, image 10 and on\)"):
            draw([0, 1, 2], seed=4, first_image=10, batch_size=2)


def test_student_with_fixed_guidance_refuses_another(make):
    model = make("student")
    for arguments, got in (({"guidance": 2.0}, "2.0"), ({"guidance_schedule": "linear"}, "linear")):
        with pytest.raises(ValueError, match=rf"constant guidance of 1\.5, not for .*{got}"):
            model.sample(0, **arguments)
    assert np.array_equal(model.sample(0, guidance=1.5), model.sample(0))
    for arguments in ({"head_steps": 5}, {"solver": "ddim"}):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))} is for teachers: a student takes evaluations"):
            model.sample(0, **arguments)


def test_student_with_a_guidance_range(make):
    model = make("range")
    draws = [model.sample_tokens(0, guidance=w) for w in (1.0, 2.0, 3.0)]
    assert all(float((a - b).abs().max()) > 1e-3 for a, b in itertools.pairwise(draws))
    for w in (0.9, 3.1):
        with pytest.raises(ValueError, match=rf"serves guidance in \[1\.0, 3\.0\], got {w}"):
            model.sample(0, guidance=w)
    linear = model.sample_tokens(0, guidance=3.0, guidance_schedule="linear")
    assert float((linear - draws[2]).abs().max()) > 1e-3
    model.student = StudentConfig(guidance=2.0, guidance_range=(1.5, 3.0))
    with pytest.raises(ValueError, match=r"serves guidance in \[1\.5, 3\.0\], got 1 to 2\.0"):
        model.sample(0, guidance=2.0, guidance_schedule="linear")
    model.student = StudentConfig(guidance=0.5, guidance_range=(0.4, 0.6))
    with pytest.raises(ValueError, match=r"got 1 to 0\.5"):
        model.sample(0, guidance=0.5, guidance_schedule="linear")


def test_teacher_guidance(make):
    model = make()

    def draw(classes: int | None = 1, **arguments):
        return model.sample_tokens(classes, solver="ddim", **arguments)

    assert torch.equal(draw(guidance=1.0), draw(guidance=1.0, guidance_schedule="linear"))
    assert float((draw(guidance=3.0) - draw(guidance=1.0)).abs().max()) > 0.05
    assert float((draw(guidance=3.0) - draw(guidance=3.0, guidance_schedule="linear")).abs().max()) > 0.05
    # At w = 0, and for an unconditional image, only the null condition counts.
    assert_close(draw(guidance=0.0), draw(classes=None, guidance=1.0), rtol=0, atol=1e-3)
    assert_close(draw(classes=None, guidance=3.0), draw(classes=None, guidance=1.0), rtol=0, atol=1e-3)
    assert float((draw(classes=None) - draw()).abs().max()) > 0.05


def test_temperature(make):
    """Zero temperature: a student's tokens no longer depend on its noise, only on the order."""
    student = make("student")
    cold = student.sample_tokens(1, num_images=3, temperature=0.0, order="raster")
    assert_close(cold, cold[:1].expand_as(cold))
    warm = student.sample_tokens(1, num_images=3, order="raster")
    assert float((warm[0] - warm[1]).abs().max()) > 0.05


@KINDS
def test_orders(make, kind):
    model = make(kind)
    draws = {}
    for name, order in (("raster", torch.arange(L)), ("centre-out", masking.centre_out_order(4))):
        draws[name] = model.sample_tokens([0, 1], order=name)
        assert torch.equal(model.sample_tokens([0, 1], order=order), draws[name])
        assert torch.equal(model.sample_tokens([0, 1], order=order.tolist()), draws[name])
    assert not torch.equal(draws["raster"], draws["centre-out"])
    orders = torch.stack([torch.arange(L), masking.centre_out_order(4)])
    for batch_size in (1, 2):
        mixed = model.sample_tokens([0, 1], order=orders, batch_size=batch_size)
        assert_close(mixed, torch.stack([draws["raster"][0], draws["centre-out"][1]]), rtol=0, atol=1e-3)


def test_tokens_are_revealed_in_the_order_given(make):
    model, steps = make(), []
    orders = torch.stack([torch.arange(L).flip(0), masking.centre_out_order(4)])
    config, labels, noise = model.settings(ar_steps=6), torch.tensor([0, 3]), ImageNoise(0, [0, 1])
    with torch.no_grad():
        model.draw_batch(config, labels, noise, orders, each_ar_step=lambda *step: steps.append(step))
    for (tokens, drawn), masked in zip(steps, masking.masked_counts(L, 6)[1:], strict=True):
        assert torch.equal(drawn, orders[:, : L - masked])
        for row, order in zip(tokens, orders, strict=True):
            revealed = row.any(-1).nonzero().squeeze(1)
            assert torch.equal(revealed, order[: L - masked].sort().values)
    for (before, _), (after, _) in itertools.pairwise(steps):
        assert torch.equal(after[before != 0], before[before != 0])


def test_threads_draw_the_same_numbers():
    """As a GPU's are drawn."""
    with torch.inference_mode():  # as in `sample`; threads are outside
        rows = torch.empty(5, 3, 4)
        fill_rows(rows, ImageNoise(3, list(range(5))).generators, threads=True)
    assert torch.equal(rows, ImageNoise(3, list(range(5))).randn(3, 4))
    assert torch.equal(rows[2], torch.randn(3, 4, generator=generator(3, 2)))


@KINDS
@pytest.mark.parametrize("order", [None, "raster"])
def test_inpainting(make, kind, order):
    """None, all and different numbers of tokens kept in one call: kept pixels are exact, the others are drawn."""
    model, random = make(kind), np.random.default_rng(0)
    images = random.integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    keep = random.random((6, 4, 4)) < np.array([0.5, 0.0, 0.9, 0.2, 1.1, 0.5])[:, None, None]
    assert len(set(keep.sum((1, 2)).tolist())) >= 5
    result = model.sample([0, 1, 2], images=images, keep=keep, batch_size=2, order=order, seed=1)
    pixels = keep.repeat(2, axis=1).repeat(2, axis=2)[..., None]
    assert result.shape == images.shape
    assert np.array_equal(result[pixels], images[pixels])
    assert np.mean(result[~pixels] == images[~pixels]) < 0.1
    plain = model.sample([0, 1], order=order, seed=1)
    assert np.abs(result[1].astype(int) - plain[1]).max() <= 1
    one_mask = model.sample(1, images=images, keep=keep[0], order=order)
    assert np.array_equal(one_mask[:, pixels[0]], images[:, pixels[0]])
    alike = {"images": list(images), "keep": torch.from_numpy(keep[0]).int(), "order": order}
    tokens = model.sample_tokens(np.array(1), **alike)
    assert np.array_equal(model.to_images(tokens).numpy(), one_mask)


def test_inpainted_tokens_see_the_kept_ones(make):
    model, keep = make(), KEEP
    dark, light = (model.sample(0, images=np.full((1, 8, 8, 1), v, np.uint8), keep=keep) for v in (0, 255))
    drawn = ~keep.repeat(2, axis=0).repeat(2, axis=1)
    assert np.abs(dark[0, drawn].astype(int) - light[0, drawn]).max() > 5


def test_unmask_runs_the_null_class_only_for_guidance(make):
    network, batches = make().network, []
    network.encoder_norm.register_forward_hook(lambda _module, _inputs, out: batches.append(len(out)))
    for kind, guidance, expected in (("teacher", 1.0, 1), ("teacher", 2.0, 2), ("student", 1.5, 1)):
        model = make(kind)
        model.network = network
        batches.clear()
        model.sample(0, ar_steps=3, guidance=guidance)
        assert batches == [expected] * 3


# ---- gradients through the rollout


@pytest.fixture
def rollout(tiny_mar):
    """``rollout(**options)`` -> (tokens, gradient of every parameter) of a student's differentiable rollout, or, with
    ``chain``, of a teacher's with two denoising steps."""
    network = tiny_mar()
    one = sampling.few_evaluations(network.head, cosine_schedule(), (755,))
    noise = ImageNoise(0, [0, 1, 2])
    orders, z, labels = noise.permutation(L), noise.randn(L, 4), torch.tensor([0, 1, 3])
    counts = masking.masked_counts(L, 4)

    def run(counts=counts, chain=False, **options):
        two = sampling.diffusion_chain(network.head, respace(cosine_schedule(), 2), noise, "ddim")
        draw = two if chain else one
        tokens = sampling.last(sampling.unmask(network, draw, labels, orders, counts, z, **options))
        network.zero_grad()
        tokens.square().mean().backward()
        return tokens.detach(), {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}

    return run


@pytest.mark.parametrize("chain", [False, True])
def test_checkpointed_ar_steps_have_the_same_gradient(rollout, chain):
    plain, recomputed = rollout(chain=chain), rollout(chain=chain, checkpoint_ar_steps=True)
    assert plain[1]["z_proj.weight"].any()
    assert torch.equal(plain[0], recomputed[0])
    assert_close(plain[1], recomputed[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradient_of_the_last_ar_step_only(rollout, recompute):
    tokens, truncated = rollout(grad_ar_steps=[3], checkpoint_ar_steps=recompute)
    full = rollout()
    assert torch.equal(tokens, full[0])
    assert float((truncated["z_proj.weight"] - full[1]["z_proj.weight"]).abs().max()) > 1e-5
    assert_close(rollout(grad_ar_steps=range(4))[1], full[1])


def test_truncated_gradient_is_that_of_detached_tokens(tiny_mar, rollout):
    counts = masking.masked_counts(L, 4)
    with torch.no_grad():
        network, noise = tiny_mar(), ImageNoise(0, [0, 1, 2])
        orders, z, labels = noise.permutation(L), noise.randn(L, 4), torch.tensor([0, 1, 3])
        draw = sampling.few_evaluations(network.head, cosine_schedule(), (755,))
        earlier = list(sampling.unmask(network, draw, labels, orders, counts, z))[-2]
    truncated, detached = rollout(grad_ar_steps=[3]), rollout(counts=counts[-2:], tokens=earlier)
    # all known tokens come ascending in the second, those of each AR step in the first: rounding differs
    assert_close(truncated[0], detached[0], rtol=0, atol=1e-4)
    assert_close(truncated[1], detached[1])


def test_gradient_against_finite_differences(tiny_mar):
    """Along a random direction of all weights, through every AR step; float32, so to one per cent."""
    network, noise = tiny_mar(), ImageNoise(0, [0])
    orders, z = noise.permutation(L), noise.randn(L, 4)
    draw = sampling.few_evaluations(network.head, cosine_schedule(), (755,))
    parameters = list(network.parameters())
    random = generator(7)
    direction = [torch.randn(p.shape, generator=random) * p.detach().abs().mean() for p in parameters]

    def loss():
        tokens = sampling.last(
            sampling.unmask(network, draw, torch.tensor([1]), orders, masking.masked_counts(L, 4), z)
        )
        return tokens.double().square().sum()

    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True) if g is not None)
    values = []
    for step in (1e-3, -2e-3):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(step * d)
            values.append(float(loss()))
    assert slope == pytest.approx((values[0] - values[1]) / 2e-3, rel=0.01)


# ---- files


@KINDS
def test_save_and_load(make, kind, tmp_path):
    model = make(kind)
    model.sampling = dataclasses.replace(model.sampling, order="centre-out", ar_steps=5)
    model.save(tmp_path / "model")
    loaded = marval.load(tmp_path / "model")
    assert (loaded.student, loaded.sampling, loaded.tokenizer) == (model.student, model.sampling, model.tokenizer)
    assert (loaded.class_names, loaded.provenance) == (NAMES, {"data": "none"})
    assert np.array_equal(loaded.sample([0, "bee", None], seed=4), model.sample([0, "bee", None], seed=4))
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def damage_tensors(change):
    def damage(folder):
        tensors = load_tensors(folder / "model.safetensors")
        change(tensors)
        save_tensors(folder / "model.safetensors", tensors)

    return damage


def damage_config(**changes):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        for key, value in changes.items():
            config[key] = {**config[key], **value} if isinstance(value, dict) else value
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def truncate(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_tensors(lambda t: t.pop("mask_token")), r"model\.safetensors: tensor 'mask_token' is missing"),
        (damage_tensors(lambda t: t.update(extra=torch.zeros(2))), "unexpected tensor 'extra'"),
        (damage_tensors(lambda t: t.update(mask_token=torch.zeros(1, 1, 5))), r"'mask_token' has shape \[1, 1, 5\]"),
        (damage_config(model={"width": 32}), r"has shape .*: config\.json describes another model"),
        (damage_config(model={"wide": 32}), r"config\.json: MARConfig has no setting 'wide'"),
        (damage_config(model={"width": 15}), r"config\.json: model\.width 15 must be a multiple"),
        (damage_config(tokenizer={"kind": "vq"}), r"config\.json: unknown tokenizer kind 'vq'"),
        (damage_config(tokenizer={"image_size": 16}), r"config\.json: .*token"),
        (damage_config(tokenizer={"channels": 3}), r"config\.json: .*token"),
        (damage_config(class_names=["one"]), r"config\.json: .*class"),
        (damage_config(format=99), r"config\.json does not describe a marval model"),
        (truncate("model.safetensors", 1000), r"model\.safetensors is not a whole safetensors file"),
        (truncate("model.safetensors", 0), r"model\.safetensors is not a whole safetensors file"),
        (truncate("config.json", 40), r"config\.json cannot be read as JSON"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json does not exist"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors does not exist"),
    ],
)
def test_load_errors_name_the_file(make, tmp_path, damage, message):
    folder = tmp_path / "model"
    make().save(folder)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        marval.load(folder)


def test_a_number_is_an_index_and_a_string_a_name(make):
    model = make()
    model.class_names = [str(index + 1) for index in range(len(model.class_names))]
    assert model.label(1) == 1
    assert model.label("1") == 0
