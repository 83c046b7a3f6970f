// Vectors of float or double under one name, for kernels that are written once for both.
#pragma once

#include "simd.h"

namespace sparse_gen::SPARSE_GEN_ISA {

template <class T>
struct Vector;
template <>
struct Vector<float> {
  using type [[gnu::vector_size(SPARSE_GEN_VECTOR_BYTES)]] = float;
};
template <>
struct Vector<double> {
  using type [[gnu::vector_size(SPARSE_GEN_VECTOR_BYTES)]] = double;
};

template <class T>
constexpr long long kWidth = SPARSE_GEN_VECTOR_BYTES / sizeof(T);

template <class T>
static inline typename Vector<T>::type load_from(const T* p) {
  typename Vector<T>::type v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
static inline void store_to(T* p, typename Vector<T>::type v) {
  __builtin_memcpy(p, &v, sizeof v);
}

}  // namespace sparse_gen::SPARSE_GEN_ISA
