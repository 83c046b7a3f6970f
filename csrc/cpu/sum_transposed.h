#pragma once

#include "isa.h"

namespace sparse_gen {

// What sum_transposed needs as scratch for a matrix of `rows` rows, `stride` elements apart.
constexpr long long transposed_elements(long long rows, long long stride) { return (rows + 16) * (stride + 16) + rows * stride + 64; }

// clang-format off
SPARSE_GEN_DECLARE(
  // to (columns × rows, without gaps) = transposed sum of `count` matrices (rows × columns), one every `part` elements.
  void sum_transposed(const float* parts, long long count, long long part, long long rows, long long columns, long long stride, float* to, float* scratch);
  void sum_transposed(const double* parts, long long count, long long part, long long rows, long long columns, long long stride, double* to, double* scratch);
)
// clang-format on

}  // namespace sparse_gen
