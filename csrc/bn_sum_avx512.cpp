// bn_sum's passes for AVX-512 (F, BW, DQ, VL), chosen at run time by bn_sum.cpp.
#include "bn_sum.h"

#if defined(__x86_64__)
#include "rows_avx512.h"
// Then what is compiled for it.
#include "bn_sum_kernels.h"
#include "rows_end.h"
#endif
