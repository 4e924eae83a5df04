"""The command line as a user meets it."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from acnet_kernels import cli
from acnet_kernels.paper.training import demo

SMALL = ["--net", "resnet8", "--limit", "64", "--batch-size", "32", "--epochs", "2"]
ROOT = Path(__file__).parent.parent


def run(capsys, *argv):
    """(exit code, stdout, stderr) of the command."""
    try:
        code = cli.main([str(a) for a in argv])
    except SystemExit as exit:
        code = exit.code
    return (code, *capsys.readouterr())


@pytest.mark.parametrize("block", ["acb", "plain"])
def test_train_reports_what_it_did(tmp_path, capsys, block):
    out = tmp_path / "a [run]"
    code, printed, errors = run(capsys, "train", *SMALL, "--block", block, "--out", out)
    assert (code, errors) == (0, "")
    content = json.loads((out / "report.json").read_text())
    assert f"test accuracy {content['final']['test_accuracy']:.2%} after the last epoch" in printed
    assert printed.count("epoch   ") == 2
    assert str(out) in printed
    assert [row["epoch"] for row in content["history"]] == [1, 2]
    assert content["data"]["train_images"] == content["recipe"]["limit"] == 64
    assert content["best"]["test_accuracy"] == max(row["test_accuracy"] for row in content["history"])
    assert torch.tensor(content["kernel_magnitude"]["mean"]).shape == (3, 3)
    folded = torch.load(out / "folded.pt", weights_only=True)
    assert sum(value.numel() for name, value in folded.items() if "fused" in name) > 0 or block == "plain"
    if block == "plain":
        assert content["fold"] is None
        assert "folded:" not in printed
    else:
        assert content["fold"]["differing_predictions"] == 0
        assert content["fold"]["max_relative_difference"] < 1e-5
        assert "0 of 360 predictions differ" in printed
        assert content["parameters"]["folded"] < content["parameters"]["trained"]
    for picture in ("curves.png", "kernels.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_one_seed_gives_one_result(tmp_path, capsys):
    states = []
    for name in ("a", "b"):
        assert run(capsys, "train", *SMALL, "--seed", 9, "--out", tmp_path / name)[0] == 0
        states.append(torch.load(tmp_path / name / "folded.pt", weights_only=True))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_finished_run_is_not_overwritten_but_can_be_reported_again(tmp_path, capsys):
    assert run(capsys, "train", *SMALL, "--out", tmp_path, "--resume")[0] == 0
    before = (tmp_path / "last.pt").read_bytes()
    code, _, errors = run(capsys, "train", *SMALL, "--out", tmp_path)
    assert (code, (tmp_path / "last.pt").read_bytes()) == (2, before)
    assert "already holds a run: continue it with --resume, or give another --out" in errors
    (tmp_path / "report.json").unlink()
    code, printed, _ = run(capsys, "train", *SMALL, "--out", tmp_path, "--resume")
    assert code == 0
    assert "resuming at epoch 3" in printed
    assert (tmp_path / "report.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--epochs 0", "argument --epochs: must be an int above 0, got '0'"),
        ("--epochs 2.5", "argument --epochs: must be an int above 0, got '2.5'"),
        ("--lr nan", "argument --lr: must be a float above 0, got 'nan'"),
        ("--weight-decay -1", "argument --weight-decay: must be a float from 0 on, got '-1'"),
        ("--net resnet9", "a CIFAR ResNet has 6n+2 layers"),
        ("--net vgg", "net must be"),
        ("--block acnet", "argument --block: invalid choice: 'acnet'"),
        ("--amp fp8", "argument --amp: invalid choice"),
        ("--backend fast", "argument --backend: invalid choice"),
        ("--block plain --backend eager", "--backend chooses how ACBlocks compute; --block plain has none"),
        ("--device gpu", "--device gpu cannot be used here"),
        ("--data mnist", "--data must be one of digits"),
        ("--data cifar10 --data-dir /nonexistent", "/nonexistent/data_batch_1.bin is missing"),
        ("--limit 2000", "--limit must be at most the 1437 training images there are, got 2000"),
        ("--out /dev/null", "--out /dev/null cannot be a directory"),
        ("--bogus", "unrecognized arguments: --bogus"),
    ],
)
def test_a_wrong_argument_gets_one_sentence(tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    code, printed, errors = run(capsys, "train", "--net", "resnet8", *arguments.split())
    assert (code, printed) == (2, "")
    assert said in errors
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_extras_doctor_works_and_the_rest_names_them():
    block = (
        "import sys; sys.modules.update(dict.fromkeys(['rich', 'matplotlib', 'sklearn', 'torchvision', 'PIL']));"
    )
    script = f"{block} from acnet_kernels.cli import main; print([main([name]) for name in sys.argv[1:]])"
    command = [sys.executable, "-c", script, "doctor", "train", "demo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *doctor, codes = done.stdout.splitlines()
    assert codes == "[0, 2, 2]"
    assert "torch" in "\n".join(doctor)
    said = done.stderr.splitlines()
    assert len(said) == 2
    for line, name in zip(said, ("train", "demo"), strict=True):
        assert name in line
        assert "rich and matplotlib are not installed; pip install 'acnet-kernels[demo]'" in line


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "acnet_kernels"]
    done = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in cli.COMMANDS)


def test_without_torch_a_command_says_so():
    command = [sys.executable, "-S", "-m", "acnet_kernels", "doctor"]  # -S: no installed packages
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "python -m acnet_kernels: PyTorch is not installed; pip install torch\n"


@pytest.fixture
def photographs(tmp_path):
    """The options that train on four pictures of 70×80 pixels, in two classes."""
    for part in ("train", "val"):
        for kind in ("cat", "dog"):
            (tmp_path / "data" / part / kind).mkdir(parents=True)
            Image.new("RGB", (80, 70)).save(tmp_path / "data" / part / kind / "0.png")
    return [
        "--data",
        tmp_path / "data",
        "--workers",
        0,
        "--batch-size",
        2,
        "--epochs",
        1,
        "--out",
        tmp_path / "out",
    ]


@pytest.mark.parametrize("net", ["resnet50", "vgg16", "resnet20"])
def test_a_network_for_small_images_is_not_trained_on_photographs(photographs, capsys, net):
    code, printed, errors = run(capsys, "train", "--net", net, *photographs)
    assert (code, printed, errors.count("\n")) == (2, "", 1)
    assert (
        f"net {net} is one for CIFAR's images, up to 64 pixels a side, and the data has images of 224×224" in errors
    )
    assert "resnet18" in errors  # one that is made for them
    assert not photographs[-1].exists()


def test_a_network_for_small_images_is_trained_on_photographs_made_small(photographs, capsys):
    assert run(capsys, "train", "--net", "resnet8", "--image-size", 16, *photographs)[::2] == (0, "")


def test_a_closed_pipe_is_no_traceback():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "acnet_kernels", "doctor"]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_demo_prints_its_table(tmp_path, capsys, monkeypatch):
    full = demo.recipe

    def short(block, fashion):
        return dataclasses.replace(full(block, False), epochs=1, limit=128)

    monkeypatch.setattr(demo, "recipe", short)
    monkeypatch.setattr(demo, "ROUNDS", 2)
    code, printed, errors = run(capsys, "demo", "--out", tmp_path)
    assert (code, errors) == (0, "")
    columns = json.loads((tmp_path / "demo.json").read_text())["rows"]
    assert columns["folded"]["differing_predictions"] == 0
    assert columns["folded"]["parameters"] < columns["ACNet"]["parameters"]
    assert columns["ACNet"]["saved_bytes"] > columns["plain"]["saved_bytes"] > 0
    assert f"{columns['plain']['test_accuracy']:.2%}" in printed
    for row in ("training step of 128, ms", "activations saved, MiB", "0 of 360"):
        assert row in printed
    assert (tmp_path / "kernels.png").exists()


def test_demo_takes_fashion_mnist_where_it_is_and_says_when_it_is_broken(tmp_path, capsys):
    assert demo.recipe("acb", True).data == "fashion-mnist"
    assert demo.recipe("acb", True).limit == 20_000
    code, _, errors = run(capsys, "demo", "--data-dir", tmp_path, "--out", tmp_path / "out")
    assert (code, "holds none of Fashion-MNIST's files" in errors) == (2, True)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"broken")
    code, printed, errors = run(capsys, "demo", "--data-dir", tmp_path, "--out", tmp_path / "out")
    assert (code, printed) == (2, "")
    assert "train-images-idx3-ubyte is no IDX file" in errors


def test_a_preset_gives_what_no_option_does(tmp_path, capsys):
    code, *_ = run(
        capsys, "train", "--epochs", 1, "--preset", "resnet56", *SMALL[:6], "--data", "digits", "--out", tmp_path
    )
    assert code == 0
    recipe = json.loads((tmp_path / "report.json").read_text())["recipe"]
    assert (recipe["epochs"], recipe["net"], recipe["batch_size"]) == (1, "resnet8", 32)
    assert (recipe["lr"], recipe["bias_lr_factor"], recipe["block"]) == (0.2, 2.0, "acb")
