#pragma once

#include "isa.h"

namespace sparse_gen {

// One step of Adam; pointers are to contiguous elements.
template <class T>
struct MaskedAdam {
  T* values;      // read and written
  T* exp_avg;     // read and written
  T* exp_avg_sq;  // read and written
  const T* grad;
  double beta1, beta2, eps;
  double step_size;         // lr / (1 - beta1^(step + 1))
  double root_correction2;  // sqrt(1 - beta2^(step + 1))
};

// clang-format off
SPARSE_GEN_DECLARE(
  // Handles the indices begin <= i < end. What becomes of an element does not depend on its index.
  void masked_adam(const MaskedAdam<float>&, long long begin, long long end);
  void masked_adam(const MaskedAdam<double>&, long long begin, long long end);
)
// clang-format on

}  // namespace sparse_gen
