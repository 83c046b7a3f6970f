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
  // (1 - u) / u
  static V odds(const PhiloxGroup& group, int offset) {
    const Uniform uniform(group.words[offset / kLanes]);
    return quotient(uniform.complement, uniform.u);
  }
};

template <>
struct Lanes<double> {
  using V = double;
  static constexpr int width = 1;
  static V load(const double* p) { return *p; }
  static void store(double* p, V v) { *p = v; }
  static V odds(const PhiloxGroup& group, int offset) {
    const Uniform uniform(group.words[offset / kLanes]);
    return (V)uniform.complement[offset % kLanes] / uniform.u[offset % kLanes];
  }
};

// Calls body(index, in, out) for each group of begin .. end; in and out point at the group's first element.
// An array that is read and written stands in both lists.
template <class T, int Inputs, int Outputs, class Body>
static inline void for_each_group(const T* const (&in)[Inputs], T* const (&out)[Outputs], long long begin,
                                  long long end, Body body) {
  const T* from[Inputs];
  T* to[Outputs];
  T staged_in[Inputs][kPhiloxGroup] = {};
  T staged_out[Outputs][kPhiloxGroup];
  // One call of body, so that it is inlined and what it computes for every group alike is taken out of the loop.
  for (long long i = begin; i < end; i += kPhiloxGroup) {
    const bool whole = i + kPhiloxGroup <= end;
    const unsigned long bytes = (end - i) * sizeof(T);
    for (int k = 0; k < Inputs; ++k) {
      if (!whole) __builtin_memcpy(staged_in[k], in[k] + i, bytes);
      from[k] = whole ? in[k] + i : staged_in[k];
    }
    for (int k = 0; k < Outputs; ++k) to[k] = whole ? out[k] + i : staged_out[k];
    body(i, from, to);
    if (!whole)
      for (int k = 0; k < Outputs; ++k) __builtin_memcpy(out[k] + i, staged_out[k], bytes);
  }
}

}  // namespace sparse_gen::SPARSE_GEN_ISA
