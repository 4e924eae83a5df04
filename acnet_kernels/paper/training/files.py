"""Reads data files byte by byte as their formats define them, and says exactly what is wrong with a broken one."""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError

# sha256 of the decompressed IDX files, whoever packed them.
FASHION_MNIST = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FASHION_IMAGES, FASHION_PIXELS = {"train": 60_000, "t10k": 10_000}, 28 * 28


class Cifar(NamedTuple):
    """One of CIFAR's binary layouts: records of label bytes, then 3×32×32 pixel bytes (channel, row, column)."""

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    label_bytes: int  # the last one is the fine label
    classes: int
    page: str = "https://www.cs.toronto.edu/~kriz/cifar.html"


CIFAR = {
    "cifar10": Cifar(
        "cifar-10-batches-bin", tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",), 1, 10
    ),
    "cifar100": Cifar("cifar-100-binary", ("train.bin",), ("test.bin",), 2, 100),
}
CIFAR_RECORDS = {"train": 50_000, "test": 10_000}
_PIXELS = 3 * 32 * 32


class Split(NamedTuple):
    """Images N×H×W×C uint8 and labels (N,) int64."""

    images: Tensor
    labels: Tensor


def read_bytes(path: Path, most: int) -> bytes:
    """The file's content, decompressed where its name ends in .gz.

    Raises:
        UserError: the file is damaged, cannot be read, or has more than `most` bytes, which are neither read nor
            unpacked then.
    """
    packed = path.suffix == ".gz"
    limit = most + most // 64 + 4096 if packed else most  # what deflate and its header add at worst
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
        content = gzip.GzipFile(fileobj=io.BytesIO(raw)).read(most + 1) if packed and len(raw) <= limit else raw
    except EOFError:
        raise UserError(f"{path} is truncated: its gzip stream ends after {len(raw)} bytes") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is no intact gzip file: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if len(raw) > limit or len(content) > most:
        raise UserError(f"{path} is wrong: it has more than the {most} bytes of the published file")
    return content


def parse_idx(content: bytes, path: Path, dimensions: int) -> Tensor:
    """An IDX file of unsigned bytes as a tensor: two zero bytes, 8, the number of dimensions, their sizes, data."""
    header = 4 + 4 * dimensions
    magic = bytes((0, 0, 8, dimensions))
    if len(content) < header or content[:4] != magic:
        raise UserError(
            f"{path} is no IDX file of unsigned bytes in {dimensions} dimension(s): it begins with "
            f"{content[:4].hex(' ') or 'nothing'}, expected {magic.hex(' ')}"
        )
    shape = [int(size) for size in np.frombuffer(content, ">u4", dimensions, 4)]
    expected = math.prod(shape)
    if len(content) - header != expected or not expected:
        raise UserError(
            f"{path} is truncated or wrong: its header announces {'×'.join(map(str, shape))} = {expected} bytes, "
            f"found {len(content) - header}"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).copy()).view(shape)


def _idx(folder: Path, name: str, dimensions: int) -> Tensor:
    path = next((folder / n for n in (name, f"{name}.gz") if (folder / n).is_file()), None)
    if path is None:
        raise UserError(f"{folder} holds other files of Fashion-MNIST, but neither {name} nor {name}.gz")
    images = FASHION_IMAGES[name.partition("-")[0]]
    content = read_bytes(path, 4 + 4 * dimensions + images * (FASHION_PIXELS if dimensions == 3 else 1))
    tensor = parse_idx(content, path, dimensions)
    found = hashlib.sha256(content).hexdigest()
    if found != FASHION_MNIST[name]:
        raise UserError(
            f"{path} is not Fashion-MNIST's: sha256 of its content is {found}, expected {FASHION_MNIST[name]}"
        )
    return tensor


def has_fashion_mnist(folder: Path) -> bool:
    """Whether any of the four files, packed or not, is there."""
    return any((folder / f"{name}{end}").is_file() for name in FASHION_MNIST for end in ("", ".gz"))


def fashion_mnist(folder: Path) -> tuple[Split, Split]:
    """(train, test) from the four IDX files, gzipped or not, each checked against its sha256.

    Raises:
        UserError: a file is missing, truncated or other than the published one.
    """

    def split(part: str) -> Split:
        images = _idx(folder, f"{part}-images-idx3-ubyte", 3)
        return Split(images[..., None], _idx(folder, f"{part}-labels-idx1-ubyte", 1).long())

    return split("train"), split("t10k")


def _cifar_split(folder: Path, files: tuple[str, ...], layout: Cifar, records: int) -> Split:
    size = layout.label_bytes + _PIXELS
    expected = records // len(files) * size
    parts = []
    for name in files:
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing; {layout.page} has the set's binary version")
        content = read_bytes(path, expected)
        if len(content) != expected:
            raise UserError(
                f"{path} is truncated or wrong: found {len(content)} bytes, expected {expected} "
                f"({records // len(files)} records of {size})"
            )
        parts.append(np.frombuffer(content, np.uint8).reshape(-1, size))
    table = torch.from_numpy(np.concatenate(parts))
    labels = table[:, layout.label_bytes - 1].long()
    wrong = (labels >= layout.classes).nonzero()
    if len(wrong):
        at, in_file = divmod(int(wrong[0]), records // len(files))
        raise UserError(
            f"{folder / files[at]} is wrong: record {in_file} has label {int(labels[wrong[0]])}, "
            f"expected 0 to {layout.classes - 1}"
        )
    images = table[:, layout.label_bytes :].reshape(-1, 3, 32, 32).permute(0, 2, 3, 1).contiguous()
    return Split(images, labels)


def cifar(name: str, folder: Path) -> tuple[Split, Split]:
    """(train, test) of 'cifar10' or 'cifar100' from the folder that holds the binary version's files.

    Raises:
        UserError: a file is missing, has another size, or a label out of range.
    """
    layout = CIFAR[name]
    train = _cifar_split(folder, layout.train, layout, CIFAR_RECORDS["train"])
    return train, _cifar_split(folder, layout.test, layout, CIFAR_RECORDS["test"])


def digits() -> tuple[Split, Split]:
    """(train, test) of scikit-learn's 1,797 8×8 digits: the first 1,437, and the last 360, by other writers."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8)[..., None]
    labels = torch.from_numpy(bunch.target).long()
    return Split(images[:1437], labels[:1437]), Split(images[1437:], labels[1437:])
