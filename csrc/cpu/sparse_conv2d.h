#pragma once

#include "isa.h"
#include "norm_load.h"

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
  // `channels` channels of x, whose rows and planes lie x_pitch and x_plane apart, as output rows first .. last - 1 see
  // them: element ((channel * copies + copy) * stride + phase) * (last - first + shifts_h - 1) * pitch + row * pitch +
  // column, for column < width, is padded row stride * (first + row) + phase, padded column stride * column + copy; zeros
  // from there to pitch. The loads, one a channel, may be null; room holds a row of x.
  void shift_input(const ConvShape&, const float* x, long long x_plane, long long x_pitch, const Load<float>* load,
                   long long channels, long long first, long long last, long long copies, long long width,
                   long long pitch, float* to, float* room);
  void shift_input(const ConvShape&, const double* x, long long x_plane, long long x_pitch, const Load<double>* load,
                   long long channels, long long first, long long last, long long copies, long long width,
                   long long pitch, double* to, double* room);

  // The output's gradient as phase rows first .. last - 1 of the padded input see it, zeros around it: element
  // (channel * copies + copy) * (last - first + shifts_h - 1) * pitch + row * pitch + column is output row
  // first + row - (shifts_h - 1), output column column - shift - copy.
  void shift_gradient(const ConvShape&, const float* grad_out, long long channels, long long first, long long last,
                      long long copies, long long shift, long long pitch, float* to);
  void shift_gradient(const ConvShape&, const double* grad_out, long long channels, long long first, long long last,
                      long long copies, long long shift, long long pitch, double* to);

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
