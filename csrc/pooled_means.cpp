#include "cpu/pooled_means.h"

#include <optional>

#include "binding.h"
#include "load.h"
#include "scratch.h"

namespace sparse_gen {

namespace {

// Calls body(channel, scratch) for every channel of every experiment, in parallel.
template <class T, class Body>
void parallel_over_images(int64_t images, const PaddedImage& padded, const Body& body) {
  torch::stable::parallel_for(0, images, 1, [&](int64_t first, int64_t last) {
    T* sums = scratch<T>(0, 3 * (padded.width + 2 * padded.padding));
    for (int64_t i = first; i < last; ++i) body(i, sums);
  });
}

}  // namespace

// x (E, C, H, W), read through load (E, C, 5) if given, to (E, C, H + 2 padding - 1, W + 2 padding - 1).
Tensor pooled_means(const Tensor& x, const std::optional<Tensor>& load, int64_t padding, int64_t mode) {
  const PaddedImage padded{x.size(2), x.size(3), padding, mode};
  Tensor means = torch::stable::empty({x.size(0), x.size(1), padded.rows(), padded.columns()}, x.scalar_type());
  for_float_type(x, [&](auto type) {
    using T = decltype(type);
    const T* from = x.const_data_ptr<T>();
    T* to = means.mutable_data_ptr<T>();
    const Load<T>* loads = loads_of<T>(load, 0);
    parallel_over_images<T>(x.size(0) * x.size(1), padded, [&](int64_t i, T* sums) {
      SPARSE_GEN_DISPATCH(pooled_means, padded, from + i * padded.height * padded.width,
                          loads ? loads + i : nullptr, to + i * padded.rows() * padded.columns(), sums);
    });
  });
  return means;
}

Tensor pooled_means_backward(const Tensor& grad_means, int64_t padding, int64_t mode) {
  const PaddedImage padded{grad_means.size(2) + 1 - 2 * padding, grad_means.size(3) + 1 - 2 * padding, padding, mode};
  Tensor grad_x =
      torch::stable::empty({grad_means.size(0), grad_means.size(1), padded.height, padded.width}, grad_means.scalar_type());
  for_float_type(grad_means, [&](auto type) {
    using T = decltype(type);
    const T* from = grad_means.const_data_ptr<T>();
    T* to = grad_x.mutable_data_ptr<T>();
    parallel_over_images<T>(grad_means.size(0) * grad_means.size(1), padded, [&](int64_t i, T* sums) {
      SPARSE_GEN_DISPATCH(pooled_means_gradient, padded, from + i * padded.rows() * padded.columns(),
                          to + i * padded.height * padded.width, sums);
    });
  });
  return grad_x;
}

}  // namespace sparse_gen

STABLE_TORCH_LIBRARY_IMPL(sparse_gen, CPU, m) {
  m.impl("pooled_means", TORCH_BOX(&sparse_gen::pooled_means));
  m.impl("pooled_means_backward", TORCH_BOX(&sparse_gen::pooled_means_backward));
}
