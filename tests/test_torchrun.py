"""Training by several processes: what each is given, and a run that torchrun starts, loses and starts again."""

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import distributed
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from acnet_kernels import cli
from acnet_kernels.errors import UserError
from acnet_kernels.paper.training import checkpoints
from acnet_kernels.paper.training.data import Part, open_data, used_images
from acnet_kernels.paper.training.distributed import World, joined
from acnet_kernels.paper.training.loop import BEST, LAST, Recipe, Trainer

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
RECIPE = Recipe(net="resnet8", epochs=3, batch_size=32, limit=99)
SIZE = ("--net", "resnet8", "--epochs", "3", "--batch-size", "32", "--limit", "99")
ARGUMENTS = (*SIZE, "--threads", "1", "--device", "cpu")


class Alone(World):
    """One of several processes whose others are simulated one after the other."""

    def replica(self, model, device):
        return model

    def sum(self, totals):
        return totals

    def any(self, flag):
        return flag


def data(name="digits", limit=99):
    return open_data(name, CPU, limit=limit)


@pytest.mark.parametrize(
    ("images", "batch", "size", "used"), [(99, 32, 1, 99), (99, 32, 2, 99), (97, 32, 2, 96), (96, 32, 4, 96)]
)
def test_only_a_last_batch_too_small_for_all_is_left_out(images, batch, size, used):
    assert used_images(images, batch, Part(0, size)) == used


@pytest.mark.parametrize("size", [2, 4])
def test_parts_of_a_batch_are_the_batch(size):
    whole = data()
    batches = list(whole.train_batches(1, 2, 32))
    parts = [list(whole.train_batches(1, 2, 32, part=Part(rank, size))) for rank in range(size)]
    used = used_images(99, 32, Part(0, size))
    assert {len(part) for part in parts} == {-(-used // 32)}
    for number, (images, labels) in enumerate(batches[: len(parts[0])]):
        for rank in range(size):
            mine = parts[rank][number]
            assert torch.equal(mine[0], images[rank::size])
            assert torch.equal(mine[1], labels[rank::size])
    tests = [list(whole.test_batches(50, Part(rank, size))) for rank in range(size)]
    everything = torch.cat([labels for _, labels in whole.test_batches(50)])
    for rank in range(size):
        assert torch.equal(torch.cat([labels for _, labels in tests[rank]]), everything[rank::size])


def test_a_directory_of_images_is_read_in_parts(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Pillow writes the images: extra `demo`")
    for split in ("train", "val"):
        for label in ("a", "b"):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for i in range(5):
                colour = (40 * i, 100 * (label == "b"), 7)
                image.new("RGB", (20, 20), colour).save(folder / f"{i}.png")
    opened = open_data(str(tmp_path), CPU, image_size=16)
    whole = list(opened.train_batches(0, 0, 4))
    for rank in range(2):
        mine = list(opened.train_batches(0, 0, 4, part=Part(rank, 2)))
        assert len(mine) == len(whole) == 3
        for (images, labels), (ours, our_labels) in zip(whole, mine, strict=True):
            assert torch.equal(images[rank::2], ours)
            assert torch.equal(labels[rank::2], our_labels)
    (images, labels), *_ = opened.test_batches(10)
    (ours, our_labels), *_ = opened.test_batches(10, Part(1, 2))
    assert torch.equal(images[1::2], ours)
    assert torch.equal(labels[1::2], our_labels)


def test_the_processes_gradients_average_to_the_whole_batchs():
    # Frozen batch statistics, so that an image's loss depends on no other; the last batch has 3 images: 2 and 1.
    for step in (0, 3):
        gradients = []
        for world in (World(), Alone(Part(0, 2)), Alone(Part(1, 2))):
            run = Trainer(replace(RECIPE, lr=1e-30), data(), CPU, world)
            run.step = step
            run.model.eval()
            part = world.part
            images, labels = next(run.data.train_batches(0, 0, 32, step, part))
            run.train_step(images, labels)
            gradients.append([p.grad.clone() for p in run.model.parameters()])
        whole, *halves = gradients
        for expected, a, b in zip(whole, *halves, strict=True):
            torch.testing.assert_close((a + b) / 2, expected, atol=1e-6, rtol=1e-4)


def test_the_loss_of_one_process_is_plain_cross_entropy():
    run = Trainer(RECIPE, data(), CPU)
    images, labels = next(run.data.train_batches(0, 0, 32))
    expected = F.cross_entropy(run.model.train()(images), labels)
    other = Trainer(RECIPE, data(), CPU)
    other.train_step(images, labels)
    assert other._totals[0].item() == expected.item() * 32


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="--batch-size must be a multiple of the 3 processes, got 32"):
        Trainer(RECIPE, data(), CPU, Alone(Part(0, 3)))


def test_processes_take_their_own_gpus():
    worlds = World(), World(Part(2, 4), local_rank=2)
    assert [w.device("cuda") for w in worlds] == ["cuda", "cuda:2"]
    assert [w.device("cpu") for w in worlds] == ["cpu", "cpu"]
    assert [w.device("cuda:1") for w in worlds] == ["cuda:1", "cuda:1"]


def test_half_an_environment_is_one_sentence(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE is 2, but the processes cannot meet"), joined():
        pass


def torchrun(out):
    """The running command, in two processes."""
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*starter, "-m", "acnet_kernels", "train", *ARGUMENTS, "--out", str(out)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def workers(process):
    """Process numbers of the two that torchrun started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(number) for number in children.read_text().split()]


def as_torchrun_starts_it(rank, port, arguments, printed):
    """The command in one of two processes that need not import everything anew."""
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in where.items()})
    with open(f"{printed}-{rank}", "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        assert cli.main(["train", *arguments]) == 0


def unbroken(rank, world, out):
    """The same run from its first step to its last, in processes that need not import everything anew."""
    Trainer(RECIPE, data(), CPU, World(Part(rank, world), rank, dist.new_group())).run(out, Silent())


class Silent:
    """An observer that looks away."""

    def start(self, epochs, steps, epoch, step):
        pass

    def step(self, images):
        pass

    def epoch(self, row):
        pass


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds torchrun's processes in Linux's /proc")
def test_a_run_that_lost_a_process_goes_on_to_the_same_weights(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    first = torchrun(broken)
    deadline = time.monotonic() + 120
    while not (broken / BEST).exists():
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(workers(first)[-1], signal.SIGKILL)
    first.communicate(timeout=120)
    assert first.returncode != 0
    assert not (broken / "report.json").exists()
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    multiprocessing.set_forkserver_preload(distributed.PRELOADED)
    arguments = port, (*ARGUMENTS, "--out", str(broken), "--resume"), str(tmp_path / "printed")
    mp.start_processes(as_torchrun_starts_it, arguments, 2, start_method="forkserver")
    output = "".join(path.read_text() for path in sorted(tmp_path.glob("printed-*")))
    assert "resuming at epoch" in output
    assert "on cpu, processes 2, threads 1" in output
    assert output.count("test accuracy") == 1
    distributed.run(2, unbroken, whole)
    ours, theirs = checkpoints.load(broken / LAST), checkpoints.load(whole / LAST)
    assert all(torch.equal(ours["model"][name], value) for name, value in theirs["model"].items())
    for mine, other in zip(ours["history"], theirs["history"], strict=True):
        assert {**mine, "images_per_second": 0} == {**other, "images_per_second": 0}
