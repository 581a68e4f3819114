import pytest
import torch
from torch.testing import assert_close

from marval.config import PRESETS
from marval.models.head import DiffusionHead
from marval.models.mar import MAR


def inputs(batch=3, length=16, dim=4, num_visible=5):
    """Tokens, ascending visible positions, labels."""
    generator = torch.Generator().manual_seed(1)
    visible = torch.stack([torch.randperm(length, generator=generator)[:num_visible] for _ in range(batch)])
    return torch.randn(batch, length, dim, generator=generator), visible.sort(1).values, torch.arange(batch) % 3


@pytest.mark.parametrize(
    ("preset", "millions", "head_millions"),
    [("mar-b", 207.92, 36.2), ("mar-l", 478.33, 72.1), ("mar-h", 942.40, 151.0)],
)
def test_presets_have_the_published_sizes(preset, millions, head_millions):
    with torch.device("meta"):
        network = MAR(PRESETS[preset])
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    assert sum(p.numel() for p in network.head.parameters()) / 1e6 == pytest.approx(head_millions, abs=0.6)
    backbone = sum(p.numel() for p in network.backbone_parameters())
    assert backbone + sum(p.numel() for p in network.head.parameters()) == sum(p.numel() for p in network.parameters())


def test_dropout_only_in_training(tiny_mar):
    network, x = tiny_mar(dropout=0.5), inputs()
    without = tiny_mar(dropout=0.0)
    assert torch.equal(network.condition(*x), network.condition(*x))
    assert torch.equal(network.condition(*x), without.condition(*x))
    network.train()
    with torch.random.fork_rng():
        assert float((network.condition(*x) - network.condition(*x)).abs().mean().detach()) > 0.01
    without.train()
    assert torch.equal(without.condition(*x), without.eval().condition(*x))


def test_activation_checkpointing_changes_nothing(tiny_mar):
    results = []
    for recompute in (False, True):
        network = tiny_mar(depth=2).train()
        network.activation_checkpointing = recompute
        condition = network.condition(*inputs())
        condition.square().sum().backward()
        backbone = dict(network.named_parameters())
        gradients = {name: p.grad for name, p in backbone.items() if not name.startswith("head.")}
        assert all(gradient is not None for gradient in gradients.values())
        results.append((condition.detach(), gradients))
    assert torch.equal(results[0][0], results[1][0])
    assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-6)


def test_activation_checkpointing_recomputes(tiny_mar):
    calls = []
    network = tiny_mar()
    network.activation_checkpointing = True
    network.encoder_blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    network.condition(*inputs()).sum().backward()
    assert len(calls) == 2


def test_bf16_autocast(tiny_mar):
    network, (tokens, visible, labels) = tiny_mar(width=32, head_width=32), inputs()
    t = torch.tensor([0, 500, 999])[:, None].expand(3, 16)
    with torch.no_grad():
        condition = network.condition(tokens, visible, labels)
        out = network.head(tokens, t, condition)
        with torch.autocast("cpu", torch.bfloat16):
            condition_bf16 = network.condition(tokens, visible, labels)
            out_bf16 = network.head(tokens, t, condition_bf16)
    assert out_bf16.dtype == torch.float32
    assert not torch.equal(out, out_bf16)
    assert float((condition - condition_bf16.float()).norm() / condition.norm()) < 0.03
    assert float((out - out_bf16).norm() / out.norm()) < 0.03


def test_no_visible_tokens(tiny_mar):
    tokens, _, labels = inputs()
    condition = tiny_mar().condition(tokens, torch.empty(3, 0, dtype=torch.int64), labels)
    assert condition.shape == (3, 16, 16)
    assert bool(condition.isfinite().all())
    other = tiny_mar().condition(tokens, torch.empty(3, 0, dtype=torch.int64), (labels + 1) % 3)
    assert float((condition - other).abs().max().detach()) > 0.01


def test_all_tokens_visible(tiny_mar):
    tokens, _, labels = inputs()
    assert bool(tiny_mar().condition(tokens, torch.arange(16).expand(3, 16), labels).isfinite().all())


def test_condition_reads_visible_tokens_only(tiny_mar):
    network, (tokens, visible, labels) = tiny_mar(), inputs()
    index = visible[..., None].expand(-1, -1, 4)
    hidden = torch.full_like(tokens, torch.nan).scatter(1, index, tokens.gather(1, index))
    condition = network.condition(tokens, visible, labels)
    assert torch.equal(network.condition(hidden, visible, labels), condition)
    changed = tokens.scatter_add(1, index[:, :1], torch.ones(3, 1, 4))
    assert bool(((network.condition(changed, visible, labels) - condition).abs().amax((1, 2)) > 1e-3).all())


def test_null_class(tiny_mar):
    network, (tokens, visible, _) = tiny_mar(), inputs()
    embedding = network.class_embedding(torch.tensor([0, 2, 3]))
    assert torch.equal(embedding[:2], network.class_emb.weight[[0, 2]])
    assert torch.equal(embedding[2:], network.fake_latent)
    network.condition(tokens, visible, torch.full((3,), 3)).sum().backward()
    assert network.fake_latent.grad is not None
    assert network.fake_latent.grad.any()
    assert not network.class_emb.weight.grad.any()


@pytest.mark.parametrize("w", [0.0, 1.0, 7.5])
def test_guidance_input_starts_as_the_plain_head(w):
    """Weights of a trained head, and the fresh guidance embedding: the same outputs for every w."""
    plain, guided = DiffusionHead(4, 8, 16, 2), DiffusionHead(4, 8, 16, 2, guidance_input=True)
    generator = torch.Generator().manual_seed(0)
    state = {k: torch.randn(v.shape, generator=generator) / 3 for k, v in plain.state_dict().items()}
    plain.load_state_dict(state)
    fresh = {k: v for k, v in guided.state_dict().items() if k.startswith("guidance_embed.")}
    guided.load_state_dict({**state, **fresh})
    x, c = torch.randn(5, 4, generator=generator), torch.randn(5, 8, generator=generator)
    t = torch.tensor([0, 1, 500, 755, 999])
    out = guided(x, t, c, torch.full((5,), w))
    assert float(out.detach().std()) > 0.1
    assert torch.equal(out, plain(x, t, c))
    torch.nn.init.normal_(guided.get_parameter("guidance_embed.mlp.2.weight"), std=0.1, generator=generator)
    assert not torch.equal(guided(x, t, c, torch.full((5,), w)), plain(x, t, c))


def test_guidance_input_is_required():
    head = DiffusionHead(4, 8, 16, 1, guidance_input=True)
    with pytest.raises(ValueError, match="give w"):
        head(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 8))
