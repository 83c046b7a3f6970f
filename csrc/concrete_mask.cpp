#include "cpu/concrete_mask.h"

#include <cmath>
#include <tuple>

#include "binding.h"

namespace sparse_gen {

namespace {

// Elements from one experiment's weights to the next: 0 where (N,) weights are shared by all.
int64_t experiment_stride(const Tensor& weight) { return weight.dim() == 2 ? weight.size(1) : 0; }

}  // namespace

std::tuple<Tensor, Tensor> concrete_mask(const Tensor& logits, const Tensor& weight, const Tensor& seed,
                                         const Tensor& step, int64_t stream, double temperature) {
  Tensor soft_mask = torch::stable::empty_like(logits), masked_weight = torch::stable::empty_like(logits);
  const int64_t numel = logits.size(1), weight_stride = experiment_stride(weight);
  const int64_t* seeds = seed.const_data_ptr<int64_t>();
  const int64_t at_step = *step.const_data_ptr<int64_t>();
  for_float_type(logits, [&](auto type) {
    using T = decltype(type);
    const T *l = logits.const_data_ptr<T>(), *w = weight.const_data_ptr<T>();
    T *s = soft_mask.mutable_data_ptr<T>(), *m = masked_weight.mutable_data_ptr<T>();
    parallel_over_chunks(logits.size(0), numel, [&](int64_t e, int64_t begin, int64_t end) {
      const int64_t at = e * numel;
      const ConcreteMaskSample<T> arguments{l + at,   w + e * weight_stride, s + at, m + at,
                                            seeds[e], at_step,               stream, temperature};
      SPARSE_GEN_DISPATCH(concrete_mask_sample, arguments, begin, end);
    });
  });
  return {soft_mask, masked_weight};
}

// The gradient of the weight comes out per experiment; where weights are shared the caller sums it.
std::tuple<Tensor, Tensor> concrete_mask_backward(const Tensor& grad_soft_mask, const Tensor& grad_masked_weight,
                                                  const Tensor& weight, const Tensor& soft_mask, double temperature) {
  Tensor grad_logits = torch::stable::empty_like(soft_mask), grad_weight = torch::stable::empty_like(soft_mask);
  const int64_t numel = soft_mask.size(1), weight_stride = experiment_stride(weight);
  for_float_type(soft_mask, [&](auto type) {
    using T = decltype(type);
    const T *gs = grad_soft_mask.const_data_ptr<T>(), *gm = grad_masked_weight.const_data_ptr<T>();
    const T *w = weight.const_data_ptr<T>(), *s = soft_mask.const_data_ptr<T>();
    T *gl = grad_logits.mutable_data_ptr<T>(), *gw = grad_weight.mutable_data_ptr<T>();
    parallel_over_chunks(soft_mask.size(0), numel, [&](int64_t e, int64_t begin, int64_t end) {
      const int64_t at = e * numel;
      const ConcreteMaskGradient<T> arguments{gs + at, gm + at, w + e * weight_stride, s + at,
                                              gl + at, gw + at, temperature};
      SPARSE_GEN_DISPATCH(concrete_mask_gradient, arguments, begin, end);
    });
  });
  return {grad_logits, grad_weight};
}

void concrete_mask_update(const Tensor& logits, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                          const Tensor& masked_weight, const Tensor& weight, const Tensor& grad_masked_weight,
                          const Tensor& seed, const Tensor& step, int64_t stream, double temperature, double kl_weight,
                          double prior, double lr, double beta1, double beta2, double eps) {
  const int64_t numel = logits.size(1), weight_stride = experiment_stride(weight);
  const int64_t* seeds = seed.const_data_ptr<int64_t>();
  const int64_t at_step = *step.const_data_ptr<int64_t>();
  const double step_size = lr / (1 - std::pow(beta1, (double)(at_step + 1)));
  const double root_correction2 = std::sqrt(1 - std::pow(beta2, (double)(at_step + 1)));
  for_float_type(logits, [&](auto type) {
    using T = decltype(type);
    T *l = logits.mutable_data_ptr<T>(), *m = exp_avg.mutable_data_ptr<T>(), *v = exp_avg_sq.mutable_data_ptr<T>();
    T* mw = masked_weight.mutable_data_ptr<T>();
    const T *w = weight.const_data_ptr<T>(), *g = grad_masked_weight.const_data_ptr<T>();
    parallel_over_chunks(logits.size(0), numel, [&](int64_t e, int64_t begin, int64_t end) {
      const int64_t at = e * numel;
      const ConcreteMaskUpdate<T> arguments{
          l + at, m + at,      v + at,    mw + at, w + e * weight_stride, g + at, seeds[e],  at_step,
          stream, temperature, kl_weight, prior,   beta1,                 beta2,  eps,       step_size,
          root_correction2};
      SPARSE_GEN_DISPATCH(concrete_mask_update, arguments, begin, end);
    });
  });
}

}  // namespace sparse_gen

STABLE_TORCH_LIBRARY_IMPL(sparse_gen, CPU, m) {
  m.impl("concrete_mask", TORCH_BOX(&sparse_gen::concrete_mask));
  m.impl("concrete_mask_backward", TORCH_BOX(&sparse_gen::concrete_mask_backward));
  m.impl("concrete_mask_update", TORCH_BOX(&sparse_gen::concrete_mask_update));
}
