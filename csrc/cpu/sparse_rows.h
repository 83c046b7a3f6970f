#pragma once

#include "isa.h"

namespace sparse_gen {

// A sparse matrix that multiplies rows of positions. Row p's weights are begin[p] .. end[p] - 1; begin is a multiple
// of kRowGroup, and up to the next one every offset points into the source, whatever lies there.
template <class T>
struct SparseRows {
  const int *begin, *end;
  const int* offset;  // of a weight's source row, in elements
  const T* value;     // not read by dot_rows
};

constexpr int kRowGroup = 4;
// Output rows and their distances are multiples of this many bytes. Where the source's are too, no load straddles a cache
// line, which makes it twice as fast. An odd multiple spreads rows over the cache's sets.
constexpr int kLine = 64;
// Elements of partial sums that dot_rows keeps a weight, at most.
constexpr int kDotLanes = 4;

// How many positions are worked off at a time. Sums over a row's weights run in the same order for `narrow` and `wide`
// whatever the length, so that strips may be cut anywhere; `alone`, for an image of few positions, runs several sums of
// a row side by side.
enum class Tiles { alone, narrow, wide };

// clang-format off
SPARSE_GEN_DECLARE(
  // out[(p - first) * out_stride + i] (+)= sum over row p's weights of value[k] * source[offset[k] + i], for first <= p < last
  // and 0 <= i < length rounded up to a cache line.
  void multiply_rows(const SparseRows<float>&, long long first, long long last, const float* source, float* out,
                     long long out_stride, long long length, Tiles tiles, bool add);
  void multiply_rows(const SparseRows<double>&, long long first, long long last, const double* source, double* out,
                     long long out_stride, long long length, Tiles tiles, bool add);

  // Adds the sum over i of grad[(p - first) * grad_stride + i] * source[offset[k] + i] to the lanes of weight k, of the rows
  // first <= p < last; sums holds kDotLanes elements a weight, from row first's on, of which finish_dots makes one.
  void dot_rows(const SparseRows<float>&, long long first, long long last, const float* source, const float* grad,
                long long grad_stride, long long length, Tiles tiles, float* sums);
  void dot_rows(const SparseRows<double>&, long long first, long long last, const double* source, const double* grad,
                long long grad_stride, long long length, Tiles tiles, double* sums);
  void finish_dots(const float* sums, long long weights, float* result);
  void finish_dots(const double* sums, long long weights, double* result);
)
// clang-format on

}  // namespace sparse_gen
