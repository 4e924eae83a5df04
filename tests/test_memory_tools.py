"""Activation checkpointing, offloading and saved-tensor hooks, retained graphs, deterministic algorithms."""

import copy

import pytest
import torch
from oracle import scramble
from stacks import MODES, TRAINING, Net, assert_same_state, through_modules
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, set_checkpoint_early_stop

from acnet_kernels import ACBlock


def gradients(module, x, forward):
    """Every gradient of forward(module, x).square().sum(), x's first; module is left with its new statistics."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    forward(module, x).square().sum().backward()
    return [x.grad, *(p.grad for p in module.parameters())]


def assert_all_close(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("backend", "training"), MODES)
def test_checkpoint(backend, training, reentrant):
    net = scramble(Net(backend)).train(training)
    twin = through_modules(net)
    x = torch.randn(4, 4, 8, 8)

    def recomputed(m, t):
        return m.head(checkpoint(lambda u: m.second(m.first(u)), t, use_reentrant=reentrant).mean((2, 3)))

    got, want = gradients(net, x, recomputed), gradients(twin, x, recomputed)
    assert_all_close(got, want)
    assert_same_state(net, twin)  # the second forward moves the statistics again, as nn.BatchNorm2d's
    plain = gradients(through_modules(net), x, lambda m, t: m.head(m.second(m.first(t)).mean((2, 3))))
    assert_all_close(got, plain)


# How many blocks there are is paired with each of the others, not with all three at once.
@pytest.mark.parametrize(
    ("backend", "options", "early", "blocks"),
    [
        (backend, options, early, 1 + (i + j + early) % 3)
        for i, backend in enumerate(TRAINING)
        for j, options in enumerate(({}, {"norm": "sum"}, {"momentum": None}))
        for early in (True, False)
    ],
    ids=str,
)
def test_recomputed_statistics_move_as_often_as_batch_norms_own(backend, options, blocks, early):
    made = [scramble(ACBlock(4, 4, 3, padding=1, backend=backend, **options)) for _ in range(blocks)]
    chain = torch.nn.Sequential(*made)
    twin = through_modules(chain)
    with set_checkpoint_early_stop(early):
        for _ in range(2):  # momentum=None weighs the batches by how many there were
            x = torch.randn(2, 4, 8, 8)
            for m in (chain, twin):
                gradients(m, x, lambda m, t: checkpoint(m, t, use_reentrant=False))
    assert int(twin.get_buffer(f"{blocks - 1}.{'bn' if 'norm' in options else 'hor_bn'}.num_batches_tracked")) == 4
    assert_same_state(chain, twin)


@pytest.mark.parametrize("backend", TRAINING)
def test_checkpoint_sequential(backend):
    chain = scramble(torch.nn.Sequential(*(ACBlock(4, 4, 3, padding=1, backend=backend) for _ in range(4))))
    twin = through_modules(chain)
    x = torch.randn(2, 4, 8, 8)

    def halves(m, t):
        return checkpoint_sequential(m, 2, t, use_reentrant=False)

    assert_all_close(gradients(chain, x, halves), gradients(twin, x, halves))


@pytest.mark.parametrize(("backend", "training"), MODES)
def test_offload_hooks_see_everything_that_is_saved(backend, training):
    net = scramble(Net(backend)).train(training)
    x = torch.randn(4, 4, 8, 8)
    want = gradients(copy.deepcopy(net), x, lambda m, t: m(t))

    def offloaded(m, t):
        with torch.autograd.graph.save_on_cpu():
            return m(t)

    assert_all_close(gradients(copy.deepcopy(net), x, offloaded), want)
    kept = {}

    def pack(t):
        kept[len(kept)] = t.detach().clone()
        return len(kept) - 1

    def elsewhere(m, t):
        with torch.autograd.graph.saved_tensors_hooks(pack, kept.pop):  # each is unpacked once, and then gone
            return m(t)

    assert_all_close(gradients(copy.deepcopy(net), x, elsewhere), want)


@pytest.mark.parametrize(("backend", "training"), MODES)
def test_a_retained_graph_gives_the_same_gradients_again(backend, training):
    b = scramble(ACBlock(4, 6, 3, padding=1, backend=backend)).train(training)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    out = b(x)
    kept, seed = out.detach().clone(), torch.randn_like(out)
    inputs = [x, *b.parameters()]
    first = torch.autograd.grad(out, inputs, seed, retain_graph=True)
    first = [t.clone() for t in first]
    again = torch.autograd.grad(out, inputs, seed)
    assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))
    assert torch.equal(out, kept)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, inputs, seed)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("backend", "training"), MODES)
def test_deterministic_algorithms(backend, training, layout):
    b = scramble(ACBlock(4, 6, 3, padding=1, backend=backend)).train(training)
    x = torch.randn(3, 4, 9, 7).to(memory_format=layout)
    plain = gradients(copy.deepcopy(b), x, lambda m, t: m(t))
    torch.use_deterministic_algorithms(True)  # it also fills what torch.empty() returns with NaN
    try:
        runs = [gradients(copy.deepcopy(b), x, lambda m, t: m(t)) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(p, q) for p, q in zip(run, runs[0], strict=True))
    assert_all_close(runs[0], plain)
