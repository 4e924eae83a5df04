"""`python -m acnet_kernels bench`: its options, its files, and the report made of them."""

import csv
import dataclasses
import re
import shutil
import sys

import pytest
import torch

from acnet_kernels import bench, cli
from benchmarks import (
    analysis,
    codegen,
    fusion,
    harness,
    host,
    host_cuda,
    keep,
    libraries,
    memory,
    network,
    overview,
    report,
)
from benchmarks.harness import Row

TINY = ["--quick", "--seconds", "0.01", "--dtype", "float32"]


def run(capsys, *argv):
    """(exit code, stdout, stderr) of the command."""
    try:
        code = cli.main(["bench", *map(str, argv)])
    except SystemExit as exit:
        code = exit.code
    return (code, *capsys.readouterr())


@pytest.fixture
def _small_networks(monkeypatch):
    monkeypatch.setattr(network, "NETWORKS", {"resnet8": network.Network("resnet8", 8, 2, 2)})
    monkeypatch.setattr(memory, "NETWORKS", network.NETWORKS)
    monkeypatch.setattr(fusion, "NETWORKS", {"resnet8": [(2, 3), (3, 2)]})
    monkeypatch.setattr(memory, "isolated", lambda function, *args: function(*args))
    monkeypatch.setattr(harness, "cache_bytes", lambda device: 2**16)
    monkeypatch.setattr(host, "CALLS", 4)
    monkeypatch.setattr(host_cuda, "rows", lambda seconds: [])  # tests/triton runs it


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.usefixtures("_small_networks")
def test_all_parts_write_their_rows_and_a_report(tmp_path, capsys):
    shapes = ["2x4x5x5->4", "2x4x6x5->8 /2 g2"]
    options = [*TINY, "--shapes", *shapes, "--networks", "resnet8", "--out", tmp_path]
    code, printed, errors = run(capsys, "all", *options)
    assert (code, errors) == (0, "")
    names = ["block-float32", "fusion", "host", "memory-float32", "network-float32", "phases-float32"]
    assert sorted(path.stem for path in tmp_path.glob("*.csv")) == names
    block = harness.read_csv(tmp_path / "block-float32.csv")
    assert {row.shape for row in block} == set(shapes)
    for mode in ("forward", "step"):
        timed = {(r.contender, r.layout) for r in block if (r.mode, r.metric) == (mode, "time_ms")}
        assert timed >= {(n, y) for n in ("eager", "branches", "auto") for y in ("nchw", "channels_last")}
        assert {"3k", "checkpoint", "conv+bn"} <= {name for name, _ in timed}
    assert {r.metric for r in block} == {"time_ms", "useful_gflop_per_s", "useful_gb_per_s", "saved_bytes"}
    flops, moved = (
        next(r for r in block if (r.contender, r.mode, r.metric, r.shape) == ("auto", "step", metric, shapes[0]))
        for metric in ("useful_gflop_per_s", "useful_gb_per_s")
    )
    assert flops.p50 / moved.p50 == pytest.approx(45 * 2 * (2 * 25) * 4 * 4 / (5 * 2 * 4 * 25 * 4), rel=1e-2)
    phases = harness.read_csv(tmp_path / "phases-float32.csv")
    assert {r.metric for r in phases if r.contender in ("copy", "gemm")} == {"gb_per_s", "gflop_per_s"}
    timed = {r.contender for r in harness.read_csv(tmp_path / "network-float32.csv")}
    assert timed == {"plain", "eager", "auto", "memory_saver"}
    assert all(row.command.startswith("python ") and row.date for row in block)
    html, markdown = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    for text in (html, markdown):
        assert all(
            f in text for f in ("Where we lose", "2x4x6x5", "One block", "Whole networks", "Memory", "Folding")
        )
    assert html.count("data:image/png;base64,") == 4
    assert "src=" not in html.replace('src="data:', "")
    assert all((tmp_path / f"{name}.png").exists() for name in ("speedup-float32", "roofline-float32", "memory"))
    assert "report.html" in printed
    # The same directory is its own baseline when nothing is measured anew.
    assert run(capsys, "report", "--out", tmp_path, "--baseline", tmp_path)[0] == 0
    assert "**0 of " in (tmp_path / "report.md").read_text()


def test_a_librarys_network_is_measured_before_and_after(tmp_path, capsys, monkeypatch):
    pytest.importorskip("timm", reason="its network is measured: extra `test`")
    monkeypatch.setattr(libraries, "image_size", lambda name: 32)
    options = [*TINY, "--networks", "timm:repghostnet_050", "--contenders", "eager", "auto", "--out", tmp_path]
    code, printed, errors = run(capsys, "network", *options)
    assert (code, errors) == (0, "")
    assert "eager: the library's own; auto" in printed
    assert re.search(
        r"repghostnet_050 float32: eager [\d.]+, auto [\d.]+ ms a step; auto is [\d.]+ times as fast as", printed
    )
    assert [path.stem for path in tmp_path.glob("*.csv")] == ["accelerated-float32"]
    rows = harness.read_csv(tmp_path / "accelerated-float32.csv")
    measured = [(name, metric) for metric in ("saved_bytes", "time_ms") for name in ("auto", "eager")]
    assert sorted((row.contender, row.metric) for row in rows) == sorted(measured)
    assert {row.shape for row in rows} == {"timm:repghostnet_050 4x3x32x32"}
    assert "Networks of other libraries" in (tmp_path / "report.md").read_text()


def test_networks_of_transformers_give_logits():
    pytest.importorskip("transformers", reason="its networks are built: extra `test`")
    for name in ("textnet", "pp_lcnet_v3"):
        found = libraries.parse(f"transformers:{name}")
        libraries.check(found)
        assert libraries.build(found, 10)(torch.randn(2, 3, 64, 64)).shape == (2, 10)


def test_contenders_and_dtype_are_chosen(tmp_path, capsys):
    shape = ["--shapes", "1x2x3x3->2"]
    assert (
        run(
            capsys,
            "block",
            *TINY[:3],
            *shape,
            "--dtype",
            "bfloat16",
            "--contenders",
            "auto",
            "3k",
            "--out",
            tmp_path,
        )[0]
        == 0
    )
    rows = harness.read_csv(tmp_path / "block-bfloat16.csv")
    assert ({row.contender for row in rows}, {row.dtype for row in rows}) == ({"auto", "3k"}, {"bfloat16"})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("blocks", "argument PART: invalid choice: 'blocks'"),
        ("block --shapes resnet57", "--shapes must be 'targets', a part of a name"),
        ("block --shapes 1x2->3", "--shape must be like '8x64x56x56->64 k5 /2 g32 d2', got '1x2->3'"),
        ("network --networks resnet9", "--networks must be of resnet56"),
        ("network --networks timm:resnet9", "--networks: timm has no 'resnet9'"),
        ("block --contenders fast", "--contenders must be of eager"),
        ("block --dtype float64", "argument --dtype: invalid choice: 'float64'"),
        ("block --seconds 0", "argument --seconds: must be a float above 0"),
        ("block --device gpu", "--device gpu cannot be used here"),
        ("report --out /dev/null", "--out /dev/null cannot be a directory"),
    ],
)
def test_a_wrong_argument_gets_one_sentence(tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    code, printed, errors = run(capsys, *arguments.split())
    assert (code, printed) == (2, "")
    assert said in errors
    assert errors.count("\n") == 1


def test_an_installed_wheel_says_where_the_benchmarks_are(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    code, printed, errors = run(capsys, "block")
    assert (code, printed) == (2, "")
    assert "the benchmarks live in the repository" in errors
    assert errors.count("\n") == 1


def test_codegen_writes_the_compilers_table(tmp_path, capsys, monkeypatch):
    found = codegen.Report("conv", 90, "bf16", "half", "64×64×32 w4 s3", "", 168, 0, 57000, 8, 4, 3)
    asked = []
    monkeypatch.setattr(
        codegen, "compile_all", lambda cases, jobs: asked.append((cases, jobs)) or [found for _ in cases]
    )
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # only a report's figures need it
    options = ["--arch", "90", "--kernel", "merge_grad", "--variation", "", "--jobs", "1", "--out", tmp_path]
    code, printed, _ = run(capsys, "codegen", *options)
    assert code == 0
    assert [(c.kernel, c.arch, c.variation) for c in asked[0][0]] == [("merge_grad", 90, "")]
    assert asked[0][1] == 1
    assert len(rows_of(next(tmp_path.glob("codegen-triton-*.csv")))) == 1
    assert "64×64×32 w4 s3" in printed
    assert not list(tmp_path.glob("report*"))
    found = dataclasses.replace(found, stack=8)
    code, printed, errors = run(capsys, "codegen", *options)
    assert code != 0
    assert "FAULT" in printed
    assert "1 of 1 compilations have a fault" in errors
    assert len(rows_of(next(tmp_path.glob("codegen-triton-*.csv")))) == 1


MACHINE = Row(
    "",
    "step",
    "",
    "float32",
    "nchw",
    "time_ms",
    0,
    0,
    0,
    "a machine",
    "2.14",
    "3.8",
    "",
    "",
    "",
    "python x",
    "today",
)


def row(contender, p50, shape="8x8x8x8->8", spread=0.01, **changes):
    times = {"p20": p50 * (1 - spread), "p50": p50, "p80": p50 * (1 + spread)}
    return dataclasses.replace(MACHINE, contender=contender, shape=shape, **times, **changes)


def phase(contender, name, time, shape="8x8x8x8->8"):
    values = {"time_ms": time, "gflop": 0.1 if "convolution" in name else 0.0, "gbyte": 0.01}
    return [row(contender, value, shape, 0, mode=name, metric=metric) for metric, value in values.items()]


TOPS = {"gemm": 100.0, "copy": 20.0}
BRANCHES = [
    *phase("auto", "convolution backward", 6.0),
    *phase("auto", "convolution forward", 3.0),
    *phase("auto", "bn_sum_forward", 1.0),
]


def test_the_better_layout_counts():
    found = analysis.steps(
        [row("eager", 10), row("eager", 8, layout="channels_last"), row("eager", 1, mode="forward")]
    )
    assert found["8x8x8x8->8"]["eager"].layout == "channels_last"


@pytest.mark.parametrize(
    ("ours", "made_of", "reason"),
    [
        (10.2, BRANCHES, None),
        (11.0, BRANCHES, "the library's convolutions are 90% of the step"),
        (11.0, [*BRANCHES, *phase("auto", "cross_correlation", 10.0)], "cross_correlation takes 50% of the step"),
        (
            11.0,
            [*BRANCHES, *phase("auto", "batch norm forward", 1)],
            "the planner takes eager here: the same operators",
        ),
        (11.0, phase("auto", "convolution forward", 4.0), "the library's convolutions are 100% of the step"),
        (11.0, phase("auto", "bn_sum_forward", 4.0), "calls are the cost of so short a step"),
        (11.0, [], "the step's phases were not measured"),
    ],
)
def test_a_loss_has_its_reason(ours, made_of, reason):
    found = analysis.steps([row("eager", 10), row("auto", ours)])
    lost = analysis.losses(found, analysis.phases(made_of), TOPS, ("eager",))
    if reason is None:
        assert lost == []
        return
    (loss,) = lost
    assert (loss.times, loss.certain) == (pytest.approx(1.1), True)
    assert loss.reason.startswith(reason)


def test_a_loss_within_the_spread_is_not_certain():
    found = analysis.steps([row("eager", 10, spread=0.1), row("auto", 10.5, spread=0.1)])
    assert [loss.certain for loss in analysis.losses(found, {}, {}, ("eager",))] == [False]


def written(directory, name, rows):
    directory.mkdir(exist_ok=True)
    table = harness.Report()
    table.rows = rows
    table.write_csv(directory / f"{name}.csv")


def test_the_first_paragraph_says_where_we_lose_and_why(tmp_path):
    other = "4x4x4x4->4 k5 /2"
    rows = [row("eager", 10), row("auto", 12), row("compile", 9), row("moments", 30), row("conv+bn", 5)]
    rows += [
        row("eager", 10, other),
        row("auto", 5, other),
        row("3k", 20, other),
        row("an & unheard <of>", 7, other),
    ]
    rows.append(row("recompute", 12))
    rows += [
        row(name, size, mode="forward", metric="saved_bytes") for name, size in (("eager", 80), ("recompute", 20))
    ]
    written(tmp_path, "block-float32", rows)
    ceilings = [
        row("copy", 20, "", mode="ceiling", metric="gb_per_s"),
        row("gemm", 200, "", mode="ceiling", metric="gflop_per_s"),
    ]
    written(tmp_path, "phases-float32", [*ceilings, *BRANCHES, *phase("moments", "cross_correlation", 9.0)])
    written(tmp_path, "network-float32", [row("eager", 10, "resnet8"), row("auto", 15, "resnet8")])
    written(
        tmp_path,
        "memory-float32",
        [
            row(name, size, "resnet8", metric=metric)
            for metric in ("saved_bytes", "peak_bytes", "largest_batch")
            for name, size in (("eager", 100), ("auto", 170), ("recompute", 60))
        ],
    )
    report.write(tmp_path, report.Results())
    first = (tmp_path / "report.md").read_text().split("\n\n")[1]
    assert first.startswith("**Where we lose.**")
    library = "the library's convolutions are 90% of the step"
    assert f"3% behind eager's better layout on 1 of 2 shapes: 8x8x8x8->8 1.20×: {library}." in first
    assert f"the faster of torch.compile and the 3K trick on 1 of 2 shapes: 8x8x8x8->8 1.33×: {library}." in first
    assert "`moments` alone takes 3.0 times eager's step at the median" in first
    assert "cross_correlation takes 100% of the step" in first
    assert "Plain conv+BN, the bound, takes 0.42–0.42 of `auto`" in first
    assert "resnet8 in float32 takes 1.50 times eager's step." in first
    assert "In float32 `auto` keeps more for backward than eager (resnet8 1.70×)" in first
    markdown = (tmp_path / "report.md").read_text()
    assert "| resnet8 | float32 | recompute " in markdown
    assert "`recompute` keeps 0.25 and takes 1.20 (1 shapes)" in markdown
    html = (tmp_path / "report.html").read_text()
    assert "<b>Where we lose.</b>" in html
    assert "<code>auto</code>" in html
    assert "-&gt;8" in html


@pytest.mark.usefixtures("_small_networks")
def test_a_compiled_networks_memory_is_what_its_graph_keeps(monkeypatch, tmp_path, capsys):
    compile_as, compiled = torch.nn.Module.compile, []

    def traced(module, mode):  # quicker than inductor, and its graph keeps tensors by the same kind of node
        compiled.append(mode)
        compile_as(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    # Of few layers: it is compiled for two batches.
    monkeypatch.setitem(network.NETWORKS, "cifar-quick", network.Network("cifar-quick", 8, 2, 2))
    options = [*TINY, "--networks", "cifar-quick", "--contenders", "eager", "compile", "--out", tmp_path]
    assert run(capsys, "memory", *options)[0] == 0
    assert compiled == ["default"]
    rows = {(row.contender, row.metric): row.p50 for row in harness.read_csv(tmp_path / "memory-float32.csv")}
    assert set(rows) == {("eager", "peak_bytes")} | {
        (name, metric) for name in ("eager", "compile") for metric in ("saved_bytes", "largest_batch")
    }
    assert 0.3 < rows["compile", "saved_bytes"] / rows["eager", "saved_bytes"] < 1.5
    report.write(tmp_path, report.Results())
    assert "| – " in (tmp_path / "report.md").read_text()


def test_a_step_that_became_slower_is_told_from_a_slower_machine(tmp_path):
    shapes = ("1x1x1x1->1", "2x2x2x2->2", "3x3x3x3->3")
    before = [r for s in shapes for r in (row("eager", 10, s), row("auto", 8, s))]
    now = [
        r for s, t in zip(shapes, (8, 9, 8.2), strict=True) for r in (row("eager", 20, s), row("auto", 2 * t, s))
    ]
    written(tmp_path / "old", "block-float32", before)
    written(tmp_path / "new", "block-float32", now)
    found = analysis.changes({"float32": analysis.steps(before)}, {"float32": analysis.steps(now)})
    assert {change.shape: change.worse for change in found} == dict(zip(shapes, (False, True, False), strict=True))
    assert found[0].shape == "2x2x2x2->2"
    report.write(tmp_path / "new", report.read(tmp_path / "old"))
    text = (tmp_path / "new" / "report.md").read_text()
    assert "**1 of 3 steps of ours are slower**" in text
    assert "+12%" in text
    shutil.rmtree(tmp_path / "old")
    report.write(tmp_path / "new", report.read(tmp_path / "old"))
    assert "baseline" not in (tmp_path / "new" / "report.md").read_text()


def a_run(directory):
    """A directory as a run leaves it, of two layouts, two networks and a figure."""
    other = {"layout": "channels_last"}
    rows = [row("eager", 10), row("eager", 8, **other), row("auto", 5.1234567, **other), row("auto", 6)]
    rows += [row(name, size, mode="forward", metric="saved_bytes") for name, size in (("eager", 80), ("auto", 60))]
    rows += [row("auto", 3, mode="backward"), row("auto", 7, metric="useful_gflop_per_s")]
    written(directory, "block-float32", rows)
    written(directory, "phases-float32", BRANCHES)
    steps = [row("eager", 10, "resnet8 2x3x8x8"), row("auto", 8, "resnet8 2x3x8x8")]
    written(directory, "network-bfloat16", steps)
    written(directory, "accelerated-float32", [row("eager", 6, "timm:a_net 4x3"), row("auto", 5, "timm:a_net 4x3")])
    kept = [row(n, size, "resnet8 2x3x8x8", metric="saved_bytes") for n, size in (("eager", 9), ("auto", 6))]
    written(directory, "memory-float32", kept)
    (directory / "report.md").write_text("# A report\n\n![speedup](speedup.png)\n\nText.\n")
    (directory / "speedup.png").write_bytes(b"x")
    return directory


def test_what_is_kept_of_a_run(tmp_path):
    source, target = a_run(tmp_path / "run"), tmp_path / "results" / "machine"
    names = {path.name for path in keep.keep(source, target)}
    assert names == {path.name for path in source.iterdir()} - {"speedup.png", "phases-float32.csv"}
    kept = {(r.contender, r.mode): r for r in harness.read_csv(target / "block-float32.csv")}
    assert {key: r.p50 for key, r in kept.items()} == {
        ("eager", "step"): 8.0,
        ("auto", "step"): 5.1235,
        ("eager", "forward"): 80.0,
        ("auto", "forward"): 60.0,
    }
    assert kept["auto", "step"].device == "a machine"
    assert "![" not in (target / "report.md").read_text()
    before, now = (analysis.steps(harness.read_csv(d / "network-bfloat16.csv")) for d in (source, target))
    assert before == now
    assert report.losing(report.read(target)).startswith("**Where we lose.**")


def test_the_readmes_chart_and_table_come_from_what_is_kept(tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    page.write_text(f"# A\n{overview.BEGIN}\nold\n{overview.END}\nrest\n")
    directories = [str(a_run(tmp_path / "run")), str(tmp_path / "none")]
    for number in (1, 2):
        arguments = [*directories, "--chart", str(tmp_path / f"{number}.svg"), "--page", str(page)]
        monkeypatch.setattr(sys, "argv", ["overview", *arguments])
        overview.main()
    assert (tmp_path / "1.svg").read_bytes() == (tmp_path / "2.svg").read_bytes()
    text = page.read_text()
    assert "old" not in text
    assert text.endswith(f"{overview.END}\nrest\n")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert lines == [
        ["training step of", "float32", "bfloat16"],
        ["-" * len(cell) for cell in lines[1]],
        ["ACNet blocks of 1 layers, median (all)", "1.56 (1.56–1.56)", ""],
        ["resnet8", "", "1.25"],
        ["a_net", "1.20", ""],
    ]
    assert "Measured: blocks, ACNets, other libraries' networks: a machine, today." in text
    with pytest.raises(ValueError, match="must have the lines"):
        overview.written("nothing", "")


def test_the_help_names_every_part(capsys):
    code, printed, _ = run(capsys, "--help")
    assert code == 0
    assert all(part in printed for part in bench.PARTS)
