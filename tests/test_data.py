"""Data files as their formats define them, what is said about broken ones, and the batches made of them."""

import gzip
import hashlib
import io
import os
import pickle
import random
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from acnet_kernels import cli
from acnet_kernels.errors import UserError
from acnet_kernels.paper.training import data, files
from acnet_kernels.paper.training.data import MemoryData, open_data
from acnet_kernels.paper.training.files import Split
from acnet_kernels.paper.training.folder import _Seeded

CPU = torch.device("cpu")


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """Four small IDX files, two of them gzipped, whose checksums are the expected ones; and their arrays."""
    rng = np.random.default_rng()
    arrays = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (30, 28, 28), np.uint8),
        "train-labels-idx1-ubyte": rng.integers(0, 10, 30, np.uint8),
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (12, 28, 28), np.uint8),
        "t10k-labels-idx1-ubyte": rng.integers(0, 10, 12, np.uint8),
    }
    for name, array in arrays.items():
        content = idx(array)
        monkeypatch.setitem(files.FASHION_MNIST, name, hashlib.sha256(content).hexdigest())
        if "images" in name:
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (tmp_path / name).write_bytes(content)
    return tmp_path, arrays


def test_fashion_mnist_is_read_from_plain_and_gzipped_idx_files(fashion):
    folder, arrays = fashion
    train, test = files.fashion_mnist(folder)
    assert torch.equal(train.images[..., 0], torch.from_numpy(arrays["train-images-idx3-ubyte"]))
    assert torch.equal(test.labels, torch.from_numpy(arrays["t10k-labels-idx1-ubyte"]).long())
    opened = open_data("fashion-mnist", CPU, folder=folder, limit=20)
    assert (opened.train_images, opened.test_images, opened.channels, opened.size) == (20, 12, 1, (28, 28))


def test_fashion_mnist_is_found_where_the_downloader_puts_it(fashion):
    folder, _ = fashion
    raw = folder / "FashionMNIST" / "raw"
    assert data.find_fashion_mnist(raw) is None
    raw.mkdir(parents=True)
    for path in folder.glob("*ubyte*"):
        path.rename(raw / path.name)
    assert data.find_fashion_mnist(folder) == raw


def damaged(content: bytes, how: str) -> bytes:
    middle = len(content) // 2
    return {
        "cut": content[:-100],
        "flip": content[:middle] + bytes((content[middle] ^ 1,)) + content[middle + 1 :],
        "html": b"<!DOCTYPE html><html>not found</html>",
        "empty": b"",
        "labels": idx(np.zeros(30, np.uint8)),
    }[how]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("cut", "header announces 30×28×28 = 23520 bytes, found 23420"),
        ("flip", "sha256 of its content is .*, expected "),
        ("html", "begins with 3c 21 44 4f, expected 00 00 08 03"),
        ("empty", "begins with nothing, expected 00 00 08 03"),
        ("labels", "begins with 00 00 08 01, expected 00 00 08 03"),
    ],
)
def test_a_broken_idx_file_is_named_with_what_was_found(fashion, how, said):
    path = fashion[0] / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(damaged(gzip.decompress(path.read_bytes()), how)))
    with pytest.raises(UserError, match=f"train-images-idx3-ubyte.gz.*{said}"):
        open_data("fashion-mnist", CPU, folder=fashion[0])


@pytest.mark.parametrize(
    ("how", "said"), [("cut", "truncated"), ("flip", "no intact gzip file"), ("html", "no intact gzip file")]
)
def test_a_broken_gzip_file_is_named(fashion, how, said):
    path = fashion[0] / "train-images-idx3-ubyte.gz"
    path.write_bytes(damaged(path.read_bytes(), how))
    with pytest.raises(UserError, match=f"train-images-idx3-ubyte.gz.*{said}"):
        files.fashion_mnist(fashion[0])


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_idx_headers_that_lie_are_named(fashion, name):
    folder, arrays = fashion
    (folder / f"{name}.gz").unlink(missing_ok=True)
    header, body = idx(arrays[name])[: 4 + 4 * arrays[name].ndim], arrays[name].tobytes()
    rng = random.Random(3)
    lies = [bytes(4), b"\xff" * 4, b"\x80\0\0\0", b"\0\0\0\x01", bytes(rng.choices(range(256), k=4))]
    count = arrays[name].ndim
    for sizes in [rng.choices(lies, k=count) for _ in range(40)] + [[bytes(4), *[b"\xff" * 4] * (count - 1)]]:
        for content in (body, b"", body * 2):
            (folder / name).write_bytes(header[:4] + b"".join(sizes) + content)
            with pytest.raises(UserError, match=f"{name} is (truncated or wrong|not Fashion-MNIST's|wrong): "):
                files.fashion_mnist(folder)


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_gzip_bomb_is_not_unpacked(fashion, name):
    folder, _ = fashion
    path = folder / f"{name}.gz"
    (folder / name).unlink(missing_ok=True)
    chunk = bytes(1 << 20)
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    path.write_bytes(b"".join(packer.compress(chunk) for _ in range(200)) + packer.flush())
    tracemalloc.start()
    with pytest.raises(
        UserError, match=rf"{name}.gz is wrong: it has more than the \d+ bytes of the published file"
    ):
        files.fashion_mnist(folder)
    assert tracemalloc.get_traced_memory()[1] < 150 << 20
    tracemalloc.stop()
    for endless in (gzip.compress(b"") * 10_000, gzip.compress(b"") + bytes(300_000)):
        path.write_bytes(endless if "labels" in name else endless * 250)
        with pytest.raises(UserError, match=f"{name}.gz is wrong: it has more than"):
            files.fashion_mnist(folder)


def test_a_missing_one_of_four_is_named(fashion):
    (fashion[0] / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="but neither t10k-labels-idx1-ubyte nor"):
        open_data("fashion-mnist", CPU, folder=fashion[0])


def test_a_failed_download_says_what_else_would_do(tmp_path, monkeypatch):
    import torchvision

    def fail(*args, **kwargs):
        raise RuntimeError("Tried a site, got:\nno network\n")

    said = r"cannot be downloaded .Tried a site, got: no network.*--data-dir.*package dataset-fashion-mnist$"
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", fail)
    with pytest.raises(UserError, match=said):
        open_data("fashion-mnist", CPU, folder=tmp_path)


def test_without_torchvision_the_package_with_fashion_mnist_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("acnet_kernels.errors.find_spec", lambda name: None)
    said = r"torchvision is not installed; pip install 'acnet-kernels\[demo\]'.*package dataset-fashion-mnist$"
    with pytest.raises(UserError, match=said):
        open_data("fashion-mnist", CPU, folder=tmp_path)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr("acnet_kernels.errors.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"scikit-learn is not installed; pip install 'acnet-kernels\[demo\]'"):
        open_data("digits", CPU)


@pytest.fixture(params=["cifar10", "cifar100"])
def small_cifar(request, tmp_path, monkeypatch):
    """A CIFAR of 50 + 10 records written byte by byte, in its own folder; (name, root, folder, records)."""
    name, layout = request.param, files.CIFAR[request.param]
    monkeypatch.setattr(files, "CIFAR_RECORDS", {"train": 50, "test": 10})
    folder, rng, records = tmp_path / layout.folder, np.random.default_rng(), []
    folder.mkdir()
    for file in (*layout.train, *layout.test):
        n = 10 if file in layout.test else 50 // len(layout.train)
        part = rng.integers(0, 256, (n, layout.label_bytes + 3072), np.uint8)
        part[:, : layout.label_bytes] = rng.integers(0, layout.classes, (n, layout.label_bytes))
        (folder / file).write_bytes(part.tobytes())
        records.append(part)
    return name, tmp_path, folder, np.concatenate(records)


def test_cifar_records_are_label_then_channel_row_column(small_cifar):
    name, root, _, records = small_cifar
    skip = files.CIFAR[name].label_bytes
    opened = open_data(name, CPU, folder=root)
    train, test = files.cifar(name, root / files.CIFAR[name].folder)
    assert (opened.train_images, opened.test_images, opened.classes) == (50, 10, files.CIFAR[name].classes)
    for i, c, row, column in ((0, 0, 0, 0), (17, 1, 5, 31), (49, 2, 31, 0)):
        assert train.images[i, row, column, c] == records[i, skip + c * 1024 + row * 32 + column]
    assert torch.equal(test.labels, torch.from_numpy(records[50:, skip - 1].astype(np.int64)))


def test_a_wrong_cifar_file_is_named(small_cifar):
    name, root, folder, _ = small_cifar
    layout = files.CIFAR[name]
    path = folder / layout.train[-1]
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(
        UserError, match=f"{path.name} is truncated or wrong: found .* bytes, expected {len(content)}"
    ):
        open_data(name, CPU, folder=root)
    record = 3072 + layout.label_bytes
    at = 2 * record + layout.label_bytes - 1
    path.write_bytes(content[:at] + bytes((200,)) + content[at + 1 :])
    with pytest.raises(UserError, match=f"{path.name} is wrong: record 2 has label 200, expected 0 to"):
        open_data(name, CPU, folder=root)
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name} is missing; https"):
        open_data(name, CPU, folder=root)


@pytest.mark.parametrize("end", ["", ".gz"])
def test_a_file_of_any_size_is_read_no_further_than_it_may_go(fashion, small_cifar, end):
    path = fashion[0] / "train-labels-idx1-ubyte"
    path.unlink()
    name, root, folder, _ = small_cifar
    for path in (fashion[0] / f"train-labels-idx1-ubyte{end}", folder / files.CIFAR[name].test[0]):
        with path.open("wb") as file:
            file.truncate(1 << 38)  # takes no room
    with pytest.raises(
        UserError, match=f"ubyte{end} is wrong: it has more than the 60008 bytes of the published file"
    ):
        files.fashion_mnist(fashion[0])
    with pytest.raises(UserError, match=rf"{path.name} is wrong: it has more than the \d+ bytes"):
        open_data(name, CPU, folder=root)


@pytest.fixture(params=["cifar10", "cifar100"])
def pickled_cifar(request, tmp_path, monkeypatch):
    """(name, folder, images N×3×32×32, labels) as torchvision keeps a set, of 20 training and 3 test images."""
    name = request.param
    monkeypatch.setattr(files, "CIFAR_RECORDS", {"train": 20, "test": 3})
    folder, train, test, key = data.CIFAR_PICKLES[name]
    rng = np.random.default_rng()
    images = rng.integers(0, 256, (23, 3, 32, 32), np.uint8)
    labels = rng.integers(0, files.CIFAR[name].classes, 23).tolist()
    (tmp_path / folder).mkdir()
    first = 0
    for file, count in [*((file, 20 // len(train)) for file in train), (test, 3)]:
        some = slice(first, first + count)
        batch = {b"data": images[some].reshape(count, 3072), key: labels[some], b"batch_label": b"of 5"}
        if name == "cifar100":
            batch[b"coarse_labels"] = [0] * count
        # Protocol 2 is what the published files have.
        (tmp_path / folder / file).write_bytes(pickle.dumps(batch, protocol=2))
        first += count
    return name, tmp_path / folder, images, labels


@pytest.mark.parametrize("inside", [True, False])
def test_torchvisions_cifar_is_read(pickled_cifar, inside):
    name, folder, images, labels = pickled_cifar
    opened = open_data(name, CPU, folder=folder if inside else folder.parent)
    assert (opened.train_images, opened.test_images, opened.channels, opened.size) == (20, 3, 3, (32, 32))
    assert opened.source == str(folder)
    assert opened.classes == files.CIFAR[name].classes
    (tested, found), *_ = list(opened.test_batches(3))
    assert found.tolist() == labels[20:]
    restored = (tested.permute(0, 2, 3, 1) * opened._std + opened._mean).round().to(torch.uint8)
    assert torch.equal(restored, torch.from_numpy(images[20:]).permute(0, 2, 3, 1))
    (train, found), *_ = list(open_data(name, CPU, folder=folder).train_batches(0, 0, 20))
    assert sorted(found.tolist()) == sorted(labels[:20])
    assert train.shape == (20, 3, 32, 32)


def test_the_binary_version_comes_first(pickled_cifar):
    name, folder, *_ = pickled_cifar
    (folder.parent / files.CIFAR[name].folder).mkdir()
    with pytest.raises(UserError, match=r"\.bin is missing"):
        open_data(name, CPU, folder=folder.parent)


class Evil:
    """Unpickled carelessly, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_runs_no_code(pickled_cifar, tmp_path):
    name, folder, *_ = pickled_cifar
    path = folder / data.CIFAR_PICKLES[name][1][0]
    path.write_bytes(pickle.dumps({b"data": Evil(tmp_path / "evil"), b"labels": []}, protocol=2))
    with pytest.raises(UserError, match=f"{path.name} is no pickled batch of {name}: it asks for .*mkdir"):
        open_data(name, CPU, folder=folder)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda batch: batch[b"data"], "is no pickled batch of"),
        (lambda batch: {**batch, b"data": batch[b"data"][:-1]}, "its data must be .*×3072 bytes, found"),
        (lambda batch: {**batch, b"data": batch[b"data"].astype(np.int8)}, "found .* of .*i1"),
        (lambda batch: {**batch, b"data": np.asfortranarray(batch[b"data"])}, "its data must be"),
        (lambda batch: {**batch, b"labels": [0], b"fine_labels": [0]}, "labels from 0 to"),
        (lambda batch: {**batch, b"labels": [-1] * 20, b"fine_labels": [-1] * 20}, "labels from 0 to"),
        (lambda batch: {b"data": batch[b"data"]}, "is no pickled batch of"),
    ],
)
def test_a_wrong_pickle_is_named(pickled_cifar, change, said):
    name, folder, *_ = pickled_cifar
    path = folder / data.CIFAR_PICKLES[name][1][0]
    path.write_bytes(pickle.dumps(change(pickle.loads(path.read_bytes(), encoding="bytes")), protocol=2))
    with pytest.raises(UserError, match=f"{path.name} .*{said}"):
        open_data(name, CPU, folder=folder)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.999])
def test_a_truncated_pickle_is_named(pickled_cifar, part):
    name, folder, *_ = pickled_cifar
    path = folder / data.CIFAR_PICKLES[name][1][0]
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(UserError, match=f"{path.name} is no pickled batch of {name}: "):
        open_data(name, CPU, folder=folder)


def numbered(n=23, height=6, width=5, channels=2, *, pad=2, flip=True, limit=None, test_limit=None):
    """Images whose pixels are all different from 0, with labels that number them."""
    images = torch.randint(1, 256, (n, height, width, channels), dtype=torch.uint8)
    split = Split(images, torch.arange(n))
    limits = {"limit": limit, "test_limit": test_limit}
    return images, MemoryData("numbers", "here", split, split, n, pad=pad, flip=flip, **limits, device=CPU)


def undo(data, batch):
    """The bytes that a normalised batch N×C×H×W was made of."""
    return (batch.permute(0, 2, 3, 1) * data._std + data._mean).round().to(torch.uint8)


def test_batches_are_crops_and_mirrors_of_the_images():
    images, made = numbered()
    padded = torch.nn.functional.pad(images, (0, 0, 2, 2, 2, 2))
    seen, mirrored, moved = [], 0, set()
    for batch, labels in made.train_batches(seed=1, epoch=0, batch_size=8):
        assert batch.is_contiguous(memory_format=torch.channels_last)
        for image, label in zip(undo(made, batch), labels.tolist(), strict=True):
            places = {
                (flip, top, left)
                for flip in (False, True)
                for top in range(5)
                for left in range(5)
                if torch.equal(
                    padded[label, top : top + 6, left : left + 5].flip(1)
                    if flip
                    else padded[label, top : top + 6, left : left + 5],
                    image,
                )
            }
            assert len(places) == 1
            flip, top, left = places.pop()
            seen.append(label)
            mirrored += flip
            moved.add((top, left))
    assert sorted(seen) == list(range(23))
    assert 0 < mirrored < 23
    assert len(moved) > 5


def test_nothing_moves_where_the_data_set_forbids_it():
    images, made = numbered(pad=0, flip=False)
    for batch, labels in made.train_batches(seed=1, epoch=0, batch_size=8):
        assert torch.equal(undo(made, batch), images[labels])


def test_normalised_images_have_mean_zero_and_deviation_one():
    _, made = numbered(n=64)
    pixels = torch.cat([batch for batch, _ in made.test_batches(10)]).double()
    assert pixels.mean((0, 2, 3)).abs().max() < 1e-5
    assert (pixels.std((0, 2, 3), unbiased=False) - 1).abs().max() < 1e-5


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_an_epoch_is_decided_by_seed_and_number_and_can_start_anywhere():
    _, made = numbered()
    whole = list(made.train_batches(5, 2, 4))
    torch.rand(3)
    assert same(whole, list(made.train_batches(5, 2, 4)))
    assert same(whole[3:], list(made.train_batches(5, 2, 4, start=3)))
    assert not same(whole, list(made.train_batches(5, 3, 4)))
    assert not same(whole, list(made.train_batches(6, 2, 4)))


def test_a_limit_takes_the_same_images_for_every_seed():
    _, made = numbered(limit=7)
    labels = {seed: {int(y) for _, batch in made.train_batches(seed, seed, 3) for y in batch} for seed in (0, 1)}
    assert labels[0] == labels[1]
    assert len(labels[0]) == 7
    assert labels[0] != set(range(7))
    with pytest.raises(UserError, match="at most the 23 training images there are, got 24"):
        numbered(limit=24)


def test_a_test_limit_takes_a_part_of_the_test_images_alone():
    images, made = numbered(test_limit=5)
    (tested, labels), *_ = list(made.test_batches(9))
    assert (len(tested), made.test_images, made.train_images) == (5, 5, 23)
    assert sorted(labels.tolist()) != list(range(5))
    restored = tested.permute(0, 2, 3, 1) * made._std + made._mean
    torch.testing.assert_close(restored, images[labels].float())
    with pytest.raises(UserError, match="--test-limit must be at most the 23 test images there are, got 24"):
        numbered(test_limit=24)


def test_digits_are_embedded():
    opened = open_data("digits", CPU)
    assert (opened.train_images, opened.test_images, opened.classes, opened.size) == (1437, 360, 10, (8, 8))
    images, labels = next(opened.test_batches(360))
    assert images.isfinite().all()
    assert len(labels.unique()) == 10


@pytest.fixture
def folder(tmp_path):
    """Twelve training and four validation pictures of differing sizes, in two classes."""
    rng = np.random.default_rng()
    for part, n in (("train", 6), ("val", 2)):
        for kind in ("cat", "dog"):
            (tmp_path / part / kind).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (20 + i, 31 - i, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / kind / f"{i}.png")
    return tmp_path


def test_a_directory_of_images_is_the_same_for_any_number_of_workers(folder):
    streams = []
    for workers in (0, 2):
        opened = open_data(str(folder), CPU, image_size=16, workers=workers)
        streams.append(list(opened.train_batches(3, 1, 5)))
        assert same(streams[-1][1:], list(opened.train_batches(3, 1, 5, start=1)))
    assert (opened.classes, opened.channels, opened.train_images, opened.test_images) == (2, 3, 12, 4)
    assert [tuple(images.shape) for images, _ in streams[0]] == [(5, 3, 16, 16), (5, 3, 16, 16), (2, 3, 16, 16)]
    assert same(*streams)
    assert not same(streams[0], list(opened.train_batches(3, 2, 5)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_named(folder, workers):
    path = folder / "train" / "cat" / "3.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"cat/3\.png cannot be read as an image"):
        list(open_data(str(folder), CPU, image_size=16, workers=workers).train_batches(0, 0, 4))


FORMATS = {"png": {}, "jpeg": {}, "bmp": {}, "tiff": {"compression": "tiff_lzw"}, "webp": {}, "ppm": {}}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_picture_is_read_or_named_whatever_its_format(folder, kind):
    rng = random.Random(5)
    path = folder / "train" / "cat" / f"other.{kind}"
    Image.open(folder / "train" / "cat" / "0.png").save(path, **FORMATS[kind])
    whole = path.read_bytes()
    opened = open_data(str(folder), CPU, image_size=16)
    index = [sample[0] for sample in opened._train.samples].index(str(path))
    named = 0
    for _ in range(150):
        content = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.3 else whole)
        for _ in range(rng.randrange(1, 6)):
            if content:
                content[rng.randrange(min(len(content), rng.choice((40, 4000))))] = rng.randrange(256)
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about what it mends
            got = _Seeded(opened._train, torch.tensor([[index, 0]]))[0]
        if isinstance(got, UserError):
            assert str(got).startswith(f"{path} cannot be read as an image: ")
            named += 1
        else:
            assert got[0].shape == (3, 16, 16)
    assert named


def png(width, height):
    """A black picture of any size, in few bytes."""
    image = Image.new("1", (1, 1))
    with io.BytesIO() as file:
        image.save(file, "png")
        content = file.getvalue()
    rows = zlib.compressobj(9)
    packed = b"".join(rows.compress(bytes(1 + (width + 7) // 8)) for _ in range(height)) + rows.flush()

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return content[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((30_000, 30_000), "decompression bomb"),
        ((100_000, 1), "100000×1 pixels: one side must be at most 500 times the other"),
        ((1, 60_000), "1×60000 pixels: one side must be at most 500 times the other"),
    ],
)
@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_would_take_gigabytes_is_named(folder, part, size, said, workers):
    path = folder / part / "dog" / "1.png"
    path.write_bytes(png(*size))
    opened = open_data(str(folder), CPU, image_size=16, workers=workers)
    batches = opened.train_batches(0, 0, 4) if part == "train" else opened.test_batches(4)
    with pytest.raises(UserError, match=rf"{part}/dog/1\.png cannot be read as an image: .*{said}"):
        list(batches)


def test_train_answers_a_broken_picture_with_one_sentence(folder, tmp_path, capsys):
    (folder / "val" / "dog" / "1.png").write_bytes(png(30_000, 30_000))
    options = ["--net=resnet18", "--image-size=32", "--epochs=1", "--workers=0", "--out", str(tmp_path / "out")]
    assert cli.main(["train", "--data", str(folder), *options]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "val/dog/1.png cannot be read as an image" in errors


def test_a_directory_of_another_layout_is_explained(folder):
    (folder / "val" / "dog").rename(folder / "val" / "wolf")
    with pytest.raises(UserError, match=r"must hold the same classes; only one has \['dog', 'wolf'\]"):
        open_data(str(folder), CPU)
    (folder / "val").rename(folder / "holdout")
    with pytest.raises(UserError, match=r"must hold the directories train and val .or test., found holdout, train"):
        open_data(str(folder), CPU)
    for kind in ("cat", "dog"):
        for path in Path(folder / "train" / kind).iterdir():
            path.unlink()
        (folder / "train" / kind).rmdir()
    (folder / "holdout").rename(folder / "val")
    with pytest.raises(UserError, match="must hold one directory of images a class"):
        open_data(str(folder), CPU)


def test_an_unknown_set_lists_the_known_ones():
    with pytest.raises(
        UserError, match="digits, fashion-mnist, cifar10, cifar100 or a directory of images, got 'mnist'"
    ):
        open_data("mnist", CPU)
