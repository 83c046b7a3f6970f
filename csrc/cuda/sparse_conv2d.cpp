#include "cuda/sparse_conv2d.h"

#include <optional>
#include <tuple>

#include "cuda/conv_binding.h"
#include "cuda/on_device.h"

namespace sparse_gen {

namespace {

// How far the rows and planes of an experiment's image, which may lie apart, reach.
int64_t reach(const Tensor& x, int64_t padding) { return x.size(1) * x.stride(1) + padding * x.stride(2); }

cuda::ConvPattern pattern_of(const Tensor& taps, const Tensor& by_output, const Tensor& by_input,
                             const Tensor& input_order) {
  return {taps.const_data_ptr<int32_t>(), integers(by_output), integers(by_input), integers(input_order)};
}

// Rows may lie apart, pixels of a row do not.
template <class T>
cuda::Image<T> image_of(const Tensor& x, const std::optional<Tensor>& load) {
  return {x.const_data_ptr<T>(), load ? load->const_data_ptr<T>() : nullptr, x.stride(0), static_cast<int>(x.stride(1)),
          static_cast<int>(x.stride(2))};
}

}  // namespace

Tensor sparse_conv2d_cuda(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, const Tensor& taps,
                          const Tensor& by_output, const Tensor& by_input, const Tensor& input_order,
                          int64_t out_channels, int64_t kernel_h, int64_t kernel_w, int64_t stride, int64_t padding,
                          int64_t mode, const std::optional<Tensor>& load) {
  const OnDevice device(x);
  device.expect_here("values and pattern", values, taps, by_output, by_input, input_order);
  if (load) device.expect_here("the load", *load);
  const cuda::ConvShape shape =
      conv_shape_of(x, values, out_channels, kernel_h, kernel_w, stride, padding, mode, reach(x, padding));
  const cuda::ConvPattern pattern = pattern_of(taps, by_output, by_input, input_order);
  Tensor out = torch::stable::new_empty(x, {x.size(0), out_channels, shape.out_h(), shape.out_w()});
  for_float_type(x, [&](auto type) {
    using T = decltype(type);
    device.check(cuda::sparse_conv2d_forward(shape, pattern, image_of<T>(x, load), values.const_data_ptr<T>(),
                                             bias ? bias->const_data_ptr<T>() : nullptr, out.mutable_data_ptr<T>(),
                                             device.stream()));
  });
  return out;
}

std::tuple<Tensor, Tensor> sparse_conv2d_backward_cuda(const Tensor& grad_out, const Tensor& x, const Tensor& values,
                                                       const Tensor& taps, const Tensor& by_output,
                                                       const Tensor& by_input, const Tensor& input_order,
                                                       int64_t out_channels, int64_t kernel_h, int64_t kernel_w,
                                                       int64_t stride, int64_t padding, int64_t mode,
                                                       const std::optional<Tensor>& load, bool needs_grad_x,
                                                       bool needs_grad_values) {
  const OnDevice device(x);
  device.expect_here("gradient, values and pattern", grad_out, values, taps, by_output, by_input, input_order);
  if (load) device.expect_here("the load", *load);
  const cuda::ConvShape shape =
      conv_shape_of(x, values, out_channels, kernel_h, kernel_w, stride, padding, mode, reach(x, padding));
  const cuda::ConvPattern pattern = pattern_of(taps, by_output, by_input, input_order);
  // Contiguous, however x lies.
  Tensor grad_x = needs_grad_x ? torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)})
                               : torch::stable::new_empty(x, {0});
  Tensor grad_values = needs_grad_values ? torch::stable::empty_like(values) : torch::stable::new_empty(x, {0});
  for_float_type(x, [&](auto type) {
    using T = decltype(type);
    const T* gradient = grad_out.const_data_ptr<T>();
    if (needs_grad_x)
      device.check(cuda::sparse_conv2d_backward_x(shape, pattern, gradient, values.const_data_ptr<T>(),
                                                  grad_x.mutable_data_ptr<T>(), device.stream()));
    if (needs_grad_values) {
      Tensor partial = torch::stable::new_empty(x, {cuda::sparse_conv2d_partial_size(shape)});
      device.check(cuda::sparse_conv2d_backward_values(shape, pattern, gradient, image_of<T>(x, load),
                                                       partial.mutable_data_ptr<T>(), grad_values.mutable_data_ptr<T>(),
                                                       device.stream()));
    }
  });
  return {grad_x, grad_values};
}

}  // namespace sparse_gen

STABLE_TORCH_LIBRARY_IMPL(sparse_gen, CUDA, m) {
  m.impl("sparse_conv2d", TORCH_BOX(&sparse_gen::sparse_conv2d_cuda));
  m.impl("sparse_conv2d_backward", TORCH_BOX(&sparse_gen::sparse_conv2d_backward_cuda));
}
