// Launchers of the up-sampling sparse convolution's CUDA kernels: raw device pointers and a stream. Each returns the
// CUDA error in words, or null.
#pragma once

#include "host_device.h"

namespace sparse_gen::cuda {

// The shape of one convolution; height and width are the small image's, and the output is twice as large.
struct UpShape {
  int experiments, in_channels, height, width, out_channels, kernel, padding, mode, upsample;
  int kept;  // weights of one experiment

  SPARSE_GEN_HD int taps() const { return kernel * kernel; }
  SPARSE_GEN_HD int plane() const { return height * width; }
  SPARSE_GEN_HD int out_plane() const { return 4 * plane(); }
};

// taps (4, kept) are output channel, input channel, row and column; by_tap (out * taps + 1,) and by_input (in + 1,) say
// where each group's weights begin in tap_order and input_order (kept,).
struct TapPattern {
  const int* taps;
  const long long* by_tap;
  const long long* tap_order;
  const long long* by_input;
  const long long* input_order;
};

// x (E, in, height, width), read through a load a channel (sparse_gen/ops/norm_load.py): (E, in, 5), or null.
template <class T>
struct SmallImage {
  const T *data, *load;
};

// out (E, out, 2 height, 2 width) of x, values (E, kept) and bias (E, out) or null.
const char* sparse_upsample_conv2d_forward(const UpShape&, const TapPattern&, const SmallImage<float>& x,
                                           const float* values, const float* bias, float* out, void* stream);
const char* sparse_upsample_conv2d_forward(const UpShape&, const TapPattern&, const SmallImage<double>& x,
                                           const double* values, const double* bias, double* out, void* stream);

// Elements of `partial` below.
long long sparse_upsample_conv2d_partial_size(const UpShape&);
// Every element of grad_x and grad_values; either may be null.
const char* sparse_upsample_conv2d_backward(const UpShape&, const TapPattern&, const float* grad_out,
                                            const SmallImage<float>& x, const float* values, float* partial,
                                            float* grad_x, float* grad_values, void* stream);
const char* sparse_upsample_conv2d_backward(const UpShape&, const TapPattern&, const double* grad_out,
                                            const SmallImage<double>& x, const double* values, double* partial,
                                            double* grad_x, double* grad_values, void* stream);

}  // namespace sparse_gen::cuda
