// Vectors of 32-bit lanes for the instruction set this file is compiled for.
//
// Kernels in csrc/cpu are compiled once per instruction set and one of the results is picked at run time.
// They include no standard or torch header: an inline function instantiated in two of the objects would be
// merged by the linker, and the AVX-512 copy could then run on a machine without AVX-512.
#pragma once

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

namespace sparse_gen::SPARSE_GEN_ISA {

using i32 = int;
using u32 = unsigned int;
using u64 = unsigned long long;

#if defined(__AVX512F__)
#define SPARSE_GEN_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define SPARSE_GEN_VECTOR_BYTES 32
#else
#define SPARSE_GEN_VECTOR_BYTES 16
#endif

constexpr int kLanes = SPARSE_GEN_VECTOR_BYTES / 4;

using f32v [[gnu::vector_size(SPARSE_GEN_VECTOR_BYTES)]] = float;
using i32v [[gnu::vector_size(SPARSE_GEN_VECTOR_BYTES)]] = i32;
using u32v [[gnu::vector_size(SPARSE_GEN_VECTOR_BYTES)]] = u32;
using u64v [[gnu::vector_size(SPARSE_GEN_VECTOR_BYTES)]] = u64;

static inline f32v load(const float* p) {
  f32v v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(float* p, f32v v) { __builtin_memcpy(p, &v, sizeof v); }

static inline f32v broadcast(float x) { return f32v{} + x; }

static inline f32v select(i32v condition, f32v yes, f32v no) {
  return (f32v)((condition & (i32v)yes) | (~condition & (i32v)no));
}

static inline f32v square_root(f32v x) {
#if defined(__AVX512F__)
  return (f32v)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (f32v)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (f32v)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// 64-bit products of the low halves of each 64-bit lane; what the high halves hold does not matter.
static inline u64v multiply_low_halves(u64v a, u64v b) {
#if defined(__AVX512F__)
  return (u64v)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (u64v)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (u64v)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffull) * (b & 0xffffffffull);
#endif
}

// Even (or odd) 64-bit lanes of a and b, taken in turn.
static inline u64v interleave_even(u64v a, u64v b) {
#if defined(__AVX512F__)
  return (u64v)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (u64v)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (u64v)_mm_unpacklo_epi64((__m128i)a, (__m128i)b);
#else
  return u64v{a[0], b[0]};
#endif
}

static inline u64v interleave_odd(u64v a, u64v b) {
#if defined(__AVX512F__)
  return (u64v)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (u64v)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (u64v)_mm_unpackhi_epi64((__m128i)a, (__m128i)b);
#else
  return u64v{a[1], b[1]};
#endif
}

}  // namespace sparse_gen::SPARSE_GEN_ISA
