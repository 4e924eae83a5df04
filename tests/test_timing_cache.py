"""Tuned times on disk: what is kept, what is refused, and what happens to it when several processes write."""

import errno
import json
import os
import pwd
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import acnet_kernels
from acnet_kernels import ACBlock
from acnet_kernels.backends import planner, timer, timing_cache
from acnet_kernels.backends.device_info import Machine, this_machine

MACHINE = Machine("cpu", "a processor, 2 threads")
OTHER = Machine("cpu", "a processor, 4 threads")
TIMES = {"step float32 nchw 1x2x3x4->5 k3": {"eager": 1.5, "branches": 0.5}}


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("ACNET_KERNELS_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr(timing_cache, "_known", {})
    return tmp_path / "own"


def problem(*shape, **options):
    options = {"kernel_size": 3, "padding": 1, **options}
    return ACBlock(shape[1], 8, **options).plan(torch.empty(shape, device="meta"))[0]


# --- keys -------------------------------------------------------------------------------------------------


def test_a_key_says_all_that_times_depend_on():
    p = problem(2, 4, 9, 8)
    assert timing_cache.key(p) == "step float32 nchw 2x4x9x8->8 k3"
    distinct = [
        p,
        replace(p, grad=False),
        replace(p, dtype=torch.bfloat16),
        replace(p, channels_last=True),
        *(problem(*s) for s in ((3, 4, 9, 8), (2, 8, 9, 8), (2, 4, 8, 8), (2, 4, 9, 9))),
        replace(p, out_channels=4),
        problem(2, 4, 9, 8, kernel_size=5),
        *(problem(2, 4, 9, 8, **{name: 2}) for name in ("stride", "padding", "dilation", "groups")),
        *(problem(2, 4, 9, 8, stride=s) for s in ((1, 2), (2, 1))),
        *(problem(2, 4, 9, 8, shift=s) for s in ((1, 0), (0, 1), (0, -1))),
        problem(2, 4, 9, 8, padding_mode="circular"),
        problem(2, 4, 9, 8, branches=("square", "hor")),
        problem(2, 4, 9, 8, norm="sum"),
    ]
    assert len({timing_cache.key(q) for q in distinct}) == len(distinct)
    assert timing_cache.key(replace(p, input_dtype=torch.bfloat16)) == timing_cache.key(p)


# --- the file ---------------------------------------------------------------------------------------------


def test_what_is_stored_is_found_by_the_next_process(monkeypatch):
    p = problem(2, 4, 9, 8)
    assert timing_cache.lookup(p, MACHINE) is None
    path = timing_cache.store(MACHINE, {timing_cache.key(p): {"eager": 2.0, "branches": 1.0}})
    assert timing_cache.lookup(p, MACHINE) is None  # this process has read it already
    monkeypatch.setattr(timing_cache, "_known", {})
    assert timing_cache.lookup(p, MACHINE) == ({"eager": 2.0, "branches": 1.0}, timing_cache.TUNED)
    assert timing_cache.lookup(p, OTHER) is None
    assert [f.name for f in path.parent.iterdir() if f.suffix != ".lock"] == [path.name]


def test_the_file_is_read_once(monkeypatch):
    reads = []
    monkeypatch.setattr(timing_cache, "load", lambda machine: reads.append(machine) or {})
    for _ in range(3):
        timing_cache.lookup(problem(2, 4, 9, 8), MACHINE)
    assert reads == [MACHINE]


def test_the_newest_times_count_on_their_machine_alone():
    p = problem(2, 4, 9, 8)
    timing_cache.store(MACHINE, {timing_cache.key(p): {"eager": 3.0}})
    assert timing_cache.lookup(p, MACHINE) == ({"eager": 3.0}, timing_cache.TUNED)
    timing_cache.remember(p, MACHINE, {"eager": 4.0}, timing_cache.FIRST_SIGHT)
    assert timing_cache.lookup(p, MACHINE) == ({"eager": 4.0}, timing_cache.FIRST_SIGHT)
    assert timing_cache.lookup(p, OTHER) is None


def test_where_the_file_lies(monkeypatch, folder, tmp_path):
    assert timing_cache.cache_path(MACHINE).parent == folder
    monkeypatch.delenv("ACNET_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert timing_cache.cache_dir() == tmp_path / "xdg" / "acnet_kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert timing_cache.cache_dir() == tmp_path / ".cache" / "acnet_kernels"


@pytest.fixture
def homeless(monkeypatch):
    """A user without HOME and without an entry in the password file, as containers run them."""
    for name in ("ACNET_KERNELS_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def none(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", none)
    planner._decided.cache_clear()
    yield
    planner._decided.cache_clear()


@pytest.mark.usefixtures("homeless")
def test_without_a_home_there_is_no_cache_and_every_step_runs(recwarn):
    block, x = ACBlock(4, 8, 3, padding=1), torch.randn(2, 4, 9, 8)
    for _ in range(2):
        block(x).sum().backward()
    block.eval()(x)
    acnet_kernels.explain(block.train(), x)
    assert not recwarn
    with pytest.raises(FileNotFoundError, match=r"home directory. Set ACNET_KERNELS_CACHE"):
        timing_cache.cache_dir()


@pytest.mark.usefixtures("homeless")
def test_without_a_home_tuned_times_are_kept_in_this_process_with_one_warning(monkeypatch):
    monkeypatch.setattr(timer, "measure", lambda problem, backends, autocast: {"eager": 1.0, "branches": 9.0})
    block = ACBlock(4, 8, 3, padding=1)
    with pytest.warns(UserWarning, match="tuned times cannot be kept: .* Set ACNET_KERNELS_CACHE") as warned:
        report = acnet_kernels.tune(block, (2, 4, 9, 8))
    assert len(warned) == 1
    assert report.path is None
    assert acnet_kernels.explain(block, (2, 4, 9, 8)).blocks[0].measured["branches"] == 9.0


def test_a_damaged_file_is_warned_of_once_and_every_step_runs():
    path = timing_cache.cache_path(this_machine("cpu"))
    path.parent.mkdir()
    path.write_text("[" * 100_000)
    block, x = ACBlock(4, 8, 3, padding=1), torch.randn(2, 4, 9, 8)
    planner._decided.cache_clear()
    with pytest.warns(UserWarning, match="ignoring the tuned times"):
        block(x).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block(x[:, :, :7]).sum().backward()
    planner._decided.cache_clear()


@pytest.mark.parametrize("versioned", ["torch", "triton", "package"])
def test_other_versions_have_a_file_of_their_own(monkeypatch, versioned):
    before = timing_cache.cache_path(MACHINE)
    timing_cache.store(MACHINE, TIMES)
    if versioned == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9.9")
    elif versioned == "triton":
        monkeypatch.setattr(timing_cache.metadata, "version", lambda name: "9.9.9")
    else:
        monkeypatch.setattr(acnet_kernels, "__version__", "9.9.9")
    assert timing_cache.cache_path(MACHINE) != before
    assert timing_cache.load(MACHINE) == {}


CONTENT = {"format": timing_cache.FORMAT, "identity": timing_cache.identity(MACHINE), "milliseconds": TIMES}


def test_a_sound_file_is_taken(recwarn):
    path = timing_cache.cache_path(MACHINE)
    path.parent.mkdir()
    path.write_text(json.dumps(CONTENT))
    assert timing_cache.load(MACHINE) == TIMES
    assert not recwarn


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "Expecting value"),
        (json.dumps(CONTENT)[:-9], "line 1 column"),
        ("[1, 2]", "format 1"),
        (json.dumps(CONTENT | {"format": 2}), "format 1"),
        (json.dumps(CONTENT | {"identity": CONTENT["identity"] | {"torch": "1.0"}}), "it is of .*'torch': '1.0'"),
        (json.dumps(CONTENT | {"identity": timing_cache.identity(OTHER)}), "it is of .*4 threads"),
        (json.dumps({"format": 1, "identity": CONTENT["identity"]}), "not finite positive numbers"),
        *(
            (json.dumps(CONTENT | {"milliseconds": {"step": row}}), "not finite positive numbers")
            for row in ({"eager": -1.0}, {"eager": "1.0"}, {"eager": None}, {}, [1.0], {"eager": float("nan")})
        ),
        *(
            (
                json.dumps(CONTENT | {"milliseconds": {"step": {"eager": 7.0, "branches": "BAD"}}}).replace(
                    '"BAD"', ms
                ),
                why,
            )
            for ms, why in (
                ("Infinity", "not finite positive numbers"),
                ("1e400", "not finite positive numbers"),
                ("0.0", "not finite positive numbers"),
                ("-0.5", "not finite positive numbers"),
                ("[" * 100_000, "recursion"),
                ('{"a": ' * 100_000, "recursion"),
            )
        ),
    ],
)
def test_a_damaged_or_foreign_file_is_ignored_and_named_and_written_over(text, why):
    path = timing_cache.cache_path(MACHINE)
    path.parent.mkdir()
    path.write_text(text)
    with pytest.warns(UserWarning, match=f"ignoring the tuned times in {path}: .*{why}"):
        assert timing_cache.lookup(problem(2, 4, 9, 8), MACHINE) is None
    with pytest.warns(UserWarning, match="ignoring the tuned times"):
        timing_cache.store(MACHINE, TIMES)
    assert timing_cache.load(MACHINE) == TIMES


def test_bytes_that_are_no_text_are_ignored_too():
    path = timing_cache.cache_path(MACHINE)
    path.parent.mkdir()
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match="ignoring the tuned times"):
        assert timing_cache.load(MACHINE) == {}


# --- writing ----------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(monkeypatch, folder):
    timing_cache.store(MACHINE, TIMES)
    before = sorted(folder.iterdir())

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "the disk is full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=f"disk is full: '{timing_cache.cache_path(MACHINE)}'"):
        timing_cache.store(MACHINE, {"another": {"eager": 1.0}})
    assert sorted(folder.iterdir()) == before
    assert timing_cache.load(MACHINE) == TIMES


def test_the_file_changes_at_once(monkeypatch):
    timing_cache.store(MACHINE, TIMES)
    path, replaced = timing_cache.cache_path(MACHINE), []
    put = os.replace

    def look(source, target):
        assert json.loads(path.read_text())["milliseconds"] == TIMES  # until this very moment
        assert "another" in json.loads(Path(source).read_text())["milliseconds"]
        replaced.append(target)
        put(source, target)

    monkeypatch.setattr(os, "replace", look)
    timing_cache.store(MACHINE, {"another": {"eager": 1.0}})
    assert replaced == [path]
    assert timing_cache.load(MACHINE) == TIMES | {"another": {"eager": 1.0}}


def test_who_stores_at_the_same_time_loses_nothing(monkeypatch):
    pytest.importorskip("fcntl", reason="without flock two writers at once may lose the one's times")
    load = timing_cache.load

    def slowly(machine):
        found = load(machine)
        time.sleep(0.01)  # all would have read the same file by now
        return found

    monkeypatch.setattr(timing_cache, "load", slowly)
    threads = [
        threading.Thread(target=timing_cache.store, args=(MACHINE, {f"step {i}": {"eager": 1.0 + i}}))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert load(MACHINE) == {f"step {i}": {"eager": 1.0 + i} for i in range(8)}
