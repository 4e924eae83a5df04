"""The benchmarks' harness: interleaved timing by a clock that is told what calls take, rows and their file."""

import json

import pytest
import torch
from fake_cuda import FakeCuda

from benchmarks import harness, machine


class FakeClock:
    """Time passes only in calls, which return how many milliseconds they take."""

    def __init__(self):
        self.now = 0.0

    def seconds(self):
        return self.now

    def milliseconds(self, call):
        spent = call()
        self.now += spent / 1e3
        return spent


def run(contenders, **settings):
    return harness.measure(contenders, clock=FakeClock(), **settings)


def logged(log, name, spent):
    def call():
        log.append(name)
        return spent

    return call


def test_samples_are_what_the_calls_took():
    times = iter(range(1, 100))
    samples = run({"a": [lambda: next(times)]}, warm_up=1e-4, seconds=0.02, least=2)["a"]
    assert samples.values == (2, 3, 4, 5, 6)  # the first warms up
    assert (samples.quantile(0.2), samples.p50, samples.quantile(0.8)) == (
        pytest.approx(2.8),
        4,
        pytest.approx(5.2),
    )
    assert samples.clock == machine.clock_mhz()


def test_contenders_take_turns_and_follow_each_other_in_every_order():
    log = []
    run({n: [logged(log, n, 200)] for n in "abc"}, warm_up=0.0, seconds=1.0, least=30)
    rounds = ["".join(log[i : i + 3]) for i in range(0, len(log), 3)]
    assert len(rounds) == 5  # a second holds no more
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    log.clear()
    run({n: [logged(log, n, 1)] for n in "abc"}, warm_up=0.0, seconds=0.6, least=2)
    assert {"".join(log[i : i + 3]) for i in range(0, len(log), 3)} == {"abc", "acb", "bac", "bca", "cab", "cba"}


def test_a_contender_of_more_weight_is_called_more_often():
    found = run({n: [lambda: 10] for n in "abc"}, warm_up=0.0, seconds=0.6, least=1, weights={"b": 4})
    assert {name: len(samples.values) for name, samples in found.items()} == {"a": 10, "b": 40, "c": 10}
    found = run({n: [lambda: 100] for n in "abc"}, warm_up=0.0, seconds=0.6, least=1, weights={"b": 4})
    assert {name: len(samples.values) for name, samples in found.items()} == {"a": 1, "b": 4, "c": 1}


def test_input_sets_rotate():
    log = []
    calls = [logged(log, i, 10) for i in range(3)]
    run({"a": calls}, warm_up=0.05, seconds=0.05, least=2)
    assert log == [0, 1, 2, 0, 1, 0, 1, 2, 0, 1]


def test_a_slow_contender_takes_no_time_from_the_others():
    log = []
    contenders = {"slow": [logged(log, "s", 400)], "fast": [logged(log, "f", 10)]}
    found = run(contenders, warm_up=0.0, seconds=1.0, least=2)
    assert {name: len(samples.values) for name, samples in found.items()} == {"slow": 2, "fast": 50}
    assert "".join(sorted(log[:4])) == "ffss"  # in turn, as long as both run


def test_a_very_slow_contender_is_called_once():
    log = []
    found = run({"slow": [logged(log, "s", 1100)], "fast": [logged(log, "f", 10)]}, seconds=1.0, least=5)
    assert len(found["slow"].values) == 1


def test_a_rate_is_an_amount_over_the_time():
    rates = harness.Samples((1.0, 2.0), "99").rate(4e6)
    assert rates == harness.Samples((4.0, 2.0), "99")  # 4e6 in a millisecond are 4e9 in a second


def test_the_cpu_clock_counts_what_the_call_takes(monkeypatch):
    ticks = iter([1_000_000, 3_500_000])
    monkeypatch.setattr(harness.time, "perf_counter_ns", lambda: next(ticks))
    assert harness.CpuClock().milliseconds(lambda: None) == 2.5


def test_launches_are_part_of_the_cuda_clocks_time_and_not_of_the_devices(monkeypatch):
    device = FakeCuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    call = device.kernels(10, 0.1, 0.01)
    assert harness.CudaClock().milliseconds(call) == pytest.approx(1.01)
    assert harness.DeviceClock().milliseconds(call) == pytest.approx(0.1)


def test_sets_exceed_the_cache(monkeypatch):
    monkeypatch.setattr(harness, "cache_bytes", lambda device: 1000)
    assert harness.sets_beyond_cache(300) == 4
    assert harness.sets_beyond_cache(5000) == 2
    assert harness.sets_beyond_cache(1) == 64


def test_saved_bytes_counts_each_storage_once_and_parameters_not():
    x, w = torch.randn(8, 4), torch.randn(4, 4, requires_grad=True)
    assert harness.saved_bytes(lambda: ((x @ w).sin() * (x @ w).cos()).sum(), but=[w]) > 4 * x.nbytes
    assert harness.saved_bytes(lambda: (x @ w) + (x @ w), but=[w]) == x.nbytes
    assert harness.saved_bytes(lambda: x @ x.T) == 0


def test_rows_survive_their_file(tmp_path):
    report = harness.Report()
    samples = harness.Samples((1.0, 2.0, 4.0), "99")
    report.add("ours", "step", "8x16x8x8->16 /2", torch.bfloat16, "nchw", "time_ms", samples)
    report.add("eager, with a comma", "forward", "s", torch.float32, "nchw", "saved_bytes", 12.0)
    path = tmp_path / "a.csv"
    report.write_csv(path)
    assert harness.read_csv(path) == report.rows
    header, run, *rows = path.read_text().splitlines()
    assert header == "contender,mode,shape,dtype,layout,metric,p20,p50,p80,clock"
    assert json.loads(run.removeprefix("# ")) == report.environment
    assert len(rows) == 2
    first, second = report.rows
    assert (first.p20, first.p50, first.p80, first.clock) == (pytest.approx(1.4), 2.0, pytest.approx(3.2), "99")
    assert (second.p20, second.p50, second.p80, second.clock) == (12.0, 12.0, 12.0, "")


def test_every_row_is_in_the_file_as_soon_as_it_is_added(tmp_path):
    for run in range(2):  # a second process goes on where the first was killed
        report = harness.Report(path=tmp_path / "a.csv")
        for i in range(3):
            report.add("ours", f"{run} {i}", "s", "tf32", "nchw", "time_ms", float("nan"))
            assert [row.mode for row in harness.read_csv(report.path)][-1] == f"{run} {i}"
    assert len(harness.read_csv(report.path)) == 6
    assert {row.dtype for row in harness.read_csv(report.path)} == {"tf32"}


def test_a_gpus_clock_and_driver_are_asked_for_in_process(monkeypatch):
    class Library:
        def nvmlInit_v2(self):  # noqa: N802 - NVML's name
            return 0

        def nvmlSystemGetDriverVersion(self, text, size):  # noqa: N802
            text.value = b"580.1"
            return 0

        def nvmlDeviceGetHandleByUUID(self, uuid, handle):  # noqa: N802
            handle._obj.value = {b"GPU-12-34": 7}[uuid]
            return 0

        def nvmlDeviceGetClockInfo(self, handle, domain, found):  # noqa: N802
            found._obj.value = {(7, 1): 1980}[handle.value, domain]
            return 0

    monkeypatch.setattr(machine.ctypes, "CDLL", lambda _: Library())
    found = machine._Nvml("12-34")
    assert (found.driver, found.clock()) == ("580.1", "1980")

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(machine.ctypes, "CDLL", missing)
    found = machine._Nvml("12-34")
    assert (found.driver, found.clock()) == ("", "")


def test_a_file_of_other_columns_is_refused(tmp_path):
    path = tmp_path / "old.csv"
    path.write_text("contender,mode\nours,step\n")
    with pytest.raises(ValueError, match="must have the columns contender, mode"):
        harness.read_csv(path)


def test_the_clock_is_the_fastest_cores_or_unknown(monkeypatch, tmp_path):
    class Info:
        text = "cpu MHz\t\t: 2300.4\ncpu MHz\t\t: 3100.6\n"

        def __init__(self, _):
            pass

        def read_text(self):
            return self.text

    monkeypatch.setattr(machine, "Path", Info)
    assert machine.clock_mhz() == "3101"
    monkeypatch.setattr(Info, "text", "processor: 0\n")
    assert machine.clock_mhz() == ""
