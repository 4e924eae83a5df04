"""What the CSVs say: who is faster by how much, where we lose and why, and what has become slower."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from .contenders import COMPILED, ours
from .harness import Row
from .phases import CONVOLUTIONS

OURS = "auto"  # what a user gets
LOSS = 1.03  # times the other's median from which it is called a loss
SHORT, IDLE = 5.0, 0.15  # a step of fewer ms, whose work takes less of them at the ceilings, is bound by its calls
LIBRARY_BOUND = 0.75  # share of the library's convolutions in a step from which they are the reason
REGRESSION = 1.05


class Ratio(NamedTuple):
    """other's time over this one's: its median, and from p20 over p80 to p80 over p20."""

    low: float
    p50: float
    high: float

    @property
    def certain(self) -> bool:
        """Whether the two ranges from p20 to p80 are apart."""
        return self.low > 1 or self.high < 1


def ratio(other: Row, this: Row) -> Ratio:
    """How many times as fast `this` is as `other`."""
    return Ratio(other.p20 / this.p80, other.p50 / this.p50, other.p80 / this.p20)


Steps = dict[str, dict[str, Row]]  # shape or network → contender → its step's time, in its better layout


def steps(rows: Iterable[Row], metric: str = "time_ms", mode: str = "step") -> Steps:
    """The step's (or this mode's) rows of this metric, the better layout of each contender."""
    found: Steps = {}
    for row in rows:
        if row.mode == mode and row.metric == metric:
            of_shape = found.setdefault(row.shape, {})
            if row.contender not in of_shape or row.p50 < of_shape[row.contender].p50:
                of_shape[row.contender] = row
    return found


Phases = dict[str, dict[str, dict[str, dict[str, float]]]]  # shape → contender → phase → metric → value


def phases(rows: Iterable[Row]) -> Phases:
    """The rows of a phases file, ceilings apart."""
    found: Phases = {}
    for row in rows:
        if row.contender not in ("copy", "gemm"):
            of_step = found.setdefault(row.shape, {}).setdefault(row.contender, {})
            of_step.setdefault(row.mode, {})[row.metric] = row.p50
    return found


def ceilings(rows: Iterable[Row]) -> dict[str, float]:
    """'copy' → GB/s, 'gemm' → GFLOP/s."""
    return {row.contender: row.p50 for row in rows if row.contender in ("copy", "gemm")}


@dataclass(frozen=True)
class Loss:
    """A step where our choice takes longer than another contender: by how much, and why."""

    shape: str
    other: str
    times: float
    reason: str
    certain: bool


def losses(found: Steps, made_of: Phases, tops: dict[str, float], others: tuple[str, ...]) -> list[Loss]:
    """Where the median of `auto` is above the fastest of the others' by more than LOSS; the worst first."""
    lost = []
    for shape, times in found.items():
        rivals = [times[name] for name in others if name in times]
        if OURS not in times or not rivals:
            continue
        rival = min(rivals, key=lambda row: row.p50)
        against = ratio(rival, times[OURS])
        if times[OURS].p50 > LOSS * rival.p50:
            reason = why(rival.contender, made_of.get(shape, {}).get(OURS, {}), tops)
            lost.append(Loss(shape, rival.contender, 1 / against.p50, reason, against.certain))
    return sorted(lost, key=lambda loss: -loss.times)


def why(rival: str, step: dict[str, dict[str, float]], tops: dict[str, float]) -> str:
    """The reason for a loss, from what our step is made of and the ceilings."""
    if not step:
        return "the step's phases were not measured"
    times = {name: values["time_ms"] for name, values in step.items()}
    total = sum(times.values())
    library = sum(times.get(name, 0) for name in CONVOLUTIONS) / total
    largest = max(times, key=lambda name: times[name])
    if rival == "eager" and "batch norm forward" in times:
        return "the planner takes eager here: the same operators"
    work = sum(1e3 * max(p["gflop"] / tops["gemm"], p["gbyte"] / tops["copy"]) for p in step.values()) / total
    if total < SHORT and work < IDLE:
        return f"calls are the cost of so short a step: its work would take {work:.0%} of it at the ceilings"
    if library >= LIBRARY_BOUND:
        return f"the library's convolutions are {library:.0%} of the step"
    if rival in COMPILED and largest in CONVOLUTIONS:
        return f"the compiler fuses what surrounds the convolutions, {library:.0%} of the step"
    return f"{largest} takes {times[largest] / total:.0%} of the step"


def groups(lost: list[Loss]) -> dict[str, list[Loss]]:
    """The losses by reason, numbers in it left out, the most frequent first."""
    found: dict[str, list[Loss]] = {}
    for loss in lost:
        found.setdefault(loss.reason.split(" is ")[0].split(" are ")[0].split(" takes ")[0], []).append(loss)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


class Change(NamedTuple):
    """A step of ours measured before and now: each as times of the same run's eager, whose median is 1."""

    shape: str
    dtype: str
    contender: str
    before: float
    now: float
    worse: bool


def changes(before: dict[str, Steps], now: dict[str, Steps]) -> list[Change]:
    """Steps of ours in both runs, relative to eager so that the machine's mood drops out; the worst first.

    'worse' is one that rose by more than REGRESSION, with ranges from p20 to p80 that are apart.
    """
    found = []
    for dtype, shapes in now.items():
        for shape, times in shapes.items():
            old = before.get(dtype, {}).get(shape, {})
            for name in [name for name in ours() if name in times and name in old]:
                if "eager" not in times or "eager" not in old:
                    continue
                was, now_at = old[name].p50 / old["eager"].p50, times[name].p50 / times["eager"].p50
                apart = old[name].p80 / old["eager"].p50 < times[name].p20 / times["eager"].p50
                found.append(Change(shape, dtype, name, was, now_at, apart and now_at > REGRESSION * was))
    return sorted(found, key=lambda change: change.before / change.now)


def summary(found: Steps, name: str, other: str) -> tuple[int, float, float, float] | None:
    """(shapes, least, median, most): how many times as fast `name` is as `other`; None where no shape has both."""
    times = [s[other].p50 / s[name].p50 for s in found.values() if name in s and other in s]
    return (len(times), min(times), median(times), max(times)) if times else None
