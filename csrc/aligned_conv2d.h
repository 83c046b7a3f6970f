// The passes of a stride-1 convolution with zero padding that leaves the width as it is, on the kernels of
// cpu/aligned_rows.h: rows are read without a column of padding, results are written where they belong.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "binding.h"
#include "cpu/aligned_rows.h"
#include "cpu/padding.h"
#include "cpu/sparse_conv2d.h"
#include "load.h"
#include "scratch.h"

namespace sparse_gen {

// Kept weights of one pass in the order that its kernel reads. Lies in the calling thread's scratch memory.
template <class T>
class ColumnTable {
 public:
  // Weights order[start[g]] .. order[start[g + 1] - 1] belong to group g; no order means none is needed.
  ColumnTable(int slot, int value_slot, int64_t groups, int64_t blocks, int64_t columns, const int64_t* start,
              const int64_t* order)
      : groups_(groups), blocks_(blocks), columns_(columns), start_(start), order_(order) {
    const int64_t kept = start[groups];
    begin_ = scratch<int>(slot, groups * stride() + 2 * kept);
    offset_ = begin_ + groups * stride();
    place_ = offset_ + kept;
    value_ = scratch<T>(value_slot, kept);
  }

  // cell(k) = block * columns + kernel column of weight k, offset(k) its source row.
  template <class Cell, class Offset>
  void fill(const T* values, const Cell& cell, const Offset& offset) {
    torch::stable::parallel_for(0, groups_, 8, [&](int64_t first, int64_t last) {
      std::vector<int> next(stride());
      for (int64_t g = first; g < last; ++g) {
        std::fill(next.begin(), next.end(), 0);
        for (int64_t i = start_[g]; i < start_[g + 1]; ++i) ++next[cell(at(i)) + 1];
        next[0] = start_[g];
        for (int64_t c = 1; c < stride(); ++c) next[c] += next[c - 1];
        std::copy(next.begin(), next.end(), begin_ + g * stride());
        for (int64_t i = start_[g]; i < start_[g + 1]; ++i) {
          const int64_t k = at(i);
          const int slot = next[cell(k)]++;
          offset_[slot] = offset(k);
          place_[slot] = k;
          value_[slot] = values[k];
        }
      }
    });
  }

  ColumnWeights<T> weights(int64_t center) const {
    return {begin_, offset_, value_, stride(), (int)columns_, (int)center};
  }
  int64_t kept() const { return start_[groups_]; }

  // Adds up `count` arrays of kept() elements and puts the sums into the order of the values.
  void collect(const T* sums, int64_t count, T* result) const {
    torch::stable::parallel_for(0, kept(), 2048, [&](int64_t first, int64_t last) {
      for (int64_t slot = first; slot < last; ++slot) {
        T sum = sums[slot];
        for (int64_t n = 1; n < count; ++n) sum += sums[n * kept() + slot];
        result[place_[slot]] = sum;
      }
    });
  }

 private:
  int64_t stride() const { return blocks_ * columns_ + 1; }
  int64_t at(int64_t i) const { return order_ ? order_[i] : i; }

  int64_t groups_, blocks_, columns_;
  const int64_t *start_, *order_;
  int *begin_, *offset_, *place_;
  T* value_;
};

// How one pass is cut up: rows into strips, source channels into blocks whose rows are copied together.
struct AlignedCut {
  int64_t strip_rows, strips, block, blocks, channel_stride;

  template <class T>
  static AlignedCut of(int64_t height, int64_t width, int64_t kernel_h, int64_t kernel_w, int64_t channels,
                       int64_t groups, int64_t kept) {
    AlignedCut c;
    c.strip_rows = std::clamp<int64_t>(height / 2, std::min<int64_t>(height, 4), 16);
    c.strips = (height + c.strip_rows - 1) / c.strip_rows;
    constexpr int64_t line = 64 / sizeof(T);
    c.channel_stride = ((c.strip_rows + kernel_h - 1) * width / line | 1) * line;
    // What a tile reads of a channel, and how many weights of a kernel column a block is to give a group.
    const int64_t tile_width = std::min<int64_t>(width, kMostTileColumns * line);
    const int64_t tile_rows = kMostTileRows * kMostTileColumns * line / tile_width;
    const int64_t in_tile = (tile_rows + kernel_h - 1) * tile_width * sizeof(T);
    const int64_t weights = std::max<int64_t>(1, kept / (groups * kernel_w));
    const int64_t fitting = (channels * in_tile <= 40960 ? 40960 : 32768) / in_tile;
    const int64_t block = std::max<int64_t>(fitting, (4 * channels + weights - 1) / weights);
    c.blocks = (channels + block - 1) / std::min<int64_t>(block, channels);
    c.block = (channels + c.blocks - 1) / c.blocks;
    c.blocks = (channels + c.block - 1) / c.block;
    return c;
  }
};

template <class T>
class AlignedConvolution {
 public:
  static bool takes(const ConvShape& s, const Tensor& x) {
    if (instruction_set() < InstructionSet::avx512) return false;
    // One kernel column has no unaligned loads to save, and tiles of three vectors would read four.
    constexpr int64_t lanes = 64 / sizeof(T);
    const int64_t vectors = s.width / lanes;
    return s.kernel_w > 1 && s.stride == 1 && s.mode == kPadZeros && 2 * s.padding == s.kernel_w - 1 &&
           s.padding <= kMostShift && s.width % lanes == 0 && (vectors >= 8 || (vectors & (vectors - 1)) == 0) &&
           x.stride(2) == s.width;
  }

  AlignedConvolution(const ConvShape& shape, const Tensor& taps) : s_(shape), kept_(taps.size(1)) {
    out_ = taps.const_data_ptr<int32_t>();
    in_ = out_ + kept_;
    ky_ = in_ + kept_;
    kx_ = ky_ + kept_;
    over_x_ = AlignedCut::of<T>(s_.out_h(), s_.width, s_.kernel_h, s_.kernel_w, s_.in_channels, s_.out_channels, kept_);
    over_grad_ =
        AlignedCut::of<T>(s_.height, s_.width, s_.kernel_h, s_.kernel_w, s_.out_channels, s_.in_channels, kept_);
  }

  ColumnTable<T> to_outputs(const T* values, const int64_t* by_output) const {
    const AlignedCut& c = over_x_;
    ColumnTable<T> table(0, 1, s_.out_channels, c.blocks, s_.kernel_w, by_output, nullptr);
    const Places places(c, s_.in_channels, s_.kernel_w);
    table.fill(
        values, [&](int64_t k) { return places.cell[in_[k]] + kx_[k]; },
        [&](int64_t k) { return places.offset[in_[k]] + ky_[k] * s_.width; });
    return table;
  }

  ColumnTable<T> to_inputs(const T* values, const int64_t* by_input, const int64_t* order) const {
    const AlignedCut& c = over_grad_;
    ColumnTable<T> table(0, 1, s_.in_channels, c.blocks, s_.kernel_w, by_input, order);
    const Places places(c, s_.out_channels, s_.kernel_w);
    table.fill(
        values, [&](int64_t k) { return places.cell[out_[k]] + s_.kernel_w - 1 - kx_[k]; },
        [&](int64_t k) { return places.offset[out_[k]] + (s_.kernel_h - 1 - ky_[k]) * s_.width; });
    return table;
  }

  void forward(const ColumnTable<T>& table, const T* x, int64_t x_plane, const Load<T>* load, const T* bias,
               T* out) const {
    multiply(over_x_, table, x, x_plane, load, s_.in_channels, s_.height, -s_.padding, bias, out, s_.out_channels,
             s_.out_h());
  }

  void backward_x(const ColumnTable<T>& table, const T* grad_out, T* grad_x) const {
    multiply(over_grad_, table, grad_out, s_.out_h() * s_.width, nullptr, s_.out_channels, s_.out_h(),
             s_.padding - s_.kernel_h + 1, nullptr, grad_x, s_.in_channels, s_.height);
  }

  void backward_values(const ColumnTable<T>& table, const T* x, int64_t x_plane, const Load<T>* load, const T* grad_out,
                       T* grad_values) const {
    const AlignedCut& c = over_x_;
    const ColumnWeights<T> weights = table.weights(s_.padding);
    // Parts of the image whose number depends on its size alone, so that the sums' bits do not depend on the threads.
    const int64_t parts = std::min<int64_t>(c.strips, 16), kept = table.kept();
    if (kept == 0) return;
    T* partial = scratch<T>(3, parts * kept);
    torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      T* source = scratch<T>(4, c.block * c.channel_stride);
      T* sums = scratch<T>(7, kept * kColumnLanes);
      for (int64_t part = first; part < last; ++part) {
        std::memset(sums, 0, kept * kColumnLanes * sizeof(T));
        for (int64_t strip = part * c.strips / parts; strip < (part + 1) * c.strips / parts; ++strip) {
          const int64_t y = strip * c.strip_rows, rows = std::min<int64_t>(c.strip_rows, s_.out_h() - y);
          for (int64_t b = 0; b < c.blocks; ++b) {
            copy(c, x, x_plane, load, s_.in_channels, s_.height, b, y - s_.padding, rows, source);
            SPARSE_GEN_DISPATCH(dot_columns, weights, b, 0, s_.out_channels, source, grad_out + y * s_.width,
                                s_.out_h() * s_.width, rows, s_.width, sums,
                                after(c, x, x_plane, s_.in_channels, s_.height, b, y - s_.padding));
          }
        }
        SPARSE_GEN_DISPATCH(finish_columns, sums, kept, partial + part * kept);
      }
    });
    table.collect(partial, parts, grad_values);
  }

 private:
  // Of each source channel: the first cell of its block, and where its rows begin.
  struct Places {
    std::vector<int> cell, offset;
    Places(const AlignedCut& c, int64_t channels, int64_t columns) : cell(channels), offset(channels) {
      for (int64_t i = 0; i < channels; ++i) {
        cell[i] = i / c.block * columns;
        offset[i] = i % c.block * c.channel_stride;
      }
    }
  };

  // Rows first .. first + rows + kernel_h - 2 of a block's channels, zeros where the image has none.
  void copy(const AlignedCut& c, const T* x, int64_t plane, const Load<T>* load, int64_t channels, int64_t height,
            int64_t block, int64_t first, int64_t rows, T* to) const {
    const int64_t end = first + rows + s_.kernel_h - 1, width = s_.width;
    const int64_t inside = std::clamp<int64_t>(first, 0, height), inside_end = std::clamp<int64_t>(end, inside, height);
    const int64_t above = std::min<int64_t>(inside, end) - first, below = end - first - above - (inside_end - inside);
    for (int64_t i = block * c.block; i < std::min<int64_t>(channels, (block + 1) * c.block);
         ++i, to += c.channel_stride) {
      std::memset(to, 0, above * width * sizeof(T));
      read_pixels(x + i * plane + inside * width, to + above * width, (inside_end - inside) * width,
                  load ? load + i : nullptr);
      std::memset(to + (end - first - below) * width, 0, below * width * sizeof(T));
    }
  }

  // What is copied after a block whose rows begin with `first`: the next block, or the first one of the next strip.
  Ahead<T> after(const AlignedCut& c, const T* x, int64_t plane, int64_t channels, int64_t height, int64_t block,
                 int64_t first) const {
    if (++block == c.blocks) {
      block = 0;
      first += c.strip_rows;
    }
    const int64_t inside = std::clamp<int64_t>(first, 0, height);
    const int64_t end = std::clamp<int64_t>(first + c.strip_rows + s_.kernel_h - 1, inside, height);
    const int64_t planes = end > inside ? std::min<int64_t>(channels - block * c.block, c.block) : 0;
    return {x + block * c.block * plane + inside * s_.width, plane, planes, (end - inside) * s_.width};
  }

  void multiply(const AlignedCut& c, const ColumnTable<T>& table, const T* x, int64_t x_plane, const Load<T>* load,
                int64_t channels, int64_t height, int64_t above, const T* bias, T* out, int64_t groups,
                int64_t out_height) const {
    const ColumnWeights<T> weights = table.weights(s_.padding);
    torch::stable::parallel_for(0, c.strips, 1, [&](int64_t first, int64_t last) {
      T* source = scratch<T>(4, c.block * c.channel_stride);
      T* carry = scratch<T>(5, groups * kMostTileRows * 64 / sizeof(T));
      for (int64_t strip = first; strip < last; ++strip) {
        const int64_t y = strip * c.strip_rows, rows = std::min<int64_t>(c.strip_rows, out_height - y);
        for (int64_t b = 0; b < c.blocks; ++b) {
          copy(c, x, x_plane, load, channels, height, b, y + above, rows, source);
          SPARSE_GEN_DISPATCH(multiply_columns, weights, b, 0, groups, source, out + y * s_.width,
                              out_height * s_.width, rows, s_.width, bias, b > 0, carry,
                              after(c, x, x_plane, channels, height, b, y + above));
        }
      }
    });
  }

  ConvShape s_;
  int64_t kept_;
  const int32_t *out_, *in_, *ky_, *kx_;
  AlignedCut over_x_, over_grad_;
};

}  // namespace sparse_gen
