"""The command line: one verb, one function. A user's error is one line on stderr and exit code 2."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from marval.cli import flat, nearest, parse, positional, recipe, required
from marval.config import say

USAGE = """usage: marval VERB ...

  quickstart         train, distil, align, measure and show, on real digits, in minutes
  train RECIPE       train a MAR teacher
  distill RECIPE     distil a teacher into a one-step student (GSIM)
  rl RECIPE          align a student with a reward
  sample             draw images from a model
  demo               a page in the browser: draw, compare models, complete pictures
  evaluate [RECIPE]  measure a model against real images
  bench              time a teacher and its student
  average            the mean of models that went on from the same one
  encode             turn images into latents on disk, once, for training
  train-classifier   train the small classifier that gives features, accuracy and reward
  import-mar         turn a published MAR checkpoint into a model folder
  import-kl16        turn MAR's KL-16 autoencoder into a tokenizer folder
  import-taesd       turn a tiny autoencoder (TAESD) into a tokenizer folder
  export             write a model folder to publish, with a model card

`marval VERB --help` lists a verb's options; for those with recipes, `marval train digits --help`.
Recipes: digits, fashion-mnist; cifar10, imagenette64, emoji (one GPU), also with -cpu; imagenet256-b, -l, -h.
--dry-run says what a run needs."""
SPIN_COUNT = "3000"
"""Turns for which a waiting thread of GNU OpenMP spins before it sleeps, by default 300,000, about a millisecond.
Beside other programs such threads hold the cores that the others wait for (docs/LOG.md, 2026-11-26)."""


def train_verb(args: list[str]) -> None:
    from marval import recipes

    name, default, rest = recipe("train", recipes.TRAIN, args)

    def train(
        *, out: Path | None = None, resume: bool = False, dry_run: bool = False, processes: int = 1,
        config: flat(default) = default,  # type: ignore[valid-type]
    ) -> None:  # fmt: skip
        """Train a MAR teacher.

        Args:
            out: Folder of the run; the model in it can be loaded at any time.
            resume: Go on with the run in --out, exactly.
            dry_run: Do nothing but print parameters, memory, operations and time of the run.
            processes: Of torchrun, in a dry run.
        """
        if only_planned(dry_run, "train", name, config, None, processes):
            return
        from marval.train import train

        out = needed(out, "out")
        train(config, out, resume)
        say(f"teacher in {out}")

    parse(train, "train RECIPE", rest)


def distill_verb(args: list[str]) -> None:
    from marval import recipes

    name, default, rest = recipe("distill", recipes.DISTILL, args)

    def distill(
        *, teacher: Path | None = None, start: Path | None = None, out: Path | None = None, resume: bool = False,
        dry_run: bool = False, processes: int = 1, config: flat(default) = default,  # type: ignore[valid-type]
    ) -> None:  # fmt: skip
        """Distil a teacher's inner diffusion chain into one step (GSIM).

        Args:
            teacher: Folder of the teacher.
            start: Folder of a student of this teacher to go on from. Without scores.safetensors, which exported ones
                lack, its auxiliary starts as the teacher: let it catch up first, in a short run with --gsim.lr 0.
            out: Folder of the run; the student in it can be loaded at any time.
            resume: Go on with the run in --out, exactly.
            dry_run: Do nothing but print parameters, memory, operations and time of the run.
            processes: Of torchrun, in a dry run.
        """
        if only_planned(dry_run, "distill", name, config, teacher, processes):
            return
        from marval.distill import distill

        teacher, out = needed(teacher, "teacher"), needed(out, "out")
        distill(config, teacher, out, resume, start)
        say(f"student in {out}")

    parse(distill, "distill RECIPE", rest)


def rl_verb(args: list[str]) -> None:
    from marval import recipes

    name, default, rest = recipe("rl", recipes.RL, args)

    def rl(
        *, student: Path | None = None, out: Path | None = None, resume: bool = False, dry_run: bool = False,
        processes: int = 1, config: flat(default) = default,  # type: ignore[valid-type]
    ) -> None:  # fmt: skip
        """Align a student with a reward.

        Args:
            student: Folder of the student.
            out: Folder of the run; the best model so far in it can be loaded at any time.
            resume: Go on with the run in --out, exactly.
            dry_run: Do nothing but print parameters, memory, operations and time of the run.
            processes: Of torchrun, in a dry run.
        """
        if only_planned(dry_run, "rl", name, config, student, processes):
            return
        from marval.rl import rl

        student, out = needed(student, "student"), needed(out, "out")
        best = rl(config, student, out, resume).provenance["best_update"]
        kept = f", best of update {best}" if best else " is the one given: no update was better"
        say(f"aligned student in {out}{kept}")

    parse(rl, "rl RECIPE", rest)


def needed(value: Path | None, flag: str) -> Path:
    """The value of a flag that only a dry run can do without."""
    if value is None:
        raise ValueError(f"--{flag} is missing")
    return value


def only_planned(dry_run: bool, verb: Any, name: str, config: Any, folder: Path | None, processes: int) -> bool:
    """In a dry run, print what the run needs; whether this was all.

    Raises:
        ValueError: a number of processes without a dry run.
    """
    if dry_run:
        from marval.dryrun import print_plan

        print_plan(verb, name, config, folder, processes)
    elif processes != 1:
        raise ValueError(f"--processes is for --dry-run: start {processes} with torchrun --nproc-per-node {processes}")
    return dry_run


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
        evaluations: int | None = None, temperature: float | None = None, refresh_every: int | None = None,
        batch_size: int = 64,
        device: str = "auto", precision: Literal["auto", "float32", "bf16"] = "auto", graphs: bool = False,
        compile: bool = False, shard: bool = False,
    ) -> None:  # fmt: skip
        """Draw images: PNG files, grid.png, and samples.npz with uint8 NHWC `images` and `labels`.

        Args:
            model: Folder of a teacher or a student, or a model that comes with marval, such as fashion-mnist/student.
            out: New folder for the images.
            classes: Indices or names, comma-separated; `all`; or `none` for unconditional images.
            num_images: How many, over the classes in turn; one per class if left out.
            seed: Image i of a seed is the same in any batch size and on any number of processes.
            ar_steps: AR steps K, from 1 to the number of tokens; the model's default if left out, as all below.
            guidance: Guidance scale w; 1 is no guidance.
            guidance_schedule: Constant, or linear in the share of revealed tokens.
            order: random, raster, centre-out, halton, or all token positions, comma-separated, first revealed first.
            head_steps: Denoising steps of a teacher's inner chain.
            solver: How the inner chain steps.
            evaluations: Of a student's head per token; more than 1 if it was distilled for them.
            temperature: Scale of the noise.
            refresh_every: AR steps from one full pass of the backbone to the next; 1 is exact, more is faster.
            batch_size: Images at a time.
            device: cpu, cuda, or auto.
            precision: Of the weights; auto: bf16 on CUDA, float32 on the CPU.
            graphs: Record the AR steps as CUDA graphs: for many small batches.
            compile: Compile the blocks of transformer and head: for many images.
            shard: Split the weights over the processes of torchrun (FSDP2).
        """
        from marval.draw import save_images

        settings = {
            "ar_steps": ar_steps, "guidance": guidance, "guidance_schedule": guidance_schedule, "order": order,
            "head_steps": head_steps, "solver": solver, "evaluations": evaluations, "temperature": temperature,
            "refresh_every": refresh_every,
        }  # fmt: skip
        save_images(
            model, out, classes, num_images, seed, batch_size, device, precision, graphs, compile, shard, settings
        )  # fmt: skip

    parse(sample, "sample", args)


def demo_verb(args: list[str]) -> None:
    def demo(
        models: Annotated[tuple[str, ...], positional()] = (), /, *, host: str = "127.0.0.1", port: int = 7860,
        device: str = "auto",
    ) -> None:  # fmt: skip
        """Serve a page on which models draw side by side, token by token, and complete pictures.

        Args:
            models: Folders of teachers and students, or models that come with marval, which are all if none is named.
            host: Address to listen on; 0.0.0.0 for other machines too: whoever reaches it can draw.
            port: Of the page; 0 for any that is free.
            device: cpu, cuda, or auto.
        """
        from marval import shipped
        from marval.demo import serve

        serve(models or shipped.names(), host, port, device)

    parse(demo, "demo", args)


def evaluate_verb(args: list[str]) -> None:
    from marval import recipes

    name, default, rest = "digits", recipes.EVALUATE["digits"](), args
    if args and not args[0].startswith("-"):
        name, default, rest = recipe("evaluate", recipes.EVALUATE, args)

    def evaluate(
        *, model: Path | None = None, out: Path | None = None, resume: bool = False, png: Path | None = None,
        save_reference: Path | None = None, before: Path | None = None, dry_run: bool = False, processes: int = 1,
        config: flat(default) = default,  # type: ignore[valid-type]
    ) -> None:  # fmt: skip
        """Frechet distances, Inception Score, KID, precision, recall, accuracy and rewards of a model's images.

        Several values of --guidance, --ar-steps, --head-steps or --evaluations make a table of all combinations, and
        a plot.
        With --before, two models side by side: rewards before and after RL.

        Args:
            model: Folder of a teacher or a student.
            out: JSON file of the results.
            resume: Go on with an interrupted evaluation.
            png: New folder for the images, which are not kept otherwise.
            save_reference: New .npz for the features and statistics of the reference, to be named as --reference.
            before: Folder of the model as it was before RL, measured beside it on the same seeds and classes.
            dry_run: Do nothing but print parameters, memory, operations and time.
            processes: Of torchrun, in a dry run.
        """
        if only_planned(dry_run, "evaluate", name, config, model, processes):
            return
        from marval.evaluate import evaluate_folder

        evaluate_folder(needed(model, "model"), needed(out, "out"), config, resume, png, save_reference, before)

    parse(evaluate, "evaluate [RECIPE]", rest)


def bench_verb(args: list[str]) -> None:
    def bench(
        *, model: Path, batch: str = "1,64", json: Path | None = None, repeats: int = 10, ar_steps: str = "",
        head_steps: int | None = None, evaluations: int | None = None, refresh_every: int | None = None,
        budget: float | None = None, device: str = "auto", precision: Literal["auto", "float32", "bf16"] = "auto",
        graphs: bool = False, compile: bool = False,
    ) -> None:  # fmt: skip
        """Time a teacher and its student, split by part, and compare them with the least that the machine needs.

        Args:
            model: Folder of a student (its teacher's head is in it), or of a teacher (timed as its own student).
            batch: Batch sizes, comma-separated.
            json: New file for the results.
            repeats: Rounds timed after a warm-up, of a batch or more each; medians are reported.
            ar_steps: Numbers of AR steps K, comma-separated; the model's default if left out.
            head_steps: Denoising steps of the teacher's inner chain.
            evaluations: Of the student's head per token.
            refresh_every: AR steps from one full pass of the backbone to the next; 1 is exact.
            budget: Milliseconds: also find the largest K whose student image takes no longer, at the first batch size.
            device: cpu, cuda, or auto.
            precision: Of the weights; auto: bf16 on CUDA, float32 on the CPU.
            graphs: Launch the kernels of an AR step as CUDA graphs.
            compile: Compile the blocks of transformer and head.
        """
        from marval.bench import bench_folder
        from marval.config import numbers

        bench_folder(
            model, numbers(batch, int, "--batch"), json, device, repeats=repeats,
            ar_steps=numbers(ar_steps, int, "--ar-steps"), budget=budget, precision=precision, graphs=graphs,
            compile=compile, evaluations=evaluations, head_steps=head_steps, refresh_every=refresh_every,
        )  # fmt: skip

    parse(bench, "bench", args)


def classifier_verb(args: list[str]) -> None:
    def train_classifier(
        *, data: str, out: Path, arch: Literal["conv", "resnet"] = "conv", epochs: int = 20, seed: int = 0,
        image_size: int | None = None, device: str = "auto",
    ) -> None:  # fmt: skip
        """Train a small image classifier for features, accuracy and rewards.

        Args:
            data: `digits`, a folder with one sub-folder of images per class, or an .npz as for training.
            out: New folder for the classifier.
            arch: Plain convolutions, or residual.
            epochs: Passes over the training images.
            seed: Of initialisation, batches and augmentation.
            image_size: Centre-crop and scale the images to this size.
            device: cpu, cuda, or auto.
        """
        from marval.train_classifier import train_classifier_folder

        train_classifier_folder(data, out, arch, epochs, seed, image_size, device)

    parse(train_classifier, "train-classifier", args)


def encode_verb(args: list[str]) -> None:
    def encode(
        *, images: str, tokenizer: str, out: Path, image_size: int = 256, batch: int = 16, shard_size: int = 4096,
        on_error: Literal["stop", "skip"] = "stop", device: str = "auto", resume: bool = False,
    ) -> None:  # fmt: skip
        """Turn images, and their mirror images, into latents on disk, for --data of train and distill.

        Args:
            images: Folder with one sub-folder of images per class, or tar files (webdataset): one, a folder of them,
                or a quoted pattern.
            tokenizer: Folder of an autoencoder (import-kl16, import-taesd, diffusers AutoencoderKL), or hub name.
            out: Folder for the latents.
            image_size: Images are centre-cropped and scaled to squares of this size.
            batch: Images at a time.
            shard_size: Images per file; processes of torchrun share the files.
            on_error: At an image that cannot be read: stop, or leave it out and report it.
            device: cpu, cuda, or auto.
            resume: Go on with an interrupted encoding.
        """
        from marval.encode import encode

        encode(images, tokenizer, out, image_size, batch, shard_size, on_error, device, resume)

    parse(encode, "encode", args)


def import_mar_verb(args: list[str]) -> None:
    def import_mar(
        checkpoint: Annotated[Path, positional()], /, *, out: Path, preset: str | None = None,
        heads: int | None = None, weights: Literal["ema", "raw"] = "ema", tokenizer: str | None = None,
    ) -> None:  # fmt: skip
        """Turn a MAR checkpoint (checkpoint-last.pth) into a model folder; strict, with safe unpickling.

        Args:
            checkpoint: The file; or a .safetensors file of its raw or averaged weights.
            out: New folder for the model.
            preset: mar-b, mar-l or mar-h: gives the attention heads, and the sizes must agree.
            heads: Attention heads per block, for a model that is no preset; its other sizes are read off the file.
            weights: The average that the authors evaluate, or the raw weights.
            tokenizer: Folder of its autoencoder (import-kl16), or hub name, to be put into the model folder; without
                it the model draws tokens, not images.
        """
        from marval.importing import import_mar

        print(import_mar(checkpoint, out, preset, heads, weights, tokenizer))

    parse(import_mar, "import-mar", args)


def import_kl16_verb(args: list[str]) -> None:
    def import_kl16(checkpoint: Annotated[Path, positional()], /, *, out: Path) -> None:
        """Turn MAR's KL-16 autoencoder (kl16.ckpt) into a tokenizer folder, in diffusers' AutoencoderKL format.

        Args:
            checkpoint: The file.
            out: New folder for the tokenizer.
        """
        from marval.importing import import_kl16

        print(import_kl16(checkpoint, out))

    parse(import_kl16, "import-kl16", args)


def import_taesd_verb(args: list[str]) -> None:
    def import_taesd(
        encoder: Annotated[Path, positional()], decoder: Annotated[Path, positional()], /, *, out: Path
    ) -> None:
        """Turn a tiny autoencoder (TAESD and its kin) into a tokenizer folder.

        Args:
            encoder: File of the encoder's weights (.pth or .safetensors).
            decoder: File of the decoder's weights.
            out: New folder for the tokenizer.
        """
        from marval.importing import import_taesd

        print(import_taesd(encoder, decoder, out))

    parse(import_taesd, "import-taesd", args)


def export_verb(args: list[str]) -> None:
    def export(
        *, model: Path, out: Path, licence: str | None = None, numbers: Path | None = None, half: bool = False,
        name: str | None = None,
    ) -> None:  # fmt: skip
        """Write a model folder to publish: weights, config, autoencoder and a model card.

        Args:
            model: Folder of a teacher or a student.
            out: New folder.
            licence: Of the weights, such as apache-2.0.
            numbers: JSON of marval evaluate, for the card.
            half: Store the weights in float16, at half the bytes.
            name: What the card calls the model; the folder's name if left out.
        """
        from marval.export import export
        from marval.shipped import model_folder

        print(export(model_folder(model), out, licence, numbers, half, name))

    parse(export, "export", args)


def average_verb(args: list[str]) -> None:
    def average(models: Annotated[tuple[Path, ...], positional(), required()], /, *, out: Path) -> None:
        """Write the mean of the weights of models that went on from the same one, such as students of other seeds.

        Args:
            models: Folders of teachers or of students, two or more.
            out: New folder.
        """
        from marval.average import average
        from marval.shipped import model_folder

        print(average([model_folder(model) for model in models], out))

    parse(average, "average", args)


VERBS: dict[str, Callable[[list[str]], None]] = {
    "quickstart": quickstart_verb,
    "train": train_verb,
    "distill": distill_verb,
    "rl": rl_verb,
    "sample": sample_verb,
    "demo": demo_verb,
    "evaluate": evaluate_verb,
    "bench": bench_verb,
    "average": average_verb,
    "encode": encode_verb,
    "train-classifier": classifier_verb,
    "import-mar": import_mar_verb,
    "import-kl16": import_kl16_verb,
    "import-taesd": import_taesd_verb,
    "export": export_verb,
}
RESUMED = {"quickstart", "train", "distill", "rl", "evaluate", "encode"}
"""Verbs with --resume."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of the ``marval`` command. ``MARVAL_TRACEBACK=1`` shows where an error came from."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help"):
        args = ["--help"]
    verb, failure = args[0], None
    if argv is None and "OMP_WAIT_POLICY" not in os.environ:  # a script's environment is its own
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # read when PyTorch is imported
    try:
        if verb == "--help":
            print(USAGE)
            sys.stdout.flush()
            return
        if verb not in VERBS:
            raise ValueError(f"no such verb{nearest(verb, VERBS)}; see marval --help")
        VERBS[verb](list(args[1:]))
        sys.stdout.flush()
    except BrokenPipeError as error:  # the reader of our output left, as `| head` does
        failure = error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, FloatingPointError, OSError) as error:
        failure = error
        if os.environ.get("MARVAL_TRACEBACK"):
            raise
        print(f"marval {verb}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        failure = error
        goes_on = "; a run goes on from its last checkpoint with --resume" if verb in RESUMED else ""
        print(f"\nmarval {verb}: stopped{goes_on}", file=sys.stderr)
        sys.exit(130)
    except BaseException as error:
        failure = error
        raise
    finally:
        if "marval.distributed" in sys.modules:
            several = sys.modules["marval.distributed"].disconnect(failure)
            if several and failure is None and argv is None:  # not where a script calls this function
                sys.stderr.flush()
                os._exit(0)  # see disconnect


if __name__ == "__main__":
    main()
