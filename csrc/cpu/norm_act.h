#pragma once

#include "isa.h"

namespace sparse_gen {

// clang-format off
SPARSE_GEN_DECLARE(
  // One channel of one experiment: statistics of x, then y = LeakyReLU(gamma * (x - mean) * rstd + beta).
  void norm_act(const float* x, float* y, long long count, float gamma, float beta, double eps, double slope,
                float* mean, float* rstd);
  void norm_act(const double* x, double* y, long long count, double gamma, double beta, double eps, double slope,
                double* mean, double* rstd);

  // Its gradients; what the activation did is found again from x.
  void norm_act_backward(const float* grad_y, const float* x, float* grad_x, long long count, float gamma, float beta,
                         float mean, float rstd, double slope, float* grad_gamma, float* grad_beta);
  void norm_act_backward(const double* grad_y, const double* x, double* grad_x, long long count, double gamma,
                         double beta, double mean, double rstd, double slope, double* grad_gamma, double* grad_beta);
)
// clang-format on

}  // namespace sparse_gen
