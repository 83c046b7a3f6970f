#include "sparse_upsample_conv2d.h"

#include "padding.h"
#include "taps_3x3.h"
#include "vector.h"

namespace sparse_gen::SPARSE_GEN_ISA {

namespace {

// Which small column an output column of one phase (even or odd) sees through one tap column: x + shift for from <= x
// < to, and for the others, which lie at the padding, what border says.
struct Columns {
  long long from, to, shift, first;

  Columns(const TapImage& t, long long phase, long long kx) {
    first = phase + kx - t.padding;  // the up-sampled column that output column `phase` sees
    shift = first >> 1;
    from = shift < 0 ? -shift : 0;
    to = t.width - (first > 0 ? first >> 1 : 0);
    from = from < t.width ? from : t.width;
    to = to < t.width ? to : t.width;
    to = to > from ? to : from;
  }

  // -1 for a zero.
  long long border(const TapImage& t, long long x) const {
    const long long column = padded_origin(2 * x + first, 2 * t.width, t.padding, t.mode);
    return column < 0 ? -1 : column / 2;
  }
};

constexpr long long kMostRows = 32;  // more than any kernel has, or any border reflects onto one row

// Calls f(x) for first <= x < last, but for begin <= x < end.
template <class F>
inline void for_outside(long long begin, long long end, long long first, long long last, F f) {
  for (long long x = first; x < last && x < begin; ++x) f(x);
  for (long long x = end > first ? end : first; x < last; ++x) f(x);
}

template <class T, int Rows>
void add_some_rows(const T* const* from, long long rows, T bias, T* to, long long begin, long long end) {
  using V = typename Vector<T>::type;
  const long long count = Rows ? Rows : rows;
  const T* local[kMostRows];
  for (long long n = 0; n < count; ++n) local[n] = from[n];
  long long x = begin;
  for (; x + kWidth<T> <= end; x += kWidth<T>) {
    V sum = V{} + bias;
    for (long long n = 0; n < count; ++n) sum += load_from(local[n] + x);
    store_to(to + x, sum);
  }
  for (; x < end; ++x) {
    T sum = bias;
    for (long long n = 0; n < count; ++n) sum += local[n][x];
    to[x] = sum;
  }
}

// to[x] = bias + sum of from[n][x], for begin <= x < end.
template <class T>
void add_rows(const T* const* from, long long rows, T bias, T* to, long long begin, long long end) {
  switch (rows) {
    case 1: add_some_rows<T, 1>(from, 1, bias, to, begin, end); break;
    case 2: add_some_rows<T, 2>(from, 2, bias, to, begin, end); break;
    case 3: add_some_rows<T, 3>(from, 3, bias, to, begin, end); break;
    case 5: add_some_rows<T, 5>(from, 5, bias, to, begin, end); break;
    default: add_some_rows<T, 0>(from, rows, bias, to, begin, end);
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
inline long long row_of(const TapImage& t, long long y, long long ky) {
  const long long row = padded_origin(y + ky - t.padding, 2 * t.height, t.padding, t.mode);
  return row < 0 ? -1 : row / 2;
}

template <class T>
void assemble(const TapImage& t, const T* taps, long long plane_stride, long long first, long long last, T bias, T* out,
              T* scratch) {
  if (t.kernel_h == 3 && t.kernel_w == 3 && t.padding == 1)
    return assemble_3x3(t, taps, plane_stride, first, last, bias, out);
  const long long line = t.width + 16;
  T *column_sums = scratch, *halves = scratch + t.kernel_w * line;
  for (long long y = 2 * first; y < 2 * last; ++y) {
    // Tap rows first, once for both phases of the columns.
    long long place[kMostRows], seen = 0, tap_row[kMostRows];
    for (long long ky = 0; ky < t.kernel_h; ++ky) {
      const long long row = row_of(t, y, ky);
      if (row < 0) continue;
      tap_row[seen] = ky;
      place[seen++] = t.place(row);
    }
    for (long long kx = 0; kx < t.kernel_w; ++kx) {
      const T* rows[kMostRows];
      for (long long n = 0; n < seen; ++n) rows[n] = taps + (tap_row[n] * t.kernel_w + kx) * plane_stride + place[n];
      add_rows(rows, seen, T(0), column_sums + kx * line, 0, t.width);
    }
    for (long long phase = 0; phase < 2; ++phase) {
      // Columns that lie inside for every tap are added up in registers, the few at the borders one by one.
      const T* shifted[kMostRows];
      long long begin = 0, end = t.width;
      for (long long kx = 0; kx < t.kernel_w; ++kx) {
        const Columns columns(t, phase, kx);
        shifted[kx] = column_sums + kx * line + columns.shift;
        begin = columns.from > begin ? columns.from : begin;
        end = columns.to < end ? columns.to : end;
      }
      end = end > begin ? end : begin;
      T* half = halves + phase * line;
      add_rows(shifted, t.kernel_w, bias, half, begin, end);
      for_outside(begin, end, 0, t.width, [&](long long x) {
        T sum = bias;
        for (long long kx = 0; kx < t.kernel_w; ++kx) {
          const Columns columns(t, phase, kx);
          const bool inside = x >= columns.from && x < columns.to;
          const long long column = inside ? x + columns.shift : columns.border(t, x);
          if (column >= 0) sum += column_sums[kx * line + column];
        }
        half[x] = sum;
      });
    }
    interleave(halves, halves + line, out + y * 2 * t.width, t.width);
  }
}

template <class T>
void spread(const TapImage& t, const T* grad_out, long long first, long long last, T* taps, long long plane_stride,
            T* scratch) {
  if (t.kernel_h == 3 && t.kernel_w == 3 && t.padding == 1)
    return spread_3x3(t, grad_out, first, last, taps, plane_stride);
  const long long line = t.width + 16;
  T *rows_sum = scratch, *halves = scratch + 2 * line;
  for (long long row = first; row < last; ++row) {
    for (long long ky = 0; ky < t.kernel_h; ++ky) {
      // The output rows that see this one: two in a row, and at the border those that the padding reflects.
      const T* seen_by[kMostRows];
      long long found = 0;
      const long long near = 2 * row - ky + t.padding;
      const auto look = [&](long long y) {
        if (y >= 0 && y < 2 * t.height && row_of(t, y, ky) == row) seen_by[found++] = grad_out + y * 2 * t.width;
      };
      if (row > t.padding && row < t.height - 1 - t.padding) {
        look(near);
        look(near + 1);
      } else {
        for (long long y = near - 4 * t.padding - 2; y <= near + 4 * t.padding + 3; ++y) look(y);
      }
      add_rows(seen_by, found, T(0), rows_sum, 0, 2 * t.width);
      deinterleave(rows_sum, halves, halves + line, t.width);
      for (long long kx = 0; kx < t.kernel_w; ++kx) {
        T* sum = taps + (ky * t.kernel_w + kx) * plane_stride + (row - first) * t.width;
        const T* shifted[2];
        long long begin = 0, end = t.width;
        for (long long phase = 0; phase < 2; ++phase) {
          const Columns columns(t, phase, kx);
          begin = columns.from + columns.shift > begin ? columns.from + columns.shift : begin;
          end = columns.to + columns.shift < end ? columns.to + columns.shift : end;
          shifted[phase] = halves + phase * line - columns.shift;
        }
        end = end > begin ? end : begin;
        add_rows(shifted, 2, T(0), sum, begin, end);
        for_outside(begin, end, 0, t.width, [&](long long x) { sum[x] = 0; });
        for (long long phase = 0; phase < 2; ++phase) {
          const Columns columns(t, phase, kx);
          const T* gradient = halves + phase * line;
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

void assemble_taps(const TapImage& t, const float* taps, long long plane_stride, long long first, long long last,
                   float bias, float* out, float* scratch) {
  assemble(t, taps, plane_stride, first, last, bias, out, scratch);
}
void assemble_taps(const TapImage& t, const double* taps, long long plane_stride, long long first, long long last,
                   double bias, double* out, double* scratch) {
  assemble(t, taps, plane_stride, first, last, bias, out, scratch);
}
void spread_taps(const TapImage& t, const float* grad_out, long long first, long long last, float* taps,
                 long long plane_stride, float* scratch) {
  spread(t, grad_out, first, last, taps, plane_stride, scratch);
}
void spread_taps(const TapImage& t, const double* grad_out, long long first, long long last, double* taps,
                 long long plane_stride, double* scratch) {
  spread(t, grad_out, first, last, taps, plane_stride, scratch);
}

}  // namespace sparse_gen::SPARSE_GEN_ISA
