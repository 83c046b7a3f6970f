#include "cpu/sparse_upsample_conv2d.h"

#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "binding.h"
#include "correlate.h"
#include "scratch.h"

namespace sparse_gen {

namespace {

struct UpLayer {
  int64_t in_channels, out_channels;
  TapPlanes taps;

  int64_t pixels() const { return taps.height * taps.width; }
  int64_t tap_count() const { return taps.kernel_h * taps.kernel_w; }
  int64_t planes() const { return out_channels * tap_count(); }
};

UpLayer layer_of(const Tensor& x, int64_t out_channels, int64_t kernel_h, int64_t kernel_w, int64_t padding,
                 int64_t mode) {
  const int64_t pixels = x.size(2) * x.size(3);
  return {x.size(1), out_channels, {x.size(2), x.size(3), kernel_h, kernel_w, padding, mode, pixels + kPlaneSlack}};
}

// The small image with room behind it for the last vector.
template <class T>
const T* with_slack(const T* x, int64_t count, T* to) {
  std::memcpy(to, x, count * sizeof(T));
  std::memset(to + count, 0, kPlaneSlack * sizeof(T));
  return to;
}

// Kept weights in the order of their tap planes: each one's input channel.
std::vector<long long> tap_offsets(const UpLayer& layer, const Tensor& taps, const Tensor& tap_order) {
  const int32_t* channel = taps.const_data_ptr<int32_t>() + taps.size(1);
  const int64_t* order = tap_order.const_data_ptr<int64_t>();
  std::vector<long long> offset(taps.size(1));
  for (size_t k = 0; k < offset.size(); ++k) offset[k] = channel[order[k]] * layer.pixels();
  return offset;
}

const long long* starts(const Tensor& tensor) {
  return reinterpret_cast<const long long*>(tensor.const_data_ptr<int64_t>());
}

}  // namespace

// x (E, in, h, w), values (E, kept); by_tap (out * taps + 1,) and tap_order (kept,) group the weights by output
// channel and tap, by_input (in + 1,) and input_order by input channel.
Tensor sparse_upsample_conv2d(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
                              const Tensor& taps, const Tensor& by_tap, const Tensor& tap_order,
                              const Tensor& /*by_input*/, const Tensor& /*input_order*/, int64_t out_channels,
                              int64_t kernel_h, int64_t kernel_w, int64_t padding, int64_t mode) {
  const UpLayer layer = layer_of(x, out_channels, kernel_h, kernel_w, padding, mode);
  const int64_t pixels = layer.pixels(), image = layer.in_channels * pixels, kept = values.size(1);
  Tensor out = torch::stable::empty({x.size(0), out_channels, 2 * x.size(2), 2 * x.size(3)}, x.scalar_type());
  const std::vector<long long> offset = tap_offsets(layer, taps, tap_order);
  const int64_t* order = tap_order.const_data_ptr<int64_t>();
  for_float_type(x, [&](auto type) {
    using T = decltype(type);
    T* room = scratch<T>(0, image + kPlaneSlack);
    T* tap_planes = scratch<T>(1, layer.planes() * layer.taps.stride);
    T* ordered = scratch<T>(2, kept);
    for (int64_t e = 0; e < x.size(0); ++e) {
      const T* source = with_slack(x.const_data_ptr<T>() + e * image, image, room);
      for (int64_t k = 0; k < kept; ++k) ordered[k] = values.const_data_ptr<T>()[e * kept + order[k]];
      const SparsePlanes<T> planes{starts(by_tap), offset.data(), ordered};
      const PlaneRows<T> rows{tap_planes, layer.taps.stride, pixels, pixels, nullptr};
      correlate(planes, source, rows, layer.planes(), pixels);
      T* to = out.mutable_data_ptr<T>() + e * out_channels * 4 * pixels;
      const T* b = bias ? bias->const_data_ptr<T>() + e * out_channels : nullptr;
      torch::stable::parallel_for(0, out_channels, 1, [&](int64_t first, int64_t last) {
        T* line = scratch<T>(3, 2 * layer.taps.width);
        for (int64_t o = first; o < last; ++o)
          SPARSE_GEN_DISPATCH(assemble_taps, layer.taps, tap_planes + o * layer.tap_count() * layer.taps.stride,
                              b ? b[o] : T(0), to + o * 4 * pixels, line);
      });
    }
  });
  return out;
}

std::tuple<Tensor, Tensor> sparse_upsample_conv2d_backward(const Tensor& grad_out, const Tensor& x,
                                                           const Tensor& values, const Tensor& taps,
                                                           const Tensor& by_tap, const Tensor& tap_order,
                                                           const Tensor& by_input, const Tensor& input_order,
                                                           int64_t out_channels, int64_t kernel_h, int64_t kernel_w,
                                                           int64_t padding, int64_t mode, bool needs_grad_x,
                                                           bool needs_grad_values) {
  const UpLayer layer = layer_of(x, out_channels, kernel_h, kernel_w, padding, mode);
  const int64_t pixels = layer.pixels(), image = layer.in_channels * pixels, kept = values.size(1);
  const int64_t stride = layer.taps.stride, planes_size = layer.planes() * stride;
  Tensor grad_x = needs_grad_x ? torch::stable::empty_like(x) : torch::stable::empty({0}, x.scalar_type());
  Tensor grad_values = needs_grad_values ? torch::stable::empty_like(values) : torch::stable::empty({0}, x.scalar_type());
  const int32_t *out = taps.const_data_ptr<int32_t>(), *ky = out + 2 * kept, *kx = out + 3 * kept;
  const int64_t* by_channel = input_order.const_data_ptr<int64_t>();
  const int64_t* order = tap_order.const_data_ptr<int64_t>();
  std::vector<long long> plane_offset(needs_grad_x ? kept : 0);
  for (size_t k = 0; k < plane_offset.size(); ++k) {
    const int64_t at = by_channel[k];
    plane_offset[k] = ((out[at] * kernel_h + ky[at]) * kernel_w + kx[at]) * stride;
  }
  const std::vector<long long> offset = tap_offsets(layer, taps, tap_order);

  for_float_type(x, [&](auto type) {
    using T = decltype(type);
    T* tap_planes = scratch<T>(1, planes_size + kPlaneSlack);
    for (int64_t e = 0; e < x.size(0); ++e) {
      const T* gradient = grad_out.const_data_ptr<T>() + e * out_channels * 4 * pixels;
      torch::stable::parallel_for(0, out_channels, 1, [&](int64_t first, int64_t last) {
        T* halves = scratch<T>(3, 4 * pixels);
        for (int64_t o = first; o < last; ++o)
          SPARSE_GEN_DISPATCH(spread_taps, layer.taps, gradient + o * 4 * pixels, tap_planes + o * layer.tap_count() * stride,
                              halves);
      });
      std::memset(tap_planes + planes_size, 0, kPlaneSlack * sizeof(T));
      const T* own_values = values.const_data_ptr<T>() + e * kept;
      T* ordered = scratch<T>(2, kept);
      if (needs_grad_x) {
        for (int64_t k = 0; k < kept; ++k) ordered[k] = own_values[by_channel[k]];
        const SparsePlanes<T> planes{starts(by_input), plane_offset.data(), ordered};
        const PlaneRows<T> rows{grad_x.mutable_data_ptr<T>() + e * image, pixels, pixels, pixels, nullptr};
        correlate(planes, static_cast<const T*>(tap_planes), rows, layer.in_channels, pixels);
      }
      if (needs_grad_values) {
        const T* source = with_slack(x.const_data_ptr<T>() + e * image, image, scratch<T>(0, image + kPlaneSlack));
        const SparsePlanes<T> planes{starts(by_tap), offset.data(), nullptr};
        torch::stable::parallel_for(0, layer.planes(), 1, [&](int64_t first, int64_t last) {
          void* sums = scratch<char>(3, (planes.start[last] - planes.start[first]) * 64);
          SPARSE_GEN_DISPATCH(sparse_dot, planes, source, tap_planes, stride, pixels, first, last, ordered, sums);
        });
        T* result = grad_values.mutable_data_ptr<T>() + e * kept;
        for (int64_t k = 0; k < kept; ++k) result[order[k]] = ordered[k];
      }
    }
  });
  return {grad_x, grad_values};
}

}  // namespace sparse_gen

STABLE_TORCH_LIBRARY_IMPL(sparse_gen, CPU, m) {
  m.impl("sparse_upsample_conv2d", TORCH_BOX(&sparse_gen::sparse_upsample_conv2d));
  m.impl("sparse_upsample_conv2d_backward", TORCH_BOX(&sparse_gen::sparse_upsample_conv2d_backward));
}
