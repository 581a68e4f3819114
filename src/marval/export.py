"""A model for others: weights, config, tokenizer and a model card, and nothing else of the run that made it."""

import json
import re
from pathlib import Path
from typing import Any

from marval import __version__
from marval.checkpoint import read_json, write_atomically
from marval.measure import weights_digest
from marval.pipeline import Pipeline
from marval.run import check_empty, new_folder
from marval.tables import result_table, sweep_table
from marval.tokenizers import LatentTokenizer

HUB_LICENCES = (
    "apache-2.0", "mit", "openrail", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0",
    "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0", "creativeml-openrail-m", "gpl-3.0",
    "lgpl-3.0", "agpl-3.0", "mpl-2.0", "unlicense",
)  # fmt: skip
"""Licence names that the Hugging Face hub knows, of those that weights have; any other text is named as such."""

CARD = """---
license: {license}
library_name: marval
pipeline_tag: unconditional-image-generation
tags: [{tags}]
---
# {name}

{what}

## Use

```python
{use}
```
{numbers}
## Data and licence

{terms}

## How it was made

marval {version}. Where the model comes from, and the settings of its run:

```json
{settings}
```

## Papers

- MARVAL: *Masked Auto-Regressive Variational Acceleration: Fast Inference Makes Practical Reinforcement Learning*,
  [arXiv 2511.15190](https://arxiv.org/abs/2511.15190); marval is an independent implementation
- MAR: *Autoregressive Image Generation without Vector Quantization*, [arXiv 2406.11838](https://arxiv.org/abs/2406.11838)
"""

NUMBERS = """
## Numbers

Measured by `marval evaluate`, with the protocol below them.

```text
{table}
```
"""

ROOT = r"(?:/(?![/\s]|$)|~[\\/]|[A-Za-z]:[\\/])"
"""How an absolute path begins."""


def export(
    model: Path, out: Path, licence: str | None = None, numbers: Path | None = None, half: bool = False,
    name: str | None = None,
) -> str:  # fmt: skip
    """Write a folder to publish: model.safetensors, config.json, tokenizer/ and README.md; returns one line about it.

    It loads as any other (`marval.load`) and draws the same images. README.md is a model card in the Hugging Face hub's
    format. Of paths in the settings only the last part is kept.

    Args:
        licence: of the weights, such as ``apache-2.0``, or any text; left out, the card says that none is stated.
        numbers: JSON of `marval evaluate` for this model.
        half: store the weights in float16: half the bytes; numbers must be those of a model with such weights.
        name: what the card calls the model; the folder's name if left out.

    Raises:
        ValueError: no model in the folder, numbers of another model, or ``out`` is not empty.
    """
    check_empty(out)
    pipeline, name = Pipeline.load(model), name or out.resolve().name
    if half:
        pipeline.network.half().float()
    table = "" if numbers is None else _table(numbers, pipeline, name)
    run = read_json(model / "meta.json") if (model / "meta.json").exists() else {}
    pipeline.provenance = without_folders(pipeline.provenance)
    new_folder(out)
    pipeline.save(out, half)
    card = model_card(pipeline, name, licence, table, without_folders(run))
    write_atomically(out / "README.md", lambda path: path.write_text(card, encoding="utf-8", newline="\n"))
    has = "weights, config" + (", autoencoder" if (out / "tokenizer").exists() else "") + " and model card"
    return f"{has} -> {out}"


def without_folders(values: Any) -> Any:
    """JSON values with every absolute path cut to its last part, also within a reward's name."""
    if isinstance(values, dict):
        return {name: without_folders(value) for name, value in values.items()}
    if isinstance(values, list):
        return [without_folders(value) for value in values]
    if not isinstance(values, str):
        return values
    alone = re.match(ROOT, values) and "*" not in values
    found = f"{ROOT}.*" if alone else rf"(?<![^\s:*,]){ROOT}((?! \+ )[^:*,])*"  # may have spaces
    return re.sub(found, lambda path: re.split(r"[\\/]", path[0].rstrip("\\/"))[-1], values)


def _table(numbers: Path, pipeline: Pipeline, name: str) -> str:
    if not numbers.exists():
        raise ValueError(f"--numbers {numbers} does not exist: marval evaluate --out writes it")
    results = read_json(numbers)
    rows = results.get("rows", [results]) if isinstance(results, dict) else []
    try:
        measured = {row["protocol"]["model"] for row in rows}
        text = sweep_table(rows, name) if "rows" in results else result_table(results, name)
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{numbers} is no result of marval evaluate: {type(error).__name__} {error}") from None
    if measured != {weights_digest(pipeline)}:
        raise ValueError(f"{numbers} holds numbers of other weights ({', '.join(measured)}): evaluate this model")
    return text


def model_card(pipeline: Pipeline, name: str, licence: str | None, table: str, run: dict[str, Any]) -> str:
    """README.md: front matter for the hub, then what people want to know.

    Args:
        table: numbers with their protocol, as text. run: the run's meta.json, if there is one.
    """
    about, names, tokenizer = pipeline.provenance, pipeline.class_names, pipeline.tokenizer
    draw = f"marval.load({json.dumps(name)}).sample(classes=[{json.dumps(names[0])}], seed=0)"
    use = ["import marval", "from PIL import Image", "", f"images = {draw}  # uint8 NHWC"]
    use.append('Image.fromarray(images[0].squeeze()).save("image.png")')
    if not tokenizer.has_images:
        use = ["import marval", "", f"tokens = {draw.replace('.sample(', '.sample_tokens(')}  # (B, L, D)"]
    terms = [f"Weights: {licence or 'no licence stated'}."]
    if "data" in about:
        terms.append(f"Trained on {about['data']}; licence of the data: {about.get('data_licence') or 'not stated'}.")
    if about.get("verb") == "import-mar":
        terms.append(f"Converted from the checkpoint {about['file']}, whose terms apply.")
    known = (licence or "not stated").lower()
    tags = ["class-conditional", "image-generation", "masked-autoregressive", "mar"]
    return CARD.format(
        license=known if known in HUB_LICENCES else f"other\nlicense_name: {re.sub('[^a-z0-9.]+', '-', known)}",
        tags=", ".join(tags if pipeline.student is None else [*tags, "one-step", "distillation"]),
        name=name,
        what=_description(pipeline),
        use="\n".join(use),
        numbers=NUMBERS.format(table=table) if table else "",
        terms="\n".join(terms),
        version=__version__,
        settings=json.dumps({"provenance": about, "run": run}, indent=1),
    )


def _description(pipeline: Pipeline) -> str:
    """What the model is and how it draws, in two sentences."""
    sizes, tokenizer, defaults = pipeline.network.config, pipeline.tokenizer, pipeline.sampling
    if pipeline.student is None:
        kind = f"A MAR teacher: a token takes {defaults.head_steps} steps of the diffusion head ({defaults.solver})"
    else:
        aligned = ", aligned with a reward" if pipeline.provenance.get("verb") == "rl" else ""
        kind = f"A one-step MARVAL student{aligned}: a token takes one evaluation of the head"
        if (most := pipeline.student.evaluations) > 1:
            kind += f", or a number that divides {most} (`evaluations`)"
    patch = f"patches of {tokenizer.patch_size}x{tokenizer.patch_size}"
    if isinstance(tokenizer, LatentTokenizer):
        patch += f" latents with {tokenizer.channels} channels, {tokenizer.stride} pixels apart"
    else:
        patch += " pixels"
    parameters = sum(parameter.numel() for parameter in pipeline.network.parameters())
    names = ", ".join(pipeline.class_names[:8]) + (", ..." if len(pipeline.class_names) > 8 else "")
    return (
        f"{kind}. {parameters / 1e6:.1f} M parameters; images of {tokenizer.image_size}x{tokenizer.image_size}; "
        f"{sizes.num_tokens} tokens, {patch}; {sizes.num_classes} classes ({names}).\n\n"
        f"Unless told otherwise it draws in {defaults.ar_steps} AR steps, order {defaults.order}, "
        f"guidance {defaults.guidance:g} ({defaults.guidance_schedule})."
    )
