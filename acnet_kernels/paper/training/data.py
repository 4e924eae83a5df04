"""Data sets by name, as deterministic streams of augmented batches.

Epoch e of seed s is one fixed sequence of batches: order and augmentation of a whole epoch are drawn at its
start from (s, e), so a run can be resumed before any batch and goes on as if it had never stopped.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError, require
from . import files
from .files import Split

NAMES = ("digits", "fashion-mnist", "cifar10", "cifar100")
FASHION_FOLDERS = (Path("data/FashionMNIST/raw"), Path("/usr/share/datasets/fashion-mnist"))
DEFAULT_FOLDER = Path("data")

Batch = tuple[Tensor, Tensor]


class Part(NamedTuple):
    """One of several equal parts of every batch, for as many processes: images rank, rank + size, … of it."""

    rank: int = 0
    size: int = 1


WHOLE = Part()


class Data(Protocol):
    """A data set; batches are (images N×C×H×W float32, channels_last and normalised; labels (N,) int64)."""

    name: str
    source: str
    classes: int
    channels: int
    size: tuple[int, int]
    train_images: int
    test_images: int

    def train_batches(
        self, seed: int, epoch: int, batch_size: int, start: int = 0, part: Part = WHOLE
    ) -> Iterator[Batch]:
        """This part of the epoch's batches from number `start` on, augmented."""

    def test_batches(self, batch_size: int, part: Part = WHOLE) -> Iterator[Batch]:
        """This part of the test images, in their own order."""


def used_images(images: int, batch_size: int, part: Part) -> int:
    """How many of an epoch's images are used: all, but for a last batch too small to give each part one."""
    rest = images % batch_size
    return images - rest if rest < part.size else images


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """The generator that draws one epoch's order and augmentation."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def subset(images: int, limit: int | None, option: str = "--limit") -> Tensor | None:
    """Which of a part's images a limited run uses: the same random ones whatever the seed; None for all."""
    if limit is None:
        return None
    if limit > images:
        part = "training" if option == "--limit" else "test"
        raise UserError(f"{option} must be at most the {images} {part} images there are, got {limit}")
    return torch.randperm(images, generator=torch.Generator().manual_seed(0))[:limit]


class MemoryData:
    """A small data set held on the device as bytes; cropping, flipping and normalising a batch is one gather.

    Args:
        name, source: what it is and where it came from.
        train, test: images N×H×W×C uint8, labels (N,).
        classes: number of classes.
        pad: random crops move by up to this many black pixels (the paper: 4 on 32×32).
        flip: mirror half of the training images; off where that changes the class.
        limit, test_limit: train and test on this many of the images only.
        device: where batches are wanted.
    """

    def __init__(
        self,
        name: str,
        source: str,
        train: Split,
        test: Split,
        classes: int,
        *,
        pad: int,
        flip: bool,
        limit: int | None,
        test_limit: int | None = None,
        device: torch.device,
    ) -> None:
        train = _chosen(train, subset(len(train.labels), limit))
        test = _chosen(test, subset(len(test.labels), test_limit, "--test-limit"))
        self.name, self.source, self.classes, self.pad, self.flip = name, source, classes, pad, flip
        self.size = (train.images.shape[1], train.images.shape[2])
        self.channels = train.images.shape[3]
        self.train_images, self.test_images = len(train.labels), len(test.labels)
        mean, std = _mean_std(train.images)
        self.device, self._mean, self._std = device, mean.to(device), std.to(device)
        padded = torch.nn.functional.pad(train.images, (0, 0, pad, pad, pad, pad))
        self._train = Split(padded.to(device), train.labels.to(device))
        self._test = Split(test.images.to(device), test.labels.to(device))

    def train_batches(
        self, seed: int, epoch: int, batch_size: int, start: int = 0, part: Part = WHOLE
    ) -> Iterator[Batch]:
        n, (height, width), generator = self.train_images, self.size, epoch_generator(seed, epoch)
        order = torch.randperm(n, generator=generator)
        top, left = torch.randint(2 * self.pad + 1, (2, n), generator=generator)
        mirrored = torch.rand(n, generator=generator) < (0.5 if self.flip else 0.0)
        end = used_images(n, batch_size, part)
        for first in range(start * batch_size, end, batch_size):
            at = slice(first + part.rank, min(first + batch_size, end), part.size)
            rows = top[at, None] + torch.arange(height)
            columns = torch.arange(width).expand(len(rows), width)
            columns = left[at, None] + torch.where(mirrored[at, None], width - 1 - columns, columns)
            which, rows, columns = (t.to(self.device) for t in (order[at], rows, columns))
            images = self._train.images[which[:, None, None], rows[:, :, None], columns[:, None, :]]
            yield self._normalise(images), self._train.labels[which]

    def test_batches(self, batch_size: int, part: Part = WHOLE) -> Iterator[Batch]:
        mine = (t[part.rank :: part.size].split(batch_size) for t in self._test)
        for images, labels in zip(*mine, strict=True):
            yield self._normalise(images), labels

    def _normalise(self, images: Tensor) -> Tensor:
        # N×H×W×C seen as N×C×H×W is channels_last already.
        return images.to(torch.float32).sub_(self._mean).div_(self._std).permute(0, 3, 1, 2)


def _chosen(split: Split, which: Tensor | None) -> Split:
    return split if which is None else Split(split.images[which], split.labels[which])


def _mean_std(images: Tensor) -> tuple[Tensor, Tensor]:
    # Integer sums are exact, and a chunk at a time keeps the temporaries small.
    total, square = torch.zeros(2, images.shape[3], dtype=torch.int64)
    for chunk in images.flatten(0, 2).split(1 << 22):
        total += chunk.sum(0, dtype=torch.int64)
        square += chunk.to(torch.int32).square_().sum(0, dtype=torch.int64)
    mean = total.double() / images[..., 0].numel()
    std = (square.double() / images[..., 0].numel() - mean.square()).sqrt()
    return mean.float(), std.clamp_min(1.0).float()


def find_fashion_mnist(folder: Path | None) -> Path | None:
    """The directory with Fashion-MNIST's files: in `folder` if one is given, else in the usual places; or None."""
    places = FASHION_FOLDERS if folder is None else (folder, folder / "FashionMNIST/raw")
    return next((place for place in places if files.has_fashion_mnist(place)), None)


def _download_fashion_mnist(folder: Path) -> Path:
    try:
        require("a download", torchvision="torchvision")
        from torchvision.datasets import FashionMNIST

        FashionMNIST(folder, download=True)
    except (UserError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())  # torchvision's is of several lines
        raise UserError(
            f"Fashion-MNIST is not in {folder} and cannot be downloaded ({reason}): give its directory as "
            "--data-dir, or install Debian's package dataset-fashion-mnist"
        ) from None
    return folder / "FashionMNIST/raw"


# Name → what torchvision keeps of the set: folder, training files, test file, the labels' key.
CIFAR_PICKLES = {
    "cifar10": ("cifar-10-batches-py", tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", b"labels"),
    "cifar100": ("cifar-100-python", ("train",), "test", b"fine_labels"),
}


def find_cifar_pickles(name: str, place: Path) -> Path | None:
    """The directory with the set as torchvision keeps it: in `place` or that itself; None where there is none."""
    folder, train, _, _ = CIFAR_PICKLES[name]
    return next((p for p in (place / folder, place) if (p / train[0]).is_file()), None)


def cifar_pickles(name: str, place: Path) -> tuple[Split, Split]:
    """(train, test) of 'cifar10' or 'cifar100' from the pickles that torchvision unpacks; no code in them runs.

    Raises:
        UserError: a file is missing or not one of the set's.
    """
    _, train, test, key = CIFAR_PICKLES[name]
    classes = files.CIFAR[name].classes

    class Plain:
        # Stands for NumPy's array and dtype: keeps what they are made of, and does nothing.
        def __init__(self, *arguments: object) -> None:
            self.arguments = arguments

        def __setstate__(self, state: tuple) -> None:
            self.state = state

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module.partition(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
                return Plain
            if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
                return str.encode
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def read(file: str, images: int) -> tuple[np.ndarray, list[int]]:
        path = place / file
        try:
            # Pixels, which Python 3 writes for Python 2 as text of up to two bytes each, labels and file names.
            most = images * (2 * 3072 + 128) + (64 << 10)
            content = Unpickler(io.BytesIO(files.read_bytes(path, most)), encoding="bytes").load()
            _, shape, kind, by_columns, pixels = content[b"data"].state
            labels = [int(label) for label in content[key]]
            kind = kind.arguments[0]
        except UserError:
            raise
        except Exception as error:  # a damaged pickle raises anything
            raise UserError(f"{path} is no pickled batch of {name}: {error or type(error).__name__}") from None
        if shape != (images, 3072) or by_columns or kind not in ("u1", b"u1") or len(pixels) != images * 3072:
            raise UserError(f"{path} is wrong: its data must be {images}×3072 bytes, found {shape} of {kind}")
        if len(labels) != images or not all(0 <= label < classes for label in labels):
            raise UserError(f"{path} is wrong: it must have {images} labels from 0 to {classes - 1}")
        return np.frombuffer(pixels, np.uint8).reshape(images, 3, 32, 32), labels

    def split(names: tuple[str, ...], images: int) -> Split:
        parts = [read(file, images // len(names)) for file in names]
        pixels = torch.from_numpy(np.concatenate([part for part, _ in parts]))
        return Split(pixels.permute(0, 2, 3, 1).contiguous(), torch.tensor([n for _, some in parts for n in some]))

    return split(train, files.CIFAR_RECORDS["train"]), split((test,), files.CIFAR_RECORDS["test"])


def open_data(
    name: str,
    device: torch.device,
    *,
    folder: Path | None = None,
    limit: int | None = None,
    test_limit: int | None = None,
    image_size: int = 224,
    workers: int = 0,
) -> Data:
    """The data set `name`: one of `NAMES`, or a directory of images in one folder a class.

    Args:
        name: which one.
        device: where batches are wanted.
        folder: where the files are; Fashion-MNIST is else looked for in the usual places, then downloaded.
        limit, test_limit: train and test on this many images only.
        image_size, workers: for a directory of images: what they are cropped to, and how many processes read.

    Raises:
        UserError: files are missing, truncated or wrong; a limit exceeds what is there.
    """
    limits = {"limit": limit, "test_limit": test_limit}
    if name == "digits":
        require("the digits", sklearn="scikit-learn")
        train, test = files.digits()
        source = "scikit-learn's load_digits"
        return MemoryData(name, source, train, test, 10, pad=1, flip=False, **limits, device=device)
    if name == "fashion-mnist":
        place = find_fashion_mnist(folder) or _download_fashion_mnist(folder or DEFAULT_FOLDER)
        train, test = files.fashion_mnist(place)
        return MemoryData(name, str(place), train, test, 10, pad=4, flip=True, **limits, device=device)
    if name in files.CIFAR:
        layout, place = files.CIFAR[name], folder or DEFAULT_FOLDER
        place = place / layout.folder if (place / layout.folder).is_dir() else place
        pickles = find_cifar_pickles(name, place)
        train, test = cifar_pickles(name, pickles) if pickles else files.cifar(name, place)
        place, classes = pickles or place, layout.classes
        return MemoryData(name, str(place), train, test, classes, pad=4, flip=True, **limits, device=device)
    if not Path(name).is_dir():
        raise UserError(f"--data must be one of {', '.join(NAMES)} or a directory of images, got {name!r}")
    require("a directory of images", torchvision="torchvision")
    from .folder import FolderData

    return FolderData(Path(name), image_size, workers, device, **limits)
