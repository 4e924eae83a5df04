"""Which taps the branches want, and where a tap reads.

WINDOW is a window.Window. A row of the window is wanted by some of its branches and so is a column; a tap is wanted
by the branches that want both. MASK stands for a set of branches, branch b by bit b. The kernels loop over the taps
of one mask at a time, which keeps each loop's operands few: unrolling the taps gives every tap its own buffers in
shared memory (811 KB on sm_90). In the rows that the same branches want, the taps of a mask are a piece, rows ×
columns. A kernel's taps off a row and a column of it are one piece, the taps around a smaller rectangle are two.
"""
# Triton's language, not Python's types.
# mypy: ignore-errors

import itertools

import triton
import triton.language as tl


# Compile-time functions of a window, which Triton 3.6 hands them as a plain tuple: its branches are the last entry.
@triton.constexpr_function
def branch_count(window):
    """Number of branches."""
    return len(window[-1])


@triton.constexpr_function
def size_of(window, branch):
    """Number of the branch's taps."""
    _, _, rows, columns, _ = window[-1][branch]
    return rows * columns


@triton.constexpr_function
def wanting(window, axis):
    """Mask of the branches that want each row (axis 0) or column (axis 1) of the window."""
    lines = [range(t[axis], t[axis] + t[2 + axis] * t[4], t[4]) for t in window[-1]]
    return [sum(1 << b for b, own in enumerate(lines) if i in own) for i in range(window[axis])]


@triton.constexpr_function
def has_column(window, branch, column):
    """Whether the branch has taps in a column."""
    return wanting(window, 1)[column] >> branch & 1 == 1


@triton.constexpr_function
def first_row(window):
    """The first row that a branch wants."""
    return min(t[0] for t in window[-1])


@triton.constexpr_function
def end_row(window):
    """One more than the last row that a branch wants."""
    return max(t[0] + (t[2] - 1) * t[4] + 1 for t in window[-1])


@triton.constexpr_function
def has_all_rows(window, branch):
    """Whether the branch has taps in all rows from first_row to end_row."""
    return window[-1][branch][2] == end_row(window) - first_row(window)


@triton.jit
def has_row(row, WINDOW: tl.constexpr, BRANCH: tl.constexpr):
    """Whether the branch has taps in a row."""
    TAPS: tl.constexpr = WINDOW.branches[BRANCH]
    down = row - TAPS.row
    return down == 0 if TAPS.rows == 1 else (down >= 0) & (down < TAPS.rows * TAPS.step) & (down % TAPS.step == 0)


@triton.constexpr_function
def pieces(window, mask):
    """(rows, columns) of each piece of the taps that the branches in mask want and no others."""
    rows, columns = wanting(window, 0), wanting(window, 1)
    found = [
        ([i for i, r in enumerate(rows) if r == wanted], [i for i, c in enumerate(columns) if c & wanted == mask])
        for wanted in sorted(set(rows))
    ]
    return [(r, c) for r, c in found if c]


@triton.constexpr_function
def piece_count(window, mask):
    """Number of pieces of a mask's taps."""
    return len(pieces(window, mask))


@triton.constexpr_function
def tap_count(window, mask, piece=None):
    """Number of a mask's taps, or of those in the pieces before this one."""
    return sum(len(r) * len(c) for r, c in pieces(window, mask)[:piece])


@triton.constexpr_function
def taps_before(window, branch=None):
    """Number of taps of the branches before this one, or of all."""
    return sum(t[2] * t[3] for t in window[-1][:branch])


@triton.constexpr_function
def line_count(window, mask, piece, axis):
    """Number of a piece's rows (axis 0) or columns (axis 1)."""
    return len(pieces(window, mask)[piece][axis])


@triton.constexpr_function
def progression(window, mask, piece, axis):
    """(first, step, (index, by), …): line i of a piece is first + i·step, and `by` more from each index on."""
    lines = pieces(window, mask)[piece][axis]
    gaps = [after - before for before, after in itertools.pairwise(lines)]
    step = max(gaps, key=gaps.count, default=0)
    return lines[0], step, *((i + 1, gap - step) for i, gap in enumerate(gaps) if gap != step)


@triton.constexpr_function
def progression_length(window, mask, piece, axis):
    """Number of a progression's entries."""
    return len(progression(window, mask, piece, axis))


@triton.jit
def _line(i, WINDOW: tl.constexpr, MASK: tl.constexpr, PIECE: tl.constexpr, AXIS: tl.constexpr):
    """The i-th row or column of a piece."""
    line = progression(WINDOW, MASK, PIECE, AXIS)[0] + i * progression(WINDOW, MASK, PIECE, AXIS)[1]
    for j in tl.static_range(2, progression_length(WINDOW, MASK, PIECE, AXIS)):
        beyond = i >= progression(WINDOW, MASK, PIECE, AXIS)[j][0]
        line += beyond.to(tl.int32) * progression(WINDOW, MASK, PIECE, AXIS)[j][1]
    return line


@triton.jit
def tap_at(i, WINDOW: tl.constexpr, MASK: tl.constexpr):
    """(row, column) in the window of the i-th tap of a mask."""
    for piece in tl.static_range(piece_count(WINDOW, MASK)):
        j = i - tap_count(WINDOW, MASK, piece)
        # A piece of one row needs no division.
        down = 0 * j if line_count(WINDOW, MASK, piece, 0) == 1 else j // line_count(WINDOW, MASK, piece, 1)
        right = j if line_count(WINDOW, MASK, piece, 0) == 1 else j % line_count(WINDOW, MASK, piece, 1)
        if piece == 0:
            row, col = _line(down, WINDOW, MASK, piece, 0), _line(right, WINDOW, MASK, piece, 1)
        else:
            row = tl.where(j >= 0, _line(down, WINDOW, MASK, piece, 0), row)
            col = tl.where(j >= 0, _line(right, WINDOW, MASK, piece, 1), col)
    return row, col


@triton.jit
def tap_number(row, col, WINDOW: tl.constexpr, BRANCH: tl.constexpr):
    """Which of the branch's own taps the window's (row, col) is, which it must want."""
    TAPS: tl.constexpr = WINDOW.branches[BRANCH]
    return (row - TAPS.row) // TAPS.step * TAPS.columns + (col - TAPS.column) // TAPS.step


@triton.jit
def own_tap(tap, WINDOW: tl.constexpr, BRANCH: tl.constexpr):
    """(row, column) in the window of a branch's own tap, and how many it has."""
    TAPS: tl.constexpr = WINDOW.branches[BRANCH]
    row = TAPS.row + tap // TAPS.columns * TAPS.step
    return row, TAPS.column + tap % TAPS.columns * TAPS.step, TAPS.rows * TAPS.columns


@triton.jit
def replaced(items, i: tl.constexpr, item):
    """The tuple with another item i."""
    return items[:i] + (item,) + items[i + 1 :]  # noqa: RUF005 (Triton's tuples know no star)


@triton.jit
def multiple(number, OF: tl.constexpr):
    """number, which is a multiple of OF: so that the compiler sees it."""
    return number // OF * OF


@triton.jit
def index(value, INT64_OFFSETS: tl.constexpr):
    """value in the type that offsets into a map are computed in: int32 unless a map has 2³¹ elements or more.

    64-bit offsets everywhere cost 30–100 registers a thread in the convolution kernels.
    """
    return value.to(tl.int64) if INT64_OFFSETS else value.to(tl.int32)


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
    """W[k, c, tap] from K×C×rows×columns in either memory format; place: k, c and the masks of those in range, each
    broadcast to the tile wanted."""
    k, c, mask_k, mask_c = place
    at = (k * TAPS + tap) * C + c if CHANNELS_LAST else (k * C + c) * TAPS + tap
    return tl.load(w_ptr + at, mask=mask_k & mask_c, other=0.0)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, INTERPRETER_FP32: tl.constexpr):
    """acc + a·b. INTERPRETER_FP32 is for the interpreter alone, whose bf16 products are wrong."""
    if INTERPRETER_FP32:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)
