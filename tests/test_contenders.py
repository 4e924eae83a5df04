"""Contenders of the block benchmark compute the same block, and a step's phases are counted in full."""

import pytest
import torch
from oracle import rel, scramble
from torch import nn

from acnet_kernels import ACBlock
from benchmarks import contenders, harness, memory, network, phases
from benchmarks.shapes import Shape

CPU = torch.device("cpu")
SHAPES = ["2x4x7x6->8", "2x8x9x9->4 k5 /2 g4 d2"]


def built(shape, dtype=torch.float32):
    names = [name for name in contenders.names(CPU) if name not in contenders.COMPILED]
    return contenders.build(Shape.parse(shape), dtype, CPU, 2, names)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_contender_but_the_bound_computes_the_block(shape):
    found = built(shape)
    assert {c.name for c in found} >= {"eager", "3k", "checkpoint", "conv+bn", "branches", "auto"}
    truth = found[0]
    want = truth.step()
    for c in found:
        assert c.forward().shape == truth.forward().shape
        assert c.forward().is_contiguous(memory_format=contenders.LAYOUTS[c.layout])
        if c.name == "conv+bn":
            assert rel(c.forward(), truth.forward()) > 0.1
            continue
        assert rel(c.forward(), truth.forward()) < 1e-5
        got = c.step(1)  # the sets are copies
        assert rel(got[0], want[0]) < 1e-4
        if c.name == "3k":  # its kernels come first, then one γ and one β for three
            convs = [n for n, _ in truth.module.named_parameters() if "conv" in n]
            want_weights = {n: g for (n, _), g in zip(truth.module.named_parameters(), want[1:], strict=True)}
            order = [f"block.{branch}_conv.weight" for branch in truth.module.block.convs()]
            assert sorted(order) == sorted(convs)
            assert all(rel(g, want_weights[n]) < 1e-4 for g, n in zip(got[1:], order, strict=False))
        else:
            assert all(rel(a, b) < 1e-4 for a, b in zip(got, want, strict=True))


def test_one_convolution_of_3k_outputs_is_the_block_whatever_its_affine_parameters():
    block = scramble(ACBlock(4, 6, 3, padding=1, groups=2, backend="eager"))
    x = torch.randn(2, 4, 5, 7)
    assert rel(contenders.Concatenated(block)(x), block(x)) < 1e-5


def test_ours_and_eager_come_in_both_layouts_their_peers_in_one():
    layouts = {}
    for c in built(SHAPES[0]):
        layouts.setdefault(c.name, []).append(c.layout)
    assert all(
        found == ["nchw", "channels_last"] for name, found in layouts.items() if name not in contenders.PEERS
    )
    assert all(layouts[name] == ["channels_last"] for name in contenders.PEERS)


def test_a_backend_that_declines_is_left_out():
    names = {c.name for c in built("2x4x8x8->4 /2")}
    assert "moments" not in names  # it needs stride 1
    assert "folded" not in names  # it needs running statistics
    assert "moments" in {c.name for c in built("2x4x8x8->4")}


def test_half_precision_is_autocast_over_float32_parameters_on_an_input_of_its_own_type():
    c = built(SHAPES[0], torch.bfloat16)[0]
    assert c.forward().dtype == c.sets[0][0].dtype == c.sets[0][1].dtype == torch.bfloat16
    assert {p.dtype for p in c.module.parameters()} == {torch.float32}


def test_compiled_contenders_are_the_eager_block(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module, mode: compiled.append((module.backend, mode)) or module)
    contenders.build(Shape.parse(SHAPES[0]), torch.float32, CPU, 1, ["compile", "reduce-overhead"])
    assert compiled == [("eager", "default"), ("eager", "reduce-overhead")]
    assert "reduce-overhead" not in contenders.names(CPU)
    assert "reduce-overhead" in contenders.names(torch.device("cuda"))


class Ticks:
    """Every call takes a millisecond and what is in it."""

    def seconds(self):
        return 0.0

    def __init__(self):
        self.now = 0

    def milliseconds(self, call):
        began = self.now
        call()
        self.now += 1
        return self.now - began


@pytest.mark.parametrize("backend", ["eager", "branches"])
def test_phases_hold_all_multiply_adds_of_the_convolutions(backend):
    shape = Shape.parse("2x4x7x6->8 /2 g2")
    step = next(c for c in built(str(shape)) if c.name == backend).step
    found = phases.record(step, Ticks(), most=2)
    assert found["convolution forward"].flops == shape.useful_flops
    assert found["convolution backward"].flops == 2 * shape.useful_flops
    assert ("batch norm forward" in found) == (backend == "eager")
    assert ("bn_sum_forward" in found) == (backend == "branches")
    assert all(phase.nbytes > 0 for name, phase in found.items() if name != phases.OTHER)


def test_operators_inside_ours_are_phases_of_their_own_and_time_is_counted_once():
    step = next(c for c in built("2x4x7x6->8") if c.name == "recompute").step
    clock = Ticks()
    with phases.Recorder(clock) as recorder:
        step()
    found = recorder.phases
    assert {"recompute_step", "bn_sum_forward", "convolution forward"} <= found.keys()
    assert found["convolution forward"].flops > 0
    assert found["recompute_step"].flops == 0
    assert sum(phase.milliseconds for phase in found.values()) == clock.now


def test_matrix_products_are_counted():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    with phases.Recorder(Ticks()) as recorder:
        torch.addmm(torch.randn(5), a, b)
        torch.bmm(a[None], b[None])
    found = recorder.phases["matrix products"]
    assert (found.flops, found.milliseconds) == (2 * 2 * 3 * 4 * 5, 2)


@pytest.mark.parametrize("contender", network.MEASURED)
def test_networks_are_the_same_network(contender, monkeypatch):
    compiled = nn.Module.compile
    # Whether it is captured is in question, not Inductor's kernels, which take half a minute.
    monkeypatch.setattr(nn.Module, "compile", lambda module, mode: compiled(module, backend="eager"))
    model = network.build("resnet8", contender, CPU)
    kinds = [type(m) for m in model.modules()]
    assert (ACBlock in kinds) == (contender != "plain")
    assert (contenders.Checkpointed in kinds) == (contender == "checkpoint")
    wanted = contender if contender in network.OURS else "eager"
    assert {m.backend for m in model.modules() if isinstance(m, ACBlock)} <= {wanted}
    assert all(
        m.weight.is_contiguous(memory_format=torch.channels_last) for m in model.modules() if type(m) is nn.Conv2d
    )
    data = network.batch_of(network.Network("resnet8", 8, 2, 2), 2, CPU)
    before = [p.detach().clone() for p in model.parameters()]
    network.training_step(model, *data, torch.bfloat16)()
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    reference = network.build("resnet8", "eager", CPU)
    if contender != "plain":
        model = network.build("resnet8", contender, CPU)
        assert (
            rel(network.loss_of(model, *data, torch.float32), network.loss_of(reference, *data, torch.float32))
            < 1e-5
        )


@pytest.mark.parametrize("most", [1, 2, 3, 63, 64, 65, 100])
def test_the_largest_batch_is_found(most):
    asked = []

    def fits(batch):
        asked.append(batch)
        return batch <= most

    assert memory.largest_batch(fits) == most
    assert len(asked) <= 15
    assert memory.largest_batch(lambda batch: True, most=most) == most
    assert memory.largest_batch(lambda batch: False) == 0


def test_the_batch_within_a_budget_follows_from_two():
    assert memory.batch_within(1000, (2, 30 + 2 * 10), (4, 30 + 4 * 10)) == 97
    assert memory.batch_within(20, (2, 50), (4, 70)) == 0


def test_memory_of_a_network(monkeypatch):
    monkeypatch.setitem(network.NETWORKS, "resnet8", network.Network("resnet8", 8, 4, 4))
    found = {
        name: memory.measure("resnet8", name, 4, torch.float32, CPU, 2**20)
        for name in ("plain", "eager", "checkpoint")
    }
    assert found["eager"]["saved_bytes"] > found["plain"]["saved_bytes"] > found["checkpoint"]["saved_bytes"] > 0
    assert found["eager"]["largest_batch"] < found["plain"]["largest_batch"]


def test_each_memory_measurement_has_a_process_of_its_own():
    assert memory.isolated(harness.dtype_name, torch.float32) == "float32"
