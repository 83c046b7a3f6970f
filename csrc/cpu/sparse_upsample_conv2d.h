#pragma once

#include "isa.h"
#include "padding.h"

namespace sparse_gen {

// The small image of a ×2 up-sampling convolution, cut into strips of whole rows: row y lies strip_rows to a strip,
// without gaps, and strip s in slot s % slots of a plane.
struct TapImage {
  long long height, width;  // of the small image
  long long kernel_h, kernel_w, padding, mode, upsample;
  long long strip_rows, strip_stride, slots;

  long long place(long long row) const {
    return row / strip_rows % slots * strip_stride + row % strip_rows * width;
  }
};

// Rows in the scratch of the functions below begin with kRowBefore elements and end with kRowBehind, which shifts by a
// tap and whole vectors reach.
constexpr long long kRowBefore = 16, kRowBehind = 32;
inline long long tap_row(const TapImage& image) { return kRowBefore + image.width + kRowBehind; }
// Elements that they need.
inline long long tap_scratch(const TapImage& image) { return (2 * image.kernel_w + 6) * tap_row(image); }

// clang-format off
SPARSE_GEN_DECLARE(
  // Output rows 2 first .. 2 last - 1 of one channel: out (2 height × 2 width) = bias + every tap's plane up-sampled
  // ×2, padded and shifted by the tap. Plane (ky, kx) is the small image convolved with that tap's weights
  // alone and begins at taps + (ky * kernel_w + kx) * plane_stride.
  void assemble_taps(const TapImage&, const float* taps, long long plane_stride, long long first, long long last,
                     float bias, float* out, float* scratch);
  void assemble_taps(const TapImage&, const double* taps, long long plane_stride, long long first, long long last,
                     double bias, double* out, double* scratch);

  // The adjoint: the output's gradient added up in rows first .. last - 1 of each tap's plane, which lie without gaps
  // from taps + tap * plane_stride on.
  void spread_taps(const TapImage&, const float* grad_out, long long first, long long last, float* taps,
                   long long plane_stride, float* scratch);
  void spread_taps(const TapImage&, const double* grad_out, long long first, long long last, double* taps,
                   long long plane_stride, double* scratch);
)
// clang-format on

}  // namespace sparse_gen
