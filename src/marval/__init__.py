"""marval: one-step, reward-aligned masked autoregressive image models (MARVAL, arXiv 2511.15190).

>>> import marval
>>> model = marval.load("digits/student")
>>> images = model.sample(classes=[3, 7], seed=0)  # uint8 NHWC
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from marval.pipeline import Pipeline, load

__version__ = "0.1.0"
__all__ = ["Pipeline", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name in ("Pipeline", "load"):
        from marval import pipeline

        return getattr(pipeline, name)
    hint = f": from marval.{name} import {name}" if name in ("train", "distill", "rl") else ""
    raise AttributeError(f"module 'marval' has no attribute {name!r}{hint}")


def __dir__() -> list[str]:
    return __all__
