#include "masked_conv2d_taps.h"

#include "matmul.h"
#include "shuffle.h"
#include "upsampling.h"

namespace sparse_gen::SPARSE_GEN_ISA {

namespace {

template <class T>
inline Sources<T> sources(const TapConvolution& c, long long padded, long long length) {
  return sources_of<T>(padded, length, c.padding, c.mode, c.bilinear ? kBilinear : kNearest);
}

template <class T, int Count>
void add_up(const Terms<T>& terms, long long begin, long long end, T* to) {
  for (long long x = begin; x < end; x += kWidth<T>)
    store_to(to + x, sum_at<T, Count>(terms, x, typename Vector<T>::type{}));
}

// to[x] = sum of the terms at x, for begin <= x < end and up to the end of the last vector.
template <class T>
inline void add_terms(const Terms<T>& terms, long long begin, long long end, T* to) {
  switch (terms.count) {
    case 2: return add_up<T, 2>(terms, begin, end, to);
    case 3: return add_up<T, 3>(terms, begin, end, to);
    case 4: return add_up<T, 4>(terms, begin, end, to);
    case 6: return add_up<T, 6>(terms, begin, end, to);
    default: return add_up<T, 0>(terms, begin, end, to);
  }
}

// Output columns whose taps may see padding or clamped neighbours, halo() at either side: what each one sees.
template <class T>
struct Borders {
  struct Seen {
    long long phase, x, kx, at;
    T factor;
  };
  long long inner_begin, inner_end;  // the others
  int columns = 0, count = 0;
  long long column[4 * kMostTaps];
  Seen seen[32 * kMostTaps];

  explicit Borders(const TapConvolution& c) {
    inner_begin = c.halo() < c.width ? c.halo() : c.width;
    inner_end = c.width - c.halo() > inner_begin ? c.width - c.halo() : inner_begin;
    for (long long x = 0; x < c.width; ++x) {
      if (x == inner_begin) x = inner_end;
      if (x == c.width) break;
      column[columns++] = x;
      for (long long phase = 0; phase < 2; ++phase)
        for (long long kx = 0; kx < c.kernel; ++kx) {
          const Sources<T> s = sources<T>(c, 2 * x + phase + kx - c.padding, c.width);
          for (int n = 0; n < s.count; ++n) seen[count++] = {phase, x, kx, s.at[n], s.factor[n]};
        }
    }
  }
};

// The shift of the small columns that output columns of one phase see through tap column kx, away from the borders.
template <class T, class F>
inline void for_shifts(const TapConvolution& c, long long phase, long long kx, F f) {
  const long long up = phase + kx - c.padding, near = up >> 1;
  if (!c.bilinear) return f(near, T(1));
  f(near, T(0.75));
  f(near + (up & 1 ? 1 : -1), T(0.25));
}

template <class T>
void columns(const TapConvolution& c, const TapRows<T>& channel, const TapHalves<T>& halves) {
  const Borders<T> borders(c);
  for (long long ky = 0; ky < c.kernel; ++ky)
    for (long long row = channel.first; row < channel.last; ++row) {
      const T* plane = channel.data + ky * c.kernel * channel.stride + (row - channel.first) * c.width;
      T* half[2] = {halves.row(ky, row), halves.row(ky, row) + halves.stride / 2};
      for (long long phase = 0; phase < 2; ++phase) {
        Terms<T> terms;
        for (long long kx = 0; kx < c.kernel; ++kx)
          for_shifts<T>(c, phase, kx,
                        [&](long long shift, T factor) { terms.add(plane + kx * channel.stride + shift, factor); });
        add_terms(terms, borders.inner_begin, borders.inner_end, half[phase]);
        for (int n = 0; n < borders.columns; ++n) half[phase][borders.column[n]] = 0;
      }
      for (int n = 0; n < borders.count; ++n) {
        const auto& s = borders.seen[n];
        half[s.phase][s.x] += s.factor * plane[s.kx * channel.stride + s.at];
      }
    }
}

template <class T>
void output(const TapConvolution& c, const TapHalves<T>& halves, T bias, long long first, long long last, T* out) {
  using V = typename Vector<T>::type;
  constexpr long long w = kWidth<T>;
  for (long long y = 2 * first; y < 2 * last; ++y) {
    Terms<T> terms;
    for (long long ky = 0; ky < c.kernel; ++ky) {
      const Sources<T> s = sources<T>(c, y + ky - c.padding, c.height);
      for (int n = 0; n < s.count; ++n) terms.add(halves.row(ky, s.at[n]), s.factor[n]);
    }
    Terms<T> odd = terms;
    for (int n = 0; n < odd.count; ++n) odd.from[n] += halves.stride / 2;
    T* to = out + y * 2 * c.width;
    const V start = V{} + bias;
    for (long long x = 0; x < c.width; x += w) {
      const V even_sum = terms.count == 3 ? sum_at<T, 3>(terms, x, start) : sum_at<T, 0>(terms, x, start);
      const V odd_sum = terms.count == 3 ? sum_at<T, 3>(odd, x, start) : sum_at<T, 0>(odd, x, start);
      const V low = pick<T>(even_sum, odd_sum, [](int lane) { return lane / 2 + (lane % 2) * (int)w; });
      const V high = pick<T>(even_sum, odd_sum, [](int lane) { return (lane + (int)w) / 2 + (lane % 2) * (int)w; });
      if (x + w <= c.width) {
        store_to(to + 2 * x, low);
        store_to(to + 2 * x + w, high);
      } else {
        T both[2 * w];
        store_to(both, low);
        store_to(both + w, high);
        __builtin_memcpy(to + 2 * x, both, 2 * (c.width - x) * sizeof(T));
      }
    }
  }
}

// The output rows that see small row `row` through tap row ky, in the first channel's gradient.
template <class T>
Terms<T> rows_seeing(const TapConvolution& c, const T* grad_out, long long row, long long ky) {
  Terms<T> terms;
  const long long near = 2 * row - ky + c.padding, reach = 2 * c.padding + 3;
  for (long long y = near - reach < 0 ? 0 : near - reach; y <= near + reach && y < 2 * c.height; ++y) {
    const Sources<T> s = sources<T>(c, y + ky - c.padding, c.height);
    T factor = 0;
    for (int n = 0; n < s.count; ++n)
      if (s.at[n] == row) factor += s.factor[n];
    if (factor != 0) terms.add(grad_out + y * 2 * c.width, factor);
  }
  return terms;
}

// Adds up rows with their even and odd columns apart.
template <class T, int Count>
void add_halves(const Terms<T>& terms, long long width, T* even, T* odd) {
  using V = typename Vector<T>::type;
  constexpr long long w = kWidth<T>;
  long long x = 0;
  for (; x + w <= width; x += w) {
    const V low = sum_at<T, Count>(terms, 2 * x, V{}), high = sum_at<T, Count>(terms, 2 * x + w, V{});
    store_to(even + x, pick<T>(low, high, [](int lane) { return 2 * lane; }));
    store_to(odd + x, pick<T>(low, high, [](int lane) { return 2 * lane + 1; }));
  }
  for (; x < width; ++x) {
    even[x] = odd[x] = 0;
    for (int n = 0; n < terms.count; ++n) {
      even[x] += terms.factor[n] * terms.from[n][2 * x];
      odd[x] += terms.factor[n] * terms.from[n][2 * x + 1];
    }
  }
}

template <class T>
void spread(const TapConvolution& c, const T* grad_out, long long from, long long to, const TapRows<T>& rows,
            T* scratch) {
  const Borders<T> borders(c);
  const long long stride = row_stride(c.width + 2 * kSpreadMargin);
  T* half[2] = {scratch + kSpreadMargin, scratch + stride + kSpreadMargin};
  for (long long i = 0; i < 2 * stride; ++i) scratch[i] = 0;
  for (long long ky = 0; ky < c.kernel; ++ky)
    for (long long row = rows.first; row < rows.last; ++row) {
      const Terms<T> first_channel = rows_seeing(c, grad_out, row, ky);
      for (long long o = from; o < to; ++o) {
        Terms<T> terms = first_channel;
        for (int n = 0; n < terms.count; ++n) terms.from[n] += o * 4 * c.height * c.width;
        if (terms.count == 2)
          add_halves<T, 2>(terms, c.width, half[0], half[1]);
        else
          add_halves<T, 0>(terms, c.width, half[0], half[1]);
        // The border columns are taken out of the rows and dealt out by themselves.
        T kept[2][4 * kMostTaps];
        for (int n = 0; n < borders.columns; ++n)
          for (int phase = 0; phase < 2; ++phase) {
            kept[phase][n] = half[phase][borders.column[n]];
            half[phase][borders.column[n]] = 0;
          }
        T* plane = rows.data + (o * c.kernel + ky) * c.kernel * rows.stride + (row - rows.first) * c.width;
        for (long long kx = 0; kx < c.kernel; ++kx) {
          Terms<T> shifted;
          for (long long phase = 0; phase < 2; ++phase)
            for_shifts<T>(c, phase, kx, [&](long long shift, T factor) { shifted.add(half[phase] - shift, factor); });
          add_terms(shifted, 0, c.width, plane + kx * rows.stride);
        }
        for (int n = 0; n < borders.columns; ++n)
          for (int phase = 0; phase < 2; ++phase) half[phase][borders.column[n]] = kept[phase][n];
        for (int n = 0; n < borders.count; ++n) {
          const auto& s = borders.seen[n];
          plane[s.kx * rows.stride + s.at] += s.factor * half[s.phase][s.x];
        }
      }
    }
}

template <class T>
void planes(const TapConvolution& c, const T* x, long long x_stride, const T* weight, long long from, long long to,
            const TapRows<T>& rows) {
  const long long taps = c.taps();
  matmul(
      (to - from) * taps, (rows.last - rows.first) * c.width,
      [&](long long r) { return weight + (from + r / taps) * c.in_channels * taps + r % taps; },
      Depth{c.in_channels, 1, taps, 0, x_stride, 0}, x, [&](long long r) { return rows.data + r * rows.stride; }, false);
}

template <class T>
void grad_of_x(const TapConvolution& c, const TapRows<T>& rows, const T* weight, long long from, long long to, T* room,
               long long room_stride, T* grad_x) {
  const long long taps = c.taps(), columns = (rows.last - rows.first) * c.width;
  matmul(
      to - from, columns, [&](long long r) { return weight + (from + r) * taps; },
      Depth{c.out_channels, taps, c.in_channels * taps, 1, taps * rows.stride, rows.stride}, rows.data,
      [&](long long r) { return room + r * room_stride; }, false);
  for (long long i = from; i < to; ++i)
    __builtin_memcpy(grad_x + (i * c.height + rows.first) * c.width, room + (i - from) * room_stride,
                     columns * sizeof(T));
}

template <class T>
void grad_of_weight(const TapConvolution& c, const TapRows<T>& rows, const T* x, long long x_stride, long long begin,
                    long long end, bool add, T* grad, long long stride) {
  matmul(
      end - begin, c.in_channels, [&](long long r) { return rows.data + (begin + r) * rows.stride; },
      Depth{1, (rows.last - rows.first) * c.width, 0, 1, 0, x_stride}, x,
      [&](long long r) { return grad + (begin + r) * stride; }, add);
}

template <class T>
void copy(const TapConvolution& c, const T* x, long long first, long long last, T* to, long long stride) {
  for (long long i = 0; i < c.in_channels; ++i)
    __builtin_memcpy(to + i * stride, x + (i * c.height + first) * c.width, (last - first) * c.width * sizeof(T));
}

}  // namespace

#define SPARSE_GEN_DEFINE(T)                                                                                         \
  void copy_rows(const TapConvolution& c, const T* x, long long first, long long last, T* to, long long stride) {    \
    copy(c, x, first, last, to, stride);                                                                             \
  }                                                                                                                  \
  void transpose_rows(const T* from, long long from_stride, long long rows, long long columns, T* to,                \
                      long long to_stride) {                                                                         \
    transpose(from, from_stride, rows, columns, to, to_stride);                                                      \
  }                                                                                                                  \
  void tap_planes(const TapConvolution& c, const T* x, long long x_stride, const T* weight, long long from,          \
                  long long to, const TapRows<T>& rows) {                                                            \
    planes(c, x, x_stride, weight, from, to, rows);                                                                  \
  }                                                                                                                  \
  void tap_columns(const TapConvolution& c, const TapRows<T>& channel, const TapHalves<T>& halves) {                 \
    columns(c, channel, halves);                                                                                     \
  }                                                                                                                  \
  void tap_output(const TapConvolution& c, const TapHalves<T>& halves, T bias, long long first, long long last,      \
                  T* out) {                                                                                          \
    output(c, halves, bias, first, last, out);                                                                       \
  }                                                                                                                  \
  void tap_spread(const TapConvolution& c, const T* grad_out, long long from, long long to, const TapRows<T>& rows,  \
                  T* scratch) {                                                                                      \
    spread(c, grad_out, from, to, rows, scratch);                                                                    \
  }                                                                                                                  \
  void tap_grad_x(const TapConvolution& c, const TapRows<T>& rows, const T* weight, long long from, long long to,    \
                  T* room, long long room_stride, T* grad_x) {                                                       \
    grad_of_x(c, rows, weight, from, to, room, room_stride, grad_x);                                               \
  }                                                                                                                  \
  void tap_grad_weight(const TapConvolution& c, const TapRows<T>& rows, const T* x, long long x_stride,              \
                       long long begin, long long end, bool add, T* grad, long long stride) {                        \
    grad_of_weight(c, rows, x, x_stride, begin, end, add, grad, stride);                                             \
  }
SPARSE_GEN_DEFINE(float)
SPARSE_GEN_DEFINE(double)
#undef SPARSE_GEN_DEFINE

}  // namespace sparse_gen::SPARSE_GEN_ISA
