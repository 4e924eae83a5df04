"""load(): wrapped, nested, old, folded and wrong checkpoints."""

import copy
import warnings

import pytest
import torch
from oracle import rel, scramble
from safetensors.torch import save_file
from torch import nn

import acnet_kernels as ak
from acnet_kernels import ACBlock, checkpoint


def network(deploy=False, **options):
    blocks = [
        ACBlock(3, 4, 3, padding=1, deploy=deploy, **options),
        nn.ReLU(),
        ACBlock(4, 4, 5, deploy=deploy, **options),
    ]
    return nn.Sequential(*blocks, nn.Flatten(), nn.LazyLinear(2))


def pair(**options):
    """A network with random state, one with another, and an input."""
    x = torch.randn(2, 3, 8, 8)
    nets = [network(**options), network(**options)]
    for net in nets:
        scramble(net.eval())
        net(x)
    return (*nets, x)


WRAPPINGS = {
    "plain": lambda s: s,
    "data parallel": lambda s: {f"module.{k}": v for k, v in s.items()},
    "compiled data parallel": lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
    "nested": lambda s: {"epoch": 3, "model": {"state_dict": s}},
    "no counters": lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("deploy", [False, True])
def test_round_trips(wrapping, deploy, tmp_path):
    source, target, x = pair()
    if deploy:
        source, target = ak.fuse(source, keep_blocks=True), ak.fuse(target, keep_blocks=True)
    want = source(x)
    assert rel(target(x), want) > 1e-2
    path = tmp_path / "net.pt"
    torch.save(WRAPPINGS[wrapping](source.state_dict()), path)
    assert checkpoint.load(target, path) is target
    assert torch.equal(target(x), want)


def test_safetensors_and_str_paths(tmp_path):
    source, target, x = pair()
    save_file(source.state_dict(), tmp_path / "net.safetensors")
    checkpoint.load(target, str(tmp_path / "net.safetensors"))
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize(
    "options", [{}, {"norm": "sum"}, {"branches": ("square", "hor")}, {"use_affine": False}, {"eps": 0.1}]
)
def test_branches_fold_into_a_deployed_model(options):
    source, _, x = pair(**options)
    target = network(deploy=True, **options).eval()
    target(x)
    checkpoint.load(target, source.state_dict())
    assert rel(target(x), source(x)) < 1e-5


def test_a_wrapped_model_takes_a_bare_checkpoint():
    source, target, x = pair()
    checkpoint.load(nn.DataParallel(target), source.state_dict())
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s: s.pop("0.hor_conv.weight"), "missing 0.hor_conv.weight"),
        (lambda s: s.update(extra=torch.ones(1)), "unexpected extra"),
        (
            lambda s: s.update({"0.square_bn.bias": torch.ones(5)}),
            r"0.square_bn.bias has shape \(5,\), the model wants \(4,\)",
        ),
    ],
)
def test_what_does_not_fit_changes_nothing(spoil, words):
    source, target, _ = pair()
    before = copy.deepcopy(target.state_dict())
    state = dict(source.state_dict())
    spoil(state)
    with pytest.raises(ValueError, match=words):
        checkpoint.load(target, state)
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


def test_refusals(tmp_path):
    source, target, _ = pair()
    with pytest.raises(ValueError, match="branches cannot be recovered"):
        checkpoint.load(target, ak.fuse(source, keep_blocks=True).state_dict())
    with pytest.raises(ValueError, match="no state dict found"):
        checkpoint.load(target, {"epoch": 3})
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoint.load(target, tmp_path / "nothing.pt")
    with pytest.raises(TypeError, match="source must be"):
        checkpoint.load(target, 3)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list"):
        checkpoint.load(target, tmp_path / "list.pt")
    state = {k: v for k, v in source.state_dict().items() if "running" not in k}
    with pytest.raises(ValueError, match="no running statistics"):
        checkpoint.load(ak.fuse(target, keep_blocks=True), state)


def test_files_with_code_are_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return warnings.warn, ("code ran",)

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Exception, match="weights_only"):
            checkpoint.load(network(), tmp_path / "evil.pt")


def test_the_original_codes_names_load():
    """A module with the original's attributes and crop layers, none of ours."""

    class Original(nn.Module):
        def __init__(self, c, k):
            super().__init__()
            self.square_conv = nn.Conv2d(c, k, 3, padding=1, bias=False)
            self.square_bn = nn.BatchNorm2d(k)
            self.ver_conv_crop_layer, self.hor_conv_crop_layer = nn.Identity(), nn.Identity()
            self.ver_conv = nn.Conv2d(c, k, (3, 1), padding=(1, 0), bias=False)
            self.hor_conv = nn.Conv2d(c, k, (1, 3), padding=(0, 1), bias=False)
            self.ver_bn, self.hor_bn = nn.BatchNorm2d(k), nn.BatchNorm2d(k)

        def forward(self, x):
            y = self.square_bn(self.square_conv(x)) + self.ver_bn(self.ver_conv(x))
            return y + self.hor_bn(self.hor_conv(x))

    theirs, ours = scramble(Original(3, 4)), ACBlock(3, 4, 3, padding=1)
    checkpoint.load(ours, {"model": theirs.state_dict()})
    x = torch.randn(2, 3, 8, 8)
    for training in (False, True):
        assert rel(ours.train(training)(x), theirs.train(training)(x)) < 1e-6
