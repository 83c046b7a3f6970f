#include "sum_transposed.h"

#include "shuffle.h"

namespace sparse_gen::SPARSE_GEN_ISA {

namespace {

template <class T>
void sum_and_transpose(const T* parts, long long count, long long part, long long rows, long long columns,
                       long long stride, T* to, T* scratch) {
  const T* summed = parts;
  if (count > 1) {
    summed = scratch;
    for (long long i = 0; i < rows * stride; ++i) scratch[i] = parts[i] + parts[part + i];
    for (long long n = 2; n < count; ++n)
      for (long long i = 0; i < rows * stride; ++i) scratch[i] += parts[n * part + i];
  }
  // Whole vectors are written: first with room behind each row, then without.
  T* wide = scratch + rows * stride + 64;
  const long long wide_stride = (rows + kWidth<T> - 1) / kWidth<T> * kWidth<T>;
  transpose(summed, stride, rows, columns, wide, wide_stride);
  for (long long i = 0; i < columns; ++i) __builtin_memcpy(to + i * rows, wide + i * wide_stride, rows * sizeof(T));
}

}  // namespace

void sum_transposed(const float* parts, long long count, long long part, long long rows, long long columns,
                    long long stride, float* to, float* scratch) {
  sum_and_transpose(parts, count, part, rows, columns, stride, to, scratch);
}
void sum_transposed(const double* parts, long long count, long long part, long long rows, long long columns,
                    long long stride, double* to, double* scratch) {
  sum_and_transpose(parts, count, part, rows, columns, stride, to, scratch);
}

}  // namespace sparse_gen::SPARSE_GEN_ISA
