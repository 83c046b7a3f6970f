#include "masked_conv2d_tiles.h"

#include "matmul.h"
#include "padding.h"
#include "shuffle.h"

namespace sparse_gen::SPARSE_GEN_ISA {

namespace {

// The source's row y of one channel.
template <class T>
void source_row(const TileConvolution& c, const T* x, long long y, T* row) {
  const long long t0 = padded_origin(y - c.padding, c.height, c.padding, c.mode);
  const long long t1 = c.means ? padded_origin(y + 1 - c.padding, c.height, c.padding, c.mode) : -1;
  const T f0 = t0 < 0 ? T(0) : c.means ? T(0.25) : T(1), f1 = t1 < 0 ? T(0) : T(0.25);
  const T *r0 = x + (t0 < 0 ? 0 : t0) * c.width, *r1 = x + (t1 < 0 ? 0 : t1) * c.width;
  const long long inner = c.width - c.means, end = c.padding + inner;
  T* to = row + c.padding;
  if (!c.means && t0 >= 0) {
    __builtin_memcpy(to, r0, c.width * sizeof(T));
  } else if (!c.means) {
    for (long long i = 0; i < c.width; ++i) to[i] = 0;
  } else {
    for (long long i = 0; i < inner; ++i) to[i] = f0 * (r0[i] + r0[i + 1]) + f1 * (r1[i] + r1[i + 1]);
  }
  const auto at_border = [&](long long i) {
    T sum = 0;
    for (long long k = 0; k <= (c.means ? 1 : 0); ++k) {
      const long long column = padded_origin(i + k - c.padding, c.width, c.padding, c.mode);
      if (column >= 0) sum += f0 * r0[column] + (c.means ? f1 * r1[column] : T(0));
    }
    row[i] = sum;
  };
  for (long long i = 0; i < c.padding; ++i) at_border(i);
  for (long long i = end; i < c.source_w(); ++i) at_border(i);
}

template <class T>
void source(const TileConvolution& c, const T* x, long long first, long long last, T* to, long long stride, T* scratch) {
  const long long step = c.stride, width = c.phase_w(), phase = (last - first + c.reach_h()) * width;
  const long long end = (last - 1) * step + c.kernel_h;
  for (long long i = 0; i < c.in_channels; ++i)
    for (long long y = first * step; y < end; ++y) {
      T* row = to + i * stride + (y % step) * step * phase + (y / step - first) * width;
      const T* image = x + i * c.height * c.width;
      if (step == 1) {
        source_row(c, image, y, row);
        continue;
      }
      source_row(c, image, y, scratch);
      const long long pairs = c.source_w() / 2;
      T *even = row, *odd = row + phase;
      for (long long n = 0; n < pairs; ++n) {
        even[n] = scratch[2 * n];
        odd[n] = scratch[2 * n + 1];
      }
      if (c.source_w() % 2) even[pairs] = scratch[2 * pairs];
    }
}

template <class T>
void forward(const TileConvolution& c, const T* source, long long stride, const T* weight, const T* bias,
             long long from, long long to, long long first, long long last, T* room, long long room_stride, T* out) {
  const long long width = c.phase_w(), phase = (last - first + c.reach_h()) * width, step = c.stride;
  long long a_table[kMostTileTaps], b_table[kMostTileTaps];
  for (long long tap = 0; tap < c.taps(); ++tap) {
    const long long ky = tap / c.kernel_w, kx = tap % c.kernel_w;
    a_table[tap] = tap;
    b_table[tap] = (ky % step * step + kx % step) * phase + ky / step * width + kx / step;
  }
  matmul(
      to - from, (last - first) * width, [&](long long r) { return weight + (from + r) * c.in_channels * c.taps(); },
      TableDepth{c.in_channels, c.taps(), c.taps(), stride, a_table, b_table}, source,
      [&](long long r) { return room + r * room_stride; }, false);
  for (long long o = from; o < to; ++o) {
    const T own_bias = bias ? bias[o] : T(0);
    for (long long y = first; y < last; ++y) {
      const T* row = room + (o - from) * room_stride + (y - first) * width;
      T* result = out + (o * c.out_h() + y) * c.out_w();
      for (long long x = 0; x < c.out_w(); ++x) result[x] = row[x] + own_bias;
    }
  }
}

template <class T>
void gradient(const TileConvolution& c, const T* grad_out, long long first, long long last, T* to, long long stride) {
  const long long width = c.phase_w(), lead = c.reach_w();
  for (long long o = 0; o < c.out_channels; ++o) {
    T* row = to + o * stride;
    for (long long x = 0; x < lead; ++x) *row++ = 0;
    for (long long y = first - c.reach_h(); y < last; ++y, row += width) {
      const bool inside = y >= 0 && y < c.out_h();
      const long long real = inside ? c.out_w() : 0;
      if (inside) __builtin_memcpy(row, grad_out + (o * c.out_h() + y) * c.out_w(), real * sizeof(T));
      for (long long x = real; x < width; ++x) row[x] = 0;
    }
  }
}

template <class T>
void grad_source(const TileConvolution& c, const T* gradient, long long stride, const T* weight, long long from,
                 long long to, long long first, long long last, T* room, long long room_stride, T* result,
                 long long result_stride) {
  const long long width = c.phase_w(), step = c.stride, elements = (last - first) * width;
  for (long long p = 0; p < c.phases(); ++p) {
    long long a_table[kMostTileTaps], b_table[kMostTileTaps], count = 0;
    for (long long tap = 0; tap < c.taps(); ++tap) {
      const long long ky = tap / c.kernel_w, kx = tap % c.kernel_w;
      if (ky % step * step + kx % step != p) continue;
      a_table[count] = tap;
      b_table[count++] = c.reach_w() + (c.reach_h() - ky / step) * width - kx / step;
    }
    matmul(
        to - from, elements, [&](long long r) { return weight + (from + r) * c.taps(); },
        TableDepth{c.out_channels, count, c.in_channels * c.taps(), stride, a_table, b_table}, gradient,
        [&](long long r) { return room + r * room_stride; }, false);
    for (long long i = from; i < to; ++i)
      __builtin_memcpy(result + i * result_stride + p * c.phase_h() * width + first * width,
                       room + (i - from) * room_stride, elements * sizeof(T));
  }
}

template <class T>
void fold(const TileConvolution& c, const T* grad_source, T* grad_x, T* scratch) {
  const long long padded = c.width + 2 * c.padding, step = c.stride, phase = c.phase_h() * c.phase_w();
  T* sums = scratch;
  for (long long i = 0; i < c.height * c.width; ++i) grad_x[i] = 0;
  // One row of the padded image's gradient at its place.
  const auto deal = [&](const T* row, long long y) {
    const long long target = padded_origin(y - c.padding, c.height, c.padding, c.mode);
    if (target < 0) return;
    T* to = grad_x + target * c.width;
    for (long long x = 0; x < c.width; ++x) to[x] += row[c.padding + x];
    const auto border = [&](long long x) {
      const long long column = padded_origin(x - c.padding, c.width, c.padding, c.mode);
      if (column >= 0) to[column] += row[x];
    };
    for (long long x = 0; x < c.padding; ++x) border(x);
    for (long long x = c.padding + c.width; x < padded; ++x) border(x);
  };
  T* joined = scratch + padded;
  for (long long y = 0; y < c.source_h(); ++y) {
    const T* row = grad_source + y % step * step * phase + y / step * c.phase_w();
    if (step == 2) {
      for (long long x = 0; x < c.source_w() / 2; ++x) {
        joined[2 * x] = row[x];
        joined[2 * x + 1] = row[phase + x];
      }
      if (c.source_w() % 2) joined[c.source_w() - 1] = row[c.source_w() / 2];
      row = joined;
    }
    if (!c.means) {
      deal(row, y);
      continue;
    }
    sums[0] = T(0.25) * row[0];
    for (long long x = 1; x < padded - 1; ++x) sums[x] = T(0.25) * (row[x - 1] + row[x]);
    sums[padded - 1] = T(0.25) * row[padded - 2];
    deal(sums, y);
    deal(sums, y + 1);
  }
}

template <class T>
void pixels(const TileConvolution& c, const T* x, long long first, long long last, T* to, long long channel_stride,
            T* scratch) {
  const long long width = c.source_w(), stride = tile_plane(width);
  for (long long y = first; y < last; ++y) {
    for (long long i = 0; i < c.in_channels; ++i) source_row(c, x + i * c.height * c.width, y, scratch + i * stride);
    transpose(scratch, stride, c.in_channels, width, to + (y - first) * width * channel_stride, channel_stride);
  }
}

template <class T>
void grad_weight(const TileConvolution& c, const T* grad_out, const T* pixels, long long channel_stride,
                 long long from, long long to, long long first, long long last, bool add, T* grad, long long stride) {
  const long long row = c.source_w() * channel_stride, out = c.out_h() * c.out_w();
  for (long long ky = 0; ky < c.kernel_h; ++ky)
    matmul(
        to - from, c.kernel_w * channel_stride,
        [&](long long r) { return grad_out + (from + r) * out + first * c.out_w(); },
        Depth{last - first, c.out_w(), c.out_w(), 1, c.stride * row, c.stride * channel_stride}, pixels + ky * row,
        [&](long long r) { return grad + ((from + r) * c.kernel_h + ky) * stride; }, add);
}

}  // namespace

#define SPARSE_GEN_DEFINE(T)                                                                                         \
  void tile_source(const TileConvolution& c, const T* x, long long first, long long last, T* to, long long stride,   \
                   T* scratch) {                                                                                     \
    source(c, x, first, last, to, stride, scratch);                                                                  \
  }                                                                                                                  \
  void tile_forward(const TileConvolution& c, const T* source, long long stride, const T* weight, const T* bias,     \
                    long long from, long long to, long long first, long long last, T* room, long long room_stride,   \
                    T* out) {                                                                                        \
    forward(c, source, stride, weight, bias, from, to, first, last, room, room_stride, out);                         \
  }                                                                                                                  \
  void tile_gradient(const TileConvolution& c, const T* grad_out, long long first, long long last, T* to,            \
                     long long stride) {                                                                             \
    gradient(c, grad_out, first, last, to, stride);                                                                  \
  }                                                                                                                  \
  void tile_grad_source(const TileConvolution& c, const T* gradient, long long stride, const T* weight,              \
                        long long from, long long to, long long first, long long last, T* room,                      \
                        long long room_stride, T* result, long long result_stride) {                                 \
    grad_source(c, gradient, stride, weight, from, to, first, last, room, room_stride, result, result_stride);       \
  }                                                                                                                  \
  void tile_fold(const TileConvolution& c, const T* grad_source, T* grad_x, T* scratch) {                            \
    fold(c, grad_source, grad_x, scratch);                                                                           \
  }                                                                                                                  \
  void tile_pixels(const TileConvolution& c, const T* x, long long first, long long last, T* to,                     \
                   long long channel_stride, T* scratch) {                                                           \
    pixels(c, x, first, last, to, channel_stride, scratch);                                                          \
  }                                                                                                                  \
  void tile_grad_weight(const TileConvolution& c, const T* grad_out, const T* pixels, long long channel_stride,      \
                        long long from, long long to, long long first, long long last, bool add, T* grad,            \
                        long long stride) {                                                                          \
    grad_weight(c, grad_out, pixels, channel_stride, from, to, first, last, add, grad, stride);                      \
  }
SPARSE_GEN_DEFINE(float)
SPARSE_GEN_DEFINE(double)
#undef SPARSE_GEN_DEFINE

}  // namespace sparse_gen::SPARSE_GEN_ISA
