#include "cpu/block_sparse_conv2d.h"

#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "binding.h"
#include "padded_planes.h"
#include "scratch.h"

namespace sparse_gen {

namespace {

// What of the pattern is one input channel at one tap, in the order of the packed weights.
struct Columns {
  const int32_t *in, *ky, *kx;
  int64_t count;

  explicit Columns(const Tensor& columns) : count(columns.size(1)) {
    in = columns.const_data_ptr<int32_t>();
    ky = in + count;
    kx = ky + count;
  }
};

const long long* numbers(const Tensor& tensor) { return reinterpret_cast<const long long*>(tensor.const_data_ptr<int64_t>()); }

template <class T>
std::vector<long long> source_offsets(const PaddedPlanes<T>& planes, const Columns& columns) {
  std::vector<long long> offset(columns.count);
  for (int64_t k = 0; k < columns.count; ++k) offset[k] = planes.offset(columns.in[k], columns.ky[k], columns.kx[k]);
  return offset;
}

template <class T>
void pack(const T* values, const int64_t* order, int64_t kept, T* packed) {
  for (int64_t j = 0; j < kept; ++j) packed[j] = values[order[j]];
}

// Partial sums of the weights' gradient; each belongs to one thread at a time.
constexpr int64_t kMostParts = 32;

int64_t tiles(int64_t length) { return (length + kBlockTile - 1) / kBlockTile; }

}  // namespace

// x (E, in, H, W), values (E, kept), bias (E, out) or none; order (kept,) from packed to given values, columns (3, n),
// start (block rows + 1,).
Tensor block_sparse_conv2d(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
                           const Tensor& /*index*/, const Tensor& order, const Tensor& columns, const Tensor& start,
                           int64_t block_out, int64_t out_channels, int64_t kernel_h, int64_t kernel_w, int64_t stride,
                           int64_t padding, int64_t mode) {
  Tensor out;
  for_float_type(x, [&](auto type) {
    using T = decltype(type);
    PaddedPlanes<T> planes(x, stride, padding, mode, 0);
    const int64_t height = planes.out_size(x.size(2), kernel_h), width = planes.out_size(x.size(3), kernel_w);
    const int64_t kept = values.size(1), block_rows = start.size(0) - 1, below = (kernel_h - 1) / stride;
    out = torch::stable::empty({x.size(0), out_channels, height, width}, x.scalar_type());
    const Bands bands(height, planes.channels * planes.phases() * planes.row * sizeof(T), 1 + 4 * below);
    planes.hold(bands.highest() + below);
    const std::vector<long long> offset = source_offsets(planes, Columns(columns));
    T* packed = scratch<T>(1, kept);
    for (int64_t e = 0; e < x.size(0); ++e) {
      pack(values.const_data_ptr<T>() + e * kept, order.const_data_ptr<int64_t>(), kept, packed);
      const BlockColumns<T> blocks{numbers(start), offset.data(), packed, block_out, out_channels};
      // Bands are dealt to threads; within a band a loop is parallel only where there is no other band.
      torch::stable::parallel_for(0, bands.count, 1, [&](int64_t first_band, int64_t last_band) {
        T* source = scratch<T>(0, planes.size() + kBlockTile);
        for (int64_t band = first_band; band < last_band; ++band) {
          const int64_t y = bands.begin(band), end = bands.begin(band + 1), length = (end - y - 1) * planes.row + width;
          planes.fill(x.const_data_ptr<T>() + e * planes.image_size(), y, end + below, source);
          const BlockOutput<T> rows{out.mutable_data_ptr<T>() + (e * out_channels * height + y) * width, height * width,
                                    planes.row, width, bias ? bias->const_data_ptr<T>() + e * out_channels : nullptr};
          if (tiles(length) >= 8 || tiles(length) >= block_rows) {
            torch::stable::parallel_for(0, tiles(length), 1, [&](int64_t first, int64_t last) {
              const int64_t tile_end = last * kBlockTile < length ? last * kBlockTile : length;
              SPARSE_GEN_DISPATCH(block_correlate, blocks, source, rows, 0, block_rows, first * kBlockTile, tile_end);
            });
          } else {
            torch::stable::parallel_for(0, block_rows, 1, [&](int64_t first, int64_t last) {
              SPARSE_GEN_DISPATCH(block_correlate, blocks, source, rows, first, last, 0, length);
            });
          }
        }
      });
    }
  });
  return out;
}

namespace {

// The columns of block row b stand tap by tap, those of one phase of the stride together: the taps of each phase.
template <class T>
std::vector<std::vector<BlockTap>> taps_by_phase(const PaddedPlanes<T>& planes, const GradientPlanes<T>& gradient,
                                                 const Columns& columns, const long long* start, int64_t block_rows,
                                                 int64_t block_out) {
  std::vector<std::vector<BlockTap>> taps(planes.phases());
  for (int64_t b = 0; b < block_rows; ++b) {
    for (int64_t k = start[b]; k < start[b + 1];) {
      const int64_t ky = columns.ky[k], kx = columns.kx[k];
      int64_t last = k + 1;
      while (last < start[b + 1] && columns.ky[last] == ky && columns.kx[last] == kx) ++last;
      taps[planes.phase(ky, kx)].push_back({b, k, last, gradient.offset(b * block_out, ky, kx)});
      k = last;
    }
  }
  return taps;
}

// What both gradients of one experiment need.
template <class T>
struct Backward {
  const PaddedPlanes<T>& planes;
  const GradientPlanes<T>& gradient;
  const Bands& bands;
  const std::vector<std::vector<BlockTap>>& taps;
  const long long* channel;
  BlockColumns<T> blocks;
  const T* x;

  // One band of the input's gradient, from the gradient that `grad` holds.
  void input_band(int64_t band, const T* grad, T* grad_x) const {
    const int64_t first = bands.begin(band), last = bands.begin(band + 1), phases = planes.phases();
    const int64_t count = tiles((last - first) * planes.row), apart = plane_stride<T>(count * kBlockTile);
    T* padded = scratch<T>(2, planes.channels * phases * apart);
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      T* sums = scratch<T>(3, planes.channels * kBlockTile);
      for (int64_t p = 0; p < phases; ++p) {
        SPARSE_GEN_DISPATCH(block_gather, blocks, taps[p].data(), taps[p].size(), channel, grad, gradient.plane,
                            padded + p * apart, planes.channels, phases * apart, begin * kBlockTile, end * kBlockTile,
                            sums);
      }
    });
    planes.fold(padded, apart, first, last, grad_x);
  }

  // Adds what one band of the gradient gives to the gradient of the packed weights.
  void weight_band(int64_t band, const T* grad, T* sums) const {
    const int64_t first = bands.begin(band), last = bands.begin(band + 1);
    const int64_t end = last < gradient.height ? last : gradient.height;
    if (first >= end) return;
    T* source = scratch<T>(2, planes.size() + kBlockDotTile);
    planes.fill(x, first, end + gradient.top, source);
    const int64_t length = (end - first - 1) * planes.row + gradient.width;
    const int64_t block_rows = (blocks.channels + blocks.height - 1) / blocks.height;
    torch::stable::parallel_for(0, block_rows, 1, [&](int64_t begin, int64_t behind) {
      int64_t most = 0;
      for (int64_t b = begin; b < behind; ++b) {
        const int64_t count = blocks.start[b + 1] - blocks.start[b];
        most = count > most ? count : most;
      }
      void* held = scratch<char>(3, most * blocks.height * 64);
      SPARSE_GEN_DISPATCH(block_dot, blocks, source, grad + gradient.origin(), gradient.plane, length, begin, behind,
                          sums, held);
    });
  }
};

// result[order[j]] is the sum of the parts' j, in the order of the parts.
template <class T>
void add_parts(const T* parts, int64_t count, int64_t kept, const int64_t* order, T* result) {
  torch::stable::parallel_for(0, kept, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      T sum = 0;
      for (int64_t part = 0; part < count; ++part) sum += parts[part * kept + j];
      result[order[j]] = sum;
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> block_sparse_conv2d_backward(const Tensor& grad_out, const Tensor& x, const Tensor& values,
                                                        const Tensor& /*index*/, const Tensor& order,
                                                        const Tensor& columns, const Tensor& start, int64_t block_out,
                                                        int64_t out_channels, int64_t kernel_h, int64_t kernel_w,
                                                        int64_t stride, int64_t padding, int64_t mode,
                                                        bool needs_grad_x, bool needs_grad_values) {
  Tensor grad_x = needs_grad_x ? torch::stable::empty_like(x) : torch::stable::empty({0}, x.scalar_type());
  Tensor grad_values = needs_grad_values ? torch::stable::empty_like(values) : torch::stable::empty({0}, x.scalar_type());
  const int64_t kept = values.size(1), block_rows = start.size(0) - 1, grad_image = grad_out.numel() / x.size(0);
  const int64_t* from = order.const_data_ptr<int64_t>();
  const Columns column(columns);
  const std::vector<long long> channel(column.in, column.in + column.count);
  for_float_type(x, [&](auto type) {
    using T = decltype(type);
    // Input and gradient have rows of one length, so that one copy of the gradient serves both results.
    PaddedPlanes<T> planes(x, stride, padding, mode, (kernel_w - 1) / stride);
    GradientPlanes<T> gradient(planes, grad_out, kernel_h, kernel_w);
    // A band has the padding's rows beside those that they repeat.
    const Bands bands(planes.rows, (planes.channels * planes.phases() + out_channels) * planes.row * sizeof(T),
                      2 * padding + 1 + 4 * gradient.top);
    planes.hold(bands.highest() + gradient.top);
    gradient.hold(bands.highest());
    const std::vector<long long> offset = source_offsets(planes, column);
    const auto taps = taps_by_phase(planes, gradient, column, numbers(start), block_rows, block_out);
    const int64_t parts = bands.count < kMostParts ? bands.count : kMostParts;
    T* packed = scratch<T>(0, kept + parts * kept);
    T* sums = packed + kept;
    for (int64_t e = 0; e < x.size(0); ++e) {
      pack(values.const_data_ptr<T>() + e * kept, from, kept, packed);
      if (needs_grad_values) std::memset(sums, 0, parts * kept * sizeof(T));
      const BlockColumns<T> blocks{numbers(start), offset.data(), packed, block_out, out_channels};
      const Backward<T> backward{planes, gradient, bands, taps, channel.data(), blocks,
                                 x.const_data_ptr<T>() + e * planes.image_size()};
      torch::stable::parallel_for(0, parts, 1, [&](int64_t first_part, int64_t last_part) {
        T* grad = scratch<T>(1, gradient.size() + gradient.left + kBlockTile);
        for (int64_t part = first_part; part < last_part; ++part) {
          for (int64_t band = bands.count * part / parts; band < bands.count * (part + 1) / parts; ++band) {
            gradient.fill(grad_out.const_data_ptr<T>() + e * grad_image, bands.begin(band), bands.begin(band + 1), grad);
            if (needs_grad_x)
              backward.input_band(band, grad, grad_x.mutable_data_ptr<T>() + e * planes.image_size());
            if (needs_grad_values) backward.weight_band(band, grad, sums + part * kept);
          }
        }
      });
      if (needs_grad_values)
        add_parts(sums, parts, kept, from, grad_values.mutable_data_ptr<T>() + e * kept);
    }
  });
  return {grad_x, grad_values};
}

}  // namespace sparse_gen

STABLE_TORCH_LIBRARY_IMPL(sparse_gen, CPU, m) {
  m.impl("block_sparse_conv2d", TORCH_BOX(&sparse_gen::block_sparse_conv2d));
  m.impl("block_sparse_conv2d_backward", TORCH_BOX(&sparse_gen::block_sparse_conv2d_backward));
}
