"""Which distillation settings are best? Each variant distils the same teacher and is measured like the quickstart.

    python benchmarks/distill_ablation.py runs/quickstart benchmarks/results/distill_ablation.json

needs a finished quickstart; about 15 minutes on 2 CPU cores. Variants are compared at equal updates on seeds that the
quickstart does not report (tuning and reporting are apart); the first four with two training seeds.
"""

import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from marval import recipes
from marval.checkpoint import write_json
from marval.config import GSIMConfig, StudentConfig
from marval.data import load_dataset
from marval.distill import distill, make_student
from marval.evaluate import class_accuracy, frechet_distance, image_moments, sample_in_turn
from marval.models.classifier import Classifier
from marval.pipeline import Pipeline
from marval.run import versions

NUM_IMAGES, SEED = 2000, 77

GUIDANCE = recipes.digits_student().student.guidance
BASE = dataclasses.replace(recipes.digits_student(), student=StudentConfig(guidance=GUIDANCE))
VARIANTS: dict[str, dict[str, Any]] = {
    "lambda -0.4, head, inference mask ratios": {},
    "backbone and head": {"trained": "all"},
    "lambda 0": {"gsim": GSIMConfig(lam=0.0)},
    "lambda 1 (paper)": {"gsim": GSIMConfig(lam=1.0)},
    "squared distance": {"gsim": GSIMConfig(distance="squared")},
    "training mask ratios": {"mask_ratios": "training"},
    "rollout contexts 0.5": {"rollout": 0.5},
    "guidance as input, 1..3 (the recipe)": {"student": StudentConfig(guidance=GUIDANCE, guidance_range=(1.0, 3.0))},
}


def measure(model: Pipeline, classifier: Classifier, judge: Classifier, **settings: Any) -> dict[str, float]:
    """The quickstart's numbers on other seeds."""
    real = load_dataset("digits", "train").images
    images, labels = sample_in_turn(model, range(10), NUM_IMAGES, SEED, title="sample", **settings)
    return {
        "fid": frechet_distance(image_moments(real, classifier), image_moments(images, classifier)),
        "fid_heldout_features": frechet_distance(image_moments(real, judge), image_moments(images, judge)),
        "accuracy_heldout": class_accuracy(images, labels, judge)[0],
    }


def main(run: Path, out: Path) -> None:
    classifier, judge = Classifier.load(run / "classifier"), Classifier.load(run / "judge")
    teacher = Pipeline.load(run / "teacher")
    rows: list[dict[str, Any]] = []

    def add(name: str, model: Pipeline, seconds: float = 0.0, seed: int = 0, **settings: Any) -> None:
        rows.append(
            {"variant": name, "seed": seed, "seconds": seconds, **measure(model, classifier, judge, **settings)}
        )
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
        protocol = {"updates": BASE.steps, "batch": BASE.batch, "num_images": NUM_IMAGES, "seed_of_images": SEED}
        write_json(
            out,
            {
                "rows": rows,
                "protocol": protocol,
                "versions": versions(teacher.device),
                "date": time.strftime("%Y-%m-%d"),
            },
        )

    add("one step, untrained", make_student(teacher, BASE))
    for seed, names in ((0, list(VARIANTS)), (1, list(VARIANTS)[:4])):
        for name in names:
            changes = VARIANTS[name]
            config = dataclasses.replace(BASE, seed=seed, sample_every=0, **changes)
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                student = distill(config, run / "teacher", Path(folder) / "student")
                seconds = time.perf_counter() - start
                if config.student.guidance_range is None:
                    add(name, student, seconds, seed)
                else:
                    for guidance in (1.0, GUIDANCE, 3.0):
                        add(f"{name}: at {guidance}", student, seconds, seed, guidance=guidance)
    for head_steps in (100, 25, 4):
        add(f"teacher, {head_steps} steps", teacher, head_steps=head_steps)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
