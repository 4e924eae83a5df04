"""Where the output of every Conv2d of a model goes, and what every batch norm takes: the pairs a block can replace.

torch.fx follows the data; what it cannot is left UNKNOWN, for observing.py to find out by running the model.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from ._torch_compat import BatchNormBase
from .acceleration import is_block
from .submodules import is_frozen


class Other(enum.Enum):
    """What stands at the other end of a map where it is no convolution and no batch norm."""

    KNOWN = "an operation, another module, the model's own input or output"
    UNKNOWN = "what the module that holds it does with it"


Links = dict[nn.Module, set[nn.Module | Other]]


def is_norm(module: nn.Module | None) -> bool:
    """Whether module is a batch norm, of whatever class."""
    return isinstance(module, BatchNormBase) or (module is not None and is_frozen(module))


def is_conv(module: nn.Module | None) -> bool:
    """Whether module is a Conv2d, of whatever class."""
    return isinstance(module, nn.Conv2d)


@dataclass
class Usage:
    """What is known of a model: convolution → what consumes its output, batch norm → what produces its input.

    `read` are those of both whose tensors are read outside their own forward. `observed` are those of whose links
    an example run told; where `ran`, such a run has taken place.
    """

    names: dict[nn.Module, str]
    consumers: Links = field(default_factory=dict)
    producers: Links = field(default_factory=dict)
    read: set[nn.Module] = field(default_factory=set)
    observed: set[nn.Module] = field(default_factory=set)
    ran: bool = False

    def is_unknown(self, conv: nn.Module) -> bool:
        """Whether something may consume conv's output that is not known."""
        return Other.UNKNOWN in self.consumers.get(conv, {Other.UNKNOWN})

    def learn(self, seen: Usage) -> None:
        """Adds what a run has seen, which settles what was unknown of the modules that it reached."""
        self.ran = True
        for mine, links in ((self.consumers, seen.consumers), (self.producers, seen.producers)):
            for module, found in links.items():
                known = mine.setdefault(module, {Other.UNKNOWN})
                if Other.UNKNOWN in known:
                    known.discard(Other.UNKNOWN)
                    self.observed.add(module)
                known |= found
        self.read |= seen.read

    def absorbable(self, conv: nn.Conv2d) -> tuple[Any, str]:
        """The one batch norm that takes every output of conv and nothing else, or None and why."""
        none = "no BatchNorm2d was found to consume it alone"
        if self.is_unknown(conv):
            remedy = "and the example does not reach it" if self.ran else "but example= would show where it goes"
            return None, f"{none}: torch.fx cannot follow its output, {remedy}"
        consumers = self.consumers[conv]
        norms = [link for link in consumers if isinstance(link, nn.Module)]
        if not norms:
            return None, none
        names = ", ".join(sorted(self.names[norm] for norm in norms))
        if len(norms) > 1:
            return None, f"its batch norms {names} stay after the block: none of them takes all of its output"
        norm, stays = norms[0], f"its batch norm {names} stays after the block"
        if len(consumers) > 1:
            return None, f"{stays}: its output goes elsewhere too"
        if self.producers[norm] != {conv}:
            return None, f"{stays}: other maps go through it too, or may"
        if norm in self.read:
            return None, f"{stays}: its tensors are read outside its own forward"
        for other in self.consumers:
            # Another branch of the same code: its convolution may share the batch norm.
            if conv in self.observed and self.is_unknown(other) and other.out_channels == conv.out_channels:
                return None, f"{stays}: {self.names[other]}, which the example does not reach, may need it"
        return norm, ""


class Tracer(fx.Tracer):
    """Does not look into blocks and batch norms."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_block(m) or is_norm(m) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> Usage:
    """Follows the data with torch.fx; where a module cannot be traced, its children one by one.

    Inside a Sequential that cannot be traced as a whole, the next child is the consumer.
    """
    usage = Usage({module: name or "(model)" for name, module in model.named_modules()})
    _collect(model, usage, set(), Other.KNOWN)
    return usage


def _collect(module: nn.Module, usage: Usage, seen: set[nn.Module], outside: Other) -> None:
    # outside: what gives the module its input and takes its output
    if module in seen or is_block(module):
        return
    seen.add(module)
    if isinstance(module, nn.Conv2d):  # reached outside any graph
        usage.consumers.setdefault(module, {outside})
        return
    try:
        graph = Tracer().trace(module)
    except Exception:  # whatever the user's forward raises on symbolic input
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            _read_sequential(module, usage, outside)
    else:
        _read_graph(module, graph, usage, outside)
    for child in module.children():
        if any(isinstance(m, nn.Conv2d) and m not in usage.consumers for m in child.modules()):
            _collect(child, usage, seen, Other.UNKNOWN)


def _read_graph(root: nn.Module, graph: fx.Graph, usage: Usage, outside: Other) -> None:
    modules = dict(root.named_modules())

    def end(node: fx.Node, wanted: Callable[[nn.Module | None], bool]) -> nn.Module | Other:
        if node.op in ("placeholder", "output"):
            return outside
        module = modules[str(node.target)] if node.op == "call_module" else None
        return module if module is not None and wanted(module) else Other.KNOWN

    for node in graph.nodes:
        if node.op == "get_attr":
            owner = modules.get(str(node.target).rpartition(".")[0])
            if owner is not None and (is_conv(owner) or is_norm(owner)):
                usage.read.add(owner)
        if node.op != "call_module":
            continue
        module = modules[str(node.target)]
        if is_conv(module):
            links = usage.consumers.setdefault(module, set())
            links |= {end(user, is_norm) for user in node.users}
            if len(node.users) != 1:
                links.add(Other.KNOWN)
        if is_norm(module):
            sources = {end(source, is_conv) for source in node.all_input_nodes}
            usage.producers.setdefault(module, set()).update(sources or {Other.KNOWN})


def _read_sequential(sequence: nn.Sequential, usage: Usage, outside: Other) -> None:
    def end(child: nn.Module | None, wanted: Callable[[nn.Module | None], bool]) -> nn.Module | Other:
        if child is None:
            return outside
        if wanted(child):
            return child
        return Other.KNOWN if Tracer().is_leaf_module(child, "") else Other.UNKNOWN  # it may hold what is wanted

    children = list(sequence)
    for before, child, after in zip([None, *children[:-1]], children, [*children[1:], None], strict=True):
        if is_norm(child):
            usage.producers.setdefault(child, set()).add(end(before, is_conv))
        if is_conv(child):
            usage.consumers.setdefault(child, set()).add(end(after, is_norm))
