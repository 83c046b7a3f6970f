// Launchers of the sparse convolution's CUDA kernels: raw device pointers and a stream. Each returns the CUDA error in
// words, or null.
#pragma once

#include "conv_shape.h"

namespace sparse_gen::cuda {

// x (E, in, height, width), whose planes and rows may lie apart, and whose pixels may be read through a load a channel
// (sparse_gen/ops/norm_load.py): (E, in, 5), or null.
template <class T>
struct Image {
  const T *data, *load;
  long long experiment;
  int plane, row;
};

// taps (4, kept) are output channel, input channel, row and column; by_output (out + 1,) and by_input (in * stride² + 1,)
// say where each group's weights begin, the latter in input_order (kept,).
struct ConvPattern {
  const int* taps;
  const long long* by_output;
  const long long* by_input;
  const long long* input_order;
};

// out (E, out, out_h, out_w) of x, values (E, kept) and bias (E, out) or null.
const char* sparse_conv2d_forward(const ConvShape&, const ConvPattern&, const Image<float>& x, const float* values,
                                  const float* bias, float* out, void* stream);
const char* sparse_conv2d_forward(const ConvShape&, const ConvPattern&, const Image<double>& x, const double* values,
                                  const double* bias, double* out, void* stream);

// grad_x, every element of it, by a gather from grad_out.
const char* sparse_conv2d_backward_x(const ConvShape&, const ConvPattern&, const float* grad_out, const float* values,
                                     float* grad_x, void* stream);
const char* sparse_conv2d_backward_x(const ConvShape&, const ConvPattern&, const double* grad_out, const double* values,
                                     double* grad_x, void* stream);

// Elements of `partial` below; none are needed where the pixels are so few that nothing is left to add up.
long long sparse_conv2d_partial_size(const ConvShape&);
const char* sparse_conv2d_backward_values(const ConvShape&, const ConvPattern&, const float* grad_out, const Image<float>& x,
                                          float* partial, float* grad_values, void* stream);
const char* sparse_conv2d_backward_values(const ConvShape&, const ConvPattern&, const double* grad_out, const Image<double>& x,
                                          double* partial, double* grad_values, void* stream);

}  // namespace sparse_gen::cuda
