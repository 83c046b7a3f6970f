// What every thread of the sparse convolution's kernels does. A block takes one channel and some of its pixels: pixels
// lie across lanes, and weights are uniform, staged in shared memory with their offsets worked out once for all pixels.
#pragma once

#include "chunks.h"
#include "host_device.h"
#include "image_load.h"
#include "padded_axis.h"
#include "sparse_conv2d.h"

namespace sparse_gen::cuda {

// A kept weight as its readers want it: 16 bytes in float, one broadcast load.
template <class T>
struct Tap {
  T value;
  int offset;  // from a pixel's base to what this weight multiplies, where padding plays no part
  int ky, kx;
};

constexpr int kThreads = 128;
constexpr int kTaps = 128;  // staged at once, one a thread
// For the compiler: 80 registers a thread, and 96 for the weights' gradient, with which nothing spills on sm_80 to sm_90;
// one block more and some do.
constexpr int kBlocksAtOnce = 6, kGradientBlocksAtOnce = 5;

template <class T, class Loads = NoLoad<T>>
struct Taps {
  Tap<T> tap[kTaps];
  Loads load[kTaps];
};

struct Group {
  long long begin, end;
  SPARSE_GEN_HD int steps() const { return (int)round_up_quotient(end - begin, (long long)kTaps); }
  SPARSE_GEN_HD int count(int step) const {
    const long long left = end - begin - (long long)step * kTaps;
    return left < kTaps ? (int)left : kTaps;
  }
};

// out = bias + Σ value · x. Pixels is how many pixels a thread holds; those of a block are kThreads apart.
template <class T, int Pixels, class Loads>
struct ForwardBlock {
  using Shared = Taps<T, Loads>;

  ConvShape s;
  ConvPattern pattern;
  Image<T> x;
  const T *values, *bias;
  T* out;

  struct State {
    const T* image;
    Group group;
    long long plane;  // of the output
    int experiment, first;
    int y[Pixels], x[Pixels], base[Pixels];  // the window's upper left corner in the image, and its offset
    bool inside;                             // all windows are
    T sum[Pixels];
  };

  SPARSE_GEN_HD int tiles() const { return round_up_quotient(s.out_plane(), kThreads * Pixels); }
  SPARSE_GEN_HD long long blocks() const { return (long long)s.experiments * tiles() * s.out_channels; }

  // Blocks of all output channels on the same pixels follow one another: they read the same part of x.
  SPARSE_GEN_HD void begin(int block, int thread, State& state) const {
    const int channel = block % s.out_channels, tile = block / s.out_channels % tiles();
    state.experiment = block / s.out_channels / tiles();
    state.plane = (long long)state.experiment * s.out_channels + channel;
    state.image = x.data + state.experiment * x.experiment;
    state.group = {read(pattern.by_output + channel), read(pattern.by_output + channel + 1)};
    state.first = tile * kThreads * Pixels + thread;
    state.inside = true;
    const T start = bias ? read(bias + state.plane) : T(0);
    const int width = s.out_w(), last = s.out_plane() - 1;
    for (int j = 0; j < Pixels; ++j) {
      // Threads beyond the plane repeat its last pixel and store nothing.
      const int pixel = state.first + j * kThreads < last ? state.first + j * kThreads : last;
      state.y[j] = pixel / width * s.stride - s.padding;
      state.x[j] = pixel % width * s.stride - s.padding;
      state.base[j] = state.y[j] * x.row + state.x[j];
      state.inside = state.inside && state.y[j] >= 0 && state.y[j] + s.kernel_h <= s.height && state.x[j] >= 0 &&
                     state.x[j] + s.kernel_w <= s.width;
      state.sum[j] = start;
    }
  }

  SPARSE_GEN_HD void stage(int thread, int step, const State& state, Shared& shared) const {
    if (thread >= state.group.count(step)) return;
    const long long k = state.group.begin + (long long)step * kTaps + thread;
    const int channel = read(pattern.taps + s.kept + k), ky = read(pattern.taps + 2LL * s.kept + k);
    const int kx = read(pattern.taps + 3LL * s.kept + k);
    const T value = read(values + (long long)state.experiment * s.kept + k);
    shared.tap[thread] = {value, channel * x.plane + ky * x.row + kx, ky, kx};
    shared.load[thread] = Loads::of(x.load + ((long long)state.experiment * s.in_channels + channel) * 5);
  }

  SPARSE_GEN_HD void accumulate(int step, const Shared& shared, State& state) const {
    const int count = state.group.count(step);
    if (state.inside) {
      for (int n = 0; n < count; ++n) {
        const Tap<T> tap = shared.tap[n];
        const Loads load = shared.load[n];
        for (int j = 0; j < Pixels; ++j)
          state.sum[j] += tap.value * load(read(state.image + state.base[j] + tap.offset));
      }
      return;
    }
    for (int n = 0; n < count; ++n) {
      const Tap<T> tap = shared.tap[n];
      const Loads load = shared.load[n];
      const int plane = tap.offset - tap.ky * x.row - tap.kx;
      for (int j = 0; j < Pixels; ++j) {
        const int y = padded_origin(state.y[j] + tap.ky, s.height, s.padding, s.mode);
        const int column = padded_origin(state.x[j] + tap.kx, s.width, s.padding, s.mode);
        if (y >= 0 && column >= 0) state.sum[j] += tap.value * load(read(state.image + plane + y * x.row + column));
      }
    }
  }

  SPARSE_GEN_HD void finish(const State& state) const {
    for (int j = 0; j < Pixels; ++j) {
      const int pixel = state.first + j * kThreads;
      if (pixel < s.out_plane()) out[state.plane * s.out_plane() + pixel] = state.sum[j];
    }
  }
};

// grad_x: every pixel gathers from all padded positions that repeat it. With stride 2 a block takes pixels of one phase,
// the parity of the padded position, since only the weights of that phase reach them.
template <class T, int Pixels>
struct InputGradientBlock {
  using Shared = Taps<T>;

  ConvShape s;
  ConvPattern pattern;
  const T *grad_out, *values;
  T* grad_x;

  struct State {
    const T* gradient;
    Group group;
    long long plane;  // of the input
    int experiment, first, pixels, row_phase, column_phase, rows_from, columns_from, columns;
    int y[Pixels], x[Pixels], base[Pixels];
    bool inside;
    T sum[Pixels];
  };

  SPARSE_GEN_HD int tiles() const {
    return round_up_quotient(s.halved(s.height) * s.halved(s.width),
                             kThreads * Pixels);
  }
  SPARSE_GEN_HD int phases() const { return s.stride * s.stride; }
  SPARSE_GEN_HD long long blocks() const { return (long long)s.experiments * tiles() * s.in_channels * phases(); }
  // A replicated border also stands at positions of the other phases.
  SPARSE_GEN_HD bool all_phases() const { return s.stride > 1 && s.mode == kReplicate && s.padding > 0; }
  // The first image row or column of a phase.
  SPARSE_GEN_HD int first_of(int phase) const { return (phase + s.padding) & s.odd(); }

  SPARSE_GEN_HD void begin(int block, int thread, State& state) const {
    const int group = block % (s.in_channels * phases()), channel = group / phases();
    const int rest = block / (s.in_channels * phases());
    state.experiment = rest / tiles();
    state.plane = (long long)state.experiment * s.in_channels + channel;
    state.gradient = grad_out + (long long)state.experiment * s.out_channels * s.out_plane();
    state.row_phase = group % phases() >> s.odd();
    state.column_phase = group & s.odd();
    state.rows_from = first_of(state.row_phase);
    state.columns_from = first_of(state.column_phase);
    state.columns = s.halved(s.width - state.columns_from);
    state.pixels = s.halved(s.height - state.rows_from) * state.columns;
    state.first = rest % tiles() * kThreads * Pixels + thread;
    const int from = all_phases() ? channel * phases() : group, to = all_phases() ? from + phases() : group + 1;
    state.group = {read(pattern.by_input + from), read(pattern.by_input + to)};
    // An image of one row or column has no pixel of some phases.
    if (state.pixels == 0) state.group.end = state.group.begin;
    state.inside = true;
    for (int j = 0; j < Pixels && state.pixels; ++j) {
      const int wanted = state.first + j * kThreads;
      const int pixel = wanted < state.pixels ? wanted : state.pixels - 1;
      state.y[j] = state.rows_from + pixel / state.columns * s.stride;
      state.x[j] = state.columns_from + pixel % state.columns * s.stride;
      const int row = (state.y[j] + s.padding) >> s.odd(), column = (state.x[j] + s.padding) >> s.odd();
      state.base[j] = row * s.out_w() + column;
      state.inside = state.inside && row >= (s.kernel_h - 1) >> s.odd() && row < s.out_h() &&
                     column >= (s.kernel_w - 1) >> s.odd() && column < s.out_w() &&
                     padded_count(state.y[j], s.height, s.padding, s.mode) == 1 &&
                     padded_count(state.x[j], s.width, s.padding, s.mode) == 1;
      state.sum[j] = 0;
    }
  }

  SPARSE_GEN_HD void stage(int thread, int step, const State& state, Shared& shared) const {
    if (thread >= state.group.count(step)) return;
    const long long k = read(pattern.input_order + state.group.begin + (long long)step * kTaps + thread);
    const int channel = read(pattern.taps + k), ky = read(pattern.taps + 2LL * s.kept + k);
    const int kx = read(pattern.taps + 3LL * s.kept + k);
    const T value = read(values + (long long)state.experiment * s.kept + k);
    shared.tap[thread] = {value, channel * s.out_plane() - (ky >> s.odd()) * s.out_w() - (kx >> s.odd()), ky, kx};
  }

  SPARSE_GEN_HD void accumulate(int step, const Shared& shared, State& state) const {
    const int count = state.group.count(step);
    if (state.inside) {
      for (int n = 0; n < count; ++n) {
        const Tap<T> tap = shared.tap[n];
        if ((tap.ky & s.odd()) != state.row_phase || (tap.kx & s.odd()) != state.column_phase) continue;
        for (int j = 0; j < Pixels; ++j) state.sum[j] += tap.value * read(state.gradient + state.base[j] + tap.offset);
      }
      return;
    }
    for (int n = 0; n < count; ++n) {
      const Tap<T> tap = shared.tap[n];
      const int plane = tap.offset + (tap.ky >> s.odd()) * s.out_w() + (tap.kx >> s.odd());
      for (int j = 0; j < Pixels; ++j) state.sum[j] += tap.value * gathered(state, j, tap, plane);
    }
  }

  SPARSE_GEN_HD void finish(const State& state) const {
    for (int j = 0; j < Pixels; ++j)
      if (state.first + j * kThreads < state.pixels)
        grad_x[state.plane * s.plane() + state.y[j] * s.width + state.x[j]] = state.sum[j];
  }

 private:
  // What reaches a pixel through one weight, from all padded positions that repeat it.
  SPARSE_GEN_HD T gathered(const State& state, int j, const Tap<T>& tap, int plane) const {
    T sum = 0;
    const int rows = padded_count(state.y[j], s.height, s.padding, s.mode);
    const int columns = padded_count(state.x[j], s.width, s.padding, s.mode);
    for (int m = 0; m < rows; ++m) {
      const int row = padded_position(m, state.y[j], s.height, s.padding, s.mode) + s.padding - tap.ky;
      if (row < 0 || (row & s.odd()) || (row >> s.odd()) >= s.out_h()) continue;
      for (int n = 0; n < columns; ++n) {
        const int column = padded_position(n, state.x[j], s.width, s.padding, s.mode) + s.padding - tap.kx;
        if (column < 0 || (column & s.odd()) || (column >> s.odd()) >= s.out_w()) continue;
        sum += read(state.gradient + plane + (row >> s.odd()) * s.out_w() + (column >> s.odd()));
      }
    }
    return sum;
  }
};

// The kept weights' gradient: a block holds some pixels of one output channel's gradient in registers, every warp the
// same ones, and its warps share out that channel's weights. The sums over a warp's lanes are the partial sums of that
// weight, which a second kernel adds up in a fixed order.
template <class T, int Pixels, class Loads>
struct WeightGradientWarp {
  ConvShape s;
  ConvPattern pattern;
  const T* grad_out;
  Image<T> x;
  T* partial;  // (E, chunks, kept)

  static constexpr int kWarps = kThreads / kWarp;

  struct State {
    const T *image, *load;
    Group group;
    T* partial;
    int first, base[Pixels];
    bool inside;
    T gradient[Pixels];
  };

  SPARSE_GEN_HD int chunks() const { return round_up_quotient(s.out_plane(), kWarp * Pixels); }
  SPARSE_GEN_HD long long blocks() const { return (long long)s.experiments * chunks() * s.out_channels; }

  SPARSE_GEN_HD void begin(int block, int lane, State& state) const {
    const int channel = block % s.out_channels, rest = block / s.out_channels;
    const long long experiment = rest / chunks();
    state.image = x.data + experiment * x.experiment;
    state.load = x.load + experiment * s.in_channels * 5;
    state.group = {read(pattern.by_output + channel), read(pattern.by_output + channel + 1)};
    state.partial = partial + (long long)rest * s.kept;
    state.first = rest % chunks() * kWarp * Pixels + lane;
    state.inside = true;
    if (state.group.begin == state.group.end) return;
    const T* gradient = grad_out + (experiment * s.out_channels + channel) * s.out_plane();
    for (int j = 0; j < Pixels; ++j) {
      const int wanted = state.first + j * kWarp, y = top(j, state), column = left(j, state);
      state.base[j] = y * x.row + column;
      state.inside = state.inside && y >= 0 && y + s.kernel_h <= s.height && column >= 0 &&
                     column + s.kernel_w <= s.width;
      state.gradient[j] = wanted < s.out_plane() ? read(gradient + wanted) : T(0);
    }
  }

  // This lane's part of the gradient of weight k.
  SPARSE_GEN_HD T dot(long long k, const State& state) const {
    const int channel = read(pattern.taps + s.kept + k), ky = read(pattern.taps + 2LL * s.kept + k);
    const int kx = read(pattern.taps + 3LL * s.kept + k);
    const T* plane = state.image + (long long)channel * x.plane;
    const Loads load = Loads::of(state.load + channel * 5LL);
    T sum = 0;
    if (state.inside) {
      for (int j = 0; j < Pixels; ++j)
        sum += state.gradient[j] * load(read(plane + state.base[j] + ky * x.row + kx));
      return sum;
    }
    for (int j = 0; j < Pixels; ++j) {
      const int y = padded_origin(top(j, state) + ky, s.height, s.padding, s.mode);
      const int column = padded_origin(left(j, state) + kx, s.width, s.padding, s.mode);
      if (y >= 0 && column >= 0) sum += state.gradient[j] * load(read(plane + y * x.row + column));
    }
    return sum;
  }

 private:
  SPARSE_GEN_HD int pixel(int j, const State& state) const {
    const int wanted = state.first + j * kWarp;
    return wanted < s.out_plane() ? wanted : s.out_plane() - 1;
  }
  SPARSE_GEN_HD int top(int j, const State& state) const { return pixel(j, state) / s.out_w() * s.stride - s.padding; }
  SPARSE_GEN_HD int left(int j, const State& state) const { return pixel(j, state) % s.out_w() * s.stride - s.padding; }
};

// Pixels a thread: many where there is work for every multiprocessor all the same, since they share the reads of a
// weight and the sum over a warp. Shapes alone decide: results do not depend on the GPU or on other experiments.
SPARSE_GEN_HD bool many_pixels(int pixels) { return pixels >= 64 * 64; }
constexpr int kFewConvPixels = 1, kManyConvPixels = 4, kFewGradientPixels = 2, kManyGradientPixels = 8;

}  // namespace sparse_gen::cuda
