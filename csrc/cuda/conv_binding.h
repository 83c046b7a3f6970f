// What the bindings of convolutions of kept weights share: their shape as the kernels take it.
#pragma once

#include <limits>

#include "binding.h"
#include "cuda/conv_shape.h"

namespace sparse_gen {

inline int number(int64_t n) { return static_cast<int>(n); }

// Kernels count an experiment's elements in int; `reach` is how far the image's may lie apart.
inline cuda::ConvShape conv_shape_of(const Tensor& x, const Tensor& values, int64_t out_channels, int64_t kernel_h,
                                     int64_t kernel_w, int64_t stride, int64_t padding, int64_t mode, int64_t reach = 0) {
  const int64_t height = x.size(2) + 2 * padding, width = x.size(3) + 2 * padding;
  const int64_t channels = x.size(1) > out_channels ? x.size(1) : out_channels;
  const int64_t elements = channels * height * width;
  STD_TORCH_CHECK((elements > reach ? elements : reach) <= std::numeric_limits<int>::max(),
                  "expected at most 2147483647 elements an experiment, got ", channels, " padded planes of ", height,
                  " x ", width);
  return {number(x.size(0)),    number(x.size(1)), number(x.size(2)), number(x.size(3)), number(out_channels),
          number(kernel_h),     number(kernel_w),  number(stride),    number(padding),   number(mode),
          number(values.size(1))};
}

}  // namespace sparse_gen
