// Many dot products at a time: four weights' vectors are added up in fewer steps together than one by one.
#pragma once

#include "vector.h"

namespace sparse_gen::SPARSE_GEN_ISA {

// Lanes l without bit H: a[l] + a[l + H]; with it: b[l] + b[l - H].
template <class V, int H, int... L>
inline V add_halves(V a, V b, Lanes<L...>) {
  constexpr int width = sizeof...(L);
  return __builtin_shufflevector(a, b, ((L & H) ? width + L : L)...) +
         __builtin_shufflevector(a, b, ((L & H) ? width + L - H : L + H)...);
}

// Partial sums of a weight.
template <class T>
constexpr int kSumLanes = kWidth<T> >= 4 ? kWidth<T> / 4 : 1;

// Adds four weights' vectors to their partial sums, which lie side by side. Of these, only the first `weights` are
// touched, if that is less than four. Vectors of two elements hold two weights each.
template <class T>
inline void add_to_sums(const typename Vector<T>::type (&dot)[4], T* sums, long long weights = 4) {
  using V = typename Vector<T>::type;
  constexpr int width = kWidth<T>;
  using All = typename CountLanes<width>::type;
  const auto add = [&](T* to, V v, long long count) {
    if (count >= width)
      store_to(to, load_from(to) + v);
    else
      store_part(to, load_part(to, count) + v, count);
  };
  if constexpr (width >= 4) {
    const V even = add_halves<V, width / 2>(dot[0], dot[2], All{}),
            odd = add_halves<V, width / 2>(dot[1], dot[3], All{});
    add(sums, add_halves<V, width / 4>(even, odd, All{}), weights * kSumLanes<T>);
  } else {
    add(sums, add_halves<V, 1>(dot[0], dot[1], All{}), weights);
    add(sums + 2, add_halves<V, 1>(dot[2], dot[3], All{}), weights - 2);
  }
}

}  // namespace sparse_gen::SPARSE_GEN_ISA
