"""Low-rank adapters: the identity at first, alone trained, and merged into a plain network that computes the same."""

import copy
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_distributed import torchrun
from torch.testing import assert_close

from marval.config import MARConfig, RLConfig
from marval.models.lora import Adapters, adapt
from marval.models.mar import MAR
from marval.rl import rl

CONFIG = MARConfig(
    grid=4, token_dim=4, num_classes=3, width=32, depth=1, heads=2, buffer_size=2, head_width=24, head_depth=2
)
RANK = 3


def network() -> MAR:
    """With random numbers also where a fresh network has zeros."""
    torch.manual_seed(0)
    result = MAR(CONFIG, guidance_input=True).eval()
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return result


def outputs(model: MAR) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    tokens, visible = torch.randn(2, 16, 4, generator=g), torch.tensor([[1, 5, 7], [0, 2, 15]])
    condition = model.condition(tokens, visible, torch.tensor([0, 3]))
    t = torch.full((2, 16), 700)
    return [condition, model.head(tokens, t, condition, torch.full((2, 1), 1.5))]


def trained() -> tuple[MAR, Adapters, MAR]:
    """An adapted network after one update, its adapters, and the network before."""
    plain = network()
    adapted = copy.deepcopy(plain)
    adapters = adapt(adapted, RANK)
    optimizer = torch.optim.Adam(adapters.parameters(), 0.01)
    for _ in range(2):  # in the first only B moves: A's gradient is zero where B is
        optimizer.zero_grad()
        sum(out.square().mean() for out in outputs(adapted)).backward()  # type: ignore[union-attr]
        optimizer.step()
    return adapted, adapters, plain


def test_a_fresh_adapter_changes_nothing():
    plain = network()
    adapted = copy.deepcopy(plain)
    adapt(adapted, RANK)
    assert all(torch.equal(a, b) for a, b in zip(outputs(plain), outputs(adapted), strict=True))


def test_adapters_alone_are_trained():
    adapted, adapters, plain = trained()
    own = {id(parameter) for parameter in adapters.parameters()}
    assert {id(p) for p in adapted.parameters() if p.requires_grad} == own
    linear = [
        module
        for name, module in plain.named_modules()
        if isinstance(module, torch.nn.Linear) and "time_embed" not in name and "guidance_embed" not in name
    ]
    assert sum(p.numel() for p in adapters.parameters()) == sum(RANK * sum(m.weight.shape) for m in linear)
    state = adapted.state_dict()
    for name, value in plain.state_dict().items():
        frozen = name if name in state else name.replace(".weight", ".parametrizations.weight.original")
        assert torch.equal(state[frozen], value), name
    assert all(layer.up.any() for layer in adapters.layers.values())  # of the head's last layer too


def test_merged_weights_compute_the_same():
    adapted, adapters, plain = trained()
    merged = copy.deepcopy(plain)
    merged.load_state_dict(adapters.merged(adapted.state_dict()))  # strict: exactly the names of a plain network
    assert_close(outputs(merged), outputs(adapted), rtol=0, atol=0)
    assert not torch.allclose(outputs(plain)[1], outputs(merged)[1], atol=1e-3)
    for name, value in plain.state_dict().items():
        difference = merged.state_dict()[name] - value
        if difference.ndim == 2 and difference.any():
            assert torch.linalg.matrix_rank(difference, rtol=1e-3) <= RANK, name


def test_rank():
    with pytest.raises(ValueError, match="rank of adapters must be at least 1, got 0"):
        adapt(network(), 0)


def work(out: Path, student: Path, classifier: Path, **how: object) -> None:
    """RL of adapters, with everything that the processes share."""
    config = RLConfig(
        steps=3, batch=10, log_every=1, save_every=3, sample_every=0, ar_steps=4, classifier=str(classifier),
        judge=str(classifier), held_out="reads-class", eval_every=3, eval_images=21, trained="lora", lora_rank=2,
        kl=0.1, grad_ar_steps=2, grad_ar_choice="random", range_seeds=2, **how,
    )  # fmt: skip
    rl(config, student, out)


def test_adapters_split_over_two_processes_are_those_of_one(tmp_path: Path):
    """Saved whole, merged and equal."""
    folders = [str(path) for path in (tiny.student(), tiny.classifier())]
    work(tmp_path / "one", *map(Path, folders))
    script = tmp_path / "two.py"
    script.write_text(
        f"import sys\nfrom pathlib import Path\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_lora import work\n"
        f"work(*map(Path, {[str(tmp_path / 'two'), *folders]!r}), shard=True)\n{tiny.LEAVE}"
    )
    torchrun(2, script)
    rows = [tiny.metrics(tmp_path / name) for name in ("one", "two")]
    for one, two in zip(*rows, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() - {"entropy"}:  # of the rollouts, per part
            assert two[name] == pytest.approx(one[name], rel=2e-3, abs=1e-3), name
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    start = load_file(tiny.student() / "model.safetensors")
    assert weights[0].keys() == weights[1].keys() == start.keys()
    moved, apart = (
        sum(float((value - other[name]).abs().sum()) for name, value in weights[0].items())
        for other in (start, weights[1])
    )
    assert apart <= 0.02 * moved  # Adam without momentum turns the sign of a gradient near zero into a step
