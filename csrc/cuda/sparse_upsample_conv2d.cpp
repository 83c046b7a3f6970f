#include "cuda/sparse_upsample_conv2d.h"

#include <limits>
#include <optional>
#include <tuple>

#include "cuda/on_device.h"

namespace sparse_gen {

namespace {

cuda::UpShape shape_of(const Tensor& x, const Tensor& values, int64_t out_channels, int64_t kernel, int64_t padding,
                       int64_t mode, int64_t upsample) {
  const int64_t height = x.size(2), width = x.size(3);
  const int64_t channels = x.size(1) > out_channels ? x.size(1) : out_channels;
  STD_TORCH_CHECK(channels * height * width <= std::numeric_limits<int>::max() / 4,
                  "expected at most 536870911 elements an experiment before up-sampling, got ", channels,
                  " planes of ", height, " x ", width);
  const auto number = [](int64_t n) { return static_cast<int>(n); };
  return {number(x.size(0)),    number(x.size(1)), number(height),  number(width), number(out_channels),
          number(kernel),       number(padding),   number(mode),    number(upsample),
          number(values.size(1))};
}

cuda::TapPattern pattern_of(const Tensor& taps, const Tensor& by_tap, const Tensor& tap_order, const Tensor& by_input,
                            const Tensor& input_order) {
  return {taps.const_data_ptr<int32_t>(), integers(by_tap), integers(tap_order), integers(by_input),
          integers(input_order)};
}

template <class T>
cuda::SmallImage<T> image_of(const Tensor& x, const std::optional<Tensor>& load) {
  return {x.const_data_ptr<T>(), load ? load->const_data_ptr<T>() : nullptr};
}

// The kernels read rows in pairs of pixels, which a contiguous view of another tensor need not begin with.
template <class T>
Tensor in_pairs(const Tensor& gradient) {
  const bool aligned = reinterpret_cast<uintptr_t>(gradient.const_data_ptr<T>()) % (2 * sizeof(T)) == 0;
  return aligned ? gradient : torch::stable::clone(gradient);
}

}  // namespace

// The kernel is square: sparse_gen/ops checks it.
Tensor sparse_upsample_conv2d_cuda(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
                                   const Tensor& taps, const Tensor& by_tap, const Tensor& tap_order,
                                   const Tensor& by_input, const Tensor& input_order, int64_t out_channels,
                                   int64_t kernel_h, int64_t /*kernel_w*/, int64_t padding, int64_t mode,
                                   int64_t upsample, const std::optional<Tensor>& load) {
  const OnDevice device(x);
  device.expect_here("values and pattern", values, taps, by_tap, tap_order, by_input, input_order);
  if (load) device.expect_here("the load", *load);
  const cuda::UpShape shape = shape_of(x, values, out_channels, kernel_h, padding, mode, upsample);
  const cuda::TapPattern pattern = pattern_of(taps, by_tap, tap_order, by_input, input_order);
  Tensor out = torch::stable::new_empty(x, {x.size(0), out_channels, 2 * x.size(2), 2 * x.size(3)});
  for_float_type(x, [&](auto type) {
    using T = decltype(type);
    device.check(cuda::sparse_upsample_conv2d_forward(shape, pattern, image_of<T>(x, load), values.const_data_ptr<T>(),
                                                      bias ? bias->const_data_ptr<T>() : nullptr,
                                                      out.mutable_data_ptr<T>(), device.stream()));
  });
  return out;
}

std::tuple<Tensor, Tensor> sparse_upsample_conv2d_backward_cuda(
    const Tensor& grad_out, const Tensor& x, const Tensor& values, const Tensor& taps, const Tensor& by_tap,
    const Tensor& tap_order, const Tensor& by_input, const Tensor& input_order, int64_t out_channels, int64_t kernel_h,
    int64_t /*kernel_w*/, int64_t padding, int64_t mode, int64_t upsample, const std::optional<Tensor>& load,
    bool needs_grad_x, bool needs_grad_values) {
  const OnDevice device(x);
  device.expect_here("gradient, values and pattern", grad_out, values, taps, by_tap, tap_order, by_input, input_order);
  if (load) device.expect_here("the load", *load);
  const cuda::UpShape shape = shape_of(x, values, out_channels, kernel_h, padding, mode, upsample);
  const cuda::TapPattern pattern = pattern_of(taps, by_tap, tap_order, by_input, input_order);
  Tensor grad_x = needs_grad_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor grad_values = needs_grad_values ? torch::stable::empty_like(values) : torch::stable::new_empty(x, {0});
  if (!needs_grad_x && !needs_grad_values) return {grad_x, grad_values};
  for_float_type(x, [&](auto type) {
    using T = decltype(type);
    const Tensor gradient = in_pairs<T>(grad_out);
    Tensor partial = torch::stable::new_empty(
        x, {needs_grad_values ? cuda::sparse_upsample_conv2d_partial_size(shape) : 0});
    device.check(cuda::sparse_upsample_conv2d_backward(
        shape, pattern, gradient.const_data_ptr<T>(), image_of<T>(x, load), values.const_data_ptr<T>(),
        partial.mutable_data_ptr<T>(), needs_grad_x ? grad_x.mutable_data_ptr<T>() : nullptr,
        needs_grad_values ? grad_values.mutable_data_ptr<T>() : nullptr, device.stream()));
  });
  return {grad_x, grad_values};
}

}  // namespace sparse_gen

STABLE_TORCH_LIBRARY_IMPL(sparse_gen, CUDA, m) {
  m.impl("sparse_upsample_conv2d", TORCH_BOX(&sparse_gen::sparse_upsample_conv2d_cuda));
  m.impl("sparse_upsample_conv2d_backward", TORCH_BOX(&sparse_gen::sparse_upsample_conv2d_backward_cuda));
}
