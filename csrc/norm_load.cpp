#include "cpu/norm_load.h"

#include <optional>
#include <tuple>

#include "binding.h"

namespace sparse_gen {

namespace {

template <class T>
ChannelNorms<T> norms_of(const Tensor& gamma, const Tensor& beta, double slope, const std::optional<Tensor>& gamma2,
                         const std::optional<Tensor>& beta2, int64_t i) {
  return {gamma.const_data_ptr<T>()[i], beta.const_data_ptr<T>()[i], (T)slope, gamma2.has_value(),
          gamma2 ? gamma2->const_data_ptr<T>()[i] : T(1), beta2 ? beta2->const_data_ptr<T>()[i] : T(0)};
}

}  // namespace

// x (E, C, H, W); gamma, beta, gamma2 and beta2 (E, C), the last two may be missing; returns loads (E, C, 5) and
// moments (E, C, 4).
std::tuple<Tensor, Tensor> norm_load(const Tensor& x, const Tensor& gamma, const Tensor& beta, double eps, double slope,
                                     const std::optional<Tensor>& gamma2, const std::optional<Tensor>& beta2,
                                     double eps2) {
  Tensor load = torch::stable::empty({x.size(0), x.size(1), 5}, x.scalar_type());
  Tensor moments = torch::stable::empty({x.size(0), x.size(1), 4}, x.scalar_type());
  const int64_t count = x.size(2) * x.size(3);
  for_float_type(x, [&](auto type) {
    using T = decltype(type);
    static_assert(sizeof(Load<T>) == 5 * sizeof(T) && sizeof(ChannelMoments<T>) == 4 * sizeof(T));
    const T* in = x.const_data_ptr<T>();
    auto* loads = reinterpret_cast<Load<T>*>(load.mutable_data_ptr<T>());
    auto* found = reinterpret_cast<ChannelMoments<T>*>(moments.mutable_data_ptr<T>());
    torch::stable::parallel_for(0, gamma.numel(), 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const ChannelNorms<T> norms = norms_of<T>(gamma, beta, slope, gamma2, beta2, i);
        SPARSE_GEN_DISPATCH(norm_load, in + i * count, count, norms, eps, eps2, loads + i, found + i);
      }
    });
  });
  return {load, moments};
}

// x (E, C, H, W) as a reader with load (E, C, 5) sees it.
Tensor apply_load(const Tensor& x, const Tensor& load) {
  Tensor y = torch::stable::empty_like(x);
  const int64_t count = x.size(2) * x.size(3);
  for_float_type(x, [&](auto type) {
    using T = decltype(type);
    const T* from = x.const_data_ptr<T>();
    T* to = y.mutable_data_ptr<T>();
    const auto* loads = reinterpret_cast<const Load<T>*>(load.const_data_ptr<T>());
    torch::stable::parallel_for(0, x.size(0) * x.size(1), 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) SPARSE_GEN_DISPATCH(apply_load, from + i * count, to + i * count, count, loads[i]);
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_load_backward(
    const Tensor& grad, const Tensor& x, const Tensor& gamma, const Tensor& beta, double slope,
    const std::optional<Tensor>& gamma2, const std::optional<Tensor>& beta2, const Tensor& moments) {
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grads[4] = {torch::stable::empty_like(gamma), torch::stable::empty_like(gamma),
                     torch::stable::empty_like(gamma), torch::stable::empty_like(gamma)};
  const int64_t count = x.size(2) * x.size(3);
  for_float_type(x, [&](auto type) {
    using T = decltype(type);
    const T *g = grad.const_data_ptr<T>(), *in = x.const_data_ptr<T>();
    const auto* found = reinterpret_cast<const ChannelMoments<T>*>(moments.const_data_ptr<T>());
    T* to = grad_x.mutable_data_ptr<T>();
    T* out[4];
    for (int k = 0; k < 4; ++k) out[k] = grads[k].mutable_data_ptr<T>();
    torch::stable::parallel_for(0, gamma.numel(), 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const ChannelNorms<T> norms = norms_of<T>(gamma, beta, slope, gamma2, beta2, i);
        ChannelGradients<T> own;
        SPARSE_GEN_DISPATCH(norm_load_backward, g + i * count, in + i * count, to + i * count, count, norms, found[i], &own);
        out[0][i] = own.gamma, out[1][i] = own.beta, out[2][i] = own.gamma2, out[3][i] = own.beta2;
      }
    });
  });
  return {grad_x, grads[0], grads[1], grads[2], grads[3]};
}

}  // namespace sparse_gen

STABLE_TORCH_LIBRARY_IMPL(sparse_gen, CPU, m) {
  m.impl("apply_load", TORCH_BOX(&sparse_gen::apply_load));
  m.impl("norm_load", TORCH_BOX(&sparse_gen::norm_load));
  m.impl("norm_load_backward", TORCH_BOX(&sparse_gen::norm_load_backward));
}
