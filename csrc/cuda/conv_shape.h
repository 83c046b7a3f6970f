#pragma once

#include "host_device.h"

namespace sparse_gen::cuda {

// The shape of one convolution; a plane is one channel of one experiment.
struct ConvShape {
  int experiments, in_channels, height, width, out_channels, kernel_h, kernel_w, stride, padding, mode;
  int kept;  // weights of one experiment

  SPARSE_GEN_HD int out_h() const { return (height + 2 * padding - kernel_h) / stride + 1; }
  SPARSE_GEN_HD int out_w() const { return (width + 2 * padding - kernel_w) / stride + 1; }
  SPARSE_GEN_HD int plane() const { return height * width; }
  SPARSE_GEN_HD int out_plane() const { return out_h() * out_w(); }
  // The stride is 1 or 2; a GPU divides by a number it does not know in some twenty instructions.
  SPARSE_GEN_HD int odd() const { return stride - 1; }
  SPARSE_GEN_HD int halved(int length) const { return (length + odd()) >> odd(); }
};

}  // namespace sparse_gen::cuda
