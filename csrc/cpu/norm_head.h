#pragma once

#include "isa.h"

namespace sparse_gen {

// One experiment's head. Planes of `count` pixels follow one another.
template <class T>
struct Head {
  const T* x;  // `channels` planes
  long long channels, outputs, count;
  const T *gamma, *beta, *mean, *rstd;  // one a channel
  const T* weight;                      // outputs × channels
  T slope;
};

// Pixels handled at once: their gradients stay in the second-level cache while every channel passes over them.
constexpr long long kHeadTile = 4096;
constexpr int kMostOutputs = 4;

// clang-format off
SPARSE_GEN_DECLARE(
  // Mean and 1 / deviation of one channel.
  void norm_moments(const float* x, long long count, double eps, float* mean, float* rstd);
  void norm_moments(const double* x, long long count, double eps, double* mean, double* rstd);

  // out (outputs planes) for the pixels begin .. end - 1; bias may be null.
  void norm_head(const Head<float>&, const float* bias, float* out, long long begin, long long end);
  void norm_head(const Head<double>&, const double* bias, double* out, long long begin, long long end);

  // Sums over those pixels, outputs + 2 a channel: of the gradient behind the activation, of its product with the
  // normalised value, and of each output's gradient with the activation's value.
  void norm_head_sums(const Head<float>&, const float* grad_out, double* sums, long long begin, long long end);
  void norm_head_sums(const Head<double>&, const double* grad_out, double* sums, long long begin, long long end);

  // grad_x for those pixels, from the first two sums over all of them (2 a channel).
  void norm_head_gradient(const Head<float>&, const float* grad_out, const double* sums, float* grad_x, long long begin, long long end);
  void norm_head_gradient(const Head<double>&, const double* grad_out, const double* sums, double* grad_x, long long begin, long long end);
)
// clang-format on

}  // namespace sparse_gen
