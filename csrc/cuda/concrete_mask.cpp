#include "cuda/concrete_mask.h"

#include <tuple>

#include "cuda/on_device.h"

namespace sparse_gen {

namespace {

cuda::Rows rows_of(const Tensor& logits, const Tensor& weight) {
  return {logits.size(0), logits.size(1), weight.dim() == 2 ? logits.size(1) : 0};
}

cuda::Draw draw_of(const Tensor& seed, const Tensor& step, int64_t stream, double temperature) {
  return {integers(seed), integers(step), stream, 1 / temperature};
}

}  // namespace

std::tuple<Tensor, Tensor> concrete_mask_cuda(const Tensor& logits, const Tensor& weight, const Tensor& seed,
                                              const Tensor& step, int64_t stream, double temperature) {
  const OnDevice device(logits);
  device.expect_here("weight, seed and step", weight, seed, step);
  Tensor soft_mask = torch::stable::empty_like(logits), masked_weight = torch::stable::empty_like(logits);
  for_float_type(logits, [&](auto type) {
    using T = decltype(type);
    device.check(cuda::concrete_mask_sample(
        cuda::Sample<T>{rows_of(logits, weight), draw_of(seed, step, stream, temperature), logits.const_data_ptr<T>(),
                        weight.const_data_ptr<T>(), soft_mask.mutable_data_ptr<T>(),
                        masked_weight.mutable_data_ptr<T>()},
        device.stream()));
  });
  return {soft_mask, masked_weight};
}

std::tuple<Tensor, Tensor> concrete_mask_backward_cuda(const Tensor& grad_soft_mask, const Tensor& grad_masked_weight,
                                                       const Tensor& weight, const Tensor& soft_mask,
                                                       double temperature) {
  const OnDevice device(soft_mask);
  device.expect_here("gradients and weight", grad_soft_mask, grad_masked_weight, weight);
  Tensor grad_logits = torch::stable::empty_like(soft_mask), grad_weight = torch::stable::empty_like(soft_mask);
  for_float_type(soft_mask, [&](auto type) {
    using T = decltype(type);
    device.check(cuda::concrete_mask_gradient(
        cuda::Gradient<T>{rows_of(soft_mask, weight), 1 / temperature, grad_soft_mask.const_data_ptr<T>(),
                          grad_masked_weight.const_data_ptr<T>(), weight.const_data_ptr<T>(),
                          soft_mask.const_data_ptr<T>(), grad_logits.mutable_data_ptr<T>(),
                          grad_weight.mutable_data_ptr<T>()},
        device.stream()));
  });
  return {grad_logits, grad_weight};
}

void concrete_mask_update_cuda(const Tensor& logits, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                               const Tensor& masked_weight, const Tensor& weight, const Tensor& grad_masked_weight,
                               const Tensor& seed, const Tensor& step, int64_t stream, double temperature,
                               double kl_weight, double prior, double lr, double beta1, double beta2, double eps) {
  const OnDevice device(logits);
  device.expect_here("averages, weights, seed and step", exp_avg, exp_avg_sq, masked_weight, weight,
                     grad_masked_weight, seed, step);
  const cuda::AdamNumbers adam = cuda::AdamNumbers::of(kl_weight, prior, lr, beta1, beta2, eps);
  for_float_type(logits, [&](auto type) {
    using T = decltype(type);
    device.check(cuda::concrete_mask_update(
        cuda::Update<T>{rows_of(logits, weight), draw_of(seed, step, stream, temperature), logits.mutable_data_ptr<T>(),
                        exp_avg.mutable_data_ptr<T>(), exp_avg_sq.mutable_data_ptr<T>(),
                        masked_weight.mutable_data_ptr<T>(), weight.const_data_ptr<T>(),
                        grad_masked_weight.const_data_ptr<T>(), adam},
        device.stream()));
  });
}

}  // namespace sparse_gen

STABLE_TORCH_LIBRARY_IMPL(sparse_gen, CUDA, m) {
  m.impl("concrete_mask", TORCH_BOX(&sparse_gen::concrete_mask_cuda));
  m.impl("concrete_mask_backward", TORCH_BOX(&sparse_gen::concrete_mask_backward_cuda));
  m.impl("concrete_mask_update", TORCH_BOX(&sparse_gen::concrete_mask_update_cuda));
}
