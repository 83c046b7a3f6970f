// What pixels are read through: see sparse_gen/ops/norm_load.py.
#pragma once

#include "host_device.h"

namespace sparse_gen::cuda {

// v = factor2 · LeakyReLU(factor · x + shift) + shift2, on every read.
template <class T>
struct Load {
  T factor, shift, slope, factor2, shift2;
  SPARSE_GEN_HD static Load of(const T* from) {
    return {read(from), read(from + 1), read(from + 2), read(from + 3), read(from + 4)};
  }
  SPARSE_GEN_HD T operator()(T x) const {
    const T z = x * factor + shift;
    return (z > 0 ? z : slope * z) * factor2 + shift2;
  }
};

template <class T>
struct NoLoad {
  SPARSE_GEN_HD static NoLoad of(const T*) { return {}; }
  SPARSE_GEN_HD T operator()(T x) const { return x; }
};

}  // namespace sparse_gen::cuda
