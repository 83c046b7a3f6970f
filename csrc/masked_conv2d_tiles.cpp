#include <algorithm>

#include "cpu/sum_transposed.h"
#include "masked_conv2d.h"
#include "scratch.h"

namespace sparse_gen {

namespace {

// Elements of a band of the source, or of the output's gradient, that stay in a core's second cache.
constexpr int64_t kBandElements = 163840, kPixelElements = 262144;
// Output channels that are worked on at a time where there are few bands, a multiple of the product's tile.
constexpr int64_t kChannelGroup = 24;

// How rows of an image are dealt out: in bands that fit the cache, and in groups of channels if there are few bands.
struct Deal {
  int64_t rows, bands, group, groups;

  Deal(int64_t height, int64_t elements_a_row, int64_t reach, int64_t channels) {
    rows = std::clamp<int64_t>(kBandElements / elements_a_row - reach, 4, height);
    bands = (height + rows - 1) / rows;
    rows = (height + bands - 1) / bands;
    group = bands >= 8 ? channels : kChannelGroup;
    groups = (channels + group - 1) / group;
  }
};

template <class T>
void forward(const TileConvolution& c, const T* x, const T* weight, const T* bias, T* out) {
  const Deal deal(c.out_h(), c.in_channels * c.phases() * c.phase_w(), c.reach_h(), c.out_channels);
  const int64_t stride = tile_plane(c.phases() * (deal.rows + c.reach_h()) * c.phase_w());
  const int64_t room_stride = tile_plane(deal.rows * c.phase_w());
  torch::stable::parallel_for(0, deal.bands * deal.groups, 1, [&](int64_t begin, int64_t end) {
    T* source = scratch<T>(1, c.in_channels * stride);
    T* room = scratch<T>(2, deal.group * room_stride + tile_plane(c.source_w()));
    int64_t prepared = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t band = task / deal.groups, first = band * deal.rows;
      const int64_t last = std::min<int64_t>(first + deal.rows, c.out_h());
      const int64_t from = task % deal.groups * deal.group, to = std::min<int64_t>(from + deal.group, c.out_channels);
      if (first >= last) continue;
      if (band != prepared)
        SPARSE_GEN_DISPATCH(tile_source, c, x, first, last, source, stride, room + deal.group * room_stride);
      prepared = band;
      SPARSE_GEN_DISPATCH(tile_forward, c, source, stride, weight, bias, from, to, first, last, room, room_stride, out);
    }
  });
}

template <class T>
void backward_x(const TileConvolution& c, const T* grad_out, const T* weight, T* grad_x) {
  const Deal deal(c.phase_h(), c.out_channels * c.phase_w(), c.reach_h(), c.in_channels);
  const int64_t stride = tile_plane((deal.rows + c.reach_h()) * c.phase_w() + c.reach_w());
  const int64_t room_stride = tile_plane(deal.rows * c.phase_w());
  const int64_t result_stride = tile_plane(c.phases() * c.phase_h() * c.phase_w());
  T* result = scratch<T>(0, c.in_channels * result_stride);
  torch::stable::parallel_for(0, deal.bands * deal.groups, 1, [&](int64_t begin, int64_t end) {
    T* gradient = scratch<T>(1, c.out_channels * stride);
    T* room = scratch<T>(2, deal.group * room_stride);
    int64_t prepared = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t band = task / deal.groups, first = band * deal.rows;
      const int64_t last = std::min<int64_t>(first + deal.rows, c.phase_h());
      const int64_t from = task % deal.groups * deal.group, to = std::min<int64_t>(from + deal.group, c.in_channels);
      if (first >= last) continue;
      if (band != prepared) SPARSE_GEN_DISPATCH(tile_gradient, c, grad_out, first, last, gradient, stride);
      prepared = band;
      SPARSE_GEN_DISPATCH(tile_grad_source, c, gradient, stride, weight, from, to, first, last, room, room_stride,
                          result, result_stride);
    }
  });
  torch::stable::parallel_for(0, c.in_channels, 1, [&](int64_t from, int64_t to) {
    T* rows = scratch<T>(3, 2 * tile_plane(c.width + 2 * c.padding));
    for (int64_t i = from; i < to; ++i)
      SPARSE_GEN_DISPATCH(tile_fold, c, result + i * result_stride, grad_x + i * c.height * c.width, rows);
  });
}

// Adds the gradient of some output channels, from output rows begin .. end - 1, up in `grad`.
template <class T>
void add_grad_weight(const TileConvolution& c, const T* grad_out, const T* x, int64_t channel_stride, int64_t from,
                     int64_t to, int64_t begin, int64_t end, T* grad, int64_t stride) {
  const int64_t row = c.source_w() * channel_stride;
  const int64_t rows = std::max<int64_t>((kPixelElements / row - c.kernel_h) / c.stride + 1, 2);
  T* pixels = scratch<T>(1, ((rows - 1) * c.stride + c.kernel_h) * row + kTileSlack);
  T* planar = scratch<T>(2, c.in_channels * tile_plane(c.source_w()));
  for (int64_t first = begin; first < end; first += rows) {
    const int64_t last = std::min(first + rows, end);
    SPARSE_GEN_DISPATCH(tile_pixels, c, x, first * c.stride, (last - 1) * c.stride + c.kernel_h, pixels, channel_stride,
                        planar);
    SPARSE_GEN_DISPATCH(tile_grad_weight, c, grad_out, pixels, channel_stride, from, to, first, last, first != begin,
                        grad, stride);
  }
}

template <class T>
void backward_weight(const TileConvolution& c, const T* grad_out, const T* x, T* grad_weight) {
  const int64_t channel_stride = (c.in_channels + 15) / 16 * 16, stride = c.kernel_w * channel_stride;
  const int64_t part = c.out_channels * c.kernel_h * stride;
  // A fixed number of bands, so that the sum over them does not depend on the number of threads. Where one part is
  // large, the output channels are dealt out instead.
  const int64_t bands = std::min<int64_t>(part > 131072 ? 1 : std::clamp<int64_t>(524288 / part, 4, 16), c.out_h());
  const int64_t group = bands > 1 ? c.out_channels : kChannelGroup;
  const int64_t groups = (c.out_channels + group - 1) / group;
  T* parts = scratch<T>(0, bands * part + kTileSlack);
  torch::stable::parallel_for(0, bands * groups, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t band = task / groups, from = task % groups * group;
      add_grad_weight(c, grad_out, x, channel_stride, from, std::min<int64_t>(from + group, c.out_channels),
                      band * c.out_h() / bands, (band + 1) * c.out_h() / bands, parts + band * part, stride);
    }
  });
  torch::stable::parallel_for(0, c.out_channels, 1, [&](int64_t first, int64_t last) {
    T* room = scratch<T>(3, transposed_elements(c.taps(), channel_stride));
    for (int64_t o = first; o < last; ++o)
      SPARSE_GEN_DISPATCH(sum_transposed, parts + o * c.kernel_h * stride, bands, part, c.taps(), c.in_channels,
                          channel_stride, grad_weight + o * c.in_channels * c.taps(), room);
  });
}

}  // namespace

// x (E, in, H, W), weight (E, out, in, kh, kw), bias (E, out).
Tensor masked_conv2d_tiles(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t stride,
                           int64_t padding, int64_t mode, bool pool) {
  const TileConvolution c = tile_convolution(x, weight, stride, padding, mode, pool);
  Tensor out = torch::stable::empty({x.size(0), c.out_channels, c.out_h(), c.out_w()}, x.scalar_type());
  for_float_type(x, [&](auto type) {
    using T = decltype(type);
    forward_each<T>(x, weight, bias, out, [&](auto... pointers) { forward<T>(c, pointers...); });
  });
  return out;
}

std::tuple<Tensor, Tensor> masked_conv2d_tiles_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                                        int64_t stride, int64_t padding, int64_t mode, bool pool,
                                                        bool needs_grad_x, bool needs_grad_weight) {
  const TileConvolution c = tile_convolution(x, weight, stride, padding, mode, pool);
  return for_float_type(x, [&](auto type) {
    using T = decltype(type);
    return backward_each<T>(grad_out, x, weight, needs_grad_x, needs_grad_weight,
                            [&](const T* gradient, const T* image, const T* weights, T* grad_x, T* grad_weight) {
                              if (grad_x) backward_x(c, gradient, weights, grad_x);
                              if (grad_weight) backward_weight(c, gradient, image, grad_weight);
                            });
  });
}

}  // namespace sparse_gen

STABLE_TORCH_LIBRARY_IMPL(sparse_gen, CPU, m) {
  m.impl("masked_conv2d_tiles", TORCH_BOX(&sparse_gen::masked_conv2d_tiles));
  m.impl("masked_conv2d_tiles_backward", TORCH_BOX(&sparse_gen::masked_conv2d_tiles_backward));
}
