// bn_sum's passes for the compiler's default instruction set (SSE2 on x86-64, NEON on aarch64).
#include "bn_sum.h"

#include "rows_generic.h"
// Then what is compiled for it.
#include "bn_sum_kernels.h"
