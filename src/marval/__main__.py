"""The command line: one verb, one function. A user's error is one line on stderr and exit code 2."""

import contextlib
import difflib
import functools
import io
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

USAGE = """usage: marval VERB ...

  quickstart         train, distil, align, measure and show, on real digits, in minutes
  train RECIPE       train a MAR teacher
  distill RECIPE     distil a teacher into a one-step student (GSIM)
  rl RECIPE          align a student with a reward
  sample             draw images from a model
  evaluate           measure a model against real images
  bench              time a teacher and its student
  train-classifier   train the small classifier that gives features, accuracy and reward
  import-mar         turn a published MAR checkpoint into a model folder

`marval VERB --help` lists a verb's options; for those with recipes, `marval train digits --help`. Recipes: digits."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at the known word that is closest to a mistyped one."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def parse(function: Callable[..., None], verb: str, args: list[str]) -> None:
    """Call the function with its keyword arguments read from flags.

    Raises:
        ValueError: an unknown flag (names the nearest one), a missing one, a bad value; one line.
    """
    import tyro

    settings: dict[str, Any] = {"prog": f"marval {verb}", "config": (tyro.conf.FlagCreatePairsOff,)}

    @functools.wraps(function)
    def deferred(*positional: Any, **flags: Any) -> Callable[[], None]:
        return lambda: function(*positional, **flags)

    given = [word.split("=")[0].replace("_", "-") for word in args if word.startswith("--") and word != "--help"]
    if given:
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as usage:
            tyro.cli(deferred, args=["--help"], **settings)
        known = set(re.findall(r"--[a-z][\w.-]*", usage.getvalue()))
        for flag in given:
            if flag not in known:
                raise ValueError(f"unknown flag {flag}{nearest(flag, known)}; see marval {verb} --help")
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            call = tyro.cli(deferred, args=args, **settings)
    except SystemExit as stop:
        if not stop.code:
            raise
        text = " ".join(re.sub("[╭╮╰╯│─]+", " ", message.getvalue()).split())
        raise ValueError(f"{text.split(' For full helptext')[0]}; see marval {verb} --help") from None
    call()


def say(text: str) -> None:
    """Print, on one of several processes only."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def recipe(verb: str, recipes: dict[str, Callable[[], Any]], args: list[str]) -> tuple[Any, list[str]]:
    """The recipe that the first word names, and the flags that follow."""
    if args and args[0] in ("-h", "--help"):
        return next(iter(recipes.values()))(), args
    if not args or args[0].startswith("-"):
        raise ValueError(f"name a recipe first: marval {verb} {'|'.join(recipes)} --out DIR")
    if args[0] not in recipes:
        raise ValueError(f"unknown recipe {args[0]!r}{nearest(args[0], recipes)}: choose from {', '.join(recipes)}")
    return recipes[args[0]](), args[1:]


def flat(config: Any) -> Any:
    """Type of an argument whose fields are flags without a prefix."""
    import tyro

    return Annotated[type(config), tyro.conf.arg(name="")]


def train_verb(args: list[str]) -> None:
    from marval import recipes

    default, rest = recipe("train", recipes.TRAIN, args)

    def train(*, out: Path, resume: bool = False, config: flat(default) = default) -> None:  # type: ignore[valid-type]
        """Train a MAR teacher.

        Args:
            out: Folder of the run; the model in it can be loaded at any time.
            resume: Go on with the run in --out, exactly.
        """
        from marval.train import train

        train(config, out, resume)
        say(f"teacher in {out}")

    parse(train, "train RECIPE", rest)


def distill_verb(args: list[str]) -> None:
    from marval import recipes

    default, rest = recipe("distill", recipes.DISTILL, args)

    def distill(*, teacher: Path, out: Path, resume: bool = False, config: flat(default) = default) -> None:  # type: ignore[valid-type]
        """Distil a teacher's inner diffusion chain into one step (GSIM).

        Args:
            teacher: Folder of the teacher.
            out: Folder of the run; the student in it can be loaded at any time.
            resume: Go on with the run in --out, exactly.
        """
        from marval.distill import distill

        distill(config, teacher, out, resume)
        say(f"student in {out}")

    parse(distill, "distill RECIPE", rest)


def rl_verb(args: list[str]) -> None:
    from marval import recipes

    default, rest = recipe("rl", recipes.RL, args)

    def rl(*, student: Path, out: Path, resume: bool = False, config: flat(default) = default) -> None:  # type: ignore[valid-type]
        """Align a student with a reward.

        Args:
            student: Folder of the student.
            out: Folder of the run; the best model so far in it can be loaded at any time.
            resume: Go on with the run in --out, exactly.
        """
        from marval.rl import rl

        rl(config, student, out, resume)
        say(f"aligned student in {out}")

    parse(rl, "rl RECIPE", rest)


def quickstart_verb(args: list[str]) -> None:
    from marval.quickstart import QuickstartConfig

    default = QuickstartConfig()

    def quickstart(
        *, out: Path = Path("runs/quickstart"), resume: bool = False, config: flat(default) = default  # type: ignore[valid-type]
    ) -> None:  # fmt: skip
        """Train, distil, align, measure and show, on real handwritten digits.

        Args:
            out: Folder of the results: report.html, results.json and the models.
            resume: Go on with an interrupted quickstart.
        """
        from marval.quickstart import quickstart

        quickstart(config, out, resume)

    parse(quickstart, "quickstart", args)


def sample_verb(args: list[str]) -> None:
    def sample(
        *, model: Path, out: Path, classes: str = "all", num_images: int | None = None, seed: int = 0,
        ar_steps: int | None = None, guidance: float | None = None,
        guidance_schedule: Literal["constant", "linear"] | None = None, order: str | None = None,
        head_steps: int | None = None, solver: Literal["ancestral", "ddim"] | None = None,
        temperature: float | None = None, batch_size: int = 64, device: str = "auto",
    ) -> None:  # fmt: skip
        """Draw images: PNG files, grid.png, and samples.npz with uint8 NHWC `images` and `labels`.

        Args:
            model: Folder of a teacher or a student.
            out: New folder for the images.
            classes: Indices or names, comma-separated; `all`; or `none` for unconditional images.
            num_images: How many, over the classes in turn; one per class if left out.
            seed: Image i of a seed is the same in any batch size and on any number of processes.
            ar_steps: AR steps K, from 1 to the number of tokens; the model's default if left out, as all below.
            guidance: Guidance scale w; 1 is no guidance.
            guidance_schedule: Constant, or linear in the share of revealed tokens.
            order: random, raster, centre-out, or all token positions, comma-separated, first revealed first.
            head_steps: Denoising steps of a teacher's inner chain.
            solver: How the inner chain steps.
            temperature: Scale of the noise.
            batch_size: Images at a time.
            device: cpu, cuda, or auto.
        """
        from marval.evaluate import save_images

        settings = {
            "ar_steps": ar_steps, "guidance": guidance, "guidance_schedule": guidance_schedule, "order": order,
            "head_steps": head_steps, "solver": solver, "temperature": temperature,
        }  # fmt: skip
        save_images(model, out, classes, num_images, seed, batch_size, device, settings)

    parse(sample, "sample", args)


def evaluate_verb(args: list[str]) -> None:
    def evaluate(
        *, model: Path, reference: str, out: Path, num_images: int = 5000, features: Path | None = None, seed: int = 0,
        ar_steps: int | None = None, guidance: float | None = None, order: str | None = None,
        head_steps: int | None = None, device: str = "auto",
    ) -> None:  # fmt: skip
        """Frechet distance to real images and accuracy, over the features of a classifier.

        Args:
            model: Folder of a teacher or a student.
            reference: `digits`, a folder or .npz of images, or an .npz with `mu` and `sigma`.
            out: JSON file of the results.
            num_images: Images to draw, over all classes in turn.
            features: Folder of the classifier; by default the `classifier` folder beside the model's, as the
                quickstart makes it.
            seed: Of the images.
            ar_steps: AR steps K; the model's default if left out, as all below.
            guidance: Guidance scale w; 1 is no guidance.
            order: random, raster or centre-out.
            head_steps: Denoising steps of a teacher's inner chain.
            device: cpu, cuda, or auto.
        """
        from marval.evaluate import evaluate_folder

        settings = {"ar_steps": ar_steps, "guidance": guidance, "order": order, "head_steps": head_steps}
        evaluate_folder(model, reference, out, num_images, features, seed, device, settings)

    parse(evaluate, "evaluate", args)


def bench_verb(args: list[str]) -> None:
    def bench(
        *, model: Path, batch: str = "1,64", json: Path | None = None, repeats: int = 10, ar_steps: int | None = None,
        head_steps: int | None = None, device: str = "auto",
    ) -> None:  # fmt: skip
        """Time a teacher and its student, split into transformer, head and tokenizer.

        Args:
            model: Folder of a student (its teacher's head is in it), or of a teacher (timed as its own student).
            batch: Batch sizes, comma-separated.
            json: File for the results.
            repeats: Batches timed after a warm-up; medians are reported.
            ar_steps: AR steps K; the model's default if left out.
            head_steps: Denoising steps of the teacher's inner chain.
            device: cpu, cuda, or auto.
        """
        from marval.bench import bench, table
        from marval.checkpoint import write_json
        from marval.distributed import connect
        from marval.run import writable_folder

        if json is not None:
            writable_folder(json.parent)
        try:
            batches = [int(part) for part in batch.split(",")]
        except ValueError:
            raise ValueError(f"--batch {batch!r} must be comma-separated integers, such as 1,64") from None
        place = str(connect(device).device)
        results = bench(model, batches, repeats, place, ar_steps=ar_steps, head_steps=head_steps)
        print(table(results))
        if json is not None:
            write_json(json, results)

    parse(bench, "bench", args)


def classifier_verb(args: list[str]) -> None:
    def train_classifier(
        *, data: str, out: Path, arch: Literal["conv", "resnet"] = "conv", epochs: int = 20, seed: int = 0,
        image_size: int | None = None,
    ) -> None:  # fmt: skip
        """Train a small image classifier for features, accuracy and rewards.

        Args:
            data: `digits`, or a folder with one sub-folder of images per class.
            out: New folder for the classifier.
            arch: Plain convolutions, or residual.
            epochs: Passes over the training images.
            seed: Of initialisation, batches and augmentation.
            image_size: Centre-crop and scale the images to this size.
        """
        from marval.data import load_dataset
        from marval.models.classifier import train_classifier
        from marval.run import new_folder

        if epochs < 1:
            raise ValueError(f"epochs {epochs} must be at least 1")
        splits = [load_dataset(data, split, image_size) for split in ("train", "test")]
        new_folder(out)
        classifier, metrics = train_classifier(*splits, arch=arch, epochs=epochs, seed=seed)
        classifier.save(out)
        print(f"classifier in {out}: {100 * metrics['accuracy_held_out']:.1f} % of {len(splits[1])} held-out images")

    parse(train_classifier, "train-classifier", args)


def import_verb(args: list[str]) -> None:
    # the checkpoint is a positional argument
    def import_mar(
        checkpoint: Annotated[Path, _positional()], /, *, out: Path, preset: str | None = None,
        heads: int | None = None, weights: Literal["ema", "raw"] = "ema",
    ) -> None:  # fmt: skip
        """Turn a MAR checkpoint (checkpoint-last.pth) into a model folder; strict, with safe unpickling.

        Args:
            checkpoint: The file.
            out: New folder for the model.
            preset: mar-b, mar-l or mar-h: gives the attention heads, and the sizes must agree.
            heads: Attention heads per block, for a model that is no preset; its other sizes are read off the file.
            weights: The average that the authors evaluate, or the raw weights.
        """
        from marval.importing import import_mar

        print(import_mar(checkpoint, out, preset, heads, weights))

    parse(import_mar, "import-mar", args)


def _positional() -> Any:
    import tyro

    return tyro.conf.Positional


VERBS: dict[str, Callable[[list[str]], None]] = {
    "quickstart": quickstart_verb,
    "train": train_verb,
    "distill": distill_verb,
    "rl": rl_verb,
    "sample": sample_verb,
    "evaluate": evaluate_verb,
    "bench": bench_verb,
    "train-classifier": classifier_verb,
    "import-mar": import_verb,
}


def main(argv: list[str] | None = None) -> None:
    """Entry point of the ``marval`` command. ``MARVAL_TRACEBACK=1`` shows where an error came from."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help"):
        args = ["--help"]
    verb = args[0]
    try:
        if verb == "--help":
            print(USAGE)
            sys.stdout.flush()
            return
        if verb not in VERBS:
            raise ValueError(f"no such verb{nearest(verb, VERBS)}; see marval --help")
        VERBS[verb](list(args[1:]))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, FloatingPointError, OSError) as error:
        if os.environ.get("MARVAL_TRACEBACK"):
            raise
        print(f"marval {verb}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\nmarval {verb}: stopped; a run goes on from its last checkpoint with --resume", file=sys.stderr)
        sys.exit(130)
    finally:
        if "marval.distributed" in sys.modules:
            sys.modules["marval.distributed"].disconnect()


if __name__ == "__main__":
    main()
