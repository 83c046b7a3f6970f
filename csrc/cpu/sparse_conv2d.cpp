#include "sparse_conv2d.h"

#include "vector.h"

namespace sparse_gen::SPARSE_GEN_ISA {

namespace {

// Output vectors held in registers at once: of 32 registers (AVX-512) or 16, a few are left for the weight and for
// loads on their way.
constexpr int kTile = SPARSE_GEN_VECTOR_BYTES == 64 ? 24 : 12;

template <class T, int Vectors>
void correlate_tile(const long long* offset, const T* value, long long count, const T* source, T bias, T* out) {
  using V = typename Vector<T>::type;
  V sum[Vectors];
#pragma GCC unroll 24
  for (int v = 0; v < Vectors; ++v) sum[v] = V{} + bias;
  for (long long k = 0; k < count; ++k) {
    const T* from = source + offset[k];
    const V weight = V{} + value[k];
#pragma GCC unroll 24
    for (int v = 0; v < Vectors; ++v) sum[v] += weight * load_from(from + v * kWidth<T>);
  }
#pragma GCC unroll 24
  for (int v = 0; v < Vectors; ++v) store_to(out + v * kWidth<T>, sum[v]);
}

// Moves positions begin .. begin + count - 1 of a plane, which lie in `tile`, to their rows.
template <class T>
void store_rows(const T* tile, long long begin, long long count, const PlaneRows<T>& rows, long long plane) {
  long long y = begin / rows.row, x = begin % rows.row;
  T* to = rows.data + plane * rows.stride;
  for (long long i = 0; i < count; ++y, x = 0) {
    const long long in_row = rows.row - x < count - i ? rows.row - x : count - i;
    const long long real = rows.columns - x < in_row ? rows.columns - x : in_row;
    if (real > 0) __builtin_memcpy(to + y * rows.columns + x, tile + i, real * sizeof(T));
    i += in_row;
  }
}

inline int tile_vectors(long long left) {
  return left >= kTile ? kTile : left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

template <class T>
void correlate(const SparsePlanes<T>& planes, const T* source, const PlaneRows<T>& out, long long first, long long last,
               long long begin, long long end) {
  T tile[kTile * kWidth<T>];
  // Planes inside, positions outside: a tile's inputs from all channels then stay in the second-level cache.
  for (long long i = begin; i < end;) {
    const int vectors = tile_vectors((end - i + kWidth<T> - 1) / kWidth<T>);
    const long long count = vectors * kWidth<T>;
    for (long long p = first; p < last; ++p) {
      const long long k = planes.start[p], kept = planes.start[p + 1] - k;
      const T bias = out.bias ? out.bias[p] : 0;
      const long long* offset = planes.offset + k;
      const T* value = planes.value + k;
      switch (vectors) {
        case kTile: correlate_tile<T, kTile>(offset, value, kept, source + i, bias, tile); break;
        case 8: correlate_tile<T, 8>(offset, value, kept, source + i, bias, tile); break;
        case 4: correlate_tile<T, 4>(offset, value, kept, source + i, bias, tile); break;
        case 2: correlate_tile<T, 2>(offset, value, kept, source + i, bias, tile); break;
        default: correlate_tile<T, 1>(offset, value, kept, source + i, bias, tile);
      }
      store_rows(tile, i, count < end - i ? count : end - i, out, p);
    }
    i += count;
  }
}

template <class T, int Vectors>
void dot_tile(const long long* offset, long long count, const T* source, const T* grad, typename Vector<T>::type* sum) {
  using V = typename Vector<T>::type;
  V held[Vectors];
#pragma GCC unroll 24
  for (int v = 0; v < Vectors; ++v) held[v] = load_from(grad + v * kWidth<T>);
  for (long long k = 0; k < count; ++k) {
    const T* from = source + offset[k];
    // Four sums: one would wait for itself at every step.
    V part[4] = {sum[k], V{}, V{}, V{}};
#pragma GCC unroll 24
    for (int v = 0; v < Vectors; ++v) part[v % 4] += held[v] * load_from(from + v * kWidth<T>);
    sum[k] = (part[0] + part[1]) + (part[2] + part[3]);
  }
}

template <class T>
void dot(const SparsePlanes<T>& planes, const T* source, const T* grad, long long grad_stride, long long length,
         long long first, long long last, T* result, void* scratch) {
  using V = typename Vector<T>::type;
  const long long base = planes.start[first], total = planes.start[last] - base;
  V* sums = (V*)scratch;
  for (long long k = 0; k < total; ++k) sums[k] = V{};
  for (long long i = 0; i < length;) {
    const int vectors = tile_vectors((length - i + kWidth<T> - 1) / kWidth<T>);
    for (long long p = first; p < last; ++p) {
      const long long k = planes.start[p], count = planes.start[p + 1] - k;
      const T* from = grad + p * grad_stride + i;
      V* sum = sums + (k - base);
      switch (vectors) {
        case kTile: dot_tile<T, kTile>(planes.offset + k, count, source + i, from, sum); break;
        case 8: dot_tile<T, 8>(planes.offset + k, count, source + i, from, sum); break;
        case 4: dot_tile<T, 4>(planes.offset + k, count, source + i, from, sum); break;
        case 2: dot_tile<T, 2>(planes.offset + k, count, source + i, from, sum); break;
        default: dot_tile<T, 1>(planes.offset + k, count, source + i, from, sum);
      }
    }
    i += vectors * kWidth<T>;
  }
  for (long long k = 0; k < total; ++k) {
    T sum = 0;
    for (int lane = 0; lane < kWidth<T>; ++lane) sum += sums[k][lane];
    result[base + k] = sum;
  }
}

}  // namespace

void sparse_correlate(const SparsePlanes<float>& planes, const float* source, const PlaneRows<float>& out,
                      long long first, long long last, long long begin, long long end) {
  correlate(planes, source, out, first, last, begin, end);
}
void sparse_correlate(const SparsePlanes<double>& planes, const double* source, const PlaneRows<double>& out,
                      long long first, long long last, long long begin, long long end) {
  correlate(planes, source, out, first, last, begin, end);
}
void sparse_dot(const SparsePlanes<float>& planes, const float* source, const float* grad, long long grad_stride,
                long long length, long long first, long long last, float* result, void* scratch) {
  dot(planes, source, grad, grad_stride, length, first, last, result, scratch);
}
void sparse_dot(const SparsePlanes<double>& planes, const double* source, const double* grad, long long grad_stride,
                long long length, long long first, long long last, double* result, void* scratch) {
  dot(planes, source, grad, grad_stride, length, first, last, result, scratch);
}

}  // namespace sparse_gen::SPARSE_GEN_ISA
