"""The cost model: what it counts, and what a count costs."""

import json
from dataclasses import replace

import pytest
import torch

from acnet_kernels import ACBlock
from acnet_kernels.backends import cost, device_info
from acnet_kernels.functional import describe
from benchmarks.shapes import Shape


def problem(text="8x32x10x12->32", norm="branch", **changes):
    s = Shape.parse(text)
    block = ACBlock(
        s.channels, s.out_channels, s.kernel, s.stride, s.padding, s.dilation, s.groups, norm=norm, device="meta"
    )
    step = block.step()
    found = describe(torch.empty(s.in_shape, device="meta"), step)
    return replace(found, device="cpu", **changes)


def units(p, backend, phase, kind=device_info.CUDA):
    """Passes over a map, as bytes over a map's: (the convolutions' own, the others)."""
    found = cost.counts(p, backend, kind, (phase,))
    return [
        round(1e9 * features["gbytes"] / p.output_bytes, 6)
        for group, features in sorted(found.items(), key=lambda item: not item[0].startswith("convolution"))
    ]


@pytest.mark.parametrize(("backend", "forward", "backward"), [("eager", 21, 33), ("branches", 13, 27)])
def test_passes_of_a_step(backend, forward, backward):
    # The design's table for C = K: convolutions read and write a map forward; backward each is two convolutions.
    p = problem()
    assert sum(units(p, backend, "forward")) == forward
    convolutions, others = units(p, backend, "backward")
    assert 2 * convolutions + others == backward


@pytest.mark.parametrize(
    "text", ["8x32x10x12->32", "2x64x9x7->32 k5 /2", "2x64x9x7->64 g64", "2x6x9x7->9 k7 g3 d2"]
)
@pytest.mark.parametrize("backend", ["eager", "branches"])
def test_convolutions_count_every_tap(text, backend):
    found = cost.counts(problem(text), backend, device_info.CPU, ("forward",))
    assert found["convolution forward float32 nchw"]["gflop"] * 1e9 == pytest.approx(Shape.parse(text).useful_flops)


def test_the_sum_before_one_batch_norm_is_differentiated_as_one_convolution():
    p = problem(norm="sum")
    for phase, ratio in (("forward", 1), ("backward", 15 / 9)):
        group = f"convolution {phase} float32 nchw"
        taps = {name: cost.counts(p, name, device_info.CPU)[group]["gflop"] for name in ("eager", "branches")}
        assert taps["eager"] / taps["branches"] == pytest.approx(ratio)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_branches_convolve_in_float32_where_half_precision_is_slow(dtype):
    p = problem(dtype=dtype)
    slow, fast = (cost.counts(p, "branches", kind) for kind in (device_info.CPU, device_info.FAST_HALF_CPU))
    assert "convolution forward float32 nchw" in slow
    assert "convolution forward bfloat16 nchw" in fast
    assert slow["branches forward bfloat16 nchw"]["gbytes"] > 1.5 * fast["branches forward bfloat16 nchw"]["gbytes"]
    assert "convolution forward bfloat16 nchw" in cost.counts(p, "eager", device_info.CPU)


def test_float64_counts_twice_what_float32_does():
    single, double = (
        cost.counts(problem(dtype=d), "moments", device_info.CPU) for d in (torch.float32, torch.float64)
    )
    assert single.keys() == double.keys()
    for group, features in single.items():
        assert double[group]["gflop"] == 2 * features["gflop"]


def test_without_gradients_the_forward_alone_counts():
    p = problem()
    assert p.grad
    groups = cost.counts(replace(p, grad=False), "eager", device_info.CPU)
    assert groups == cost.counts(p, "eager", device_info.CPU, ("forward",))
    assert cost.predict(replace(p, grad=False), "eager", device_info.CPU) < cost.predict(
        p, "eager", device_info.CPU
    )


def test_a_price_is_per_count():
    work = {"a": {"x": 2.0, "y": 3.0}, "b": {"x": 1.0}}
    assert cost.total(work, {"a": {"x": 10.0}, "b": {"x": 0.5}, "c": {}}) == 20.5
    assert cost.total(work, {"a": {"x": 10.0}}) is None


def test_what_has_no_model_has_no_prediction():
    p = problem()
    assert cost.predict(p, "no such backend", device_info.CPU) is None
    assert cost.predict(p, "eager", "an abacus") is None
    assert cost.predict(replace(p, dtype=torch.float8_e4m3fn), "eager", device_info.CPU) is None


def test_the_data_file_is_complete():
    data = json.loads(cost.PATH.read_text())
    assert set(data["kinds"]) == {device_info.CPU, device_info.FAST_HALF_CPU, device_info.CUDA}
    for kind in data["kinds"]:
        assert all(price >= 0 for group in cost.prices()[kind].milliseconds.values() for price in group.values())
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for layout in (False, True):
                for backend in cost.COUNTS:
                    ms = cost.predict(problem(dtype=dtype, channels_last=layout), backend, kind)
                    assert ms is not None
                    assert ms > 0
    assert data["kinds"][device_info.CUDA]["origin"].startswith("predicted")
    assert data["kinds"][device_info.CUDA]["margins"].keys() == {"branches"}


def test_cuda_predictions_are_the_designs():
    # On maps that outweigh their launches: moments gains most where channels are few, branches anywhere.
    for channels, order in ((16, ["moments", "branches", "eager"]), (256, ["branches", "eager"])):
        p = problem(f"256x{channels}x112x112->{channels}", dtype=torch.bfloat16, channels_last=True)
        times = {name: cost.predict(p, name, device_info.CUDA) for name in order}
        assert sorted(order, key=times.__getitem__) == order
