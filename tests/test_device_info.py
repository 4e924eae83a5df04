"""Machines' names: what measured times are filed under."""

import pytest
import torch

from acnet_kernels import ACBlock
from acnet_kernels.backends import device_info, planner, timing_cache
from acnet_kernels.steps import convolution, cpuinfo
from benchmarks import machine as benchmark_machine

# A processor as /proc/cpuinfo has it.
EMERALD_RAPIDS = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 207
model name\t: Intel(R) Xeon(R) Processor
flags\t\t: fpu sse2 avx avx2 avx512f avx512_bf16
"""


class Processor:
    """Pretends that this machine has another processor, with two threads."""

    def __init__(self, monkeypatch, tmp_path):
        self.patch, self.info = monkeypatch, tmp_path / "cpuinfo"
        monkeypatch.setattr(cpuinfo, "Path", lambda _: self.info)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        monkeypatch.setattr(benchmark_machine.os, "cpu_count", lambda: 2)
        monkeypatch.setattr(timing_cache, "_known", {})
        monkeypatch.setenv("ACNET_KERNELS_CACHE", str(tmp_path / "cache"))
        self.be(EMERALD_RAPIDS)

    def be(self, info, amx=False, amx_fp16=False):
        self.info.write_text(info + "\nprocessor\t: 1\nmodel name\t: another\n")
        self.patch.setattr(cpuinfo, "has_amx", lambda: amx)
        self.patch.setattr(cpuinfo, "has_amx_fp16", lambda: amx_fp16)
        self.patch.setattr(cpuinfo.platform, "machine", lambda: "x86_64")
        forget()
        self.patch.setattr(convolution, "_SLOW_HALF_TYPES", cpuinfo.slow_half_types())
        return device_info.this_machine("cpu")


def forget():
    for cached in (cpuinfo.first, device_info.cpu_name, device_info._machine, planner._decided):
        cached.cache_clear()


@pytest.fixture
def processor(monkeypatch, tmp_path):
    yield Processor(monkeypatch, tmp_path)
    monkeypatch.undo()
    forget()


def test_tuned_times_of_each_are_kept_apart(processor):
    problem = ACBlock(4, 8, 3, padding=1).plan(torch.empty(2, 4, 9, 8, device="meta"))[0]
    bare = EMERALD_RAPIDS.replace(" avx512_bf16", "")
    kinds = [
        {"info": EMERALD_RAPIDS},
        {"info": EMERALD_RAPIDS, "amx": True},
        {"info": EMERALD_RAPIDS, "amx": True, "amx_fp16": True},
        {"info": bare},  # the same name, but bfloat16 convolutions of another speed
        {"info": EMERALD_RAPIDS.replace("207", "143")},
    ]
    for number, kind in enumerate(kinds, 1):
        timing_cache._known.clear()
        timing_cache.store(processor.be(**kind), {timing_cache.key(problem): {"eager": float(number)}})
    assert len(list(timing_cache.cache_dir().glob("*.json"))) == len(kinds)
    for number, kind in enumerate(kinds, 1):
        timing_cache._known.clear()
        assert timing_cache.lookup(problem, processor.be(**kind)) == ({"eager": float(number)}, timing_cache.TUNED)


def test_what_pytorchs_kernels_may_use_tells_machines_apart(processor, monkeypatch):
    before = timing_cache.cache_path(processor.be(EMERALD_RAPIDS))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2 of ATEN_CPU_CAPABILITY")
    assert timing_cache.cache_path(processor.be(EMERALD_RAPIDS)) != before


def test_names(processor):
    amd = "vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t: 207\nmodel name\t: AMD EPYC\n"
    assert processor.be(amd) == ("cpu", "AMD EPYC, 2 threads")
    fast = processor.be(amd + "flags\t\t: avx512f avx512_bf16\n")
    assert fast == ("cpu", "AMD EPYC (AVX512-BF16), 2 threads")
    assert processor.be(EMERALD_RAPIDS, amx=True).name == "Intel Xeon Processor (emerald-rapids, AMX), 2 threads"
    assert benchmark_machine.machine_class() == "xeon-emerald-rapids-amx-2core"
    both = processor.be(EMERALD_RAPIDS.replace("207", "1"), amx=True, amx_fp16=True)
    assert both.name == "Intel Xeon Processor (AMX, AMX-FP16), 2 threads"
    processor.info.unlink()
    forget()
    assert device_info.cpu_name() == f"{device_info.platform.processor() or 'x86_64'} (AMX, AMX-FP16)"
    assert device_info.instructions() == torch.backends.cpu.get_cpu_capability()
