"""Triton's interpreter without most of its time, which finds nothing on the shapes of these tests.

It asserts after every sum and product that its 32 bits held (test_addresses.py is about shapes where they do not),
replaces Triton's language anew at each launch, and at each call of one kernel function by another, and works types
and shapes out anew for every value. What is left to it here is whatever is not plain: operands of one dtype, or a
number beside a tensor, are NumPy's to compute and to broadcast, and anything else goes the interpreter's own way.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.core import block_type, constexpr, tensor
from triton.runtime import interpreter, jit
from triton.runtime.interpreter import TensorHandle

INTEGERS = {"int32": np.int32, "int64": np.int64}
FLOATS = {"fp32": np.float32, "fp64": np.float64}
NUMBERS = INTEGERS | FLOATS
# Among these a cast is NumPy's, but to int1, which asks what is not 0.
CAST = {"int1": np.bool_, "fp16": np.float16, **NUMBERS}
WHOLE = slice(None)


def divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards zero, as the interpreter divides integers."""
    return (a - np.fmod(a, b)) // b


# Of each operator: how, for which dtypes, and what comes of them where it is not the same.
OPERATORS: dict[str, tuple[Callable, dict, Any]] = {
    "add": (np.add, NUMBERS, None),
    "sub": (np.subtract, NUMBERS, None),
    "mul": (np.multiply, NUMBERS, None),
    "truediv": (np.divide, FLOATS, None),
    "floordiv": (divided, INTEGERS, None),
    "mod": (np.fmod, INTEGERS, None),
    "and": (np.bitwise_and, {"int1": np.bool_}, None),
    "or": (np.bitwise_or, {"int1": np.bool_}, None),
    **{name: (getattr(operator, name), NUMBERS, tl.int1) for name in ("lt", "le", "gt", "ge", "eq", "ne")},
}


def install() -> None:
    """From now on, in this process."""
    from acnet_kernels.kernels import bn_sum

    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    for function in (bn_sum.apply, tl.zeros):  # kernels see triton.language, its own functions triton.language.core
        interpreter._patch_lang(function.fn)
    interpreter._patch_lang = lambda _: SimpleNamespace(restore=lambda: None)
    _remember_types()
    _call_directly()
    for name, (compute, dtypes, gives) in OPERATORS.items():
        _replace_operator(name, compute, dtypes, gives)
    tensor.__getitem__, tensor.to = _indexed(tensor.__getitem__), _cast(tensor.to)
    tl.load = _loaded(tl.load)


def _remember_types() -> None:
    """A type's shape and names, a tensor's of a type, and what kernels ask of their window are worked out once."""
    of_block, of_tensor = block_type.__init__, tensor.__init__
    types: dict[tuple, dict] = {}
    tensors: dict[str, dict] = {}

    def typed(self, element_ty, shape):
        key = element_ty.name, *(getattr(n, "value", n) for n in shape)
        if key in types:
            vars(self).update(types[key], element_ty=element_ty)
        else:
            of_block(self, element_ty, shape)
            types[key] = dict(vars(self))

    def of_type(self, handle, type):
        if type.name in tensors:
            vars(self).update(tensors[type.name], handle=handle, type=type, dtype=type.scalar)
        else:
            of_tensor(self, handle, type)
            tensors[type.name] = dict(vars(self), handle=None)

    block_type.__init__, tensor.__init__ = typed, of_type
    np_dtype, np_dtypes = interpreter._get_np_dtype, {}

    def np_dtype_of(type):
        name = type.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = np_dtype(type)
        return np_dtypes[name]

    interpreter._get_np_dtype = np_dtype_of
    semantic = type(interpreter.interpreter_semantic)
    broadcast = semantic.broadcast_impl_value

    def of_one_shape(self, left, right):
        same = left.type.is_block() and right.type.is_block() and left.type.shape.values == right.type.shape.values
        return (left, right) if same else broadcast(self, left, right)

    semantic.broadcast_impl_value = of_one_shape
    ask, answers = jit.ConstexprFunction.__call__, {}

    def asked(self, *args, **kwargs):
        try:
            key = self.fn, args, *kwargs.items()
            known = key in answers
        except TypeError:  # of a tensor, which has no hash
            return ask(self, *args, **kwargs)
        if not known:
            answers[key] = ask(self, *args, **kwargs)
        return answers[key]

    jit.ConstexprFunction.__call__ = asked


def _call_directly() -> None:
    """The language's functions without the three around each that find out which language they are of."""
    semantic = interpreter.interpreter_semantic
    for owner in (tl, tl.core, tl.math, tensor):
        for name, patched in list(vars(owner).items()):
            member = (getattr(patched, "__kwdefaults__", None) or {}).get("member")
            if not hasattr(member, "__wrapped__"):
                continue
            function = member.__wrapped__
            if owner is tensor:

                def method(self, *args, function=function, **kwargs):
                    kwargs["_semantic"] = semantic
                    return function(self, *args, **kwargs)

                setattr(owner, name, method)
            else:
                setattr(owner, name, functools.partial(function, _semantic=semantic))


_LIKE: dict[tuple, dict[str, Any]] = {}  # what tensors of a dtype and a shape have in common


def _tensor(data: np.ndarray, dtype: Any, block: bool) -> tensor:
    """A tensor of these numbers, which NumPy has in its dtype; a scalar is an array of one too."""
    key = dtype.name, data.shape if block else None
    if key not in _LIKE:
        made = tensor(TensorHandle(data, dtype), block_type(dtype, list(data.shape)) if block else dtype)
        _LIKE[key] = dict(vars(made), handle=None)
    found, handle = tensor.__new__(tensor), TensorHandle.__new__(TensorHandle)
    handle.data, handle.dtype, handle.attr = data, dtype, {}
    vars(found).update(_LIKE[key], handle=handle)
    return found


def _replace_operator(name: str, compute: Callable, dtypes: dict, gives: Any) -> None:
    def operate(itself: tensor, other: Any, slow: Callable, turned: bool) -> tensor:
        dtype = itself.dtype
        of = dtypes.get(dtype.name)
        given = other.value if type(other) is constexpr else other
        if of is not None:
            mine = itself.handle.data
            if type(given) is tensor:
                if given.dtype.name == dtype.name:
                    block = itself.type.is_block() or given.type.is_block()
                    return _tensor(compute(mine, given.handle.data), gives or dtype, block)
            elif (type(given) is int and -(2**31) <= given < 2**31 and of is not np.bool_) or (
                type(given) is float and dtype.name in FLOATS
            ):
                number = of(given)
                found = compute(number, mine) if turned else compute(mine, number)
                return _tensor(found, gives or dtype, itself.type.is_block())
        elif compute is np.add and dtype.is_ptr() and type(given) is tensor and given.dtype.name in INTEGERS:
            width = max(1, dtype.element_ty.primitive_bitwidth // 8)
            data = itself.handle.data + width * given.handle.data.astype(np.uint64)
            return _tensor(data, dtype, itself.type.is_block() or given.type.is_block())
        return slow(itself, other)

    for turned in (False, True):
        method = f"__{'r' * turned}{name}__"
        if method in vars(tensor):
            slow = getattr(tensor, method)
            setattr(tensor, method, lambda a, b, slow=slow, turned=turned: operate(a, b, slow, turned))


def _indexed(slow: Callable) -> Callable:
    def indexed(self, key):
        if type(key) is tuple and self.type.is_block() and all(at is None or at == WHOLE for at in key):
            data = self.handle.data
            if len(key) - key.count(None) == data.ndim:
                return _tensor(data[key], self.dtype, True)
        return slow(self, key)

    return indexed


def _cast(slow: Callable) -> Callable:
    def cast(self, dtype, *rest, **options):
        given = dtype.value if type(dtype) is constexpr else dtype
        if rest or options or given.name not in CAST or given.name == "int1" or self.dtype.name not in CAST:
            return slow(self, dtype, *rest, **options)
        if given.name == self.dtype.name:
            return self
        return _tensor(self.handle.data.astype(CAST[given.name]), given, self.type.is_block())

    return cast


def _loaded(slow: Callable) -> Callable:
    builder = interpreter.interpreter_builder

    def load(pointer, mask=None, other=None, **options):
        plain = type(mask) is tensor and (other is None or other == 0) and pointer.type.is_block() and not options
        if not plain or pointer.dtype.element_ty.name == "int1":
            return slow(pointer, mask, other, **options)
        at, wanted = np.broadcast_arrays(pointer.handle.data, mask.handle.data)
        element = pointer.dtype.element_ty
        loaded = builder.create_masked_load(
            TensorHandle(at, pointer.dtype), TensorHandle(wanted, tl.int1), None, None, None, False
        )
        return _tensor(loaded.data, element, True)

    return load
