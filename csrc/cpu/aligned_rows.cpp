#include "aligned_rows.h"

#include <bit>

#include "dot_sums.h"

namespace sparse_gen::SPARSE_GEN_ISA {

namespace {

// Vectors of a tile: as many again are held for the kernel column that is being summed.
constexpr int kTile = SPARSE_GEN_VECTOR_BYTES == 64 ? 12 : 4;
constexpr int kDotTile = SPARSE_GEN_VECTOR_BYTES == 64 ? 16 : 8;
static_assert(kTile / kMostTileColumns <= kMostTileRows);

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

// How far vector v of a tile of rows of `Vectors` vectors lies from the first.
template <class T, int Vectors>
inline long long place(int v, long long width) {
  return v / Vectors * width + v % Vectors * kWidth<T>;
}

// Calls f(v, pointer) for the vectors of a tile. Each row's pointer is hidden from the compiler: it would otherwise keep
// an offset of every vector in registers and on the stack.
template <int Rows, int Vectors, class T, class F>
inline void each_vector(const T* from, long long width, F f) {
#pragma GCC unroll 16
  for (int row = 0; row < Rows; ++row) {
    if (row > 0) {
      from += width;
      asm("" : "+r"(from));
    }
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) f(row * Vectors + v, from + v * kWidth<T>);
  }
}

template <int Rows, int Vectors, class T>
inline void accumulate(const ColumnWeights<T>& m, int k, int end, const T* source, long long width,
                       typename Vector<T>::type (&sum)[Rows * Vectors]) {
  using V = typename Vector<T>::type;
  for (; k < end; ++k) {
    const V weight = m.value[k] - V{};
    each_vector<Rows, Vectors>(source + m.offset[k], width, [&](int v, const T* x) { sum[v] += weight * load_from(x); });
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

// A tile of rows, with tiles on its left and right or none. Tiles of a band come from left to right: what a tile's sums
// add to the one on its right waits in carry, Rows vectors a group; what they add to the left is added there.
template <class T, int Rows, int Vectors>
void multiply_tile(const ColumnWeights<T>& m, long long block, long long first, long long last, const T* source, T* out,
                   long long out_stride, long long width, const T* bias, bool add, T* carry, Fetch<T>& fetch, bool left,
                   bool right) {
  using V = typename Vector<T>::type;
  using All = typename CountLanes<kWidth<T>>::type;
  constexpr int kAll = Rows * Vectors;
  for (long long g = first; g < last; ++g, carry += Rows * kWidth<T>) {
    T* to = out + g * out_stride;
    fetch.some();
    // Where the group after this one will be stored, too.
    if (!add && g + 1 < last)
      for (int v = 0; v < kAll; ++v) __builtin_prefetch(to + out_stride + place<T, Vectors>(v, width), 1);
    const int* begin = m.begin + g * m.stride + block * m.columns;
    V sum[kAll];
    if (add) {
#pragma GCC unroll 16
      for (int v = 0; v < kAll; ++v) sum[v] = load_from(to + place<T, Vectors>(v, width));
    } else {
      const V start = V{} + (bias ? bias[g] : T(0));
#pragma GCC unroll 16
      for (int v = 0; v < kAll; ++v) sum[v] = start;
    }
    if (left)
#pragma GCC unroll 16
      for (int row = 0; row < Rows; ++row) sum[row * Vectors] += load_from(carry + row * kWidth<T>);
    V before[Rows] = {}, after[Rows] = {};
    accumulate<Rows, Vectors>(m, begin[m.center], begin[m.center + 1], source, width, sum);
    for (int column = 0; column < m.columns; ++column) {
      const int k = begin[column], end = begin[column + 1], shift = column - m.center;
      if (k == end || shift == 0) continue;
      V part[kAll] = {};
      accumulate<Rows, Vectors>(m, k, end, source, width, part);
      with_shift<kWidth<T>>(shift, [&](auto d) {
#pragma GCC unroll 16
        for (int v = 0; v < kAll; ++v) {
          if constexpr (d.value < 0)
            sum[v] += shifted<d.value>(v % Vectors ? part[v - 1] : V{}, part[v], All{});
          else
            sum[v] += shifted<d.value>(part[v], (v + 1) % Vectors ? part[v + 1] : V{}, All{});
        }
        if (d.value < 0 ? !right : !left) return;
#pragma GCC unroll 16
        for (int row = 0; row < Rows; ++row) {
          if constexpr (d.value < 0)
            after[row] += shifted<d.value>(part[(row + 1) * Vectors - 1], V{}, All{});
          else
            before[row] += shifted<d.value>(V{}, part[row * Vectors], All{});
        }
      });
    }
#pragma GCC unroll 16
    for (int v = 0; v < kAll; ++v) store_to(to + place<T, Vectors>(v, width), sum[v]);
    for (int row = 0; left && row < Rows; ++row) {
      T* beside = to + row * width - kWidth<T>;
      store_to(beside, load_from(beside) + before[row]);
    }
    for (int row = 0; right && row < Rows; ++row) store_to(carry + row * kWidth<T>, after[row]);
  }
}

template <class T, int Rows, int Vectors>
void dot_tile(const ColumnWeights<T>& m, long long block, long long first, long long last, const T* source,
              const T* grad, long long grad_stride, long long width, T* sums, Fetch<T>& fetch, bool left, bool right) {
  using V = typename Vector<T>::type;
  using All = typename CountLanes<kWidth<T>>::type;
  constexpr int kAll = Rows * Vectors;
  for (long long g = first; g < last; ++g) {
    const T* from = grad + g * grad_stride;
    fetch.some();
    if (g + 1 < last)
      for (int v = 0; v < kAll; ++v) __builtin_prefetch(from + grad_stride + place<T, Vectors>(v, width));
    const int* begin = m.begin + g * m.stride + block * m.columns;
    for (int column = 0; column < m.columns; ++column) {
      int k = begin[column];
      const int end = begin[column + 1];
      if (k == end) continue;
      V held[kAll];
      const auto at = [&](int row, int v) { return load_from(from + row * width + v * kWidth<T>); };
      // The source's column x is seen from the gradient's column x - shift.
      with_shift<kWidth<T>>(m.center - column, [&](auto d) {
#pragma GCC unroll 16
        for (int v = 0; v < kAll; ++v) {
          const int row = v / Vectors, x = v % Vectors;
          if constexpr (d.value == 0) {
            held[v] = at(row, x);
          } else if constexpr (d.value < 0) {
            held[v] = shifted<d.value>(x > 0 || left ? at(row, x - 1) : V{}, at(row, x), All{});
          } else {
            held[v] = shifted<d.value>(at(row, x), x + 1 < Vectors || right ? at(row, x + 1) : V{}, All{});
          }
        }
      });
      const auto dot_with = [&](int weight) {
        V dot = {};
        each_vector<Rows, Vectors>(source + m.offset[weight], width,
                                   [&](int v, const T* x) { dot += held[v] * load_from(x); });
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

// Calls f.template operator()<Rows, Vectors>(offset, left, right) for tiles of at most Most vectors: bands of rows from
// above, each from left to right.
template <class T, int Most, class F>
inline void for_column_tiles(long long rows, long long width, F f) {
  const long long vectors = width / kWidth<T>;
  long long y = 0;
  const auto band = [&]<int Rows, int Vectors>() {
    for (long long v = 0; v < vectors;) {
      const long long left = vectors - v;
      const auto tile = [&]<int Own>() {
        f.template operator()<Rows, Own>(y * width + v * kWidth<T>, v > 0, left > Own);
        v += Own;
      };
      if (left >= Vectors)
        tile.template operator()<Vectors>();
      else if (Vectors > 2 && left >= 2)
        tile.template operator()<(Vectors > 2 ? 2 : 1)>();
      else
        tile.template operator()<1>();
    }
    y += Rows;
  };
  const auto bands = [&]<int Rows, int Vectors>(const auto& again) {
    // Four rows are cut into two and two, not three and one.
    for (; rows - y >= Rows && !(Rows == 3 && rows - y == 4);) band.template operator()<Rows, Vectors>();
    if constexpr (Rows > 1) again.template operator()<(int)std::bit_floor(Rows - 1u), Vectors>(again);
  };
  if (vectors == 1)
    bands.template operator()<Most, 1>(bands);
  else if (vectors < kMostTileColumns)
    bands.template operator()<Most / 2, 2>(bands);
  else
    bands.template operator()<Most / kMostTileColumns, kMostTileColumns>(bands);
}

// Tiles of an image at least, times the groups that pass over each.
template <class T, int Most>
inline long long calls(long long rows, long long width, long long groups) {
  const long long tiles = rows * width / (Most * kWidth<T>);
  return (tiles > 0 ? tiles : 1) * groups;
}

template <class T>
void multiply(const ColumnWeights<T>& m, long long block, long long first, long long last, const T* source, T* out,
              long long out_stride, long long rows, long long width, const T* bias, bool add, T* carry,
              const Ahead<T>& ahead) {
  Fetch<T> fetch(ahead, calls<T, kTile>(rows, width, last - first));
  for_column_tiles<T, kTile>(rows, width, [&]<int Rows, int Vectors>(long long at, bool left, bool right) {
    multiply_tile<T, Rows, Vectors>(m, block, first, last, source + at, out + at, out_stride, width, bias, add, carry,
                                    fetch, left, right);
  });
}

template <class T>
void dot(const ColumnWeights<T>& m, long long block, long long first, long long last, const T* source, const T* grad,
         long long grad_stride, long long rows, long long width, T* sums, const Ahead<T>& ahead) {
  Fetch<T> fetch(ahead, calls<T, kDotTile>(rows, width, last - first));
  for_column_tiles<T, kDotTile>(rows, width, [&]<int Rows, int Vectors>(long long at, bool left, bool right) {
    dot_tile<T, Rows, Vectors>(m, block, first, last, source + at, grad + at, grad_stride, width, sums, fetch, left,
                              right);
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
                      const float* bias, bool add, float* carry,
                      Ahead<float> ahead) {
  multiply(m, block, first, last, source, out, out_stride, rows, width, bias, add, carry, ahead);
}
void multiply_columns(const ColumnWeights<double>& m, long long block, long long first, long long last,
                      const double* source, double* out, long long out_stride, long long rows, long long width,
                      const double* bias, bool add, double* carry,
                      Ahead<double> ahead) {
  multiply(m, block, first, last, source, out, out_stride, rows, width, bias, add, carry, ahead);
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
