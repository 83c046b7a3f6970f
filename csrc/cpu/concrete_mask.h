#pragma once

#include "isa.h"

namespace sparse_gen {

// One experiment's soft mask and masked weight; pointers are to contiguous elements.
template <class T>
struct ConcreteMaskSample {
  const T* logits;
  const T* weight;
  T* soft_mask;
  T* masked_weight;
  long long seed, step, stream;
  double temperature;
};

// One experiment's gradients, from the soft mask alone.
template <class T>
struct ConcreteMaskGradient {
  const T* grad_soft_mask;
  const T* grad_masked_weight;
  const T* weight;
  const T* soft_mask;
  T* grad_logits;
  T* grad_weight;
  double temperature;
};

// One experiment's fused pass: gradient of the logits, KL gradient, Adam, next sample.
template <class T>
struct ConcreteMaskUpdate {
  T* logits;         // read and written
  T* exp_avg;        // read and written
  T* exp_avg_sq;     // read and written
  T* masked_weight;  // written: the sample of step + 1
  const T* weight;
  const T* grad_masked_weight;  // with respect to the sample of step
  long long seed, step, stream;
  double temperature, kl_weight, prior;
  double beta1, beta2, eps;
  double step_size;         // lr / (1 - beta1^(step + 1))
  double root_correction2;  // sqrt(1 - beta2^(step + 1))
};

// clang-format off
SPARSE_GEN_DECLARE(
  // Each handles the indices begin <= i < end; begin is a multiple of 32.
  void concrete_mask_sample(const ConcreteMaskSample<float>&, long long begin, long long end);
  void concrete_mask_sample(const ConcreteMaskSample<double>&, long long begin, long long end);
  void concrete_mask_gradient(const ConcreteMaskGradient<float>&, long long begin, long long end);
  void concrete_mask_gradient(const ConcreteMaskGradient<double>&, long long begin, long long end);
  void concrete_mask_update(const ConcreteMaskUpdate<float>&, long long begin, long long end);
  void concrete_mask_update(const ConcreteMaskUpdate<double>&, long long begin, long long end);
)
// clang-format on

}  // namespace sparse_gen
