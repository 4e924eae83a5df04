"""Several processes: SyncBatchNorm in one collective each way, DDP, FSDP2, distributed checkpoints."""

import copy
import functools

import distributed
import oracle
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from oracle import rel, scramble
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from acnet_kernels import ACBlock, explain

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch is built without gloo")


class Collectives(TorchDispatchMode):
    """Counts the c10d operations inside (CommDebugMode would install global module hooks)."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def synced(module):
    return nn.SyncBatchNorm.convert_sync_batchnorm(module)


def part(t, rank, sizes):
    return t.split(list(sizes))[rank]


def result(b, x, out, **more):
    return {
        "out": out.detach().cpu(),
        "x": x.grad.cpu(),
        "grads": {name: p.grad.cpu() for name, p in b.named_parameters() if p.grad is not None},
        "buffers": {name: t.cpu() for name, t in b.named_buffers()},
        **more,
    }


def check_against_whole(results, b, x, grad, sizes, autocast=None, device="cpu"):
    """Every process's part together against one process that has the whole batch.

    Eager, too, convolves each part alone: a library rounds a large batch and a small one differently, and where the
    mean is far above the deviation that difference is seen.
    """
    true = oracle.truth(b, x, grad)

    def eager(m, t):
        for conv in m.convs().values():
            conv.forward = functools.partial(by_parts, conv.forward)
        with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
            return m._forward_modules(t)

    def by_parts(convolve, t):
        return torch.cat([convolve(p) for p in t.split(list(sizes))])

    got = {key: torch.cat([r[key] for r in results]) for key in ("out", "x")}
    for name in results[0]["grads"]:  # each process holds its share
        got[name] = torch.stack([r["grads"][name] for r in results]).sum(0)
    whole = copy.deepcopy(b).to(device)
    its = oracle.run(whole, x.to(device), grad.to(device), eager)
    oracle.assert_as_good_as(got, {name: t.cpu() for name, t in its.items()}, true)
    eager(whole, x.to(device))
    slack = {"rtol": 1e-2, "atol": 1e-2} if autocast else {}
    for r in results:
        for name, buffer in whole.named_buffers():
            torch.testing.assert_close(r["buffers"][name], buffer.cpu(), msg=lambda m, n=name: f"{n}: {m}", **slack)


# --- SyncBatchNorm ----------------------------------------------------------------------------------------


def sync_steps(rank, world, cases):
    """One forward and backward of this process's part of every case, and the collectives that took."""
    found, device = [], distributed.device()
    for b, x, grad, sizes, autocast in cases:
        b = synced(b).to(device)
        x = part(x, rank, sizes).detach().to(device).requires_grad_()
        plan = explain(b, x).blocks[0]
        cast = torch.autocast(device.type, autocast or torch.bfloat16, enabled=bool(autocast))
        with Collectives() as forward, cast:
            out = b(x)
        with Collectives() as backward:
            out.backward(part(grad, rank, sizes).to(out))
        counts = len(forward.names), len(backward.names)
        found.append(result(b, x, out, collectives=counts, backend=plan.backend))
    return found


def freeze(b, name):
    norm = getattr(b, name)
    norm.eval().requires_grad_(False)
    return b


def shares(world):
    """Eight images unevenly over 1 to 8 processes."""
    return (9 - world, *(1,) * (world - 1))


def sync_cases(world):
    """(block, whole input, whole gradient, rows a process, autocast dtype): every option that touches a norm."""
    uneven = shares(world)
    blocks = [
        ACBlock(4, 6, 3, padding=1),
        ACBlock(4, 6, 3, padding=1, momentum=None),
        ACBlock(4, 6, 3, padding=1, use_affine=False),
        ACBlock(4, 6, 3, padding=1, norm="sum"),
        ACBlock(4, 6, 3, stride=2, dilation=2, padding=2, groups=2, branches=("square", "hor")),
        ACBlock(4, 6, 3, padding=1, padding_mode="reflect").to(memory_format=torch.channels_last),
        freeze(ACBlock(4, 6, 3, padding=1), "ver_bn"),
    ]
    cases = [(b, torch.randn(8, 4, 7, 5) * 3 + 5, uneven, None) for b in blocks]
    far = torch.randn(8, 4, 7, 5) * 0.1 + 1e3  # mean ≫ deviation: what E[x²] − E[x]² would lose
    cases.append((ACBlock(4, 6, 3), far, uneven, None))
    cases.append((ACBlock(4, 6, 3, padding=1), torch.randn(8, 4, 7, 5), uneven, torch.bfloat16))
    cases.append((ACBlock(4, 6, 3, padding=1).double(), torch.randn(8, 4, 7, 5).double(), uneven, None))
    if world > 1:
        empty = (0, *shares(world - 1))
        cases.append((ACBlock(4, 6, 3, padding=1), torch.randn(8, 4, 7, 5), empty, None))
        single = (1,) * world  # one value per channel and process: only the joint batch has a variance
        cases.append((ACBlock(4, 6, 3, padding=1), torch.randn(world, 4, 1, 1), single, None))
    found = []
    for b, x, sizes, autocast in cases:
        grad = torch.randn_like(copy.deepcopy(b).eval()(x))
        found.append((scramble(b), x, grad, sizes, autocast))
    return found


def check_synced(world, backend):
    """sync_cases in world processes against one: equal, by one collective forward and one backward."""
    cases = sync_cases(world)
    by_rank = distributed.run(world, sync_steps, cases, backend=backend)
    for i, (b, x, grad, sizes, autocast) in enumerate(cases):
        results = [r[i] for r in by_rank]
        if world == 1:  # nothing to synchronise
            assert results[0]["collectives"] == (0, 0), f"case {i}"
        else:
            assert {(r["collectives"], r["backend"]) for r in results} == {((1, 1), "synced")}, f"case {i}"
        check_against_whole(results, b, x, grad, sizes, autocast, "cuda" if backend == "nccl" else "cpu")


@pytest.mark.parametrize("world", [1, 2, 3])
def test_synced_norms_equal_one_process_with_the_whole_batch(world):
    check_synced(world, "gloo")


def sync_compiled(rank, world, b, x, grad, sizes):
    b, x = synced(b), part(x, rank, sizes).detach().requires_grad_()
    out = torch.compile(b, fullgraph=True, backend="aot_eager")(x)
    out.backward(part(grad, rank, sizes))
    return result(b, x, out)


def test_synced_norms_compiled():
    b = scramble(ACBlock(4, 6, 3, padding=1))
    x, grad, sizes = torch.randn(8, 4, 7, 5), torch.randn(8, 6, 7, 5), (5, 3)
    results = distributed.run(2, sync_compiled, b, x, grad, sizes)  # each compiles for itself
    check_against_whole(results, b, x, grad, sizes)


def sync_rest(rank, world, b, x, grad):
    """In a subgroup, over two groups, in eval, recomputed, differentiated twice and in batches."""
    found = {}
    pair, other = dist.new_group([0, 1]), dist.new_group([0, 1, 2])
    alone = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(b), pair if rank < 2 else None)
    if rank < 2:
        xs = x[3 * rank : 3 * rank + 3].detach().requires_grad_()
        out = alone(xs)
        out.backward(grad[3 * rank : 3 * rank + 3])
        found["pair"] = result(alone, xs, out)
        alone.hor_bn.process_group = other
        found["two groups"] = alone.module_path_reason()
    evaluated = synced(copy.deepcopy(b)).eval()
    with Collectives() as counted:
        found["eval"] = evaluated(x).detach()
    found["eval collectives"] = len(counted.names)
    recomputed = synced(copy.deepcopy(b))
    checkpoint(recomputed, x.detach().requires_grad_(), use_reentrant=False).sum().backward()
    found["updates"] = [int(bn.num_batches_tracked) for bn in recomputed.norms().values()]
    again = synced(copy.deepcopy(b))
    again.backend = "eager"
    found["reason"] = again.plan(x)[1].reason
    xd = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(again(xd).square().sum(), xd, create_graph=True)
    try:
        g.sum().backward()
    except RuntimeError as error:
        found["twice"] = str(error)
    out = synced(copy.deepcopy(b))(xd)
    try:
        torch.autograd.grad(out, xd, torch.stack([grad, grad]), is_grads_batched=True)
    except RuntimeError as error:
        found["batched"] = str(error)
    with forward_ad.dual_level():
        try:
            again(forward_ad.make_dual(x, x))
        except ValueError as error:
            found["forward mode"] = str(error)
    return found


def test_synced_norms_in_groups_and_in_eval():
    b = scramble(ACBlock(4, 6, 3, padding=1))
    x, grad = torch.randn(8, 4, 7, 5), torch.randn(8, 6, 7, 5)
    results = distributed.run(3, sync_rest, b, x, grad)
    check_against_whole([r["pair"] for r in results[:2]], b, x[:6], grad[:6], (3, 3))
    assert results[0]["two groups"] == "its batch norms synchronise over different process groups"
    for r in results:
        assert r["eval collectives"] == 0
        assert rel(r["eval"], copy.deepcopy(b).eval()(x)) < 1e-6
        assert r["reason"].startswith("eager was requested but SyncBatchNorm's statistics span processes")
        assert r["updates"] == [2, 2, 2]  # as nn.SyncBatchNorm's own: once more in the recomputation
        assert "once_differentiable" in r["twice"]
        assert "one gradient at a time" in r["batched"]
        assert "SyncBatchNorm has no rule for forward-mode differentiation" in r["forward mode"]


def test_without_processes_a_synced_block_runs_as_any_other():
    b = scramble(ACBlock(4, 6, 3, padding=1))
    twin = synced(copy.deepcopy(b))
    x = torch.randn(2, 4, 8, 8)
    assert twin.module_path_reason() is None
    assert twin.plan(x)[1].backend is b.plan(x)[1].backend
    assert torch.equal(twin(x), b(x))
    twin.eval().switch_to_deploy()
    assert rel(twin(x), b.eval()(x)) < 1e-6


# --- DDP and FSDP2 ----------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two blocks and a head, and a block that no forward uses."""

    def __init__(self, spare=True, backends=("auto", "auto")):
        super().__init__()
        self.stem = ACBlock(3, 8, 3, padding=1, backend=backends[0])
        self.body = ACBlock(8, 8, 3, padding=1, stride=2, backend=backends[1])
        self.head = nn.Linear(8, 4)
        if spare:
            self.spare = ACBlock(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.body(self.stem(x).relu()).relu()
        return self.head(x.mean((2, 3)))


DDP_OPTIONS = [
    {"static_graph": True},
    {"find_unused_parameters": True, "gradient_as_bucket_view": True},
    {"find_unused_parameters": True, "broadcast_buffers": False},
]


def train_ddp(rank, world, net, x, y, sizes, options):
    """Three steps of SGD under DDP for every set of options: the parameters and buffers after."""
    states = []
    for option in options:
        ddp = DistributedDataParallel(copy.deepcopy(net), **option)
        synced(ddp.module)  # after wrapping: DDP's constructor refuses SyncBatchNorm on the CPU
        states.append(steps(ddp, part(x, rank, sizes), part(y, rank, sizes), world))
    return states


def steps(model, x, y, world, count=3):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(count):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y, reduction="sum").mul(world / 8).backward()  # DDP averages
        optimizer.step()
    return {name.removeprefix("module."): t.detach().clone() for name, t in model.state_dict().items()}


def test_ddp_equals_one_process():
    net = Net()
    x, y = torch.randn(8, 3, 9, 9), torch.randint(4, (8,))
    results = distributed.run(2, train_ddp, net, x, y, (3, 5), DDP_OPTIONS)
    net = net.double()
    want = steps(net, x.double(), y, 1)
    for states in results:
        for option, state in zip(DDP_OPTIONS, states, strict=True):
            assert_same_state(state, want, str(option))


def assert_same_state(state, want, what):
    for name, t in want.items():
        found = state[name].to(t.dtype)
        torch.testing.assert_close(found, t, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{what} {n}: {m}")


FAST = [("branches", "branches"), ("moments", "recompute")]


def train_replicas(rank, world, net, x, y, sizes, options):
    """steps() under DDP, statistics not synchronised: for every option, FAST's and eager's in float64."""
    x, y = part(x, rank, sizes), part(y, rank, sizes)
    found = {}
    for option in options:
        for backends in FAST:
            replica = copy.deepcopy(net)
            replica.stem.backend, replica.body.backend = backends
            ran = [row.backend for row in explain(replica, x).blocks if row.input_shape]
            assert ran == list(backends)
            found[str(option), backends] = steps(DistributedDataParallel(replica, **option), x, y, world)
        eager = copy.deepcopy(net).double()
        eager.stem.backend = eager.body.backend = "eager"
        found[str(option), None] = steps(DistributedDataParallel(eager, **option), x.double(), y, world)
    return found


def test_ddp_with_each_process_its_own_statistics():
    net, sizes = Net(), (3, 5)
    x, y = torch.randn(8, 3, 9, 9), torch.randint(4, (8,))
    for states in distributed.run(2, train_replicas, net, x, y, sizes, DDP_OPTIONS):
        for (option, backends), state in states.items():
            assert_same_state(state, states[option, None], f"{option} {backends}")


def train_fsdp(rank, world, net, x, y, folder):
    """Trains with FSDP2, saves with torch.distributed.checkpoint, resumes in a fresh network, folds."""
    mesh = init_device_mesh("cpu", (world,))

    def sharded(net):
        for module in net.modules():
            if isinstance(module, ACBlock):
                fully_shard(module, mesh=mesh)
        return fully_shard(net, mesh=mesh)

    def step(net, optimizer):
        optimizer.zero_grad()
        # FSDP averages over processes; both see the whole batch here, so that one process is the oracle.
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    first = sharded(copy.deepcopy(net))
    optimizer = torch.optim.SGD(first.parameters(), 0.1, momentum=0.9)
    step(first, optimizer)
    model_state, optimizer_state = get_state_dict(first, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    step(first, optimizer)

    fresh = sharded(Net(spare=False, backends=(net.stem.backend, net.body.backend)))
    resumed = torch.optim.SGD(fresh.parameters(), 0.1, momentum=0.9)
    step(fresh, resumed)  # wrong weights and momenta, to be overwritten
    model_state, optimizer_state = get_state_dict(fresh, resumed)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(fresh, resumed, model_state_dict=model_state, optim_state_dict=optimizer_state)
    step(fresh, resumed)

    def whole(net):
        return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in net.state_dict().items()}

    backends = [b.backend for b in explain(first, tuple(x.shape)).blocks if b.input_shape]
    return {"first": whole(first), "resumed": whole(fresh), "backends": backends}


@pytest.mark.parametrize("backends", [("branches", "branches"), ("moments", "recompute")])
def test_fsdp2_trains_saves_and_resumes(backends, tmp_path):
    net = Net(spare=False, backends=backends)
    x, y = torch.randn(4, 3, 9, 9), torch.randint(4, (4,))
    results = distributed.run(2, train_fsdp, net, x, y, str(tmp_path))
    net = net.double()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x.double()), y).backward()
        optimizer.step()
    for r in results:
        assert r["backends"] == list(backends)
        for name, t in net.state_dict().items():
            for run in ("first", "resumed"):
                torch.testing.assert_close(
                    r[run][name].to(t.dtype), t, rtol=1e-4, atol=1e-5, msg=lambda m, n=name, r=run: f"{r} {n}: {m}"
                )
