// depthwise's passes for the compiler's default instruction set (SSE2 on x86-64, NEON on aarch64).
#include "depthwise.h"

#include "rows_generic.h"
// Then what is compiled for it.
#include "depthwise_kernels.h"
#include "depthwise_algebra.h"
