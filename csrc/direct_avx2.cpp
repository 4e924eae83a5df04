// direct's passes for AVX2 with FMA, chosen at run time by direct.cpp.
#include "direct.h"

#if defined(__x86_64__)
#include "rows_avx2.h"
// Then what is compiled for it.
#include "direct_kernels.h"
#include "rows_end.h"
#endif
