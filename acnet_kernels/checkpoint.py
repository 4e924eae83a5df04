"""Loading state dicts of ACNets from elsewhere: the original code's, wrapped, nested, deployed."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .block import ACBlock
from .geometry import BRANCHES
from .ops.fusion import fold
from .spec import Branch, Norm, Step, listed

StateDict = dict[str, Any]
# What DataParallel, DDP and AveragedModel, torch.compile, FSDP and checkpoint_wrapper put into names, anywhere.
_WRAPPERS = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
_AVERAGES = "n_averaged"  # torch.optim.swa_utils.AveragedModel's counter, beside the weights
_COUNTER, _EXTRA = "num_batches_tracked", "_extra_state"
_DEEPEST = 16  # dictionaries within dictionaries


def load(
    model: nn.Module, source: Mapping[str, Any] | str | os.PathLike[str], *, within: str | None = None
) -> nn.Module:
    """Loads a checkpoint into model, whatever wrapped it, and returns model.

    Understood are state dicts of this package, of the original ACNet code and of DiverseBranchBlock's ACBlock,
    from torch.save (read with weights_only=True) or safetensors files. The model's names are looked for in the
    checkpoint and in the dictionaries in it, behind any prefix: under 'state_dict' or 'model_ema', behind
    Lightning's 'model.'. What DataParallel, DDP, FSDP, torch.compile or weight averaging add to names, of the whole
    model or of modules in it, does not count. Where the checkpoint holds branches and the model's block is
    deployed, they are folded with the block's eps.

    Args:
        model: takes the weights.
        source: a file, or what is in one.
        within: where the model is, as the error says that finds it in several places: 'state_dict_ema', 'model.'.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read; names, shapes or values that do not fit, in every place or in
            several; a deployed checkpoint for a block in training form. The model is then as it was.
        TypeError: source is neither a mapping nor a path.
    """
    content = _content(source)
    target = _Target.of(model)
    places = _places(content, target.names.keys() | target.forms)
    if not places:
        raise ValueError(
            f"no state dict found: no key ends in one of the model's names ({_few(map(repr, target.names))}); "
            f"the keys are {_few(map(repr, content))}"
        )
    asked = [place for place in places if within in (None, place.label)]
    if not asked:
        raise ValueError(f"within must be one of {_few(repr(p.label) for p in places)}, got {within!r}")
    likely = [place for place in asked if place.named >= target.least] or asked[:1]
    tried = [(place.label, target.fit(place.values)) for place in likely]
    whole = [(label, fit) for label, fit in tried if not fit.problems]
    label, fit = _one_of(whole) if whole else tried[0]
    faults = [*fit.problems, *(f"unexpected {name}" for name in fit.unexpected)]
    if faults:
        others = [repr(place.label) for place in asked if place.label != label]
        raise ValueError(
            f"the checkpoint does not fit the model{f', at {label!r}' if label else ''}: {_few(faults, '; ')}"
            + (f"; nor does what is at {_few(others)}" if others and not whole else "")
        )
    model.load_state_dict({target.names[name]: value for name, value in fit.state.items()})
    return model


def read(path: Path) -> Any:
    """What torch.save or safetensors wrote to path, on the CPU; code in it is not run.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or holds other things than weights.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except Exception as error:  # there is nothing that a damaged file cannot make the readers raise
        refused = re.search(r"WeightsUnpickler error:\s*(.*?)(?:\. |\n|$)", str(error))
        why = refused[1] if refused else str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is no intact checkpoint, read with weights_only=True: {why}") from error


def _content(source: Mapping[str, Any] | str | os.PathLike[str]) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source must be a state dict or a path, got {type(source).__name__}")
    content = read(Path(source))
    if not isinstance(content, Mapping):
        raise ValueError(f"{source} holds a {type(content).__name__}, not a state dict")
    return content


class _Place(NamedTuple):
    """A dictionary and a prefix: as a label, bare name behind it → value, and how many of these are the model's."""

    label: str
    values: StateDict
    named: int


def _places(content: Mapping[str, Any], wanted: Collection[str]) -> list[_Place]:
    """Everywhere that one of the wanted names is, where most of them are first."""
    found = []
    for label, dictionary in _dictionaries(content):
        named = {_name(key): value for key, value in dictionary.items()}
        values = {key: v for key, v in named.items() if not isinstance(v, Mapping) or key.endswith(_EXTRA)}
        behind: dict[str, StateDict] = {}
        bare = _bare(values)
        for name in bare:
            behind |= {prefix: {} for prefix, end in _splits(name) if end in wanted}
        for name, key in bare.items():
            for prefix, end in _splits(name):
                if prefix in behind:
                    behind[prefix][end] = values[key]
        for prefix, state in behind.items():
            at = f"{label}/{prefix}" if label and prefix else label + prefix
            found.append(_Place(at, state, sum(name in wanted for name in state)))
    return sorted(found, key=lambda place: -place.named)


def _dictionaries(content: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The dictionary and those in it, each once, with the keys that lead there."""
    level, seen = [("", content)], {id(content)}
    for _ in range(_DEEPEST):
        yield from level
        inner = []
        for label, dictionary in level:
            for key, value in dictionary.items():
                if isinstance(value, Mapping) and id(value) not in seen:
                    seen.add(id(value))
                    inner.append((f"{label}/{_name(key)}" if label else _name(key), value))
        level = inner


def _name(key: Any) -> str:
    # No module's name is like that of a key that is no string, so it is never taken for one.
    return key if isinstance(key, str) else f"<{type(key).__name__} {key!r}>"


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Every (prefix with its dot, rest) of a dotted name."""
    at = 0
    while True:
        yield name[:at], name[at:]
        at = name.find(".", at) + 1
        if not at:
            return


def _bare(names: Iterable[str]) -> dict[str, str]:
    """Name without what wrappers added → the name; one that would then be another's keeps it all."""
    found: dict[str, str] = {}
    for name in sorted(names, key=lambda name: name.count(".")):
        bare = _without_wrappers(name)
        found[name if bare in found else bare] = name
    return found


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _few(texts: Iterable[str], separator: str = ", ") -> str:
    found = list(texts)
    return separator.join([*found[:5], *([f"and {len(found) - 5} more"] if len(found) > 5 else [])])


class _Fit(NamedTuple):
    """Bare name → what the model would take from a place, why it cannot, and what would be left over."""

    state: StateDict
    problems: list[str]
    unexpected: list[str]


def _one_of(whole: Sequence[tuple[str, _Fit]]) -> tuple[str, _Fit]:
    """The one place's label and fit; places with the same values, as tied modules make them, are one."""
    (label, first), *others = whole
    if all(_same(value, first.state[name]) for _, fit in others for name, value in fit.state.items()):
        return label, first
    raise ValueError(
        f"the checkpoint fits the model in {len(whole)} places: choose one by within=, of "
        f"{_few(repr(label) for label, _ in whole)}"
    )


def _same(a: Any, b: Any) -> bool:
    alike = isinstance(a, Tensor) and isinstance(b, Tensor) and (a.dtype, a.device) == (b.dtype, b.device)
    return a is b or (alike and torch.equal(a, b))


class _Target(NamedTuple):
    """The model to load into.

    Attributes:
        expected: its state dict.
        names: bare name → its own.
        blocks: bare prefix → block.
        forms: names of the blocks' other form.
        least: how many names a place must have for the model to be there.
    """

    expected: Mapping[str, Any]
    names: Mapping[str, str]
    blocks: Mapping[str, ACBlock]
    forms: Collection[str]
    least: int

    @classmethod
    def of(cls, model: nn.Module) -> _Target:
        """model, as it is."""
        expected = model.state_dict()
        names = _bare(expected)
        found = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, ACBlock)}
        blocks = {_without_wrappers(f"{name}." if name else ""): block for name, block in found.items()}
        forms = {
            f"{prefix}{'square_conv' if block.deploy else 'fused_conv'}.weight" for prefix, block in blocks.items()
        }
        # Counters may be missing, and of a deployed block there may be branches instead.
        optional = {name for name in names if name.endswith(_COUNTER)}
        for prefix, block in blocks.items():
            if block.deploy:
                optional.add(f"{prefix}fused_conv.bias")
        return cls(expected, names, blocks, forms, len(names.keys() - optional))

    def fit(self, values: StateDict) -> _Fit:
        """What becomes of the values of a place."""
        state, problems, broken = dict(values), [], []
        for prefix, block in self.blocks.items():
            try:
                _match_form(state, prefix, block)
            except ValueError as error:
                problems.append(f"{prefix or '(model)'}: {error}")
                broken.append(prefix)
        for name, own in self.names.items():
            if name in state:
                problems += _misfits(name, state[name], self.expected[own])
            elif name.endswith(_COUNTER):  # checkpoints older than torch 0.4.1 have none
                state[name] = self.expected[own]
            elif not name.startswith(tuple(broken)):
                problems.append(f"missing {name}")
        rest = {name: value for name, value in state.items() if name not in self.names and name != _AVERAGES}
        unexpected = [n for n, v in rest.items() if isinstance(v, Tensor) and not n.startswith(tuple(broken))]
        return _Fit({name: state[name] for name in self.names if name in state}, problems, unexpected)


def _misfits(name: str, value: Any, wanted: Any) -> list[str]:
    """Why the model cannot hold the value without losing anything; at most one reason."""
    if not isinstance(wanted, Tensor):
        return []
    if isinstance(value, Tensor) and value.shape != wanted.shape:
        return [f"{name} has shape {tuple(value.shape)}, the model wants {tuple(wanted.shape)}"]
    if not isinstance(value, Tensor) or not _keeps(value, wanted):
        return [f"{name} is {_kind(value)}, which the model cannot hold as {_kind(wanted)}"]
    return []


def _keeps(value: Tensor, wanted: Tensor) -> bool:
    """Whether copying value over wanted loses no more than digits."""
    if value.layout != wanted.layout or value.is_quantized != wanted.is_quantized:
        return False
    if value.is_meta or value.is_complex() or wanted.is_complex() or value.dtype == wanted.dtype:
        return value.is_meta <= wanted.is_meta and value.is_complex() <= wanted.is_complex()
    taken, whole = value.to(wanted.dtype).double(), value.double()  # counters are kept in floats, too
    return bool((taken.isfinite() == whole.isfinite() if wanted.is_floating_point() else taken == whole).all())


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    what = str(value.dtype) if value.layout == torch.strided else f"{value.dtype} in {value.layout}"
    return f"{what} on meta" if value.is_meta else what


def _match_form(state: StateDict, prefix: str, block: ACBlock) -> None:
    """Folds the branches found for a deployed block, in state itself."""
    deployed = f"{prefix}fused_conv.weight" in state
    if deployed and not block.deploy:
        raise ValueError(
            "the checkpoint is deployed but the model's block is in training form, and branches cannot be "
            "recovered from a folded kernel: build the model with deploy=True, or fuse(keep_blocks=True) it"
        )
    if block.deploy and not deployed and f"{prefix}square_conv.weight" in state:
        step, taken = _step(state, prefix, block)
        weight, bias = fold(listed(step))
        for name in taken:
            del state[name]
        state[f"{prefix}fused_conv.weight"], state[f"{prefix}fused_conv.bias"] = weight, bias


def _step(state: StateDict, prefix: str, block: ACBlock) -> tuple[Step, list[str]]:
    """The branches in state, and the names of what they are made of."""
    taken = []

    def take(name: str) -> Any:
        value = state.get(prefix + name)
        if value is not None:
            if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
                raise ValueError(f"{name} must be a tensor with values to be folded, got {_kind(value)}")
            taken.append(prefix + name)
        return value

    def norm(name: str) -> Norm | None:
        weight, bias, mean, var, _ = (
            take(f"{name}.{part}") for part in ("weight", "bias", "running_mean", "running_var", _COUNTER)
        )
        return None if mean is None or var is None else Norm(weight, bias, mean, var, None, block.eps, None, False)

    total = norm("bn")
    branches = {
        name: Branch(weight, take(f"{name}_conv.bias"), None if total else norm(f"{name}_bn"))
        for name in BRANCHES
        if (weight := take(f"{name}_conv.weight")) is not None
    }
    step = Step(block.geometry, branches, total)
    if len(step.norms) != (1 if total else len(branches)):
        raise ValueError(
            "the checkpoint cannot be folded for a deployed block: a batch norm has no running statistics"
        )
    return step, taken
