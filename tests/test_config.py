"""Settings are checked at construction, whatever made them."""

import json
from pathlib import Path
from typing import Any

import pytest

from marval.config import (
    DistillConfig,
    EvaluateConfig,
    GSIMConfig,
    MARConfig,
    RLConfig,
    StudentConfig,
    TrainConfig,
    from_dict,
    to_dict,
)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (TrainConfig, {"steps": 1e4}, "steps must be an integer, got 10000.0"),
        (TrainConfig, {"lr": "1e-3"}, "lr must be a number, got '1e-3'"),
        (TrainConfig, {"eval_head_steps": 2.5}, "eval_head_steps must be an integer, got 2.5"),
        (DistillConfig, {"batch": 64.0}, "batch must be an integer, got 64.0"),
        (DistillConfig, {"auxiliary": "netwrok"}, "unknown auxiliary 'netwrok': choose one of head, network"),
        (RLConfig, {"target": float("nan")}, "target must be a number, got nan"),
        (RLConfig, {"hinge": "high"}, "hinge must be a number, got 'high'"),
        (MARConfig, {"width": 64.0}, "width must be an integer, got 64.0"),
        (EvaluateConfig, {"solver": "euler"}, "unknown solver 'euler': choose one of ancestral, ddim"),
        (EvaluateConfig, {"num_images": 50.5}, "num_images must be an integer, got 50.5"),
        (StudentConfig, {"guidance_range": (1.0,)}, r"guidance_range must be 2 numbers, got \(1.0,\)"),
        (StudentConfig, {"guidance_range": (1.0, None)}, "guidance_range must be a number, got None"),
        (GSIMConfig, {"t_range": (20.5, 950)}, "t_range must be an integer, got 20.5"),
        (TrainConfig, {"flip": "no"}, "flip must be True or False, got 'no'"),
        (TrainConfig, {"data": 3}, "data must be a string, got 3"),
        (TrainConfig, {"steps": True}, "steps must be an integer, got True"),
        (TrainConfig, {"lr": True}, "lr must be a number, got True"),
        (TrainConfig, {"model": {"width": 64}}, "model must be a MARConfig, got {'width': 64}"),
        (GSIMConfig, {"t_range": (False, 950)}, "t_range must be an integer, got False"),
        (EvaluateConfig, {"order": 3}, "order must be a string, got 3"),
    ],
)
def test_a_value_of_another_type(kind: Any, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^{message}"):
        kind(**changes)


def test_what_is_as_good():
    """Lists for pairs, whole numbers for others, paths for their names, None where it means something, and no limit on
    gradients."""
    assert StudentConfig(guidance=2, guidance_range=[1, 3]) == StudentConfig(guidance=2.0, guidance_range=(1.0, 3.0))  # pyright: ignore
    assert TrainConfig(data=Path("a") / "b").data == str(Path("a") / "b")  # pyright: ignore
    assert TrainConfig(lr=1, clip_grad=float("inf")).eval_head_steps is None


def test_settings_come_back_from_json():
    settings = StudentConfig(guidance_range=(1.0, 3.0))
    assert from_dict(StudentConfig, json.loads(json.dumps(to_dict(settings)))) == settings
    with pytest.raises(ValueError, match="StudentConfig has no setting 'guidnace'"):
        from_dict(StudentConfig, {"guidnace": 2.0})
