#pragma once

#include "isa.h"

namespace sparse_gen {

// The shape of one convolution, in padded coordinates: padded row y is image row y - padding. With stride 2 padded rows
// and columns are told apart by their parity, the phase, so that every weight again sees a contiguous shift.
struct ConvShape {
  long long in_channels, height, width, out_channels, kernel_h, kernel_w, stride, padding, mode;

  long long out_h() const { return (height + 2 * padding - kernel_h) / stride + 1; }
  long long out_w() const { return (width + 2 * padding - kernel_w) / stride + 1; }
  long long phases() const { return stride * stride; }
  // Padded rows and columns of one phase.
  long long rows() const { return (height + 2 * padding + stride - 1) / stride; }
  long long columns() const { return (width + 2 * padding + stride - 1) / stride; }
  // Shifts of one phase.
  long long shifts_h() const { return (kernel_h - 1) / stride + 1; }
  long long shifts_w() const { return (kernel_w - 1) / stride + 1; }
};

// clang-format off
SPARSE_GEN_DECLARE(
  // For `channels` channels of x and every kernel column, what output rows first .. last - 1 see through it: element
  // ((channel * kernel_w + kx) * stride + phase) * (last - first + shifts_h - 1) * pitch + row * pitch + column is
  // padded row stride * (first + row) + phase, padded column stride * column + kx.
  void shift_input(const ConvShape&, const float* x, long long channels, long long first, long long last,
                   long long pitch, float* to);
  void shift_input(const ConvShape&, const double* x, long long channels, long long first, long long last,
                   long long pitch, double* to);

  // The output's gradient as phase rows first .. last - 1 of the padded input see it, zeros around it: element
  // (channel * shifts_w + shift) * (last - first + shifts_h - 1) * pitch + row * pitch + column is output row
  // first + row - (shifts_h - 1), output column column - shift.
  void shift_gradient(const ConvShape&, const float* grad_out, long long channels, long long first, long long last,
                      long long pitch, float* to);
  void shift_gradient(const ConvShape&, const double* grad_out, long long channels, long long first, long long last,
                      long long pitch, double* to);

  // Adds padded rows begin .. end - 1 of `channels` channels to the rows of x's gradient that they came from. The plane
  // of (channel, row phase, column phase) begins at padded + ((channel * stride + row phase) * stride + column phase) *
  // plane_stride with phase row `first`.
  void fold_rows(const ConvShape&, const float* padded, long long plane_stride, long long pitch, long long first,
                 long long channels, long long begin, long long end, float* grad_x);
  void fold_rows(const ConvShape&, const double* padded, long long plane_stride, long long pitch, long long first,
                 long long channels, long long begin, long long end, double* grad_x);

  // to[channel * to_stride + y * to_pitch + x] = from[channel * from_stride + y * from_pitch + x] + bias[channel], which
  // may be null; zeros from column `width` to to_pitch.
  void copy_rows(const float* from, long long from_stride, long long from_pitch, float* to, long long to_stride,
                 long long to_pitch, long long channels, long long rows, long long width, const float* bias);
  void copy_rows(const double* from, long long from_stride, long long from_pitch, double* to, long long to_stride,
                 long long to_pitch, long long channels, long long rows, long long width, const double* bias);
)
// clang-format on

}  // namespace sparse_gen
