// Batch-norm sums, whole steps, running statistics and folds as C++ functions, for the autograd node of csrc/node, which is another
// library: built against one torch, where this one serves all. ops/ documents them.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "check.h"

namespace acnet {

namespace bn_sum {

// (out, means, variances, rstds)
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensors ys, Tensors gammas, Tensors betas, std::vector<double> eps,
                                                   std::optional<ScalarType> dtype);

// (dys, dgammas, dbeta)
std::tuple<Tensors, Tensor, Tensor> backward(Tensor grad, Tensors ys, Tensor means, Tensor rstds, Tensors gammas,
                                             std::vector<bool> needs_dy);

// (dgammas, dbeta)
std::tuple<Tensor, Tensor> backward_(Tensor grad, Tensors ys, Tensor means, Tensor rstds, Tensors gammas,
                                     std::vector<bool> needs_dy, Tensors dys);

// forward and backward_ with what follows the sum: a residual and an activation.
std::tuple<Tensor, Tensor, Tensor, Tensor> epilogue_forward(Tensors ys, Tensors gammas, Tensors betas,
                                                            std::vector<double> eps, std::optional<ScalarType> dtype,
                                                            std::optional<Tensor> residual, int64_t activation);
std::tuple<Tensor, Tensor> epilogue_backward_(Tensor grad, Tensors ys, Tensor means, Tensor rstds, Tensors gammas,
                                              Tensors betas, std::vector<bool> needs_dy, std::optional<Tensor> kept,
                                              int64_t activation, Tensors dys, std::optional<Tensor> dresidual);

}  // namespace bn_sum

namespace running {

void update_running_(Tensors running_means, Tensors running_vars, Tensors counters, Tensor means, Tensor variances,
                     std::vector<double> momenta, int64_t count);

}  // namespace running

// A whole step and its gradients: steps/moments.py's and steps/depthwise.py's operators.
namespace moments {

// (out, means, variances, rstds, pivot, sums, centred)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> step(Tensor x, Tensors weights, Tensors gammas,
                                                                        Tensors betas, std::vector<double> eps,
                                                                        std::vector<int64_t> taps,
                                                                        std::vector<int64_t> geometry, ScalarType dtype,
                                                                        bool channels_last);
// (dx, dws, dgammas, dbeta)
std::tuple<Tensor, Tensors, Tensor, Tensor> step_backward(Tensor grad, Tensor x, Tensors weights, Tensors gammas, Tensor means,
                                                          Tensor rstds, Tensor pivot, Tensor sums, Tensor centred,
                                                          std::vector<int64_t> taps, std::vector<int64_t> geometry,
                                                          ScalarType dtype, bool accumulates, bool need_x,
                                                          std::vector<bool> need_weights, bool need_gammas);

}  // namespace moments

namespace depthwise {

// (out, means, variances, rstds, pivot, sums, centred)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> step(Tensor x, Tensors weights, Tensors gammas,
                                                                        Tensors betas, std::vector<double> eps,
                                                                        std::vector<int64_t> taps,
                                                                        std::vector<int64_t> geometry, bool channels_last,
                                                                        std::optional<Tensor> residual, int64_t activation);
// (dx, dws, dgammas, dbeta, dresidual)
std::tuple<Tensor, Tensors, Tensor, Tensor, Tensor> step_backward(Tensor grad, Tensor x, Tensors weights, Tensors gammas,
                                                          Tensors betas, Tensor means, Tensor rstds, Tensor pivot, Tensor sums, Tensor centred,
                                                          std::optional<Tensor> averages, std::vector<int64_t> taps,
                                                          std::vector<int64_t> geometry, bool need_x,
                                                          std::vector<bool> need_weights, bool need_gammas,
                                                          std::optional<Tensor> outer, int64_t activation,
                                                          bool need_residual);

}  // namespace depthwise

// Several branches' convolutions at once, at stride 1 and of one group. Taps and geometry are those of the operators
// above (steps/packed.py); branches without a weight and batch norms are passed over. Maps are float32, bfloat16 or
// float16, and results of the same type.
namespace direct {

// The maps of the branches with a weight.
Tensors maps(Tensor x, Tensors weights, std::vector<int64_t> taps, std::vector<int64_t> geometry, bool channels_last);
// (dx, dws), of the maps' gradients, those that something needs: dx empty and no dw where not needed.
std::tuple<Tensor, Tensors> gradients(Tensors dys, Tensor x, Tensors weights, std::vector<int64_t> taps,
                                      std::vector<int64_t> geometry, bool need_x, std::vector<bool> need_weights,
                                      bool channels_last);

}  // namespace direct

namespace launch {

// What a routine returns for the tensors; nothing where it is not recorded for such. ops/launch.py documents it.
Tensors replay(int64_t routine, int64_t stream, Tensors tensors);

}  // namespace launch

// (weights, biases) of the convolutions that the blocks fold into; ops/fuse_blocks.py says what the numbers are.
std::tuple<Tensors, Tensors> fuse_blocks(const Tensors& weight, const Tensors& gamma, const Tensors& beta,
                                         const Tensors& mean, const Tensors& var, const Tensors& conv_bias,
                                         const std::vector<int64_t>& blocks, const std::vector<int64_t>& branches,
                                         const std::vector<double>& eps);

struct Functions {
  decltype(&bn_sum::forward) forward;
  decltype(&bn_sum::backward) backward;
  decltype(&bn_sum::backward_) backward_into;
  decltype(&bn_sum::epilogue_forward) epilogue_forward;
  decltype(&bn_sum::epilogue_backward_) epilogue_backward;
  decltype(&running::update_running_) update_running;
  decltype(&fuse_blocks) fuse;
  decltype(&moments::step) moments;
  decltype(&moments::step_backward) moments_backward;
  decltype(&depthwise::step) depthwise;
  decltype(&depthwise::step_backward) depthwise_backward;
  decltype(&direct::maps) direct_maps;
  decltype(&direct::gradients) direct_gradients;
  decltype(&launch::replay) replay;
};

// What the node's library looks up.
extern "C" __attribute__((visibility("default"))) const Functions* acnet_functions();

}  // namespace acnet
