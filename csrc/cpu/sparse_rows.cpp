#include "sparse_rows.h"

#include "dot_sums.h"

namespace sparse_gen::SPARSE_GEN_ISA {

namespace {

// Vectors of positions held in registers at once.
constexpr int kWide = SPARSE_GEN_VECTOR_BYTES == 64 ? 16 : 8;
constexpr int kNarrow = 8;

template <class T>
inline typename Vector<T>::type load_aligned(const T* p) {
  return *(const typename Vector<T>::type*)__builtin_assume_aligned(p, SPARSE_GEN_VECTOR_BYTES);
}

template <class T>
inline void store_aligned(T* p, typename Vector<T>::type v) {
  *(typename Vector<T>::type*)__builtin_assume_aligned(p, SPARSE_GEN_VECTOR_BYTES) = v;
}

template <class T, int Vectors, bool Alone>
void multiply_tile(const SparseRows<T>& m, long long first, long long last, const T* source, T* out,
                   long long out_stride, bool add) {
  using V = typename Vector<T>::type;
  // Of few vectors, each would wait for the one before.
  constexpr int kSets = Alone && Vectors < 8 ? 8 / Vectors : 1;
  for (long long p = first; p < last; ++p) {
    T* to = out + (p - first) * out_stride;
    V sum[kSets][Vectors];
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) {
      sum[0][v] = add ? load_aligned(to + v * kWidth<T>) : V{};
#pragma GCC unroll 8
      for (int s = 1; s < kSets; ++s) sum[s][v] = V{};
    }
    int k = m.begin[p];
    const int end = m.end[p];
    for (; k + kSets <= end; k += kSets) {
#pragma GCC unroll 8
      for (int s = 0; s < kSets; ++s) {
        const T* from = source + m.offset[k + s];
        const V weight = m.value[k + s] - V{};
#pragma GCC unroll 16
        for (int v = 0; v < Vectors; ++v) sum[s][v] += weight * load_from(from + v * kWidth<T>);
      }
    }
    if constexpr (kSets > 1) {
      for (; k < end; ++k) {
        const T* from = source + m.offset[k];
        const V weight = m.value[k] - V{};
#pragma GCC unroll 16
        for (int v = 0; v < Vectors; ++v) sum[0][v] += weight * load_from(from + v * kWidth<T>);
      }
    }
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) {
#pragma GCC unroll 8
      for (int s = 1; s < kSets; ++s) sum[0][v] += sum[s][v];
      store_aligned(to + v * kWidth<T>, sum[0][v]);
    }
  }
}

template <class T, int Vectors>
void dot_tile(const SparseRows<T>& m, long long first, long long last, const T* source, const T* grad,
              long long grad_stride, T* sums) {
  using V = typename Vector<T>::type;
  for (long long p = first; p < last; ++p) {
    V held[Vectors];
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) held[v] = load_aligned(grad + (p - first) * grad_stride + v * kWidth<T>);
    for (int k = m.begin[p]; k < m.end[p]; k += kRowGroup) {
      V dot[kRowGroup];
#pragma GCC unroll 4
      for (int n = 0; n < kRowGroup; ++n) {
        const T* from = source + m.offset[k + n];
        dot[n] = held[0] * load_from(from);
#pragma GCC unroll 16
        for (int v = 1; v < Vectors; ++v) dot[n] += held[v] * load_from(from + v * kWidth<T>);
      }
      add_to_sums<T>(dot, sums + (long long)(k - m.begin[first]) * kDotLanes);
    }
  }
}

// Calls f.template operator()<Vectors>(i) for tiles of positions from i on.
template <class T, class F>
inline void for_tiles(long long length, Tiles tiles, F f) {
  constexpr long long line = kLine / sizeof(T);
  const long long vectors = (length + line - 1) / line * (line / kWidth<T>);
  for (long long v = 0; v < vectors;) {
    const long long left = vectors - v;
    const long long i = v * kWidth<T>;
    if (tiles == Tiles::wide && left >= kWide) {
      f.template operator()<kWide>(i);
      v += kWide;
    } else if (left >= kNarrow) {
      f.template operator()<kNarrow>(i);
      v += kNarrow;
    } else if (left >= 4) {
      f.template operator()<4>(i);
      v += 4;
    } else if (left >= 2) {
      f.template operator()<2>(i);
      v += 2;
    } else {
      f.template operator()<1>(i);
      v += 1;
    }
  }
}

template <class T>
void multiply(const SparseRows<T>& m, long long first, long long last, const T* source, T* out, long long out_stride,
              long long length, Tiles tiles, bool add) {
  // Positions outside, rows inside: the source's rows at these positions stay in the first-level cache.
  for_tiles<T>(length, tiles, [&]<int Vectors>(long long i) {
    if (tiles == Tiles::alone)
      multiply_tile<T, Vectors, true>(m, first, last, source + i, out + i, out_stride, add);
    else
      multiply_tile<T, Vectors, false>(m, first, last, source + i, out + i, out_stride, add);
  });
}

template <class T>
void dot(const SparseRows<T>& m, long long first, long long last, const T* source, const T* grad, long long grad_stride,
         long long length, Tiles tiles, T* sums) {
  for_tiles<T>(length, tiles, [&]<int Vectors>(long long i) {
    dot_tile<T, Vectors>(m, first, last, source + i, grad + i, grad_stride, sums);
  });
}

template <class T>
void finish(const T* sums, long long weights, T* result) {
  for (long long k = 0; k < weights; ++k) {
    const T* lanes = sums + k / kRowGroup * kRowGroup * kDotLanes + k % kRowGroup * kSumLanes<T>;
    T sum = lanes[0];
    for (int lane = 1; lane < kSumLanes<T>; ++lane) sum += lanes[lane];
    result[k] = sum;
  }
}

}  // namespace

void multiply_rows(const SparseRows<float>& m, long long first, long long last, const float* source, float* out,
                   long long out_stride, long long length, Tiles tiles, bool add) {
  multiply(m, first, last, source, out, out_stride, length, tiles, add);
}
void multiply_rows(const SparseRows<double>& m, long long first, long long last, const double* source, double* out,
                   long long out_stride, long long length, Tiles tiles, bool add) {
  multiply(m, first, last, source, out, out_stride, length, tiles, add);
}
void dot_rows(const SparseRows<float>& m, long long first, long long last, const float* source, const float* grad,
              long long grad_stride, long long length, Tiles tiles, float* sums) {
  dot(m, first, last, source, grad, grad_stride, length, tiles, sums);
}
void dot_rows(const SparseRows<double>& m, long long first, long long last, const double* source, const double* grad,
              long long grad_stride, long long length, Tiles tiles, double* sums) {
  dot(m, first, last, source, grad, grad_stride, length, tiles, sums);
}
void finish_dots(const float* sums, long long weights, float* result) { finish(sums, weights, result); }
void finish_dots(const double* sums, long long weights, double* result) { finish(sums, weights, result); }

}  // namespace sparse_gen::SPARSE_GEN_ISA
