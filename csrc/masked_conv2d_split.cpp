#include <algorithm>
#include <vector>

#include "masked_conv2d_split.h"
#include "scratch.h"

namespace sparse_gen {

namespace {

using amx::kParts;
using amx::kTileBytes;
using amx::Step;
using amx::WeightSquares;

// Elements of a band of the source, or of the output's gradient, whose parts stay in a core's second cache.
constexpr int64_t kBandElements = 98304;

// How rows of an image are dealt out: in bands that fit the cache, and in groups of channels if there are few bands.
struct Deal {
  int64_t rows, bands, group, groups;

  Deal(int64_t height, int64_t elements_a_row, int64_t reach, int64_t channels) {
    rows = std::clamp<int64_t>(kBandElements / elements_a_row - reach, 4, height);
    bands = (height + rows - 1) / rows;
    if (bands > 1) bands += bands % 2;
    rows = (height + bands - 1) / bands;
    group = bands >= 8 ? (channels + kTileRows - 1) / kTileRows * kTileRows : kTileRows;
    groups = (channels + group - 1) / group;
  }
};

void forward(const TileConvolution& c, const float* x, const float* weight, const float* bias, float* out) {
  const Deal deal(c.out_h(), c.in_channels * c.phases() * c.phase_w(), c.reach_h(), c.out_channels);
  const int64_t width = c.phase_w(), phase = (deal.rows + c.reach_h()) * width;
  const int64_t stride = tile_plane(c.phases() * phase), pixels = split_plane(c.phases() * phase);
  char* packed = scratch<char>(0, tile_blocks(c.out_channels) * SplitWeight::bytes_of_16_rows(c.in_channels, c.taps()));
  const SplitWeight split(weight, every(c.in_channels * c.taps(), c.out_channels), every(c.taps(), c.in_channels),
                          every(1, c.taps()), packed);
  torch::stable::parallel_for(0, deal.bands * deal.groups, 1, [&](int64_t begin, int64_t end) {
    float* source = scratch<float>(1, c.in_channels * stride + tile_plane(c.source_w()));
    char* packed_pixels = scratch<char>(2, split.depth.pixel_bytes(pixels));
    const int64_t room_stride = split_plane(deal.rows * width);
    float* room = scratch<float>(3, kTileRows * room_stride);
    std::vector<Step> steps;
    int64_t prepared = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t band = task / deal.groups, first = band * deal.rows;
      const int64_t last = std::min<int64_t>(first + deal.rows, c.out_h());
      const int64_t from = task % deal.groups * deal.group, to = std::min<int64_t>(from + deal.group, c.out_channels);
      if (first >= last) continue;
      if (band != prepared) {
        const int64_t own_phase = (last - first + c.reach_h()) * width;
        SPARSE_GEN_DISPATCH(tile_source, c, x, first, last, source, stride, source + c.in_channels * stride);
        amx::pack_pixels(split.depth, source, stride, c.phases() * own_phase, packed_pixels, pixels);
        std::vector<long long> tap_at(c.taps());
        for (int64_t tap = 0; tap < c.taps(); ++tap) {
          const int64_t ky = tap / c.kernel_w, kx = tap % c.kernel_w, step = c.stride;
          tap_at[tap] = (ky % step * step + kx % step) * own_phase + ky / step * width + kx / step;
        }
        steps = split_steps(split.depth, pixels, tap_at);
      }
      prepared = band;
      for (int64_t row = from; row < to; row += kTileRows) {
        const int64_t row_end = std::min(row + kTileRows, to);
        split.multiply(packed_pixels, steps, row / kTile, row_end - row, (last - first) * width, room, room_stride);
        for (int64_t o = row; o < row_end; ++o)
          for (int64_t y = first; y < last; ++y) {
            const float* sums = room + (o - row) * room_stride + (y - first) * width;
            float* result = out + (o * c.out_h() + y) * c.out_w();
            const float own_bias = bias ? bias[o] : 0;
            for (int64_t i = 0; i < c.out_w(); ++i) result[i] = sums[i] + own_bias;
          }
      }
    }
  });
}

}  // namespace

void split_backward_x(const TileConvolution& c, const float* grad_out, const float* weight, float* grad_x) {
  const Deal deal(c.phase_h(), c.out_channels * c.phase_w(), c.reach_h(), c.in_channels);
  const int64_t width = c.phase_w(), step = c.stride;
  const int64_t elements = (deal.rows + c.reach_h()) * width + c.reach_w();
  const int64_t stride = tile_plane(elements), pixels = split_plane(elements);
  const int64_t result_stride = tile_plane(c.phases() * c.phase_h() * width);
  // Each phase of the source has taps of its own.
  std::vector<SplitWeight> split;
  std::vector<std::vector<Step>> steps;
  const int64_t bytes = tile_blocks(c.in_channels) * SplitWeight::bytes_of_16_rows(c.out_channels, 1);
  char* packed = scratch<char>(0, c.taps() * bytes);
  for (int64_t p = 0; p < c.phases(); ++p) {
    std::vector<int> weight_at;
    std::vector<long long> tap_at;
    for (int64_t tap = 0; tap < c.taps(); ++tap) {
      const int64_t ky = tap / c.kernel_w, kx = tap % c.kernel_w;
      if (ky % step * step + kx % step != p) continue;
      weight_at.push_back(tap);
      tap_at.push_back(c.reach_w() + (c.reach_h() - ky / step) * width - kx / step);
    }
    split.emplace_back(weight, every(c.taps(), c.in_channels), every(c.in_channels * c.taps(), c.out_channels), weight_at,
                       packed);
    packed += weight_at.size() * bytes;
    steps.push_back(split_steps(split[p].depth, pixels, tap_at));
  }
  float* result = scratch<float>(4, tile_blocks(c.in_channels) * kTile * result_stride);
  torch::stable::parallel_for(0, deal.bands * deal.groups, 1, [&](int64_t begin, int64_t end) {
    float* gradient = scratch<float>(1, c.out_channels * stride);
    char* packed_pixels = scratch<char>(2, split[0].depth.pixel_bytes(pixels));
    int64_t prepared = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t band = task / deal.groups, first = band * deal.rows;
      const int64_t last = std::min<int64_t>(first + deal.rows, c.phase_h()), count = (last - first) * width;
      const int64_t from = task % deal.groups * deal.group, to = std::min<int64_t>(from + deal.group, c.in_channels);
      if (first >= last) continue;
      if (band != prepared) {
        SPARSE_GEN_DISPATCH(tile_gradient, c, grad_out, first, last, gradient, stride);
        amx::pack_pixels(split[0].depth, gradient, stride, elements, packed_pixels, pixels);
      }
      prepared = band;
      for (int64_t row = from; row < to; row += kTileRows)
        for (int64_t p = 0; p < c.phases(); ++p) {
          const int64_t row_end = std::min(row + kTileRows, to);
          split[p].multiply(packed_pixels, steps[p], row / kTile, row_end - row, count,
                            result + row * result_stride + (p * c.phase_h() + first) * width, result_stride);
        }
    }
  });
  torch::stable::parallel_for(0, c.in_channels, 1, [&](int64_t from, int64_t to) {
    float* rows = scratch<float>(3, 2 * tile_plane(c.width + 2 * c.padding));
    for (int64_t i = from; i < to; ++i)
      SPARSE_GEN_DISPATCH(tile_fold, c, result + i * result_stride, grad_x + i * c.height * c.width, rows);
  });
}

namespace {

// Some output rows of the gradient, all its channels, as a left operand; and some input channels of what they saw as a
// right one, against which it gives their part of the weight's gradient.
class WeightGradient {
 public:
  WeightGradient(const TileConvolution& c, int64_t rows)
      : c_(c),
        shape_{c.out_channels, c.in_channels, c.taps()},
        width_(c.phase_w()),
        // Columns are summed over: behind the last one, up to a whole tile and the farthest tap, there must be zeros.
        zeros_(kTileMargin + c.reach_h() * width_ + c.reach_w()),
        plane_(((rows * width_ + 63) / 32 | 1) * 32),
        part_(tile_blocks(c.out_channels) * kTile * plane_),
        steps_((rows * width_ + 31) / 32 * 6),
        tap_at_(c.taps()) {
    const int64_t phase = (rows + c.reach_h()) * width_;
    source_stride_ = tile_plane(c.phases() * phase);
    gradient_stride_ = tile_plane(phase + c.reach_w());
    source_ = scratch<float>(1, kTileRows * source_stride_ + tile_plane(c.source_w()));
    gradient_ = scratch<float>(3, c.out_channels * gradient_stride_);
    left_ = scratch<unsigned short>(2, kParts * part_);
    // Pairs of columns that begin with an even one, and those that begin with an odd one: a shift by one column is then
    // no shift within a tile's row either.
    const int64_t most = kParts * amx::row_tiles(kTileRows, c.phases() * phase + zeros_) * kTileBytes;
    right_[0] = scratch<char>(5, 2 * most);
    right_[1] = right_[0] + most;
    // What no phase fills is multiplied by zeros.
    if (c.stride == 2) std::fill_n(source_, kTileRows * source_stride_, 0.0f);
  }

  void take_rows(const float* grad_out, int64_t first, int64_t last) {
    first_ = first, last_ = last;
    columns_ = (last - first) * width_;
    there_ = c_.phases() * (columns_ + c_.reach_h() * width_);
    SPARSE_GEN_DISPATCH(tile_gradient, c_, grad_out, first, last, gradient_, gradient_stride_);
    amx::pack_rows(gradient_ + c_.reach_w() + c_.reach_h() * width_, gradient_stride_, c_.out_channels, columns_, left_,
                   plane_, part_);
    for (int64_t tap = 0; tap < c_.taps(); ++tap) {
      const int64_t ky = tap / c_.kernel_w, kx = tap % c_.kernel_w, step = c_.stride;
      tap_at_[tap] = (ky % step * step + kx % step) * there_ / c_.phases() + ky / step * width_ + kx / step;
    }
  }

  // For input channels from .. to - 1, at most kTileRows, from a multiple of kTile on.
  void add_to(float* squares, const float* x, int64_t from, int64_t to, bool add) {
    TileConvolution own = c_;
    own.in_channels = to - from;
    SPARSE_GEN_DISPATCH(tile_source, own, x + from * c_.height * c_.width, first_, last_, source_, source_stride_,
                        source_ + kTileRows * source_stride_);
    for (int64_t odd = 0; odd < (c_.kernel_w > 1 || width_ % 2 ? 2 : 1); ++odd)
      amx::pack_transposed(source_ + odd, source_stride_, to - from, there_ - odd, there_ + zeros_, right_[odd]);
    const int64_t blocks = tile_blocks(to - from);
    const int64_t right_part = amx::row_tiles(to - from, there_ + zeros_) * kTileBytes;
    amx::plan_column_steps(columns_, part_ * sizeof *left_, right_part, steps_.data());
    const amx::Tiles configured(kTile);
    for (int64_t out = 0; out < tile_blocks(c_.out_channels); out += 2) {
      int64_t tap = 0;
      // Few output channels as well: four taps, or two of two blocks.
      const bool few = out + 1 == tile_blocks(c_.out_channels) && shape_.in_blocks() == blocks;
      for (; few && tap + 4 / blocks <= c_.taps(); tap += 4 / blocks) {
        const char* four[4];
        for (int64_t n = 0; n < 4; ++n) four[n] = right_at(tap + n / blocks) + n % blocks * (right_part / blocks);
        amx::tile_product_of_four({left_ + out * kTile * plane_, plane_ * 2, 0}, four, steps_.data(),
                                  6 * ((columns_ + 31) / 32), squares + shape_.at(out, tap), add);
      }
      // Sixteen input channels by themselves: two taps at a time.
      for (; tap < c_.taps(); tap += blocks > 1 ? 1 : 2) {
        const bool pair = blocks == 1 && tap + 1 < c_.taps();
        const int64_t to_next = blocks > 1 ? right_part / blocks : pair ? right_at(tap + 1) - right_at(tap) : 0;
        amx::tile_product({left_ + out * kTile * plane_, plane_ * 2, kTile * plane_ * 2}, {right_at(tap), 64, to_next},
                          steps_.data(), 6 * ((columns_ + 31) / 32),
                          std::min<int64_t>(tile_blocks(c_.out_channels) - out, 2), blocks + pair,
                          {squares + shape_.at(out, tap) + from / kTile * 256, kTile, shape_.at(1, 0),
                           blocks > 1 ? 256 : shape_.at(0, 1)},
                          add);
      }
    }
  }

 private:
  const char* right_at(int64_t tap) const { return right_[tap_at_[tap] % 2] + tap_at_[tap] / 2 * 64; }

  const TileConvolution& c_;
  amx::WeightSquares shape_;
  int64_t width_, zeros_, plane_, part_, source_stride_, gradient_stride_, first_, last_, columns_, there_;
  std::vector<Step> steps_;
  std::vector<int64_t> tap_at_;
  float *source_, *gradient_;
  unsigned short* left_;
  char* right_[2];
};

// The gradient by the weights of input channels from .. to - 1, from output rows begin .. end - 1.
void grad_weight_of(const TileConvolution& c, const float* grad_out, const float* x, int64_t from, int64_t to,
                    int64_t begin, int64_t end, float* squares) {
  const int64_t elements_a_row = (2 * kTileRows * c.phases() + c.out_channels) * c.phase_w();
  const int64_t rows = std::clamp<int64_t>(kBandElements / elements_a_row - c.reach_h(), 4, end - begin);
  WeightGradient gradient(c, rows);
  for (int64_t first = begin; first < end; first += rows) {
    gradient.take_rows(grad_out, first, std::min(first + rows, end));
    for (int64_t i = from; i < to; i += kTileRows)
      gradient.add_to(squares, x, i, std::min(i + kTileRows, to), first != begin);
  }
}

void backward_weight(const TileConvolution& c, const float* grad_out, const float* x, float* grad_weight) {
  const WeightSquares shape{c.out_channels, c.in_channels, c.taps()};
  // A fixed number of bands, so that the sum over them does not depend on the number of threads. Where one part is
  // large, the input channels are dealt out instead.
  const int64_t pixels = c.out_h() * c.out_w();
  const int64_t most = shape.size() > 131072 ? (pixels < 2048 ? 1 : 4) : pixels < 16384 ? 4 : 8;
  const int64_t bands = std::min<int64_t>(most, c.out_h());
  const int64_t group = bands > 1 ? c.in_channels : kTileRows, groups = (c.in_channels + group - 1) / group;
  float* parts = scratch<float>(0, bands * shape.size());
  torch::stable::parallel_for(0, bands * groups, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t band = task / groups, from = task % groups * group;
      grad_weight_of(c, grad_out, x, from, std::min<int64_t>(from + group, c.in_channels), band * c.out_h() / bands,
                     (band + 1) * c.out_h() / bands, parts + band * shape.size());
    }
  });
  torch::stable::parallel_for(0, c.out_channels, 1, [&](int64_t first, int64_t last) {
    amx::collect_squares(shape, parts, bands, first, last, grad_weight);
  });
}

}  // namespace

// x (E, in, H, W), weight (E, out, in, kh, kw), bias (E, out), all float32.
Tensor masked_conv2d_split(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t stride,
                           int64_t padding, int64_t mode, bool pool) {
  check_amx();
  const TileConvolution c = tile_convolution(x, weight, stride, padding, mode, pool);
  Tensor out = torch::stable::empty({x.size(0), c.out_channels, c.out_h(), c.out_w()}, x.scalar_type());
  forward_each<float>(x, weight, bias, out, [&](auto... pointers) { forward(c, pointers...); });
  return out;
}

std::tuple<Tensor, Tensor> masked_conv2d_split_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                                        int64_t stride, int64_t padding, int64_t mode, bool pool,
                                                        bool needs_grad_x, bool needs_grad_weight) {
  check_amx();
  const TileConvolution c = tile_convolution(x, weight, stride, padding, mode, pool);
  return backward_each<float>(
      grad_out, x, weight, needs_grad_x, needs_grad_weight,
      [&](const float* gradient, const float* image, const float* weights, float* grad_x, float* grad_weight) {
        if (grad_x) split_backward_x(c, gradient, weights, grad_x);
        if (grad_weight) backward_weight(c, gradient, image, grad_weight);
      });
}

}  // namespace sparse_gen

STABLE_TORCH_LIBRARY_IMPL(sparse_gen, CPU, m) {
  m.impl("masked_conv2d_split", TORCH_BOX(&sparse_gen::masked_conv2d_split));
  m.impl("masked_conv2d_split_backward", TORCH_BOX(&sparse_gen::masked_conv2d_split_backward));
}
