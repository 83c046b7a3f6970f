#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "binding.h"
#include "cpu/masked_conv2d_tiles.h"
#include "scratch.h"
#include "split_weight.h"

namespace sparse_gen {

namespace {

#if defined(SPARSE_GEN_AMX)

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
  const SplitWeight left(weight, every(c.in_channels * c.taps(), c.out_channels), every(c.taps(), c.in_channels),
                         every(1, c.taps()), packed);
  torch::stable::parallel_for(0, deal.bands * deal.groups, 1, [&](int64_t begin, int64_t end) {
    float* source = scratch<float>(1, c.in_channels * stride + tile_plane(c.source_w()));
    char* packed_pixels = scratch<char>(2, left.depth.pixel_bytes(pixels));
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
        amx::pack_pixels(left.depth, source, stride, c.phases() * own_phase, packed_pixels, pixels);
        std::vector<long long> tap_at(c.taps());
        for (int64_t tap = 0; tap < c.taps(); ++tap) {
          const int64_t ky = tap / c.kernel_w, kx = tap % c.kernel_w, step = c.stride;
          tap_at[tap] = (ky % step * step + kx % step) * own_phase + ky / step * width + kx / step;
        }
        steps = split_steps(left.depth, pixels, tap_at);
      }
      prepared = band;
      for (int64_t row = from; row < to; row += kTileRows) {
        const int64_t row_end = std::min(row + kTileRows, to);
        left.multiply(packed_pixels, steps, row / kTile, row_end - row, (last - first) * width, room, room_stride);
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

void backward_x(const TileConvolution& c, const float* grad_out, const float* weight, float* grad_x) {
  const Deal deal(c.phase_h(), c.out_channels * c.phase_w(), c.reach_h(), c.in_channels);
  const int64_t width = c.phase_w(), step = c.stride;
  const int64_t elements = (deal.rows + c.reach_h()) * width + c.reach_w();
  const int64_t stride = tile_plane(elements), pixels = split_plane(elements), room_stride = split_plane(deal.rows * width);
  const int64_t result_stride = tile_plane(c.phases() * c.phase_h() * width);
  // Each phase of the source has taps of its own.
  std::vector<SplitWeight> left;
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
    left.emplace_back(weight, every(c.taps(), c.in_channels), every(c.in_channels * c.taps(), c.out_channels), weight_at,
                      packed);
    packed += weight_at.size() * bytes;
    steps.push_back(split_steps(left[p].depth, pixels, tap_at));
  }
  float* result = scratch<float>(4, c.in_channels * result_stride);
  torch::stable::parallel_for(0, deal.bands * deal.groups, 1, [&](int64_t begin, int64_t end) {
    float* gradient = scratch<float>(1, c.out_channels * stride);
    char* packed_pixels = scratch<char>(2, left[0].depth.pixel_bytes(pixels));
    float* room = scratch<float>(3, kTileRows * room_stride);
    int64_t prepared = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t band = task / deal.groups, first = band * deal.rows;
      const int64_t last = std::min<int64_t>(first + deal.rows, c.phase_h()), count = (last - first) * width;
      const int64_t from = task % deal.groups * deal.group, to = std::min<int64_t>(from + deal.group, c.in_channels);
      if (first >= last) continue;
      if (band != prepared) {
        SPARSE_GEN_DISPATCH(tile_gradient, c, grad_out, first, last, gradient, stride);
        amx::pack_pixels(left[0].depth, gradient, stride, elements, packed_pixels, pixels);
      }
      prepared = band;
      for (int64_t row = from; row < to; row += kTileRows)
        for (int64_t p = 0; p < c.phases(); ++p) {
          const int64_t row_end = std::min(row + kTileRows, to);
          left[p].multiply(packed_pixels, steps[p], row / kTile, row_end - row, count, room, room_stride);
          for (int64_t i = row; i < row_end; ++i)
            std::copy_n(room + (i - row) * room_stride, count,
                        result + i * result_stride + (p * c.phase_h() + first) * width);
        }
    }
  });
  torch::stable::parallel_for(0, c.in_channels, 1, [&](int64_t from, int64_t to) {
    float* rows = scratch<float>(3, 2 * tile_plane(c.width + 2 * c.padding));
    for (int64_t i = from; i < to; ++i)
      SPARSE_GEN_DISPATCH(tile_fold, c, result + i * result_stride, grad_x + i * c.height * c.width, rows);
  });
}

// Columns of 32 that one product sums over: what it reads, for 32 by 32 channels, stays in the first cache over all taps.
constexpr int64_t kColumnTiles = 8;

// Adds the gradient by the weights of input channels from .. to - 1, from output rows begin .. end - 1, up in `squares`.
void add_grad_weight(const TileConvolution& whole, const float* grad_out, const float* x, int64_t from, int64_t to,
                     int64_t begin, int64_t end, const WeightSquares& shape, float* squares) {
  TileConvolution c = whole;
  c.in_channels = to - from;
  const int64_t width = c.phase_w(), step = c.stride;
  const int64_t rows = std::clamp<int64_t>(
      2 * kBandElements / ((c.in_channels * c.phases() + c.out_channels) * width) - c.reach_h(), 4, end - begin);
  const int64_t phase = (rows + c.reach_h()) * width, source_stride = tile_plane(c.phases() * phase);
  const int64_t gradient_stride = tile_plane(phase + c.reach_w());
  const int64_t out_blocks = tile_blocks(c.out_channels), in_blocks = tile_blocks(c.in_channels);
  // Columns are summed over: behind the last one, up to a whole tile and the farthest tap, there must be zeros.
  const int64_t zeros = kTileMargin + c.reach_h() * width + c.reach_w();
  const int64_t plane = ((rows * width + 63) / 32 | 1) * 32, part = out_blocks * kTile * plane;
  float* source = scratch<float>(1, c.in_channels * source_stride + tile_plane(c.source_w()));
  float* gradient = scratch<float>(3, c.out_channels * gradient_stride);
  auto* left = scratch<unsigned short>(2, kParts * part);
  // Pairs of columns that begin with an even one, and those that begin with an odd one: a shift by one column is then
  // no shift within a tile's row either.
  const int64_t most = kParts * amx::row_tiles(c.in_channels, c.phases() * phase + zeros) * kTileBytes;
  char* right[2] = {scratch<char>(5, 2 * most), nullptr};
  right[1] = right[0] + most;
  if (step == 2) std::fill_n(source, c.in_channels * source_stride, 0.0f);  // what no phase fills is multiplied by zeros
  std::vector<Step> steps((rows * width + 31) / 32 * 6);
  std::vector<int64_t> tap_at(c.taps());
  for (int64_t first = begin; first < end; first += rows) {
    const int64_t last = std::min(first + rows, end), own = (last - first) * width, tiles = (own + 31) / 32;
    const int64_t own_phase = own + c.reach_h() * width, there = c.phases() * own_phase;
    SPARSE_GEN_DISPATCH(tile_source, c, x + from * c.height * c.width, first, last, source, source_stride,
                        source + c.in_channels * source_stride);
    SPARSE_GEN_DISPATCH(tile_gradient, c, grad_out, first, last, gradient, gradient_stride);
    amx::pack_rows(gradient + c.reach_w() + c.reach_h() * width, gradient_stride, c.out_channels, own, 0, left, plane,
                   part);
    for (int64_t odd = 0; odd < (c.kernel_w > 1 || width % 2 ? 2 : 1); ++odd)
      amx::pack_transposed(source + odd, source_stride, c.in_channels, there - odd, there + zeros, right[odd]);
    const int64_t right_part = amx::row_tiles(c.in_channels, there + zeros) * kTileBytes;
    amx::plan_column_steps(own, part * sizeof *left, right_part, steps.data());
    for (int64_t tap = 0; tap < c.taps(); ++tap) {
      const int64_t ky = tap / c.kernel_w, kx = tap % c.kernel_w;
      tap_at[tap] = (ky % step * step + kx % step) * own_phase + ky / step * width + kx / step;
    }
    const auto right_at = [&](int64_t tap) { return right[tap_at[tap] % 2] + tap_at[tap] / 2 * 64; };
    const auto product = [&](int64_t out_block, int64_t in_block, int64_t tap, int64_t tile, int64_t count,
                             int64_t column_blocks, int64_t b_block, int64_t c_block) {
      amx::tile_product({left + out_block * kTile * plane, plane * 2, kTile * plane * 2},
                        {right_at(tap) + in_block * right_part / in_blocks, 64, b_block}, steps.data() + 6 * tile,
                        6 * count, std::min<int64_t>(out_blocks - out_block, 2), column_blocks,
                        {squares + shape.at(out_block, tap) + (from / kTile + in_block) * 256, kTile, shape.at(1, 0), c_block},
                        first != begin || tile > 0);
    };
    const amx::Tiles configured(kTile);
    const int64_t at_once = (tiles + kColumnTiles - 1) / kColumnTiles, column_tiles = (tiles + at_once - 1) / at_once;
    for (int64_t tile = 0; tile < tiles; tile += column_tiles) {
      const int64_t count = std::min(column_tiles, tiles - tile);
      for (int64_t out_block = 0; out_block < out_blocks; out_block += 2) {
        // Sixteen input channels by themselves: two taps at a time.
        for (int64_t tap = 0; in_blocks == 1 && tap < c.taps(); tap += 2) {
          const bool two = tap + 1 < c.taps();
          product(out_block, 0, tap, tile, count, 1 + two, two ? right_at(tap + 1) - right_at(tap) : 0, shape.at(0, 1));
        }
        for (int64_t in_block = 0; in_blocks > 1 && in_block < in_blocks; in_block += 2)
          for (int64_t tap = 0; tap < c.taps(); ++tap)
            product(out_block, in_block, tap, tile, count, std::min<int64_t>(in_blocks - in_block, 2),
                    right_part / in_blocks, 256);
      }
    }
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
      add_grad_weight(c, grad_out, x, from, std::min<int64_t>(from + group, c.in_channels), band * c.out_h() / bands,
                      (band + 1) * c.out_h() / bands, shape, parts + band * shape.size());
    }
  });
  torch::stable::parallel_for(0, c.out_channels, 1, [&](int64_t first, int64_t last) {
    amx::collect_squares(shape, parts, bands, first, last, grad_weight);
  });
}

#endif

TileConvolution convolution_of(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding, int64_t mode,
                               bool pool) {
  check_amx();
  return {x.size(1), weight.size(1), x.size(2), x.size(3), weight.size(3), weight.size(4), pool ? 2 : stride, padding,
          mode,      pool};
}

}  // namespace

// x (E, in, H, W), weight (E, out, in, kh, kw), bias (E, out), all float32.
Tensor masked_conv2d_split(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t stride,
                           int64_t padding, int64_t mode, bool pool) {
  const TileConvolution c = convolution_of(x, weight, stride, padding, mode, pool);
  Tensor out = torch::stable::empty({x.size(0), c.out_channels, c.out_h(), c.out_w()}, x.scalar_type());
#if defined(SPARSE_GEN_AMX)
  for (int64_t e = 0; e < x.size(0); ++e)
    forward(c, x.const_data_ptr<float>() + e * c.in_channels * c.height * c.width,
            weight.const_data_ptr<float>() + e * c.out_channels * c.in_channels * c.taps(),
            bias ? bias->const_data_ptr<float>() + e * c.out_channels : nullptr,
            out.mutable_data_ptr<float>() + e * c.out_channels * c.out_h() * c.out_w());
#endif
  return out;
}

std::tuple<Tensor, Tensor> masked_conv2d_split_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                                        int64_t stride, int64_t padding, int64_t mode, bool pool,
                                                        bool needs_grad_x, bool needs_grad_weight) {
  const TileConvolution c = convolution_of(x, weight, stride, padding, mode, pool);
  const auto like = [&](const Tensor& tensor, bool needed) {
    return needed ? torch::stable::empty_like(tensor) : torch::stable::empty({0}, x.scalar_type());
  };
  Tensor grad_x = like(x, needs_grad_x), grad_weight = like(weight, needs_grad_weight);
#if defined(SPARSE_GEN_AMX)
  for (int64_t e = 0; e < x.size(0); ++e) {
    const int64_t image = e * c.in_channels * c.height * c.width;
    const int64_t weights = e * c.out_channels * c.in_channels * c.taps();
    const float* gradient = grad_out.const_data_ptr<float>() + e * c.out_channels * c.out_h() * c.out_w();
    if (needs_grad_x)
      backward_x(c, gradient, weight.const_data_ptr<float>() + weights, grad_x.mutable_data_ptr<float>() + image);
    if (needs_grad_weight)
      backward_weight(c, gradient, x.const_data_ptr<float>() + image, grad_weight.mutable_data_ptr<float>() + weights);
  }
#endif
  return {grad_x, grad_weight};
}

}  // namespace sparse_gen

STABLE_TORCH_LIBRARY_IMPL(sparse_gen, CPU, m) {
  m.impl("masked_conv2d_split", TORCH_BOX(&sparse_gen::masked_conv2d_split));
  m.impl("masked_conv2d_split_backward", TORCH_BOX(&sparse_gen::masked_conv2d_split_backward));
}
