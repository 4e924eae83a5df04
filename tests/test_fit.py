"""The fit of the cost model, and how well the planner chooses by it on the committed measurements."""

import dataclasses
import itertools
import json
import sys

import numpy as np
import pytest

from acnet_kernels.backends import cost, device_info, planner, timing_cache
from benchmarks import fit, harness

FILES = fit.csv_files([fit.RESULTS])


@pytest.fixture(scope="module")
def devices():
    """Device → (its kind, its cases), of the committed files."""
    return {device: (fit.kind_of(rows), fit.cases_of(rows)) for device, rows in fit.read(FILES).items()}


def test_there_are_measurements_in_both_dtypes_and_layouts(devices):
    for kind, cases in devices.values():
        assert kind in cost.prices()
        assert {(c.problem.dtype.itemsize, c.problem.channels_last) for c in cases} == {
            *itertools.product((2, 4), (0, 1))
        }
        assert all({"eager", "branches"} <= c.steps.keys() for c in cases)


def chosen(case, kind, measured):
    predicted = {name: cost.predict(case.problem, name, kind) for name in case.steps if name in cost.COUNTS}
    return planner.decide(case.problem, kind, planner.Times(predicted, measured))[0]


def test_the_models_choice_is_near_the_best(devices):
    for kind, cases in devices.values():
        regrets = [case.regret(chosen(case, kind, {})) for case in cases]
        assert np.mean(regrets) <= 0.05
        assert max(regrets) <= 0.15


def test_where_times_are_known_no_choice_is_slower_than_eager(devices):
    for device, (kind, cases) in devices.items():
        for case in cases:
            name = chosen(case, kind, cost.measured()[device][timing_cache.key(case.problem)])
            assert case.regret(name) <= 0.03
            assert case.loss(name) <= 0.03


def test_the_best_layout_of_auto_is_no_slower_than_the_best_of_eager(devices):
    for device, (kind, cases) in devices.items():
        times = {}
        for case in cases:
            name = chosen(case, kind, cost.measured()[device][timing_cache.key(case.problem)])
            auto, eager = times.setdefault((case.shape, case.problem.dtype), ([], []))
            auto.append(case.steps[name])
            eager.append(case.steps["eager"])
        assert all(min(auto) <= 1.03 * min(eager) for auto, eager in times.values())


def test_the_data_file_is_what_the_measurements_give(devices):
    """Rerun `python -m benchmarks.fit` where this fails."""
    fresh, kept = fit.fitted(FILES), json.loads(cost.PATH.read_text())
    assert fresh["measured"] == kept["measured"]
    assert fresh["kinds"].keys() == kept["kinds"].keys()
    for kind, entry in fresh["kinds"].items():
        assert {**entry, "milliseconds": 0} == {**kept["kinds"][kind], "milliseconds": 0}
    for kind, cases in devices.values():
        for case in cases:
            assert case.predicted(fresh["kinds"][kind]["milliseconds"], kind) == pytest.approx(
                case.predicted(kept["kinds"][kind]["milliseconds"], kind), rel=1e-2
            )


# --- the solver -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_non_negative_least_squares_is_the_best_of_all_supports(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.random((12, 5)), rng.standard_normal(12) + 0.3
    best = np.linalg.norm(b)
    for size in range(1, 6):
        for support in itertools.combinations(range(5), size):
            x = np.linalg.lstsq(a[:, support], b, rcond=None)[0]
            if (x >= 0).all():
                best = min(best, np.linalg.norm(a[:, support] @ x - b))
    found = fit.non_negative_least_squares(a, b)
    assert (found >= 0).all()
    assert np.linalg.norm(a @ found - b) == pytest.approx(best, rel=1e-9)


def test_columns_that_say_the_same_do_not_stop_it():
    a = np.random.default_rng(0).random((9, 3))
    a = np.concatenate([a, a, 2 * a], 1)
    x = fit.non_negative_least_squares(a, a @ np.arange(9.0))
    np.testing.assert_allclose(a @ x, a @ np.arange(9.0))


# --- synthetic measurements -------------------------------------------------------------------------------

TEMPLATE = harness.read_csv(FILES[0])[0]
SHAPES = [
    *("8x16x9x9->16", "4x3x32x32->8", "2x64x7x7->64", "1x32x40x20->64 /2", "4x32x8x8->32 g32"),
    *("2x8x20x20->24 k5", "4x64x14x14->64 g8", "2x16x33x17->16", "16x32x5x5->32", "1x128x6x6->128"),
]


def rows_of(price, dtypes=("float32", "bfloat16"), **changes):
    """Rows whose times a function of (group, feature) prices exactly, and those of a backend that declines."""
    found = []
    for shape, dtype, layout, backend, mode in itertools.product(
        SHAPES, dtypes, ("nchw", "channels_last"), ("eager", "branches", "moments"), ("step", "forward")
    ):
        problem = fit.problem_of(shape, dtype, layout, "cpu")
        phases = cost.PHASES if mode == "step" else (cost.FORWARD,)
        work = cost.counts(problem, backend, device_info.CPU, phases)
        ms = sum(price(group, feature) * n for group, fs in work.items() for feature, n in fs.items())
        if planner.BACKENDS[backend].declines(problem):
            ms = 1e-6  # what ran under its name is not to be believed
        row = dataclasses.replace(TEMPLATE, contender=backend, mode=mode, shape=shape, dtype=dtype, layout=layout,
                                  metric="time_ms", p50=ms, cudnn="", device="synthetic")  # fmt: skip
        found.append(dataclasses.replace(row, **changes))
    return found


def price(group, feature):
    half = 3 if group.startswith("convolution") and "bfloat16" in group else 1
    return half * {"gflop": 5.0, "gbytes": 90.0, "calls": 0.1, "outputs": 20.0, "shifts": 9.0}.get(feature, 0.0)


def test_exact_measurements_are_predicted_exactly():
    rows = rows_of(price)
    assert fit.kind_of(rows) == device_info.CPU
    cases = fit.cases_of(rows)
    assert len(cases) == len(SHAPES) * 4
    prices = fit.fit(cases, device_info.CPU)
    for case in cases:
        assert case.predicted(prices, device_info.CPU) == pytest.approx(case.steps, rel=1e-3)


def test_a_machine_with_fast_half_precision_is_told_by_its_times():
    rows = rows_of(lambda group, feature: price(group, feature) * (0.2 if "bfloat16" in group else 1))
    assert fit.kind_of(rows) == device_info.FAST_HALF_CPU
    assert fit.kind_of(rows_of(price, dtypes=("float32",))) == device_info.CPU
    assert fit.kind_of(rows_of(price, cudnn="91002")) == device_info.CUDA


def test_a_backend_that_is_never_faster_has_no_margin():
    cases = fit.cases_of(rows_of(lambda group, feature: price(group, feature) * (50 if "moments" in group else 1)))
    unseen = dict.fromkeys(SHAPES, fit.fit(cases, device_info.CPU))
    assert fit.best_margins(cases, unseen, device_info.CPU).keys() == {"branches"}


def test_the_command(tmp_path, monkeypatch, capsys):
    report = harness.Report()
    report.rows = rows_of(price)
    (tmp_path / "a").mkdir()
    report.write_csv(tmp_path / "a" / "block-float32.csv")
    out = tmp_path / "cost.json"
    monkeypatch.setattr(sys, "argv", ["fit", "--results", str(tmp_path), "--write", str(out)])
    fit.main()
    content = json.loads(out.read_text())
    assert content["kinds"].keys() == cost.prices().keys()
    assert len(content["measured"]["synthetic"]) == len(SHAPES) * 4
    printed = capsys.readouterr().out
    assert "with measured times: regret 0.0% on average" in printed
    assert "float32 nchw 4x32x8x8->32 k3 g32" in printed
    monkeypatch.setattr(sys, "argv", ["fit", "--results", str(tmp_path / "b")])
    with pytest.raises(SystemExit):
        fit.main()
    assert "--results must hold block-*.csv files" in capsys.readouterr().err
