"""Activation modules that consume a block alone, taken over by the block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import fx, nn

from .activations import activation_of
from .block import ACBlock
from .conv_bn_pairs import Tracer
from .submodules import does_nothing

Pair = tuple[ACBlock, nn.Module]


def absorbable(model: nn.Module) -> list[Pair]:
    """(block, the activation module that takes its output and nothing else) of every block that has one.

    Followed by torch.fx; inside a Sequential that cannot be traced the next child is the consumer. Modules that do
    nothing in between, as an absorbed batch norm's nn.Identity, are passed over. A block or an activation that is
    called twice, has hooks, or hangs in two places, has none.
    """
    places = Counter(child for module in model.modules() for child in module._modules.values() if child is not None)
    pairs = list(_pairs(model))
    calls = Counter(module for pair in pairs for module in pair)
    return [(block, act) for block, act in pairs if all(places[m] == calls[m] == 1 for m in (block, act))]


def _pairs(module: nn.Module) -> Iterator[Pair]:
    try:
        graph = Tracer().trace(module)
    except Exception:  # whatever the user's forward raises on symbolic input
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            yield from _in_sequence(list(module))
        for child in module.children():
            if not isinstance(child, ACBlock):
                yield from _pairs(child)
    else:
        yield from _in_graph(dict(module.named_modules()), graph)


def _in_graph(modules: dict[str, nn.Module], graph: fx.Graph) -> Iterator[Pair]:
    called = {node: modules[str(node.target)] for node in graph.nodes if node.op == "call_module"}
    calls = Counter(called.values())
    for node, block in called.items():
        if not _takes(block):
            continue
        users = list(node.users)
        while len(users) == 1 and users[0] in called and does_nothing(called[users[0]]):
            users = list(users[0].users)
        act = called.get(users[0]) if len(users) == 1 else None
        if activation_of(act) and calls[block] == calls[act] == 1:  # type: ignore[index]
            yield block, act  # type: ignore[misc]


def _in_sequence(children: list[nn.Module]) -> Iterator[Pair]:
    for i, block in enumerate(children):
        act = next((child for child in children[i + 1 :] if not does_nothing(child)), None)
        if _takes(block) and activation_of(act):
            yield block, act  # type: ignore[misc]


def _takes(block: nn.Module) -> bool:
    hooks = block._forward_hooks or block._backward_hooks or block._backward_pre_hooks
    return isinstance(block, ACBlock) and block.activation is None and not hooks
