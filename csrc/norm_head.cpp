#include "cpu/norm_head.h"

#include <optional>
#include <tuple>
#include <vector>

#include "binding.h"

namespace sparse_gen {

namespace {

// Calls body(begin, end) over tiles of pixels, in parallel.
template <class Body>
void parallel_over_tiles(int64_t count, const Body& body) {
  const int64_t tiles = (count + kHeadTile - 1) / kHeadTile;
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const int64_t end = (t + 1) * kHeadTile;
      body(t, t * kHeadTile, end < count ? end : count);
    }
  });
}

template <class T>
Head<T> head_of(const Tensor& x, const Tensor& gamma, const Tensor& beta, const Tensor& weight, const Tensor& mean,
                const Tensor& rstd, double slope, int64_t e) {
  const int64_t channels = x.size(1), outputs = weight.size(1), count = x.size(2) * x.size(3);
  const auto row = [&](const Tensor& tensor) { return tensor.const_data_ptr<T>() + e * channels; };
  return {x.const_data_ptr<T>() + e * channels * count, channels, outputs, count, row(gamma), row(beta), row(mean),
          row(rstd), weight.const_data_ptr<T>() + e * outputs * channels, (T)slope};
}

}  // namespace

// x (E, C, H, W), gamma and beta (E, C), weight (E, out, C), bias (E, out) or none; returns out, and mean and
// 1 / deviation of each channel, (E, C).
std::tuple<Tensor, Tensor, Tensor> norm_head(const Tensor& x, const Tensor& gamma, const Tensor& beta,
                                             const Tensor& weight, const std::optional<Tensor>& bias, double eps,
                                             double slope) {
  const int64_t outputs = weight.size(1), count = x.size(2) * x.size(3);
  Tensor out = torch::stable::empty({x.size(0), outputs, x.size(2), x.size(3)}, x.scalar_type());
  Tensor mean = torch::stable::empty_like(gamma), rstd = torch::stable::empty_like(gamma);
  for_float_type(x, [&](auto type) {
    using T = decltype(type);
    const T* in = x.const_data_ptr<T>();
    T *m = mean.mutable_data_ptr<T>(), *r = rstd.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, gamma.numel(), 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) SPARSE_GEN_DISPATCH(norm_moments, in + i * count, count, eps, m + i, r + i);
    });
    for (int64_t e = 0; e < x.size(0); ++e) {
      const Head<T> head = head_of<T>(x, gamma, beta, weight, mean, rstd, slope, e);
      const T* b = bias ? bias->const_data_ptr<T>() + e * outputs : nullptr;
      T* to = out.mutable_data_ptr<T>() + e * outputs * count;
      parallel_over_tiles(count, [&](int64_t, int64_t begin, int64_t end) {
        SPARSE_GEN_DISPATCH(norm_head, head, b, to, begin, end);
      });
    }
  });
  return {out, mean, rstd};
}

namespace {

// The gradients of gamma, beta and weight; that of x goes to grad_x, which may be x.
std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& grad_out, const Tensor& x, const Tensor& gamma,
                                             const Tensor& beta, const Tensor& weight, const Tensor& mean,
                                             const Tensor& rstd, double slope, Tensor& grad_x) {
  const int64_t channels = x.size(1), outputs = weight.size(1), count = x.size(2) * x.size(3), each = outputs + 2;
  Tensor grad_weight = torch::stable::empty_like(weight);
  Tensor grad_gamma = torch::stable::empty_like(gamma), grad_beta = torch::stable::empty_like(gamma);
  for_float_type(x, [&](auto type) {
    using T = decltype(type);
    for (int64_t e = 0; e < x.size(0); ++e) {
      const Head<T> head = head_of<T>(x, gamma, beta, weight, mean, rstd, slope, e);
      const T* g = grad_out.const_data_ptr<T>() + e * outputs * count;
      // A row of sums a tile, added up in the tiles' order: the same bits from any number of threads.
      const int64_t tiles = (count + kHeadTile - 1) / kHeadTile;
      std::vector<double> partial(tiles * channels * each), total(channels * each), first_two(channels * 2);
      parallel_over_tiles(count, [&](int64_t tile, int64_t begin, int64_t end) {
        SPARSE_GEN_DISPATCH(norm_head_sums, head, g, partial.data() + tile * channels * each, begin, end);
      });
      for (int64_t t = 0; t < tiles; ++t)
        for (int64_t k = 0; k < channels * each; ++k) total[k] += partial[t * channels * each + k];
      T *gg = grad_gamma.mutable_data_ptr<T>() + e * channels, *gb = grad_beta.mutable_data_ptr<T>() + e * channels;
      T* gw = grad_weight.mutable_data_ptr<T>() + e * outputs * channels;
      for (int64_t c = 0; c < channels; ++c) {
        gb[c] = (T)(first_two[2 * c] = total[c * each]);
        gg[c] = (T)(first_two[2 * c + 1] = total[c * each + 1]);
        for (int64_t o = 0; o < outputs; ++o) gw[o * channels + c] = (T)total[c * each + 2 + o];
      }
      T* gx = grad_x.mutable_data_ptr<T>() + e * channels * count;
      parallel_over_tiles(count, [&](int64_t, int64_t begin, int64_t end) {
        SPARSE_GEN_DISPATCH(norm_head_gradient, head, g, first_two.data(), gx, begin, end);
      });
    }
  });
  return {grad_gamma, grad_beta, grad_weight};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_head_backward(const Tensor& grad_out, const Tensor& x,
                                                              const Tensor& gamma, const Tensor& beta,
                                                              const Tensor& weight, const Tensor& mean,
                                                              const Tensor& rstd, double slope) {
  Tensor grad_x = torch::stable::empty_like(x);
  const auto [grad_gamma, grad_beta, grad_weight] =
      gradients(grad_out, x, gamma, beta, weight, mean, rstd, slope, grad_x);
  return {grad_x, grad_gamma, grad_beta, grad_weight};
}

// x becomes its gradient.
std::tuple<Tensor, Tensor, Tensor> norm_head_backward_(const Tensor& grad_out, Tensor x, const Tensor& gamma,
                                                       const Tensor& beta, const Tensor& weight, const Tensor& mean,
                                                       const Tensor& rstd, double slope) {
  return gradients(grad_out, x, gamma, beta, weight, mean, rstd, slope, x);
}

}  // namespace sparse_gen

STABLE_TORCH_LIBRARY_IMPL(sparse_gen, CPU, m) {
  m.impl("norm_head", TORCH_BOX(&sparse_gen::norm_head));
  m.impl("norm_head_backward_", TORCH_BOX(&sparse_gen::norm_head_backward_));
  m.impl("norm_head_backward", TORCH_BOX(&sparse_gen::norm_head_backward));
}
