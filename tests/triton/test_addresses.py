"""Maps of more than 2³¹ elements, without the memory: addresses are computed, and nothing is read or written.

Only the last program of a launch runs, its tensors are one element each, and the interpreter's loads and stores are
recorded; of int32 they happen, as those are tables. One map is huge in each case, so addresses far from its base
are its own; they must be those that plain integers give.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton.language as tl
from problems import PROBLEMS

from acnet_kernels.kernels import autocorrelation, bn_sum, conv, depthwise, depthwise_moments, dgrad, wgrad
from acnet_kernels.ops.triton_conv import INTERPRETED

H, W, C = 8192, 16411, 16  # 2³¹ elements and 4.5 million more
M = H * W
FAR = 3 * 2**30  # bytes; every other map of these cases is smaller
BLOCK = 64
WINDOW = {"WINDOW": PROBLEMS[0].window}
OPTIONS = {"CHANNELS_LAST": True, "INT64_OFFSETS": True, "PRECISION": "tf32", "INTERPRETER_FP32": False}
OPTIONS |= {"BLOCK_M": BLOCK, "BLOCK_K": 16, "BLOCK_C": 16, "VECTOR_C": 1, "VECTOR_K": 1}

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="addresses are recorded by Triton's interpreter alone")


class Last:
    """Runs the program of a launch that has the given index, and collects the far element offsets it touches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

        self.base, self.index, found = torch.zeros(1, dtype=torch.float16), (0, 0, 0), set()

        def record(ptrs, mask) -> None:
            live = np.broadcast_to(mask.data.astype(bool), ptrs.data.shape)
            reached = ptrs.data[live].astype(np.int64) - self.base.data_ptr()
            found.update((reached[abs(reached) > FAR] // 2).tolist())

        masked_load = InterpreterBuilder.create_masked_load

        def load(builder, ptrs, mask, *rest):
            element = ptrs.get_element_ty()
            if element == tl.int32:
                return masked_load(builder, ptrs, mask, *rest)
            record(ptrs, mask)
            return TensorHandle(np.zeros(ptrs.data.shape, _get_np_dtype(element)), element)

        def program_id(builder, axis):
            at = builder.grid_idx[axis] + self.index[axis]
            return TensorHandle(np.array([at], dtype=np.int32), tl.int32)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", load)
        monkeypatch.setattr(
            InterpreterBuilder, "create_masked_store", lambda b, ptrs, v, mask, *_: record(ptrs, mask)
        )
        monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", program_id)
        self.found = found


@pytest.fixture
def last(monkeypatch: pytest.MonkeyPatch) -> Last:
    return Last(monkeypatch)


def elements(pixels: np.ndarray) -> set[int]:
    """Element offsets of whole pixels of the huge map."""
    return set((pixels.reshape(-1, 1).astype(np.int64) * C + np.arange(C)).ravel().tolist())


def moved(pixels: np.ndarray, shifts: list[tuple[int, int]]) -> np.ndarray:
    """Every pixel of the image that a shift leads to from one of these."""
    h, w = np.divmod(pixels, W)
    rows = [(h + r, w + s) for r, s in shifts]
    return np.concatenate([(y * W + x)[(y >= 0) & (y < H) & (x >= 0) & (x < W)] for y, x in rows])


def neighbours(pixels: np.ndarray) -> np.ndarray:
    """Every pixel that the 3×3 windows about these read."""
    return moved(pixels, [(r, s) for r in (-1, 0, 1) for s in (-1, 0, 1)])


LAST_TILE = np.arange(M // BLOCK * BLOCK if M % BLOCK else M - BLOCK, M, dtype=np.int64)


def test_convolution_writes_and_reads_where_it_should(last: Last) -> None:
    one, small = last.base, torch.zeros(1)
    tiles = -(-M // BLOCK)
    last.index = (tiles - 1, 0, 0)
    conv.conv_branches[(1,)](
        one, (one,) * 3, (one,) * 3, small, M, tiles, 1, C, 1, C, H, W, H, W, STORE=True, **WINDOW, **OPTIONS
    )
    assert last.found == elements(LAST_TILE)
    last.found.clear()
    conv.conv_branches[(1,)](
        one, (one,) * 3, (one,) * 3, small, M, tiles, C, 1, C, 1, H, W, H, W, STORE=True, **WINDOW, **OPTIONS
    )
    assert last.found == elements(neighbours(LAST_TILE))


def test_input_gradient_writes_and_reads_where_it_should(last: Last) -> None:
    one, tiles = last.base, -(-M // BLOCK)
    last.index = (tiles - 1, 0, 0)
    dgrad.conv_dgrad[(1,)](
        (one,) * 3, (one,) * 3, one, 1, tiles, C, 1, C, 1, H, W, H, W, REDUCE_K=False, **WINDOW, **OPTIONS
    )
    assert last.found == elements(LAST_TILE)
    last.found.clear()
    dgrad.conv_dgrad[(1,)](
        (one,) * 3, (one,) * 3, one, 1, tiles, 1, C, 1, C, H, W, H, W, REDUCE_K=True, **WINDOW, **OPTIONS
    )
    assert last.found == elements(neighbours(LAST_TILE))


def test_weight_gradient_reads_where_it_should(last: Last) -> None:
    one, splits = last.base, -(-M // BLOCK)
    last.index = (0, 0, splits - 1)
    wgrad.conv_wgrad[(1, 15, 1)](
        one, (one,) * 3, (torch.zeros(1),) * 3, M, BLOCK, 0, C, 1, C, 1, H, W, H, W, **WINDOW, **OPTIONS
    )
    assert last.found == elements(neighbours(LAST_TILE))
    last.found.clear()
    wgrad.conv_wgrad[(1, 15, 1)](
        one, (one,) * 3, (torch.zeros(1),) * 3, M, BLOCK, 0, 1, C, 1, C, H, W, H, W, **WINDOW, **OPTIONS
    )
    assert last.found == elements(LAST_TILE)


DEPTHWISE = {"INT64_OFFSETS": True, "BLOCK_M": BLOCK, "BLOCK_K": 16, **WINDOW}


def test_depthwise_phases_write_and_read_where_they_should(last: Last) -> None:
    """x is huge where every channel has its pixels alone, y where one input channel has all outputs."""
    one, three, small = last.base, (last.base,) * 3, torch.zeros(1)
    tiles, size = -(-M // BLOCK), (H, W, H, W)
    last.index = (tiles - 1, 0, 0)
    depthwise.depthwise_branches[(1,)](
        one, three, three, small, M, BLOCK, tiles, C, C, 1, *size, STORE=False, **DEPTHWISE
    )
    assert last.found == elements(neighbours(LAST_TILE))
    last.found.clear()
    depthwise.depthwise_branches[(1,)](
        one, three, three, small, M, BLOCK, tiles, 1, C, C, *size, STORE=True, **DEPTHWISE
    )
    assert last.found == elements(LAST_TILE)
    last.found.clear()
    depthwise.depthwise_dgrad[(1,)](three, three, one, M, 1, C, C, *size, **DEPTHWISE)
    assert last.found == elements(neighbours(LAST_TILE))
    last.found.clear()
    last.index = (0, 0, tiles - 1)
    depthwise.depthwise_wgrad[(1, 3, 1)](one, three, (small,) * 3, M, BLOCK, 0, 1, C, C, *size, **DEPTHWISE)
    assert last.found == elements(LAST_TILE)


def test_depthwise_moments_write_and_read_where_they_should(last: Last) -> None:
    """x is huge where every channel has its pixels alone, out and its gradient where one has all outputs."""
    one, small, tiles = last.base, torch.zeros(1, dtype=torch.float64), -(-M // BLOCK)
    share = M - len(LAST_TILE)  # of two tasks, whose partial results are near
    window = PROBLEMS[0].window._replace(branches=())
    options = {"WINDOW": window, "INT64_OFFSETS": True, "BLOCK_M": BLOCK, "BLOCK_K": 16}
    # One rectangle of all pixels: its first task, row and rows, column and columns, tasks.
    table, rectangle = torch.tensor([0, 0, H, 0, W, 2], dtype=torch.int32), {"MOST_RECTS": 1}
    huge, size = (M * C, 1, W * C, C), (H, W, H, W)
    thin = (M, 1, W, 1)
    last.index = (1, 0, 0)
    depthwise_moments.autocorrelate[(1,)](
        one, small, table, small, 1, share, 1, C, H, W, *huge, WIDE=False, **rectangle, **options
    )
    half_plane = [(down, right) for down in range(3) for right in range(-2 if down else 0, 3)]
    assert last.found == elements(moved(LAST_TILE, half_plane))
    for passed, strides, found in (
        ((C, C, 1), (*huge, *thin), elements(neighbours(LAST_TILE))),
        ((1, C, C), (*thin, *huge), elements(LAST_TILE)),
    ):
        last.found.clear()
        last.index = (tiles - 1, 0, 0)
        depthwise_moments.convolve[(1,)](
            one, small, small, one, one, M, *passed, *size, *strides, ACTIVATION="relu", **options
        )
        assert last.found == found
        last.found.clear()
        last.index = (1, 0, 0)
        depthwise_moments.correlate[(1,)](
            one,
            small,
            one,
            one,
            small,
            one,
            small,
            M,
            share,
            *passed,
            *size,
            *strides,
            ACTIVATION="relu",
            **options,
        )
        assert last.found == found
    every = [(down, right) for down in range(-2, 3) for right in range(-2, 3)]
    for passed, strides, found in (
        ((C, C, 1), (*huge, *thin, *thin), elements(moved(LAST_TILE, every))),
        ((1, C, C), (*thin, *huge, *thin), elements(neighbours(LAST_TILE))),
        ((C, C, 1), (*thin, *thin, *huge), elements(LAST_TILE)),
    ):
        last.found.clear()
        depthwise_moments.input_gradient[(1,)](
            one, small, one, table, small, small, one, 1, share, 1, *passed, *size, *strides, **rectangle, **options
        )
        assert last.found == found


def test_second_moments_read_where_they_should(last: Last) -> None:
    one, small, splits = last.base, torch.zeros(16), -(-M // BLOCK)
    options = {"INT64_OFFSETS": True, "INTERPRETER_FP32": False, "BLOCK_M": BLOCK, "BLOCK_K": 16, "BLOCK_C": 16}
    last.index = (0, 0, splits - 1)
    for channels in ((C, 1), (1, C)):
        last.found.clear()
        autocorrelation.cross_correlation[(9, 1, 1)](
            one, small, one, small, small, M, BLOCK, 0, 0, -1, -1, 3, *channels, *channels, H, W, **options
        )
        assert last.found == elements(neighbours(LAST_TILE) if channels == (C, 1) else LAST_TILE)
    last.found.clear()
    last.index = (-(-M * C // 1024) - 1, 0, 0)
    autocorrelation.centred_total[(1,)](one, small, small, 1, M, C, BLOCK=1024)
    beyond = M * C % 1024 or 1024
    assert last.found >= set(range(M * C - beyond, M * C))


def _bn_pass(name: str, one: torch.Tensor, tiles: int) -> None:
    vector, sizes = torch.zeros(1), {"B": 2, "BLOCK_M": BLOCK, "BLOCK_K": 16}
    double = torch.zeros(1, dtype=torch.float64)
    affine, relu = (vector, (vector,) * 2, (vector,) * 2), {"ACTIVATION": "relu", **sizes}
    runs: dict[str, Callable[[], None]] = {
        "statistics": lambda: bn_sum.statistics[(1,)]((one,) * 2, vector, M, C, tiles, BLOCK, **sizes),
        "apply": lambda: bn_sum.apply[(1,)](
            (one,) * 2, double, vector, vector, (None,) * 2, one, one, M, C, **relu
        ),
        "reduce_grad": lambda: bn_sum.reduce_grad[(1,)](
            one, (one,) * 2, double, *affine, one, one, vector, M, C, tiles, BLOCK, **relu
        ),
        "apply_grad": lambda: bn_sum.apply_grad[(1,)](
            one, (one,) * 2, (one,) * 2, double, vector, *affine, one, M, C, **relu
        ),
    }
    runs[name]()


@pytest.mark.parametrize("name", ["statistics", "apply", "reduce_grad", "apply_grad"])
def test_batch_norm_passes_reach_the_last_rows(name: str, last: Last, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = -(-M // BLOCK)
    last.index = (tiles - 1, 0, 0)
    monkeypatch.setattr(f"{__name__}.FAR", 2**32 - 2**24)  # beyond the partial results, C·tiles fp32 of them
    _bn_pass(name, last.base, tiles)
    assert last.found == elements(LAST_TILE)
