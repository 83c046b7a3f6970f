// exp, log and square root for a vector of floats and for one double, under the same names, so that a kernel
// is written once for both. The double versions call libm and are there for gradient checks, not for speed.
#pragma once

#include "simd.h"

namespace sparse_gen::SPARSE_GEN_ISA {

// exp(x) = 2^n exp(r), |r| <= ln(2)/2: the Taylor polynomial of degree 7 leaves 5e-9 relative error, a tenth
// of a float's last bit. x is clamped to where the result is a normal number.
static inline f32v exponential(f32v x) {
  x = select(x < -87.0f, broadcast(-87.0f), x);
  x = select(x > 88.0f, broadcast(88.0f), x);
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  const f32v shifted = x * 1.44269504088896341f + 12582912.0f;
  const f32v n = shifted - 12582912.0f;
  // ln(2) in two pieces: the first has few enough bits for n * piece to be exact.
  const f32v r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  f32v y = r * (1.0f / 5040) + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  return (f32v)((i32v)y + ((i32v)shifted << 23));
}

// log(x) = n ln(2) + 2 atanh((m - 1) / (m + 1)) for x = 2^n m, m in [sqrt(1/2), sqrt(2)); the series stops
// where its next term is below 1e-9. x must be a positive normal number.
static inline f32v logarithm(f32v x) {
  const i32v bits = (i32v)x - 0x3f3504f3;  // the bits of sqrt(1/2)
  const i32v exponent = bits >> 23;
  const f32v m = (f32v)((bits & 0x007fffff) + 0x3f3504f3);
  const f32v n = __builtin_convertvector(exponent, f32v);
  const f32v t = (m - 1.0f) / (m + 1.0f);
  const f32v t2 = t * t;
  f32v series = t2 * (2.0f / 9) + 2.0f / 7;
  series = series * t2 + 2.0f / 5;
  series = series * t2 + 2.0f / 3;
  return n * 0.693359375f + (t * 2.0f + (t * t2 * series - n * 2.12194440e-4f));
}

static inline double exponential(double x) { return __builtin_exp(x); }
static inline double logarithm(double x) { return __builtin_log(x); }
static inline double square_root(double x) { return __builtin_sqrt(x); }

}  // namespace sparse_gen::SPARSE_GEN_ISA
