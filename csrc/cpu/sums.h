// Sums over one channel's image, and what normalisation takes from them.
#pragma once

#include "vector.h"

namespace sparse_gen::SPARSE_GEN_ISA {

// Sums are taken in float over this many elements at most, and over those sums in double: a float sum over a whole
// image would lose three digits.
constexpr long long kBlock = 4096;

template <class T>
static inline double add_up(typename Vector<T>::type v) {
  double sum = 0;
  for (int lane = 0; lane < kWidth<T>; ++lane) sum += v[lane];
  return sum;
}

// Sums f(i, vector or scalar loader) over count elements; f gives Sums vectors at a time.
template <class T, int Sums, class F>
static inline void block_sums(long long count, double (&total)[Sums], F f) {
  using V = typename Vector<T>::type;
  for (double& t : total) t = 0;
  for (long long begin = 0; begin < count; begin += kBlock) {
    const long long end = begin + kBlock < count ? begin + kBlock : count;
    V sum[Sums][4] = {};
    long long i = begin;
    for (; i + 4 * kWidth<T> <= end; i += 4 * kWidth<T>)
      for (int u = 0; u < 4; ++u) {
        V term[Sums];
        f(i + u * kWidth<T>, term);
        for (int s = 0; s < Sums; ++s) sum[s][u] += term[s];
      }
    for (int s = 0; s < Sums; ++s) total[s] += add_up<T>((sum[s][0] + sum[s][1]) + (sum[s][2] + sum[s][3]));
    // What is left of the block goes through a vector of which the rest is cut off.
    for (; i < end; i += kWidth<T>) {
      V term[Sums];
      f(i, term);
      const long long real = end - i < kWidth<T> ? end - i : kWidth<T>;
      for (int s = 0; s < Sums; ++s)
        for (long long lane = 0; lane < real; ++lane) total[s] += term[s][lane];
    }
  }
}

// Loads a vector at i, zeros behind the end.
template <class T>
static inline typename Vector<T>::type load_within(const T* p, long long i, long long count) {
  if (i + kWidth<T> <= count) return load_from(p + i);
  typename Vector<T>::type v = {};
  __builtin_memcpy(&v, p + i, (count - i) * sizeof(T));
  return v;
}

template <class T>
static inline void store_within(T* p, long long i, long long count, typename Vector<T>::type v) {
  if (i + kWidth<T> <= count)
    store_to(p + i, v);
  else
    __builtin_memcpy(p + i, &v, (count - i) * sizeof(T));
}

struct Moments {
  double mean, variance;
};

// Mean and biased variance in one pass over memory: block by block around the block's own mean (two passes in the
// first-level cache, so that no large sums cancel), put together in double.
// Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
template <class T, class F>
static inline Moments moments_of(long long count, F value) {
  using V = typename Vector<T>::type;
  double mean = 0, squares = 0;
  for (long long begin = 0; begin < count; begin += kBlock) {
    const long long length = count - begin < kBlock ? count - begin : kBlock;
    double sum[1], around[1];
    block_sums<T>(length, sum, [&](long long i, V* term) { term[0] = value(begin + i); });
    const T center = (T)(sum[0] / length);
    block_sums<T>(length, around, [&](long long i, V* term) {
      const V d = value(begin + i) - center;
      term[0] = d * d;
    });
    // Around the rounded center, not the block's mean: the difference is put right.
    const double block_mean = sum[0] / length, offset = block_mean - (double)center;
    const double difference = block_mean - mean, total = begin + length;
    squares += around[0] - length * offset * offset + difference * difference * begin * length / total;
    mean += difference * length / total;
  }
  return {mean, squares > 0 ? squares / count : 0};
}

template <class T>
static inline Moments moments(const T* x, long long count) {
  return moments_of<T>(count, [&](long long i) { return load_within(x, i, count); });
}

}  // namespace sparse_gen::SPARSE_GEN_ISA
