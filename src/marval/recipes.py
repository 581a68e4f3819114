"""Named runs. Each docstring says what to expect, on what hardware, in what time."""

from marval.config import DistillConfig, GSIMConfig, MARConfig, RLConfig, SamplingConfig, StudentConfig, TrainConfig

_DIGITS_SAMPLING = SamplingConfig(ar_steps=8, guidance=1.5, head_steps=100)


def digits_teacher() -> TrainConfig:
    """8x8 handwritten digits, 16 tokens of 2x2 pixels, 96 wide, 2+2 blocks."""
    return TrainConfig(
        steps=3000, batch=128, lr=2e-3, ema=0.998, head_batch_mul=4, save_every=500, sample_every=1000,
        model=MARConfig(width=96, depth=2, heads=4, buffer_size=4, head_width=128, head_depth=3, dropout=0.1),
        sampling=_DIGITS_SAMPLING,
    )  # fmt: skip


def digits_student() -> DistillConfig:
    """One-step student of the digits teacher, head only."""
    return DistillConfig(
        steps=1000, batch=128, ema=0.99, save_every=250, sample_every=500, student=StudentConfig(guidance=1.5),
        gsim=GSIMConfig(lr=2e-4, auxiliary_lr=4e-4),
    )  # fmt: skip


def digits_aligned() -> RLConfig:
    """The digits student, aligned by the classifier's log-probability."""
    return RLConfig(steps=100, batch=64, ema=0.9, save_every=50, sample_every=50)


TRAIN = {"digits": digits_teacher}
DISTILL = {"digits": digits_student}
RL = {"digits": digits_aligned}
