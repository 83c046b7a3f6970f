#pragma once

#include "isa.h"

namespace sparse_gen {

// Weights that are kept or pruned by whole columns: block row b is the output channels b * height and following,
// `height` of them (fewer in the last one), and has the columns start[b] .. start[b + 1] - 1; a column is one input
// channel at one tap of the kernel, with one weight for every output channel of its block row. (A wider block is as
// many columns: it is the outputs that share a load of the input.)
//
// As in sparse_conv2d a plane's rows follow one another without a gap, so that a column's input is the whole source
// shifted by one number, offset[k].
template <class T>
struct BlockColumns {
  const long long* start;   // block rows + 1
  const long long* offset;  // a column's input, from the source's beginning, in elements
  const T* value;           // block row by block row, column by column, the column's weights side by side
  long long height, channels;
};

// All columns of one block row at one tap, for the input's gradient.
struct BlockTap {
  long long row, first, last;  // block row, columns first .. last - 1
  long long offset;            // of the block row's first plane of gradients, shifted by the tap
};

// Where results go: of every row of `row` positions the first `columns` are stored, without gaps; planes are `stride`
// elements apart.
template <class T>
struct BlockOutput {
  T* data;
  long long stride, row, columns;
  const T* bias;  // one a plane, or null
};

// Tiles of this many positions (or half, with double) are the unit of parallel work; a source must be readable, and
// finite, for this many elements behind its last position.
constexpr long long kBlockTile = 96;
// The same for the weights' gradient.
constexpr long long kBlockDotTile = 384;

// clang-format off
#define SPARSE_GEN_BLOCK_KERNELS(T)                                                                                   \
  /* out[o][i] = bias[o] + sum over the columns of o's block row of value * source[offset + i], for block rows        \
     first <= b < last and positions begin <= i < end; begin is a multiple of kBlockTile. */                          \
  void block_correlate(const BlockColumns<T>&, const T* source, const BlockOutput<T>& out, long long first,           \
                       long long last, long long begin, long long end);                                               \
  /* out[c * stride + i] = sum over taps, over their columns of input channel c = channel[column] and over the        \
     block row's planes o of value * grad[offset + o * grad_stride + i], for 0 <= c < channels and                    \
     begin <= i < end, both multiples of kBlockTile. scratch holds channels * kBlockTile elements. */                 \
  void block_gather(const BlockColumns<T>&, const BlockTap* taps, long long count, const long long* channel,          \
                    const T* grad, long long grad_stride, T* out, long long channels, long long stride,               \
                    long long begin, long long end, T* scratch);                                                      \
  /* result[j] += sum over 0 <= i < length of grad[o * grad_stride + i] * source[offset + i] for every weight j of     \
     the block rows first <= b < last. scratch holds one vector (64 bytes, aligned) for every weight of the largest   \
     of them. */                                                                                                      \
  void block_dot(const BlockColumns<T>&, const T* source, const T* grad, long long grad_stride, long long length,     \
                 long long first, long long last, T* result, void* scratch);
SPARSE_GEN_DECLARE(
  SPARSE_GEN_BLOCK_KERNELS(float)
  SPARSE_GEN_BLOCK_KERNELS(double)
)
// clang-format on

}  // namespace sparse_gen
