// The end of what rows_avx2.h or rows_avx512.h begins.
#if defined(__clang__)
#pragma clang attribute pop
#endif
