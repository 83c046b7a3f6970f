#include <algorithm>

#include "cpu/sum_transposed.h"
#include "masked_conv2d.h"
#include "scratch.h"

namespace sparse_gen {

namespace {

// Elements of the tap planes that are worked on at a time: forward, one channel's planes in a core's first cache;
// backward, all channels' in its second, together with what is read and written beside them.
constexpr int64_t kForwardElements = 9216, kBackwardElements = 196608;
// From this many pixels on, bands of rows are worked off in parallel; below, the steps one after the other, each in
// parallel.
constexpr int64_t kBandPixels = 1024;

int64_t rows_at_a_time(const TapConvolution& c, int64_t planes, int64_t elements) {
  return std::clamp<int64_t>(elements / (planes * c.width), 1, c.height);
}

// Output rows 2 * first to 2 * last - 1 of the channels from .. to - 1. What the next rows need of the rows before is
// kept, so that no tap plane is computed twice.
template <class T>
void forward_band(const TapConvolution& c, const T* x, const T* weight, const T* bias, T* out, int64_t from,
                  int64_t to, int64_t first, int64_t last) {
  const int64_t halo = c.halo();
  const int64_t begin = std::max<int64_t>(first - halo, 0), end = std::min<int64_t>(last + halo, c.height);
  const int64_t step = rows_at_a_time(c, c.taps(), kForwardElements);
  const int64_t stride = row_stride(step * c.width), half_stride = 2 * row_stride(c.width);
  const int64_t half_rows = step + 2 * halo;
  T* source = scratch<T>(0, c.in_channels * stride);
  T* planes = scratch<T>(1, c.taps() * stride);
  T* halves = scratch<T>(2, (to - from) * c.kernel * half_rows * half_stride);
  int64_t done = first;
  for (int64_t row = begin; row < end; row += step) {
    const TapRows<T> rows{planes, stride, row, std::min(row + step, end)};
    SPARSE_GEN_DISPATCH(copy_rows, c, x, row, rows.last, source, stride);
    const int64_t ready = std::max(done, rows.last == c.height ? last : std::min<int64_t>(last, rows.last - halo));
    for (int64_t o = from; o < to; ++o) {
      const TapHalves<T> own{halves + (o - from) * c.kernel * half_rows * half_stride, half_stride, half_rows};
      SPARSE_GEN_DISPATCH(tap_planes, c, source, stride, weight, o, o + 1, rows);
      SPARSE_GEN_DISPATCH(tap_columns, c, rows, own);
      SPARSE_GEN_DISPATCH(tap_output, c, own, bias ? bias[o] : T(0), done, ready, out + o * 4 * c.height * c.width);
    }
    done = ready;
  }
}

template <class T>
void spread_channels(const TapConvolution& c, const T* grad_out, const TapRows<T>& planes, int64_t from, int64_t to) {
  T* room = scratch<T>(3, 2 * row_stride(c.width + 2 * kSpreadMargin));
  SPARSE_GEN_DISPATCH(tap_spread, c, grad_out, from, to, planes, room);
}

// The parts' sum, from (out * taps, in) to (out, in, taps).
template <class T>
void collect_grad_weight(const TapConvolution& c, const T* parts, int64_t count, int64_t part, int64_t stride,
                         T* grad_weight) {
  torch::stable::parallel_for(0, c.out_channels, 1, [&](int64_t first, int64_t last) {
    T* room = scratch<T>(3, transposed_elements(c.taps(), stride));
    for (int64_t o = first; o < last; ++o)
      SPARSE_GEN_DISPATCH(sum_transposed, parts + o * c.taps() * stride, count, part, c.taps(), c.in_channels, stride,
                          grad_weight + o * c.in_channels * c.taps(), room);
  });
}

template <class T>
struct Gradients {
  T *x, *weight;  // either may be null
};

template <class T>
void backward_in_bands(const TapConvolution& c, const T* grad_out, const T* x, const T* weight,
                       const Gradients<T>& grads) {
  const int64_t planes_count = c.out_channels * c.taps();
  const int64_t step = rows_at_a_time(c, planes_count, kBackwardElements);
  const int64_t stride = row_stride(step * c.width), weight_stride = row_stride(c.in_channels);
  const int64_t part = planes_count * weight_stride;
  // A fixed number of bands, so that the sum over them does not depend on the number of threads; fewer where each
  // one's gradient of the weight is large.
  const int64_t bands = std::min<int64_t>(std::clamp<int64_t>(524288 / part / 2 * 2, 2, 16), c.height);
  T* parts = grads.weight ? scratch<T>(2, bands * part) : nullptr;
  torch::stable::parallel_for(0, bands, 1, [&](int64_t first_band, int64_t last_band) {
    T* planes = scratch<T>(0, planes_count * stride);
    T* room = scratch<T>(1, c.in_channels * stride + step * c.width * weight_stride);
    T* transposed = room + c.in_channels * stride;
    for (int64_t band = first_band; band < last_band; ++band) {
      const int64_t begin = band * c.height / bands, end = (band + 1) * c.height / bands;
      for (int64_t row = begin; row < end; row += step) {
        const TapRows<T> rows{planes, stride, row, std::min(row + step, end)};
        spread_channels(c, grad_out, rows, 0, c.out_channels);
        if (grads.x) SPARSE_GEN_DISPATCH(tap_grad_x, c, rows, weight, 0, c.in_channels, room, stride, grads.x);
        if (!grads.weight) continue;
        SPARSE_GEN_DISPATCH(copy_rows, c, x, row, rows.last, room, stride);
        SPARSE_GEN_DISPATCH(transpose_rows, room, stride, c.in_channels, (rows.last - row) * c.width, transposed,
                            weight_stride);
        SPARSE_GEN_DISPATCH(tap_grad_weight, c, rows, transposed, weight_stride, 0, planes_count, row != begin,
                            parts + band * part, weight_stride);
      }
    }
  });
  if (grads.weight) collect_grad_weight(c, parts, bands, part, weight_stride, grads.weight);
}

template <class T>
void backward_at_once(const TapConvolution& c, const T* grad_out, const T* x, const T* weight,
                      const Gradients<T>& grads) {
  const int64_t planes_count = c.out_channels * c.taps(), pixels = c.height * c.width;
  const int64_t stride = row_stride(pixels), weight_stride = row_stride(c.in_channels);
  const TapRows<T> rows{scratch<T>(0, planes_count * stride), stride, 0, c.height};
  torch::stable::parallel_for(0, c.out_channels, 1, [&](int64_t first, int64_t last) {
    spread_channels(c, grad_out, rows, first, last);
  });
  T* room = scratch<T>(1, c.in_channels * stride + pixels * weight_stride);
  if (grads.x) {
    constexpr int64_t kGroup = 24;
    torch::stable::parallel_for(0, (c.in_channels + kGroup - 1) / kGroup, 1, [&](int64_t first, int64_t last) {
      const int64_t from = first * kGroup, to = std::min<int64_t>(last * kGroup, c.in_channels);
      SPARSE_GEN_DISPATCH(tap_grad_x, c, rows, weight, from, to, room + from * stride, stride, grads.x);
    });
  }
  if (grads.weight) {
    T* transposed = room + c.in_channels * stride;
    T* sums = scratch<T>(2, planes_count * weight_stride);
    SPARSE_GEN_DISPATCH(copy_rows, c, x, 0, c.height, room, stride);
    SPARSE_GEN_DISPATCH(transpose_rows, room, stride, c.in_channels, pixels, transposed, weight_stride);
    torch::stable::parallel_for(0, c.out_channels, 1, [&](int64_t first, int64_t last) {
      SPARSE_GEN_DISPATCH(tap_grad_weight, c, rows, transposed, weight_stride, first * c.taps(), last * c.taps(), false,
                          sums, weight_stride);
    });
    collect_grad_weight(c, sums, 1, 0, weight_stride, grads.weight);
  }
}

}  // namespace

// x (E, in, h, w), weight (E, out, in, k, k), bias (E, out); returns (E, out, 2 h, 2 w).
Tensor masked_conv2d_taps(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t padding,
                          int64_t mode, bool bilinear) {
  const TapConvolution c = tap_convolution(x, weight, padding, mode, bilinear);
  Tensor out = torch::stable::empty({x.size(0), c.out_channels, 2 * x.size(2), 2 * x.size(3)}, x.scalar_type());
  // Few groups of channels where there are bands of rows to deal out: each one reads all of x.
  const int64_t bands = std::clamp<int64_t>(c.height / 64, 1, 16);
  const int64_t group = std::max<int64_t>(bands >= 4 ? 32 : 8, (c.out_channels + 3) / 4);
  const int64_t groups = (c.out_channels + group - 1) / group;
  for_float_type(x, [&](auto type) {
    using T = decltype(type);
    torch::stable::parallel_for(0, x.size(0) * bands * groups, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t e = task / (bands * groups), band = task / groups % bands, from = task % groups * group;
        forward_band(c, experiment<T>(x, e), experiment<T>(weight, e), bias ? experiment<T>(*bias, e) : nullptr,
                     mutable_experiment<T>(out, e), from,
                     std::min<int64_t>(from + group, c.out_channels), band * c.height / bands,
                     (band + 1) * c.height / bands);
      }
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> masked_conv2d_taps_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                                       int64_t padding, int64_t mode, bool bilinear, bool needs_grad_x,
                                                       bool needs_grad_weight) {
  const TapConvolution c = tap_convolution(x, weight, padding, mode, bilinear);
  return for_float_type(x, [&](auto type) {
    using T = decltype(type);
    const auto backward = c.height * c.width < kBandPixels ? backward_at_once<T> : backward_in_bands<T>;
    return backward_each<T>(grad_out, x, weight, needs_grad_x, needs_grad_weight,
                            [&](const T* gradient, const T* image, const T* weights, T* grad_x, T* grad_weight) {
                              backward(c, gradient, image, weights, {grad_x, grad_weight});
                            });
  });
}

}  // namespace sparse_gen

STABLE_TORCH_LIBRARY_IMPL(sparse_gen, CPU, m) {
  m.impl("masked_conv2d_taps", TORCH_BOX(&sparse_gen::masked_conv2d_taps));
  m.impl("masked_conv2d_taps_backward", TORCH_BOX(&sparse_gen::masked_conv2d_taps_backward));
}
