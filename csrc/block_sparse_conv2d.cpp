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
    const PaddedPlanes<T> planes(x, stride, padding, mode, 0);
    const int64_t height = planes.out_size(x.size(2), kernel_h), width = planes.out_size(x.size(3), kernel_w);
    const int64_t kept = values.size(1), block_rows = start.size(0) - 1;
    out = torch::stable::empty({x.size(0), out_channels, height, width}, x.scalar_type());
    const std::vector<long long> offset = source_offsets(planes, Columns(columns));
    const int64_t length = (height - 1) * planes.row + width;
    T* source = scratch<T>(0, planes.size() + kBlockTile);
    T* packed = scratch<T>(1, kept);
    for (int64_t e = 0; e < x.size(0); ++e) {
      planes.fill(x.const_data_ptr<T>() + e * planes.image_size(), source);
      std::memset(source + planes.size(), 0, kBlockTile * sizeof(T));
      pack(values.const_data_ptr<T>() + e * kept, order.const_data_ptr<int64_t>(), kept, packed);
      const BlockColumns<T> blocks{numbers(start), offset.data(), packed, block_out, out_channels};
      const BlockOutput<T> rows{out.mutable_data_ptr<T>() + e * out_channels * height * width, height * width,
                                planes.row, width, bias ? bias->const_data_ptr<T>() + e * out_channels : nullptr};
      if (tiles(length) >= 8 || tiles(length) >= block_rows) {
        torch::stable::parallel_for(0, tiles(length), 1, [&](int64_t first, int64_t last) {
          const int64_t end = last * kBlockTile < length ? last * kBlockTile : length;
          SPARSE_GEN_DISPATCH(block_correlate, blocks, source, rows, 0, block_rows, first * kBlockTile, end);
        });
      } else {
        torch::stable::parallel_for(0, block_rows, 1, [&](int64_t first, int64_t last) {
          SPARSE_GEN_DISPATCH(block_correlate, blocks, source, rows, first, last, 0, length);
        });
      }
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
  const Columns column(columns);
  const std::vector<long long> channel(column.in, column.in + column.count);
  for_float_type(x, [&](auto type) {
    using T = decltype(type);
    // Source and gradient have rows of one length, so that one copy of the gradient serves both results.
    const PaddedPlanes<T> planes(x, stride, padding, mode, (kernel_w - 1) / stride);
    const GradientPlanes<T> gradient(planes, grad_out, kernel_h, kernel_w);
    const std::vector<long long> offset = source_offsets(planes, column);
    T* grad = scratch<T>(1, gradient.size() + kBlockDotTile);
    for (int64_t e = 0; e < x.size(0); ++e) {
      gradient.fill(grad_out.const_data_ptr<T>() + e * grad_image, grad);
      std::memset(grad + gradient.size(), 0, kBlockDotTile * sizeof(T));
      if (needs_grad_x) {
        const auto taps = taps_by_phase(planes, gradient, column, numbers(start), block_rows, block_out);
        const int64_t count = tiles((planes.rows - 1) * planes.row + planes.padded_w), phases = planes.phases();
        const int64_t apart = plane_stride<T>(count * kBlockTile);
        T* padded = scratch<T>(2, planes.channels * phases * apart);
        T* packed = scratch<T>(0, kept);
        pack(values.const_data_ptr<T>() + e * kept, order.const_data_ptr<int64_t>(), kept, packed);
        const BlockColumns<T> blocks{numbers(start), offset.data(), packed, block_out, out_channels};
        torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
          T* sums = scratch<T>(3, planes.channels * kBlockTile);
          for (int64_t p = 0; p < phases; ++p) {
            SPARSE_GEN_DISPATCH(block_gather, blocks, taps[p].data(), taps[p].size(), channel.data(), grad,
                                gradient.plane, padded + p * apart, planes.channels, phases * apart,
                                first * kBlockTile, last * kBlockTile, sums);
          }
        });
        planes.fold(padded, apart, grad_x.mutable_data_ptr<T>() + e * planes.image_size());
      }
      if (needs_grad_values) {
        T* source = scratch<T>(0, planes.size() + kBlockDotTile);
        planes.fill(x.const_data_ptr<T>() + e * planes.image_size(), source);
        std::memset(source + planes.size(), 0, kBlockDotTile * sizeof(T));
        const BlockColumns<T> blocks{numbers(start), offset.data(), nullptr, block_out, out_channels};
        T* result = grad_values.mutable_data_ptr<T>() + e * kept;
        torch::stable::parallel_for(0, block_rows, 1, [&](int64_t first, int64_t last) {
          void* sums = scratch<char>(3, (blocks.start[last] - blocks.start[first]) * block_out * 64);
          SPARSE_GEN_DISPATCH(block_dot, blocks, source, grad + gradient.origin(), gradient.plane, gradient.length(),
                              first, last, numbers(order), result, sums);
        });
      }
    }
  });
  return {grad_x, grad_values};
}

}  // namespace sparse_gen

STABLE_TORCH_LIBRARY_IMPL(sparse_gen, CPU, m) {
  m.impl("block_sparse_conv2d", TORCH_BOX(&sparse_gen::block_sparse_conv2d));
  m.impl("block_sparse_conv2d_backward", TORCH_BOX(&sparse_gen::block_sparse_conv2d_backward));
}
