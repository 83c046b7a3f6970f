#include "sparse_upsample_conv2d.h"

#include "padding.h"
#include "vector.h"

namespace sparse_gen::SPARSE_GEN_ISA {

namespace {

inline long long floor_half(long long i) { return i >> 1; }

// What output row y sees through one tap, for its even and its odd columns (phase 0 and 1): interior(row, phase, from,
// to, shift) for the columns x that see the small column x + shift, border(row, phase, x, column) for the others.
template <class Interior, class Border>
inline void through_tap(const TapPlanes& t, long long y, long long ky, long long kx, Interior interior, Border border) {
  const long long up_row = padded_origin(y + ky - t.padding, 2 * t.height, t.padding, t.mode);
  if (up_row < 0) return;
  for (long long phase = 0; phase < 2; ++phase) {
    const long long first = phase + kx - t.padding;  // the up-sampled column that output column `phase` sees
    long long from = first < 0 ? (1 - first) / 2 : 0;
    long long to = floor_half(2 * t.width - 1 - first) + 1;
    from = from < t.width ? from : t.width;
    to = to < t.width ? to : t.width;
    to = to > from ? to : from;
    interior(up_row / 2, phase, from, to, floor_half(first));
    const auto at_border = [&](long long x) {
      const long long column = padded_origin(2 * x + first, 2 * t.width, t.padding, t.mode);
      if (column >= 0) border(up_row / 2, phase, x, column / 2);
    };
    for (long long x = 0; x < from; ++x) at_border(x);
    for (long long x = to; x < t.width; ++x) at_border(x);
  }
}

template <class T>
void assemble(const TapPlanes& t, const T* taps, T bias, T* out, T* scratch) {
  T* half[2] = {scratch, scratch + t.width};
  for (long long y = 0; y < 2 * t.height; ++y) {
    for (long long x = 0; x < 2 * t.width; ++x) scratch[x] = bias;
    for (long long ky = 0; ky < t.kernel_h; ++ky)
      for (long long kx = 0; kx < t.kernel_w; ++kx) {
        const T* plane = taps + (ky * t.kernel_w + kx) * t.stride;
        through_tap(
            t, y, ky, kx,
            [&](long long row, long long phase, long long from, long long to, long long shift) {
              const T* source = plane + row * t.width + shift;
              T* sum = half[phase];
              for (long long x = from; x < to; ++x) sum[x] += source[x];
            },
            [&](long long row, long long phase, long long x, long long column) {
              half[phase][x] += plane[row * t.width + column];
            });
      }
    T* to = out + y * 2 * t.width;
    for (long long x = 0; x < t.width; ++x) {
      to[2 * x] = half[0][x];
      to[2 * x + 1] = half[1][x];
    }
  }
}

template <class T>
void spread(const TapPlanes& t, const T* grad_out, T* taps, T* scratch) {
  for (long long i = 0; i < t.kernel_h * t.kernel_w * t.stride; ++i) taps[i] = 0;
  T* half[2] = {scratch, scratch + t.width};
  for (long long y = 0; y < 2 * t.height; ++y) {
    const T* from_row = grad_out + y * 2 * t.width;
    for (long long x = 0; x < t.width; ++x) {
      half[0][x] = from_row[2 * x];
      half[1][x] = from_row[2 * x + 1];
    }
    for (long long ky = 0; ky < t.kernel_h; ++ky)
      for (long long kx = 0; kx < t.kernel_w; ++kx) {
        T* plane = taps + (ky * t.kernel_w + kx) * t.stride;
        through_tap(
            t, y, ky, kx,
            [&](long long row, long long phase, long long from, long long to, long long shift) {
              T* sum = plane + row * t.width + shift;
              const T* gradient = half[phase];
              for (long long x = from; x < to; ++x) sum[x] += gradient[x];
            },
            [&](long long row, long long phase, long long x, long long column) {
              plane[row * t.width + column] += half[phase][x];
            });
      }
  }
}

}  // namespace

void assemble_taps(const TapPlanes& t, const float* taps, float bias, float* out, float* scratch) {
  assemble(t, taps, bias, out, scratch);
}
void assemble_taps(const TapPlanes& t, const double* taps, double bias, double* out, double* scratch) {
  assemble(t, taps, bias, out, scratch);
}
void spread_taps(const TapPlanes& t, const float* grad_out, float* taps, float* scratch) {
  spread(t, grad_out, taps, scratch);
}
void spread_taps(const TapPlanes& t, const double* grad_out, double* taps, double* scratch) {
  spread(t, grad_out, taps, scratch);
}

}  // namespace sparse_gen::SPARSE_GEN_ISA
