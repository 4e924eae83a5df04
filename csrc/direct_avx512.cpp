// direct's passes for AVX-512 (F, BW, DQ, VL), chosen at run time by direct.cpp.
#include "direct.h"

#if defined(__x86_64__)
#include "rows_avx512.h"
// Then what is compiled for it.
#include "direct_kernels.h"
#include "rows_end.h"
#endif
