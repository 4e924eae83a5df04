// A libcuda.so.1 that accepts every call and runs nothing, but refuses a launch that an H100 would refuse.
#include "cuda.h"
#include <stdio.h>

#ifndef LAUNCHED  // what is done with a launch that is accepted
#define LAUNCHED(config, function, arguments)
#endif

#define ACCEPTS(name, ...) CUresult CUDAAPI name(__VA_ARGS__) { return CUDA_SUCCESS; }
#define ANSWERS(name, value, ...) CUresult CUDAAPI name(__VA_ARGS__) { *out = value; return CUDA_SUCCESS; }

static const unsigned SHARED = 227 * 1024, GRID_YZ = 65535, THREADS = 1024;

ANSWERS(cuGetErrorString, "an error of the stand-in", CUresult error, const char **out)
static _Thread_local CUcontext current_context = (CUcontext)1, outer_context;
ANSWERS(cuCtxGetCurrent, current_context, CUcontext *out)
CUresult CUDAAPI cuCtxSetCurrent(CUcontext context) {
  current_context = context;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuCtxPushCurrent(CUcontext context) {
  outer_context = current_context;
  current_context = context;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuCtxPopCurrent(CUcontext *out) {
  *out = current_context;
  current_context = outer_context;
  return CUDA_SUCCESS;
}
ANSWERS(cuCtxGetDevice, 0, CUdevice *out)
ANSWERS(cuCtxGetLimit, 1 << 20, size_t *out, CUlimit limit)
ACCEPTS(cuCtxSetLimit, CUlimit limit, size_t value)
ACCEPTS(cuInit, unsigned flags)
ANSWERS(cuDriverGetVersion, 13000, int *out)
ANSWERS(cuDeviceGetCount, 1, int *out)
ANSWERS(cuDeviceGet, index, CUdevice *out, int index)
ANSWERS(cuDevicePrimaryCtxRetain, (CUcontext)1, CUcontext *out, CUdevice device)
ANSWERS(cuModuleLoadData, (CUmodule)2, CUmodule *out, const void *image)
ACCEPTS(cuModuleUnload, CUmodule module)
static size_t functions;  // each has a handle of its own
ANSWERS(cuModuleGetFunction, (CUfunction)++functions, CUfunction *out, CUmodule module, const char *name)
ANSWERS(cuFuncGetAttribute, attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? (int)THREADS : 0, int *out,
        CUfunction_attribute attribute, CUfunction function)
ACCEPTS(cuFuncSetAttribute, CUfunction function, CUfunction_attribute attribute, int value)
ACCEPTS(cuFuncSetCacheConfig, CUfunction function, CUfunc_cache config)
ANSWERS(cuOccupancyMaxActiveClusters, 1, int *out, CUfunction function, const CUlaunchConfig *config)
// Any address, the CPU's too, is the device's.
CUresult CUDAAPI cuPointerGetAttribute(void *out, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)out = pointer;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuPointerGetAttributes(unsigned count, CUpointer_attribute *attributes, void **out, CUdeviceptr pointer) {
  for (unsigned i = 0; i < count; ++i) *(CUdeviceptr *)out[i] = pointer;
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGetAttribute(int *out, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *out = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *out = 0; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *out = SHARED; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *out = SHARED + 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *out = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *out = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *out = 32; break;
    default: *out = 1;
  }
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **arguments, void **extra) {
  unsigned threads = c->blockDimX * c->blockDimY * c->blockDimZ;
  if (c->gridDimY > GRID_YZ || c->gridDimZ > GRID_YZ || threads > THREADS || c->sharedMemBytes > SHARED) {
    fprintf(stderr, "a launch that no H100 takes: grid %u×%u×%u, %u threads, %u bytes of shared memory\n",
            c->gridDimX, c->gridDimY, c->gridDimZ, threads, c->sharedMemBytes);
    return CUDA_ERROR_INVALID_VALUE;
  }
  LAUNCHED(c, function, arguments);
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                                unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void **arguments,
                                void **extra) {
  CUlaunchConfig const config = {grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, stream, NULL, 0};
  return cuLaunchKernelEx(&config, function, arguments, extra);
}
