#include "sparse_upsample_conv2d.h"

#include "taps_3x3.h"
#include "upsampling.h"

namespace sparse_gen::SPARSE_GEN_ISA {

namespace {

// Which up-sampled columns the output columns of one phase (even or odd) see through one tap column: those of one
// parity, x + shift of them for from <= x < to, and for the others, which lie at the padding, what border says.
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

  bool odd() const { return first & 1; }

  // Calls f(x, up-sampled column) for the others, but where that is a zero.
  template <class F>
  void at_border(const TapImage& t, F f) const {
    for (long long x = 0; x < t.width; ++x) {
      if (x == from) x = to;
      if (x >= t.width) return;
      const long long column = padded_origin(2 * x + first, 2 * t.width, t.padding, t.mode);
      if (column >= 0) f(x, column);
    }
  }
};

template <class T, int Count>
void add_some_rows(const Terms<T>& terms, T start, T* to, long long length) {
  using V = typename Vector<T>::type;
  long long x = 0;
  for (; x + kWidth<T> <= length; x += kWidth<T>) store_to(to + x, sum_at<T, Count>(terms, x, V{} + start));
  for (; x < length; ++x) {
    T sum = start;
    for (int n = 0; n < terms.count; ++n) sum += terms.factor[n] * terms.from[n][x];
    to[x] = sum;
  }
}

// to[x] = start + sum of the terms at x, for 0 <= x < length.
template <class T>
void add_rows(const Terms<T>& terms, T start, T* to, long long length) {
  switch (terms.count) {
    case 2: return add_some_rows<T, 2>(terms, start, to, length);
    case 3: return add_some_rows<T, 3>(terms, start, to, length);
    case 4: return add_some_rows<T, 4>(terms, start, to, length);
    case 5: return add_some_rows<T, 5>(terms, start, to, length);
    case 6: return add_some_rows<T, 6>(terms, start, to, length);
    default: return add_some_rows<T, 0>(terms, start, to, length);
  }
}

// Rows of scratch memory, zeros around each.
template <class T>
struct Rows {
  T* first;
  long long stride, width;

  Rows(const TapImage& t, T* scratch, int count) : first(scratch + kRowBefore), stride(tap_row(t)), width(t.width) {
    for (int n = 0; n < count; ++n) {
      for (long long x = 0; x < kRowBefore; ++x) row(n)[x - kRowBefore] = 0;
      for (long long x = 0; x < kRowBehind; ++x) row(n)[width + x] = 0;
    }
  }

  T* row(long long n) const { return first + n * stride; }
};

// second_share of the even and the odd columns.
template <class T>
struct Shares {
  T *even, *odd;

  Shares(const TapImage& t, const Rows<T>& rows, int at) : even(rows.row(at)), odd(rows.row(at + 1)) {
    for (long long x = 0; x < t.width; ++x) {
      even[x] = second_share<T>(2 * x, t.width, t.upsample);
      odd[x] = second_share<T>(2 * x + 1, t.width, t.upsample);
    }
  }

  // A row's even and odd up-sampled columns.
  void widen(const T* row, T* __restrict to_even, T* __restrict to_odd, long long width) const {
    for (long long x = 0; x < width; ++x) {
      to_even[x] = row[x] + even[x] * (row[x - 1] - row[x]);
      to_odd[x] = row[x] + odd[x] * (row[x + 1] - row[x]);
    }
  }

  // The adjoint, of gradients of even and odd columns with zeros around them.
  void narrow(const T* grad_even, const T* grad_odd, T* __restrict to, long long width) const {
    for (long long x = 0; x < width; ++x)
      to[x] = (1 - even[x]) * grad_even[x] + even[x + 1] * grad_even[x + 1] + (1 - odd[x]) * grad_odd[x] +
              odd[x - 1] * grad_odd[x - 1];
  }
};

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

template <class T>
inline Sources<T> rows_of(const TapImage& t, long long y, long long ky) {
  return sources_of<T>(y + ky - t.padding, t.height, t.padding, t.mode, t.upsample);
}

template <class T>
void assemble(const TapImage& t, const T* taps, long long plane_stride, long long first, long long last, T bias, T* out,
              T* scratch) {
  const bool nearest = t.upsample == kNearest;
  if (nearest && t.kernel_h == 3 && t.kernel_w == 3 && t.padding == 1)
    return assemble_3x3(t, taps, plane_stride, first, last, bias, out);
  const Rows<T> rows(t, scratch, 2 * t.kernel_w + 5);
  const auto column_sum = [&](long long kx, bool odd) { return rows.row(2 * kx + (odd && !nearest)); };
  T *sum = rows.row(2 * t.kernel_w), *halves[2] = {rows.row(2 * t.kernel_w + 1), rows.row(2 * t.kernel_w + 2)};
  const Shares<T> shares(t, rows, 2 * t.kernel_w + 3);
  for (long long y = 2 * first; y < 2 * last; ++y) {
    // Tap rows first, once for both phases of the columns.
    Terms<T> seen;
    for (long long ky = 0; ky < t.kernel_h; ++ky) {
      const Sources<T> s = rows_of<T>(t, y, ky);
      for (int n = 0; n < s.count; ++n) seen.add(taps + ky * t.kernel_w * plane_stride + t.place(s.at[n]), s.factor[n]);
    }
    for (long long kx = 0; kx < t.kernel_w; ++kx) {
      add_rows(seen, T(0), nearest ? column_sum(kx, false) : sum, t.width);
      if (!nearest) shares.widen(sum, column_sum(kx, false), column_sum(kx, true), t.width);
      for (int n = 0; n < seen.count; ++n) seen.from[n] += plane_stride;
    }
    for (long long phase = 0; phase < 2; ++phase) {
      Terms<T> shifted;
      for (long long kx = 0; kx < t.kernel_w; ++kx) {
        const Columns columns(t, phase, kx);
        shifted.add(column_sum(kx, columns.odd()) + columns.shift, 1);
      }
      add_rows(shifted, bias, halves[phase], t.width);
      for (long long kx = 0; kx < t.kernel_w; ++kx)
        Columns(t, phase, kx).at_border(t, [&](long long x, long long column) {
          halves[phase][x] += column_sum(kx, column & 1)[column / 2];
        });
    }
    interleave(halves[0], halves[1], out + y * 2 * t.width, t.width);
  }
}

// The output rows that see small row `row` through tap row ky.
template <class T>
Terms<T> rows_seeing(const TapImage& t, const T* grad_out, long long row, long long ky) {
  Terms<T> terms;
  const auto look = [&](long long y) {
    if (y < 0 || y >= 2 * t.height) return;
    const Sources<T> s = rows_of<T>(t, y, ky);
    for (int n = 0; n < s.count; ++n)
      if (s.at[n] == row) terms.add(grad_out + y * 2 * t.width, s.factor[n]);
  };
  const long long near = 2 * row - ky + t.padding;
  // At the border also those that the padding reflects.
  const bool inside = row > t.padding && row < t.height - 1 - t.padding;
  const long long reach = inside ? (t.upsample == kNearest ? 0 : 1) : 4 * t.padding + 2;
  for (long long y = near - reach; y <= near + 1 + reach; ++y) look(y);
  return terms;
}

template <class T>
void spread(const TapImage& t, const T* grad_out, long long first, long long last, T* taps, long long plane_stride,
            T* scratch) {
  if (t.upsample == kNearest && t.kernel_h == 3 && t.kernel_w == 3 && t.padding == 1)
    return spread_3x3(t, grad_out, first, last, taps, plane_stride);
  const Rows<T> rows(t, scratch, 4);
  T *halves[2] = {rows.row(0), rows.row(1)}, *sum = rows.row(4) - kRowBefore;
  const Shares<T> shares(t, rows, 2);
  for (long long row = first; row < last; ++row)
    for (long long ky = 0; ky < t.kernel_h; ++ky) {
      add_rows(rows_seeing(t, grad_out, row, ky), T(0), sum, 2 * t.width);
      deinterleave(sum, halves[0], halves[1], t.width);
      for (long long kx = 0; kx < t.kernel_w; ++kx) {
        T* to = taps + (ky * t.kernel_w + kx) * plane_stride + (row - first) * t.width;
        const Columns columns[2] = {Columns(t, 0, kx), Columns(t, 1, kx)};
        const T* seen[2];  // by the even and the odd up-sampled columns
        for (int phase = 0; phase < 2; ++phase) seen[columns[phase].odd()] = halves[phase] - columns[phase].shift;
        shares.narrow(seen[0], seen[1], to, t.width);
        for (int phase = 0; phase < 2; ++phase)
          columns[phase].at_border(t, [&](long long x, long long column) {
            const Sources<T> s = sources_of<T>(column, t.width, 0, kPadZeros, t.upsample);
            for (int n = 0; n < s.count; ++n) to[s.at[n]] += s.factor[n] * halves[phase][x];
          });
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
