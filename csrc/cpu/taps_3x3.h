// The tap fold's assembly and its adjoint for a 3×3 kernel, every row in one pass: of the rows and columns that the
// four output pixels of a small one see, most are shared.
#pragma once

#include "padding.h"
#include "sparse_upsample_conv2d.h"
#include "vector.h"

namespace sparse_gen::SPARSE_GEN_ISA {

namespace {

// Lanes one further on, the last from what follows; and one back.
template <class V, int... L>
inline V shift_down(V v, V next, Lanes<L...>) {
  return __builtin_shufflevector(v, next, (L + 1)...);
}
template <class V, int... L>
inline V shift_up(V before, V v, Lanes<L...>) {
  constexpr int width = sizeof...(L);
  return __builtin_shufflevector(before, v, (L + width - 1)...);
}

template <class V, int... L>
inline void interleave(V even, V odd, V& low, V& high, Lanes<L...>) {
  constexpr int width = sizeof...(L);
  low = __builtin_shufflevector(even, odd, (L / 2 + L % 2 * width)...);
  high = __builtin_shufflevector(even, odd, (width / 2 + L / 2 + L % 2 * width)...);
}

template <class V, int... L>
inline void deinterleave(V low, V high, V& even, V& odd, Lanes<L...>) {
  even = __builtin_shufflevector(low, high, (2 * L)...);
  odd = __builtin_shufflevector(low, high, (2 * L + 1)...);
}

// The vector at x of a row that ends at `end`, zeros behind it. `Whole` says that all of it is inside.
template <bool Whole, class T>
inline typename Vector<T>::type load_inside(const T* row, long long x, long long end) {
  if constexpr (Whole) return load_from(row + x);
  return load_part(row + x, end - x);
}
template <bool Whole, class T>
inline void store_inside(T* row, long long x, long long end, typename Vector<T>::type v) {
  if constexpr (Whole)
    store_to(row + x, v);
  else
    store_part(row + x, v, end - x);
}

// Two output rows of one small row: tap row 0 at `above` for the upper and `own` for the lower one, tap row 2 at
// `own` and `below`. A missing row is null.
template <class T>
struct Taps3 {
  using V = typename Vector<T>::type;
  const T* taps;
  long long plane_stride, above, own, below;
  bool has_above, has_below;

  const T* row(long long ky, long long kx, long long place) const { return taps + (3 * ky + kx) * plane_stride + place; }

  // Column kx's sums over the tap rows, for the upper and the lower output row.
  template <bool Whole>
  void sum(long long kx, long long x, long long end, V& upper, V& lower) const {
    const V middle = load_inside<Whole>(row(1, kx, own), x, end);
    upper = middle + load_inside<Whole>(row(2, kx, own), x, end);
    lower = middle + load_inside<Whole>(row(0, kx, own), x, end);
    if (has_above) upper += load_inside<Whole>(row(0, kx, above), x, end);
    if (has_below) lower += load_inside<Whole>(row(2, kx, below), x, end);
  }
};

template <class T>
void assemble_3x3(const TapImage& t, const T* taps, long long plane_stride, long long first, long long last, T bias,
                  T* out) {
  using V = typename Vector<T>::type;
  using All = typename CountLanes<kWidth<T>>::type;
  const bool zeros = t.mode == kPadZeros;
  for (long long r = first; r < last; ++r) {
    const long long before = r > 0 ? r - 1 : 0, after = r + 1 < t.height ? r + 1 : r;
    const Taps3<T> rows{taps, plane_stride, t.place(before), t.place(r), t.place(after), r > 0 || !zeros,
                        r + 1 < t.height || !zeros};
    T *upper = out + 4 * r * t.width, *lower = upper + 2 * t.width;
    // At the borders the padding repeats the border pixel, reflected or replicated, or is zero.
    V left[2] = {}, now[2], next[2] = {};
    const auto sum = [&](long long kx, long long x, V(&v)[2]) {
      if (x + kWidth<T> <= t.width)
        rows.template sum<true>(kx, x, t.width, v[0], v[1]);
      else
        rows.template sum<false>(kx, x, t.width, v[0], v[1]);
    };
    sum(2, 0, now);
    for (long long x = 0; x < t.width; x += kWidth<T>) {
      V first_column[2], middle[2];
      sum(0, x, first_column);
      sum(1, x, middle);
      const bool ends = x + kWidth<T> >= t.width;
      if (!ends) sum(2, x + kWidth<T>, next);
      for (int py = 0; py < 2; ++py) {
        if (x == 0 && !zeros) left[py] = V{} + first_column[py][0];
        V right = shift_down(now[py], next[py], All{});
        if (ends) right[t.width - 1 - x] = zeros ? T(0) : now[py][t.width - 1 - x];
        const V center = middle[py] + bias;
        const V even = shift_up(left[py], first_column[py], All{}) + (center + now[py]);
        const V odd = (first_column[py] + center) + right;
        V low, high;
        interleave(even, odd, low, high, All{});
        T* to = py ? lower : upper;
        if (x + kWidth<T> <= t.width) {
          store_to(to + 2 * x, low);
          store_to(to + 2 * x + kWidth<T>, high);
        } else {
          store_part(to + 2 * x, low, 2 * (t.width - x));
          store_part(to + 2 * x + kWidth<T>, high, 2 * (t.width - x) - kWidth<T>);
        }
        left[py] = first_column[py];
        now[py] = next[py];
      }
    }
  }
}

template <class T>
void spread_3x3(const TapImage& t, const T* grad_out, long long first, long long last, T* taps, long long plane_stride) {
  using V = typename Vector<T>::type;
  using All = typename CountLanes<kWidth<T>>::type;
  const bool zeros = t.mode == kPadZeros;
  const long long row = 2 * t.width;
  for (long long r = first; r < last; ++r) {
    const T* own = grad_out + 2 * r * row;
    const bool top = r == 0, bottom = r + 1 == t.height;
    T* to = taps + (r - first) * t.width;
    // Of the rows 2r - 1 .. 2r + 2, what each tap row sees: two of them, and at a border the one that the padding
    // repeats.
    const auto sum = [&](long long x, V(&even)[3], V(&odd)[3]) {
      V total[3][2];
      for (int half = 0; half < 2; ++half) {
        const long long at = 2 * x + half * kWidth<T>;
        const auto load = [&](const T* from) {
          return at + kWidth<T> <= row ? load_from(from + at) : load_part(from + at, row - at);
        };
        const V upper = load(own), lower = load(own + row);
        total[1][half] = upper + lower;
        total[0][half] = !bottom ? lower + load(own + 2 * row) : lower;
        total[2][half] = !top ? upper + load(own - row) : upper;
        if (top && !zeros) total[0][half] += upper;
        if (bottom && !zeros) total[2][half] += lower;
      }
      for (int ky = 0; ky < 3; ++ky) deinterleave(total[ky][0], total[ky][1], even[ky], odd[ky], All{});
    };
    V even[3], odd[3], next_even[3] = {}, next_odd[3] = {}, before[3] = {};
    sum(0, even, odd);
    for (long long x = 0; x < t.width; x += kWidth<T>) {
      const bool ends = x + kWidth<T> >= t.width;
      if (!ends) sum(x + kWidth<T>, next_even, next_odd);
      for (int ky = 0; ky < 3; ++ky) {
        if (ends) next_even[ky] = V{};
        V v[3] = {odd[ky] + shift_down(even[ky], next_even[ky], All{}), even[ky] + odd[ky],
                  shift_up(before[ky], odd[ky], All{}) + even[ky]};
        if (x == 0 && !zeros) v[0][0] += even[ky][0];
        if (ends && !zeros) v[2][t.width - 1 - x] += odd[ky][t.width - 1 - x];
        for (int kx = 0; kx < 3; ++kx) {
          T* tap = to + (3 * ky + kx) * plane_stride;
          if (x + kWidth<T> <= t.width)
            store_to(tap + x, v[kx]);
          else
            store_part(tap + x, v[kx], t.width - x);
        }
        before[ky] = odd[ky];
        even[ky] = next_even[ky];
        odd[ky] = next_odd[ky];
      }
    }
  }
}

}  // namespace

}  // namespace sparse_gen::SPARSE_GEN_ISA
