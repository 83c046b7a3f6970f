#pragma once

#include "isa.h"

namespace sparse_gen {

// A dense convolution as products of small matrices. What is convolved is the source: the padded image, or with
// `means` its 2×2 means, whose convolution of stride 2 is the image's convolution, pooled.
struct TileConvolution {
  long long in_channels, out_channels, height, width;  // of the image
  long long kernel_h, kernel_w, stride, padding, mode;
  bool means;

  long long source_h() const { return height + 2 * padding - means; }
  long long source_w() const { return width + 2 * padding - means; }
  long long out_h() const { return (source_h() - kernel_h) / stride + 1; }
  long long out_w() const { return (source_w() - kernel_w) / stride + 1; }
  long long taps() const { return kernel_h * kernel_w; }
  // Rows and columns of the output that one source row or column reaches back to.
  long long reach_h() const { return (kernel_h - 1) / stride; }
  long long reach_w() const { return (kernel_w - 1) / stride; }
  // With stride 2, even and odd rows and columns of the source lie apart: then every tap sees its inputs, row after
  // row, as one run of elements shifted by a constant, as it does with stride 1.
  long long phases() const { return stride * stride; }
  long long phase_h() const { return max(out_h() + reach_h(), (source_h() + stride - 1) / stride); }
  long long phase_w() const { return max(out_w() + reach_w(), (source_w() + stride - 1) / stride); }

 private:
  static long long max(long long a, long long b) { return a > b ? a : b; }
};

constexpr long long kMostTileTaps = 121;
constexpr long long kTileSlack = 64;  // elements behind a row that a vector may read or write

// Elements of one channel of the source's phases for `rows` output rows, and of one channel of the output's gradient
// for `rows` rows of the source's phases, with the zeros around it.
inline long long tile_plane(long long elements) { return (elements + kTileSlack + 15) / 32 * 32 + 16; }

// clang-format off
SPARSE_GEN_DECLARE(
  // The source rows that output rows first .. last - 1 see, a channel every `stride` elements, its phases every
  // (last - first + reach_h) * phase_w. scratch holds a row of it.
  void tile_source(const TileConvolution&, const float* x, long long first, long long last, float* to, long long stride, float* scratch);
  void tile_source(const TileConvolution&, const double* x, long long first, long long last, double* to, long long stride, double* scratch);

  // Output rows first .. last - 1 of channels from .. to - 1; room holds (to - from) * room_stride.
  void tile_forward(const TileConvolution&, const float* source, long long stride, const float* weight, const float* bias, long long from, long long to, long long first, long long last, float* room, long long room_stride, float* out);
  void tile_forward(const TileConvolution&, const double* source, long long stride, const double* weight, const double* bias, long long from, long long to, long long first, long long last, double* room, long long room_stride, double* out);

  // Rows first - reach_h .. last - 1 of the output's gradient with zeros around, a channel every `stride` elements.
  void tile_gradient(const TileConvolution&, const float* grad_out, long long first, long long last, float* to, long long stride);
  void tile_gradient(const TileConvolution&, const double* grad_out, long long first, long long last, double* to, long long stride);

  // The gradient of the source's phases, their rows first .. last - 1, of input channels from .. to - 1; a channel of
  // the result every result_stride elements, its phases every phase_h * phase_w.
  void tile_grad_source(const TileConvolution&, const float* gradient, long long stride, const float* weight, long long from, long long to, long long first, long long last, float* room, long long room_stride, float* result, long long result_stride);
  void tile_grad_source(const TileConvolution&, const double* gradient, long long stride, const double* weight, long long from, long long to, long long first, long long last, double* room, long long room_stride, double* result, long long result_stride);

  // The image's gradient of one channel from its source's; scratch holds two rows of the padded image.
  void tile_fold(const TileConvolution&, const float* grad_source, float* grad_x, float* scratch);
  void tile_fold(const TileConvolution&, const double* grad_source, double* grad_x, double* scratch);

  // Source rows first .. last - 1 with the channels innermost, every channel_stride of them a pixel; scratch holds
  // in_channels * tile_plane(source_w).
  void tile_pixels(const TileConvolution&, const float* x, long long first, long long last, float* to, long long channel_stride, float* scratch);
  void tile_pixels(const TileConvolution&, const double* x, long long first, long long last, double* to, long long channel_stride, double* scratch);

  // grad_weight as (out_channels * kernel_h, kernel_w * channel_stride, each row `stride` on), from output rows
  // first .. last - 1; channels from .. to - 1 of it; added to where `add`. pixels begin at source row first * stride.
  void tile_grad_weight(const TileConvolution&, const float* grad_out, const float* pixels, long long channel_stride, long long from, long long to, long long first, long long last, bool add, float* grad, long long stride);
  void tile_grad_weight(const TileConvolution&, const double* grad_out, const double* pixels, long long channel_stride, long long from, long long to, long long first, long long last, bool add, double* grad, long long stride);
)
// clang-format on

}  // namespace sparse_gen
