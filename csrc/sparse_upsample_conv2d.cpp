#include "cpu/sparse_upsample_conv2d.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>

#include "binding.h"
#include "cpu/sparse_rows.h"
#include "load.h"
#include "scratch.h"

namespace sparse_gen {

namespace {

// Slots of scratch memory: the first are filled before the threads start, the others are each thread's own.
enum Slot { kTables, kValues, kShared, kPartial, kSource, kPlanes, kRows, kSums };

// How one layer is cut up. An image of few positions is one strip, and its channels are dealt to the threads; of a
// larger one each thread takes strips, so that a strip's tap planes stay in the second-level cache.
struct UpLayer {
  int64_t in_channels, out_channels;
  TapImage image;
  int64_t strips, block, blocks;
  Tiles tiles;

  int64_t pixels() const { return image.height * image.width; }
  int64_t taps() const { return image.kernel_h * image.kernel_w; }
  int64_t planes() const { return out_channels * taps(); }
  // Rows of the small image that an output row sees above or below its own.
  int64_t halo() const { return image.upsample == kNearest ? (image.padding + 1) / 2 : image.padding / 2 + 1; }
  int64_t strip_begin(int64_t strip) const { return strip * image.strip_rows; }
  int64_t strip_end(int64_t strip) const {
    return std::min<int64_t>(image.height, (strip + 1) * image.strip_rows);
  }
  int64_t strip_length(int64_t strip) const { return (strip_end(strip) - strip_begin(strip)) * image.width; }
};

template <class T>
UpLayer layer_of(const Tensor& x, int64_t out_channels, int64_t kernel_h, int64_t kernel_w, int64_t padding,
                 int64_t mode, int64_t upsample) {
  constexpr int64_t line = kLine / sizeof(T);
  const int64_t in_channels = x.size(1), height = x.size(2), width = x.size(3);
  // A strip's source rows and a block's tap planes are to stay in the first-level cache, 48 KiB: measured, vectors at a
  // time × rows of up to 40 × 16, 128 × 8 cost the least.
  const bool small = height * width <= 32 * line, wide = !small && in_channels <= 40;
  const int64_t positions = (wide ? 16 : 8) * line;
  const int64_t strip_rows = small ? height : std::clamp<int64_t>(positions / width, 1, height);
  const int64_t strip_stride = ((strip_rows * width + line - 1) / line | 1) * line;
  const int64_t strips = (height + strip_rows - 1) / strip_rows;
  const int64_t block = std::clamp<int64_t>((wide ? 24 : 48) / (kernel_h * kernel_w), 1, out_channels);
  const TapImage image{height, width, kernel_h, kernel_w, padding, mode, upsample, strip_rows, strip_stride, 1};
  return {in_channels, out_channels, image, strips, block, (out_channels + block - 1) / block,
          small ? Tiles::alone : wide ? Tiles::wide : Tiles::narrow};
}

int64_t padded(int64_t count) { return (count + kRowGroup - 1) / kRowGroup * kRowGroup; }

// The kept weights as two sparse matrices: input channels to tap planes, and, in blocks of output channels, tap planes
// to input channels.
template <class T>
class Tables {
 public:
  Tables(const UpLayer& layer, const Tensor& taps, const Tensor& by_tap, const Tensor& tap_order,
         const Tensor& by_input, const Tensor& input_order, bool forward, bool backward)
      : layer_(layer), kept_(taps.size(1)), forward_(forward), backward_(backward) {
    out_ = taps.const_data_ptr<int32_t>();
    by_tap_ = by_tap.const_data_ptr<int64_t>();
    tap_order_ = tap_order.const_data_ptr<int64_t>();
    by_input_ = by_input.const_data_ptr<int64_t>();
    input_order_ = input_order.const_data_ptr<int64_t>();
    const int64_t planes = layer.planes(), rows = layer.blocks * layer.in_channels;
    const int64_t room = kept_ + planes * (kRowGroup - 1);
    int* at = scratch<int>(kTables, 2 * (planes + rows) + room + kept_);
    tap_begin_ = at, tap_end_ = at + planes, in_begin_ = at + 2 * planes, in_end_ = in_begin_ + rows;
    tap_offset_ = in_end_ + rows, in_offset_ = tap_offset_ + room;
    tap_value_ = scratch<T>(kValues, room + kept_);
    in_value_ = tap_value_ + room;
    int64_t slot = 0;
    for (int64_t p = 0; p < planes; ++p) {
      tap_begin_[p] = slot;
      tap_end_[p] = slot + by_tap_[p + 1] - by_tap_[p];
      slot = padded(tap_end_[p]);
    }
    slots_ = slot;
  }

  // Reads one experiment's values.
  void fill(const T* values) {
    if (forward_)
      torch::stable::parallel_for(0, layer_.planes(), 64, [&](int64_t first, int64_t last) {
        const int32_t* channel = out_ + kept_;
        for (int64_t p = first; p < last; ++p) {
          const int64_t* order = tap_order_ + by_tap_[p];
          int to = tap_begin_[p];
          for (; to < tap_end_[p]; ++to, ++order) {
            tap_offset_[to] = channel[*order] * layer_.image.strip_stride;
            tap_value_[to] = values[*order];
          }
          for (; to % kRowGroup; ++to) tap_offset_[to] = 0;
        }
      });
    if (backward_)
      torch::stable::parallel_for(0, layer_.in_channels, 4, [&](int64_t first, int64_t last) {
        const int32_t *ky = out_ + 2 * kept_, *kx = out_ + 3 * kept_;
        for (int64_t c = first; c < last; ++c) {
          int64_t k = by_input_[c];
          for (int64_t b = 0; b < layer_.blocks; ++b) {
            const int64_t row = b * layer_.in_channels + c, first_out = b * layer_.block;
            in_begin_[row] = k;
            for (; k < by_input_[c + 1] && out_[input_order_[k]] < first_out + layer_.block; ++k) {
              const int64_t at = input_order_[k];
              const int64_t plane = ((out_[at] - first_out) * layer_.image.kernel_h + ky[at]) * layer_.image.kernel_w;
              in_offset_[k] = (plane + kx[at]) * layer_.image.strip_stride;
              in_value_[k] = values[at];
            }
            in_end_[row] = k;
          }
        }
      });
  }

  SparseRows<T> to_planes() const { return {tap_begin_, tap_end_, tap_offset_, tap_value_}; }
  SparseRows<T> to_inputs() const { return {in_begin_, in_end_, in_offset_, in_value_}; }
  // Where output channel o's weights begin among to_planes()'s; they all end at slots().
  int64_t first_slot(int64_t o) const {
    return o * layer_.taps() < layer_.planes() ? tap_begin_[o * layer_.taps()] : slots_;
  }
  int64_t slots() const { return slots_; }

  // Puts sums of to_planes()'s weights, `count` arrays of slots() elements, into the order of the values.
  void collect(const T* sums, int64_t count, T* result) const {
    torch::stable::parallel_for(0, layer_.planes(), 64, [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p)
        for (int64_t k = by_tap_[p], slot = tap_begin_[p]; k < by_tap_[p + 1]; ++k, ++slot) {
          T sum = sums[slot];
          for (int64_t n = 1; n < count; ++n) sum += sums[n * slots_ + slot];
          result[tap_order_[k]] = sum;
        }
    });
  }

 private:
  UpLayer layer_;
  int64_t kept_, slots_;
  bool forward_, backward_;
  const int32_t* out_;
  const int64_t *by_tap_, *tap_order_, *by_input_, *input_order_;
  int *tap_begin_, *tap_end_, *in_begin_, *in_end_, *tap_offset_, *in_offset_;
  T *tap_value_, *in_value_;
};

// Zeros from `length` to the end of the cache line.
template <class T>
void clear_tail(T* row, int64_t length) {
  constexpr int64_t line = kLine / sizeof(T);
  if (length % line) std::memset(row + length, 0, (line - length % line) * sizeof(T));
}

// One strip of channels first .. last - 1 in rows of whole cache lines, zeros behind the last position.
template <class T>
void pack_strip(const UpLayer& layer, const T* x, const Load<T>* load, int64_t strip, int64_t first, int64_t last, T* to) {
  const int64_t length = layer.strip_length(strip), stride = layer.image.strip_stride;
  const T* from = x + layer.strip_begin(strip) * layer.image.width;
  for (int64_t c = first; c < last; ++c) {
    read_pixels(from + c * layer.pixels(), to + c * stride, length, load ? load + c : nullptr);
    clear_tail(to + c * stride, length);
  }
}

template <class T>
void assemble(const UpLayer& layer, const T* planes, int64_t strip, int64_t first, int64_t last, const T* bias, T* out) {
  const int64_t plane_stride = layer.image.slots * layer.image.strip_stride;
  T* room = scratch<T>(kSums, tap_scratch(layer.image));
  for (int64_t o = first; o < last; ++o)
    SPARSE_GEN_DISPATCH(assemble_taps, layer.image, planes + (o - first) * layer.taps() * plane_stride, plane_stride,
                        layer.strip_begin(strip), layer.strip_end(strip), bias ? bias[o] : T(0),
                        out + o * 4 * layer.pixels(), room);
}

// The output of one experiment.
template <class T>
void forward(UpLayer layer, const SparseRows<T>& weights, const T* x, const Load<T>* load, const T* bias, T* out) {
  const int64_t stride = layer.image.strip_stride, taps = layer.taps();
  if (layer.strips == 1) {
    T* source = scratch<T>(kShared, layer.in_channels * stride);
    torch::stable::parallel_for(0, layer.in_channels, 8, [&](int64_t first, int64_t last) {
      pack_strip(layer, x, load, 0, first, last, source);
    });
    torch::stable::parallel_for(0, layer.out_channels, 1, [&](int64_t first, int64_t last) {
      T* planes = scratch<T>(kPlanes, (last - first) * taps * stride);
      SPARSE_GEN_DISPATCH(multiply_rows, weights, first * taps, last * taps, source, planes, stride, layer.pixels(),
                          layer.tiles, false);
      assemble(layer, planes, 0, first, last, bias, out);
    });
    return;
  }
  // Strips in turn, each one's planes computed once and kept while the next ones need their border rows.
  const int64_t halo = layer.halo();
  const int64_t around = (halo + layer.image.strip_rows - 1) / layer.image.strip_rows;
  layer.image.slots = 2 * around + 1;
  const int64_t plane_stride = layer.image.slots * stride;
  torch::stable::parallel_for(0, layer.strips, 1, [&](int64_t first, int64_t last) {
    T* planes = scratch<T>(kPlanes, layer.planes() * plane_stride);
    T* source = scratch<T>(kSource, layer.in_channels * stride);
    const int64_t first_row = layer.strip_begin(first) - halo, last_row = layer.strip_end(last - 1) + halo;
    int64_t next = std::max<int64_t>(0, first - around);
    for (int64_t strip = first; strip < last; ++strip) {
      for (; next <= strip + around && next < layer.strips; ++next) {
        constexpr int64_t line = kLine / sizeof(T);
        const int64_t begin = layer.strip_begin(next), rows = std::min(last_row, layer.strip_end(next)) - begin;
        const int64_t skipped = std::max<int64_t>(0, first_row - begin) * layer.image.width / line * line;
        pack_strip(layer, x, load, next, 0, layer.in_channels, source);
        SPARSE_GEN_DISPATCH(multiply_rows, weights, 0, layer.planes(), source + skipped,
                            planes + next % layer.image.slots * stride + skipped, plane_stride,
                            rows * layer.image.width - skipped, layer.tiles, false);
      }
      assemble(layer, planes, strip, 0, layer.out_channels, bias, out);
    }
  });
}

template <class T>
void spread(const UpLayer& layer, const T* grad_out, int64_t strip, int64_t first, int64_t last, T* planes) {
  const int64_t stride = layer.image.strip_stride, length = layer.strip_length(strip);
  T* room = scratch<T>(kRows, tap_scratch(layer.image));
  for (int64_t o = first; o < last; ++o) {
    T* own = planes + (o - first) * layer.taps() * stride;
    SPARSE_GEN_DISPATCH(spread_taps, layer.image, grad_out + o * 4 * layer.pixels(), layer.strip_begin(strip),
                        layer.strip_end(strip), own, stride, room);
    for (int64_t tap = 0; tap < layer.taps(); ++tap) clear_tail(own + tap * stride, length);
  }
}

// The gradients of one experiment; either may be null.
template <class T>
void backward(const UpLayer& layer, const Tables<T>& tables, const T* grad_out, const T* x, const Load<T>* load, T* grad_x,
              T* grad_values) {
  const int64_t stride = layer.image.strip_stride, taps = layer.taps(), pixels = layer.pixels();
  const SparseRows<T> to_planes = tables.to_planes(), to_inputs = tables.to_inputs();
  // Adds one block's part to the gradient of input channels first .. last - 1.
  const auto add_block = [&](int64_t block, int64_t first, int64_t last, const T* planes, int64_t length, T* to) {
    const int64_t row = block * layer.in_channels;
    SPARSE_GEN_DISPATCH(multiply_rows, to_inputs, row + first, row + last, planes, to, stride, length, layer.tiles,
                        block > 0);
  };
  if (layer.strips == 1) {
    T* planes = scratch<T>(kShared, (layer.planes() + layer.in_channels) * stride);
    T* source = planes + layer.planes() * stride;
    torch::stable::parallel_for(0, layer.out_channels, 1, [&](int64_t first, int64_t last) {
      spread(layer, grad_out, 0, first, last, planes + first * taps * stride);
    });
    torch::stable::parallel_for(0, layer.in_channels, 4, [&](int64_t first, int64_t last) {
      if (grad_values) pack_strip(layer, x, load, 0, first, last, source);
      if (!grad_x) return;
      T* sums = scratch<T>(kRows, (last - first) * stride);
      for (int64_t b = 0; b < layer.blocks; ++b)
        add_block(b, first, last, planes + b * layer.block * taps * stride, pixels, sums);
      for (int64_t c = first; c < last; ++c)
        std::memcpy(grad_x + c * pixels, sums + (c - first) * stride, pixels * sizeof(T));
    });
    if (!grad_values) return;
    T* result = scratch<T>(kPartial, tables.slots());
    torch::stable::parallel_for(0, layer.out_channels, 1, [&](int64_t first, int64_t last) {
      const int64_t begin = tables.first_slot(first), count = tables.first_slot(last) - begin;
      T* sums = scratch<T>(kSums, count * kDotLanes);
      std::memset(sums, 0, count * kDotLanes * sizeof(T));
      SPARSE_GEN_DISPATCH(dot_rows, to_planes, first * taps, last * taps, source, planes + first * taps * stride, stride,
                          pixels, layer.tiles, sums);
      SPARSE_GEN_DISPATCH(finish_dots, sums, count, result + begin);
    });
    tables.collect(result, 1, grad_values);
    return;
  }
  // Parts of the image whose number depends on its size alone, so that the sums' bits do not depend on the threads.
  const int64_t parts = std::min(layer.strips, std::clamp<int64_t>(pixels / 1024, 2, 16));
  T* partial = grad_values ? scratch<T>(kPartial, parts * tables.slots()) : nullptr;
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    const int64_t sums_size = grad_values ? tables.slots() * kDotLanes : 0;
    T* sums = scratch<T>(kSums, sums_size);
    T* source = scratch<T>(kSource, 2 * layer.in_channels * stride);
    T* gradient = source + layer.in_channels * stride;
    T* planes = scratch<T>(kPlanes, layer.block * taps * stride);
    for (int64_t part = first; part < last; ++part) {
      std::memset(sums, 0, sums_size * sizeof(T));
      for (int64_t strip = part * layer.strips / parts; strip < (part + 1) * layer.strips / parts; ++strip) {
        const int64_t length = layer.strip_length(strip);
        if (grad_values) pack_strip(layer, x, load, strip, 0, layer.in_channels, source);
        for (int64_t b = 0; b < layer.blocks; ++b) {
          const int64_t o = b * layer.block, end = std::min(layer.out_channels, o + layer.block);
          spread(layer, grad_out, strip, o, end, planes);
          if (grad_values) {
            T* own = sums + tables.first_slot(o) * kDotLanes;
            SPARSE_GEN_DISPATCH(dot_rows, to_planes, o * taps, end * taps, source, planes, stride, length, layer.tiles, own);
          }
          if (grad_x) add_block(b, 0, layer.in_channels, planes, length, gradient);
        }
        if (!grad_x) continue;
        T* to = grad_x + layer.strip_begin(strip) * layer.image.width;
        for (int64_t c = 0; c < layer.in_channels; ++c)
          std::memcpy(to + c * pixels, gradient + c * stride, length * sizeof(T));
      }
      if (grad_values) SPARSE_GEN_DISPATCH(finish_dots, sums, tables.slots(), partial + part * tables.slots());
    }
  });
  if (grad_values) tables.collect(partial, parts, grad_values);
}

}  // namespace

// x (E, in, h, w), values (E, kept); by_tap (out * taps + 1,) and tap_order (kept,) group the weights by output
// channel and tap, by_input (in + 1,) and input_order by input channel; load (E, in, 5) is applied to x, if given.
Tensor sparse_upsample_conv2d(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
                              const Tensor& taps, const Tensor& by_tap, const Tensor& tap_order,
                              const Tensor& by_input, const Tensor& input_order, int64_t out_channels,
                              int64_t kernel_h, int64_t kernel_w, int64_t padding, int64_t mode, int64_t upsample,
                              const std::optional<Tensor>& load) {
  Tensor out = torch::stable::empty({x.size(0), out_channels, 2 * x.size(2), 2 * x.size(3)}, x.scalar_type());
  for_float_type(x, [&](auto type) {
    using T = decltype(type);
    const UpLayer layer = layer_of<T>(x, out_channels, kernel_h, kernel_w, padding, mode, upsample);
    const int64_t pixels = layer.pixels();
    Tables<T> tables(layer, taps, by_tap, tap_order, by_input, input_order, true, false);
    for (int64_t e = 0; e < x.size(0); ++e) {
      tables.fill(values.const_data_ptr<T>() + e * values.size(1));
      forward(layer, tables.to_planes(), x.const_data_ptr<T>() + e * layer.in_channels * pixels,
              loads_of<T>(load, e), bias ? bias->const_data_ptr<T>() + e * out_channels : nullptr,
              out.mutable_data_ptr<T>() + e * out_channels * 4 * pixels);
    }
  });
  return out;
}

std::tuple<Tensor, Tensor> sparse_upsample_conv2d_backward(const Tensor& grad_out, const Tensor& x,
                                                           const Tensor& values, const Tensor& taps,
                                                           const Tensor& by_tap, const Tensor& tap_order,
                                                           const Tensor& by_input, const Tensor& input_order,
                                                           int64_t out_channels, int64_t kernel_h, int64_t kernel_w,
                                                           int64_t padding, int64_t mode, int64_t upsample,
                                                           const std::optional<Tensor>& load, bool needs_grad_x,
                                                           bool needs_grad_values) {
  Tensor grad_x = needs_grad_x ? torch::stable::empty_like(x) : torch::stable::empty({0}, x.scalar_type());
  Tensor grad_values = needs_grad_values ? torch::stable::empty_like(values) : torch::stable::empty({0}, x.scalar_type());
  for_float_type(x, [&](auto type) {
    using T = decltype(type);
    const UpLayer layer = layer_of<T>(x, out_channels, kernel_h, kernel_w, padding, mode, upsample);
    const int64_t image = layer.in_channels * layer.pixels(), kept = values.size(1);
    Tables<T> tables(layer, taps, by_tap, tap_order, by_input, input_order, needs_grad_values, needs_grad_x);
    for (int64_t e = 0; e < x.size(0); ++e) {
      tables.fill(values.const_data_ptr<T>() + e * kept);
      backward(layer, tables, grad_out.const_data_ptr<T>() + e * out_channels * 4 * layer.pixels(),
               x.const_data_ptr<T>() + e * image, loads_of<T>(load, e),
               needs_grad_x ? grad_x.mutable_data_ptr<T>() + e * image : nullptr,
               needs_grad_values ? grad_values.mutable_data_ptr<T>() + e * kept : nullptr);
    }
  });
  return {grad_x, grad_values};
}

}  // namespace sparse_gen

STABLE_TORCH_LIBRARY_IMPL(sparse_gen, CPU, m) {
  m.impl("sparse_upsample_conv2d", TORCH_BOX(&sparse_gen::sparse_upsample_conv2d));
  m.impl("sparse_upsample_conv2d_backward", TORCH_BOX(&sparse_gen::sparse_upsample_conv2d_backward));
}
