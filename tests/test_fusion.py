"""fuse_blocks against the definition in float64: the C++ operator and its PyTorch form, on the same inputs."""

from __future__ import annotations

import pytest
import torch
from fusion_cases import CONFIGS, DTYPES, arguments, assert_close, random_block, strided, truth
from torch import nn

from acnet_kernels.ops import _extension, fuse_blocks
from acnet_kernels.ops.fusion import fold_steps

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


@pytest.mark.parametrize("conv_bias", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(run, dtype, channels_last, conv_bias, device):
    blocks = [random_block(dtype, conv_bias=conv_bias, **config).to(device) for config in CONFIGS]
    if channels_last:
        blocks = [block.to(memory_format=torch.channels_last) for block in blocks]
    with torch.no_grad():
        weights, biases = run(*arguments(blocks))
    for block, weight, bias in zip(blocks, weights, biases, strict=True):
        assert_close((weight, bias), truth(block), dtype)
        square = block.square_conv.weight
        wanted = torch.channels_last if not square.is_contiguous() else torch.contiguous_format
        assert weight.is_contiguous(memory_format=wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_norms_of_another_dtype(run, dtype, device):
    norms = (torch.float32, torch.float64, torch.bfloat16)
    blocks = [random_block(dtype, norm, **CONFIGS[0]).to(device) for norm in norms]
    with torch.no_grad():
        weights, biases = run(*arguments(blocks))
    for block, *got in zip(blocks, weights, biases, strict=True):
        assert_close(got, truth(block), dtype)


def test_any_strides(run, device):
    blocks = [random_block(**config).to(device) for config in CONFIGS]
    args = arguments(blocks)
    args = [[strided(t.detach()) for t in tensors] for tensors in args[:8]] + list(args[8:])
    for block, *got in zip(blocks, *run(*args), strict=True):
        assert_close(got, truth(block), torch.float32)


def test_unaligned_weights(run, device):
    block = random_block(**CONFIGS[0]).to(device)
    args = arguments([block])
    (square,) = (t.detach() for t in args.square)
    shifted = [square.new_empty(square.numel() + 1).narrow(0, 1, square.numel()).view_as(square).copy_(square)]
    assert_close([t[0] for t in run(shifted, *args[1:])], truth(block), torch.float32)


@pytest.mark.parametrize("channels_last", [False, True])
def test_out_is_filled_and_its_version_counted(channels_last, device):
    blocks = [random_block(**config).to(device) for config in CONFIGS]
    steps = [block.step() for block in blocks]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = [
        (torch.full_like(w, float("nan"), memory_format=layout), torch.full_like(b, float("nan")))
        for w, b in map(truth, blocks)
    ]
    out = [(w.float().to(device), b.float().to(device)) for w, b in out]
    versions = [t._version for pair in out for t in pair]
    result = fold_steps(steps, out)
    assert all(r is o for pair, given in zip(result, out, strict=True) for r, o in zip(pair, given, strict=True))
    assert all(t._version > v for t, v in zip((t for pair in out for t in pair), versions, strict=True))
    for block, pair in zip(blocks, out, strict=True):
        assert_close(pair, truth(block), torch.float32)
        assert not pair[0].requires_grad


def test_no_blocks():
    assert fold_steps([]) == []


def leaves(step) -> list[torch.Tensor]:
    norms = list(step.norms)
    tensors = [t for b in step.branches.values() for t in (b.weight, b.bias)]
    return [t for t in tensors + [t for n in norms for t in (n.gamma, n.beta)] if t is not None]


@pytest.mark.parametrize("index", [1, 2, 8, 9, 12])
def test_gradients_of_every_tensor(index):
    config = CONFIGS[index] | {"in_channels": 1, "out_channels": 2, "groups": 1}
    block = random_block(torch.float64, conv_bias=True, **config)
    args = arguments([block])
    flat = [t.detach().clone().requires_grad_() for tensors in args[:8] for t in tensors]
    lengths = [len(tensors) for tensors in args[:8]]

    def function(*tensors):
        weights, biases = OP(*map(list, split(tensors, lengths)), *args[8:])
        return (*weights, *biases)

    assert torch.autograd.gradcheck(function, flat)
    assert torch.autograd.gradgradcheck(function, flat)


def split(tensors, lengths):
    start = 0
    for length in lengths:
        yield tensors[start : start + length]
        start += length


def test_a_frozen_tensor_gets_no_gradient():
    block = random_block(**CONFIGS[0])
    block.hor_conv.weight.requires_grad_(False)
    weight, bias = fold_steps([block.step()])[0]
    (weight.sum() + bias.sum()).backward()
    assert block.hor_conv.weight.grad is None
    assert block.hor_bn.running_var.grad is None
    assert all(t.grad is not None for t in leaves(block.step()) if t.requires_grad)


def test_opcheck():
    blocks = [random_block(conv_bias=i == 1, **CONFIGS[i]) for i in (1, 8, 9)]
    blocks[0].to(memory_format=torch.channels_last)
    args = arguments(blocks)
    torch.library.opcheck(OP, tuple(args))
    frozen = [[t.detach() for t in tensors] for tensors in args[:8]]
    out = [torch.empty_like(t) for t in args.square], [torch.empty(len(t)) for t in args.square]
    torch.library.opcheck(OUT_OP, (*frozen, *args[8:], *out))


def test_schema_is_the_same_with_and_without_the_extension():
    for op, schema in zip((OP, OUT_OP), fuse_blocks.SCHEMAS, strict=True):
        assert str(op._schema) == str(torch._C.parse_schema("acnet_kernels::" + schema))


def test_compiles_without_a_break():
    blocks = nn.ModuleList([random_block(**CONFIGS[i]) for i in (0, 9, 12)])

    def total(blocks):
        return sum((w * w).sum() + b.sum() for w, b in fold_steps([block.step() for block in blocks]))

    eager = total(blocks)
    eager_grads = torch.autograd.grad(eager, list(blocks.parameters()))
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")(blocks)
    torch.testing.assert_close(compiled, eager)
    grads = torch.autograd.grad(compiled, list(blocks.parameters()))
    torch.testing.assert_close(grads, eager_grads)


def test_exports():
    block = random_block(padding=1, **CONFIGS[0])
    x = torch.randn(2, 16, 5, 6)
    program = torch.export.export(block, (x,))
    assert "acnet_kernels" not in program.graph_module.code  # it runs where this package is not
    torch.testing.assert_close(program.module()(x), block(x))


def test_folding_follows_the_weights():
    block = random_block(padding=1, **CONFIGS[0])
    x = torch.randn(2, 16, 5, 6)
    before = block(x)
    block.train()
    optimizer = torch.optim.SGD(block.parameters(), 0.5)
    block(x).square().sum().backward()
    optimizer.step()
    after = block.eval()(x)
    weight, bias = truth(block)
    expected = nn.functional.conv2d(x.double(), weight, bias, padding=1)
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


BAD = {
    "length": (spoil("gamma", None, torch.ones(4)), "gamma must have 6 entries, got 7"),
    "present": (spoil("present", 3, 0), "block 1: present of square cannot be 0"),
    "square": (spoil("square", 1, torch.ones(4, 2, 3, 5)), r"block 1: square must have shape \(K, C, k, k\)"),
    "even": (spoil("square", 1, torch.ones(4, 2, 2, 2)), r"block 1: square must have shape .* got \(4, 2, 2, 2\)"),
    "hor": (
        spoil("hor", 1, torch.ones(4, 2, 3, 1)),
        r"block 1: hor must have shape \(4, 2, 1, 3\) to go with square",
    ),
    "ver": (spoil("ver", 0, torch.ones(4, 3, 3, 1)), r"block 0: ver must have shape \(4, 2, 3, 1\)"),
    "dtype": (spoil("ver", 0, torch.ones(4, 2, 3, 1).half()), "block 0: ver must have square's dtype"),
    "integers": (spoil("mean", 0, torch.ones(4, dtype=torch.int)), "block 0: mean must be float32, float64"),
    "param": (spoil("mean", 4, torch.ones(5)), r"block 1: mean of hor must have shape \(4,\), got \(5,\)"),
    "eps": (spoil("eps", 5, -1.0), "block 1: eps of ver must be finite and not negative, got -1"),
    "place": (spoil("place", 2, 3), r"block 1: place .* must be within the kernel of 3, got \(3, 1\)"),
    "negative": (
        spoil("var", 4, torch.tensor([1.0, 1, -0.5, 1])),
        "block 1: var of hor must be finite, .* got -0.5",
    ),
    "nan": (spoil("var", 0, torch.tensor([1.0, 1, 1, float("nan")])), "block 0: var of square .* got nan"),
    "inf": (spoil("var", 0, torch.tensor([1.0, 1, 1, float("inf")])), "block 0: var of square .* got inf"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_anything_is_written(case):
    change, message = BAD[case]
    blocks = [random_block(in_channels=2, out_channels=4, kernel_size=3) for _ in range(2)]
    args = change([[t.detach() if isinstance(t, torch.Tensor) else t for t in part] for part in arguments(blocks)])
    out = [torch.full((4, 2, 3, 3), 7.0) for _ in blocks], [torch.full((4,), 7.0) for _ in blocks]
    for function in (OP, fuse_blocks.fuse_blocks):
        with pytest.raises((ValueError, RuntimeError), match=message):
            function(*args)
    for function in (OUT_OP, fuse_blocks.fuse_blocks_out):
        with pytest.raises((ValueError, RuntimeError), match=message):
            function(*args, *out)
    assert all((t == 7).all() for tensors in out for t in tensors)


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (torch.empty(4, 2, 3, 5), torch.empty(4), "block 0: weight_out must have square's shape"),
        (torch.empty(4, 2, 3, 3), torch.empty(3), r"block 0: bias_out must have shape \(4,\)"),
        (torch.empty(4, 2, 3, 3).half(), torch.empty(4), "block 0: weight_out must have square's dtype"),
        (
            torch.empty(4, 2, 3, 6)[..., ::2],
            torch.empty(4),
            "block 0: weight_out must be contiguous or channels_last",
        ),
        (torch.empty(4, 2, 3, 3, device="meta"), torch.empty(4), "weight_out must be on the device"),
    ],
)
def test_bad_out(weight, bias, message):
    block = random_block(in_channels=2, out_channels=4, kernel_size=3)
    args = arguments([block])
    if weight.device.type == "cpu":  # the dispatcher takes mixed devices to the meta kernel
        with pytest.raises(ValueError, match=message):
            fold_steps([block.step()], [(weight, bias)])
    with pytest.raises(ValueError, match=message):
        fuse_blocks.fuse_blocks_out(*args, [weight], [bias])


def test_fold_steps_raises_value_error():
    block = random_block(**CONFIGS[0])
    with torch.no_grad():
        block.ver_bn.running_var[3] = -1
    with pytest.raises(ValueError, match=r"^block 0: var of ver must be finite"):
        fold_steps([block.step()])


def test_the_extension_is_what_runs(device):
    missing = _extension.MISSING if device == "cpu" else _extension.MISSING_CUDA
    if missing is not None:
        pytest.skip(f"only the PyTorch form can be tested here: {missing}")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("acnet_kernels::fuse_blocks", device.upper())
