#pragma once

#include "isa.h"

namespace sparse_gen {

// One output channel's tap planes: plane (ky, kx) is the small image convolved with that tap's weights alone.
struct TapPlanes {
  long long height, width;  // of the small image
  long long kernel_h, kernel_w, padding, mode;
  long long stride;  // from one tap's plane to the next
};

// clang-format off
SPARSE_GEN_DECLARE(
  // out (2 height × 2 width) = bias + every tap's plane up-sampled ×2 (nearest), padded and shifted by the tap.
  // scratch holds 2 * width elements.
  void assemble_taps(const TapPlanes&, const float* taps, float bias, float* out, float* scratch);
  void assemble_taps(const TapPlanes&, const double* taps, double bias, double* out, double* scratch);

  // The adjoint: the output's gradient added up in each tap's plane; scratch holds 4 * height * width elements.
  void spread_taps(const TapPlanes&, const float* grad_out, float* taps, float* scratch);
  void spread_taps(const TapPlanes&, const double* grad_out, double* taps, double* scratch);
)
// clang-format on

}  // namespace sparse_gen
