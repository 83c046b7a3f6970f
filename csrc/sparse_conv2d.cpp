#include "cpu/sparse_conv2d.h"

#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "binding.h"
#include "correlate.h"
#include "cpu/padding.h"
#include "scratch.h"

namespace sparse_gen {

namespace {

// The shape of one layer. With stride 2 the padded input is stored as four planes a channel, its even and odd rows
// and columns apart, in which every weight again sees a contiguous shift.
struct Layer {
  int64_t in_channels, height, width, out_channels, kernel_h, kernel_w, stride, padding, mode;

  int64_t out_h() const { return (height + 2 * padding - kernel_h) / stride + 1; }
  int64_t out_w() const { return (width + 2 * padding - kernel_w) / stride + 1; }
  int64_t phases() const { return stride * stride; }

  // The padded input's planes.
  int64_t rows() const { return (height + 2 * padding + stride - 1) / stride; }
  int64_t row() const { return (width + 2 * padding + stride - 1) / stride; }
  int64_t source_offset(int64_t channel, int64_t ky, int64_t kx) const {
    const int64_t half = stride - 1;  // a shift and a mask instead of divisions: there may be 10^5 weights
    const int64_t plane = (channel * stride + (ky & half)) * stride + (kx & half);
    return (plane * rows() + (ky >> half)) * row() + (kx >> half);
  }
  int64_t source_size() const { return in_channels * phases() * rows() * row() + kPlaneSlack; }

  // The output's gradient with zeros around it, from which the input's gradient is gathered.
  int64_t grad_top() const { return (kernel_h - 1) / stride; }
  int64_t grad_left() const { return (kernel_w - 1) / stride; }
  int64_t grad_rows() const { return rows() + grad_top(); }
  int64_t grad_row() const { return row() + grad_left(); }
  int64_t grad_offset(int64_t channel, int64_t ky, int64_t kx) const {
    const int64_t half = stride - 1;
    return (channel * grad_rows() + grad_top() - (ky >> half)) * grad_row() + grad_left() - (kx >> half);
  }
  int64_t grad_size() const { return out_channels * grad_rows() * grad_row() + kPlaneSlack; }

  // Where padded position i of an axis comes from; -1 for a zero.
  int64_t origin(int64_t i, int64_t length) const { return padded_origin(i - padding, length, padding, mode); }
};

// With the stride as a constant and no overlap the compiler makes vectors of these; with neither, single moves.
template <class T>
void take_every_second(T* __restrict to, const T* __restrict from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[2 * i];
}

template <class T>
void add_to_every_second(T* __restrict to, const T* __restrict from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[2 * i] += from[i];
}

template <class T>
void pad_input(const Layer& layer, const T* x, T* source) {
  const int64_t s = layer.stride, rows = layer.rows(), row = layer.row();
  torch::stable::parallel_for(0, layer.in_channels * s, 1, [&](int64_t first, int64_t last) {
    std::vector<int64_t> column(row * s);
    for (int64_t i = 0; i < row * s; ++i) column[i] = layer.origin(i, layer.width);
    for (int64_t channel_phase = first; channel_phase < last; ++channel_phase) {
      const T* image = x + channel_phase / s * layer.height * layer.width;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t y = layer.origin(r * s + channel_phase % s, layer.height);
        for (int64_t phase = 0; phase < s; ++phase) {
          T* to = source + ((channel_phase * s + phase) * rows + r) * row;
          if (y < 0) {
            std::memset(to, 0, row * sizeof(T));
            continue;
          }
          const T* from = image + y * layer.width;
          // Columns that lie inside need no look-up.
          const int64_t begin = (layer.padding - phase + s - 1) / s;
          const int64_t inside = (layer.width + layer.padding - phase + s - 1) / s;
          const int64_t end = inside < row ? inside : row;
          for (int64_t c = 0; c < begin; ++c) to[c] = column[c * s + phase] < 0 ? 0 : from[column[c * s + phase]];
          if (s == 1)
            std::memcpy(to + begin, from, (end - begin) * sizeof(T));
          else
            take_every_second(to + begin, from + 2 * begin + phase - layer.padding, end - begin);
          for (int64_t c = end; c < row; ++c) to[c] = column[c * s + phase] < 0 ? 0 : from[column[c * s + phase]];
        }
      }
    }
  });
  std::memset(source + layer.source_size() - kPlaneSlack, 0, kPlaneSlack * sizeof(T));
}

// The adjoint of pad_input: every padded position's gradient is added where it came from.
template <class T>
void fold_gradient(const Layer& layer, const T* padded, T* grad_x) {
  const int64_t s = layer.stride, rows = layer.rows(), row = layer.row();
  torch::stable::parallel_for(0, layer.in_channels, 1, [&](int64_t first, int64_t last) {
    for (int64_t channel = first; channel < last; ++channel) {
      T* image = grad_x + channel * layer.height * layer.width;
      std::memset(image, 0, layer.height * layer.width * sizeof(T));
      for (int64_t i = 0; i < rows * s; ++i) {
        const int64_t y = layer.origin(i, layer.height);
        if (y < 0) continue;
        T* to = image + y * layer.width;
        for (int64_t phase = 0; phase < s; ++phase) {
          const T* from = padded + (((channel * s + i % s) * s + phase) * rows + i / s) * row;
          const int64_t begin = (layer.padding - phase + s - 1) / s;
          const int64_t inside = (layer.width + layer.padding - phase + s - 1) / s;
          const int64_t end = inside < row ? inside : row;
          if (s == 1)
            for (int64_t c = begin; c < end; ++c) to[c - layer.padding] += from[c];
          else
            add_to_every_second(to + 2 * begin + phase - layer.padding, from + begin, end - begin);
          const auto add_border = [&](int64_t c) {
            const int64_t x = layer.origin(c * s + phase, layer.width);
            if (x >= 0) to[x] += from[c];
          };
          for (int64_t c = 0; c < begin && c < row; ++c) add_border(c);
          for (int64_t c = end > begin ? end : begin; c < row; ++c) add_border(c);
        }
      }
    }
  });
}

// The output's gradient in rows of `row` elements, zeros elsewhere: plane p begins at p * stride + lead.
template <class T>
void spread_gradient(const Layer& layer, const T* grad_out, T* to, int64_t stride, int64_t row, int64_t top, int64_t left) {
  const int64_t height = layer.out_h(), width = layer.out_w();
  torch::stable::parallel_for(0, layer.out_channels, 1, [&](int64_t first, int64_t last) {
    for (int64_t channel = first; channel < last; ++channel) {
      T* plane = to + channel * stride;
      std::memset(plane, 0, stride * sizeof(T));
      for (int64_t y = 0; y < height; ++y)
        std::memcpy(plane + (y + top) * row + left, grad_out + (channel * height + y) * width, width * sizeof(T));
    }
  });
}

Layer layer_of(const Tensor& x, int64_t out_channels, int64_t kernel_h, int64_t kernel_w, int64_t stride,
               int64_t padding, int64_t mode) {
  return {x.size(1), x.size(2), x.size(3), out_channels, kernel_h, kernel_w, stride, padding, mode};
}

// The four rows of the (4, kept) taps: output channel, input channel, row and column of the kernel.
struct Taps {
  const int32_t *out, *in, *ky, *kx;
  int64_t count;

  explicit Taps(const Tensor& taps) : count(taps.size(1)) {
    out = taps.const_data_ptr<int32_t>();
    in = out + count;
    ky = in + count;
    kx = ky + count;
  }
};

std::vector<long long> source_offsets(const Layer& layer, const Taps& taps) {
  std::vector<long long> offset(taps.count);
  for (int64_t k = 0; k < taps.count; ++k) offset[k] = layer.source_offset(taps.in[k], taps.ky[k], taps.kx[k]);
  return offset;
}

}  // namespace

// x (E, in, H, W), values (E, kept), bias (E, out) or none, taps (4, kept), by_output (out + 1,).
Tensor sparse_conv2d(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, const Tensor& taps,
                     const Tensor& by_output, const Tensor& /*by_input*/, const Tensor& /*input_order*/,
                     int64_t out_channels, int64_t kernel_h, int64_t kernel_w, int64_t stride, int64_t padding,
                     int64_t mode) {
  const Layer layer = layer_of(x, out_channels, kernel_h, kernel_w, stride, padding, mode);
  const int64_t height = layer.out_h(), width = layer.out_w(), kept = values.size(1);
  Tensor out = torch::stable::empty({x.size(0), out_channels, height, width}, x.scalar_type());
  const std::vector<long long> offset = source_offsets(layer, Taps(taps));
  const long long* start = reinterpret_cast<const long long*>(by_output.const_data_ptr<int64_t>());
  for_float_type(x, [&](auto type) {
    using T = decltype(type);
    T* source = scratch<T>(0, layer.source_size());
    for (int64_t e = 0; e < x.size(0); ++e) {
      pad_input(layer, x.const_data_ptr<T>() + e * layer.in_channels * layer.height * layer.width, source);
      const SparsePlanes<T> planes{start, offset.data(), values.const_data_ptr<T>() + e * kept};
      const PlaneRows<T> rows{out.mutable_data_ptr<T>() + e * out_channels * height * width, height * width, layer.row(),
                              width, bias ? bias->const_data_ptr<T>() + e * out_channels : nullptr};
      correlate(planes, source, rows, out_channels, (height - 1) * layer.row() + width);
    }
  });
  return out;
}

// by_input (in * stride² + 1,) and input_order (kept,) group the weights by input channel and phase of the tap.
std::tuple<Tensor, Tensor> sparse_conv2d_backward(const Tensor& grad_out, const Tensor& x, const Tensor& values,
                                                  const Tensor& taps, const Tensor& by_output, const Tensor& by_input,
                                                  const Tensor& input_order, int64_t out_channels, int64_t kernel_h,
                                                  int64_t kernel_w, int64_t stride, int64_t padding, int64_t mode,
                                                  bool needs_grad_x, bool needs_grad_values) {
  const Layer layer = layer_of(x, out_channels, kernel_h, kernel_w, stride, padding, mode);
  const int64_t kept = values.size(1), plane = layer.out_h() * layer.out_w();
  const int64_t image = layer.in_channels * layer.height * layer.width;
  Tensor grad_x = needs_grad_x ? torch::stable::empty_like(x) : torch::stable::empty({0}, x.scalar_type());
  Tensor grad_values = needs_grad_values ? torch::stable::empty_like(values) : torch::stable::empty({0}, x.scalar_type());
  const Taps tap(taps);
  const int64_t* order = input_order.const_data_ptr<int64_t>();

  if (needs_grad_x) {
    std::vector<long long> offset(kept);
    for (int64_t k = 0; k < kept; ++k) {
      offset[k] = layer.grad_offset(tap.out[order[k]], tap.ky[order[k]], tap.kx[order[k]]);
    }
    for_float_type(x, [&](auto type) {
      using T = decltype(type);
      const int64_t planes_count = layer.in_channels * layer.phases();
      T* source = scratch<T>(0, layer.grad_size());
      T* padded = scratch<T>(1, planes_count * layer.rows() * layer.row());
      T* ordered = scratch<T>(2, kept);
      for (int64_t e = 0; e < x.size(0); ++e) {
        spread_gradient(layer, grad_out.const_data_ptr<T>() + e * out_channels * plane, source,
                        layer.grad_rows() * layer.grad_row(), layer.grad_row(), layer.grad_top(), layer.grad_left());
        std::memset(source + layer.grad_size() - kPlaneSlack, 0, kPlaneSlack * sizeof(T));
        for (int64_t k = 0; k < kept; ++k) ordered[k] = values.const_data_ptr<T>()[e * kept + order[k]];
        const SparsePlanes<T> planes{reinterpret_cast<const long long*>(by_input.const_data_ptr<int64_t>()),
                                     offset.data(), ordered};
        const PlaneRows<T> rows{padded, layer.rows() * layer.row(), layer.grad_row(), layer.row(), nullptr};
        correlate(planes, source, rows, planes_count, (layer.rows() - 1) * layer.grad_row() + layer.row());
        fold_gradient(layer, padded, grad_x.mutable_data_ptr<T>() + e * image);
      }
    });
  }

  if (needs_grad_values) {
    const std::vector<long long> offset = source_offsets(layer, tap);
    const long long* start = reinterpret_cast<const long long*>(by_output.const_data_ptr<int64_t>());
    const int64_t length = (layer.out_h() - 1) * layer.row() + layer.out_w();
    const int64_t grad_stride = layer.out_h() * layer.row() + kPlaneSlack;
    for_float_type(x, [&](auto type) {
      using T = decltype(type);
      T* source = scratch<T>(0, layer.source_size());
      T* grad = scratch<T>(1, out_channels * grad_stride);
      for (int64_t e = 0; e < x.size(0); ++e) {
        pad_input(layer, x.const_data_ptr<T>() + e * image, source);
        spread_gradient(layer, grad_out.const_data_ptr<T>() + e * out_channels * plane, grad, grad_stride, layer.row(), 0, 0);
        const SparsePlanes<T> planes{start, offset.data(), nullptr};
        T* result = grad_values.mutable_data_ptr<T>() + e * kept;
        torch::stable::parallel_for(0, out_channels, 1, [&](int64_t first, int64_t last) {
          void* sums = scratch<char>(3, (start[last] - start[first]) * 64);
          SPARSE_GEN_DISPATCH(sparse_dot, planes, source, grad, grad_stride, length, first, last, result, sums);
        });
      }
    });
  }
  return {grad_x, grad_values};
}

}  // namespace sparse_gen

STABLE_TORCH_LIBRARY_IMPL(sparse_gen, CPU, m) {
  m.impl("sparse_conv2d", TORCH_BOX(&sparse_gen::sparse_conv2d));
  m.impl("sparse_conv2d_backward", TORCH_BOX(&sparse_gen::sparse_conv2d_backward));
}
