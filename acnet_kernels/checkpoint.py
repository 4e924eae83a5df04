"""Loading state dicts of ACNets from elsewhere: the original code's, wrapped, nested, deployed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .block import ACBlock
from .ops.fusion import fold
from .spec import Branch, Norm, Step
from .surgery import blocks_of

StateDict = dict[str, Tensor]
_CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "module")
_WRAPPERS = ("module.", "_orig_mod.")  # DataParallel and DDP; torch.compile


def load(model: nn.Module, source: Mapping[str, Any] | str | os.PathLike[str]) -> nn.Module:
    """Loads a checkpoint into model, whatever wrapped it, and returns model.

    Understood are state dicts of this package, of the original ACNet code and of DiverseBranchBlock's ACBlock;
    with the prefixes of DataParallel, DDP or torch.compile; inside a dictionary under 'state_dict', 'model',
    'model_state_dict', 'net' or 'module'; from torch.save (read with weights_only=True) or safetensors files.
    Where the checkpoint holds branches and the model's block is deployed, they are folded with the block's eps.

    Raises:
        FileNotFoundError: no such file.
        ValueError: names or shapes that do not fit, or a deployed checkpoint for a block in training form; the
            model is then as it was.
        TypeError: source is neither a mapping nor a path.
    """
    state = _unwrap(_read(source))
    expected = model.state_dict()
    state = _match_wrapper(state, expected)
    for name, block in blocks_of(model).items():
        _match_form(state, f"{name}." if name else "", block)
    for key, value in expected.items():  # checkpoints older than torch 0.4.1 have no batch counters
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, value)
    _check(state, expected)
    model.load_state_dict(state)
    return model


def _read(source: Mapping[str, Any] | str | os.PathLike[str]) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source must be a state dict or a path, got {type(source).__name__}")
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    return loaded


def _unwrap(state: Mapping[str, Any]) -> StateDict:
    while not all(isinstance(value, Tensor) for value in state.values()):
        inner = next((state[key] for key in _CONTAINERS if isinstance(state.get(key), Mapping)), None)
        if inner is None:
            found = sorted(map(str, state))[:8]
            raise ValueError(
                f"no state dict found: expected tensors, or one of {_CONTAINERS}, got the keys {found}"
            )
        state = inner
    return dict(state)


def _match_wrapper(state: StateDict, expected: Mapping[str, Tensor]) -> StateDict:
    """Strips the wrappers' prefixes that every key bears, and adds those of model's own wrappers."""
    bare, prefix = _strip(state)[0], _strip(expected)[1]
    return {prefix + key: value for key, value in bare.items()}


def _strip(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    prefix = ""
    keys = list(state)
    while keys:
        wrapper = next((w for w in _WRAPPERS if all(key.startswith(prefix + w) for key in keys)), None)
        if wrapper is None:
            break
        prefix += wrapper
    return {key[len(prefix) :]: value for key, value in state.items()}, prefix


def _match_form(state: StateDict, prefix: str, block: ACBlock) -> None:
    """Folds the branches found for a deployed block, in state itself."""
    own = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    deployed = "fused_conv.weight" in own
    if deployed and not block.deploy:
        raise ValueError(
            f"the checkpoint is deployed at {prefix or '(model)'!r} but the model's block is in training form, and "
            "branches cannot be recovered from a folded kernel: build the model with deploy=True, or fuse() it"
        )
    if block.deploy and not deployed and "square_conv.weight" in own:
        weight, bias = fold(_step(own, block))
        for key in own:
            del state[prefix + key]
        state[prefix + "fused_conv.weight"], state[prefix + "fused_conv.bias"] = weight, bias


def _step(own: StateDict, block: ACBlock) -> Step:
    def norm(name: str) -> Norm | None:
        if f"{name}.running_mean" not in own:
            return None
        get = own.get
        mean, var = own[f"{name}.running_mean"], own[f"{name}.running_var"]
        return Norm(get(f"{name}.weight"), get(f"{name}.bias"), mean, var, None, block.eps, None, False)

    branches = {
        name: Branch(own[f"{name}_conv.weight"], own.get(f"{name}_conv.bias"), norm(f"{name}_bn"))
        for name in ("square", "hor", "ver")
        if f"{name}_conv.weight" in own
    }
    step = Step(block.geometry, branches, norm("bn"))
    if len(step.norms) != (1 if step.norm else len(branches)):
        raise ValueError(
            f"the checkpoint cannot be folded for a deployed block: no running statistics in {sorted(own)}"
        )
    return step


def _check(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    problems = [f"missing {key}" for key in expected if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in expected]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, the model wants {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"the checkpoint does not fit the model: {'; '.join(problems[:5])}{more}")
