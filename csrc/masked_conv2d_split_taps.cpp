#include <algorithm>

#include "cpu/sum_transposed.h"
#include "masked_conv2d.h"
#include "scratch.h"
#include "split_weight.h"

namespace sparse_gen {

namespace {

using amx::kParts;
using amx::kTileBytes;

// Elements of the small image and of the tap planes that are worked on at a time, in a core's second cache.
constexpr int64_t kForwardElements = 65536, kBackwardElements = 98304;
// Tap planes of one group of output channels: whole tiles, four of them where that goes.
constexpr int64_t kGroupPlanes = 4 * kTile;

// Where the weight of output channel o and tap t lies in the first input channel's, for all of them.
std::vector<int> planes_at(const TapConvolution& c) {
  std::vector<int> at(c.out_channels * c.taps());
  for (int64_t n = 0; n < (int64_t)at.size(); ++n) at[n] = n / c.taps() * c.in_channels * c.taps() + n % c.taps();
  return at;
}

int64_t rows_at_a_time(const TapConvolution& c, int64_t planes, int64_t elements) {
  return std::clamp<int64_t>(elements / (planes * c.width), 1, c.height);
}

// Output rows 2 * first to 2 * last - 1. What the next rows need of the rows before is kept, so that no tap plane is
// computed twice.
void forward_band(const TapConvolution& c, const SplitWeight& split, int64_t group, const float* x, const float* bias,
                  float* out, int64_t first, int64_t last) {
  const int64_t halo = c.halo();
  const int64_t begin = std::max<int64_t>(first - halo, 0), end = std::min<int64_t>(last + halo, c.height);
  const int64_t step = rows_at_a_time(c, std::max<int64_t>(c.in_channels, kGroupPlanes), kForwardElements);
  const int64_t stride = split_plane(step * c.width), half_stride = 2 * row_stride(c.width), half_rows = step + 2 * halo;
  char* source = scratch<char>(1, split.depth.pixel_bytes(stride));
  const int64_t blocks = tile_blocks(group * c.taps());
  float* planes = scratch<float>(2, blocks * kTile * stride);
  float* halves = scratch<float>(3, c.out_channels * c.kernel * half_rows * half_stride);
  const std::vector<amx::Step> steps = split_steps(split.depth, stride, {0});
  int64_t done = first;
  for (int64_t row = begin; row < end; row += step) {
    const int64_t row_end = std::min(row + step, end), columns = (row_end - row) * c.width;
    amx::pack_pixels(split.depth, x + row * c.width, c.height * c.width, columns, source, stride);
    const int64_t ready = std::max(done, row_end == c.height ? last : std::min<int64_t>(last, row_end - halo));
    for (int64_t o = 0; o < c.out_channels; o += group) {
      const int64_t o_end = std::min<int64_t>(o + group, c.out_channels);
      split.multiply(source, steps, o / group * blocks, (o_end - o) * c.taps(), columns, planes, stride);
      for (int64_t n = o; n < o_end; ++n) {
        const TapRows<float> rows{planes + (n - o) * c.taps() * stride, stride, row, row_end};
        const TapHalves<float> own{halves + n * c.kernel * half_rows * half_stride, half_stride, half_rows};
        SPARSE_GEN_DISPATCH(tap_columns, c, rows, own);
        SPARSE_GEN_DISPATCH(tap_output, c, own, bias ? bias[n] : 0, done, ready, out + n * 4 * c.height * c.width);
      }
    }
    done = ready;
  }
}

void forward(const TapConvolution& c, const float* x, const float* weight, const float* bias, float* out) {
  const int64_t group = std::clamp<int64_t>(kGroupPlanes / c.taps(), 1, c.out_channels);
  const int64_t blocks = (c.out_channels + group - 1) / group * tile_blocks(group * c.taps());
  char* packed = scratch<char>(0, blocks * SplitWeight::bytes_of_16_rows(c.in_channels, 1));
  const SplitWeight split(weight, planes_at(c), every(c.taps(), c.in_channels), {0}, packed, group * c.taps());
  const int64_t bands = std::min<int64_t>(c.height, c.height < 128 ? 2 : 4);
  torch::stable::parallel_for(0, bands, 1, [&](int64_t begin, int64_t end) {
    for (int64_t band = begin; band < end; ++band)
      forward_band(c, split, group, x, bias, out, band * c.height / bands, (band + 1) * c.height / bands);
  });
}

void backward(const TapConvolution& c, const float* grad_out, const float* x, const float* weight, float* grad_x,
              float* grad_weight) {
  const int64_t count = c.out_channels * c.taps(), blocks = tile_blocks(count), pixels = c.height * c.width;
  const int64_t step = rows_at_a_time(c, count, kBackwardElements), most = step * c.width;
  const int64_t stride = split_plane(most), part = tile_blocks(count) * kTile * tile_blocks(c.in_channels) * kTile;
  const int64_t weight_stride = tile_blocks(c.in_channels) * kTile;
  // A fixed number of bands, so that the sum over them does not depend on the number of threads; fewer where each
  // one's gradient of the weight is large.
  const int64_t bands = std::min<int64_t>(std::clamp<int64_t>(524288 / part / 2 * 2, 2, 16), c.height);
  const int64_t weight_bytes = tile_blocks(c.in_channels) * SplitWeight::bytes_of_16_rows(count, 1);
  char* packed = scratch<char>(0, weight_bytes + bands * part * sizeof(float));
  float* parts = (float*)(packed + weight_bytes);
  const SplitWeight split(weight, every(c.taps(), c.in_channels), planes_at(c), {0}, packed);
  const std::vector<amx::Step> steps = split_steps(split.depth, stride, {0});
  torch::stable::parallel_for(0, bands, 1, [&](int64_t first_band, int64_t last_band) {
    float* planes = scratch<float>(1, count * stride);
    // The planes' parts twice: in pairs for the sums over them, in rows for the sums along them.
    const int64_t row_plane = (most + 63) / 32 * 32 + 32, row_part = blocks * kTile * row_plane;
    char* paired = scratch<char>(2, std::max<int64_t>(split.depth.pixel_bytes(stride), kParts * row_part * 2));
    auto* rowed = (unsigned short*)paired;
    float* room = scratch<float>(3, std::max<int64_t>(tile_blocks(c.in_channels) * kTile * stride,
                                             2 * row_stride(c.width + 2 * kSpreadMargin)));
    char* right = scratch<char>(4, kParts * amx::row_tiles(c.in_channels, most) * kTileBytes);
    std::vector<amx::Step> column_steps((most + 31) / 32 * 6);
    for (int64_t band = first_band; band < last_band; ++band) {
      const int64_t begin = band * c.height / bands, end = (band + 1) * c.height / bands;
      for (int64_t row = begin; row < end; row += step) {
        const TapRows<float> rows{planes, stride, row, std::min(row + step, end)};
        const int64_t columns = (rows.last - row) * c.width, tiles = (columns + 31) / 32;
        SPARSE_GEN_DISPATCH(tap_spread, c, grad_out, 0, c.out_channels, rows, room);
        if (grad_x) {
          amx::pack_pixels(split.depth, planes, stride, columns, paired, stride);
          split.multiply(paired, steps, 0, c.in_channels, columns, room, stride);
          for (int64_t i = 0; i < c.in_channels; ++i)
            std::copy_n(room + i * stride, columns, grad_x + i * pixels + row * c.width);
        }
        if (!grad_weight) continue;
        amx::pack_rows(planes, stride, count, columns, rowed, row_plane, row_part);
        amx::pack_transposed(x + row * c.width, pixels, c.in_channels, columns, columns, right);
        amx::plan_column_steps(columns, row_part * 2, amx::row_tiles(c.in_channels, columns) * kTileBytes,
                               column_steps.data());
        const amx::Tiles configured(kTile);
        amx::tile_product({rowed, row_plane * 2, kTile * row_plane * 2}, {right, 64, tiles * kTileBytes},
                          column_steps.data(), 6 * tiles, blocks, tile_blocks(c.in_channels),
                          {parts + band * part, weight_stride, kTile * weight_stride, kTile}, row != begin);
      }
    }
  });
  if (!grad_weight) return;
  torch::stable::parallel_for(0, c.out_channels, 1, [&](int64_t first, int64_t last) {
    float* room = scratch<float>(3, transposed_elements(c.taps(), weight_stride));
    for (int64_t o = first; o < last; ++o)
      SPARSE_GEN_DISPATCH(sum_transposed, parts + o * c.taps() * weight_stride, bands, part, c.taps(), c.in_channels,
                          weight_stride, grad_weight + o * c.in_channels * c.taps(), room);
  });
}

}  // namespace

// x (E, in, h, w), weight (E, out, in, k, k), bias (E, out), all float32; returns (E, out, 2 h, 2 w).
Tensor masked_conv2d_split_taps(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                int64_t padding, int64_t mode, bool bilinear) {
  check_amx();
  const TapConvolution c = tap_convolution(x, weight, padding, mode, bilinear);
  Tensor out = torch::stable::empty({x.size(0), c.out_channels, 2 * x.size(2), 2 * x.size(3)}, x.scalar_type());
  forward_each<float>(x, weight, bias, out, [&](auto... pointers) { forward(c, pointers...); });
  return out;
}

std::tuple<Tensor, Tensor> masked_conv2d_split_taps_backward(const Tensor& grad_out, const Tensor& x,
                                                             const Tensor& weight, int64_t padding, int64_t mode,
                                                             bool bilinear, bool needs_grad_x, bool needs_grad_weight) {
  check_amx();
  const TapConvolution c = tap_convolution(x, weight, padding, mode, bilinear);
  return backward_each<float>(grad_out, x, weight, needs_grad_x, needs_grad_weight,
                              [&](auto... pointers) { backward(c, pointers...); });
}

}  // namespace sparse_gen

STABLE_TORCH_LIBRARY_IMPL(sparse_gen, CPU, m) {
  m.impl("masked_conv2d_split_taps", TORCH_BOX(&sparse_gen::masked_conv2d_split_taps));
  m.impl("masked_conv2d_split_taps_backward", TORCH_BOX(&sparse_gen::masked_conv2d_split_taps_backward));
}
