// Exponentials, logarithms and quotients for a vector of floats and for one double, under the same names, so that a
// kernel is written once for both. The double versions are libm's and there for gradient checks, not for speed.
#pragma once

#include "simd.h"

namespace sparse_gen::SPARSE_GEN_ISA {

static inline f32v minimum(f32v a, f32v b) {
#if defined(__AVX512F__)
  return (f32v)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (f32v)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (f32v)_mm_min_ps((__m128)a, (__m128)b);
#else
  return select(a < b, a, b);
#endif
}

static inline f32v maximum(f32v a, f32v b) {
#if defined(__AVX512F__)
  return (f32v)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (f32v)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (f32v)_mm_max_ps((__m128)a, (__m128)b);
#else
  return select(a > b, a, b);
#endif
}

// Whether |x| < limit in every lane.
static inline bool all_below(f32v x, float limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(_mm512_abs_ps((__m512)x), _mm512_set1_ps(limit), _CMP_LT_OQ) == 0xffff;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)((i32v)maximum(x, -x) < (i32v)broadcast(limit))) == 0xff;
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)((i32v)maximum(x, -x) < (i32v)broadcast(limit))) == 0xf;
#else
  for (int i = 0; i < kLanes; ++i)
    if (!(__builtin_fabsf(x[i]) < limit)) return false;
  return true;
#endif
}

// a / b to the last bit or two, b a normal number below 2^126. A division keeps AVX-512's only divider busy for 16
// cycles; this is six instructions beside it, for kernels that are bound by the divider.
static inline f32v quotient(f32v a, f32v b) {
#if defined(__AVX512F__)
  const f32v inverse = (f32v)_mm512_rcp14_ps((__m512)b), q = a * inverse;
  return q + inverse * (a - b * q);
#else
  return a / b;
#endif
}

// 2^x for x clamped to -126 .. 126, so that the result has a normal reciprocal. 2^x = 2^n 2^r, |r| <= 1/2, with the
// minimax polynomial of degree 5: 8e-8 relative error.
static inline f32v exponential2(f32v x) {
  x = maximum(minimum(x, broadcast(126.0f)), broadcast(-126.0f));
#if defined(__AVX512F__)
  const f32v r = (f32v)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  const f32v shifted = x + 12582912.0f;
  const f32v r = x - (shifted - 12582912.0f);
#endif
  f32v y = r * 1.3276472e-3f + 9.6755410e-3f;
  y = y * r + 5.5507131e-2f;
  y = y * r + 0.24022120f;
  y = y * r + 0.69314694f;
  y = y * r + 1.0000001f;
#if defined(__AVX512F__)
  return (f32v)_mm512_scalef_ps((__m512)y, (__m512)(x - r));
#else
  return (f32v)((i32v)y + ((i32v)shifted << 23));
#endif
}

// log2(x) = n + log2(1 + t) for x = 2^n (1 + t), 1 + t in [3/4, 3/2), with the minimax polynomial of degree 8:
// 5e-8 absolute error. x must be a positive normal number below 2^126.
static inline f32v logarithm2(f32v x) {
#if defined(__AVX512F__)
  const f32v n = (f32v)_mm512_getexp_ps((__m512)(x * (4.0f / 3)));
  const f32v t = (f32v)_mm512_getmant_ps((__m512)x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero) - 1.0f;
#else
  const i32v bits = (i32v)x - 0x3f400000;  // the bits of 3/4
  const f32v n = __builtin_convertvector(bits >> 23, f32v);
  const f32v t = (f32v)((bits & 0x007fffff) + 0x3f400000) - 1.0f;
#endif
  f32v y = t * -9.0912946e-2f + 0.20130140f;
  y = y * t - 0.25193453f;
  y = y * t + 0.29080076f;
  y = y * t - 0.36026138f;
  y = y * t + 0.48080230f;
  y = y * t - 0.72135210f;
  y = y * t + 1.4426959f;
  return y * t + n;
}

static inline double quotient(double a, double b) { return a / b; }
static inline double exponential2(double x) { return __builtin_exp2(x); }
static inline double logarithm2(double x) { return __builtin_log2(x); }
static inline double square_root(double x) { return __builtin_sqrt(x); }
static inline bool all_below(double x, double limit) { return __builtin_fabs(x) < limit; }

}  // namespace sparse_gen::SPARSE_GEN_ISA
