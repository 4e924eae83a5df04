// depthwise's passes for AVX-512 (F, BW, DQ, VL), chosen at run time by depthwise.cpp.
#include "depthwise.h"

#if defined(__x86_64__)
#include "rows_avx512.h"
// Then what is compiled for it.
#include "depthwise_kernels.h"
#include "depthwise_algebra.h"
#include "rows_end.h"
#endif
