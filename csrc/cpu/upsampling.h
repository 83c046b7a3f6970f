// Where the pixels of an image that was up-sampled ×2 come from, and sums of such rows.
#pragma once

#include "padding.h"
#include "vector.h"

namespace sparse_gen::SPARSE_GEN_ISA {

namespace {

// How much of position `up` of an up-sampled axis is its second source: of the small position up / 2 the one before
// where `up` is even, the one behind where it is odd. The rest is up / 2. Nothing at the ends, which have no second.
template <class T>
inline T second_share(long long up, long long length, long long upsample) {
  const long long near = up / 2;
  const bool odd = up % 2;
  if (upsample == kNearest || near == (odd ? length - 1 : 0)) return 0;
  if (upsample == kBilinear) return T(0.25);
  return T(odd ? length - 1 - near : near) / T(2 * length - 1);
}

// What one padded up-sampled position is made of: up to two small ones.
template <class T>
struct Sources {
  int count = 0;
  long long at[2];
  T factor[2];
};

template <class T>
inline Sources<T> sources_of(long long padded, long long length, long long padding, long long mode,
                             long long upsample) {
  Sources<T> s;
  const long long up = padded_origin(padded, 2 * length, padding, mode);
  if (up < 0) return s;
  const T second = second_share<T>(up, length, upsample);
  s.count = second == 0 ? 1 : 2;
  s.at[0] = up / 2;
  s.factor[0] = 1 - second;
  s.at[1] = up / 2 + (up % 2 ? 1 : -1);
  s.factor[1] = second;
  return s;
}

constexpr int kMostTerms = 52;  // four for each of a kernel's up to 11 taps, and what borders repeat

// A sum of shifted rows.
template <class T>
struct Terms {
  int count = 0;
  const T* from[kMostTerms];
  T factor[kMostTerms];

  void add(const T* row, T by) {
    from[count] = row;
    factor[count++] = by;
  }
};

template <class T, int Count>
inline typename Vector<T>::type sum_at(const Terms<T>& terms, long long x, typename Vector<T>::type sum) {
  const int count = Count ? Count : terms.count;
#pragma GCC unroll 6
  for (int n = 0; n < count; ++n) sum += terms.factor[n] * load_from(terms.from[n] + x);
  return sum;
}

}  // namespace

}  // namespace sparse_gen::SPARSE_GEN_ISA
