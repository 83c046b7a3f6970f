// How the passes of a sparse convolution are cut up to fit the caches.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/sparse_rows.h"

namespace sparse_gen {

// How one pass over a layer is cut up. Rows are cut into strips, source channels into blocks: a block's copies are made
// just before they are used, and stay in the cache while every group of weights passes over them. An image of few
// positions is one strip, and its channels are dealt to the threads.
struct Cut {
  bool shifted;  // one copy a kernel column, read in aligned loads, or a single one
  int64_t copies, width, pitch, strip_rows, strips, result_stride;
  int64_t block, blocks;
  int64_t channel_stride;  // of the copies
  Tiles tiles;
};

// One pass: the result's planes, and how many more rows and columns it reads than it writes.
struct Pass {
  int64_t height, width, halo_h, halo_w;
  int64_t shifted_copies, single_copies, row_phases;  // of a source channel
  int64_t channels, kept, groups;
};

template <class T>
constexpr int64_t kInLine = kLine / sizeof(T);

template <class T>
int64_t whole_lines(int64_t count) {
  return (count + kInLine<T> - 1) / kInLine<T> * kInLine<T>;
}

template <class T>
Cut cut(const Pass& p) {
  constexpr int64_t line = kInLine<T>;
  Cut c;
  // Measured on layers of 3 to 70 kept weights a shifted row.
  c.shifted = p.kept >= 24 * p.channels * p.shifted_copies * p.row_phases;
  c.copies = c.shifted ? p.shifted_copies : p.single_copies;
  c.width = p.width + (c.shifted ? 0 : p.halo_w);
  // Whole lines leave the loads of a single copy's first column aligned, if they make rows little longer.
  c.pitch = whole_lines<T>(c.width);
  if (!c.shifted && 8 * c.pitch > 9 * c.width) c.pitch = c.width;
  const bool small = p.height * c.pitch <= 32 * line;
  // The rows above and below a strip are copied with it.
  const int64_t tile_rows = std::max<int64_t>(1, 8 * line / c.pitch);
  const int64_t least = std::max<int64_t>(2 * p.halo_h, 8 * line / c.pitch) + (p.halo_h == 0);
  c.strip_rows = small ? p.height : std::min(p.height, least);
  c.strips = (p.height + c.strip_rows - 1) / c.strip_rows;
  c.result_stride = (whole_lines<T>(c.strip_rows * c.pitch) / line | 1) * line;
  const int64_t tile_row = std::min<int64_t>(c.pitch, 8 * line) * sizeof(T);
  const int64_t in_tile = c.copies * p.row_phases * (tile_rows + p.halo_h) * tile_row;
  // Measured: a block of sources may fill 32 KiB, and is to give each group ten weights.
  const int64_t weights = std::max<int64_t>(1, p.kept / p.groups);
  const int64_t block = std::max<int64_t>(32768 / in_tile, (10 * p.channels + weights - 1) / weights);
  c.block = std::clamp<int64_t>(block, 1, p.channels);
  c.blocks = (p.channels + c.block - 1) / c.block;
  c.channel_stride = c.copies * p.row_phases * (c.strip_rows + p.halo_h) * c.pitch;
  c.tiles = small ? Tiles::alone : Tiles::narrow;
  return c;
}

}  // namespace sparse_gen
