"""Every test starts from the same random state, without the user's tuned times, and with float32 in full."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from acnet_kernels.steps import convolution

# As many processes run tests as there are cores: Inductor need not start more, each of which imports torch first.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# The interpreter, code generation, compilers, whole networks, others' blocks, several processes, builds, and many
# small cases of one thing: slow from end to end.
SLOW_FILES = {
    *("interpreter", "launch", "codegen", "nvcc", "build", "csrc_host"),
    *("compile", "direct_operators", "export", "tracers", "torch_compat", "imports", "hostile"),
    *("architectures", "networks", "observing", "contenders", "studies", "training", "data"),
    *("distributed", "torchrun", "bench", "cli", "docs", "gpu_suite"),
    *("adapters", "hostile_values", "cuda_waits", "instruction_sets"),
}
SLOW_NAMES = (
    *("opcheck", "compile", "inductor", "processes", "torchvision", "network_trains"),
    *("gradients_of_every_tensor", "differentiable_twice", "every_rectangle"),
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes seconds; run by `make test`, left out by `make quick`")


def is_slow(path: Path) -> bool:
    return path.stem.removeprefix("test_") in SLOW_FILES


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files that `make quick` leaves out are not even imported, which takes seconds in each process."""
    return True if config.option.markexpr == "not slow" and is_slow(collection_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests come first, the slowest before all: processes that share the rest out then end together."""
    for item in items:
        if is_slow(item.path) or any(name in item.name for name in SLOW_NAMES):
            item.add_marker("slow")
    slowest = {"test_interpreter", "test_hostile", "test_fuzz", "test_torchrun"}  # half a minute and more, each
    items.sort(key=lambda item: (item.path.stem not in slowest, item.get_closest_marker("slow") is None))


def pytest_collection_finish() -> None:
    """What imports and thousands of tests have made stays: the collector need not look through it every time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def native_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-precision convolutions by the library's own, as on a GPU or a CPU with AMX, wherever the tests run."""
    monkeypatch.setattr(convolution, "_SLOW_HALF_TYPES", frozenset())


@pytest.fixture
def slow_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-precision convolutions by float32 ones, as on a CPU without fast ones, wherever the tests run."""
    monkeypatch.setattr(convolution, "_SLOW_HALF_TYPES", frozenset((torch.bfloat16, torch.float16)))


@pytest.fixture(autouse=True)
def _without_tf32() -> Iterator[None]:
    """The bounds are float32's; CUDA's convolutions are TF32 by default. The old API alone: torch refuses a mix."""
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield
    for switch, was in zip(switches, before, strict=True):
        switch.allow_tf32 = was


@pytest.fixture(autouse=True, scope="session")
def _no_tuned_times(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["ACNET_KERNELS_CACHE"] = str(tmp_path_factory.mktemp("tuned"))
