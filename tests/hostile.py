"""Calls every operator with wrong arguments: each raises a clear error or answers as defined, and never crashes.

    python tests/hostile.py every              each operator with each change of each of its arguments
    python tests/hostile.py random --calls 20000 [--seed 0]   random operators, several random changes a call
    python tests/hostile.py every random                      both, by one process

The changes come from the arguments' types, the operators from the registry. Calls run in child processes, so that a
signal is one failure with the call's name; --first N starts at the Nth random call, to look at one again.
An error is clear if it is of a type that says so, names no file of the building machine, and has left all arguments
as they were; an answer is compared with the definition (operator_cases.py).
"""

from __future__ import annotations

import argparse
import copy
import math
import mmap
import os
import random
import re
import resource
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from operator_cases import CASES, FLOATS, operators, to_meta
from torch import Tensor

from acnet_kernels.steps import convolution

CLEAR = (RuntimeError, ValueError, TypeError, NotImplementedError, MemoryError)
INTS = (-(2**63), -1, 0, 1, 2, 3, 4, 7, 255, 257, 2**24 + 1, 2**31, 2**62 + 1, 2**63 - 1)
NUMBERS = (math.nan, math.inf, -math.inf, -1.0, 1.0, 1e300)
DTYPES = (*FLOATS, torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn)
PAIRS = 100  # of tensors that are tried in one memory: of the folding's dozens, a sample
ENDS = (0, -1)  # of a list's elements, those that are changed: the others go through the same loop
SECONDS = 60  # for one call: many times what any takes
MEMORY = 2 << 30  # beyond what is there at the start: enough for every honest call
TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

OTHERS: tuple[tuple[type, tuple[Any, ...]], ...] = (
    (bool, (True, False)),
    (int, INTS),
    (float, NUMBERS),
    (str, ("square", "ver", "", "diagonal", "square\0")),
    (torch.dtype, DTYPES),
    (type(None), (torch.float16, torch.ones(1))),
)

Change = tuple[str, Callable[[list[Any]], None]]  # a name, and what does it to the arguments


def places(args: list[Any]) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Every argument, and ENDS of those that are lists, with the indices that lead to it."""
    for i, value in enumerate(args):
        yield (i,), value
        if isinstance(value, list):
            ends = sorted({j % len(value) for j in ENDS}) if value else []
            yield from (((i, j), value[j]) for j in ends)


def at(args: list[Any], place: tuple[int, ...]) -> Any:
    for i in place:
        args = args[i]
    return args


def put(args: list[Any], place: tuple[int, ...], value: Any) -> None:
    at(args, place[:-1])[place[-1]] = value


def strided(t: Tensor) -> Tensor:
    """The same values at every second place of a larger tensor."""
    larger = t.new_zeros([2 * n for n in t.shape])
    return larger[tuple(slice(None, None, 2) for _ in t.shape)].copy_(t)


TENSORS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "missing": lambda t: None,
    **{f"of {dtype}": lambda t, dtype=dtype: t.to(dtype) for dtype in DTYPES},
    "on meta": lambda t: t.to("meta"),
    "without dimensions": lambda t: t.new_zeros(()),
    "flat": lambda t: t.flatten(),
    "with a dimension more": lambda t: t.unsqueeze(0),
    "with a dimension more behind": lambda t: t.unsqueeze(-1),
    "of no elements": lambda t: t.new_zeros(0),
    "strided": strided,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.mT if t.dim() > 1 else t,
    "of other strides": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else t,
    "expanded": lambda t: t[..., :1].expand(t.shape) if t.dim() else t,
    "expanded from one": lambda t: t.new_ones(()).expand(t.shape),
    "of a huge expanded shape": lambda t: t.new_ones(()).expand(*t.shape[:-1], 2**31) if t.dim() else t,
    "without memory": lambda t: without_memory(t.clone()) if t.dim() else t,
    "misaligned": lambda t: t.new_zeros(t.numel() + 1)[1:].view(t.shape).copy_(t),
    "sparse": lambda t: t.to_sparse() if t.dim() and t.is_cpu else t,
    "that requires a gradient": lambda t: t.detach().requires_grad_() if t.is_floating_point() else t,
    **{f"empty along {d}": lambda t, d=d: t.narrow(d, 0, 0) if t.dim() > d else t for d in range(6)},
    **{
        f"shorter along {d}": lambda t, d=d: t.narrow(d, 0, max(t.shape[d] - 1, 0)) if t.dim() > d else t
        for d in range(6)
    },
    **{f"longer along {d}": lambda t, d=d: torch.cat([t, t], d) if t.dim() > d else t for d in range(6)},
}


def without_memory(t: Tensor) -> Tensor:
    t.untyped_storage().resize_(0)
    return t


def changed_values(value: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What to put in a value's place, made when it is called, with a name for it."""
    if isinstance(value, Tensor):
        yield from ((name, partial(change, value)) for name, change in TENSORS.items())
    elif isinstance(value, list):
        yield "[]", list
        yield "without its last", lambda: value[:-1]
        yield "twice", lambda: value * 2
        yield "backwards", lambda: value[::-1]
        yield "its first alone", lambda: value[:1] * len(value)
        yield "many times", lambda: value * 1000
    else:
        for kind, others in OTHERS:
            if isinstance(value, kind):
                yield from ((repr(other), lambda other=other: other) for other in others)
                return


def overlapping(args: list[Any], place: tuple[int, ...], other: tuple[int, ...], shift: int) -> Tensor | None:
    """What is at `other`, in the memory of what is at `place` from element `shift` on; None if it is too large."""
    t, like = at(args, place), at(args, other)
    kinds = [(some.dtype, some.device, some.layout) for some in (t, like)]
    if kinds[0] != kinds[1] or kinds[0][2] != torch.strided or not t.numel():
        return None
    size = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True))
    offset = t.storage_offset() + shift
    if like.numel() == 0 or (offset + size) * t.element_size() > t.untyped_storage().nbytes():
        return None
    return t.detach().as_strided(like.shape, like.stride(), offset)


def share(args: list[Any], place: tuple[int, ...], other: tuple[int, ...], shift: int) -> None:
    """Puts what is at `other` into the memory of what is at `place`, where an earlier change left room for it."""
    moved = overlapping(args, place, other, shift)
    if moved is not None:
        put(args, other, moved)


def changes(args: list[Any]) -> Iterator[Change]:
    """Every change of one argument, or of two to share memory."""
    names = list(places(args))
    for place, value in names:
        for name, make in changed_values(value):
            if name == "missing" and len(place) > 1:
                continue  # PyTorch's refusal prints the arguments, and dies of one without memory
            yield f"{place} {name}", lambda given, place=place, make=make: put(given, place, make())
    tensors = [place for place, value in names if isinstance(value, Tensor)]
    pairs = [(place, other) for place in tensors for other in tensors if other != place]
    for place, other in random.Random(0).sample(pairs, min(len(pairs), PAIRS)):
        for shift in (0, 1):
            if overlapping(args, place, other, shift) is not None:
                yield (
                    f"{other} in the memory of {place} from element {shift} on",
                    lambda given, p=(place, other, shift): share(given, *p),
                )


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors_of(v)]
    return [value] if isinstance(value, Tensor) else []


def bits(t: Tensor) -> bytes | None:
    """A tensor's memory as it is."""
    if t.device.type == "meta" or t.layout != torch.strided:
        return None
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).numpy().tobytes()


def state(value: Any) -> list[tuple[Any, ...]]:
    """Shape, strides and memory of each of the tensors in a value, once, however often it holds them."""
    tensors = {id(t): t for t in tensors_of(value)}.values()
    return [(t.shape, t.stride() if t.layout == torch.strided else (), bits(t)) for t in tensors]


def written(name: str) -> list[int]:
    """Which arguments an operator writes."""
    schema = getattr(torch.ops.acnet_kernels, name).default._schema
    return [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]


def address(t: Tensor) -> int:
    """Where a tensor's memory begins, 0 for one that has none of its own."""
    return t.untyped_storage().data_ptr() if t.layout == torch.strided else 0


def check_value(name: str, got: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert got.shape == wanted.shape, (
        f"{name} has shape {tuple(got.shape)}, by its definition {tuple(wanted.shape)}"
    )
    if got.stride() == wanted.stride():  # what is expanded, maybe hugely, is compared once
        once = tuple(slice(None, 1 if step == 0 else None) for step in got.stride())
        got, wanted = got[once], wanted[once]
    got, wanted = got.detach().double(), wanted.detach().double()
    # Beyond a half type's largest number an infinity is as good as the number.
    got, wanted = (t.where(t.abs() < 6e4, t.sign() * math.inf).where(~t.isnan(), t) for t in (got, wanted))
    size = max(1.0, wanted[wanted.isfinite()].abs().max().item()) if wanted.isfinite().any() else 1.0
    torch.testing.assert_close(
        got, wanted, rtol=0, atol=tolerance * size, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )


def check_answer(name: str, args: list[Any], before: list[Any], answer: Any) -> None:
    """Asserts that what an operator answered, or wrote, is what its definition gives for the arguments before."""
    writes = written(name)
    shared = {address(t) for j in writes for t in tensors_of(args[j])}
    for i, (value, old) in enumerate(zip(args, before, strict=True)):
        if writes and i not in writes:
            same = [bits(t) == bits(o) for t, o in zip(tensors_of(value), tensors_of(old), strict=True)]
            apart = [address(t) not in shared for t in tensors_of(value)]
            assert all(s or not a for s, a in zip(same, apart, strict=True)), (
                f"argument {i} is not the same any more"
            )
    outputs = [args[i] for i in writes] + (
        list(answer) if isinstance(answer, tuple) else [answer] * (answer is not None)
    )
    devices = {t.device.type for t in tensors_of(before)}
    assert len(devices) < 2, f"it computed with tensors on {devices}"
    assert {t.device.type for t in tensors_of(outputs)} <= devices, "an output is on another device"
    if devices != {"cpu"}:
        return
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = CASES[name].results(*before)
    dtypes = [t.dtype for t in tensors_of(before) if t.dtype in TOLERANCES]
    dtypes += [v for v in before if isinstance(v, torch.dtype)]
    tolerance = max((TOLERANCES[dtype] for dtype in dtypes), default=0)
    for i, (got, want) in enumerate(zip(outputs, wanted, strict=True)):
        if want is None:  # not defined in public, but memory that was written
            # It may be no number where what is defined is none: a variance with an ε below it has no root.
            known = tensors_of(before) + tensors_of([w for w in wanted if w is not None])
            assert not all(o.isfinite().all() for o in known) or all(t.isfinite().all() for t in tensors_of(got)), (
                f"output {i} is not finite, though all it comes from is"
            )
            continue
        pairs = zip(tensors_of(got), tensors_of(want), strict=True)
        for j, (g, w) in enumerate(pairs):
            check_value(f"output {i}.{j}", g, w, tolerance)


def check_error(error: Exception, same: bool) -> None:
    """Asserts that an error is clear, and that it came before anything was written."""
    assert isinstance(error, CLEAR), f"{type(error).__name__} is not what wrong arguments raise: {error}"
    text = str(error)
    assert text, "the error says nothing"
    # The dispatcher's own, of a device or layout without a kernel, tells where each kernel was registered.
    if not isinstance(error, NotImplementedError):
        assert not re.search(r"(^|[\s(])/\w+/", text), f"it names a file: {text}"
    assert same, f"it changed an argument before it raised {text}"


def call(name: str, args: list[Any]) -> str:
    """One call, judged; returns "refused" or "answered". AssertionError where it is neither."""
    writes, memory = written(name), state(args)
    before = copy.deepcopy(args) if writes else []
    operator = getattr(torch.ops.acnet_kernels, name).default
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = operator(*args)
    except Exception as error:
        check_error(error, memory == state(args))
        return "refused"
    if not writes:
        assert memory == state(args), "an argument is not the same any more"
        before = copy.deepcopy(args)
    check_answer(name, args, before, answer)
    return "answered"


def unchanged(value: Any, was: Any) -> bool:
    """Whether these are the same objects, in lists too."""
    if isinstance(value, list) and isinstance(was, list):
        return len(value) == len(was) and all(map(unchanged, value, was))
    return value is was


def every(name: str, rounds: int) -> Iterator[tuple[str, list[Any]]]:
    """An operator's valid call, and each change of it; the same on meta tensors.

    What writes gets arguments of its own each time; what writes none is held to that, and they are used again.
    """
    r = random.Random(name)
    for device in ("cpu", "meta"):
        for _ in range(rounds):  # different shapes, dtypes and lists
            torch.manual_seed(r.randrange(2**31))
            valid = CASES[name].make(r)
            if device == "meta":
                valid = to_meta(valid)
            elif CASES[name].device != "cpu":
                continue
            source = copy.deepcopy(valid)
            yield f"{device} valid", copy.deepcopy(valid)
            for label, change in changes(source):
                trial = [list(value) if isinstance(value, list) else value for value in source]
                change(trial)
                if unchanged(trial, source):  # as by a change along a dimension that there is not
                    continue
                if written(name):
                    trial = copy.deepcopy(valid)
                    change(trial)
                yield f"{device} {label}", trial


def at_random(seed: int, numbers: range) -> Iterator[tuple[str, list[Any]]]:
    """Random operators with up to three random changes a call."""
    names = operators()
    for number in numbers:
        r = random.Random(f"{seed} {number}")
        torch.manual_seed(number)
        name = r.choice(names)
        args = CASES[name].make(r)
        if r.random() < 0.1:
            args = to_meta(args)
        labels = []
        for label, change in r.sample(list(changes(copy.deepcopy(args))), r.choice((0, 1, 1, 1, 2, 3))):
            try:
                change(args)
            except (IndexError, TypeError, AttributeError):  # what it is about is gone by now
                continue
            labels.append(label)
        yield f"{name} call {number}: {', '.join(labels)}", [name, args]


def limit_memory() -> None:
    """Has what would take more than a few gigabytes fail as an allocation, not by the system's hand."""
    if "libasan" in os.environ.get("LD_PRELOAD", ""):  # which reserves terabytes
        return
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))


def in_child(calls: Callable[[], Iterator[tuple[str, str, list[Any]]]]) -> tuple[Counter[str], list[str]]:
    """Judges calls (label, operator, arguments) in a child process: how they ended, and what went wrong."""
    label = mmap.mmap(-1, 4096)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtorch reports what it catches
        with os.fdopen(writing, "w") as out:
            limit_memory()
            for name, operator, args in calls():
                label[:] = name.encode()[:4095].ljust(4096, b"\0")
                signal.setitimer(signal.ITIMER_REAL, SECONDS)  # kills: a loop in C++ sees no exception
                try:
                    out.write(f"{operator} {call(operator, args)}\n")
                except Exception as error:
                    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__} in the test: "
                    out.write(f"! {name}: {kind}{' '.join(str(error).split())}\n")
            signal.setitimer(signal.ITIMER_REAL, 0)
        os._exit(0)
    os.close(writing)
    counts: Counter[str] = Counter()
    failures = []
    with os.fdopen(reading) as lines:
        for line in lines:
            if line.startswith("! "):
                failures.append(line[2:].strip())
            else:
                counts[line.strip()] += 1
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != 0:
        ended = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        failures.append(f"{label[:].rstrip(bytes(1)).decode(errors='replace')}: ended by {ended}")
    return counts, failures


def main(argv: list[str]) -> int:
    """Prints how the calls ended; 1 where one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("every", "random"), nargs="+")
    parser.add_argument("--operator", action="append", help="of `every`: these alone")
    parser.add_argument(
        "--rounds", type=int, default=1, help="of `every`: valid calls to start from, on each device"
    )
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # a child of fork has no pool of threads
    # As on a processor without fast half precision, wherever this runs: the bounds are for one rounding of the
    # result, not of every product on the way, whose terms may cancel. Native half precision has tests of its own.
    convolution._SLOW_HALF_TYPES = frozenset((torch.bfloat16, torch.float16))
    # Not in the children: it imports a compiler's settings, which takes each longer than its calls.
    torch.utils.deterministic.fill_uninitialized_memory = True  # by NaN, so that it shows
    torch.use_deterministic_algorithms(True, warn_only=True)
    names = operators()
    if names != sorted(CASES):
        print(f"operator_cases.py must have a case for each operator, and no other: {set(names) ^ set(CASES)}")
        return 1
    counts: Counter[str] = Counter()
    failures = []
    if "every" in options.which:
        for name in options.operator or names:
            some = in_child(
                lambda name=name: ((f"{name}: {label}", name, args) for label, args in every(name, options.rounds))
            )
            counts, failures = counts + some[0], failures + some[1]
    if "random" in options.which:
        last = options.first + options.calls
        for first in range(options.first, last, 500):
            numbers = range(first, min(first + 500, last))
            some = in_child(lambda n=numbers: ((label, *pair) for label, pair in at_random(options.seed, n)))
            counts, failures = counts + some[0], failures + some[1]
    for outcome, count in sorted(counts.items()):
        print(f"{outcome}: {count}")
    print("\n".join(failures))
    print(f"{counts.total()} calls ended well, {len(failures)} did not")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
