#include "sparse_upsample_conv2d.h"

#include "padding.h"
#include "vector.h"

namespace sparse_gen::SPARSE_GEN_ISA {

namespace {

// Which small column an output column of one phase (even or odd) sees through one tap column: x + shift for from <= x
// < to, and for the others, which lie at the padding, what border says.
struct Columns {
  long long from, to, shift, first;

  Columns(const TapPlanes& t, long long phase, long long kx) {
    first = phase + kx - t.padding;  // the up-sampled column that output column `phase` sees
    shift = first >> 1;
    from = shift < 0 ? -shift : 0;
    to = t.width - (first > 0 ? first >> 1 : 0);
    from = from < t.width ? from : t.width;
    to = to < t.width ? to : t.width;
    to = to > from ? to : from;
  }

  // -1 for a zero.
  long long border(const TapPlanes& t, long long x) const {
    const long long column = padded_origin(2 * x + first, 2 * t.width, t.padding, t.mode);
    return column < 0 ? -1 : column / 2;
  }
};

constexpr long long kMostTaps = 121;  // 11 × 11

// Calls f(x) for first <= x < last, but for begin <= x < end.
template <class F>
inline void for_outside(long long begin, long long end, long long first, long long last, F f) {
  for (long long x = first; x < last && x < begin; ++x) f(x);
  for (long long x = end > first ? end : first; x < last; ++x) f(x);
}

// to[x] = bias + sum of from[n][x], for begin <= x < end.
template <class T>
void add_rows(const T* const* from, long long rows, T bias, T* to, long long begin, long long end) {
  using V = typename Vector<T>::type;
  long long x = begin;
  for (; x + kWidth<T> <= end; x += kWidth<T>) {
    V sum = V{} + bias;
    for (long long n = 0; n < rows; ++n) sum += load_from(from[n] + x);
    store_to(to + x, sum);
  }
  for (; x < end; ++x) {
    T sum = bias;
    for (long long n = 0; n < rows; ++n) sum += from[n][x];
    to[x] = sum;
  }
}

template <class T>
void interleave(const T* __restrict even, const T* __restrict odd, T* __restrict to, long long count) {
  for (long long x = 0; x < count; ++x) {
    to[2 * x] = even[x];
    to[2 * x + 1] = odd[x];
  }
}

template <class T>
void deinterleave(const T* __restrict from, T* __restrict even, T* __restrict odd, long long count) {
  for (long long x = 0; x < count; ++x) {
    even[x] = from[2 * x];
    odd[x] = from[2 * x + 1];
  }
}

// The small row that output row y sees through tap row ky; -1 for zeros.
inline long long row_of(const TapPlanes& t, long long y, long long ky) {
  const long long row = padded_origin(y + ky - t.padding, 2 * t.height, t.padding, t.mode);
  return row < 0 ? -1 : row / 2;
}

template <class T>
void assemble(const TapPlanes& t, const T* taps, T bias, T* out, T* scratch) {
  for (long long y = 0; y < 2 * t.height; ++y) {
    for (long long phase = 0; phase < 2; ++phase) {
      // Columns that lie inside for every tap are added up in registers, the few at the borders one by one.
      const T* shifted[kMostTaps];
      long long seen = 0, begin = 0, end = t.width;
      for (long long ky = 0; ky < t.kernel_h; ++ky) {
        const long long row = row_of(t, y, ky);
        for (long long kx = 0; row >= 0 && kx < t.kernel_w; ++kx) {
          const Columns columns(t, phase, kx);
          shifted[seen++] = taps + (ky * t.kernel_w + kx) * t.stride + row * t.width + columns.shift;
          begin = columns.from > begin ? columns.from : begin;
          end = columns.to < end ? columns.to : end;
        }
      }
      end = end > begin ? end : begin;
      T* half = scratch + phase * t.width;
      add_rows(shifted, seen, bias, half, begin, end);
      for_outside(begin, end, 0, t.width, [&](long long x) {
        T sum = bias;
        for (long long ky = 0; ky < t.kernel_h; ++ky) {
          const long long row = row_of(t, y, ky);
          for (long long kx = 0; row >= 0 && kx < t.kernel_w; ++kx) {
            const Columns columns(t, phase, kx);
            const bool inside = x >= columns.from && x < columns.to;
            const long long column = inside ? x + columns.shift : columns.border(t, x);
            if (column >= 0) sum += taps[(ky * t.kernel_w + kx) * t.stride + row * t.width + column];
          }
        }
        half[x] = sum;
      });
    }
    interleave(scratch, scratch + t.width, out + y * 2 * t.width, t.width);
  }
}

template <class T>
void spread(const TapPlanes& t, const T* grad_out, T* taps, T* scratch) {
  // Even and odd columns apart: what a tap gathers is then contiguous.
  const long long plane = 2 * t.height * t.width;
  for (long long y = 0; y < 2 * t.height; ++y)
    deinterleave(grad_out + y * 2 * t.width, scratch + y * t.width, scratch + plane + y * t.width, t.width);
  for (long long ky = 0; ky < t.kernel_h; ++ky)
    for (long long kx = 0; kx < t.kernel_w; ++kx) {
      T* to = taps + (ky * t.kernel_w + kx) * t.stride;
      for (long long i = 0; i < t.stride; ++i) to[i] = 0;
      for (long long row = 0; row < t.height; ++row) {
        // The output rows that see this one: two in a row, and at the border those that the padding reflects.
        const T* gathered[2 * kMostTaps];
        long long rows[kMostTaps], found = 0;
        const long long near = 2 * row - ky + t.padding;
        const auto look = [&](long long y) {
          if (y >= 0 && y < 2 * t.height && found < kMostTaps && row_of(t, y, ky) == row) rows[found++] = y;
        };
        if (row > t.padding && row < t.height - 1 - t.padding) {
          look(near);
          look(near + 1);
        } else {
          for (long long y = near - 4 * t.padding - 2; y <= near + 4 * t.padding + 3; ++y) look(y);
        }
        long long seen = 0, begin = 0, end = t.width;
        for (long long phase = 0; phase < 2; ++phase) {
          const Columns columns(t, phase, kx);
          begin = columns.from + columns.shift > begin ? columns.from + columns.shift : begin;
          end = columns.to + columns.shift < end ? columns.to + columns.shift : end;
          for (long long n = 0; n < found; ++n)
            gathered[seen++] = scratch + phase * plane + rows[n] * t.width - columns.shift;
        }
        T* sum = to + row * t.width;
        end = end > begin ? end : begin;
        add_rows(gathered, seen, T(0), sum, begin, end);
        for (long long phase = 0; phase < 2; ++phase) {
          const Columns columns(t, phase, kx);
          for (long long n = 0; n < found; ++n) {
            const T* gradient = scratch + phase * plane + rows[n] * t.width;
            for_outside(begin - columns.shift, end - columns.shift, columns.from, columns.to,
                        [&](long long x) { sum[x + columns.shift] += gradient[x]; });
            for_outside(columns.from, columns.to, 0, t.width, [&](long long x) {
              const long long column = columns.border(t, x);
              if (column >= 0) sum[column] += gradient[x];
            });
          }
        }
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
