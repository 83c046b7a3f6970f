#pragma once

#include "isa.h"
#include "norm_load.h"

namespace sparse_gen {

// One channel's image and its padding; the means are (height + 2 padding - 1) rows of (width + 2 padding - 1).
struct PaddedImage {
  long long height, width, padding, mode;

  long long rows() const { return height + 2 * padding - 1; }
  long long columns() const { return width + 2 * padding - 1; }
};

// clang-format off
SPARSE_GEN_DECLARE(
  // The mean of every 2×2 window of the padded image, at stride 1; the image is read through a load, if there is one.
  // scratch holds 3 * (width + 2 * padding) elements.
  void pooled_means(const PaddedImage&, const float* x, const Load<float>* load, float* means, float* scratch);
  void pooled_means(const PaddedImage&, const double* x, const Load<double>* load, double* means, double* scratch);

  // The adjoint: grad_x from the means' gradient.
  void pooled_means_gradient(const PaddedImage&, const float* grad_means, float* grad_x, float* scratch);
  void pooled_means_gradient(const PaddedImage&, const double* grad_means, double* grad_x, double* scratch);
)
// clang-format on

}  // namespace sparse_gen
