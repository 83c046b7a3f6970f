// The padded input of a convolution and the gradient of its output, some rows of them at a time, as planes in which
// every weight sees a contiguous shift: rows follow one another without a gap, and with stride 2 the even and odd rows
// and columns are planes apart.
#pragma once

#include <cstring>
#include <vector>

#include "binding.h"
#include "cpu/padding.h"

namespace sparse_gen {

// From one plane to the next at least `elements`, an odd number of cache lines: planes of 256 × 256 floats would
// otherwise all begin at the same few places of the cache.
template <class T>
int64_t plane_stride(int64_t elements) {
  constexpr int64_t line = 64 / sizeof(T);
  return ((elements + line - 1) / line | 1) * line;
}

// Rows cut into bands of nearly one height, whose planes fit the second-level cache of one core. The cut depends on
// shapes alone: results must not depend on the number of threads. A band has at_least rows, or all.
struct Bands {
  int64_t rows, count;

  Bands(int64_t rows, int64_t bytes_a_row, int64_t at_least) : rows(rows) {
    constexpr int64_t kBytes = 1 << 20;
    const int64_t most = rows / at_least > 1 ? rows / at_least : 1;
    count = (rows * bytes_a_row + kBytes - 1) / kBytes;
    // As many bands for each of two or four threads.
    if (count > 1) count = (count + 3) / 4 * 4;
    if (count > most) count = most;
  }
  int64_t begin(int64_t band) const { return rows * band / count; }
  int64_t highest() const { return (rows + count - 1) / count; }
};

template <class T>
struct PaddedPlanes {
  int64_t channels, height, width, stride, padding, mode;
  int64_t rows, columns;  // of a whole plane
  int64_t row;            // elements from one row to the next: the columns and `spare` zeros
  int64_t plane = 0;      // elements from one plane of a band to the next

  PaddedPlanes(const Tensor& x, int64_t stride, int64_t padding, int64_t mode, int64_t spare)
      : channels(x.size(1)), height(x.size(2)), width(x.size(3)), stride(stride), padding(padding), mode(mode) {
    rows = (height + 2 * padding + stride - 1) / stride;
    columns = (width + 2 * padding + stride - 1) / stride;
    row = columns + spare;
  }

  void hold(int64_t band_rows) { plane = plane_stride<T>(band_rows * row); }

  int64_t phases() const { return stride * stride; }
  int64_t phase(int64_t ky, int64_t kx) const { return (ky & (stride - 1)) * stride + (kx & (stride - 1)); }
  int64_t image_size() const { return channels * height * width; }
  int64_t size() const { return channels * phases() * plane; }
  int64_t out_size(int64_t length, int64_t kernel) const { return (length + 2 * padding - kernel) / stride + 1; }
  int64_t offset(int64_t channel, int64_t ky, int64_t kx) const {
    return (channel * phases() + phase(ky, kx)) * plane + ky / stride * row + kx / stride;
  }

  // x (channels, height, width) to the rows first <= r < last of every plane; what follows them in a plane is zero.
  void fill(const T* x, int64_t first, int64_t last, T* planes) const {
    const std::vector<int64_t> column = column_origins();
    torch::stable::parallel_for(0, channels * stride, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* image = x + i / stride * height * width;
        for (int64_t phase = 0; phase < stride; ++phase) {
          T* to = planes + (i * stride + phase) * plane;
          for (int64_t r = first; r < last; ++r, to += row) {
            const int64_t y = origin(r * stride + i % stride, height);
            if (y < 0)
              std::memset(to, 0, row * sizeof(T));
            else
              fill_row(image + y * width, column.data(), phase, to);
          }
          std::memset(to, 0, (plane - (last - first) * row) * sizeof(T));
        }
      }
    });
  }

  // The adjoint of `fill`: the gradient of every padded position is added where it came from. The pixels that rows
  // first .. last - 1 come from must come from no others; planes are `apart` elements apart.
  void fold(const T* planes, int64_t apart, int64_t first, int64_t last, T* grad_x) const {
    const std::vector<int64_t> column = column_origins();
    const int64_t own = first == 0 ? padding : first * stride, above = height + padding;
    const int64_t own_end = last * stride < above ? last * stride : above, end = last * stride;
    torch::stable::parallel_for(0, channels, 1, [&](int64_t begin_channel, int64_t end_channel) {
      for (int64_t channel = begin_channel; channel < end_channel; ++channel) {
        T* image = grad_x + channel * height * width;
        const auto from = [&](int64_t i, int64_t phase) {
          return planes + (channel * phases() + i % stride * stride + phase) * apart + (i / stride - first) * row;
        };
        // Every pixel's own position first, which fills the image; then what repeats it.
        for (int64_t i = own; i < own_end; ++i)
          for (int64_t phase = 0; phase < stride; ++phase)
            fold_inside<false>(from(i, phase), phase, image + (i - padding) * width);
        for (int64_t i = first * stride; i < end; ++i) {
          const int64_t y = origin(i, height);
          if (y < 0) continue;
          for (int64_t phase = 0; phase < stride; ++phase) {
            if (i < padding || i >= above) fold_inside<true>(from(i, phase), phase, image + y * width);
            fold_border(from(i, phase), column.data(), phase, image + y * width);
          }
        }
      }
    });
  }

 private:
  // Where padded position i of an axis comes from; -1 for a zero.
  int64_t origin(int64_t i, int64_t length) const { return padded_origin(i - padding, length, padding, mode); }

  std::vector<int64_t> column_origins() const {
    std::vector<int64_t> column(row * stride);
    for (int64_t i = 0; i < row * stride; ++i) column[i] = origin(i, width);
    return column;
  }

  // The columns of a plane of this phase that lie inside the image and need no look-up: begin <= c < end.
  int64_t inside_begin(int64_t phase) const { return (padding - phase + stride - 1) / stride; }
  int64_t inside_end(int64_t phase) const {
    const int64_t end = (width + padding - phase + stride - 1) / stride;
    return end < columns ? end : columns;
  }

  void fill_row(const T* from, const int64_t* column, int64_t phase, T* to) const {
    const int64_t begin = inside_begin(phase), end = inside_end(phase);
    const T* inside = from + begin * stride + phase - padding;
    if (stride == 1)
      std::memcpy(to + begin, inside, (end - begin) * sizeof(T));
    else
      for (int64_t c = 0; c < end - begin; ++c) to[begin + c] = inside[2 * c];
    const auto border = [&](int64_t c) { to[c] = column[c * stride + phase] < 0 ? 0 : from[column[c * stride + phase]]; };
    for (int64_t c = 0; c < begin; ++c) border(c);
    for (int64_t c = end; c < row; ++c) border(c);
  }

  template <bool Add>
  void fold_inside(const T* __restrict from, int64_t phase, T* __restrict to) const {
    const int64_t begin = inside_begin(phase), count = inside_end(phase) - begin;
    from += begin;
    to += begin * stride + phase - padding;
    if (stride == 1)
      for (int64_t c = 0; c < count; ++c) to[c] = Add ? to[c] + from[c] : from[c];
    else
      for (int64_t c = 0; c < count; ++c) to[2 * c] = Add ? to[2 * c] + from[c] : from[c];
  }

  void fold_border(const T* from, const int64_t* column, int64_t phase, T* to) const {
    const auto border = [&](int64_t c) {
      const int64_t x = column[c * stride + phase];
      if (x >= 0) to[x] += from[c];
    };
    for (int64_t c = 0; c < inside_begin(phase); ++c) border(c);
    for (int64_t c = inside_end(phase); c < columns; ++c) border(c);
  }
};

// The output's gradient with zeros around it, in rows of the same length as the padded input's.
template <class T>
struct GradientPlanes {
  int64_t channels, height, width, stride, top, left, row, plane = 0;

  GradientPlanes(const PaddedPlanes<T>& planes, const Tensor& grad_out, int64_t kernel_h, int64_t kernel_w)
      : channels(grad_out.size(1)),
        height(grad_out.size(2)),
        width(grad_out.size(3)),
        stride(planes.stride),
        top((kernel_h - 1) / stride),
        left((kernel_w - 1) / stride),
        row(planes.row) {}

  void hold(int64_t band_rows) { plane = plane_stride<T>((band_rows + top) * row); }

  int64_t size() const { return channels * plane; }
  // Where a band's first row of the gradient begins in its plane.
  int64_t origin() const { return top * row + left; }
  // Position i of a band of the padded input, in the plane of this tap's phase, sees the gradient at offset + i.
  int64_t offset(int64_t channel, int64_t ky, int64_t kx) const {
    return channel * plane + (top - ky / stride) * row + left - kx / stride;
  }

  // The rows first - top <= r < last of grad_out (channels, height, width); those that it does not have are zero.
  void fill(const T* grad_out, int64_t first, int64_t last, T* planes) const {
    torch::stable::parallel_for(0, channels, 1, [&](int64_t begin_channel, int64_t end_channel) {
      for (int64_t channel = begin_channel; channel < end_channel; ++channel) {
        T* to = planes + channel * plane;
        int64_t filled = 0;
        for (int64_t y = first > top ? first - top : 0; y < last && y < height; ++y) {
          const int64_t begin = (y - (first - top)) * row + left;
          std::memset(to + filled, 0, (begin - filled) * sizeof(T));
          std::memcpy(to + begin, grad_out + (channel * height + y) * width, width * sizeof(T));
          filled = begin + width;
        }
        std::memset(to + filled, 0, (plane - filled) * sizeof(T));
      }
    });
  }
};

}  // namespace sparse_gen
