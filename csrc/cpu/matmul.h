// A small matrix product in registers, for matrices that lie in the cache.
#pragma once

#include "vector.h"

namespace sparse_gen::SPARSE_GEN_ISA {

constexpr int kTileRows = 6;
// With 32 registers, 6 × 4 sums, 4 loads and a broadcast; with 16, 6 × 2.
constexpr int kTileVectors = SPARSE_GEN_VECTOR_BYTES == 64 ? 4 : 2;

// What is summed over: outer × inner products, and where the factors of one lie, from the row's beginning.
struct Depth {
  long long outer, inner, a_outer, a_inner, b_outer, b_inner;

  long long size() const { return outer * inner; }
  long long a_at(long long j) const { return j * a_inner; }
  long long b_at(long long j) const { return j * b_inner; }
};

// The same with the inner places from a table.
struct TableDepth {
  long long outer, inner, a_outer, b_outer;
  const long long *a_table, *b_table;

  long long size() const { return outer * inner; }
  long long a_at(long long j) const { return a_table[j]; }
  long long b_at(long long j) const { return b_table[j]; }
};

template <class T, int Rows, int Vectors, class D>
inline void matmul_tile(const T* const* a, const D& depth, const T* b, T* const* c, bool add) {
  using V = typename Vector<T>::type;
  V sum[Rows][Vectors];
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[r][v] = add ? load_from(c[r] + v * kWidth<T>) : V{};
  for (long long i = 0; i < depth.outer; ++i) {
    for (long long j = 0; j < depth.inner; ++j) {
      const long long at = i * depth.a_outer + depth.a_at(j);
      const T* row = b + i * depth.b_outer + depth.b_at(j);
      V right[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) right[v] = load_from(row + v * kWidth<T>);
#pragma GCC unroll 6
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sum[r][v] += a[r][at] * right[v];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) store_to(c[r] + v * kWidth<T>, sum[r][v]);
}

template <class T, int Vectors, class D>
inline void matmul_rows(int rows, const T* const* a, const D& depth, const T* b, T* const* c, bool add) {
  switch (rows) {
    case 6: return matmul_tile<T, 6, Vectors>(a, depth, b, c, add);
    case 5: return matmul_tile<T, 5, Vectors>(a, depth, b, c, add);
    case 4: return matmul_tile<T, 4, Vectors>(a, depth, b, c, add);
    case 3: return matmul_tile<T, 3, Vectors>(a, depth, b, c, add);
    case 2: return matmul_tile<T, 2, Vectors>(a, depth, b, c, add);
    default: return matmul_tile<T, 1, Vectors>(a, depth, b, c, add);
  }
}

// c (rows × columns) = or += a · b. a_row(r) and c_row(r) give the rows' beginnings. The last vector of a row of b and
// c may reach behind it.
template <class T, class Left, class D, class Result>
void matmul(long long rows, long long columns, Left a_row, const D& depth, const T* b, Result c_row, bool add) {
  const long long tiles = (rows + kTileRows - 1) / kTileRows, strip = kTileVectors * kWidth<T>;
  const long long strips = (columns + strip - 1) / strip;
  // What is larger than a core's second cache holds is gone through once only.
  const bool tiles_outside = rows * depth.size() * (long long)sizeof(T) > 262144;
  for (long long n = 0; n < tiles * strips; ++n) {
    const long long tile = tiles_outside ? n / strips : n % tiles;
    const long long x = (tiles_outside ? n % strips : n / tiles) * strip;
    const long long first = tile * rows / tiles, last = (tile + 1) * rows / tiles;
    const T* a[kTileRows];
    T* c[kTileRows];
    for (long long r = first; r < last; ++r) {
      a[r - first] = a_row(r);
      c[r - first] = c_row(r) + x;
    }
    const int count = (int)(last - first);
    const long long vectors = (columns - x + kWidth<T> - 1) / kWidth<T>;
    if (vectors >= kTileVectors)
      matmul_rows<T, kTileVectors>(count, a, depth, b + x, c, add);
    else if (vectors == 3)
      matmul_rows<T, 3>(count, a, depth, b + x, c, add);
    else if (vectors == 2)
      matmul_rows<T, 2>(count, a, depth, b + x, c, add);
    else
      matmul_rows<T, 1>(count, a, depth, b + x, c, add);
  }
}

}  // namespace sparse_gen::SPARSE_GEN_ISA
