"""Where a kernel tap reads, and which branches want it.

WINDOW is a window.Window. Seen from the k×k kernel, hor is its row hor_row and ver its column ver_col. So the k²
taps are of four classes: off both lines → square; on the row → square, hor; on the column → square, ver; crossing
→ all. A class is (ON_ROW, ON_COL). Looping over one class at a time keeps each loop's operands few: unrolling the
taps gives every tap its own multi-buffered shared memory (811 KB on sm_90).
"""
# Triton's language, not Python's types.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.constexpr_function
def class_size(kernel, on_row, on_col):
    """Number of taps of a class in a kernel×kernel convolution."""
    return (1 if on_row else kernel - 1) * (1 if on_col else kernel - 1)


@triton.jit
def class_tap(
    i,
    WINDOW: tl.constexpr,
    ON_ROW: tl.constexpr,
    ON_COL: tl.constexpr,
):
    """(row, column) in the k×k kernel of the i-th tap of a class."""
    if ON_ROW:
        row = WINDOW.hor_row + 0 * i
    else:
        row = i if ON_COL else i // (WINDOW.kernel - 1)
        row += (row >= WINDOW.hor_row).to(tl.int32)
    if ON_COL:
        col = WINDOW.ver_col + 0 * i
    else:
        col = i if ON_ROW else i % (WINDOW.kernel - 1)
        col += (col >= WINDOW.ver_col).to(tl.int32)
    return row, col


@triton.jit
def index(value, WIDE: tl.constexpr):
    """value in the type that offsets into a map are computed in: int32 unless a map has 2³¹ elements or more.

    64-bit offsets everywhere cost 30–100 registers a thread in the convolution kernels.
    """
    return value.to(tl.int64) if WIDE else value.to(tl.int32)


@triton.jit
def split_pixel(m, rows, cols):
    """(image, row, column) of flat pixel m in maps of rows×cols; the image in m's type, the others int32."""
    rest = m // cols
    return rest // rows, (rest % rows).to(tl.int32), (m % cols).to(tl.int32)


@triton.jit
def weight_block(block, KG, CG, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """(group, output channels, input channels) of a block of the weights; channels are counted in the group."""
    c_blocks = tl.cdiv(CG, BLOCK_C)
    blocks = tl.cdiv(KG, BLOCK_K) * c_blocks
    k = block % blocks // c_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    c = block % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return block // blocks, k, c


@triton.jit
def weight_tile(w_ptr, place, tap, C, TAPS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """W[k, c, tap] from K×C×rows×columns in either memory format; place: k, c and which of them are live, each
    broadcast to the tile wanted."""
    k, c, k_live, c_live = place
    at = (k * TAPS + tap) * C + c if CHANNELS_LAST else (k * C + c) * TAPS + tap
    return tl.load(w_ptr + at, mask=k_live & c_live, other=0.0)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a·b. UPCAST is for the interpreter alone, whose bf16 products are wrong."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)
