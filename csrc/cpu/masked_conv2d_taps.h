#pragma once

#include "isa.h"

namespace sparse_gen {

// A dense convolution behind ×2 up-sampling by the tap fold. A tap plane is the small image convolved with one output
// channel's weights of one tap; the output is their sum, up-sampled, padded and shifted.
struct TapConvolution {
  long long in_channels, out_channels, height, width;  // of the small image
  long long kernel, padding, mode;
  bool bilinear;

  long long taps() const { return kernel * kernel; }
  // Small rows above and below one that its two output rows see.
  long long halo() const { return (padding + 1) / 2 + (bilinear ? 1 : 0); }
};

constexpr long long kMostTaps = 11;  // along one axis
constexpr long long kSpreadMargin = 16;
constexpr long long kRowSlack = 64;  // elements behind a row that a vector may read or write

// Elements from one row of a matrix to the next: an odd number of cache lines, since rows a power of two apart would
// all want the same places in the cache.
constexpr long long row_stride(long long columns) { return (columns + kRowSlack + 15) / 32 * 32 + 16; }

// A part of the tap planes: small rows `first` to `last`, every output channel and tap a row of the matrix.
template <class T>
struct TapRows {
  T* data;
  long long stride, first, last;
};

// One output channel's planes added up over the tap columns: for each tap row ky and small row r the even output
// columns and, half a stride on, the odd ones. It holds the last `rows` small rows.
template <class T>
struct TapHalves {
  T* data;
  long long stride, rows;

  T* row(long long ky, long long r) const { return data + (ky * rows + r % rows) * stride; }
};

// clang-format off
SPARSE_GEN_DECLARE(
  // Rows first to last of the small image, (channels × pixels), each `stride` from the next, and its transpose.
  void copy_rows(const TapConvolution&, const float* x, long long first, long long last, float* to, long long stride);
  void copy_rows(const TapConvolution&, const double* x, long long first, long long last, double* to, long long stride);
  void transpose_rows(const float* from, long long from_stride, long long rows, long long columns, float* to, long long to_stride);
  void transpose_rows(const double* from, long long from_stride, long long rows, long long columns, double* to, long long to_stride);

  // The tap planes of output channels from .. to - 1; x from copy_rows.
  void tap_planes(const TapConvolution&, const float* x, long long x_stride, const float* weight, long long from, long long to, const TapRows<float>&);
  void tap_planes(const TapConvolution&, const double* x, long long x_stride, const double* weight, long long from, long long to, const TapRows<double>&);

  // Adds up one output channel's tap columns.
  void tap_columns(const TapConvolution&, const TapRows<float>& channel, const TapHalves<float>&);
  void tap_columns(const TapConvolution&, const TapRows<double>& channel, const TapHalves<double>&);

  // Output rows 2 * first to 2 * last - 1 of one channel.
  void tap_output(const TapConvolution&, const TapHalves<float>&, float bias, long long first, long long last, float* out);
  void tap_output(const TapConvolution&, const TapHalves<double>&, double bias, long long first, long long last, double* out);

  // The adjoint: the gradient of output channels from .. to - 1 added up in their tap planes; scratch holds twice
  // row_stride(width + 2 * kSpreadMargin).
  void tap_spread(const TapConvolution&, const float* grad_out, long long from, long long to, const TapRows<float>&, float* scratch);
  void tap_spread(const TapConvolution&, const double* grad_out, long long from, long long to, const TapRows<double>&, double* scratch);

  // grad_x of the planes' rows and of input channels from .. to - 1, from the tap planes of all output channels. Whole
  // vectors are written to `room`, (to - from, room_stride), and copied.
  void tap_grad_x(const TapConvolution&, const TapRows<float>& planes, const float* weight, long long from, long long to, float* room, long long room_stride, float* grad_x);
  void tap_grad_x(const TapConvolution&, const TapRows<double>& planes, const double* weight, long long from, long long to, double* room, long long room_stride, double* grad_x);

  // grad_weight as (out_channels * taps × in_channels, stride), rows begin .. end - 1, added to where `add`; x transposed.
  void tap_grad_weight(const TapConvolution&, const TapRows<float>& planes, const float* x, long long x_stride, long long begin, long long end, bool add, float* grad, long long stride);
  void tap_grad_weight(const TapConvolution&, const TapRows<double>& planes, const double* x, long long x_stride, long long begin, long long end, bool add, double* grad, long long stride);
)
// clang-format on

}  // namespace sparse_gen
