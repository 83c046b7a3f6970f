#include "aligned_rows.h"

#include "dot_sums.h"

namespace sparse_gen::SPARSE_GEN_ISA {

namespace {

// Vectors of a tile: as many again are held for the kernel column that is being summed.
constexpr int kTile = SPARSE_GEN_VECTOR_BYTES == 64 ? 8 : 4;

// Lane l of the result is lane l + D of low and high, which follow each other; with D < 0 counted from high.
template <int D, class V, int... L>
inline V shifted(V low, V high, Lanes<L...>) {
  constexpr int width = sizeof...(L);
  return __builtin_shufflevector(low, high, (D < 0 ? width + L + D : L + D)...);
}

template <int D>
struct Shift {
  static constexpr int value = D;
};

// Calls f(Shift<shift>{}). Vectors of two elements are not shifted by more than one.
template <int Lanes, class F>
inline void with_shift(int shift, F f) {
  constexpr int most = Lanes > kMostShift ? kMostShift : 1, more = most < 2 ? most : 2;
  switch (shift) {
    case -3:
      return f(Shift<-most>{});
    case -2:
      return f(Shift<-more>{});
    case -1:
      return f(Shift<-1>{});
    case 0:
      return f(Shift<0>{});
    case 1:
      return f(Shift<1>{});
    case 2:
      return f(Shift<more>{});
    default:
      return f(Shift<most>{});
  }
}

template <int Vectors, class T>
inline void accumulate(const ColumnWeights<T>& m, int k, int end, const T* source,
                       typename Vector<T>::type (&sum)[Vectors]) {
  using V = typename Vector<T>::type;
  for (; k < end; ++k) {
    const T* from = source + m.offset[k];
    const V weight = m.value[k] - V{};
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) sum[v] += weight * load_from(from + v * kWidth<T>);
  }
}

// Fetches a few lines a call, so that all are there after `calls` of them.
template <class T>
class Fetch {
 public:
  Fetch(const Ahead<T>& ahead, long long calls) : ahead_(ahead) {
    const long long lines = ahead.planes * ((ahead.length + kInLine - 1) / kInLine);
    in_call_ = (lines + calls - 1) / calls;
  }
  void some() {
    for (long long n = 0; n < in_call_ && ahead_.planes > 0; ++n) {
      __builtin_prefetch(ahead_.rows + at_, 0, 2);
      at_ += kInLine;
      if (at_ < ahead_.length) continue;
      at_ = 0;
      ahead_.rows += ahead_.plane;
      --ahead_.planes;
    }
  }

 private:
  static constexpr long long kInLine = 64 / sizeof(T);
  Ahead<T> ahead_;
  long long in_call_, at_ = 0;
};

// A tile of Rows whole rows, or of a part of one row with neighbours on its left and right.
template <class T, int Rows, int Vectors>
void multiply_tile(const ColumnWeights<T>& m, long long block, long long first, long long last, const T* source, T* out,
                   long long out_stride, const T* bias, bool add, Fetch<T>& fetch, bool left, bool right) {
  using V = typename Vector<T>::type;
  using All = typename CountLanes<kWidth<T>>::type;
  constexpr int kAll = Rows * Vectors;
  for (long long g = first; g < last; ++g) {
    T* to = out + g * out_stride;
    fetch.some();
    // Where the group after this one will be stored, too.
    if (!add && g + 1 < last)
      for (int v = 0; v < kAll; ++v) __builtin_prefetch(to + out_stride + v * kWidth<T>, 1);
    const int* begin = m.begin + g * m.stride + block * m.columns;
    V sum[kAll];
    if (add) {
#pragma GCC unroll 16
      for (int v = 0; v < kAll; ++v) sum[v] = load_from(to + v * kWidth<T>);
    } else {
      const V start = V{} + (bias ? bias[g] : T(0));
#pragma GCC unroll 16
      for (int v = 0; v < kAll; ++v) sum[v] = start;
    }
    accumulate(m, begin[m.center], begin[m.center + 1], source, sum);
    for (int column = 0; column < m.columns; ++column) {
      const int k = begin[column], end = begin[column + 1], shift = column - m.center;
      if (k == end || shift == 0) continue;
      if (Rows == 1 && (shift < 0 ? left : right)) {
        V part[Vectors + 1] = {};
        accumulate(m, k, end, shift < 0 ? source - kWidth<T> : source, part);
        with_shift<kWidth<T>>(shift, [&](auto d) {
#pragma GCC unroll 16
          for (int v = 0; v < Vectors; ++v) sum[v] += shifted<d.value>(part[v], part[v + 1], All{});
        });
        continue;
      }
      V part[kAll] = {};
      accumulate(m, k, end, source, part);
      with_shift<kWidth<T>>(shift, [&](auto d) {
#pragma GCC unroll 16
        for (int v = 0; v < kAll; ++v) {
          if constexpr (d.value < 0)
            sum[v] += shifted<d.value>(v % Vectors ? part[v - 1] : V{}, part[v], All{});
          else
            sum[v] += shifted<d.value>(part[v], (v + 1) % Vectors ? part[v + 1] : V{}, All{});
        }
      });
    }
#pragma GCC unroll 16
    for (int v = 0; v < kAll; ++v) store_to(to + v * kWidth<T>, sum[v]);
  }
}

template <class T, int Rows, int Vectors>
void dot_tile(const ColumnWeights<T>& m, long long block, long long first, long long last, const T* source,
              const T* grad, long long grad_stride, T* sums, Fetch<T>& fetch, bool left, bool right) {
  using V = typename Vector<T>::type;
  using All = typename CountLanes<kWidth<T>>::type;
  constexpr int kAll = Rows * Vectors;
  for (long long g = first; g < last; ++g) {
    const T* from = grad + g * grad_stride;
    fetch.some();
    if (g + 1 < last)
      for (int v = 0; v < kAll; ++v) __builtin_prefetch(from + grad_stride + v * kWidth<T>);
    const int* begin = m.begin + g * m.stride + block * m.columns;
    for (int column = 0; column < m.columns; ++column) {
      int k = begin[column];
      const int end = begin[column + 1];
      if (k == end) continue;
      V held[kAll];
      const auto at = [&](int v) { return load_from(from + v * kWidth<T>); };
      // The source's column x is seen from the gradient's column x - shift.
      with_shift<kWidth<T>>(m.center - column, [&](auto d) {
#pragma GCC unroll 16
        for (int v = 0; v < kAll; ++v) {
          if constexpr (d.value == 0) {
            held[v] = at(v);
          } else if constexpr (d.value < 0) {
            const bool inside = v % Vectors || (Rows == 1 && left);
            held[v] = shifted<d.value>(inside ? at(v - 1) : V{}, at(v), All{});
          } else {
            const bool inside = (v + 1) % Vectors || (Rows == 1 && right);
            held[v] = shifted<d.value>(at(v), inside ? at(v + 1) : V{}, All{});
          }
        }
      });
      const auto dot_with = [&](int weight) {
        const T* x = source + m.offset[weight];
        V dot = held[0] * load_from(x);
#pragma GCC unroll 16
        for (int v = 1; v < kAll; ++v) dot += held[v] * load_from(x + v * kWidth<T>);
        return dot;
      };
      for (; k + 4 <= end; k += 4) {
        const V dot[4] = {dot_with(k), dot_with(k + 1), dot_with(k + 2), dot_with(k + 3)};
        add_to_sums<T>(dot, sums + (long long)k * kSumLanes<T>);
      }
      if (k < end) {
        const V dot[4] = {dot_with(k), k + 1 < end ? dot_with(k + 1) : V{}, k + 2 < end ? dot_with(k + 2) : V{}, V{}};
        add_to_sums<T>(dot, sums + (long long)k * kSumLanes<T>, end - k);
      }
    }
  }
}

// Calls f.template operator()<Rows, Vectors>(offset, left, right) for tiles of at most Most vectors.
template <class T, int Most, class F>
inline void for_column_tiles(long long rows, long long width, F f) {
  const long long vectors = width / kWidth<T>;
  long long y = 0;
  const auto whole = [&]<int Rows, int Vectors>(const auto& again) {
    for (; y + Rows <= rows; y += Rows) f.template operator()<Rows, Vectors>(y * width, false, false);
    if constexpr (Rows > 1) again.template operator()<Rows / 2, Vectors>(again);
  };
  if (vectors == 1) whole.template operator()<Most, 1>(whole);
  if (vectors == 2) whole.template operator()<Most / 2, 2>(whole);
  if (vectors == 4) whole.template operator()<Most / 4, 4>(whole);
  if constexpr (Most >= 8)
    if (vectors == 8) whole.template operator()<Most / 8, 8>(whole);
  for (; y < rows; ++y)
    for (long long v = 0; v < vectors;) {
      const long long left = vectors - v, at = y * width + v * kWidth<T>;
      const auto part = [&]<int Vectors>() {
        if constexpr (Vectors <= Most) f.template operator()<1, Vectors>(at, v > 0, left > Vectors);
        v += Vectors;
      };
      if (left >= Most)
        part.template operator()<Most>();
      else if (left >= 8)
        part.template operator()<8>();
      else if (left >= 4)
        part.template operator()<4>();
      else if (left >= 2)
        part.template operator()<2>();
      else
        part.template operator()<1>();
    }
}

// Tiles of an image at least, times the groups that pass over each.
template <class T, int Most>
inline long long calls(long long rows, long long width, long long groups) {
  const long long tiles = rows * width / (Most * kWidth<T>);
  return (tiles > 0 ? tiles : 1) * groups;
}

template <class T>
void multiply(const ColumnWeights<T>& m, long long block, long long first, long long last, const T* source, T* out,
              long long out_stride, long long rows, long long width, const T* bias, bool add, const Ahead<T>& ahead) {
  Fetch<T> fetch(ahead, calls<T, kTile>(rows, width, last - first));
  for_column_tiles<T, kTile>(rows, width, [&]<int Rows, int Vectors>(long long at, bool left, bool right) {
    multiply_tile<T, Rows, Vectors>(m, block, first, last, source + at, out + at, out_stride, bias, add, fetch, left,
                                    right);
  });
}

template <class T>
void dot(const ColumnWeights<T>& m, long long block, long long first, long long last, const T* source, const T* grad,
         long long grad_stride, long long rows, long long width, T* sums, const Ahead<T>& ahead) {
  Fetch<T> fetch(ahead, calls<T, 2 * kTile>(rows, width, last - first));
  for_column_tiles<T, 2 * kTile>(rows, width, [&]<int Rows, int Vectors>(long long at, bool left, bool right) {
    dot_tile<T, Rows, Vectors>(m, block, first, last, source + at, grad + at, grad_stride, sums, fetch, left, right);
  });
}

template <class T>
void finish(const T* sums, long long weights, T* result) {
  for (long long k = 0; k < weights; ++k) {
    T sum = sums[k * kSumLanes<T>];
    for (int lane = 1; lane < kSumLanes<T>; ++lane) sum += sums[k * kSumLanes<T> + lane];
    result[k] = sum;
  }
}

}  // namespace

void multiply_columns(const ColumnWeights<float>& m, long long block, long long first, long long last,
                      const float* source, float* out, long long out_stride, long long rows, long long width,
                      const float* bias, bool add, Ahead<float> ahead) {
  multiply(m, block, first, last, source, out, out_stride, rows, width, bias, add, ahead);
}
void multiply_columns(const ColumnWeights<double>& m, long long block, long long first, long long last,
                      const double* source, double* out, long long out_stride, long long rows, long long width,
                      const double* bias, bool add, Ahead<double> ahead) {
  multiply(m, block, first, last, source, out, out_stride, rows, width, bias, add, ahead);
}
void dot_columns(const ColumnWeights<float>& m, long long block, long long first, long long last, const float* source,
                 const float* grad, long long grad_stride, long long rows, long long width, float* sums,
                 Ahead<float> ahead) {
  dot(m, block, first, last, source, grad, grad_stride, rows, width, sums, ahead);
}
void dot_columns(const ColumnWeights<double>& m, long long block, long long first, long long last, const double* source,
                 const double* grad, long long grad_stride, long long rows, long long width, double* sums,
                 Ahead<double> ahead) {
  dot(m, block, first, last, source, grad, grad_stride, rows, width, sums, ahead);
}
void finish_columns(const float* sums, long long weights, float* result) { finish(sums, weights, result); }
void finish_columns(const double* sums, long long weights, double* result) { finish(sums, weights, result); }

}  // namespace sparse_gen::SPARSE_GEN_ISA
