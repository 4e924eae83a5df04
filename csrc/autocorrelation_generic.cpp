// The cross-correlation's passes for any processor.
#include "autocorrelation.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>

#define ACNET_ISA generic
#define ACNET_TILE 4
#include "autocorrelation_kernels.h"
