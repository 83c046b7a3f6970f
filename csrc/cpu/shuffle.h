// Lanes of vectors exchanged: pairs apart and together, and transposition.
#pragma once

#include "vector.h"

namespace sparse_gen::SPARSE_GEN_ISA {

template <class T>
struct LaneNumbers;
template <>
struct LaneNumbers<float> {
  using type [[gnu::vector_size(SPARSE_GEN_VECTOR_BYTES)]] = int;
};
template <>
struct LaneNumbers<double> {
  using type [[gnu::vector_size(SPARSE_GEN_VECTOR_BYTES)]] = long long;
};

// The lanes of a vector pair (a, b) that f(lane) names, counted through both.
template <class T, class F>
static inline typename Vector<T>::type pick(typename Vector<T>::type a, typename Vector<T>::type b, F f) {
  typename LaneNumbers<T>::type lanes;
#pragma GCC unroll 16
  for (int lane = 0; lane < kWidth<T>; ++lane) lanes[lane] = f(lane);
  return __builtin_shuffle(a, b, lanes);
}

// Squares of one vector a side, swapped in halves, quarters, and so on.
template <class T>
void transpose(const T* from, long long from_stride, long long rows, long long columns, T* to, long long to_stride) {
  using V = typename Vector<T>::type;
  constexpr int w = kWidth<T>;
  for (long long r = 0; r < rows; r += w)
    for (long long x = 0; x < columns; x += w) {
      V square[w];
      for (int i = 0; i < w; ++i) square[i] = r + i < rows ? load_from(from + (r + i) * from_stride + x) : V{};
#pragma GCC unroll 4
      for (int step = 1; step < w; step *= 2)
#pragma GCC unroll 16
        for (int i = 0; i < w; ++i)
          if (!(i & step)) {
            const V a = square[i], b = square[i + step];
            square[i] = pick<T>(a, b, [step](int lane) { return lane & step ? lane - step + w : lane; });
            square[i + step] = pick<T>(a, b, [step](int lane) { return lane & step ? lane + w : lane + step; });
          }
      for (int i = 0; i < w && x + i < columns; ++i) store_to(to + (x + i) * to_stride + r, square[i]);
    }
}

}  // namespace sparse_gen::SPARSE_GEN_ISA
