"""What users do to modules: copies, files, averages, pruning, parametrizations, hooks, freezing, optimizers."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from oracle import rel, scramble
from stacks import EVALUATING, MODES, TRAINING, Net, assert_same_state, through_modules
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from acnet_kernels import ACBlock, convert, explain, fuse

every_training_backend = pytest.mark.parametrize("backend", TRAINING)
every_mode = pytest.mark.parametrize(("backend", "training"), MODES)


def batches(count=3):
    return [(torch.randn(4, 4, 8, 8), torch.randint(3, (4,))) for _ in range(count)]


def loss_of(net, x, y):
    return nn.functional.cross_entropy(net(x), y)


def train(net, data, make=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)):
    optimizer = make([p for p in net.parameters() if p.requires_grad])
    for x, y in data:

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = loss_of(net, x, y)
            loss.backward()
            return loss

        optimizer.step(closure)
    return net


# --- copies and files -------------------------------------------------------------------------------------


def saved_and_loaded(net):
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), saved_and_loaded])
@every_training_backend
def test_copies_train_on_alike(backend, again):
    first, *rest = batches()
    net = train(Net(backend), [first])  # what a step leaves behind must copy too
    twin = again(net)
    assert all(p is not q for p, q in zip(net.parameters(), twin.parameters(), strict=True))
    before = copy.deepcopy(net.state_dict())
    train(twin, rest)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    train(net, rest)
    assert_same_state(twin, net, rtol=0, atol=0)


@every_training_backend
def test_ema_and_swa(backend):
    net = Net(backend)
    twin = through_modules(net)
    data = batches()
    states = []
    for model in (net, twin):
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        swa = AveragedModel(model)
        for batch in data:
            train(model, [batch])
            ema.update_parameters(model)
            swa.update_parameters(model)
        update_bn([x for x, _ in data], swa)  # sets momentum=None and resets the statistics meanwhile
        assert swa.module.first.square_bn.momentum == 0.1
        assert int(swa.module.first.hor_bn.num_batches_tracked) == len(data)
        states.append((ema, swa))
    for got, want in zip(*states, strict=True):
        assert_same_state(got, want)
        got.eval()
        x = data[0][0]
        assert rel(fuse(got)(x), got(x)) < 1e-5


# --- pruning and parametrizations -------------------------------------------------------------------------


@every_training_backend
def test_pruned_blocks_train_fold_and_become_permanent(backend):
    def pruned(net):
        targets = [(conv, "weight") for b in (net.first, net.second) for conv in b.convs().values()]
        prune.global_unstructured(targets, prune.L1Unstructured, amount=0.5)
        return targets

    net = Net(backend)
    twin = through_modules(net)  # before pruning: torch cannot copy what pruning leaves
    targets = pruned(net)
    pruned(twin)
    assert "has hooks" in explain(net).blocks[0].reason
    data = batches()
    train(net, data)
    train(twin, data)
    assert_same_state(net, twin)
    for conv, _ in targets:
        assert (conv.weight_mask == 0).any()
    net.eval()
    x = data[0][0]
    want = net(x)
    assert rel(fuse(net)(x), want) < 1e-5
    for conv, name in targets:
        prune.remove(conv, name)
    assert net.first.module_path_reason() is None
    assert rel(net(x), want) < 1e-5
    assert rel(fuse(net)(x), want) < 1e-5


@pytest.mark.parametrize("parametrization", [parametrizations.weight_norm, parametrizations.spectral_norm])
@every_training_backend
def test_parametrized_blocks_train_and_fold(backend, parametrization):
    net = Net(backend)
    for conv in net.first.convs().values():
        parametrization(conv)
    assert "is a Parametrized" in explain(net).blocks[0].reason
    data = batches()
    twin = through_modules(net)
    assert_same_state(train(net, data), train(twin, data))
    net.eval()
    x = data[0][0]
    want = net(x)
    assert rel(fuse(net)(x), want) < 1e-5
    for conv in net.first.convs().values():
        nn.utils.parametrize.remove_parametrizations(conv, "weight")
    assert net.first.module_path_reason() is None
    assert rel(net(x), want) < 1e-5


# --- torch.func -------------------------------------------------------------------------------------------


@every_mode
def test_functional_call(backend, training):
    net = scramble(Net(backend)).train(training)
    state = {name: t.clone() * 2 for name, t in net.state_dict().items()}
    before = copy.deepcopy(net.state_dict())
    other = copy.deepcopy(net)
    other.load_state_dict(state)
    x = torch.randn(4, 4, 8, 8)
    assert rel(torch.func.functional_call(net, state, (x,)), through_modules(other)(x)) < 1e-5
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert int(state["first.hor_bn.num_batches_tracked"]) == int(training)


@every_mode
def test_func_grad_with_buffers_as_arguments(backend, training):
    net = scramble(Net(backend)).train(training)
    twin = through_modules(net)
    x, y = batches(1)[0]

    def loss(parameters, buffers):
        return nn.functional.cross_entropy(torch.func.functional_call(net, {**parameters, **buffers}, (x,)), y)

    parameters = {name: p.detach() for name, p in net.named_parameters()}
    buffers = {name: t.clone() for name, t in net.named_buffers()}
    got = torch.func.grad(loss)(parameters, buffers)
    loss_of(twin, x, y).backward()
    for name, p in twin.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-5)
    for name, t in twin.named_buffers():
        torch.testing.assert_close(buffers[name], t)


@every_training_backend
def test_func_transforms_cannot_move_statistics_behind_their_back(backend):
    net = Net(backend)
    before = copy.deepcopy(net.state_dict())
    x = torch.randn(3, 2, 4, 8, 8)
    with pytest.raises(ValueError, match=r"running statistics.*functional_call"):
        torch.func.grad(lambda t: net(t).sum())(x[0])
    with pytest.raises(ValueError, match=r"running statistics.*torch\.func\.vmap"):
        torch.func.vmap(net)(x)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


@pytest.mark.parametrize("backend", EVALUATING)
def test_vmap_and_jacobians_by_running_statistics(backend):
    net = scramble(Net(backend)).eval()
    x = torch.randn(3, 2, 4, 8, 8)
    want = torch.stack([net(t) for t in x])
    assert rel(torch.func.vmap(net)(x), want) < 1e-5
    per_sample = torch.func.vmap(torch.func.grad(lambda t: net(t[None]).sum()))(x[:, 0])
    leaf = x[:, 0].clone().requires_grad_()
    net(leaf).sum().backward()
    assert rel(per_sample, leaf.grad) < 1e-5
    one = x[0, :1].double()
    double = copy.deepcopy(net).double()
    assert rel(torch.func.jacfwd(double)(one), torch.func.jacrev(double)(one)) < 1e-10


@every_training_backend
def test_vmap_by_batch_statistics_that_are_not_tracked(backend):
    b = ACBlock(4, 6, 3, padding=1, backend=backend)
    for name in b.norms():
        setattr(b, f"{name}_bn", nn.BatchNorm2d(6, track_running_stats=False))
    x = torch.randn(3, 2, 4, 8, 8)
    want = torch.stack([b(t) for t in x])
    assert rel(torch.func.vmap(b)(x), want) < 1e-5


# --- hooks ------------------------------------------------------------------------------------------------


@every_mode
def test_hooks_on_the_block_run_on_the_fast_path(backend, training):
    b = scramble(ACBlock(4, 6, 3, padding=1, backend=backend)).train(training)
    seen = []
    b.register_forward_pre_hook(lambda m, args: seen.append("before"))
    b.register_forward_hook(lambda m, args, out: seen.append("after") or 2 * out)
    b.register_full_backward_pre_hook(lambda m, g: seen.append("gradient in"))
    b.register_full_backward_hook(lambda m, gi, go: seen.append("gradient out"))
    assert b.module_path_reason() is None
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    out = b(x)
    assert rel(out, 2 * copy.deepcopy(b)._forward_modules(x)) < 1e-5
    out.sum().backward()
    assert seen == ["before", "after", "gradient in", "gradient out"]


@every_mode
def test_hooks_inside_the_block_see_batch_norms_own_values(backend, training):
    b = scramble(ACBlock(4, 6, 3, padding=1, backend=backend)).train(training)
    twin = copy.deepcopy(b)
    seen = {}
    b.ver_bn.register_forward_hook(lambda m, args, out: seen.update(out=out))
    b.ver_conv.register_full_backward_hook(lambda m, gi, go: seen.update(gradient=go[0]))
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    b(x).square().sum().backward()
    y = twin.ver_conv(twin.geometry.placement(twin.taps["ver"]).apply(x))
    assert rel(seen["out"], twin.ver_bn(y)) < 1e-6
    assert seen["gradient"].shape == y.shape


@every_mode
def test_tensor_hooks_and_post_accumulate_hooks(backend, training):
    net = scramble(Net(backend)).train(training)
    twin = through_modules(net)
    x, y = batches(1)[0]
    stepped = {}
    for name, p in net.named_parameters():
        p.register_post_accumulate_grad_hook(lambda t, n=name: stepped.update({n: t.grad.clone()}))
    net.first.square_conv.weight.register_hook(lambda g: 3 * g)
    loss_of(net, x, y).backward()
    loss_of(twin, x, y).backward()
    for name, p in twin.named_parameters():
        factor = 3 if name == "first.square_conv.weight" else 1
        torch.testing.assert_close(stepped[name], factor * p.grad, rtol=1e-4, atol=1e-5)


# --- freezing and optimizers ------------------------------------------------------------------------------


@every_training_backend
def test_requires_grad_toggled_mid_training(backend):
    net = Net(backend)
    twin = through_modules(net)
    toggles = [
        lambda n: n.first.hor_conv.requires_grad_(False),
        lambda n: n.first.requires_grad_(False),
        lambda n: n.first.square_bn.requires_grad_(True),
        lambda n: n.requires_grad_(True),
    ]
    for toggle in toggles:
        data = batches(1)
        for model in (net, twin):
            toggle(model)
            frozen = [p.detach().clone() for p in model.parameters() if not p.requires_grad]
            train(model, data)
            still = [p for p in model.parameters() if not p.requires_grad]
            assert all(torch.equal(p, q) for p, q in zip(frozen, still, strict=True))
        assert_same_state(net, twin)
    assert [p.grad is None for p in net.parameters()] == [p.grad is None for p in twin.parameters()]


@every_training_backend
def test_frozen_batch_norms(backend):
    net = scramble(Net(backend))

    def freeze(model, norms):
        for bn in norms(model):
            bn.eval().requires_grad_(False)

    for norms in (
        lambda n: [n.first.square_bn],  # one of three
        lambda n: n.first.norms().values(),  # a whole block
        lambda n: [*n.first.norms().values(), *n.second.norms().values()],
    ):
        twin = through_modules(net)
        freeze(net, norms)
        freeze(twin, norms)
        before = [bn.running_mean.clone() for bn in norms(net)]
        data = batches()
        assert_same_state(train(net, data), train(twin, data))
        assert all(torch.equal(bn.running_mean, t) for bn, t in zip(norms(net), before, strict=True))
    assert net.first.plan(data[0][0])[1].backend.NAME in EVALUATING


OPTIMIZERS = {
    "sgd foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@every_training_backend
def test_optimizers(backend, make):
    net = Net(backend).double()  # in float64 even Adam's sign-like first steps agree
    twin = through_modules(net)
    data = [(x.double(), y) for x, y in batches()]
    assert_same_state(train(net, data, make), train(twin, data, make), rtol=1e-6, atol=1e-8)


@every_training_backend
def test_gradient_accumulation(backend):
    net = Net(backend)
    twin = through_modules(net)
    for model in (net, twin):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(2):
            for x, y in batches(3):
                (loss_of(model, x, y) / 3).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_state(net, twin)


@every_training_backend
def test_two_forwards_before_one_backward(backend):
    b = ACBlock(4, 6, 3, padding=1, backend=backend)
    twin = copy.deepcopy(b)
    x, y = torch.randn(2, 4, 8, 8), torch.randn(3, 4, 7, 9)
    (b(x).square().sum() + b(y).square().sum()).backward()
    (twin._forward_modules(x).square().sum() + twin._forward_modules(y).square().sum()).backward()
    for p, q in zip(b.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3)


@every_training_backend
def test_changing_a_weight_in_place_before_backward_is_caught(backend):
    b = ACBlock(4, 6, 3, padding=1, backend=backend)
    out = b(torch.randn(2, 4, 8, 8, requires_grad=True))
    with torch.no_grad():
        b.square_conv.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@every_training_backend
def test_a_converted_network_warns_of_nothing_in_training(backend):
    net = convert(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)), backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.train()(torch.randn(2, 4, 8, 8)).sum().backward()
        net.eval()(torch.randn(2, 4, 8, 8))
        fuse(net)
