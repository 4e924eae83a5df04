"""fuse_blocks against the definition in float64: the C++ operator and its PyTorch form, on the same inputs."""

from __future__ import annotations

import pytest
import torch
from fusion_cases import (
    CONFIGS,
    DTYPES,
    arguments,
    assert_close,
    mapped,
    random_step,
    strided,
    summed_maps,
    truth,
)
from oracle import reference_block, scramble
from torch import nn

import acnet_kernels as ak
from acnet_kernels.ops import _extension, fuse_blocks
from acnet_kernels.ops.fusion import fold_as_it_is, fold_steps

OP, OUT_OP = torch.ops.acnet_kernels.fuse_blocks.default, torch.ops.acnet_kernels.fuse_blocks_out.default


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")
    return request.param


@pytest.fixture(params=["operator", "pytorch"])
def run(request):
    """fuse_blocks as dispatched (C++ where it is built), and in PyTorch."""
    return (lambda *args: OP(*args)) if request.param == "operator" else fuse_blocks.fuse_blocks


def on(step, device):
    return mapped(step, lambda t: t.to(device))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_fold_is_the_sum_of_the_branches_maps(config):
    step = random_step(config, torch.float64, conv_bias=True)
    x = torch.randn(2, config.inputs * config.groups, config.kernel[0] + 3, config.kernel[1] + 2).double()
    ((weight, bias),) = fold_steps([step])
    got = nn.functional.conv2d(x, weight, bias, groups=config.groups)
    torch.testing.assert_close(got, summed_maps(step, x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("conv_bias", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(run, dtype, layout, conv_bias, device):
    steps = [random_step(config, dtype, conv_bias=conv_bias, layout=layout) for config in CONFIGS.values()]
    weights, biases = run(*arguments([on(step, device) for step in steps]))
    for step, weight, bias in zip(steps, weights, biases, strict=True):
        assert_close((weight, bias), truth(step), dtype)
        kernels = [branch.weight for branch in step.branches if branch.weight is not None]
        wanted = torch.contiguous_format if all(w.is_contiguous() for w in kernels) else torch.channels_last
        assert weight.is_contiguous(memory_format=wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_channels_last_weight_among_contiguous_ones(run, dtype, device):
    step = random_step(CONFIGS["RepVGG"], dtype)
    branches = list(step.branches)
    branches[0] = branches[0]._replace(weight=branches[0].weight.contiguous(memory_format=torch.channels_last))
    branches = [branches[1], branches[0], random_step(CONFIGS["cross"], dtype).branches[1]]
    step = step._replace(branches=tuple(branches))
    (weight,), (bias,) = run(*arguments([on(step, device)]))
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert_close((weight, bias), truth(step), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_norms_of_another_dtype(run, dtype, device):
    norms = (torch.float32, torch.float64, torch.bfloat16)
    steps = [random_step(CONFIGS[name], dtype, norm) for norm in norms for name in ("cross", "nested")]
    weights, biases = run(*arguments([on(step, device) for step in steps]))
    for step, *got in zip(steps, weights, biases, strict=True):
        assert_close(got, truth(step), dtype)


def test_any_strides(run, device):
    steps = [random_step(config) for config in CONFIGS.values()]
    args = arguments([on(step, device) for step in steps])
    args = [[strided(t) for t in tensors] for tensors in args[:6]] + list(args[6:])
    for step, *got in zip(steps, *run(*args), strict=True):
        assert_close(got, truth(step), torch.float32)


def test_unaligned_weights(run, device):
    step = random_step(CONFIGS["cross"])

    def moved(t):
        return t.new_empty(t.numel() + 1).narrow(0, 1, t.numel()).view_as(t).copy_(t)

    assert_close([t[0] for t in run(*arguments([mapped(on(step, device), moved)]))], truth(step), torch.float32)


def test_the_identitys_tap_is_where_it_is_put(run):
    weight = torch.zeros(4, 2, 3, 2)
    lists = ([weight], [], [], [], [], [], [2, 3, 2, 2], [0, 2, 1, 1, 1, 1, 1, 0, 0, 3, 2, 1], [0.0, 0.0])
    (folded,), (bias,) = run(*lists)
    expected = torch.zeros_like(weight)
    expected[range(4), [0, 1, 0, 1], 2, 1] = 1
    assert torch.equal(folded, expected)
    assert torch.equal(bias, torch.zeros(4))


@pytest.mark.parametrize("channels_last", [False, True])
def test_out_is_filled_and_its_version_counted(channels_last, device):
    steps = [random_step(config) for config in CONFIGS.values()]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = [(torch.full_like(w, float("nan")), torch.full_like(b, float("nan"))) for w, b in map(truth, steps)]
    out = [(w.float().to(device).contiguous(memory_format=layout), b.float().to(device)) for w, b in out]
    versions = [t._version for pair in out for t in pair]
    result = fold_steps([mapped(on(step, device), lambda t: t.requires_grad_()) for step in steps], out)
    assert all(r is o for pair, given in zip(result, out, strict=True) for r, o in zip(pair, given, strict=True))
    assert all(t._version > v for t, v in zip((t for pair in out for t in pair), versions, strict=True))
    for step, pair in zip(steps, out, strict=True):
        assert_close(pair, truth(step), torch.float32)
        assert not pair[0].requires_grad


def test_no_blocks():
    assert fold_steps([]) == []


@pytest.mark.parametrize(
    "name",
    ["cross", "5x5 in groups", "two", "norm of the sum", "RepVGG in groups", "nested", "even", "dilated", "holes"],
)
def test_gradients_of_every_tensor(name):
    config = CONFIGS[name]._replace(groups=min(CONFIGS[name].groups, 2))
    out = config.groups * (2 if name != "RepVGG in groups" else 1)
    inputs = out // config.groups if None in config.taps else 1
    args = arguments([random_step(config._replace(out=out, inputs=inputs), torch.float64, conv_bias=True)])
    flat = [t.detach().clone().requires_grad_() for tensors in args[:6] for t in tensors]
    lengths = [len(tensors) for tensors in args[:6]]

    def function(*tensors):
        weights, biases = OP(*map(list, split(tensors, lengths)), *args[6:])
        return (*weights, *biases)

    assert torch.autograd.gradcheck(function, flat, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, flat)


def split(tensors, lengths):
    start = 0
    for length in lengths:
        yield tensors[start : start + length]
        start += length


def test_a_frozen_tensor_gets_no_gradient():
    args = arguments([random_step(CONFIGS["nested"])])
    trained = [t.requires_grad_() for tensors in args[:3] for t in tensors]
    frozen = [args.weight[1].requires_grad_(False), *args.mean, *args.var]
    (weight,), (bias,) = OP(*args)
    (weight.sum() + bias.sum()).backward()
    assert all(t.grad is None for t in frozen)
    assert all(t.grad is not None for t in trained if t is not frozen[0])


def test_opcheck():
    names = ("shifted", "two", "RepVGG in groups", "nested", "all bare", "3x5")
    steps = [random_step(CONFIGS[name], conv_bias=name == "two") for name in names]
    steps.append(random_step(CONFIGS["shifted"], layout=torch.channels_last))
    args = arguments(steps)
    out = OP(*args)
    for t in (t for tensors in args[:3] for t in tensors):
        t.requires_grad_()
    torch.library.opcheck(OP, tuple(args))
    frozen = [[t.detach() for t in tensors] for tensors in args[:6]]
    torch.library.opcheck(OUT_OP, (*frozen, *args[6:], *out))


def test_schema_is_the_same_with_and_without_the_extension():
    for op, schema in zip((OP, OUT_OP), fuse_blocks.SCHEMAS, strict=True):
        assert str(op._schema) == str(torch._C.parse_schema("acnet_kernels::" + schema))


@pytest.mark.parametrize("name", ["cross", "RepVGG in groups", "nested"])
def test_compiles_without_a_break(name):
    step = mapped(random_step(CONFIGS[name]), lambda t: t.requires_grad_())
    leaves: list[torch.Tensor] = []
    mapped(step, leaves.append)
    trained = [
        t for t in leaves if all(t is not s for n in norms_of(step) for s in (n.running_mean, n.running_var))
    ]

    def total(step):
        return sum((w * w).sum() + b.sum() for w, b in fold_steps([step]))

    eager = total(step)
    eager_grads = torch.autograd.grad(eager, trained)
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")(step)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, trained), eager_grads)


def norms_of(step):
    return [n for n in (*(branch.norm for branch in step.branches), step.norm) if n is not None]


class Folded(nn.Module):
    """Returns what its lists of tensors fold into."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def forward(self, x):
        weight, bias = fold_steps([self.step])[0]
        return nn.functional.conv2d(x, weight, bias, groups=self.step.geometry.groups)


@pytest.mark.parametrize("name", ["cross", "RepVGG in groups", "nested"])
def test_exports(name):
    config = CONFIGS[name]
    module = Folded(random_step(config))
    x = torch.randn(2, config.inputs * config.groups, 5, 6)
    program = torch.export.export(module, (x,))
    assert "acnet_kernels" not in program.graph_module.code  # it runs where this package is not
    torch.testing.assert_close(program.module()(x), module(x))


def test_folding_follows_the_weights():
    block = scramble(ak.ACBlock(16, 16, 3, padding=1)).eval()
    x = torch.randn(2, 16, 5, 6)
    before = block(x)
    block.train()
    optimizer = torch.optim.SGD(block.parameters(), 0.5)
    block(x).square().sum().backward()
    optimizer.step()
    after = block.eval()(x)
    expected = reference_block(block.double(), x.double())
    assert (after.double() - expected).norm() <= 1e-5 * expected.norm()
    assert (after - before).norm() > 1e-2 * before.norm()


def spoil(field, index, value):
    def change(args):
        lists = [list(part) for part in args]
        at = fuse_blocks.Arguments._fields.index(field)
        if index is None:
            lists[at].append(value)
        else:
            lists[at][index] = value
        return lists

    return change


# Of two blocks of three branches in 3×3, the second in two groups with an identity and a norm of the sum.
BAD = {
    "length": (spoil("gamma", None, torch.ones(4)), "gamma must have 6 entries, got 7"),
    "blocks": (spoil("blocks", None, 3), "blocks must have 8 entries, got 9"),
    "branches": (spoil("branches", None, 3), "branches must have 42 entries, got 43"),
    "epsilons": (spoil("eps", None, 3.0), "eps must have 7 entries, got 8"),
    "none": (spoil("blocks", 4, 0), "block 1 must have from 1 to 64 branches, got 0"),
    "too many": (spoil("blocks", 4, 66), "block 1 must have from 1 to 64 branches, got 66"),
    "kernel": (spoil("blocks", 6, 256), r"block 1: kernel must be from 1 to 255 a side, got \(3, 256\)"),
    "groups": (spoil("blocks", 7, 3), "block 1: groups must divide its 4 channels, got 3"),
    "no groups": (spoil("blocks", 7, 0), "block 1: groups must divide its 4 channels, got 0"),
    "identity": (
        spoil("blocks", 7, 4),
        "block 1: branch 2, without weight, is the identity: it needs as many channels as inputs, got 4 and 8",
    ),
    "present": (spoil("branches", 18, 256), "block 1: present of branch 0 cannot be 256"),
    "negative present": (spoil("branches", 18, -1), "block 1: present of branch 0 cannot be -1"),
    "early sum": (spoil("branches", 6, 128), "block 0: present of branch 1 cannot be 128"),
    "weighted sum": (spoil("branches", 36, 129), "block 1: present of branch 3 cannot be 129"),
    "row": (
        spoil("branches", 7, 3),
        r"block 0: taps of branch 1 .* a rectangle inside the kernel of 3×3, got \(3, 0, 1, 3, 1\)",
    ),
    "column": (spoil("branches", 8, -1), r"block 0: taps of branch 1 .* inside .*, got \(1, -1, 1, 3, 1\)"),
    "rows": (spoil("branches", 9, 3), r"block 0: taps of branch 1 .* inside .*, got \(1, 0, 3, 3, 1\)"),
    "no columns": (spoil("branches", 10, 0), r"block 0: taps of branch 1 .* inside .*, got \(1, 0, 1, 0, 1\)"),
    "step": (spoil("branches", 11, 2), r"block 0: taps of branch 1 .* inside .*, got \(1, 0, 1, 3, 2\)"),
    "no step": (spoil("branches", 11, 0), r"block 0: taps of branch 1 .* inside .*, got \(1, 0, 1, 3, 0\)"),
    "overflow": (spoil("branches", 11, 2**62), "block 0: taps of branch 1 .* inside"),
    "two taps": (spoil("branches", 33, 2), "block 1: taps of branch 2 .* must be a rectangle of one tap inside"),
    "dimensions": (
        spoil("weight", 0, torch.ones(4, 2, 3)),
        r"block 0: weight of branch 0 must have shape \(K, C, rows, columns\) with K, C > 0, got \(4, 2, 3\)",
    ),
    "empty": (
        spoil("weight", 3, torch.ones(0, 2, 3, 3)),
        r"block 1: weight of branch 0 must have shape \(K, C, rows",
    ),
    "weight": (
        spoil("weight", 4, torch.ones(4, 2, 3, 1)),
        r"block 1: weight of branch 1 must have shape \(4, 2, 1, 1\), got \(4, 2, 3, 1\)",
    ),
    "first": (
        spoil("weight", 0, torch.ones(4, 2, 3, 1)),
        r"block 0: weight of branch 0 must have shape \(4, 2, 3, 3\), got \(4, 2, 3, 1\)",
    ),
    "dtype": (
        spoil("weight", 2, torch.ones(4, 2, 3, 1).half()),
        "block 0: weight of branch 2 must have the dtype of the block's first weight",
    ),
    "integers": (spoil("mean", 0, torch.ones(4).int()), "block 0: mean of branch 0 must be float32, float64"),
    "integer weight": (
        spoil("weight", 0, torch.ones(4, 2, 3, 3).int()),
        "block 0: weight of branch 0 must be float32, float64",
    ),
    "sparse": (
        spoil("gamma", 5, torch.ones(4).to_sparse()),
        "block 1: gamma of the sum must be strided, got torch.sparse_coo",
    ),
    "param": (
        spoil("mean", 4, torch.ones(5)),
        r"block 1: mean of branch 2 must have shape \(4,\), got \(5,\)",
    ),
    "eps": (spoil("eps", 4, -1.0), "block 1: eps of branch 1 must be finite and not negative, got -1"),
    "eps of the sum": (spoil("eps", 6, float("inf")), "block 1: eps of the sum must be finite .*, got inf"),
    "negative": (
        spoil("var", 4, torch.tensor([1.0, 1, -0.5, 1])),
        "block 1: var of branch 2 must be finite, .* got -0.5",
    ),
    "nan": (spoil("var", 0, torch.tensor([1.0, 1, 1, float("nan")])), "block 0: var of branch 0 .* got nan"),
    "inf": (spoil("var", 5, torch.tensor([1.0, 1, 1, float("inf")])), "block 1: var of the sum .* got inf"),
}


def two_blocks():
    configs = (
        CONFIGS["cross"]._replace(out=4, inputs=2),
        CONFIGS["nested"]._replace(out=4, inputs=2, groups=2, bare=(1,)),
    )
    return [random_step(config) for config in configs]


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_anything_is_written(case):
    change, message = BAD[case]
    args = change(list(arguments(two_blocks())))
    out = [torch.full((4, 2, 3, 3), 7.0) for _ in range(2)], [torch.full((4,), 7.0) for _ in range(2)]
    for function in (OP, fuse_blocks.fuse_blocks):
        with pytest.raises((ValueError, RuntimeError), match=message):
            function(*args)
    for function in (OUT_OP, fuse_blocks.fuse_blocks_out):
        with pytest.raises((ValueError, RuntimeError), match=message):
            function(*args, *out)
    assert all((t == 7).all() for tensors in out for t in tensors)


def test_a_block_without_a_weight_is_refused(run):
    with pytest.raises((ValueError, RuntimeError), match="block 0 must have a branch with a weight"):
        run([], [], [], [], [], [], [1, 3, 3, 1], [0, 1, 1, 1, 1, 1], [0.0])


def test_sixty_five_branches_are_refused(run):
    lists = arguments([random_step(CONFIGS["sixty-four"])])
    lists.branches[-6:] = lists.branches[:6]
    lists.weight.append(lists.weight[0])
    with pytest.raises((ValueError, RuntimeError), match="block 0 must have from 1 to 64 branches, got 65"):
        run(*lists)


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (torch.empty(4, 2, 3, 5), torch.empty(4), r"block 0: weight_out must have shape \(4, 2, 3, 3\)"),
        (torch.empty(4, 2, 3, 3), torch.empty(3), r"block 0: bias_out must have shape \(4,\)"),
        (torch.empty(4, 2, 3, 3).half(), torch.empty(4), "block 0: weight_out must have the dtype of"),
        (
            torch.empty(4, 2, 3, 6)[..., ::2],
            torch.empty(4),
            "block 0: weight_out must be contiguous or channels_last",
        ),
        (torch.empty(4, 2, 3, 3, device="meta"), torch.empty(4), "weight_out must be on the device"),
    ],
)
def test_bad_out(weight, bias, message):
    step = two_blocks()[0]
    if weight.device.type == "cpu":  # the dispatcher takes mixed devices to the meta kernel
        with pytest.raises(ValueError, match=message):
            fold_steps([step], [(weight, bias)])
    with pytest.raises(ValueError, match=message):
        fuse_blocks.fuse_blocks_out(*arguments([step]), [weight], [bias])


def test_fold_steps_raises_value_error():
    step = random_step(CONFIGS["cross"])
    step.branches[2].norm.running_var[3] = -1
    with pytest.raises(ValueError, match=r"^block 0: var of branch 2 must be finite"):
        fold_steps([step])
    weight, bias = fold_as_it_is(step)
    channels = torch.arange(16) != 3
    assert weight[channels].isfinite().all()
    assert weight[3].isnan().any()
    assert bias.isnan().tolist() == (~channels).tolist()


@pytest.mark.parametrize("name", ["branch 1", "the sum"])
def test_a_missing_variance_is_named(name):
    good, step = two_blocks()
    without = step.norm._replace(running_var=None)
    branches = [
        branch._replace(norm=without) if name == f"branch {i}" else branch for i, branch in enumerate(step.branches)
    ]
    step = step._replace(branches=tuple(branches), norm=without if name == "the sum" else step.norm)
    with pytest.raises(ValueError, match=f"block 1: var of {name} is missing"):
        fold_steps([good, step])


def test_the_extension_is_what_runs(device):
    missing = _extension.WHY_MISSING if device == "cpu" else _extension.WHY_CUDA_MISSING
    if missing:
        pytest.skip(f"only the PyTorch form can be tested here: {missing}")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("acnet_kernels::fuse_blocks", device.upper())
