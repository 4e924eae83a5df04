// fuse_blocks on CUDA: one launch for all blocks (one per kMaxBlocks where a network has more), on the current stream.
// Variances are not checked: reading them would wait for the device. A negative one makes NaN.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "fuse_blocks.h"
#include "fuse_kernel.h"

namespace acnet {
namespace {

template <class T>
__device__ __forceinline__ void fold(const Block& block, Scales& shared) {
  Piece const piece = piece_of(block, blockIdx.x);
  fold_scales<T>(block, piece, threadIdx.x, shared);
  __syncthreads();
  fold_tile<T>(block, piece, threadIdx.x, shared);
}

__global__ void __launch_bounds__(kThreads, 4) fuse_blocks_kernel(const __grid_constant__ Launch launch) {
  __shared__ Scales shared;
  const Block& block = block_of(launch, blockIdx.x);
  switch (block.dtype) {  // the same for the whole CTA
    case kFloat: return fold<float>(block, shared);
    case kDouble: return fold<double>(block, shared);
    case kHalf: return fold<c10::Half>(block, shared);
    default: return fold<c10::BFloat16>(block, shared);
  }
}

void check(cudaError_t error) {
  if (error != cudaSuccess) require.fail("CUDA: ", cudaGetErrorString(error));
}

void run(const Fusion& fusion, const Tensors& square) {
  if (square.empty()) return;
  int32_t const device = square[0].get_device_index();
  torch::stable::accelerator::DeviceGuard const guard(device);
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  for (size_t begin = 0; begin < fusion.blocks.size(); begin += kMaxBlocks) {
    Launch launch;
    size_t const end = std::min(begin + kMaxBlocks, fusion.blocks.size());
    int64_t tiles = 0;
    launch.count = 0;
    for (size_t i = begin; i < end; ++i) {
      Block& block = launch.blocks[launch.count++] = fusion.blocks[i];
      block.first_tile = int32_t(tiles);
      tiles += tile_count(block);
      if (tiles > std::numeric_limits<int32_t>::max()) require.fail("the blocks have more than 2^31 - 1 tiles");
    }
    fuse_blocks_kernel<<<dim3(unsigned(tiles)), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(launch);
    check(cudaGetLastError());
  }
}

std::tuple<Tensors, Tensors> fuse_blocks(const Tensors& square, const Tensors& hor, const Tensors& ver,
                                         const Tensors& gamma, const Tensors& beta, const Tensors& mean,
                                         const Tensors& var, const Tensors& conv_bias,
                                         const std::vector<int64_t>& present, const std::vector<double>& eps,
                                         const std::vector<int64_t>& place) {
  Fusion fusion = describe_blocks({square, hor, ver, gamma, beta, mean, var, conv_bias, present, eps, place}, nullptr, nullptr);
  run(fusion, square);
  return {std::move(fusion.weights), std::move(fusion.biases)};
}

void fuse_blocks_out(const Tensors& square, const Tensors& hor, const Tensors& ver,
                     const Tensors& gamma, const Tensors& beta, const Tensors& mean,
                     const Tensors& var, const Tensors& conv_bias,
                     const std::vector<int64_t>& present, const std::vector<double>& eps,
                     const std::vector<int64_t>& place, const Tensors& weight_out,
                     const Tensors& bias_out) {
  Fusion const fusion = describe_blocks({square, hor, ver, gamma, beta, mean, var, conv_bias, present, eps, place}, &weight_out, &bias_out);
  run(fusion, square);
}

}  // namespace
}  // namespace acnet

STABLE_TORCH_LIBRARY_IMPL(acnet_kernels, CUDA, library) {
  library.impl("fuse_blocks", TORCH_BOX(&acnet::fuse_blocks));
  library.impl("fuse_blocks_out", TORCH_BOX(&acnet::fuse_blocks_out));
}
