"""Finds, for every Conv2d of a model, how it is used and which BatchNorm2d consumes its output alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from .block import ACBlock
from .submodules import is_frozen


@dataclass
class Uses:
    """What is known about one convolution: its consumers, one a use (None where it is not a batch norm)."""

    consumers: list[nn.Module | None] = field(default_factory=list)
    weight_read: bool = False


@dataclass
class Usage:
    """The uses of every convolution and batch norm found in a model."""

    convs: dict[nn.Conv2d, Uses] = field(default_factory=dict)
    norm_calls: dict[nn.Module, int] = field(default_factory=dict)

    def absorbable(self, conv: nn.Conv2d) -> Any:
        """The one batch norm that takes every output of conv and nothing else, or None."""
        consumers = self.convs[conv].consumers if conv in self.convs else []
        bn = consumers[0] if consumers else None
        if bn is None or any(other is not bn for other in consumers):
            return None
        return bn if self.norm_calls[bn] == len(consumers) else None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, ACBlock) or is_frozen(m) or super().is_leaf_module(m, module_qualified_name)


def find_usage(model: nn.Module) -> Usage:
    """Follows the data with torch.fx; where a module cannot be traced, its children one by one.

    Inside a Sequential that cannot be traced as a whole, the next child is the consumer.
    """
    usage = Usage()
    _collect(model, usage, set())
    return usage


def _collect(module: nn.Module, usage: Usage, seen: set[nn.Module]) -> None:
    if module in seen or isinstance(module, ACBlock):
        return
    seen.add(module)
    if isinstance(module, nn.Conv2d):  # reached outside any graph: nothing is known of its consumer
        usage.convs.setdefault(module, Uses([None]))
        return
    try:
        graph = _Tracer().trace(module)
    except Exception:  # whatever the user's forward raises on symbolic input
        if isinstance(module, nn.Sequential):
            _read_sequential(module, usage)
    else:
        _read_graph(module, graph, usage)
    for child in module.children():
        if any(isinstance(m, nn.Conv2d) and m not in usage.convs for m in child.modules()):
            _collect(child, usage, seen)


def _read_graph(root: nn.Module, graph: fx.Graph, usage: Usage) -> None:
    modules = dict(root.named_modules())
    for node in graph.nodes:
        if node.op == "get_attr":
            owner = modules.get(str(node.target).rpartition(".")[0])
            if isinstance(owner, nn.Conv2d):
                usage.convs.setdefault(owner, Uses()).weight_read = True
        if node.op != "call_module":
            continue
        module = modules[str(node.target)]
        if _is_norm(module):
            usage.norm_calls[module] = usage.norm_calls.get(module, 0) + 1
        if isinstance(module, nn.Conv2d):
            users = [modules[str(u.target)] if u.op == "call_module" else None for u in node.users]
            consumer = users[0] if len(users) == 1 and _is_norm(users[0]) else None
            usage.convs.setdefault(module, Uses()).consumers.append(consumer)


def _is_norm(module: nn.Module | None) -> bool:
    return isinstance(module, nn.BatchNorm2d) or (module is not None and is_frozen(module))


def _read_sequential(sequence: nn.Sequential, usage: Usage) -> None:
    children = list(sequence)
    for child, following in zip(children, [*children[1:], None], strict=True):
        if _is_norm(child):
            usage.norm_calls[child] = usage.norm_calls.get(child, 0) + 1
        if isinstance(child, nn.Conv2d):
            consumer = following if _is_norm(following) else None
            usage.convs.setdefault(child, Uses()).consumers.append(consumer)
