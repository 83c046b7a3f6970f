// Convolutions of an image that stays the same, such as the first layer's, whose parts are kept: taking 8 MB of floats
// apart at every step takes longer than their products do.
#include <algorithm>
#include <cstring>
#include <vector>

#include "masked_conv2d_split.h"
#include "scratch.h"

namespace sparse_gen {

namespace {

using amx::kParts;
using amx::kTileBytes;

// Bytes of the parts that are worked on at a time, in a core's second cache from one tap to the next.
constexpr int64_t kSeenBytes = 655360;

// The source's phases twice: as rows of pixels for the output, as pairs of columns for the weight's gradient.
struct Kept {
  const TileConvolution& c;
  amx::Depth depth;
  int64_t width, phase, there, pixels, across, part, rows;

  explicit Kept(const TileConvolution& c) : c(c), depth(c.in_channels) {
    width = c.phase_w();
    phase = (c.out_h() + c.reach_h()) * width;
    there = c.phases() * phase;
    // Behind the last one, up to a whole tile and the farthest tap, there are zeros.
    pixels = split_plane(there + c.reach_w());
    across = (there + c.reach_w() + 2 * kTileMargin + 31) / 32;
    part = tile_blocks(c.in_channels) * across * kTileBytes;
    rows = std::clamp<int64_t>(kSeenBytes / (c.phases() * width * c.in_channels * 6) - c.reach_h(), 1, c.out_h());
  }

  int64_t pixel_bytes() const { return depth.pixel_bytes(pixels); }
  int64_t bytes() const { return pixel_bytes() + kParts * part; }

  std::vector<long long> taps_at() const {
    std::vector<long long> at(c.taps());
    for (int64_t tap = 0; tap < c.taps(); ++tap) {
      const int64_t ky = tap / c.kernel_w, kx = tap % c.kernel_w, step = c.stride;
      at[tap] = (ky % step * step + kx % step) * phase + ky / step * width + kx / step;
    }
    return at;
  }

  void take(const float* x, char* to) const {
    const int64_t stride = tile_plane(there);
    std::vector<float> source(c.in_channels * stride);
    TileConvolution one = c;
    one.in_channels = 1;
    torch::stable::parallel_for(0, c.in_channels, 1, [&](int64_t first, int64_t last) {
      float* row = scratch<float>(3, tile_plane(c.source_w()));
      for (int64_t i = first; i < last; ++i)
        SPARSE_GEN_DISPATCH(tile_source, one, x + i * c.height * c.width, 0, c.out_h(), source.data() + i * stride,
                            stride, row);
    });
    std::memset(to, 0, bytes());
    amx::pack_pixels(depth, source.data(), stride, there, to, pixels);
    amx::pack_transposed(source.data(), stride, c.in_channels, there, across * 32, to + pixel_bytes());
  }
};

void forward(const TileConvolution& c, const char* parts, const float* weight, const float* bias, float* out) {
  const Kept kept(c);
  char* packed = scratch<char>(0, tile_blocks(c.out_channels) * SplitWeight::bytes_of_16_rows(c.in_channels, c.taps()));
  const SplitWeight split(weight, every(c.in_channels * c.taps(), c.out_channels), every(c.taps(), c.in_channels),
                          every(1, c.taps()), packed);
  const std::vector<amx::Step> steps = split_steps(kept.depth, kept.pixels, kept.taps_at());
  const int64_t bands = (c.out_h() + kept.rows - 1) / kept.rows, stride = split_plane(kept.rows * kept.width);
  torch::stable::parallel_for(0, bands, 1, [&](int64_t begin, int64_t end) {
    float* room = scratch<float>(3, kTileRows * stride);
    for (int64_t band = begin; band < end; ++band) {
      const int64_t first = band * kept.rows, last = std::min<int64_t>(first + kept.rows, c.out_h());
      for (int64_t from = 0; from < c.out_channels; from += kTileRows) {
        const int64_t to = std::min<int64_t>(from + kTileRows, c.out_channels);
        split.multiply(parts + first * kept.width * 64, steps, from / kTile, to - from, (last - first) * kept.width,
                       room, stride);
        for (int64_t o = from; o < to; ++o)
          for (int64_t y = first; y < last; ++y) {
            const float* sums = room + (o - from) * stride + (y - first) * kept.width;
            float* result = out + (o * c.out_h() + y) * c.out_w();
            const float own_bias = bias ? bias[o] : 0;
            for (int64_t i = 0; i < c.out_w(); ++i) result[i] = sums[i] + own_bias;
          }
      }
    }
  });
}

// The weight's gradient as squares, from output rows begin .. end - 1.
void grad_weight_of(const Kept& kept, const float* grad_out, const char* parts, int64_t begin, int64_t end,
                    float* squares) {
  const TileConvolution& c = kept.c;
  const amx::WeightSquares shape{c.out_channels, c.in_channels, c.taps()};
  const std::vector<long long> tap_at = kept.taps_at();
  const int64_t most = kept.rows * kept.width + 1, out_rows = tile_blocks(c.out_channels) * kTile;
  const int64_t plane = ((most + 63) / 32 | 1) * 32, left_part = out_rows * plane;
  float* row = scratch<float>(1, kTile + plane);
  // A pair of columns begins with an even one. Where a tap sees an odd one first, the gradient is shifted instead.
  unsigned short* left[2];
  left[0] = scratch<unsigned short>(2, 2 * kParts * left_part);
  left[1] = left[0] + kParts * left_part;
  std::vector<amx::Step> steps((most + 31) / 32 * 6);
  for (int64_t first = begin; first < end; first += kept.rows) {
    const int64_t last = std::min(first + kept.rows, end), columns = (last - first) * kept.width;
    for (int64_t o = 0; o < c.out_channels; ++o) {
      float* own = row + kTile;
      own[-1] = 0;
      for (int64_t y = first; y < last; ++y, own += kept.width) {
        std::copy_n(grad_out + (o * c.out_h() + y) * c.out_w(), c.out_w(), own);
        std::fill(own + c.out_w(), own + kept.width, 0.0f);
      }
      *own = 0;
      for (int64_t odd = 0; odd < 2; ++odd)
        amx::pack_rows(row + kTile - odd, 0, 1, columns + 1, left[odd] + o * plane, plane, left_part);
    }
    amx::plan_column_steps(columns + 1, left_part * sizeof(unsigned short), kept.part, steps.data());
    const amx::Tiles configured(kTile);
    const int64_t out_blocks = tile_blocks(c.out_channels), in_blocks = tile_blocks(c.in_channels);
    const int64_t count = (columns + 32) / 32 * 6, block = kept.across * kTileBytes;
    for (int64_t tap = 0; tap < c.taps(); ++tap) {
      const int64_t at = first * kept.width + tap_at[tap];
      amx::tile_product({left[at % 2], plane * 2, kTile * plane * 2}, {parts + kept.pixel_bytes() + at / 2 * 64, 64, block}, steps.data(), count,
                        out_blocks, in_blocks, {squares + shape.at(0, tap), kTile, shape.at(1, 0), 256},
                        first != begin);
    }
  }
}

void backward_weight(const TileConvolution& c, const float* grad_out, const char* parts, float* grad_weight) {
  const Kept kept(c);
  const amx::WeightSquares shape{c.out_channels, c.in_channels, c.taps()};
  // A fixed number, so that the sum over them does not depend on the number of threads.
  const int64_t bands = std::min<int64_t>(8, c.out_h());
  float* sums = scratch<float>(0, bands * shape.size());
  torch::stable::parallel_for(0, bands, 1, [&](int64_t first, int64_t last) {
    for (int64_t band = first; band < last; ++band)
      grad_weight_of(kept, grad_out, parts, band * c.out_h() / bands, (band + 1) * c.out_h() / bands,
                     sums + band * shape.size());
  });
  torch::stable::parallel_for(0, c.out_channels, 1, [&](int64_t first, int64_t last) {
    amx::collect_squares(shape, sums, bands, first, last, grad_weight);
  });
}

const char* parts_of(const Tensor& parts, int64_t e) { return (const char*)experiment<uint8_t>(parts, e); }

}  // namespace

// x (E, in, H, W), float32; returns (E, bytes).
Tensor masked_conv2d_split_parts(const Tensor& x, int64_t kernel_h, int64_t kernel_w, int64_t stride, int64_t padding,
                                 int64_t mode, bool pool) {
  check_amx();
  const TileConvolution c{x.size(1), 1, x.size(2), x.size(3), kernel_h, kernel_w, pool ? 2 : stride, padding, mode,
                          pool};
  const Kept kept(c);
  Tensor parts = torch::stable::empty({x.size(0), kept.bytes()}, ScalarType::Byte);
  for (int64_t e = 0; e < x.size(0); ++e) kept.take(experiment<float>(x, e), (char*)mutable_experiment<uint8_t>(parts, e));
  return parts;
}

// weight (E, out, in, kh, kw), bias (E, out); parts of x as above.
Tensor masked_conv2d_split_kept(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                const Tensor& parts, int64_t stride, int64_t padding, int64_t mode, bool pool) {
  check_amx();
  const TileConvolution c = tile_convolution(x, weight, stride, padding, mode, pool);
  Tensor out = torch::stable::empty({x.size(0), c.out_channels, c.out_h(), c.out_w()}, x.scalar_type());
  for (int64_t e = 0; e < x.size(0); ++e)
    forward(c, parts_of(parts, e), experiment<float>(weight, e), bias ? experiment<float>(*bias, e) : nullptr,
            mutable_experiment<float>(out, e));
  return out;
}

std::tuple<Tensor, Tensor> masked_conv2d_split_kept_backward(const Tensor& grad_out, const Tensor& x,
                                                             const Tensor& weight, const Tensor& parts, int64_t stride,
                                                             int64_t padding, int64_t mode, bool pool,
                                                             bool needs_grad_x, bool needs_grad_weight) {
  check_amx();
  const TileConvolution c = tile_convolution(x, weight, stride, padding, mode, pool);
  int64_t e = 0;
  return backward_each<float>(
      grad_out, x, weight, needs_grad_x, needs_grad_weight,
      [&](const float* gradient, const float*, const float* weights, float* grad_x, float* grad_weight) {
        if (grad_x) split_backward_x(c, gradient, weights, grad_x);
        if (grad_weight) backward_weight(c, gradient, parts_of(parts, e), grad_weight);
        ++e;
      });
}

}  // namespace sparse_gen

STABLE_TORCH_LIBRARY_IMPL(sparse_gen, CPU, m) {
  m.impl("masked_conv2d_split_parts", TORCH_BOX(&sparse_gen::masked_conv2d_split_parts));
  m.impl("masked_conv2d_split_kept", TORCH_BOX(&sparse_gen::masked_conv2d_split_kept));
  m.impl("masked_conv2d_split_kept_backward", TORCH_BOX(&sparse_gen::masked_conv2d_split_kept_backward));
}
