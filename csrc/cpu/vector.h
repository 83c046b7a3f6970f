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

// A list of lanes, for __builtin_shufflevector.
template <int... L>
struct Lanes {};
template <int N, int... L>
struct CountLanes : CountLanes<N - 1, N - 1, L...> {};
template <int... L>
struct CountLanes<0, L...> {
  using type = Lanes<L...>;
};

// The first `count` elements, at most a vector's; zeros for the others.
template <class T>
static inline typename Vector<T>::type load_part(const T* p, long long count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (typename Vector<T>::type)_mm512_maskz_loadu_ps(count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1, p);
  else
    return (typename Vector<T>::type)_mm512_maskz_loadu_pd(count >= 8 ? 0xff : count <= 0 ? 0 : (1u << count) - 1, p);
#else
  typename Vector<T>::type v{};
  for (long long i = 0; i < kWidth<T>; ++i)
    if (i < count) v[i] = p[i];
  return v;
#endif
}

// Stores no more than the first `count` elements; none where that is negative.
template <class T>
static inline void store_part(T* p, typename Vector<T>::type v, long long count) {
#if defined(__AVX512F__)
  if (count <= 0) return;
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, count >= 16 ? 0xffff : (1u << count) - 1, (__m512)v);
  else
    _mm512_mask_storeu_pd(p, count >= 8 ? 0xff : (1u << count) - 1, (__m512d)v);
#else
  for (long long i = 0; i < kWidth<T>; ++i)
    if (i < count) p[i] = v[i];
#endif
}

}  // namespace sparse_gen::SPARSE_GEN_ISA
