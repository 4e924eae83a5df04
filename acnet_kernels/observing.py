"""Runs a model on an example without a trace of it left: to see what its blocks get, and where its maps go."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ._torch_compat import TorchDispatchMode, tree_leaves
from .acceleration import is_block
from .conv_bn_pairs import Other, Usage, is_norm

Call = tuple[tuple[Any, ...], dict[str, Any]]


def as_input(model: nn.Module, inputs: Sequence[int] | Tensor, name: str = "inputs") -> Tensor:
    """inputs, or zeros of that shape in dtype and on device of model's first parameter; TypeError if neither."""
    if isinstance(inputs, Tensor):
        return inputs
    if not _is_shape(inputs):
        raise TypeError(f"{name} must be a tensor or its shape, got {inputs!r}")
    like = next(model.parameters(), torch.empty(0))
    return torch.zeros(tuple(inputs), dtype=like.dtype, device=like.device)


def as_call(model: nn.Module, example: Any) -> Call:
    """(positional, keyword) arguments: of a tensor or a shape as as_input() takes them, a tuple, or a dict."""
    if isinstance(example, Mapping) and all(isinstance(key, str) for key in example):
        return (), dict(example)
    if isinstance(example, tuple) and not _is_shape(example):
        return example, {}
    if not isinstance(example, Tensor) and not _is_shape(example):
        raise TypeError(
            "example must be a tensor, its shape, a tuple of the model's arguments or a dict of its keyword "
            f"arguments, got {type(example).__name__}"
        )
    return (as_input(model, example, "example"),), {}


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(size, int) and size >= 0 for size in value)
    )


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[dict[nn.Module, bool]]:
    """Within it model is in eval mode, without gradients and uncompiled; yields module → the mode it was in.

    Afterwards modes, buffers and torch's random state are as they were.
    """
    modes = {module: module.training for module in model.modules()}
    autocast = torch.is_autocast_enabled(device.type)
    before = {name: t.clone() for name, t in model.named_buffers()}
    try:
        with (
            in_modes(dict.fromkeys(modes, False)),
            torch.no_grad(),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.autocast(device.type, enabled=autocast),
            torch.compiler.set_stance("force_eager"),  # a compiled model's graph has no modules to look at
        ):
            yield modes
    finally:
        with torch.no_grad():
            for name, t in model.named_buffers():
                if name in before and t.shape == before[name].shape and not torch.equal(t, before[name]):
                    t.copy_(before[name])


@contextmanager
def in_modes(wanted: Mapping[nn.Module, bool]) -> Iterator[None]:
    """Within it each module is in training mode, or not, as wanted."""
    before = {module: module.training for module in wanted}
    try:
        for module, mode in wanted.items():
            module.training = mode
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def observe(model: nn.Module, call: Call) -> Usage:
    """What becomes of the convolutions' outputs as model runs on these arguments, in eval mode.

    Raises:
        ValueError: model does not run on them.
    """
    args, kwargs = call
    device = next((t.device for t in (*_tensors(call), *model.parameters())), torch.device("cpu"))
    observer = _Observer(model)
    with undisturbed(model, device), observer.watching():
        try:
            output = model(*args, **kwargs)
        except Exception as error:
            raise ValueError(f"example: the model does not run on it: {type(error).__name__}: {error}") from error
    return observer.conclude(output)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


@dataclass
class _Map:
    """An output of a convolution, not kept alive, and the batch norm that took it."""

    tensor: weakref.ref[Tensor]
    conv: nn.Module
    norm: nn.Module | None = None


class _Functions(TorchFunctionMode):
    """Shows the arguments of every call of PyTorch's from Python, also of those that come to nothing in eval."""

    def __init__(self, look: Callable[[Any], None]) -> None:
        super().__init__()
        self.look = look

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.look((args, kwargs))
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    """Shows the arguments of every operator, also of those that TorchScript and extensions call."""

    supports_higher_order_operators = True

    def __init__(self, look: Callable[[Any], None]) -> None:
        super().__init__()
        self.look = look

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.look((args, kwargs))
        return func(*args, **(kwargs or {}))


class _Observer:
    """Watches one run of a model: every output of a convolution, from its birth to the end of the run."""

    def __init__(self, model: nn.Module) -> None:
        inside = {m for block in model.modules() if is_block(block) for m in block.modules()}
        self.modules = [m for m in model.modules() if m not in inside and not isinstance(m, torch.jit.ScriptModule)]
        self.usage = Usage({})
        self.running: list[nn.Module] = []  # the convolutions and batch norms whose forward runs now
        self.maps: dict[int, _Map] = {}  # id → the map; a dead map's id may be given to another tensor
        self.all_maps: list[_Map] = []
        self.owners: dict[int, tuple[Tensor, set[nn.Module]]] = {}  # id → a parameter or buffer, and who has it
        for module in self.modules:
            if isinstance(module, nn.Conv2d) or is_norm(module):
                for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    self.owners.setdefault(id(t), (t, set()))[1].add(module)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it everything that model does is seen."""
        with ExitStack() as stack:
            for module in self.modules:
                if isinstance(module, nn.Conv2d) or is_norm(module):
                    enter, leave = self._enter, self._leave
                    stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                else:
                    leave = self._pass
                stack.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
            stack.enter_context(_Functions(self._look))
            stack.enter_context(_Operators(self._look))
            yield

    def conclude(self, output: Any) -> Usage:
        """What was seen. A map that still lives is in output, or the model has kept it: both may be read."""
        gc.collect()
        for found in self.all_maps:
            if found.norm is None or found.tensor() is not None:
                self.usage.consumers[found.conv].add(Other.KNOWN)
        return self.usage

    def _map(self, t: Tensor) -> _Map | None:
        found = self.maps.get(id(t))
        return found if found is not None and found.tensor() is t else None

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.running.append(module)
        if isinstance(module, nn.Conv2d):
            return
        producers = self.usage.producers.setdefault(module, set())
        for t in _tensors((args, kwargs)):
            found = self._map(t)
            producers.add(Other.KNOWN if found is None else found.conv)
            if found is not None:
                again = found.norm is not None
                self.usage.consumers[found.conv].add(Other.KNOWN if again else module)
                found.norm = module

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.running.remove(module)
        if isinstance(module, nn.Conv2d):
            self.usage.consumers.setdefault(module, set())
            found = self.maps[id(output)] = _Map(weakref.ref(output), module)
            self.all_maps.append(found)

    def _pass(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        # What eval hands through as it came, training may change: drop path does.
        given = {id(t) for t in _tensors((args, kwargs))}
        for t in _tensors(output):
            found = self._map(t)
            if found is not None and id(t) in given:
                self.usage.consumers[found.conv].add(Other.KNOWN)

    def _look(self, arguments: Any) -> None:
        for t in _tensors(arguments):
            found = self._map(t)
            if found is not None and found.norm not in self.running:
                self.usage.consumers[found.conv].add(Other.KNOWN)
            owners = self.owners[id(t)][1] if id(t) in self.owners else set()
            if owners.isdisjoint(self.running):
                self.usage.read |= owners
