"""accelerate() and restore(): whole networks, and everything that is done to models besides training them."""

import copy
import io
import pickle
import warnings

import distributed
import pytest
import stand_ins
import torch
import torch.nn.functional as F
from oracle import rel, scramble
from torch import nn
from torch.utils.checkpoint import checkpoint

import acnet_kernels as ak
from acnet_kernels.acceleration import Accelerated, HostBlock, seen
from acnet_kernels.export import weight_ranges

timm = pytest.importorskip("timm", reason="its blocks and networks are accelerated: extra `test`")
from timm.layers import convert_sync_batchnorm  # noqa: E402
from timm.models import byobnet, repghost  # noqa: E402
from timm.utils.model import reparameterize_model  # noqa: E402

# Of each family the smallest, and of fastvit each kind: other sizes are wider, deeper, or of fewer branches.
NETWORKS = (
    "fastvit_mci0",
    "fastvit_sa12",
    "fastvit_t8",
    "lcnetv2_small",
    "mobileone_s0",
    "repghostnet_050",
    "repvgg_a0",
    "repvit_m0_9",
)


class Net(nn.Module):
    """Blocks of two libraries, one with a step of its own before the branches."""

    def __init__(self):
        super().__init__()
        self.stem = byobnet.RepVggBlock(3, 8, 3, 2)
        self.body = nn.Sequential(byobnet.MobileOneBlock(8, 8, 3, group_size=1), repghost.RepGhostModule(8, 8))
        self.last = stand_ins.RepVGGBlock(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.last(self.body(self.stem(x))).mean((2, 3)))


PATHS = ("stem", "body.0", "body.1", "last")


def pair(training=True):
    """A network and its accelerated copy, equal but for that."""
    net = scramble(Net()).train(training)
    return net, ak.accelerate(copy.deepcopy(net), backend="branches")


def accelerated(model):
    return [name for name, m in model.named_modules() if isinstance(m, Accelerated)]


def step(model, x, forward=None):
    """Output, gradients and state after one step."""
    model.zero_grad()
    out = model(x) if forward is None else forward(x)
    out.square().mean().backward()
    return {"out": out.detach(), **{n: p.grad for n, p in model.named_parameters()}, **dict(model.named_buffers())}


def assert_same_step(got, want, x=None, forward=None):
    x = torch.randn(6, 3, 16, 16) if x is None else x
    a, b = step(got, x, forward), step(want, x)
    assert a.keys() == b.keys()
    for name, t in b.items():
        torch.testing.assert_close(a[name], t, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


# --- networks ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_trains_as_it_did(name):
    """Two steps, one of what the other has changed, in float64: in float32 rounding alone moves some apart."""
    net = timm.create_model(name, num_classes=5, drop_rate=0.0).double()
    fast = ak.accelerate(copy.deepcopy(net), backend="branches")
    assert len(accelerated(fast)) > 5
    images = 8 if name.startswith("mobileone") else 4  # its last batch norms have as many values, in four branches
    batches = [(torch.randn(images, 3, 32, 32).double(), torch.randint(5, (images,))) for _ in range(2)]
    losses = [train(model, batches) for model in (net, fast)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    for (key, t), other in zip(fast.state_dict().items(), net.state_dict().values(), strict=True):
        torch.testing.assert_close(t, other, rtol=1e-5, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")
    x = batches[0][0]
    want = ak.restore(copy.deepcopy(fast)).eval()(x)
    assert rel(fast.eval()(x), want) < 1e-9
    folded = ak.fuse(fast)
    assert rel(folded(x), want) < 1e-9
    assert accelerated(folded) == []


def train(model, batches):
    optimizer, losses = torch.optim.SGD(model.parameters(), 3e-4, momentum=0.9), []
    for images, labels in batches:
        torch.manual_seed(0)  # drop path
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# --- what stays, and what is undone -----------------------------------------------------------------------


def test_nothing_but_the_forward_changes():
    net = Net()
    classes, keys = {n: type(m) for n, m in net.named_modules()}, list(net.state_dict())
    tensors, text = {n: id(t) for n, t in [*net.named_parameters(), *net.named_buffers()]}, repr(net)
    assert ak.accelerate(net) is net
    assert accelerated(net) == list(PATHS)
    assert all(isinstance(m, classes[n]) for n, m in net.named_modules())
    assert list(net.state_dict()) == keys
    assert {n: id(t) for n, t in [*net.named_parameters(), *net.named_buffers()]} == tensors
    assert repr(net) == text
    assert ak.restore(net) is net
    assert {n: type(m) for n, m in net.named_modules()} == classes
    assert vars(net.stem).keys() == vars(Net().stem).keys()
    assert ak.explain(ak.restore(net)).left[0].reason == "accelerate(model) would run it"


def test_a_second_call_changes_the_backend():
    net = ak.accelerate(Net(), backend="eager")
    x = torch.randn(4, 3, 16, 16)
    assert {b.backend for b in ak.explain(net, x).blocks} == {"eager"}
    ak.accelerate(net, backend="branches")
    assert {b.backend for b in ak.explain(net, x).blocks} == {"branches"}
    with pytest.raises(ValueError, match="backend must be one of"):
        ak.accelerate(net, backend="fast")


def test_explain_shows_what_runs_and_what_does_not():
    net = ak.accelerate(Net(), backend="branches")
    net.add_module("other", byobnet.RepVggBlock(8, 8, 3, drop_path_rate=0.1))
    net.stem.conv_1x1.conv.register_forward_hook(lambda *_: None)
    table = ak.explain(net, (4, 3, 16, 16))
    assert [row.name for row in table.blocks] == list(PATHS)
    assert [row.backend for row in table.blocks] == ["host", "branches", "branches", "branches"]
    assert table.blocks[0].reason == "its library's own forward: conv_1x1.conv has hooks"
    assert table.blocks[1].input_shape == (4, 8, 8, 8)
    assert [(left.name, left.kind) for left in table.left] == [("other", "RepVggBlock")]
    assert "drop_path, between the branches, is a DropPath" in str(table)
    net.stem.conv_1x1.conv._forward_hooks.clear()
    with torch.autocast("cpu", torch.bfloat16):
        rows = ak.explain(ak.accelerate(nn.Sequential(byobnet.RepVggBlock(4, 4, 3))), (2, 4, 8, 8)).blocks
    assert "its identity is of torch.float32 where autocast's convolutions are of torch.bfloat16" in rows[0].reason


def test_what_is_done_to_a_block_has_its_effect():
    net, fast = pair()
    x = torch.randn(6, 3, 16, 16)
    for model in (net, fast):
        model.stem.conv_kxk.register_forward_hook(lambda m, args, out: out * 0.5)
        model.body[0].identity = nn.GroupNorm(2, 8)
        model.last.forward = lambda x: x
    assert_same_step(fast, net, x)
    for model in (net, fast):
        model.stem.conv_kxk._forward_hooks.clear()
        model.stem.conv_kxk.bn.eval()
        model.stem.conv_1x1.bn.weight.requires_grad_(False)
        for module in (model.stem.conv_kxk.conv, model.stem.conv_1x1.conv):
            module.stride = (1, 1)
    a, b = fast(x), net(x)
    torch.testing.assert_close(a, b)
    assert ak.explain(fast, x).blocks[0].backend == "eager"  # one batch norm of its step is in eval


def test_a_step_taken_again_sees_what_has_changed_since():
    net, fast = pair()
    x = torch.randn(6, 3, 16, 16)
    changes = (
        lambda m: None,
        lambda m: setattr(m.stem.conv_kxk.bn, "act", nn.ReLU()),
        lambda m: setattr(m.stem.conv_kxk.bn, "act", nn.Identity()),
        lambda m: m.body[0].conv_scale.bn.drop.register_forward_hook(lambda m, args, out: out * 2),
        lambda m: m.body[0].conv_scale.bn.drop._forward_hooks.clear(),
        lambda m: setattr(m.body[0], "drop_path", stand_ins.Halved()),
        lambda m: setattr(m.body[0], "drop_path", nn.Identity()),
        lambda m: m.last.rbr_dense.append(nn.ReLU()),
        lambda m: m.last.rbr_1x1.bn.eval(),
    )
    for change in changes:
        change(net), change(fast)
        for _ in range(3):
            assert_same_step(fast, net, x)
    assert all("_lanes" in m.__dict__ for m in (fast.stem, fast.body[0], fast.last))
    assert "_lanes" not in ak.restore(fast).stem.__dict__


def test_calls_with_other_arguments_are_the_hosts():
    _, fast = pair()
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(fast.stem(x=x), fast.stem(x))
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        fast.stem(x, y=1)


def test_hooks_outside_the_block_run():
    net, fast = pair()
    calls = []
    for model in (net, fast):
        own = []
        calls.append(own)
        model.stem.register_forward_hook(lambda m, args, out, own=own: own.append(out.shape))
        model.stem.act.register_forward_hook(lambda m, args, out, own=own: own.append("act"))
        model.stem.register_full_backward_hook(lambda m, into, out, own=own: own.append("backward"))
    assert_same_step(fast, net)
    assert calls == [["act", (6, 8, 8, 8), "backward"]] * 2


# --- copies -----------------------------------------------------------------------------------------------


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def through_an_average(model):
    return torch.optim.swa_utils.AveragedModel(model).module


@pytest.mark.parametrize("through", [copy.deepcopy, through_pickle, through_torch_save, through_an_average])
def test_copies_are_accelerated_and_their_own(through):
    net, fast = pair()
    twin = through(fast)
    assert accelerated(twin) == list(PATHS)
    assert type(twin.stem) is type(fast.stem)
    assert {id(p) for p in twin.parameters()}.isdisjoint(map(id, fast.parameters()))
    with torch.no_grad():
        for p in fast.parameters():  # a copy that still ran its original's forward would follow it
            p.zero_()
    assert_same_step(twin, net)


def test_a_replica_runs_its_own_parameters():
    net, fast = pair(training=False)
    replica = fast.stem._replicate_for_data_parallel()
    replica._modules = {k: copy.deepcopy(m) for k, m in fast.stem._modules.items()}
    with torch.no_grad():
        fast.stem.conv_kxk.conv.weight.zero_()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(replica(x), net.stem(x))


def test_a_pickle_of_an_unknown_version_loads_plain(monkeypatch):
    _, fast = pair()
    data = pickle.dumps(fast.stem)
    monkeypatch.setattr("acnet_kernels.adapters.ADAPTERS", [])
    with pytest.warns(UserWarning, match="a RepVggBlock was pickled accelerated and is not now"):
        twin = pickle.loads(data)
    assert type(twin) is byobnet.RepVggBlock
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(twin(x), fast.stem(x))


# --- modes, dtypes, devices' likes ------------------------------------------------------------------------


def test_modes_dtypes_and_state_dicts():
    net, fast = pair()
    x = torch.randn(4, 3, 16, 16)
    for change in (
        lambda m: m.eval(),
        lambda m: m.train(),
        lambda m: m.double(),
        lambda m: m.to(torch.float32),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.requires_grad_(True),
        lambda m: m.load_state_dict(scramble(Net()).state_dict()),
    ):
        torch.manual_seed(3)
        change(net)
        torch.manual_seed(3)
        change(fast)
        assert_same_step(fast, net, x.to(net.head.weight))
    assert accelerated(fast) == list(PATHS)


def test_half_precision():
    net, fast = pair()
    net.bfloat16(), fast.bfloat16()
    x = torch.randn(6, 3, 16, 16).bfloat16()
    assert rel(fast(x), net.float()(x.float())) < 0.03


def test_gradient_checkpointing():
    net, fast = pair()
    x = torch.randn(6, 3, 16, 16)

    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    # The statistics move twice, here as there.
    fast.stem, net.stem = Checkpointed(fast.stem), Checkpointed(net.stem)
    assert_same_step(fast, net, x)


@pytest.mark.parametrize("training", [True, False])
def test_torch_compile(training):
    net, fast = pair(training)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = torch.compile(fast, backend=backend, fullgraph=True)
        assert_same_step(fast, net, forward=compiled)
    assert len(graphs) == 1
    names = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("batch_norm" in name for name in names) == 1  # that of RepGhost's first convolution
    torch.compiler.reset()


def test_tracers_see_the_librarys_operators():
    net, fast = pair(training=False)
    x = torch.randn(2, 3, 16, 16)
    for traced in (torch.fx.symbolic_trace(fast), torch.jit.trace(fast, x)):
        torch.testing.assert_close(traced(x), net(x))


def test_export():
    net, fast = pair(training=False)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(torch.export.export(fast, (x,)).module()(x), net(x))


def test_functional_call_and_pruning():
    net, fast = pair(training=False)
    state = {k: v * 0.5 if v.is_floating_point() else v for k, v in net.state_dict().items()}
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(
        torch.func.functional_call(fast, state, (x,)), torch.func.functional_call(net, state, (x,))
    )
    for model in (net, fast):
        nn.utils.prune.l1_unstructured(model.stem.conv_kxk.conv, "weight", 0.5)
        nn.utils.parametrizations.weight_norm(model.last.rbr_dense.conv)
    torch.testing.assert_close(fast(x), net(x))
    torch.testing.assert_close(ak.fuse(fast)(x), net(x), rtol=1e-4, atol=1e-5)


# --- the host's own folding, and synchronised batch norms --------------------------------------------------


def test_the_librarys_own_folding_leaves_plain_convolutions():
    net, fast = pair(training=False)
    x = torch.randn(2, 3, 16, 16)
    want = net(x)
    folded = reparameterize_model(fast)
    torch.testing.assert_close(folded(x), want, rtol=1e-4, atol=1e-5)
    assert folded.stem.reparam_conv is not None
    rows = {row.name: row for row in ak.explain(folded, x).blocks}
    assert (rows["stem"].backend, rows["stem"].reason) == ("deployed", "folded by its own library")
    assert folded.state_dict().keys() == reparameterize_model(net).state_dict().keys()
    assert ak.restore(folded).stem.reparam_conv is not None
    torch.testing.assert_close(ak.fuse(folded)(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("convert", [nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm])
@pytest.mark.parametrize("before", [True, False])
def test_synchronised_batch_norms(convert, before):
    net = scramble(Net())
    fast = ak.accelerate(convert(copy.deepcopy(net))) if before else convert(ak.accelerate(copy.deepcopy(net)))
    assert accelerated(fast) == list(PATHS)
    assert all(
        isinstance(b, HostBlock) and b.module_path_reason() is None for b in map(seen, (fast.stem, fast.last))
    )
    assert_same_step(fast.eval(), net.eval())
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ak.fuse(fast)(x), net(x), rtol=1e-4, atol=1e-5)


def gradients(net, images):
    net(images).square().mean().backward()
    found = {n.removeprefix("module."): p.grad for n, p in net.named_parameters()}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}


def in_processes(rank, world):
    """Kind → gradients, of every combination; "ddp" is one process with all images."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    images = torch.randn(4 * world, 3, 16, 16)
    own = images[4 * rank : 4 * rank + 4]
    found = {}
    for kind in ("ddp", "ddp before", "ddp after", "fsdp", "fsdp before", "fsdp after"):
        torch.manual_seed(0)
        net = scramble(Net())
        del net.body[1]  # its first convolution is its library's, whose nn.SyncBatchNorm refuses the CPU
        if kind == "ddp":
            found[kind] = gradients(net, images)
            continue
        if "before" in kind:
            ak.accelerate(net, backend="branches")
        if "ddp" in kind:
            net = nn.parallel.DistributedDataParallel(net)
            nn.SyncBatchNorm.convert_sync_batchnorm(net)  # DDP's constructor refuses it on the CPU
        else:
            for module in (net.stem, net.last, net):
                fully_shard(module)
        if "after" in kind:
            ak.accelerate(net, backend="branches")
        blocks = ak.explain(net).blocks
        assert len(blocks) == (0 if kind == "fsdp" else 3)
        assert not any("its library's own forward" in block.reason for block in blocks)
        found[kind] = gradients(net, own)
        if "fsdp" in kind:
            ak.restore(net)
            assert type(net.stem).__name__ == "FSDPRepVggBlock"
            assert type(net.stem).__mro__[2] is byobnet.RepVggBlock
            assert accelerated(net) == []
            net(own)
    return found


@pytest.mark.slow
def test_ddp_with_synchronised_batch_norms_and_fsdp2():
    for found in distributed.run(2, in_processes):
        for kind, got in found.items():
            want = found[kind.split()[0]]
            assert got.keys() == want.keys()
            for name, t in want.items():
                message = f"{kind}: {name}"
                torch.testing.assert_close(got[name], t, rtol=1e-3, atol=1e-5, msg=lambda m, n=message: f"{n}: {m}")


def test_convert_leaves_accelerated_blocks_alone():
    net = ak.accelerate(nn.Sequential(byobnet.RepVggBlock(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)))
    both = ak.convert(net)
    assert isinstance(both[0], Accelerated)
    assert isinstance(both[1], ak.ACBlock)
    assert len(ak.explain(both, (2, 3, 8, 8)).blocks) == 2
    assert len(ak.fold(both.eval())) == 2
    with pytest.raises(ValueError, match="block 0 is not folded"):
        weight_ranges(both)


def test_tune():
    report = ak.tune(ak.accelerate(Net()), (2, 3, 16, 16))
    assert {name for layer in report.layers for name in layer.names} == set(PATHS)
