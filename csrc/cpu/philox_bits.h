// Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), several counters at
// a time. Random numbers are a pure function of (seed, stream, step, index): see sparse_gen/ops/philox.py.
#pragma once

#include "simd.h"

namespace sparse_gen::SPARSE_GEN_ISA {

// a ^ b ^ c: one instruction on AVX-512, which compilers do not find by themselves.
static inline u64v exclusive_or(u64v a, u64v b, u64v c) {
#if defined(__AVX512F__)
  return (u64v)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
  return a ^ b ^ c;
#endif
}

// The low half of each 64-bit lane of low, and above it the low half of that of high.
static inline u64v join_low_halves(u64v low, u64v high) {
#if defined(__AVX512F__)
  return (u64v)_mm512_mask_shuffle_epi32((__m512i)low, 0xaaaa, (__m512i)high, _MM_PERM_CCAA);
#else
  return (low & (u64v{} + 0xffffffffull)) | (high << 32);
#endif
}

constexpr int kPhiloxGroup = 2 * kLanes;  // numbers made by one call

struct PhiloxGroup {
  u32v words[2];  // kPhiloxGroup consecutive indices
};

struct Philox {
  u32 key0, key1, step, stream;

  Philox(long long seed, long long step_, long long stream_)
      : key0((u32)seed), key1((u32)((u64)seed >> 32)), step((u32)step_), stream((u32)stream_) {}

  // The words of the indices first .. first + kPhiloxGroup - 1; first is a multiple of 4.
  //
  // Each 64-bit lane carries one counter in its low half, which is where the widening multiplication reads.
  // The counters are dealt to the lanes in the order that the final interleaving undoes.
  //
  // Unrolled, because then the compiler takes out of a loop over `first` what the uniform words make of the first two
  // rounds, and computes once what the groups of two steps have in common there.
  PhiloxGroup group(long long first) const {
#if SPARSE_GEN_VECTOR_BYTES == 64
    const u64v order = {0, 4, 1, 5, 2, 6, 3, 7};
#elif SPARSE_GEN_VECTOR_BYTES == 32
    const u64v order = {0, 2, 1, 3};
#else
    const u64v order = {0, 1};
#endif
    const u64v zero = {};
    u64v c0 = order + (u64)(first >> 2), c1 = zero + step, c2 = zero + stream, c3 = zero;
    const u64v factor0 = zero + 0xD2511F53ull, factor1 = zero + 0xCD9E8D57ull;
    u32 k0 = key0, k1 = key1;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const u64v product0 = multiply_low_halves(c0, factor0);
      const u64v product1 = multiply_low_halves(c2, factor1);
      c0 = exclusive_or(product1 >> 32, c1, zero + k0);
      c1 = product1;
      c2 = exclusive_or(product0 >> 32, c3, zero + k1);
      c3 = product0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const u64v words01 = join_low_halves(c0, c1), words23 = join_low_halves(c2, c3);
    return {{(u32v)interleave_even(words01, words23), (u32v)interleave_odd(words01, words23)}};
  }
};

// A word as a number u strictly between 0 and 1, 23 bits and a half, so that neither end is ever reached, and 1 - u:
// both exact, and both in units of 2^-23.
struct Uniform {
  f32v u, complement;

  explicit Uniform(u32v word)
      : u(__builtin_convertvector((i32v)(word >> 9), f32v) + 0.5f), complement(0x1p23f - u) {}
};

}  // namespace sparse_gen::SPARSE_GEN_ISA
