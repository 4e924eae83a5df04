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


def prefixed(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


def inside(state, wrapper):
    """Names as they are where every child of the network was wrapped."""
    return {name.replace(".", f".{wrapper}.", 1): value for name, value in state.items()}


def averaged(state):
    """torch.optim.swa_utils.AveragedModel's state dict."""
    return {"n_averaged": torch.tensor(3), **prefixed(state, "module.")}


def trained_with(state):
    """What a training script keeps beside the network, with tensors and keys that are no strings."""
    moments = {i: {"exp_avg": value.clone(), "step": 3} for i, value in enumerate(state.values())}
    return {"epoch": 3, "lr": 0.1, "args": ["--lr", "0.1"], "optimizer": {"state": moments, "param_groups": [{}]}}


FOREIGN = {
    "compiled children": lambda s: inside(s, "_orig_mod"),
    "compiled and parallel children": lambda s: inside(inside(s, "_orig_mod"), "module"),
    "fully sharded": lambda s: prefixed(inside(s, "_fsdp_wrapped_module"), "_fsdp_wrapped_module."),
    "Lightning": lambda s: {
        "state_dict": {**prefixed(s, "model."), "criterion.weight": torch.ones(3)},
        "pytorch-lightning_version": "2.5",
        "loops": {"fit_loop": {"state_dict": {}}},
        "optimizer_states": [trained_with(s)["optimizer"]],
    },
    "Lightning, compiled": lambda s: {"state_dict": prefixed(s, "net.model._orig_mod.")},
    "a script's": lambda s: {"model": s, **trained_with(s)},
    "averaged": averaged,
    "averaged, nested": lambda s: {"model_ema": averaged(s), **trained_with(s)},
    "timm, average alone": lambda s: {"state_dict_ema": s, "arch": "resnet", "metric": 76.5},
    "shadow": lambda s: {"ema": {"shadow": s, "decay": 0.999}, "model": None},
    "deep": lambda s: {"a": {"b": {"c": {"d.e": prefixed(s, "f.g.")}}}},
    "another network around it": lambda s: {**prefixed(s, "backbone."), "head.weight": torch.ones(2, 5)},
    "tied, so there twice": lambda s: {**prefixed(s, "model."), **prefixed(s, "teacher.student.")},
    "one dictionary under two names": lambda s: {"net": s, "best": s},
    "containing itself": lambda s: (d := {"model": s}).update(again=d, deeper={"d": d}) or d,
}


@pytest.mark.parametrize("wrapping", FOREIGN)
@pytest.mark.parametrize("form", ["training", "deployed", "folded on loading"])
def test_the_model_is_found_wherever_it_is(wrapping, form, tmp_path):
    source, target, x = pair()
    if form == "deployed":
        source = ak.fuse(source, keep_blocks=True)
    if form != "training":
        target = ak.fuse(target, keep_blocks=True)
    want = source(x)
    path = tmp_path / "net.pt"
    torch.save(FOREIGN[wrapping](source.state_dict()), path)
    checkpoint.load(target, path)
    if form == "folded on loading":
        assert rel(target(x), want) < 1e-5
    else:
        assert torch.equal(target(x), want)


def test_an_average_without_buffers_is_passed_over():
    source, target, x = pair()
    state = source.state_dict()
    average = {name: value + 1 for name, value in source.named_parameters()}
    assert torch.equal(checkpoint.load(target, {"shadow": average, "model": state})(x), source(x))
    refused(target, {"shadow": average}, "at 'shadow': missing 0.square_bn.running_mean")


def test_a_model_with_compiled_and_parallel_children_takes_a_bare_checkpoint():
    source, target, x = pair()
    wrapped = nn.Sequential(*target)
    wrapped[0], wrapped[2] = torch.compile(target[0], backend="eager"), nn.DataParallel(target[2])
    for state in (source.state_dict(), {"state_dict": prefixed(inside(source.state_dict(), "module"), "net.")}):
        scramble(target)
        checkpoint.load(wrapped, state)
        assert torch.equal(target(x), source(x))


def test_a_model_whose_own_names_are_like_a_wrappers():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.weight = nn.Conv2d(2, 2, 1, bias=False), nn.Parameter(torch.randn(2, 2, 1, 1))

    source, target = Scaled(), Scaled()
    for state in (source.state_dict(), {"state_dict": prefixed(source.state_dict(), "model.")}):
        scramble(target)
        checkpoint.load(target, state)
        assert torch.equal(target.weight, source.weight)
        assert torch.equal(target.module.weight, source.module.weight)


SEVERAL = {
    "timm": (lambda a, b: {"state_dict": a, "state_dict_ema": b, "epoch": 3}, "state_dict", "state_dict_ema"),
    "Lightning": (
        lambda a, b: {"state_dict": {**prefixed(a, "model."), **prefixed(averaged(b), "ema.")}},
        "state_dict/model.",
        "state_dict/ema.",
    ),
    "average among the weights": (lambda a, b: {**a, **prefixed(b, "module.")}, "", "module."),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_several_that_fit_are_listed_and_chosen_by_name(case):
    wrap, *labels = SEVERAL[case]
    (raw, average, x), target = pair(), pair()[0]
    state, before = wrap(raw.state_dict(), average.state_dict()), copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError, match="fits the model in 2 places: choose one by within=") as raised:
        checkpoint.load(target, state)
    assert all(repr(label) in str(raised.value) for label in labels)
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())
    with pytest.raises(ValueError, match=r"within must be one of .*, got 'other'"):
        checkpoint.load(target, state, within="other")
    if case != "average among the weights":  # where the weights' own dictionary has the average's names too
        assert torch.equal(checkpoint.load(target, state, within=labels[0])(x), raw(x))
    assert torch.equal(checkpoint.load(target, state, within=labels[1])(x), average(x))


def test_where_nothing_fits_the_nearest_is_explained_and_the_rest_listed():
    source, target, _ = pair()
    state = source.state_dict()
    whole = {k: v for k, v in state.items() if k != "0.hor_conv.weight"}
    half = {k: v for k, v in state.items() if k.startswith("0.")}
    words = r"does not fit the model, at 'ema': missing 0\.hor_conv\.weight; nor does what is at 'model/net\.'$"
    with pytest.raises(ValueError, match=words):
        checkpoint.load(target, {"model": prefixed(half, "net."), "ema": whole, **trained_with(state)})


def test_a_block_is_found_in_a_network_where_it_is_the_only_one_of_its_kind():
    source, _, x = pair()
    block = ACBlock(3, 4, 3, padding=1).eval()
    checkpoint.load(block, source.state_dict())
    assert torch.equal(block(x), source[0](x))
    twice = nn.Sequential(source[0], copy.deepcopy(source[0]))
    scramble(twice[1])
    with pytest.raises(ValueError, match=r"in 2 places: choose one by within=, of '0\.', '1\.'"):
        checkpoint.load(block, twice.state_dict())


def test_a_block_that_is_there_twice_is_folded_twice():
    source = scramble(ACBlock(4, 4, 3, padding=1).eval())
    deployed = ACBlock(4, 4, 3, padding=1, deploy=True).eval()
    x = torch.randn(1, 4, 5, 5)
    target = checkpoint.load(nn.Sequential(deployed, deployed), nn.Sequential(source, source).state_dict())
    assert rel(target(x), source(source(x))) < 1e-5


# --- what loses something, or is no state dict ------------------------------------------------------------


def refused(target, state, words):
    """load() raises and leaves target as it was."""
    before = copy.deepcopy(target.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=words):
            checkpoint.load(target, state)
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


def test_a_file_that_contains_only_itself_is_no_state_dict(tmp_path):
    loop = {"epoch": 3}
    loop["self"] = loop["model"] = {"again": loop}
    torch.save(loop, tmp_path / "loop.pt")
    refused(pair()[0], tmp_path / "loop.pt", "no state dict found")


def test_dictionaries_without_end_are_not_searched_for_ever():
    source, target, x = pair()
    wide = {}
    for _ in range(64):  # 2^64 ways to the bottom
        wide = {"a": wide, "b": wide}
    refused(target, wide, "no state dict found")
    assert torch.equal(checkpoint.load(target, {**wide, "model": source.state_dict()})(x), source(x))
    deep = {"model": source.state_dict()}
    for _ in range(50_000):
        deep = {"a": deep}
    refused(target, deep, "no state dict found")
    while deep:
        deep = deep.get("a")  # a level at a time: Python's own clearing recurses


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({0: torch.ones(3), 1: torch.ones(3)}, "no state dict found: .*; the keys are 0, 1$"),
        ({"model": {("a", 1): torch.ones(3)}}, "no state dict found"),
        ({}, "no state dict found"),
    ],
)
def test_keys_that_are_no_names(state, words):
    refused(pair()[0], state, words)
    listed = nn.ParameterList([torch.zeros(3), torch.zeros(3)])  # whose names are '0' and '1'
    refused(listed, state, words)


def test_an_int_key_among_names_is_left_over():
    source, target, _ = pair()
    refused(target, {**source.state_dict(), 7: torch.ones(1)}, "unexpected <int 7>")


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        (
            "0.square_conv.weight",
            lambda t: t.to(torch.complex64),
            "torch.complex64, which .* hold as torch.float32",
        ),
        ("0.square_bn.bias", lambda t: torch.complex(t, t), "torch.complex64, which .* hold as torch.float32"),
        ("0.hor_conv.weight", lambda t: t.to("meta"), "torch.float32 on meta, which .* hold as torch.float32"),
        ("0.hor_conv.weight", lambda t: t.to_sparse(), "torch.float32 in torch.sparse_coo, which"),
        ("0.hor_bn.running_var", lambda t: t.tolist(), "a list, which .* hold as torch.float32"),
        ("0.hor_bn.running_var", lambda t: t.numpy(), "a ndarray, which .* hold as torch.float32"),
        ("0.hor_bn.running_var", lambda t: t.double() * 1e300, "torch.float64, which .* hold as torch.float32"),
        ("0.hor_bn.num_batches_tracked", lambda t: t + 0.5, "torch.float32, which .* hold as torch.int64"),
        ("0.hor_bn.num_batches_tracked", lambda t: t * torch.nan, "torch.float32, which .* hold as torch.int64"),
        ("0.hor_bn.num_batches_tracked", lambda t: int(t), "a int, which .* hold as torch.int64"),
    ],
)
def test_what_would_lose_something_is_refused(name, spoil, words):
    source, target, _ = pair()
    state = dict(source.state_dict())
    state[name] = spoil(state[name])
    refused(target, state, f"{name} is {words}")


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("square_conv.weight", lambda t: t.to(torch.complex64), "weight of branch 0 must be float32"),
        ("square_bn.bias", lambda t: torch.complex(t, t), "beta of branch 0 must be float32"),
        ("hor_conv.weight", lambda t: t.to("meta"), "hor_conv.weight must be .*, got torch.float32 on meta"),
        (
            "hor_conv.weight",
            lambda t: t.to_sparse(),
            "hor_conv.weight must be .*, got torch.float32 in torch.sparse_coo",
        ),
        ("hor_conv.weight", lambda t: t[:1], r"weight of branch 1 must have shape \(4, 3, 1, 3\)"),
        ("hor_bn.running_var", lambda t: t.tolist(), "hor_bn.running_var must be .*, got a list"),
    ],
)
def test_what_cannot_be_folded_is_refused(name, spoil, words):
    source, target, _ = pair()
    state = dict(source.state_dict())
    state[f"0.{name}"] = spoil(state[f"0.{name}"])
    refused(ak.fuse(target, keep_blocks=True), state, f"does not fit the model: 0.: .*{words}")


def test_what_loses_digits_alone_is_taken():
    source, target, x = pair()
    state = {n: v.double() if v.is_floating_point() else v.float() for n, v in source.state_dict().items()}
    assert torch.equal(checkpoint.load(target, state)(x), source(x))
    checkpoint.load(target.bfloat16(), state)


def test_nothing_of_a_block_is_dropped_when_it_is_folded():
    source, target, _ = pair()
    state = source.state_dict()
    del state["0.hor_conv.weight"]
    refused(ak.fuse(target, keep_blocks=True), state, "unexpected 0.hor_bn.weight; unexpected 0.hor_bn.bias; ")


@pytest.mark.parametrize("end", ["pt", "safetensors"])
def test_a_damaged_file_is_named(end, tmp_path):
    source, target, _ = pair()
    path = tmp_path / f"net.{end}"
    (save_file if end == "safetensors" else torch.save)(source.state_dict(), path)
    whole = path.read_bytes()
    for content in (b"", b"\0" * 100, whole[:1000], whole[: len(whole) // 2], whole[:-30]):
        path.write_bytes(content)
        refused(target, path, rf"net\.{end} is no intact checkpoint")


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
