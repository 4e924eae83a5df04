"""A directory of images in one folder a class, read by worker processes. Needs torchvision."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from ...errors import UserError
from .data import WHOLE, Batch, Part, epoch_generator, subset, used_images

# ImageNet's, as everyone uses for photographs.
_NORMALISE = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TEST_FOLDERS = ("val", "test")
LONGEST = 500  # times its width that a picture may be high, or its height wide


class FolderData:
    """`root/train/<class>/*` and `root/val/<class>/*` (or `test`), cropped to size×size, normalised as ImageNet.

    Training: a random crop of random scale, and a flip; testing: the centre of an image 8/7 as large. Each
    image's augmentation has its own seed, so the batches do not depend on the number of workers.

    Raises:
        UserError: the layout is another, the two parts differ in their classes, or an image cannot be read.
    """

    def __init__(
        self,
        root: Path,
        size: int,
        workers: int,
        device: torch.device,
        *,
        limit: int | None = None,
        test_limit: int | None = None,
    ) -> None:
        test = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
        if test is None or not (root / "train").is_dir():
            found = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())[:8]) or "none"
            raise UserError(f"{root} must hold the directories train and val (or test), found {found}")
        crop = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
        centre = [transforms.Resize(size * 8 // 7), transforms.CenterCrop(size)]
        self._train, self._test = _open(root / "train", crop), _open(test, centre)
        if self._train.classes != self._test.classes:
            differing = sorted(set(self._train.classes) ^ set(self._test.classes))
            raise UserError(f"{root}/train and {test} must hold the same classes; only one has {differing[:5]}")
        self.name, self.source, self.classes = root.name, str(root), len(self._train.classes)
        self.channels, self.size = 3, (size, size)
        chosen = subset(len(self._train), limit)
        self._chosen = torch.arange(len(self._train)) if chosen is None else chosen
        tested = subset(len(self._test), test_limit, "--test-limit")
        self._tested = torch.arange(len(self._test)) if tested is None else tested
        self.train_images, self.test_images = len(self._chosen), len(self._tested)
        self._workers, self._device = workers, device

    def train_batches(
        self, seed: int, epoch: int, batch_size: int, start: int = 0, part: Part = WHOLE
    ) -> Iterator[Batch]:
        generator, end = epoch_generator(seed, epoch), used_images(self.train_images, batch_size, part)
        order = self._chosen[torch.randperm(self.train_images, generator=generator)]
        seeds = torch.randint(2**62, (self.train_images,), generator=generator)
        items = torch.stack((order, seeds), 1)[start * batch_size : end]
        # A batch is a multiple of the parts, so every size-th item from rank on is this part of each batch.
        return self._load(self._train, items[part.rank :: part.size], batch_size // part.size)

    def test_batches(self, batch_size: int, part: Part = WHOLE) -> Iterator[Batch]:
        items = torch.stack((self._tested, self._tested), 1)
        return self._load(self._test, items[part.rank :: part.size], batch_size)

    def _load(self, images: ImageFolder, items: Tensor, batch_size: int) -> Iterator[Batch]:
        loader = DataLoader(
            _Seeded(images, items),
            batch_size,
            num_workers=self._workers,
            collate_fn=_collate,
            worker_init_fn=_ignore_interrupt,
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            pixels, labels = batch
            yield (
                pixels.to(self._device, memory_format=torch.channels_last, non_blocking=True),
                labels.to(self._device, non_blocking=True),
            )


def _open(folder: Path, geometric: list) -> ImageFolder:
    steps = transforms.Compose([*geometric, transforms.ToTensor(), _NORMALISE])
    try:
        return ImageFolder(str(folder), steps)
    except OSError as error:
        raise UserError(f"{folder} must hold one directory of images a class: {error}") from None


class _Seeded(Dataset):
    """Images by (index, seed); one that cannot be read comes as its error, for the main process to raise."""

    def __init__(self, images: ImageFolder, items: Tensor) -> None:
        self.images, self.items = images, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Tensor, int] | UserError:
        index, seed = self.items[i].tolist()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            path, label = self.images.samples[index]
            try:
                picture = self.images.loader(path)
                _refuse_thin(*picture.size)
            except Exception as error:  # there is nothing that a broken picture cannot make Pillow raise
                return UserError(f"{path} cannot be read as an image: {error or type(error).__name__}")
            return self.images.transform(picture), label


def _refuse_thin(width: int, height: int) -> None:
    # Its shorter side is made as long as the crop's: one of a single row would then take gigabytes.
    if max(width, height) > LONGEST * min(width, height):
        raise ValueError(f"{width}×{height} pixels: one side must be at most {LONGEST} times the other")


def _collate(items: list) -> Batch | UserError:
    for item in items:
        if isinstance(item, UserError):
            return item
    pixels, labels = zip(*items, strict=True)
    return torch.stack(pixels), torch.tensor(labels)


def _ignore_interrupt(worker: int) -> None:
    # Ctrl-C reaches the whole process group; the main process decides when its workers stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
