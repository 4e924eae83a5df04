// fuse_blocks on CUDA: one launch for all blocks (more than one where a network's descriptors do not fit), on the current stream.
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
__device__ __forceinline__ void fold(const Block& block, const Branch* branches, Scales& shared) {
  Piece const piece = piece_of(block, blockIdx.x);
  fold_scales<T>(block, branches, piece, threadIdx.x, shared);
  __syncthreads();
  fold_tile<T>(block, branches, piece, threadIdx.x, shared);
}

__global__ void __launch_bounds__(kThreads, 4) fuse_blocks_kernel(const __grid_constant__ Launch launch) {
  __shared__ Scales shared;
  const Block& block = block_of(launch, blockIdx.x);
  const Branch* branches = launch.branches + block.first_branch;
  switch (block.dtype) {  // the same for the whole CTA
    case kFloat: return fold<float>(block, branches, shared);
    case kDouble: return fold<double>(block, branches, shared);
    case kHalf: return fold<c10::Half>(block, branches, shared);
    default: return fold<c10::BFloat16>(block, branches, shared);
  }
}

void check(cudaError_t error) {
  if (error != cudaSuccess) require.fail("CUDA: ", cudaGetErrorString(error));
}

void run(const Fusion& fusion, const Tensors& weight) {
  if (weight.empty()) return;
  int32_t const device = weight[0].get_device_index();
  torch::stable::accelerator::DeviceGuard const guard(device);
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  for (size_t i = 0; i < fusion.blocks.size();) {
    Launch launch;
    launch.count = 0;
    int64_t tiles = 0;
    int branches = 0;
    for (; i < fusion.blocks.size() && launch.count < kMaxBlocks; ++i) {
      const Block& given = fusion.blocks[i];
      int const own = given.branches + given.normed;
      if (branches + own > kMaxBranches) break;
      Block& block = launch.blocks[launch.count++] = given;
      std::copy_n(&fusion.branches[given.first_branch], own, launch.branches + branches);
      block.first_branch = branches;
      branches += own;
      block.first_tile = int32_t(tiles);
      tiles += tile_count(block);
      if (tiles > std::numeric_limits<int32_t>::max()) require.fail("the blocks have more than 2^31 - 1 tiles");
    }
    if (launch.count == 0) require.fail("block ", i, " has more branches than a launch of this CUDA version takes");
    fuse_blocks_kernel<<<dim3(unsigned(tiles)), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(launch);
    check(cudaGetLastError());
  }
}

std::tuple<Tensors, Tensors> fuse_blocks(const Tensors& weight, const Tensors& gamma, const Tensors& beta,
                                         const Tensors& mean, const Tensors& var, const Tensors& conv_bias,
                                         const std::vector<int64_t>& blocks, const std::vector<int64_t>& branches,
                                         const std::vector<double>& eps) {
  Fusion fusion = describe_blocks({weight, gamma, beta, mean, var, conv_bias, blocks, branches, eps}, nullptr, nullptr);
  run(fusion, weight);
  return {std::move(fusion.weights), std::move(fusion.biases)};
}

void fuse_blocks_out(const Tensors& weight, const Tensors& gamma, const Tensors& beta, const Tensors& mean,
                     const Tensors& var, const Tensors& conv_bias, const std::vector<int64_t>& blocks,
                     const std::vector<int64_t>& branches, const std::vector<double>& eps, const Tensors& weight_out,
                     const Tensors& bias_out) {
  Fusion const fusion = describe_blocks({weight, gamma, beta, mean, var, conv_bias, blocks, branches, eps}, &weight_out, &bias_out);
  run(fusion, weight);
}

}  // namespace
}  // namespace acnet

STABLE_TORCH_LIBRARY_IMPL(acnet_kernels, CUDA, library) {
  library.impl("fuse_blocks", TORCH_BOX(&acnet::fuse_blocks));
  library.impl("fuse_blocks_out", TORCH_BOX(&acnet::fuse_blocks_out));
}
