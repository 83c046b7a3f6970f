// Element-wise loops in groups of kPhiloxGroup elements, the last and incomplete group through a buffer.
#pragma once

#include "math.h"
#include "philox_bits.h"

namespace sparse_gen::SPARSE_GEN_ISA {

// How a group is cut into lanes: vectors for float, one number at a time for double.
template <class T>
struct Lanes;

template <>
struct Lanes<float> {
  using V = f32v;
  static constexpr int width = kLanes;
  static V load(const float* p) { return SPARSE_GEN_ISA::load(p); }
  static void store(float* p, V v) { SPARSE_GEN_ISA::store(p, v); }
  static V uniform(const PhiloxGroup& group, int offset) {
    return SPARSE_GEN_ISA::uniform(group.words[offset / kLanes]);
  }
};

template <>
struct Lanes<double> {
  using V = double;
  static constexpr int width = 1;
  static V load(const double* p) { return *p; }
  static void store(double* p, V v) { *p = v; }
  static V uniform(const PhiloxGroup& group, int offset) {
    return SPARSE_GEN_ISA::uniform(group.words[offset / kLanes])[offset % kLanes];
  }
};

// Calls body(index, in, out) for each group of begin .. end; in and out point at the group's first element.
// An array that is read and written stands in both lists.
template <class T, int Inputs, int Outputs, class Body>
static inline void for_each_group(const T* const (&in)[Inputs], T* const (&out)[Outputs], long long begin,
                                  long long end, Body body) {
  const T* from[Inputs];
  T* to[Outputs];
  long long i = begin;
  for (; i + kPhiloxGroup <= end; i += kPhiloxGroup) {
    for (int k = 0; k < Inputs; ++k) from[k] = in[k] + i;
    for (int k = 0; k < Outputs; ++k) to[k] = out[k] + i;
    body(i, from, to);
  }
  if (i == end) return;

  T staged_in[Inputs][kPhiloxGroup] = {};
  T staged_out[Outputs][kPhiloxGroup];
  const unsigned long bytes = (end - i) * sizeof(T);
  for (int k = 0; k < Inputs; ++k) {
    __builtin_memcpy(staged_in[k], in[k] + i, bytes);
    from[k] = staged_in[k];
  }
  for (int k = 0; k < Outputs; ++k) to[k] = staged_out[k];
  body(i, from, to);
  for (int k = 0; k < Outputs; ++k) __builtin_memcpy(out[k] + i, staged_out[k], bytes);
}

}  // namespace sparse_gen::SPARSE_GEN_ISA
