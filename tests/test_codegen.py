"""What the compiler makes of the kernels, without a GPU: a representative of every kernel, dtype and architecture.

benchmarks/codegen.py compiles every configuration, and fails where one has a fault.
"""

import itertools
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="Triton is not installed: it has no build for this platform")

from acnet_kernels.kernels import configs
from benchmarks import codegen


def representatives() -> list[codegen.Case]:
    """The largest tile of each convolution kernel, spread over architectures and modes; the other kernels once."""
    spread = {"conv": (90, "half"), "dgrad": (80, "half"), "wgrad": (100, "half")}
    spread_fp32 = {"conv": (80, "tf32"), "dgrad": (100, "tf32"), "wgrad": (90, "tf32")}
    found = [
        codegen.conv_case(kind, arch, codegen.DTYPES[mode][0], mode, configs.TABLE[kind, mode][arch][0])
        for chosen in (spread, spread_fp32)
        for kind, (arch, mode) in chosen.items()
    ]
    found += [codegen.depthwise_case(kind, arch, "bf16", 64) for kind, (arch, _) in spread.items()]
    found += [next(c for c in codegen.moments_cases(a) if c.dtype == d) for a, d in ((90, "bf16"), (80, "fp32"))]
    chosen = itertools.cycle(configs.FAMILIES)
    found += [codegen.pass_case(kernel, next(chosen), "bf16", 64, "5x5") for kernel in codegen.PASSES]
    names = {c.kernel for c in found}
    for arch in configs.FAMILIES:
        small = (
            *codegen.rounding_cases(arch),
            *codegen.moments_cases(arch),
            *codegen.algebra_cases(arch),
            *codegen.bn_cases(arch),
        )
        for case in small:
            if case.kernel not in names:
                names.add(case.kernel)
                found.append(case)
    return found


@pytest.mark.parametrize("arch", configs.FAMILIES)
def test_whatever_is_chosen_is_compiled(arch: int) -> None:
    """No shape leads outside codegen's cases; channels off 16 bytes and 64-bit offsets take a spare one."""
    compiled = {(c.kernel, c.mode, c.config) for c in codegen.cases(arch)}
    for kind in configs.KINDS:
        for mode in configs.MODES:
            for M, KG, CG in itertools.product(
                (1, 1568, 25088, 401408), (1, 8, 16, 48, 64, 512), (3, 16, 40, 96, 256)
            ):
                for int64_offsets in (False, True):
                    config = configs.choose(kind, arch, mode, int64_offsets, M, KG, CG, 1, 132)
                    assert (codegen.KERNELS[kind].__name__, mode, tuple(config)) in compiled
                    odd = any(configs.vector(mode, n) < configs.VECTORS[mode][0] for n in (KG, CG))
                    assert config == configs.SPARE[kind, mode] or not (int64_offsets or odd)
    for channels in range(1, 300):
        for columns in (1, 3, 5, 7, 9):
            for kind in configs.KINDS:
                config = configs.depthwise(kind, channels, columns)
                assert (codegen.DEPTHWISE[kind].__name__, "", (*config[:2], *config[3:])) in compiled
        for kernel in codegen.PASSES:
            for side in (1, 3, 4, 5) if kernel.__name__ in codegen.SUMS else (3,):
                numbers = codegen.SUMS.get(kernel.__name__, lambda _: 1)(side)
                tile = configs.depthwise_pass(True, channels, numbers)
                assert (kernel.__name__, "", (*tile, *codegen.REDUCED)) in compiled
        for mode in configs.CORRELATION:
            for int64_offsets in (False, True):
                config = configs.correlation(mode, int64_offsets, channels, 300 - channels)
                assert ("cross_correlation", mode, tuple(config)) in compiled


@pytest.mark.parametrize(
    ("capability", "family"), [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 100), ((12, 0), 80)]
)
def test_family_of_a_device(capability: tuple[int, int], family: int) -> None:
    assert configs.family(capability) == family


@pytest.mark.parametrize("case", representatives(), ids=lambda c: f"{c.kernel}-{c.arch}-{c.dtype}")
def test_compiles_to_what_can_be_launched(case: codegen.Case) -> None:
    assert codegen.compile_case(case).faults(case.dot) == []


@pytest.mark.parametrize("arch", configs.FAMILIES)
def test_a_multiprocessor_holds_as_many_programs_of_wgrad_as_pixels_are_split_for(arch: int) -> None:
    for mode in ("half", "tf32x3"):
        config = configs.TABLE["wgrad", mode][arch][0]
        report = codegen.compile_case(codegen.conv_case("wgrad", arch, codegen.DTYPES[mode][0], mode, config))
        assert report.programs_per_sm * config.warps >= configs.WARPS[mode]


def test_pixels_are_split_into_whole_waves() -> None:
    """Of programs of equal work, as many at a time as the device holds, or almost."""
    for programs, slots in itertools.product((15, 30, 60, 135, 240, 600, 960), (264, 432, 528)):
        splits, rows = configs.pixel_split(2**20, programs, 64, slots)
        waves = configs.cdiv(programs * splits, slots)
        assert splits * rows >= 2**20 > (splits - 1) * rows
        assert programs * splits / (waves * slots) > 0.75, (programs, slots)
    assert configs.pixel_split(100, 15, 64, 528) == (1, 128)  # four blocks of pixels a program, at least


@pytest.mark.parametrize("case", [c for c in codegen.bn_cases(80, 8) if c.dtype == "fp32"], ids=lambda c: c.kernel)
def test_eight_maps_compile_to_what_can_be_launched(case: codegen.Case) -> None:
    assert codegen.compile_case(case).faults(case.dot) == []


@pytest.mark.parametrize("case", {c.kernel: c for c in representatives()}.values(), ids=lambda c: c.kernel)
def test_numbers_of_one_compile(case: codegen.Case) -> None:
    """A launch makes a number of 1 a constant, whose type the kernel's expressions must take too.

    Of the products' tiles it is a spare one that such launches take.
    """
    kind = next((kind for kind, kernel in codegen.KERNELS.items() if kernel.__name__ == case.kernel), None)
    if kind is not None:
        spare = configs.SPARE[kind, case.mode]
        case = codegen.conv_case(kind, case.arch, case.dtype, case.mode, spare, "any channels")
    specialised = [p.name for p in codegen.kernel_of(case).params if not (p.is_constexpr or p.do_not_specialize)]
    ones = {name: 1 for name in specialised if str(case.arguments[name]).startswith("i32")}
    assert ones or case.kernel == "sum_splits"
    assert codegen.compile_case(replace(case, arguments={**case.arguments, **ones})).stack == 0
