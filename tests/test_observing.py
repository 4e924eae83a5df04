"""convert(example=): where torch.fx cannot trace a model, one run tells which batch norm takes which output."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import rel, scramble
from torch import nn
from torch.nn import BatchNorm2d, Conv2d
from torchvision.ops import FrozenBatchNorm2d

import acnet_kernels as ak
from acnet_kernels import ACBlock

X = torch.rand(2, 4, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
NO_NORM = "no BatchNorm2d was found to consume it alone"


def conv():
    return Conv2d(4, 4, 3, padding=1)


def network(kind):
    return scramble(kind().double())


class Net(nn.Module):
    """Untraceable by its control flow; a subclass says what is done with a convolution w and a batch norm n."""

    def __init__(self):
        super().__init__()
        self.w, self.n = conv(), BatchNorm2d(4)

    def forward(self, x):
        if x.sum() > 1e9:
            raise RuntimeError("never on an example")
        return self.flow(x)


class DropPath(nn.Module):
    def forward(self, x):
        return x * (torch.arange(len(x)) % 2).view(-1, 1, 1, 1) if self.training else x


class Direct(Net):
    def flow(self, x):
        return self.n(self.w(x)).relu()


class ByKeyword(Net):
    def flow(self, x):
        return self.n(input=self.w(x))


class Submodules(Net):
    """The convolution ends one module and the batch norm begins another, themselves untraceable or not."""

    def __init__(self):
        super().__init__()
        self.w = nn.Sequential(nn.Tanh(), conv())
        self.n = nn.ModuleDict({"first": nn.Sequential(BatchNorm2d(4), nn.Tanh())})
        self.inner = Direct()

    def flow(self, x):
        return self.inner(self.n["first"](self.w(x)))


class Order(Net):
    """In a Sequential that cannot be traced, inside modules before and after its own."""

    def __init__(self):
        super().__init__()
        self.w = nn.Sequential(
            nn.Sequential(Direct(), conv()), BatchNorm2d(4), conv(), nn.Sequential(BatchNorm2d(4))
        )
        self.n = nn.Identity()

    def flow(self, x):
        return self.n(self.w(x))


class PairTwice(Net):
    def flow(self, x):
        return self.n(self.w(self.n(self.w(x)).relu()))


class ByACheckpoint(Net):
    def flow(self, x):
        return torch.utils.checkpoint.checkpoint(lambda t: self.n(self.w(t)), x, use_reentrant=False)


ABSORBED = [Direct, ByKeyword, Submodules, Order, PairTwice, ByACheckpoint]


class ReadLater(Net):
    def flow(self, x):
        y = self.w(x)
        return self.n(y) + y


class ReadBefore(Net):
    def flow(self, x):
        y = self.w(x)
        z = y.mean()
        return self.n(y) + z


class InPlace(Net):
    def flow(self, x):
        return self.n(self.w(x).relu_())


class InPlaceAfter(Net):
    def flow(self, x):
        y = self.w(x)
        z = self.n(y)
        return y.mul_(2) + z


class Returned(Net):
    def flow(self, x):
        y = self.w(x)
        return {"out": self.n(y), "kept": [y]}


class Kept(Net):
    def flow(self, x):
        self.kept = self.w(x)
        return self.n(self.kept)


class Hooked(Net):
    def __init__(self):
        super().__init__()
        self.w = nn.Sequential(conv())
        self.w.register_forward_hook(lambda module, args, out: out * 2)

    def flow(self, x):
        return self.n(self.w(x))


class Dropped(Net):
    def flow(self, x):
        return self.n(F.dropout2d(self.w(x), 0.5, self.training))


class DroppedByAModule(Net):
    def __init__(self):
        super().__init__()
        self.drop = DropPath()

    def flow(self, x):
        return self.n(self.drop(self.w(x)))


class Scripted(Net):
    def __init__(self):
        super().__init__()
        self.script = torch.jit.trace(nn.Tanh(), X)

    def flow(self, x):
        y = self.w(x)
        return self.n(y) + self.script(y)


class NormTwice(Net):
    """What the running statistics see twice."""

    def flow(self, x):
        y = self.w(x)
        return self.n(y) + self.n(y)


class ConvTwice(Net):
    def flow(self, x):
        self.w(x)
        return self.n(self.w(x))


class Unused(Net):
    def flow(self, x):
        self.w(x)
        return x


class NormElsewhere(Net):
    def flow(self, x):
        return self.n(self.n(self.w(x)))


class NormRead(Net):
    def flow(self, x):
        return self.n(self.w(x)) * self.n.weight.norm()


class NormForward(Net):
    def flow(self, x):
        return self.n(self.w(x)) + self.n.forward(x)


class TwoNorms(Net):
    def __init__(self):
        super().__init__()
        self.m = BatchNorm2d(4)

    def flow(self, x):
        return self.m(self.w(self.n(self.w(x))))


class TwoConvs(Net):
    def __init__(self):
        super().__init__()
        self.v = conv()

    def flow(self, x):
        return self.n(self.v(self.n(self.w(x))))


class Branches(Net):
    """Either of two convolutions, by the data, before one batch norm."""

    def __init__(self):
        super().__init__()
        self.v = conv()

    def flow(self, x):
        return self.n(self.w(x) if x.mean() > 0 else self.v(x))


STAY = "its batch norm n stays after the block: "
ELSEWHERE = STAY + "its output goes elsewhere too"
LEFT = [
    (ReadLater, ELSEWHERE),
    (ReadBefore, ELSEWHERE),
    (InPlace, ELSEWHERE),
    (InPlaceAfter, ELSEWHERE),
    (Returned, ELSEWHERE),
    (Kept, ELSEWHERE),
    (Hooked, NO_NORM),
    (Dropped, ELSEWHERE),
    (DroppedByAModule, ELSEWHERE),
    pytest.param(Scripted, ELSEWHERE, marks=pytest.mark.filterwarnings("ignore:`torch.jit.trace")),
    (NormTwice, ELSEWHERE),
    (ConvTwice, ELSEWHERE),
    (Unused, NO_NORM),
    (NormElsewhere, STAY + "other maps go through it too, or may"),
    (NormRead, STAY + "its tensors are read outside its own forward"),
    (NormForward, STAY + "its tensors are read outside its own forward"),
    (TwoNorms, "its batch norms m, n stay after the block: none of them takes all of its output"),
    (TwoConvs, STAY + "other maps go through it too, or may"),
    (Branches, STAY + "v, which the example does not reach, may need it"),
]


def blocks(model):
    return [name for name, m in model.named_modules() if isinstance(m, ACBlock)]


def norms(model):
    return [name for name, m in model.named_modules() if isinstance(m, BatchNorm2d) and "_bn" not in name]


def notes(model):
    return {c.name: c.note for c in ak.explain(model).conversions}


def out(value):
    return value["out"] if isinstance(value, dict) else value


def assert_same_function(net, acnet, x, modes=(False, True)):
    # In training a block without its batch norm is another function: two normalise.
    for mode in modes:
        want = out(copy.deepcopy(net).train(mode)(x))
        assert rel(out(copy.deepcopy(acnet).train(mode)(x)), want) < 1e-10


def assert_same_eval(net, acnet, x):
    assert_same_function(net, acnet, x, (False,))


@pytest.mark.parametrize("kind", ABSORBED)
def test_a_run_finds_the_batch_norm(kind):
    net = network(kind)
    acnet = ak.convert(net, init="from_conv", example=X)
    with_norm = [note == "with its batch norm" for note in notes(acnet).values()]
    assert sum(with_norm) == len(norms(net)), notes(acnet)
    assert norms(acnet) == []
    assert_same_function(net, acnet, X)
    assert all(STAY not in note for note in notes(acnet).values())
    blind = ak.convert(net, init="from_conv")
    assert_same_eval(net, blind, X)
    assert (
        f"{NO_NORM}: torch.fx cannot follow its output, but example= would show where it goes"
        in notes(blind).values()
    )


@pytest.mark.parametrize(("kind", "note"), LEFT)
def test_a_batch_norm_that_must_stay_stays_and_explain_says_why(kind, note):
    net = network(kind)
    acnet = ak.convert(net, init="from_conv", example=X)
    assert notes(acnet)[next(iter(blocks(acnet)))] == note
    assert note in str(ak.explain(acnet))
    assert norms(acnet) == norms(net)
    assert_same_eval(net, acnet, X)


def test_a_weight_read_elsewhere():
    class Reads(Net):
        def flow(self, x):
            return self.n(self.w(x)) + F.conv2d(x, self.w.weight, padding=1)

    class AsksItsType(Net):
        def flow(self, x):
            return self.n(self.w(x.to(self.w.weight.dtype)))

    class CallsForward(Net):
        def flow(self, x):
            return self.n(self.w.forward(x))

    for kind in (Reads, AsksItsType, CallsForward):
        net = network(kind)
        acnet = ak.convert(net, init="from_conv", example=X)
        assert blocks(acnet) == []
        assert notes(acnet) == {"w": "its weight is read outside its own forward"}
        assert_same_function(net, acnet, X)


def test_a_convolution_that_the_example_does_not_reach_keeps_to_what_is_known_of_it():
    class Gate(Net):
        def __init__(self):
            super().__init__()
            self.v, self.m = Conv2d(4, 6, 3, padding=1), BatchNorm2d(6)
            self.known = nn.Sequential(conv(), BatchNorm2d(4))

        def flow(self, x):
            return self.n(self.w(x)) if x.mean() > 0 else self.m(self.v(self.known(x)))

    net = network(Gate)
    acnet = ak.convert(net, init="from_conv", example=X)
    assert blocks(acnet) == ["w", "v", "known.0"]
    assert notes(acnet) == {
        "w": "with its batch norm",
        "v": f"{NO_NORM}: torch.fx cannot follow its output, and the example does not reach it",
        "known.0": "with its batch norm",
    }
    assert_same_function(net, acnet, X)
    assert_same_eval(net, acnet, -X)
    other = ak.convert(net, init="from_conv", example=-X)
    assert norms(other) == ["n"]
    assert_same_eval(net, other, X)
    assert_same_eval(net, other, -X)
    assert_same_eval(net := network(Branches), ak.convert(net, init="from_conv", example=X), -X)


def test_what_a_traced_module_does_with_a_map_in_training_counts_too():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.n = conv(), BatchNorm2d(4)

        def forward(self, x):
            y = self.w(x)
            return self.n(y) + y if self.training else self.n(y)

    class Outer(Net):
        def __init__(self):
            super().__init__()
            self.w = Auxiliary()

        def flow(self, x):
            return self.n(self.w(x))

    net = network(Outer)
    acnet = ak.convert(net, init="from_conv", example=X)
    assert notes(acnet) == {"w.w": "its batch norm w.n stays after the block: its output goes elsewhere too"}
    assert_same_eval(net, acnet, X)


def test_batch_norms_of_other_classes():
    class Activated(BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    for norm, note in (
        (FrozenBatchNorm2d, "with its frozen batch norm"),
        (Activated, "its consumer is a Activated, which stays after the block"),
    ):
        net = network(Direct)
        net.n = norm(4).double()
        acnet = ak.convert(net, init="from_conv", example=X)
        assert notes(acnet) == {"w": note}
        assert_same_eval(net, acnet, X)


def test_a_sequential_with_a_forward_of_its_own_says_nothing_by_its_order():
    class Skips(nn.Sequential):
        def forward(self, x):
            y = self[0](x)
            return self[1](y) + y if x.sum() < 1e9 else x

    net = network(lambda: Skips(conv(), BatchNorm2d(4)))
    for example in (None, X):
        acnet = ak.convert(net, init="from_conv", example=example)
        assert norms(acnet) == ["1"]
        assert_same_eval(net, acnet, X)


def test_a_batch_norm_read_in_a_traced_model_stays():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.n = conv(), BatchNorm2d(4)

        def forward(self, x):
            return self.n(self.w(x)) * self.n.weight.norm()

    net = network(Reads)
    acnet = ak.convert(net, init="from_conv")
    assert notes(acnet) == {"w": STAY + "its tensors are read outside its own forward"}
    assert_same_eval(net, acnet, X)


@pytest.mark.parametrize(
    "example",
    [X, X.shape, list(X.shape), (X,), (X, 2), {"x": X}, {"x": X, "scale": 3}],
    ids=lambda e: type(e).__name__,
)
def test_every_form_of_an_example(example):
    class Scaled(Direct):
        def forward(self, x, scale=1):
            return scale * super().forward(x)

    assert notes(ak.convert(network(Scaled), example=example)) == {"w": "with its batch norm"}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("example", "error", "words"),
    [
        ("1,4,7,7", TypeError, "example must be a tensor, its shape, a tuple .* or a dict .*, got str"),
        ([X], TypeError, "example must be .*, got list"),
        ({1: X}, TypeError, "example must be .*, got dict"),
        (7, TypeError, "example must be .*, got int"),
        ((1, 5, 7, 7), ValueError, "example: the model does not run on it: RuntimeError: "),
        (X * 1e9, ValueError, "example: the model does not run on it: RuntimeError: never on an example"),
        ((X, X), ValueError, "example: the model does not run on it: TypeError"),
    ],
)
def test_a_wrong_example_leaves_the_model(example, error, words, inplace):
    net = network(Direct)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(error, match=words):
        ak.convert(net, example=example, inplace=inplace)
    assert blocks(net) == []
    assert net.training
    assert not net.w._forward_hooks
    assert not net.n._forward_pre_hooks
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_a_run_leaves_nothing_behind():
    class Noisy(Direct):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.calls_of = []

        def flow(self, x):
            self.calls += 1
            self.calls_of.append((self.training, torch.is_grad_enabled()))
            return super().flow(x + torch.randn_like(x))

    net = network(Noisy)
    net.n.eval()
    torch.manual_seed(1)
    ak.convert(net)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    ak.convert(net, example=X, inplace=True)
    assert torch.equal(drawn, torch.rand(3))
    assert net.calls == 0
    assert net.calls_of == [(False, False)]
    assert net.training
    assert not net.w.square_bn.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_model_does_not_run_where_nothing_is_left_to_learn():
    wrong = (1, 99, 7, 7)
    net = nn.Sequential(conv(), BatchNorm2d(4))
    assert notes(ak.convert(net, example=wrong)) == {"0": "with its batch norm"}
    assert notes(ak.convert(Direct(), example=wrong, skip=["w"])) == {"w": "skipped as asked"}


def test_a_compiled_model_a_second_convert_and_a_model_with_blocks():
    net = network(Direct)
    compiled = torch.compile(net)
    acnet = ak.convert(compiled, init="from_conv", example=X)
    assert norms(acnet) == []
    twice = network(Submodules)
    once = ak.convert(twice, example=X, skip=["inner.*"])
    assert blocks(once) == ["w.1"]
    again = ak.convert(once, example=X)
    assert blocks(again) == ["w.1", "inner.w"]
    assert norms(again) == []
