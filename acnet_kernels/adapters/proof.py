"""prove(): that an accelerated block is the block, by the rule that this package's own tests go by."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._torch_compat import BatchNormBase

Tensors = dict[str, Tensor]
# Relative error ‖a−b‖/‖b‖ that a tensor may always have, by the dtype computed in.
FLOORS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
NEIGHBOURS = 16


def prove(
    block: nn.Module,
    x: Tensor | Sequence[int],
    *,
    autocast: torch.dtype | None = None,
    backends: Sequence[str] = ("auto", "branches"),
) -> None:
    """Checks that `accelerate`, `restore` and `fuse` do to a block what they promise; the block stays as it is.

    The truth is its own forward in float64. In train and eval, by every backend named, the accelerated block's
    output, every gradient and the buffers it leaves are within FLOORS of it, or as near as the block's own in the
    same dtype but for a factor of two: on this input, or where rounding decides, on one a rounding away. The
    output's dtype and layout are the block's own. State-dict keys, classes and parameters are the same before and
    after, and copies are accelerated too. Folded, it is the block in eval, of fewer parameters.

    Args:
        block: one that an adapter knows; its batch norms are given random parameters and statistics.
        x: the input, or the shape of a random one of the dtype computed in.
        autocast: the dtype to compute in by torch.autocast, None for none.
        backends: see `planner.CHOICES`.

    Raises:
        AssertionError: something of this is not so.
    """
    from ..acceleration import HostBlock, accelerate, restore, seen  # which rest on the adapters

    block = scrambled(block)
    like = next(block.parameters())
    x = x if isinstance(x, Tensor) else torch.randn(*x, device=like.device, dtype=autocast or like.dtype)
    run = _Run(x, autocast)
    for backend in backends:
        fast = accelerate(copy.deepcopy(block), backend=backend)
        found = seen(fast)
        assert isinstance(found, HostBlock), f"it is not accelerated: {found}"
        assert isinstance(fast, type(block)), "it is not an instance of its class any more"
        assert list(fast.state_dict()) == list(block.state_dict()), "the state dict has other keys"
        before = list(map(id, fast.parameters()))
        for training in (True, False):
            fast.train(training)
            block.train(training)
            with run.computing(x):
                forced = found.module_path_reason() or found.declines(x)
            assert forced is None, f"it runs its own forward: {forced}"
            mode = f"{backend}, {'train' if training else 'eval'}"
            run.compare(fast, block, x, mode)
        assert before == list(map(id, fast.parameters())), "its parameters are other objects"
        twin = copy.deepcopy(fast)
        assert type(twin) is type(fast), "a copy is not accelerated"
        restore(twin)
        assert type(twin) is type(block), "restore() leaves another class"
        assert vars(twin).keys() == vars(block).keys(), "restore() leaves attributes"
    _compare_folded(block.eval(), x.to(like.dtype))


def scrambled(module: nn.Module) -> nn.Module:
    """A copy with random γ, β and running statistics, so that no term of a step or of a fold vanishes."""
    module = copy.deepcopy(module)
    for norm in _norms(module):
        if norm.running_mean is not None and norm.running_var is not None:
            nn.init.uniform_(norm.running_mean, -1, 1)
            nn.init.uniform_(norm.running_var, 0.3, 2)
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.3, 1.5)
            nn.init.normal_(norm.bias)
    return module


def _norms(module: nn.Module) -> list[Any]:
    return [m for m in module.modules() if isinstance(m, BatchNormBase)]


class _Run:
    """Steps of blocks in one dtype, all with the same gradient of the output."""

    def __init__(self, x: Tensor, autocast: torch.dtype | None) -> None:
        self.autocast = autocast
        self.floor = FLOORS[autocast or x.dtype]
        self.seed = torch.randint(2**31, ()).item()
        self.known: dict[bool, tuple[Tensors, Tensors]] = {}

    def computing(self, x: Tensor) -> torch.autocast:
        """autocast as asked for; none in float64."""
        enabled = self.autocast is not None and x.dtype != torch.float64
        return torch.autocast(x.device.type, self.autocast or torch.bfloat16, enabled=enabled)

    def gradient(self, out: Tensor) -> Tensor:
        """The output's."""
        generator = torch.Generator().manual_seed(int(self.seed))
        return torch.randn(out.shape, generator=generator).to(out)

    def step(self, block: nn.Module, x: Tensor) -> Tensors:
        """Output, every gradient, and the buffers that are left, of a copy's second step: what the first has
        found out about the block may be kept."""
        block = copy.deepcopy(block)
        for _ in range(2):
            block.zero_grad()
            x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            with self.computing(x):
                out = block(x)
            out.backward(self.gradient(out))
        gradients = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
        assert x.grad is not None
        return {"out": out.detach(), "x": x.grad, **gradients, **dict(block.named_buffers())}

    def compare(self, fast: nn.Module, block: nn.Module, x: Tensor, mode: str) -> None:
        """A step of the accelerated block with one of the block's own, which is the same for every backend."""
        if block.training not in self.known:
            self.known[block.training] = self.step(block, x), self.step(copy.deepcopy(block).double(), x.double())
        got, (own, true) = self.step(fast, x), self.known[block.training]
        assert got.keys() == own.keys(), f"{mode}: on one side alone: {', '.join(got.keys() ^ own.keys())}"
        for name in got:
            assert got[name].dtype == own[name].dtype, f"{mode}: {name}: {got[name].dtype}, not {own[name].dtype}"
        assert got["out"].stride() == own["out"].stride(), f"{mode}: the output has another memory layout"
        self.judge(got, own, true, block, x, mode)

    def terms(self, block: nn.Module, x: Tensor) -> Tensors:
        """Every gradient with the batch's statistics held fixed, in float64.

        A batch norm's gradient is this one less its projections on 1 and ŷ, terms of its size: of a batch of two
        values, or of a convolution of one weight a channel, next to nothing is left. So its norm is the scale of
        rounding in the gradients.
        """
        block = copy.deepcopy(block).double()
        sizes: dict[Any, int] = {}
        for norm in _norms(block):
            if norm.training:
                norm.momentum = 1.0
                norm.register_forward_pre_hook(
                    lambda m, args: sizes.__setitem__(m, args[0].numel() // args[0].shape[1])
                )
        block(x.double())
        for norm, values in sizes.items():
            norm.running_var.mul_((values - 1) / values)  # the biased one normalises
        return self.step(block.eval(), x.double())

    def judge(self, got: Tensors, own: Tensors, true: Tensors, block: nn.Module, x: Tensor, mode: str) -> None:
        """Every tensor of got is within the floor of true, or as near as twice own's distance.

        Own's on one input may be lucky, and where terms cancel it has no size of its own. So where got misses, it
        is the largest on that input's neighbours too, which rounding could have made of it.
        """
        error, its = ({name: _distance(found[name], t) for name, t in true.items()} for found in (got, own))
        allowed = {name: max(2 * its[name], self.floor * t.double().norm().item()) for name, t in true.items()}
        missed = [name for name in true if not error[name] <= allowed[name]]  # NaN is none
        terms = self.terms(block, x) if missed else {}
        missed = [name for name in missed if not error[name] <= self.floor * terms[name].double().norm().item()]
        for near, moved_x in _neighbours(block, x) if missed else ():
            found = self.step(near, moved_x)
            for name in missed:
                its[name] = max(its[name], _distance(found[name], true[name]))
        for name in missed:
            said = f"error {error[name]:.2e}, the block's own {its[name]:.2e}, norm {true[name].norm():.2e}"
            assert error[name] <= 2 * its[name], f"{mode}: {name}: {said}"


def _compare_folded(block: nn.Module, x: Tensor) -> None:
    """What fuse() makes of the block, which is in eval, with the block."""
    from ..conversion import fuse

    folded = fuse(block)
    with torch.no_grad():
        got, own, true = folded(x), block(x), copy.deepcopy(block).double()(x.double())
    error, allowed = _distance(got, true), max(2 * _distance(own, true), FLOORS[own.dtype] * true.norm().item())
    assert error <= allowed, f"folded: error {error:.2e}, allowed {allowed:.2e}, norm {true.norm():.2e}"
    sizes = [sum(p.numel() for p in module.parameters()) for module in (folded, block)]
    assert sizes[0] < sizes[1], "folding leaves all its parameters"


def _distance(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).norm().item()


def _neighbours(block: nn.Module, x: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
    """The block and its input with every number moved up or down by its last place."""
    for _ in range(NEIGHBOURS):
        near = copy.deepcopy(block)
        with torch.no_grad():
            for t in (*near.parameters(), *near.buffers()):
                t.copy_(_moved(t))
        yield near, _moved(x)


def _moved(t: Tensor) -> Tensor:
    if not t.is_floating_point():
        return t
    return t + t * torch.finfo(t.dtype).eps * (2 * torch.randint_like(t, 2) - 1)
