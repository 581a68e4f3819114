"""GSIM on contexts: which gradients flow, which conditions each network sees, and what is kept for RL."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from marval.checkpoint import save_tensors
from marval.config import GSIMConfig, StudentConfig
from marval.diffusion import cosine_schedule
from marval.masking import random_masks
from marval.matching import Context, Noise, ScoreMatching, draw_noise, load_scores
from marval.models.mar import MAR
from marval.networks import copy_auxiliary, copy_network
from marval.pipeline import Pipeline
from marval.rng import generator
from marval.sampling import few_evaluations


def made(trained: str, kind: str = "head", evaluations: int = 1) -> tuple[ScoreMatching, Context, Noise]:
    """Losses of a student whose networks were moved apart, on a context with half of the tokens masked."""
    g = generator(0)
    teacher = Pipeline.load(tiny.teacher()).network.requires_grad_(False)
    student, auxiliary = copy_network(teacher, trained, True), copy_auxiliary(teacher, kind, True, evaluations)
    with torch.no_grad():
        for parameter in (*student.parameters(), *auxiliary.parameters()):
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=g)
    scores = ScoreMatching(
        teacher, student, auxiliary, StudentConfig(evaluations=evaluations), GSIMConfig(), cosine_schedule()
    )
    length, dim = student.config.num_tokens, student.config.token_dim
    visible, masked = random_masks(4, length, length // 2, g)
    tokens = torch.randn(4, length, dim, generator=g).clamp(-1, 1)
    context = scores.context(tokens, visible, masked, torch.arange(4), torch.full((4, 1), 1.5))
    return scores, context, draw_noise(4, length // 2, dim, (20, 900), g, evaluations)


KINDS = pytest.mark.parametrize(("trained", "kind"), [("head", "head"), ("all", "head"), ("all", "network")])
"""What is trained, and the auxiliary."""


@KINDS
def test_each_loss_moves_its_own_network(trained: str, kind: str, monkeypatch: pytest.MonkeyPatch):
    """The auxiliary's loss gives the student nothing; the student's takes the auxiliary's condition as constant."""
    scores, context, noise = made(trained, kind)
    own = [p for p in scores.student.parameters() if p.requires_grad]
    scores.auxiliary_loss(context, noise)[0].backward()
    assert all(p.grad is None for p in own)
    assert all(p.grad is not None for p in scores.auxiliary.parameters())

    loss = scores.student_loss(context, noise)[0]
    gradients = torch.autograd.grad(loss, own)
    plain = scores.eps_auxiliary
    monkeypatch.setattr(scores, "eps_auxiliary", lambda c, x_t, t, condition: plain(c, x_t, t, condition.detach()))
    for found, expected in zip(
        gradients, torch.autograd.grad(scores.student_loss(context, noise)[0], own), strict=True
    ):
        assert_close(found, expected)
    assert all(p.grad is None for p in scores.teacher.parameters())


def test_several_evaluations():
    """Each token is that of its own evaluation, as the sampler draws it; only this one carries gradients."""
    scores, context, noise = made("head", evaluations=4)
    assert set(noise.evaluation.flatten().tolist()) == {0, 1, 2, 3}
    found = scores.generate(context, noise, context.student_condition.requires_grad_())
    for level in range(4):
        times = StudentConfig(evaluations=4).timesteps(4)[: level + 1]
        later = SimpleNamespace(randn=lambda *_: noise.z[:, :, 1 : level + 1].transpose(1, 2))  # noqa: B023
        draw = few_evaluations(scores.student.head, scores.schedule, times, later)
        drawn = draw(context.student_condition, None, noise.z[:, :, 0], context.w)
        here = noise.evaluation == level
        assert_close(found[here], drawn[here], rtol=1e-4, atol=1e-4)
    once = noise._replace(evaluation=torch.zeros_like(noise.evaluation))
    drawn_once = scores.generate(context, once, context.student_condition)
    assert not torch.allclose(found, drawn_once, atol=1e-2)

    (through_all,) = torch.autograd.grad(
        drawn[noise.evaluation == 3].sum(), context.student_condition, retain_graph=True
    )
    (through_last,) = torch.autograd.grad(found[noise.evaluation == 3].sum(), context.student_condition)
    assert through_last[noise.evaluation == 3].any()
    assert not through_last[noise.evaluation != 3].any()
    assert not torch.allclose(through_all, through_last, atol=1e-3)


@pytest.mark.parametrize("kind", ["head", "network"])
def test_the_auxiliary_knows_the_evaluation(kind: str, tmp_path: Path):
    """And what RL goes on with, whose student has one, is the auxiliary of the first."""
    scores, context, noise = made("all", kind, evaluations=4)
    x_t, condition = torch.randn(noise.eps.shape, generator=generator(1)), context.student_condition
    found = scores.eps_auxiliary(context, x_t, noise, condition)
    first = noise._replace(evaluation=torch.zeros_like(noise.evaluation))
    differs = (found != scores.eps_auxiliary(context, x_t, first, condition)).any(-1)
    assert torch.equal(differs, noise.evaluation > 0)
    save_tensors(tmp_path / "scores.safetensors", scores.scores())
    kept = load_scores(tmp_path, scores.student, True)[1]
    assert_close(kept(x_t, noise.t, condition, context.w).chunk(2, -1)[0],
                 scores.eps_auxiliary(context, x_t, first, condition))  # fmt: skip


def test_the_auxiliary_sees_the_students_conditions():
    """Or its own, where it is a network."""
    scores, context, _ = made("all")
    assert scores.auxiliary_condition(context) is context.student_condition
    assert_close(context.student_condition, context.condition(scores.student))
    assert not torch.allclose(context.student_condition, context.teacher_condition, atol=1e-2)
    assert not context.student_condition.requires_grad
    shared = made("head")[1]
    assert shared.student_condition is shared.teacher_condition
    scores, context, _ = made("all", "network")
    assert isinstance(scores.auxiliary, MAR)
    assert_close(scores.auxiliary_condition(context), context.condition(scores.auxiliary))
    assert not torch.allclose(scores.auxiliary_condition(context), context.student_condition, atol=1e-2)


@KINDS
def test_scores_of_this_version_and_of_before(trained: str, kind: str, tmp_path: Path):
    """Teacher and auxiliary come back; of an auxiliary with a backbone, which marval 0.1 first stored too, the head."""
    scores, _, _ = made(trained, kind)
    tensors: dict[str, Any] = scores.scores()
    assert {name[:15] for name in tensors if name.startswith("auxiliary")} == {"auxiliary.head."}
    backbone = {
        f"auxiliary.{name}": x.clone() for name, x in scores.teacher.state_dict().items() if name[:5] != "head."
    }
    for before in ({}, backbone):
        save_tensors(tmp_path / "scores.safetensors", tensors | before)
        assert load_file(tmp_path / "scores.safetensors").keys() == {*tensors, *before}
        teacher, auxiliary = load_scores(tmp_path, scores.student, True)
        assert (teacher.class_emb is scores.student.class_emb) == (trained == "head")
        for found, expected in ((teacher, scores.teacher), (auxiliary, scores.auxiliary_head)):
            ours = expected.state_dict()
            assert all(torch.equal(x, ours[name]) for name, x in found.state_dict().items())
        assert not any(p.requires_grad for p in teacher.head.parameters())
        assert all(p.requires_grad for p in auxiliary.parameters())
