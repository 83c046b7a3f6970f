#include "cpu/norm_act.h"

#include <tuple>

#include "binding.h"

namespace sparse_gen {

// x (E, C, H, W), gamma and beta (E, C); returns y, and mean and 1 / deviation of each channel, (E, C).
std::tuple<Tensor, Tensor, Tensor> norm_act(const Tensor& x, const Tensor& gamma, const Tensor& beta, double eps,
                                            double slope) {
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = torch::stable::empty_like(gamma), rstd = torch::stable::empty_like(gamma);
  const int64_t count = x.size(2) * x.size(3);
  for_float_type(x, [&](auto type) {
    using T = decltype(type);
    const T *in = x.const_data_ptr<T>(), *g = gamma.const_data_ptr<T>(), *b = beta.const_data_ptr<T>();
    T *out = y.mutable_data_ptr<T>(), *m = mean.mutable_data_ptr<T>(), *r = rstd.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, gamma.numel(), 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        SPARSE_GEN_DISPATCH(norm_act, in + i * count, out + i * count, count, g[i], b[i], eps, slope, m + i, r + i);
    });
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> norm_act_backward(const Tensor& grad_y, const Tensor& x, const Tensor& gamma,
                                                     const Tensor& beta, const Tensor& mean, const Tensor& rstd,
                                                     double slope) {
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_gamma = torch::stable::empty_like(gamma), grad_beta = torch::stable::empty_like(gamma);
  const int64_t count = x.size(2) * x.size(3);
  for_float_type(x, [&](auto type) {
    using T = decltype(type);
    const T *gy = grad_y.const_data_ptr<T>(), *in = x.const_data_ptr<T>(), *g = gamma.const_data_ptr<T>();
    const T *b = beta.const_data_ptr<T>(), *m = mean.const_data_ptr<T>(), *r = rstd.const_data_ptr<T>();
    T *gx = grad_x.mutable_data_ptr<T>(), *gg = grad_gamma.mutable_data_ptr<T>(), *gb = grad_beta.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, gamma.numel(), 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        SPARSE_GEN_DISPATCH(norm_act_backward, gy + i * count, in + i * count, gx + i * count, count, g[i], b[i], m[i],
                            r[i], slope, gg + i, gb + i);
    });
  });
  return {grad_x, grad_gamma, grad_beta};
}

}  // namespace sparse_gen

STABLE_TORCH_LIBRARY_IMPL(sparse_gen, CPU, m) {
  m.impl("norm_act", TORCH_BOX(&sparse_gen::norm_act));
  m.impl("norm_act_backward", TORCH_BOX(&sparse_gen::norm_act_backward));
}
