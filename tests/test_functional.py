"""What a step accepts, whichever way computes it: the dtypes that nn.Conv2d accepts, and tensors of one device."""

import copy
import itertools

import pytest
import torch
from stacks import MODES, TRAINING
from torch import nn

from acnet_kernels import ACBlock
from acnet_kernels.functional import acblock

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64]


def assert_untouched(b, before):
    for (name, t), old in zip(b.named_buffers(), before.buffers(), strict=True):
        assert t.device == old.device, name
        assert t.is_meta or torch.equal(t, old), name


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("backend", "training"), MODES)
def test_dtypes_are_accepted_where_conv2d_accepts_them(backend, training, autocast):
    for theirs, own in itertools.product(DTYPES, DTYPES[:-1]):
        b = ACBlock(4, 6, 3, padding=1, backend=backend).train(training).to(own)
        for bn in b.norms().values():
            bn.to(torch.promote_types(own, torch.float32))  # nn.BatchNorm2d takes half maps of any kind then
        before, x = copy.deepcopy(b), torch.randn(2, 4, 5, 5).to(theirs)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            try:
                want = nn.Conv2d(4, 6, 3).to(own)(x).dtype
            except RuntimeError:
                message = f"input must have the weights' dtype {own}, got {theirs}"
                with pytest.raises(TypeError, match=message):
                    b(x)
                with pytest.raises(TypeError, match=message):
                    b.plan(x)
                assert_untouched(b, before)
            else:
                assert b(x).dtype == want


@pytest.mark.parametrize(("backend", "training"), MODES)
def test_every_branch_has_the_inputs_dtype(backend, training):
    b = ACBlock(4, 6, 3, padding=1, backend=backend).train(training)
    step = b.step()
    *others, ver = step.branches
    branches = [*others, ver._replace(weight=ver.weight.double())]
    before = copy.deepcopy(b)
    with pytest.raises(TypeError, match=r"input must have the weights' dtype torch\.float64, got torch\.float32"):
        acblock(torch.randn(2, 4, 5, 5), branches, step.geometry, backend=backend)
    assert_untouched(b, before)


FIELDS = [("conv", "weight"), ("conv", "bias"), *(("bn", name) for name in ("weight", "bias"))]
FIELDS += [("bn", name) for name in ("running_mean", "running_var", "num_batches_tracked")]
LABELS = {("bn", "weight"): "gamma", ("bn", "bias"): "beta"}


@pytest.mark.parametrize(("kind", "name"), FIELDS)
@pytest.mark.parametrize(("backend", "training"), MODES)
def test_tensors_of_two_devices_are_refused_by_name(backend, training, kind, name):
    for norm, branch in itertools.product(("branch", "sum"), ("square", "hor", "ver")):
        b = ACBlock(4, 6, 3, padding=1, backend=backend, norm=norm).train(training)
        for conv in b.convs().values():
            conv.bias = nn.Parameter(torch.zeros(6))
        of_sum = norm == "sum" and kind == "bn"
        module = b.bn if of_sum else getattr(b, f"{branch}_{kind}")
        tensors = module._parameters if name in module._parameters else module._buffers
        meta = tensors[name].to("meta")
        tensors[name] = nn.Parameter(meta) if isinstance(tensors[name], nn.Parameter) else meta
        label = f"{LABELS.get((kind, name), name)} of {'the sum' if of_sum else branch}"
        before = copy.deepcopy(b)
        with pytest.raises(ValueError, match=f"on one device: the input is on cpu, {label} on meta"):
            acblock(torch.randn(2, 4, 5, 5), b.step().branches, b.geometry, norm=b.step().norm, backend=backend)
        assert_untouched(b, before)


@pytest.mark.parametrize(("backend", "training"), MODES)
def test_a_module_offloaded_to_meta_computes_nothing(backend, training):
    b = ACBlock(4, 6, 3, padding=1, backend=backend).train(training)
    with pytest.raises(ValueError, match="one device: the input is on meta, weight of square on cpu"):
        b(torch.randn(2, 4, 5, 5, device="meta"))
    b.to("meta")
    with pytest.raises(ValueError, match="one device: the input is on cpu, weight of square on meta"):
        b(torch.randn(2, 4, 5, 5))
    assert b(torch.randn(2, 4, 5, 5, device="meta")).shape == (2, 6, 5, 5)


@pytest.mark.parametrize("backend", TRAINING)
def test_a_meta_input_plans_for_real_weights(backend):
    b = ACBlock(4, 6, 3, padding=1, backend=backend)
    assert b.plan(torch.empty(2, 4, 5, 5, device="meta"))[0].shape == (2, 4, 5, 5)
