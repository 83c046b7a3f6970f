// What the bindings of `masked_conv2d`'s layouts share: their experiments, one after the other.
#pragma once

#include <optional>
#include <tuple>

#include "binding.h"
#include "cpu/masked_conv2d_taps.h"
#include "cpu/masked_conv2d_tiles.h"

namespace sparse_gen {

// x (E, in, H, W) and weight (E, out, in, kh, kw).
inline TileConvolution tile_convolution(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding,
                                        int64_t mode, bool pool) {
  return {x.size(1), weight.size(1), x.size(2), x.size(3), weight.size(3), weight.size(4), pool ? 2 : stride, padding,
          mode,      pool};
}

inline TapConvolution tap_convolution(const Tensor& x, const Tensor& weight, int64_t padding, int64_t mode,
                                      bool bilinear) {
  return {x.size(1), weight.size(1), x.size(2), x.size(3), weight.size(3), padding, mode, bilinear};
}

// Where experiment e begins.
template <class T>
const T* experiment(const Tensor& tensor, int64_t e) {
  return tensor.const_data_ptr<T>() + e * (tensor.numel() / tensor.size(0));
}
template <class T>
T* mutable_experiment(Tensor& tensor, int64_t e) {
  return tensor.mutable_data_ptr<T>() + e * (tensor.numel() / tensor.size(0));
}

// Calls body(x, weight, bias or null, out) for every experiment.
template <class T, class Body>
void forward_each(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, Tensor& out,
                  const Body& body) {
  for (int64_t e = 0; e < x.size(0); ++e)
    body(experiment<T>(x, e), experiment<T>(weight, e), bias ? experiment<T>(*bias, e) : nullptr,
         mutable_experiment<T>(out, e));
}

// Calls body(grad_out, x, weight, grad_x or null, grad_weight or null) for every experiment, and gives the gradients;
// those that are not needed are empty.
template <class T, class Body>
std::tuple<Tensor, Tensor> backward_each(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                         bool needs_grad_x, bool needs_grad_weight, const Body& body) {
  const auto like = [&](const Tensor& tensor, bool needed) {
    return needed ? torch::stable::empty_like(tensor) : torch::stable::empty({0}, x.scalar_type());
  };
  Tensor grad_x = like(x, needs_grad_x), grad_weight = like(weight, needs_grad_weight);
  for (int64_t e = 0; e < x.size(0); ++e)
    body(experiment<T>(grad_out, e), experiment<T>(x, e), experiment<T>(weight, e),
         needs_grad_x ? mutable_experiment<T>(grad_x, e) : nullptr,
         needs_grad_weight ? mutable_experiment<T>(grad_weight, e) : nullptr);
  return {grad_x, grad_weight};
}

}  // namespace sparse_gen
