"""The CUDA kernel's body, run on the host: every thread of a launch, its indexing, arithmetic and writes."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from fusion_cases import CONFIGS, arguments, assert_close, random_block, strided, truth

CSRC = Path(__file__).parent.parent / "csrc"
INCLUDE = Path(torch.__file__).parent / "include"
COMPILER = shutil.which("g++") or shutil.which("clang++")

pytestmark = pytest.mark.skipif(
    COMPILER is None, reason="no C++ compiler to compile the kernel's body for the host"
)


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    """tests/host_kernel.cpp as a module."""
    import importlib.util

    import pybind11

    target = tmp_path_factory.mktemp("host") / f"host_kernel{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [f"-I{path}" for path in (CSRC, INCLUDE, pybind11.get_include(), sysconfig.get_path("include"))]
    command = [COMPILER, "-O1", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", *includes]
    source = Path(__file__).parent / "host_kernel.cpp"
    subprocess.run([*command, str(source), "-o", str(target)], check=True)
    spec = importlib.util.spec_from_file_location("host_kernel", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
SLOTS = ("square", "hor", "ver")


def describe(block, weight, bias) -> dict:
    """What the C++ operator puts into a descriptor."""
    step = block.step()
    square = step.branches["square"].weight
    norms, eps = [], []
    for name in SLOTS:
        branch = step.branches.get(name)
        norm = None if branch is None else branch.norm
        tensors = (None,) * 5 if norm is None else (*norm[:4], branch.bias)
        norms.append([(0, 0) if t is None else (t.data_ptr(), DTYPES[t.dtype]) for t in tensors])
        eps.append(0.0 if norm is None else norm.eps)
    kernels = [step.branches[name].weight if name in step.branches else None for name in SLOTS]
    channels_last = not weight.is_contiguous()
    same = square.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    aligned = same and square.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    return {
        "weight": weight.data_ptr(),
        "bias": bias.data_ptr(),
        "kernels": [0 if t is None else t.data_ptr() for t in kernels],
        "strides": [[] if t is None else list(t.stride()) for t in kernels],
        "norms": norms,
        "eps": eps,
        "shape": list(square.shape[:3]),
        "place": [step.geometry.hor_row, step.geometry.ver_column],
        "dtype": DTYPES[square.dtype],
        "flags": [channels_last, same, aligned],
    }


def outputs(block, layout):
    square = block.square_conv.weight
    weight = torch.full(square.shape, float("nan"), dtype=square.dtype).to(memory_format=layout)
    return weight, torch.full((len(square),), float("nan"), dtype=square.dtype)


def launch(host, blocks, layout=torch.contiguous_format):
    """Runs all blocks in one launch; returns the outputs and how often each was written."""
    out = [outputs(block, layout) for block in blocks]
    written = host.launch([describe(block, *pair) for block, pair in zip(blocks, out, strict=True)])
    return out, written


# hor and ver of the blocks with one norm for the sum share its tensors: the operator's own tests cover that.
PER_BRANCH = [config for config in CONFIGS if config.get("norm") != "sum"]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_thread_of_a_launch(host, dtype, layout):
    blocks = [random_block(dtype, conv_bias=i % 2 == 0, **config) for i, config in enumerate(PER_BRANCH)]
    blocks = [block.to(memory_format=layout) for block in blocks]
    out, written = launch(host, blocks, layout)
    for block, pair, (weight_writes, bias_writes) in zip(blocks, out, written, strict=True):
        assert set(weight_writes) == {1}, "a weight element is not written exactly once"
        assert set(bias_writes) == {1}, "a bias element is not written exactly once"
        assert_close(pair, truth(block), dtype)


def test_equals_the_cpu_operator(host):
    blocks = [random_block(**config) for config in PER_BRANCH]
    out, _ = launch(host, blocks)
    with torch.no_grad():
        weights, biases = torch.ops.acnet_kernels.fuse_blocks(*arguments(blocks))
    for (weight, bias), expected, expected_bias in zip(out, weights, biases, strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(bias, expected_bias, rtol=1e-6, atol=1e-6)


def test_mixed_dtypes_and_strided_weights_in_one_launch(host):
    blocks = [random_block(dtype, torch.float32, **CONFIGS[0]) for dtype in DTYPES if dtype != torch.float64]
    for conv in blocks[0].convs().values():
        conv.weight = torch.nn.Parameter(strided(conv.weight.detach()))
    out, written = launch(host, blocks)
    for block, pair, writes in zip(blocks, out, written, strict=True):
        assert all(set(w) == {1} for w in writes)
        assert_close(pair, truth(block), block.square_conv.weight.dtype)


@pytest.mark.parametrize("simd", ["avx2", "avx512"])
def test_vector_rows_equal_the_element_form(host, simd):
    if not host.supports(simd):
        pytest.skip(f"this processor has no {simd}")
    for config in CONFIGS[:4]:
        block = random_block(**config)
        vector, element = outputs(block, torch.contiguous_format), outputs(block, torch.contiguous_format)
        done = host.fold_rows_simd(simd, describe(block, *vector))
        host.launch([describe(block, *element)])
        if config["kernel_size"] == 3:
            assert done > 0
        rows, expected = vector[0].flatten(1)[:, :done], element[0].flatten(1)[:, :done]
        assert torch.equal(rows, expected)
