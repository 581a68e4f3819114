"""Write a public data set as one .npz that `--data` and `--reference` take: images, labels, classes, held-out images.

    python benchmarks/prepare_data.py fashion-mnist FOLDER data/fashion-mnist.npz

FOLDER holds the data set's own files: Fashion-MNIST's four `*-ubyte.gz`, CIFAR-10's `cifar-10-batches-bin`; or, as
beside this repository, the packed files and their `read_data.py`, whose Fashion-MNIST has another split (every seventh
image is held out: 10,000) and whose CIFAR-10 is JPEG of quality 95.
"""

import argparse
import gzip
import importlib.util
from pathlib import Path

import numpy as np

from marval.checkpoint import write_atomically

FASHION = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
LICENCES = {
    "fashion-mnist": "MIT (Zalando)",
    "cifar10": "research use, no formal licence (Krizhevsky)",
    "imagenette64": "ImageNet terms, research only",
}
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


def packed(folder: Path, name: str) -> tuple[list[Split], list[str]]:
    """Both splits and the class names through the `read_data.py` of the folder."""
    spec = importlib.util.spec_from_file_location("read_data", folder / "read_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    held_out = "val" if name == "imagenette64" else "test"
    parts = [module.images(f"{name}-{split}") for split in ("train", held_out)]
    return [(images, labels) for images, labels, _ in parts], parts[0][2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=LICENCES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    if (args.folder / "read_data.py").exists():
        splits, class_names = packed(args.folder, args.name)
        if args.name == "fashion-mnist":
            class_names = FASHION
    elif args.name == "imagenette64":
        parser.error(
            f"{args.folder} has no read_data.py; `marval train --data` takes Imagenette's own folders as they are"
        )
    else:
        splits = {"fashion-mnist": fashion_mnist, "cifar10": cifar10}[args.name](args.folder)
        class_names = {"fashion-mnist": FASHION, "cifar10": CIFAR}[args.name]
    (train, train_labels), (test, test_labels) = splits
    arrays = {
        "images": np.concatenate([train, test]),
        "labels": np.concatenate([train_labels, test_labels]).astype(np.int64),
        "class_names": np.array(class_names),
        "test": np.arange(len(train) + len(test)) >= len(train),
        "source": np.array(args.name),
        "licence": np.array(LICENCES[args.name]),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def write(path: Path) -> None:
        with open(path, "wb") as file:  # given a path, numpy appends .npz to it
            np.savez_compressed(file, **arrays)

    write_atomically(args.out, write)
    print(f"{args.out}: {len(train)} images to train on, {len(test)} held out, {len(class_names)} classes")


if __name__ == "__main__":
    main()
