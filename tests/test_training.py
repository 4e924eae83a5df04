"""The training loop: the recipe, exact resumption, checkpoints, and what is measured and drawn afterwards."""

import copy
import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from acnet_kernels import cli, fuse
from acnet_kernels.errors import UserError
from acnet_kernels.paper.training import checkpoints, interrupt, measure, report
from acnet_kernels.paper.training.data import open_data
from acnet_kernels.paper.training.folding import check_fold
from acnet_kernels.paper.training.loop import BEST, LAST, Recipe, Trainer

CPU = torch.device("cpu")
RECIPE = Recipe(net="resnet8", epochs=2, batch_size=40, seed=3, limit=100)


class Silent:
    """An observer that only remembers the epochs' rows."""

    def __init__(self):
        self.rows = []

    def start(self, epochs, steps, epoch, step):
        self.begun = (epochs, steps, epoch, step)

    def step(self, images):
        pass

    def epoch(self, row):
        self.rows.append(row)


class StopAfter(Silent):
    """Asks to stop once so many steps are done."""

    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def step(self, images):
        self.left -= 1

    def reached(self):
        return self.left <= 0


@pytest.fixture
def one_thread():
    """Results depend on the number of threads in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trainer(test_limit=90, **changes):
    recipe = replace(RECIPE, **changes)
    return Trainer(recipe, open_data(recipe.data, CPU, limit=recipe.limit, test_limit=test_limit), CPU)


def noisy_trainer(**changes):
    """A trainer whose network draws from all three global generators in training."""

    def disturb(module, inputs, out):
        if not module.training:
            return out
        return F.dropout(out, 0.1) * (0.9 + 0.1 * random.random() + 0.1 * float(np.random.rand()))

    run = trainer(**changes)
    run.model.stages.register_forward_hook(disturb)
    return run


def assert_equal(one, other, where=""):
    """Bit-for-bit, through dicts, lists and tensors; only measured speeds may differ."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            if key not in ("images_per_second", "seconds"):
                assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{where}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


@pytest.mark.parametrize(
    ("stop_after", "amp", "block"), [(1, "no", "acb"), (3, "no", "acb"), (4, "bf16", "acb"), (4, "fp16", "plain")]
)
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, stop_after, amp, block):
    # 3 steps an epoch: stopped within the first, exactly at its end, and within the second.
    whole, part = tmp_path / "whole", tmp_path / "part"
    whole.mkdir()
    part.mkdir()
    reference = noisy_trainer(amp=amp, block=block)
    assert reference.run(whole, Silent())
    counter = StopAfter(stop_after)
    assert not noisy_trainer(amp=amp, block=block).run(part, counter, counter.reached)
    torch.rand(5), np.random.rand(5), random.random()
    resumed, observer = noisy_trainer(amp=amp, block=block), Silent()
    resumed.load_state_dict(checkpoints.load(part / LAST))
    assert resumed.run(part, observer)
    assert observer.begun == (2, 3, stop_after // 3, stop_after % 3)
    for name in (LAST, BEST):
        assert_equal(checkpoints.load(part / name), checkpoints.load(whole / name), name)


ARGUMENTS = ["--net=resnet8", "--limit=96", "--batch-size=32", "--epochs=8", "--seed=5", "--threads=1"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    before = torch.get_num_threads()
    assert cli.main(["train", *ARGUMENTS, "--out", str(out)]) == 0
    torch.set_num_threads(before)
    return out


def assert_resumes(out, uninterrupted, capsys):
    """A broken run's directory: the same command with --resume ends as the run that nothing stopped."""
    assert not (out / "report.json").exists()
    assert cli.main(["train", *ARGUMENTS, "--out", str(out), "--resume"]) == 0
    assert "resuming at epoch" in capsys.readouterr().out
    assert_equal(checkpoints.load(out / LAST), checkpoints.load(uninterrupted / LAST))


def test_a_killed_process_resumes_to_the_same_weights(tmp_path, uninterrupted, one_thread, capsys):
    command = [sys.executable, "-m", "acnet_kernels", "train", *ARGUMENTS, "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / BEST).exists():
        assert process.poll() is None, "ended before its first epoch"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.3))
    process.kill()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert "--resume goes on" not in output
    assert_resumes(tmp_path, uninterrupted, capsys)


def test_an_interrupted_run_resumes_to_the_same_weights(tmp_path, uninterrupted, one_thread, monkeypatch, capsys):
    """Ctrl-C at any step after the first epoch's; in this process, as nothing of it dies."""
    step, left = Trainer.train_step, [random.randrange(4, 20)]

    def interrupted(run, images, labels):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGINT)
        step(run, images, labels)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    assert cli.main(["train", *ARGUMENTS, "--out", str(tmp_path)]) == 128 + signal.SIGINT
    assert "--resume goes on" in capsys.readouterr().out
    assert_resumes(tmp_path, uninterrupted, capsys)


def test_a_second_signal_acts_as_before():
    def handler(number, frame):
        raise InterruptedError

    before = signal.signal(signal.SIGINT, handler)
    try:
        with interrupt.catching() as stopping:
            assert not stopping()
            os.kill(os.getpid(), signal.SIGINT)
            assert stopping()
            assert stopping.exit_code == 130
            with pytest.raises(InterruptedError):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("change", "said"), [({"lr": 0.2}, "has lr 0.1, got 0.2"), ({"limit": 90}, "has limit 100, got 90")]
)
def test_another_recipe_is_not_resumed(tmp_path, change, said):
    state = trainer().state_dict()
    other = trainer(**change)
    before = {name: value.clone() for name, value in other.model.state_dict().items()}
    with pytest.raises(UserError, match=said):
        other.load_state_dict(state)
    assert_equal(dict(other.model.state_dict()), before)


def test_learning_rate_falls_to_zero_along_the_cosine(tmp_path):
    run = trainer(bias_lr_factor=2.0)
    parameter = nn.Parameter(torch.zeros(()))
    theirs = torch.optim.SGD([parameter], 0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=6)
    seen = []

    class Watch(Silent):
        def step(self, images):
            seen.append([group["lr"] for group in run.optimizer.param_groups])

    run.run(tmp_path, Watch())
    for weights, biases in seen:
        assert weights == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-6)
        assert biases == 2 * weights
        theirs.step()
        schedule.step()
    assert len(seen) == 6
    assert theirs.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_only_biases_are_in_the_second_group_and_all_decay_alike():
    run = trainer(bias_lr_factor=2.0, weight_decay=0.03)
    names = {id(p): name for name, p in run.model.named_parameters()}
    weights, biases = ({names[id(p)] for p in group["params"]} for group in run.optimizer.param_groups)
    assert biases == {name for name in names.values() if name.endswith(".bias")}
    assert weights | biases == set(names.values())
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.03, 0.03]
    assert [group["momentum"] for group in run.optimizer.param_groups] == [0.9, 0.9]


def test_it_learns(tmp_path):
    observer = Silent()
    trainer(test_limit=None, epochs=3, limit=None, batch_size=64).run(tmp_path, observer)
    first, last = observer.rows[0], observer.rows[-1]
    assert last["train_loss"] < 0.5 * first["train_loss"]
    assert last["test_accuracy"] > 0.7
    best = checkpoints.load(tmp_path / BEST)
    assert best["accuracy"] == max(row["test_accuracy"] for row in observer.rows)


def test_a_diverging_run_says_why(tmp_path):
    with pytest.raises(UserError, match=r"training loss of epoch \d is nan: --lr 1e\+30 is too high"):
        trainer(lr=1e30, block="plain").run(tmp_path, Silent())


def test_saving_leaves_the_old_file_whole_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    checkpoints.save({"a": torch.ones(3)}, path)

    def fail(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoints.save({"a": torch.zeros(3)}, path)
    monkeypatch.undo()
    assert torch.equal(checkpoints.load(path)["a"], torch.ones(3))
    assert os.listdir(tmp_path) == ["x.pt"]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_broken_checkpoint_is_named(tmp_path, content):
    path = tmp_path / LAST
    checkpoints.save({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    with pytest.raises(UserError, match=r"last\.pt is no intact checkpoint"):
        checkpoints.load(path)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The checkpoint of a run that was stopped within its second epoch: its state and its bytes."""
    out = tmp_path_factory.mktemp("stopped")
    counter = StopAfter(4)
    trainer().run(out, counter, counter.reached)
    return checkpoints.load(out / LAST), (out / LAST).read_bytes()


def damage(content, rng):
    """The bytes with one thing done to them that disks, networks and people do."""
    size = len(content)
    at, end = sorted(rng.sample(range(size), 2))
    near = [rng.randrange(min(size, 2000)), size - 1 - rng.randrange(min(size, 20_000)), at]  # the headers, too
    spot = rng.choice(near)
    return rng.choice(
        (
            content[:at],
            content[at:],
            content[:at] + content[end:],
            content[:at] + bytes(end - at) + content[end:],
            content[:end] + content[at:],
            *(content[:spot] + bytes((content[spot] ^ 1 << rng.randrange(8),)) + content[spot + 1 :],) * 5,
            content[:spot] + rng.randbytes(16) + content[spot + 16 :],
        )
    )


def what_is_said(call, *arguments):
    """The message of the UserError that the call raises, or None."""
    try:
        call(*arguments)
    except UserError as error:
        return str(error)
    return None


def test_a_damaged_file_is_refused(tmp_path, stopped):
    rng, path = random.Random(7), tmp_path / LAST
    for _ in range(200):
        path.write_bytes(damage(stopped[1], rng))
        with pytest.raises(UserError, match=f"^{path} is no intact checkpoint: [^\n]*$"):
            checkpoints.load(path)


@pytest.mark.parametrize("seed", range(3))
def test_every_bit_counts(tmp_path, seed):
    path, rng = tmp_path / "x.pt", random.Random(seed)
    checkpoints.save({"a": {"b": torch.ones(3), "c": torch.zeros(2)}}, path)
    whole = path.read_bytes()
    for at in rng.sample(range(len(whole)), 500):
        path.write_bytes(whole[:at] + bytes((whole[at] ^ 1 << rng.randrange(8),)) + whole[at + 1 :])
        with pytest.raises(UserError, match=r"x\.pt is no intact checkpoint"):
            checkpoints.load(path)
    path.write_bytes(whole)
    assert torch.equal(torch.load(path, weights_only=True)["a"]["b"], torch.ones(3))


def places(state, path=()):
    """The keys that lead to each thing in a state; a few of a list's."""
    yield path
    if isinstance(state, dict):
        items = list(state.items())
    elif isinstance(state, (list, tuple)):
        items = list(enumerate(state))[:3]
    else:
        return
    for key, value in items:
        yield from places(value, (*path, key))


def with_another(state, path, make):
    """The state with the thing at path replaced; what is not on the path is shared."""
    if not path:
        return make(state)
    key, *rest = path
    inner = with_another(state[key], rest, make)
    if isinstance(state, dict):
        return {**state, key: inner}
    return type(state)(inner if i == key else value for i, value in enumerate(state))


WRONG = {
    "nothing": lambda value: None,
    "a string": lambda value: "17",
    "an empty list": lambda value: [],
    "an empty dict": lambda value: {},
    "a dict of other keys": lambda value: {"a": 1, 0: 2},
    "a number": lambda value: -3,
    "another number": lambda value: float("nan"),
    "a tensor": lambda value: torch.zeros(2, 7, 1),
    "another dtype": lambda value: value.to(torch.complex64) if isinstance(value, torch.Tensor) else None,
    "a tensor without values": lambda value: value.to("meta") if isinstance(value, torch.Tensor) else None,
    "a sparse tensor": lambda value: value.to_sparse() if isinstance(value, torch.Tensor) else None,
    "one more": lambda value: {**value, "more": 1} if isinstance(value, dict) else [value],
    "itself": lambda value: (loop := {"inner": value}).update(outer=loop) or loop,
}
# What is not read, and numbers of which any other is as good.
FREE = {"param_groups", "history", "best", "random", "cuda"}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_checkpoint_of_wrong_types_is_refused_and_changes_nothing(tmp_path, stopped, wrong):
    state, _ = stopped
    rng, run = random.Random(wrong), trainer()  # other places for each
    before, draws = copy.deepcopy(run.state_dict()), checkpoints.random_state()
    every = list(places(state))[1:]
    for place in [*(p for p in every if len(p) == 1), *rng.sample(every, 15)]:
        spoilt = with_another(state, place, WRONG[wrong])
        said = what_is_said(run.load_state_dict, spoilt)
        if said is None:
            same = (place, wrong) == (("scaler",), "an empty dict")
            assert same or FREE & set(place), f"{place} may not be {wrong}"
            random.gauss(0, 1), np.random.randn(3), torch.rand(3)
            run.load_state_dict(before)
        else:
            assert "\n" not in said
            assert_equal(run.state_dict(), before)
            assert_equal(checkpoints.random_state(), draws)
    checkpoints.save(with_another(state, ("model",), WRONG[wrong]), tmp_path / LAST)
    with pytest.raises(UserError, match=f"^{tmp_path / LAST} (cannot be resumed: its model is|is no)"):
        run.resume(tmp_path / LAST)


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"not a checkpoint", "half", "flipped", "of another program", "a list", "code"]
)
def test_train_answers_a_damaged_checkpoint_with_one_sentence(tmp_path, stopped, content, capsys):
    state, whole = stopped
    path = tmp_path / LAST
    if content == "a list":
        checkpoints.save([state], path)
    elif content == "of another program":
        checkpoints.save({"model": state["model"], "epoch": 3}, path)
    elif content == "code":
        checkpoints.save({"model": interrupt.StopRequest()}, path)
    else:
        flipped = whole[:50_000] + bytes((whole[50_000] ^ 64,)) + whole[50_001:]
        path.write_bytes({"half": whole[: len(whole) // 2], "flipped": flipped}.get(content, content))
    before = path.read_bytes()
    arguments = ["--net=resnet8", "--limit=100", "--batch-size=40", "--epochs=2", "--seed=3", "--resume"]
    assert cli.main(["train", *arguments, "--out", str(tmp_path)]) == 2
    printed, errors = capsys.readouterr()
    assert (printed, errors.count("\n")) == ("", 1)
    assert str(path) in errors
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [LAST]


@pytest.mark.parametrize("room", [0, 300_000])
def test_a_file_that_cannot_be_written_costs_nothing_of_the_old_one(tmp_path, stopped, capsys, room):
    """No room at all, and room for some of it."""
    (tmp_path / LAST).write_bytes(stopped[1])
    arguments = ["--net=resnet8", "--limit=100", "--batch-size=40", "--epochs=2", "--seed=3", "--resume"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        code = cli.main(["train", *arguments, "--out", str(tmp_path)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert code == 1
    # Among them may be warnings of packages that wanted a file, too.
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == f"python -m acnet_kernels train: {tmp_path / LAST}: File too large"
    assert said.count(said[-1]) == 1
    assert not any("Traceback" in line for line in said)
    assert (tmp_path / LAST).read_bytes() == stopped[1]
    assert os.listdir(tmp_path) == [LAST]


SHORT = ["train", "--net=resnet8", "--limit=32", "--batch-size=32", "--epochs=1", "--out"]


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("short")
    assert cli.main([*SHORT, str(out)]) == 0
    return out


@pytest.mark.parametrize("full", [BEST, "folded.pt", "report.json", "curves.png", "kernels.png"])
def test_a_full_disk_is_one_sentence_whatever_is_being_written(tmp_path, short_run, monkeypatch, capsys, full):
    shutil.copytree(short_run, tmp_path, dirs_exist_ok=True)
    arguments = [*SHORT, str(tmp_path)]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / LAST).unlink()
    fsync = os.fsync

    def fail(handle):
        if full in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", fail)
    capsys.readouterr()
    assert cli.main(arguments) == 1
    assert capsys.readouterr().err == f"python -m acnet_kernels train: {tmp_path / full}: No space left on device\n"
    assert (tmp_path / full).read_bytes() == before[full]
    assert not [path for path in os.listdir(tmp_path) if path.startswith(".")]


def test_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        checkpoints.save({"a": torch.ones(3)}, tmp_path / "a.pt")
        report.write_json({}, tmp_path / "a.json")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_what_a_killed_process_leaves_is_gone_after_the_next_write(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    checkpoints.save({"a": torch.ones(3)}, path)
    child = os.fork()  # a process of its own would import for seconds what this one has
    if child == 0:
        monkeypatch.setattr(os, "fsync", lambda handle: os.kill(os.getpid(), signal.SIGKILL))
        try:
            checkpoints.save({"a": torch.zeros(9)}, path)
        finally:
            os._exit(1)  # what follows is the parent's
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2
    assert torch.equal(checkpoints.load(path)["a"], torch.ones(3))
    checkpoints.save({"a": torch.ones(3)}, path)
    assert os.listdir(tmp_path) == ["x.pt"]


def test_random_states_come_back():
    def draw():
        return random.random(), float(np.random.rand()), torch.rand(2)

    state = checkpoints.random_state()
    expected = draw()
    draw()
    checkpoints.set_random_state(state)
    assert_equal(draw(), expected)


def test_fold_check_sees_what_differs():
    run = trainer()
    for images, labels in run.data.train_batches(0, 0, 50):
        run.train_step(images, labels)
    folded = fuse(run.model.eval())
    check = check_fold(run.model, folded, run.data, 40)
    assert check.images == 90
    assert 0 < check.max_relative_difference < 1e-5
    assert check.differing_predictions == 0
    assert check.accuracy_folded == check.accuracy_unfolded == run.evaluate()[1]
    with torch.no_grad():
        folded.classifier.bias[4] += 1e4
    wrong = check_fold(run.model, folded, run.data, 40)
    images, labels = next(run.data.test_batches(90))
    assert wrong.differing_predictions == int((run.model(images).argmax(1) != 4).sum())
    assert wrong.accuracy_folded == pytest.approx(float((labels == 4).float().mean()))
    assert wrong.accuracy_unfolded == check.accuracy_unfolded
    assert wrong.max_relative_difference > 100


def test_kernel_magnitudes_of_hand_made_kernels():
    # Skeleton 2 and corners 1, in one layer ten times as large and negative: A has 0.5 in the corners.
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 3), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, (1, 3)))
    kernel = torch.tensor([[1.0, 2, 1], [2, 2, 2], [1, 2, 1]])
    for conv, scale in ((model[0], 1.0), (model[1], -10.0)):
        conv.weight.data.copy_(scale * kernel)
    layers = report.kernel_magnitudes(model)
    assert list(layers) == ["0", "1"]
    assert torch.equal(report.mean_magnitude(layers), (kernel / 2).double())
    assert report.kernel_magnitudes(nn.Linear(2, 2)) == {}


def test_plots_are_pictures(tmp_path):
    row = {"train_loss": 1.0, "test_loss": 2.0, "train_accuracy": 0.5, "test_accuracy": 0.4}
    rows = [{**row, "epoch": epoch} for epoch in (1, 2)]
    report.plot_curves({"plain": rows, "ACNet": rows}, "title", tmp_path / "curves.png")
    report.plot_kernels({"plain": torch.rand(3, 3), "ACNet": torch.rand(5, 5)}, "title", tmp_path / "kernels.png")
    for name in ("curves.png", "kernels.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 700
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20


@pytest.mark.parametrize(
    "errors",
    [(0.5, 0.08, 0.004), (0.134, 0.128, 0.122), (0.93, 0.91), (0.37, 0.22), (0.002, 0.0013), (0.0, 0.0), (0.25,)],
)
def test_the_axes_of_the_curves_have_ticks(tmp_path, monkeypatch, errors):
    axes = []

    def new_figure(*args, make=report.new_figure, **kwargs):
        figure, found = make(*args, **kwargs)
        axes.extend(found)
        return figure, found

    monkeypatch.setattr(report, "new_figure", new_figure)
    rows = [
        {
            "epoch": i,
            "train_loss": 1 / i,
            "test_loss": 2 / i,
            "train_accuracy": 1 - e,
            "test_accuracy": 1 - 1.03 * e,
        }
        for i, e in enumerate(errors, 1)
    ]
    report.plot_curves({"plain": rows}, "title", tmp_path / "curves.png")
    for axis in (axes[0].xaxis, axes[1].xaxis, axes[1].yaxis):
        low, high = sorted(axis.get_view_interval())
        shown = [tick for tick in axis.get_major_locator()() if low <= tick <= high]
        if axis.axis_name == "x":
            assert shown == list(range(1, len(errors) + 1))
        else:
            assert len(shown) > 2


def test_saved_activations_count_each_storage_once():
    n, classes = 6, 5
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4 * 4, classes))
    images, labels = torch.randn(n, 2, 6, 6), torch.randint(classes, (n,))
    # x, ReLU's result (which Linear saves again), log-softmax's result, the labels and the loss's total weight.
    expected = 4 * n * 2 * 6 * 6 + 4 * n * 3 * 4 * 4 + 4 * n * classes + 8 * n + 4
    assert measure.saved_activation_bytes(model, images, labels) == expected


def test_measured_calls_take_turns():
    calls = []
    times = {"a": lambda: calls.append("a"), "b": lambda: (calls.append("b"), time.sleep(0.002))}
    medians = measure.interleaved_medians(times, rounds=3, warm_up=2)
    assert calls == ["a", "b"] * 5
    assert medians["b"] >= 0.002 > medians["a"]
