"""Write a public data set as one .npz that `--data` and `--reference` take: images, labels, classes, held-out images.

    python benchmarks/prepare_data.py fashion-mnist FOLDER data/fashion-mnist.npz

A name without .npz becomes a folder of PNG files instead, train/CLASS/ and test/CLASS/, as `marval encode` takes it.

FOLDER holds the data set's own files: Fashion-MNIST's four `*-ubyte.gz`, CIFAR-10's `cifar-10-batches-bin`, Noto
emoji's `png/128`; or, as beside this repository, the packed files and their `read_data.py`, whose Fashion-MNIST has
another split (every seventh image is held out: 10,000) and whose CIFAR-10 is JPEG of quality 95.

`emoji` is Google's Noto emoji on white, averaged down to 32x32: of 3,583 pictures the 2,167 that fall into ten classes
of people, hands, smileys, animals and food, 104 to 402 each. Flags, letters, signs and single objects are left out:
these groups are small, or do not bear mirroring. Every seventh is held out, but most people occur in several skin tones
and genders, so a held-out picture has siblings among those to train on: a distance to them says little about novelty.
(The other free set, pixel-art tiles under CC0, has two large classes, walls and floors, and many small ones that hardly
show at 32x32; it is not offered.)
"""

import argparse
import gzip
import importlib.util
import shutil
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from marval.checkpoint import save_arrays
from marval.run import new_folder

FASHION = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
LICENCES = {
    "fashion-mnist": "MIT (Zalando)",
    "cifar10": "research use, no formal licence (Krizhevsky)",
    "imagenette64": "ImageNet terms, research only",
    "emoji": "Apache-2.0 (Noto Emoji, Google)",
}
EMOJI = {
    "smiley": "1F600-1F644 1F910-1F917 1F920-1F925 1F927-1F92F 1F970-1F976 1F978-1F97A 1F9D0 1FAE0-1FAE9 2639 263A",
    "portrait": "1F385 1F466-1F469 1F46E 1F470-1F478 1F47C 1F482 1F575 1F934-1F936 1F977 1F9D1-1F9D5 1F9D9 1F9DB 1F9DD"
    " 1FAC5",
    "worker": "",
    "gesture": "1F481 1F486 1F487 1F645-1F647 1F64B 1F64D 1F64E 1F926 1F937 1F9CF",
    "athlete": "1F3C2-1F3C4 1F3CA-1F3CC 1F6A3 1F6B4 1F6B5 1F938-1F93E 26F9",
    "pair": "1F46B-1F46D",
    "couple": "1F48F 1F491",
    "hand": "1F446-1F450 1F4AA 1F590 1F595 1F596 1F64C 1F64F 1F90C 1F90F 1F918-1F91F 1F932 1FAF0-1FAF8 261D 270A-270D",
    "animal": "1F400-1F43C 1F43F 1F980-1F9AE",
    "food": "1F32D-1F37F 1F950-1F96F 1F9C0-1F9CB 1FAD0-1FADC",
}
"""Classes of emoji and the code points that their sequences begin with; `emoji_class` sorts those with more parts."""
ADULTS = (0x1F468, 0x1F469, 0x1F9D1)
EMOJI_SIDE, HELD_OUT_EMOJI = 32, 7
Split = tuple[np.ndarray, np.ndarray]


def idx(file: Path) -> np.ndarray:
    """An array of MNIST's file format: type, axes and sizes in a header of big-endian numbers, then uint8."""
    content = gzip.decompress(file.read_bytes())
    axes = content[3]
    shape = np.frombuffer(content, ">i4", axes, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def fashion_mnist(folder: Path) -> list[Split]:
    """Training and test split of the official files."""
    names = ("train", "t10k")
    images = [idx(folder / f"{name}-images-idx3-ubyte.gz")[..., None] for name in names]
    return [(x, idx(folder / f"{name}-labels-idx1-ubyte.gz")) for name, x in zip(names, images, strict=True)]


def cifar10(folder: Path) -> list[Split]:
    """Training and test split of the official binary files: a label, then 3 planes of 32x32."""
    files = [[f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]]
    rows = [np.concatenate([np.fromfile(folder / f, np.uint8) for f in part]).reshape(-1, 3073) for part in files]
    return [(part[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), part[:, 0]) for part in rows]


def code_points(text: str) -> set[int]:
    """Of hexadecimal numbers and ranges."""
    ends = [part.partition("-") for part in text.split()]
    return {code for low, _, high in ends for code in range(int(low, 16), int(high or low, 16) + 1)}


def emoji_class(codes: list[int]) -> str | None:
    """Class of a sequence of code points without joiners, or None for what is left out."""
    if codes[0] in ADULTS:
        rest = [code for code in codes[1:] if not 0x1F3FB <= code <= 0x1F3FF]  # without skin tones
        if 0x2764 in rest:
            return "couple"  # with a heart, with or without a kiss
        if 0x1F91D in rest:
            return "pair"  # holding hands
        if set(rest) & {*ADULTS, 0x1F466, 0x1F467, 0x1F9D2, 0x1F9AF, 0x1F9BC, 0x1F9BD}:
            return None  # families are silhouettes; canes and wheelchairs show whole figures
        return "worker" if rest and not 0x1F9B0 <= rest[0] <= 0x1F9B3 else "portrait"  # or hair alone
    return next((name for name, text in EMOJI.items() if codes[0] in code_points(text)), None)


def emoji(pictures: Iterable[tuple[list[int], Image.Image]]) -> list[Split]:
    """Both splits of pictures and their code points."""
    images, labels = [], []
    for codes, picture in pictures:
        if name := emoji_class(codes):
            picture = picture.convert("RGBA")
            white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
            images.append(np.asarray(white.resize((EMOJI_SIDE, EMOJI_SIDE), Image.Resampling.BOX)))
            labels.append(list(EMOJI).index(name))
    if not images:
        raise SystemExit("no emoji of these classes: FOLDER must hold emoji_u*.png, as Noto's png/128 does")
    held_out = np.arange(len(images)) % HELD_OUT_EMOJI == 0
    return [(np.stack(images)[keep], np.array(labels)[keep]) for keep in (~held_out, held_out)]


def named_code_points(caption: str) -> list[int]:
    """Of names joined by " + ", as the packed files have them, such as "man + skin tone type-3 + scales"."""
    names = caption.replace("skin tone", "emoji modifier fitzpatrick").split(" + ")
    return [int(name[2:], 16) if name.startswith("u+") else ord(unicodedata.lookup(name)) for name in names]


def emoji_files(folder: Path) -> Iterator[tuple[list[int], Image.Image]]:
    """Pictures and code points of Noto's own files, such as emoji_u1f468_1f3fd_200d_2696_fe0f.png."""
    for file in sorted(folder.glob("emoji_u*.png")):
        codes = [int(code, 16) for code in file.stem.removeprefix("emoji_u").split("_")]
        with Image.open(file) as picture:
            yield [code for code in codes if code not in (0x200D, 0xFE0F)], picture  # without joiners


def packed(folder: Path, name: str) -> tuple[list[Split], list[str]]:
    """Both splits and the class names through the `read_data.py` of the folder."""
    spec = importlib.util.spec_from_file_location("read_data", folder / "read_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if name == "emoji":
        images, captions = module.captioned("noto-emoji-64")
        pictures = ((named_code_points(c), Image.fromarray(x)) for x, c in zip(images, captions, strict=True))
        return emoji(pictures), [*EMOJI]
    held_out = "val" if name == "imagenette64" else "test"
    parts = [module.images(f"{name}-{split}") for split in ("train", held_out)]
    return [(images, labels) for images, labels, _ in parts], parts[0][2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=LICENCES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    if args.out.suffix == ".npz" and args.out.exists():
        parser.error(f"{args.out} exists: choose another OUT, or remove it")
    if (args.folder / "read_data.py").exists():
        splits, class_names = packed(args.folder, args.name)
        if args.name == "fashion-mnist":
            class_names = FASHION
    elif args.name == "imagenette64":
        parser.error(
            f"{args.folder} has no read_data.py; `marval train --data` takes Imagenette's own folders as they are"
        )
    else:
        readers = {
            "fashion-mnist": fashion_mnist,
            "cifar10": cifar10,
            "emoji": lambda folder: emoji(emoji_files(folder)),
        }
        splits = readers[args.name](args.folder)
        class_names = {"fashion-mnist": FASHION, "cifar10": CIFAR, "emoji": [*EMOJI]}[args.name]
    (train, train_labels), (test, test_labels) = splits
    found = f"{args.out}: {len(train)} images to train on, {len(test)} held out, {len(class_names)} classes"
    if args.out.suffix != ".npz":
        new_folder(args.out)
        partial = args.out.with_name(f"{args.out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        for split, (images, labels) in zip(("train", "test"), splits, strict=True):
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                file = partial / split / class_names[label] / f"{i:05d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.squeeze()).save(file, compress_level=1)
        (partial / "LICENCE.txt").write_text(f"{args.name}: {LICENCES[args.name]}\n")
        partial.replace(args.out)
        print(found)
        return
    arrays = {
        "images": np.concatenate([train, test]),
        "labels": np.concatenate([train_labels, test_labels]).astype(np.int64),
        "class_names": np.array(class_names),
        "test": np.arange(len(train) + len(test)) >= len(train),
        "source": np.array(args.name),
        "licence": np.array(LICENCES[args.name]),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_arrays(args.out, arrays, compressed=True)
    print(found)


if __name__ == "__main__":
    main()
