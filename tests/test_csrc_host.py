"""The CUDA kernel's body, run on the host: every thread of a launch, its indexing, arithmetic and writes."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from fusion_cases import (
    CONFIGS,
    ORDINARY,
    Step,
    arguments,
    assert_close,
    first_weight,
    mapped,
    random_step,
    strided,
    truth,
)

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


def describe(step, weight, bias) -> dict:
    """What the C++ operator puts into a descriptor."""
    layout = torch.contiguous_format if weight.is_contiguous() else torch.channels_last
    k_h, k_w = step.geometry.kernel
    entries = []
    for taps, kernel, conv_bias, norm, _ in sorted(step.branches, key=lambda branch: branch.weight is None):
        tensors = (*(norm[:4] if norm is not None else (None,) * 4), conv_bias)
        entries.append(entry(kernel, taps or (k_h // 2, k_w // 2, 1, 1, 1), tensors, norm))
    if step.norm is not None:
        entries.append(entry(None, (0,) * 5, (*step.norm[:4], None), step.norm))
    kernels = [branch.weight for branch in step.branches if branch.weight is not None]
    dense = all(kernel.is_contiguous(memory_format=layout) for kernel in kernels)
    same = kernels[0].shape[2:] == weight.shape[2:] and kernels[0].is_contiguous(memory_format=layout)
    aligned = same and kernels[0].data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    return {
        "weight": weight.data_ptr(),
        "bias": bias.data_ptr(),
        "entries": entries,
        "shape": list(weight.shape),
        "dtype": DTYPES[weight.dtype],
        "flags": [layout == torch.channels_last, dense, aligned, step.norm is not None],
    }


def entry(kernel, taps, tensors, norm) -> dict:
    return {
        "kernel": 0 if kernel is None else kernel.data_ptr(),
        "strides": [0] * 4 if kernel is None else list(kernel.stride()),
        "taps": list(taps),
        "params": [(0, 0) if t is None else (t.data_ptr(), DTYPES[t.dtype]) for t in tensors],
        "eps": 0.0 if norm is None else norm.eps,
    }


def outputs(step: Step, layout):
    weight = first_weight(step)
    shape = (*weight.shape[:2], *step.geometry.kernel)
    out = torch.full(shape, float("nan"), dtype=weight.dtype).contiguous(memory_format=layout)
    return out, torch.full((len(weight),), float("nan"), dtype=weight.dtype)


def launch(host, steps, layout=torch.contiguous_format):
    """Runs all blocks in one launch; returns the outputs and how often each was written."""
    out = [outputs(step, layout) for step in steps]
    written = host.launch([describe(step, *pair) for step, pair in zip(steps, out, strict=True)])
    return out, written


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_thread_of_a_launch(host, dtype, layout):
    steps = [
        random_step(config, dtype, conv_bias=i % 2 == 0, layout=layout) for i, config in enumerate(CONFIGS.values())
    ]
    out, written = launch(host, steps, layout)
    for step, pair, (weight_writes, bias_writes) in zip(steps, out, written, strict=True):
        assert set(weight_writes) == {1}, "a weight element is not written exactly once"
        assert set(bias_writes) == {1}, "a bias element is not written exactly once"
        assert_close(pair, truth(step), dtype)


def test_equals_the_cpu_operator(host):
    steps = [random_step(config) for config in CONFIGS.values()]
    out, _ = launch(host, steps)
    weights, biases = torch.ops.acnet_kernels.fuse_blocks(*arguments(steps))
    for (weight, bias), expected, expected_bias in zip(out, weights, biases, strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(bias, expected_bias, rtol=1e-6, atol=1e-6)


def test_mixed_dtypes_and_strided_weights_in_one_launch(host):
    steps = [random_step(ORDINARY[0], dtype, torch.float32) for dtype in DTYPES if dtype != torch.float64]
    steps[0] = mapped(steps[0], lambda t: strided(t) if t.dim() == 4 else t)
    out, written = launch(host, steps)
    for step, pair, writes in zip(steps, out, written, strict=True):
        assert all(set(w) == {1} for w in writes)
        assert_close(pair, truth(step), first_weight(step).dtype)


@pytest.mark.parametrize("simd", ["avx2", "avx512"])
def test_vector_rows_equal_the_element_form(host, simd):
    if not host.supports(simd):
        pytest.skip(f"this processor has no {simd}")
    names = ("3x5", "dilated", "two", "nested", "norm of the sum", "long rows", "depthwise")
    for config in (*ORDINARY, *(CONFIGS[name] for name in names)):
        step = random_step(config)
        step = step._replace(branches=tuple(branch for branch in step.branches if branch.weight is not None))
        vector, element = outputs(step, torch.contiguous_format), outputs(step, torch.contiguous_format)
        done = host.fold_rows_simd(simd, describe(step, *vector))
        host.launch([describe(step, *element)])
        row = config.inputs * config.kernel[0] * config.kernel[1]
        assert row - 16 < done <= row
        rows, expected = vector[0].flatten(1)[:, :done], element[0].flatten(1)[:, :done]
        assert torch.equal(rows, expected)
