#pragma once

#include "isa.h"

namespace sparse_gen {

// Kept weights of a convolution that leaves the width of an image as it is, ordered by group, block of source channels
// and kernel column: those of group g, block b and column c are begin[g * stride + b * columns + c] and what follows up
// to the next begin. The kernel column at `center` sees the source's column that it writes.
template <class T>
struct ColumnWeights {
  const int* begin;
  const int* offset;  // of a weight's source row, in elements
  const T* value;     // not read by dot_columns
  long long stride;
  int columns, center;
};

// Rows that will be copied next: `length` elements of each of `planes` planes, fetched while the kernel computes.
template <class T>
struct Ahead {
  const T* rows;
  long long plane, planes, length;
};

constexpr int kColumnLanes = 4;
// Tiles are no wider than so many vectors, and, where an image has that width, no higher than so many rows.
constexpr int kMostTileColumns = 4;
constexpr int kMostTileRows = 3;
constexpr int kMostShift = 3;

// clang-format off
SPARSE_GEN_DECLARE(
  // out[g * out_stride + y * width + x] = start + the sum over the block's weights of group g of value[k] *
  // source[offset[k] + y * width + x + column - center], zeros beside a row, for first <= g < last, 0 <= y < rows,
  // 0 <= x < width. The start is what is there where `add` is set, else bias[g], which may be null, for 0. width is a
  // multiple of a vector, and no column is further from the center than kMostShift.
  // carry is room for kMostTileRows vectors a group.
  // Where source and width are, all loads are aligned: the sums of each kernel column are shifted in registers. Loads
  // that straddle two cache lines took half of the time of a direct loop.
  void multiply_columns(const ColumnWeights<float>&, long long block, long long first, long long last,
                        const float* source, float* out, long long out_stride, long long rows, long long width,
                        const float* bias, bool add, float* carry, Ahead<float>);
  void multiply_columns(const ColumnWeights<double>&, long long block, long long first, long long last,
                        const double* source, double* out, long long out_stride, long long rows, long long width,
                        const double* bias, bool add, double* carry, Ahead<double>);

  // Adds the sums over y and x of grad[g * grad_stride + y * width + x] * source[offset[k] + y * width + x + column -
  // center] to the partial sums of every weight k of the block and the groups. sums holds kColumnLanes elements a
  // weight, of which finish_columns makes one.
  void dot_columns(const ColumnWeights<float>&, long long block, long long first, long long last, const float* source,
                   const float* grad, long long grad_stride, long long rows, long long width, float* sums,
                   Ahead<float>);
  void dot_columns(const ColumnWeights<double>&, long long block, long long first, long long last, const double* source,
                   const double* grad, long long grad_stride, long long rows, long long width, double* sums,
                   Ahead<double>);
  void finish_columns(const float* sums, long long weights, float* result);
  void finish_columns(const double* sums, long long weights, double* result);
)
// clang-format on

}  // namespace sparse_gen
