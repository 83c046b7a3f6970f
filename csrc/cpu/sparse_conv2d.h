#pragma once

#include "isa.h"

namespace sparse_gen {

// Kept weights grouped by the plane they belong to: those of plane p are start[p] .. start[p + 1] - 1.
//
// A plane is an image of one channel whose rows follow one another without a gap, padding included, so that a
// weight's input is the whole source shifted by one number, offset[k]: no kernel knows rows, strides or borders.
template <class T>
struct SparsePlanes {
  const long long* start;   // planes + 1
  const long long* offset;  // from the source's beginning, in elements
  const T* value;           // not read by sparse_dot
};

// Where results go: of every row of `row` elements the first `columns` are real and are stored without gaps; plane p
// begins at data + p * stride, filled with bias[p] first where there is a bias.
template <class T>
struct PlaneRows {
  T* data;
  long long stride, row, columns;
  const T* bias;
};

// The last vector of a plane may reach this many elements behind it.
constexpr long long kPlaneSlack = 16;
// Ranges of positions that are worked off in parallel begin at multiples of this.
constexpr long long kPlaneStep = 384;

// clang-format off
SPARSE_GEN_DECLARE(
  // out[p][i] = sum over plane p's weights of value[k] * source[offset[k] + i], for first <= p < last and
  // begin <= i < end.
  void sparse_correlate(const SparsePlanes<float>&, const float* source, const PlaneRows<float>& out,
                        long long first, long long last, long long begin, long long end);
  void sparse_correlate(const SparsePlanes<double>&, const double* source, const PlaneRows<double>& out,
                        long long first, long long last, long long begin, long long end);

  // result[k] = sum over 0 <= i < length of grad[p][i] * source[offset[k] + i], for the weights k of the planes
  // first <= p < last. grad[p] begins at grad + p * grad_stride and is zero for kPlaneSlack elements from length on.
  // scratch holds one vector (64 bytes, aligned) a weight.
  void sparse_dot(const SparsePlanes<float>&, const float* source, const float* grad, long long grad_stride,
                  long long length, long long first, long long last, float* result, void* scratch);
  void sparse_dot(const SparsePlanes<double>&, const double* source, const double* grad, long long grad_stride,
                  long long length, long long first, long long last, double* result, void* scratch);
)
// clang-format on

}  // namespace sparse_gen
