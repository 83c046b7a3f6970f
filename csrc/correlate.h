// How the sparse correlation of cpu/sparse_conv2d.h is dealt to threads; the result does not depend on it.
#pragma once

#include "binding.h"
#include "cpu/sparse_conv2d.h"

namespace sparse_gen {

// Bands of positions if there are enough, else planes one by one.
template <class T>
void correlate(const SparsePlanes<T>& planes, const T* source, const PlaneRows<T>& out, int64_t count, int64_t length) {
  const int64_t bands = (length + kPlaneStep - 1) / kPlaneStep;
  if (bands >= 8) {
    torch::stable::parallel_for(0, bands, 1, [&](int64_t first, int64_t last) {
      const int64_t end = last * kPlaneStep < length ? last * kPlaneStep : length;
      SPARSE_GEN_DISPATCH(sparse_correlate, planes, source, out, 0, count, first * kPlaneStep, end);
    });
  } else {
    torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      SPARSE_GEN_DISPATCH(sparse_correlate, planes, source, out, first, last, 0, length);
    });
  }
}

}  // namespace sparse_gen
