#include "cpu/sparse_conv2d.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>

#include "aligned_conv2d.h"
#include "binding.h"
#include "cpu/padding.h"
#include "cpu/sparse_rows.h"
#include "load.h"
#include "scratch.h"
#include "sparse_cut.h"
#include "sparse_table.h"

namespace sparse_gen {

namespace {

// Slots of scratch memory: the first are filled before the threads start, the others are each thread's own.
enum Slot { kTable, kValues, kShared, kPartial, kSource, kResult, kGradient, kSums };

// One experiment's image: rows may lie apart.
template <class T>
struct Image {
  const T* data;
  int64_t plane, pitch;
  const Load<T>* load;  // of each channel, or null
};

template <class T>
class Convolution {
 public:
  // `x_plane` and `x_pitch` say how far apart the image's planes and rows lie.
  Convolution(const ConvShape& shape, const Tensor& taps, int64_t x_plane, int64_t x_pitch, bool loads)
      : s_(shape), kept_(taps.size(1)) {
    out_ = taps.const_data_ptr<int32_t>();
    in_ = out_ + kept_;
    ky_ = in_ + kept_;
    kx_ = ky_ + kept_;
    over_x_ = cut<T>({s_.out_h(), s_.out_w(), s_.shifts_h() - 1, s_.shifts_w() - 1, s_.kernel_w, s_.stride, s_.stride,
                      s_.in_channels, kept_, s_.out_channels});
    over_grad_ = cut<T>({s_.rows(), s_.columns(), s_.shifts_h() - 1, s_.shifts_w() - 1, s_.shifts_w(), 1, 1,
                         s_.out_channels, kept_, s_.in_channels * s_.phases()});
    // No tile may end behind the image, and the table's offsets are 32 bits long.
    in_place_ = !loads && !over_x_.shifted && over_x_.strips > 1 && s_.stride == 1 && s_.padding == 0 &&
                s_.out_w() % kInLine<T> == 0 && x_pitch % kInLine<T> == 0 && x_pitch == over_x_.pitch &&
                s_.in_channels * x_plane < (int64_t{1} << 31);
    if (in_place_) over_x_.channel_stride = x_plane;
  }

  const Cut& over_x() const { return over_x_; }
  const Cut& over_grad() const { return over_grad_; }

  void fill_to_outputs(SparseTable<T>& table, const T* values) const {
    const int64_t half = s_.stride - 1, rows = over_x_.strip_rows + s_.shifts_h() - 1;
    table.fill(
        values, [&](int64_t k) { return in_[k] / over_x_.block; },
        [&](int64_t k) {
          const int64_t copy = over_x_.shifted ? kx_[k] : kx_[k] & half, shift = over_x_.shifted ? 0 : kx_[k] >> half;
          const int64_t row = (copy * s_.stride + (ky_[k] & half)) * rows + (ky_[k] >> half);
          return in_[k] % over_x_.block * over_x_.channel_stride + row * over_x_.pitch + shift;
        });
  }

  void fill_to_inputs(SparseTable<T>& table, const T* values) const {
    const int64_t half = s_.stride - 1, above = s_.shifts_h() - 1, rows = over_grad_.strip_rows + above;
    table.fill(
        values, [&](int64_t k) { return out_[k] / over_grad_.block; },
        [&](int64_t k) {
          const int64_t copy = over_grad_.shifted ? kx_[k] >> half : 0;
          const int64_t shift = over_grad_.shifted ? 0 : s_.shifts_w() - 1 - (kx_[k] >> half);
          const int64_t row = copy * rows + above - (ky_[k] >> half);
          return out_[k] % over_grad_.block * over_grad_.channel_stride + row * over_grad_.pitch + shift;
        });
  }

  void forward(const SparseTable<T>& table, const Image<T>& x, const T* bias, T* out) const {
    const Cut& c = over_x_;
    const SparseRows<T> rows = table.rows();
    const int64_t plane = s_.out_h() * s_.out_w();
    const auto store = [&](int64_t strip, int64_t first, int64_t last, const T* result) {
      const int64_t y = strip * c.strip_rows, count = rows_in(strip);
      SPARSE_GEN_DISPATCH(copy_rows, result, c.result_stride, c.pitch, out + first * plane + y * s_.out_w(), plane,
                          s_.out_w(), last - first, count, s_.out_w(), bias ? bias + first : nullptr);
    };
    const auto multiply = [&](int64_t block, int64_t strip, int64_t first, int64_t last, const T* source, T* result) {
      const int64_t row = block * s_.out_channels;
      SPARSE_GEN_DISPATCH(multiply_rows, rows, row + first, row + last, source, result, c.result_stride,
                          length_of(strip), c.tiles, block > 0);
    };
    if (c.strips == 1) {
      const T* source = copied(x);
      torch::stable::parallel_for(0, s_.out_channels, 1, [&](int64_t first, int64_t last) {
        T* result = scratch<T>(kResult, (last - first) * c.result_stride);
        for (int64_t b = 0; b < c.blocks; ++b) multiply(b, 0, first, last, source + b * c.block * c.channel_stride, result);
        store(0, first, last, result);
      });
      return;
    }
    torch::stable::parallel_for(0, c.strips, 1, [&](int64_t first, int64_t last) {
      T* result = scratch<T>(kResult, s_.out_channels * c.result_stride);
      for (int64_t strip = first; strip < last; ++strip) {
        for (int64_t b = 0; b < c.blocks; ++b)
          multiply(b, strip, 0, s_.out_channels, block_of(x, b, strip), result);
        store(strip, 0, s_.out_channels, result);
      }
    });
  }

  void backward_values(const SparseTable<T>& table, const Image<T>& x, const T* grad_out, T* grad_values) const {
    const Cut& c = over_x_;
    const SparseRows<T> rows = table.rows();
    const int64_t plane = s_.out_h() * s_.out_w();
    // The output's gradient of a strip in the source's pitch, zeros where there is none.
    const auto load = [&](int64_t strip, int64_t first, int64_t last, T* to) {
      const int64_t y = strip * c.strip_rows, count = rows_in(strip), end = count * c.pitch;
      SPARSE_GEN_DISPATCH(copy_rows, grad_out + first * plane + y * s_.out_w(), plane, s_.out_w(), to, c.result_stride,
                          c.pitch, last - first, count, s_.out_w(), nullptr);
      for (int64_t o = first; end % kInLine<T> && o < last; ++o)
        std::memset(to + (o - first) * c.result_stride + end, 0, (whole_lines<T>(end) - end) * sizeof(T));
    };
    const auto dot = [&](int64_t block, int64_t strip, int64_t first, int64_t last, const T* source, const T* gradient,
                         T* sums, int64_t sums_begin) {
      const int64_t row = block * s_.out_channels;
      T* own = sums + (table.begin(block, first) - sums_begin) * kDotLanes;
      SPARSE_GEN_DISPATCH(dot_rows, rows, row + first, row + last, source, gradient, c.result_stride, length_of(strip),
                          c.tiles, own);
    };
    if (c.strips == 1) {
      const T* source = copied(x);
      T* result = scratch<T>(kPartial, table.slots());
      torch::stable::parallel_for(0, s_.out_channels, 1, [&](int64_t first, int64_t last) {
        const int64_t begin = table.first_slot(first), count = table.first_slot(last) - begin;
        T* sums = scratch<T>(kSums, count * kDotLanes);
        std::memset(sums, 0, count * kDotLanes * sizeof(T));
        T* gradient = scratch<T>(kGradient, (last - first) * c.result_stride);
        load(0, first, last, gradient);
        for (int64_t b = 0; b < c.blocks; ++b)
          dot(b, 0, first, last, source + b * c.block * c.channel_stride, gradient, sums, begin);
        SPARSE_GEN_DISPATCH(finish_dots, sums, count, result + begin);
      });
      table.collect(result, 1, grad_values);
      return;
    }
    // Parts of the image whose number depends on its size alone, so that the sums' bits do not depend on the threads.
    const int64_t parts = std::min<int64_t>(c.strips, std::clamp<int64_t>(plane / 1024, 2, 16));
    T* partial = scratch<T>(kPartial, parts * table.slots());
    torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      T* sums = scratch<T>(kSums, table.slots() * kDotLanes);
      T* gradient = scratch<T>(kGradient, s_.out_channels * c.result_stride);
      for (int64_t part = first; part < last; ++part) {
        std::memset(sums, 0, table.slots() * kDotLanes * sizeof(T));
        for (int64_t strip = part * c.strips / parts; strip < (part + 1) * c.strips / parts; ++strip) {
          load(strip, 0, s_.out_channels, gradient);
          for (int64_t b = 0; b < c.blocks; ++b)
            dot(b, strip, 0, s_.out_channels, block_of(x, b, strip), gradient, sums, 0);
        }
        SPARSE_GEN_DISPATCH(finish_dots, sums, table.slots(), partial + part * table.slots());
      }
    });
    table.collect(partial, parts, grad_values);
  }

  void backward_x(const SparseTable<T>& table, const T* grad_out, T* grad_x) const {
    const Cut& c = over_grad_;
    const SparseRows<T> rows = table.rows();
    const int64_t phases = s_.phases(), groups = s_.in_channels * phases, image = s_.height * s_.width;
    const int64_t padded_rows = s_.height + 2 * s_.padding, lead = c.shifted ? 0 : s_.shifts_w() - 1;
    const auto multiply = [&](int64_t block, int64_t first, int64_t last, const T* source, T* result) {
      const int64_t row = block * groups;
      SPARSE_GEN_DISPATCH(multiply_rows, rows, row + first * phases, row + last * phases, source, result, c.result_stride,
                          c.strip_rows * c.pitch, c.tiles, block > 0);
    };
    const auto fold = [&](const T* result, int64_t strip_row, int64_t channels, int64_t begin, int64_t end, T* to) {
      SPARSE_GEN_DISPATCH(fold_rows, s_, result, c.result_stride, c.pitch, strip_row, channels, begin, end, to);
    };
    if (c.strips == 1) {
      T* source = scratch<T>(kShared, c.blocks * c.block * c.channel_stride + slack(c));
      const int64_t plane = s_.out_h() * s_.out_w();
      torch::stable::parallel_for(0, s_.out_channels, 1, [&](int64_t first, int64_t last) {
        SPARSE_GEN_DISPATCH(shift_gradient, s_, grad_out + first * plane, last - first, 0, c.strip_rows, c.copies,
                            lead, c.pitch, source + first * c.channel_stride);
      });
      torch::stable::parallel_for(0, s_.in_channels, 1, [&](int64_t first, int64_t last) {
        T* result = scratch<T>(kResult, (last - first) * phases * c.result_stride);
        for (int64_t b = 0; b < c.blocks; ++b) multiply(b, first, last, source + b * c.block * c.channel_stride, result);
        std::memset(grad_x + first * image, 0, (last - first) * image * sizeof(T));
        fold(result, 0, last - first, 0, padded_rows, grad_x + first * image);
      });
      return;
    }
    torch::stable::parallel_for(0, c.strips, 1, [&](int64_t first, int64_t last) {
      T* result = scratch<T>(kResult, 2 * groups * c.result_stride);
      T* border = result + groups * c.result_stride;
      T* source = scratch<T>(kSource, c.block * c.channel_stride + slack(c));
      const auto compute = [&](int64_t row, T* to) {
        for (int64_t b = 0; b < c.blocks; ++b) {
          const int64_t channel = b * c.block, count = std::min<int64_t>(s_.out_channels - channel, c.block);
          SPARSE_GEN_DISPATCH(shift_gradient, s_, grad_out + channel * s_.out_h() * s_.out_w(), count, row,
                              row + c.strip_rows, c.copies, lead, c.pitch, source);
          multiply(b, 0, s_.in_channels, source, to);
        }
      };
      for (int64_t strip = first; strip < last; ++strip) {
        const int64_t row = strip * c.strip_rows, begin = row * s_.stride;
        const int64_t end = std::min<int64_t>(padded_rows, (row + c.strip_rows) * s_.stride);
        // The image rows that this strip alone writes, and the padded rows of others that repeat them.
        const int64_t own = std::clamp<int64_t>(begin - s_.padding, 0, s_.height);
        const int64_t own_end = std::clamp<int64_t>(end - s_.padding, 0, s_.height);
        if (own == own_end) continue;
        compute(row, result);
        for (int64_t i = 0; i < s_.in_channels; ++i)
          std::memset(grad_x + i * image + own * s_.width, 0, (own_end - own) * s_.width * sizeof(T));
        fold(result, row, s_.in_channels, own + s_.padding, own_end + s_.padding, grad_x);
        int64_t in_border = -1;
        for (int64_t y = 0; y < padded_rows; y = y + 1 == s_.padding ? s_.height + s_.padding : y + 1) {
          if (y == s_.padding && y < s_.height + s_.padding) y = s_.height + s_.padding;
          if (y >= padded_rows) break;
          const int64_t from = padded_origin(y - s_.padding, s_.height, s_.padding, s_.mode);
          if (from < own || from >= own_end) continue;
          if (y >= begin && y < end) {
            fold(result, row, s_.in_channels, y, y + 1, grad_x);
            continue;
          }
          const int64_t strip_row = y / s_.stride / c.strip_rows * c.strip_rows;
          if (strip_row != in_border) compute(strip_row, border);
          in_border = strip_row;
          fold(border, strip_row, s_.in_channels, y, y + 1, grad_x);
        }
      }
    });
  }

 private:
  // How far behind the copies the last tile of a single one may read.
  int64_t slack(const Cut& c) const { return c.shifted ? 0 : kInLine<T> + s_.shifts_w(); }

  int64_t rows_in(int64_t strip) const {
    return std::min<int64_t>(s_.out_h() - strip * over_x_.strip_rows, over_x_.strip_rows);
  }
  int64_t length_of(int64_t strip) const { return (rows_in(strip) - 1) * over_x_.pitch + s_.out_w(); }

  // Copies of channels first .. last - 1 for one strip; zeros behind them.
  void copy(const Image<T>& x, int64_t first, int64_t last, int64_t strip, T* to, T* room) const {
    const Cut& c = over_x_;
    const int64_t row = strip * c.strip_rows;
    SPARSE_GEN_DISPATCH(shift_input, s_, x.data + first * x.plane, x.plane, x.pitch, x.load ? x.load + first : nullptr,
                        last - first, row, row + c.strip_rows, c.copies, c.width, c.pitch, to, room);
  }

  // The copies of all channels of an image that is one strip.
  const T* copied(const Image<T>& x) const {
    const int64_t size = s_.in_channels * over_x_.channel_stride;
    T* source = scratch<T>(kShared, size + slack(over_x_));
    std::memset(source + size, 0, slack(over_x_) * sizeof(T));
    torch::stable::parallel_for(0, s_.in_channels, 1, [&](int64_t first, int64_t last) {
      copy(x, first, last, 0, source + first * over_x_.channel_stride, scratch<T>(kSource, s_.width));
    });
    return source;
  }

  // What one strip reads of a block of channels.
  const T* block_of(const Image<T>& x, int64_t block, int64_t strip) const {
    const Cut& c = over_x_;
    const int64_t channel = block * c.block, count = std::min<int64_t>(s_.in_channels - channel, c.block);
    if (in_place_) return x.data + channel * x.plane + strip * c.strip_rows * c.pitch;
    T* to = scratch<T>(kSource, c.block * c.channel_stride + slack(c) + s_.width);
    copy(x, channel, channel + count, strip, to, to + c.block * c.channel_stride + slack(c));
    std::memset(to + count * c.channel_stride, 0, slack(c) * sizeof(T));
    return to;
  }

  ConvShape s_;
  int64_t kept_;
  const int32_t *out_, *in_, *ky_, *kx_;
  Cut over_x_, over_grad_;
  bool in_place_;  // whether x is read where it lies
};

ConvShape shape_of(const Tensor& x, int64_t out_channels, int64_t kernel_h, int64_t kernel_w, int64_t stride,
                   int64_t padding, int64_t mode) {
  return {x.size(1), x.size(2), x.size(3), out_channels, kernel_h, kernel_w, stride, padding, mode};
}

template <class T>
Image<T> image_of(const Tensor& x, const std::optional<Tensor>& load, int64_t experiment) {
  return {x.const_data_ptr<T>() + experiment * x.stride(0), x.stride(1), x.stride(2), loads_of<T>(load, experiment)};
}

}  // namespace

// x (E, in, H, W), whose rows may lie apart: what lies between them is read, and must be finite; values (E, kept), bias
// (E, out) or none, taps (4, kept), by_output (out + 1,), load (E, in, 5) or none.
Tensor sparse_conv2d(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, const Tensor& taps,
                     const Tensor& by_output, const Tensor& /*by_input*/, const Tensor& /*input_order*/,
                     int64_t out_channels, int64_t kernel_h, int64_t kernel_w, int64_t stride, int64_t padding,
                     int64_t mode, const std::optional<Tensor>& load) {
  const ConvShape shape = shape_of(x, out_channels, kernel_h, kernel_w, stride, padding, mode);
  Tensor out = torch::stable::empty({x.size(0), out_channels, shape.out_h(), shape.out_w()}, x.scalar_type());
  for_float_type(x, [&](auto type) {
    using T = decltype(type);
    if (AlignedConvolution<T>::takes(shape, x)) {
      const AlignedConvolution<T> convolution(shape, taps);
      for (int64_t e = 0; e < x.size(0); ++e) {
        const Image<T> image = image_of<T>(x, load, e);
        convolution.forward(convolution.to_outputs(values.const_data_ptr<T>() + e * values.size(1),
                                                   by_output.const_data_ptr<int64_t>()),
                            image.data, image.plane, image.load,
                            bias ? bias->const_data_ptr<T>() + e * out_channels : nullptr,
                            out.mutable_data_ptr<T>() + e * out_channels * shape.out_h() * shape.out_w());
      }
      return;
    }
    const Convolution<T> convolution(shape, taps, x.stride(1), x.stride(2), load.has_value());
    SparseTable<T> table(kTable, kValues, out_channels, convolution.over_x().blocks, by_output.const_data_ptr<int64_t>(),
                         nullptr);
    for (int64_t e = 0; e < x.size(0); ++e) {
      convolution.fill_to_outputs(table, values.const_data_ptr<T>() + e * values.size(1));
      convolution.forward(table, image_of<T>(x, load, e),
                          bias ? bias->const_data_ptr<T>() + e * out_channels : nullptr,
                          out.mutable_data_ptr<T>() + e * out_channels * shape.out_h() * shape.out_w());
    }
  });
  return out;
}

// by_input (in * stride² + 1,) and input_order (kept,) group the weights by input channel and phase of the tap.
std::tuple<Tensor, Tensor> sparse_conv2d_backward(const Tensor& grad_out, const Tensor& x, const Tensor& values,
                                                  const Tensor& taps, const Tensor& by_output, const Tensor& by_input,
                                                  const Tensor& input_order, int64_t out_channels, int64_t kernel_h,
                                                  int64_t kernel_w, int64_t stride, int64_t padding, int64_t mode,
                                                  const std::optional<Tensor>& load, bool needs_grad_x,
                                                  bool needs_grad_values) {
  const ConvShape shape = shape_of(x, out_channels, kernel_h, kernel_w, stride, padding, mode);
  const int64_t kept = values.size(1), plane = out_channels * shape.out_h() * shape.out_w();
  const int64_t image = shape.in_channels * shape.height * shape.width;
  Tensor grad_x = needs_grad_x ? torch::stable::empty({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type())
                               : torch::stable::empty({0}, x.scalar_type());
  Tensor grad_values = needs_grad_values ? torch::stable::empty_like(values) : torch::stable::empty({0}, x.scalar_type());
  for_float_type(x, [&](auto type) {
    using T = decltype(type);
    if (AlignedConvolution<T>::takes(shape, x)) {
      const AlignedConvolution<T> convolution(shape, taps);
      for (int64_t e = 0; e < x.size(0); ++e) {
        const T* own_values = values.const_data_ptr<T>() + e * kept;
        const T* gradient = grad_out.const_data_ptr<T>() + e * plane;
        if (needs_grad_x)
          convolution.backward_x(convolution.to_inputs(own_values, by_input.const_data_ptr<int64_t>(),
                                                       input_order.const_data_ptr<int64_t>()),
                                 gradient, grad_x.mutable_data_ptr<T>() + e * image);
        const Image<T> seen = image_of<T>(x, load, e);
        if (needs_grad_values)
          convolution.backward_values(convolution.to_outputs(own_values, by_output.const_data_ptr<int64_t>()), seen.data,
                                      seen.plane, seen.load, gradient, grad_values.mutable_data_ptr<T>() + e * kept);
      }
      return;
    }
    const Convolution<T> convolution(shape, taps, x.stride(1), x.stride(2), load.has_value());
    for (int64_t e = 0; e < x.size(0); ++e) {
      const T* own_values = values.const_data_ptr<T>() + e * kept;
      const T* gradient = grad_out.const_data_ptr<T>() + e * plane;
      if (needs_grad_x) {
        SparseTable<T> table(kTable, kValues, shape.in_channels * shape.phases(), convolution.over_grad().blocks,
                             by_input.const_data_ptr<int64_t>(), input_order.const_data_ptr<int64_t>());
        convolution.fill_to_inputs(table, own_values);
        convolution.backward_x(table, gradient, grad_x.mutable_data_ptr<T>() + e * image);
      }
      if (needs_grad_values) {
        SparseTable<T> table(kTable, kValues, out_channels, convolution.over_x().blocks,
                             by_output.const_data_ptr<int64_t>(), nullptr);
        convolution.fill_to_outputs(table, own_values);
        convolution.backward_values(table, image_of<T>(x, load, e), gradient,
                                    grad_values.mutable_data_ptr<T>() + e * kept);
      }
    }
  });
  return {grad_x, grad_values};
}

}  // namespace sparse_gen

STABLE_TORCH_LIBRARY_IMPL(sparse_gen, CPU, m) {
  m.impl("sparse_conv2d", TORCH_BOX(&sparse_gen::sparse_conv2d));
  m.impl("sparse_conv2d_backward", TORCH_BOX(&sparse_gen::sparse_conv2d_backward));
}
